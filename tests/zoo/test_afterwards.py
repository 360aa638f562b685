"""Training after a cut: what a run begins with, that runs leave each other alone, and the page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_zoo.measuring import afterwards
from model_zoo.measuring.afterwards import DENSE, Job, measured
from model_zoo.pages.afterwards import page
from model_zoo.pictures import Pictures
from model_zoo.records import Record, Results
from model_zoo.studies.afterwards import jobs
from model_zoo.trained import Trained
from tests.nets import Small, make

pytestmark = pytest.mark.usefixtures("one_thread")


class Drawn(afterwards.Made):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (64, 3, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.randint(4, (64,), generator=generator)
        self.pictures = Pictures(images, labels, ((0.5,) * 3, (0.3,) * 3))

        def quality(model: nn.Module) -> float:
            with torch.no_grad():
                return float((model(self.pictures.batch(torch.arange(64))[0]).argmax(1) == labels).float().mean())

        def calibration(seed: int) -> Tensor:
            return self.pictures.batch(torch.arange(seed, seed + 32))[0]

        self.case = Trained(make(Small), calibration, quality, "share")
        self.macs = afterwards.fxprune.analyze(self.case.model, calibration(0)[:1]).macs()


@pytest.mark.parametrize(("method", "begin"), [(DENSE, DENSE), ("l2", "cut"), ("l2", "norms"), ("obs", "refitted")])
def test_a_run_leaves_the_trained_network_alone(method: str, begin: str) -> None:
    made = Drawn()
    before = {name: value.clone() for name, value in made.case.model.state_dict().items()}
    record = measured(Job("drawn", method, begin, 0.6, 160, 0), made)
    assert not record.failures
    assert 0 <= record.figures["before"] <= 1
    assert 0 <= record.figures["after"] <= 1
    assert all(torch.equal(value, before[name]) for name, value in made.case.model.state_dict().items())
    again = measured(Job("drawn", method, begin, 0.6, 160, 0), made)
    assert again.figures == record.figures


def test_every_start_is_trained_for_as_long(tmp_path: Path) -> None:
    given: dict[str, Any] = {"seeds": [0], "case": ["resnet20"], "images": [10, 20], "ratio": [0.5]}
    found = jobs(argparse.Namespace(**given, method=["l2", "Torch-Pruning"]))
    assert [str(job) for job in found[:3]] == [
        "resnet20, dense, 10 images, seed 0", "resnet20, l2, cut, 0.5, 10 images, seed 0",
        "resnet20, l2, norms, 0.5, 10 images, seed 0",
    ]  # fmt: skip
    assert len(found) == 2 * (1 + 3 + 2)
    records = {
        str(job): Record(str(job), {**job._asdict(), "unit": "%", "before": 1.0, "after": float(job.images)})
        for job in found
    }
    _, text, _ = page(Results({}, records, tmp_path / "afterwards.jsonl"))
    assert "| resnet20, % | 0.5 | l2 | norms | 1.00 ± 0.00 | 10.00 | 20.00 |" in text
