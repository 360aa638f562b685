"""What several tests of the studies share."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def cifar10_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of noise of every class of CIFAR-10, to train on and to test on; for reading only."""
    folder, rng = tmp_path_factory.mktemp("cifar10"), np.random.default_rng(0)
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for part, name in itertools.product(("train", "test"), classes):
        (folder / part / name).mkdir(parents=True)
        for number in range(2):
            image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            image.save(folder / part / name / f"{number}.jpg")
    return folder
