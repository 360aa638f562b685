"""The study of sparse momentum on MNIST, on a few drawn images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model_zoo.measuring import gsm_mnist
from model_zoo.measuring.gsm_mnist import Training
from model_zoo.papers import lenet_300_100
from model_zoo.recipes.common import Sgd
from model_zoo.records import read
from model_zoo.runner import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images: ten classes, two of each."""
    folder, rng = tmp_path_factory.mktemp("mnist"), np.random.default_rng(0)
    for part in ("train", "test"):
        for name in map(str, range(10)):
            (folder / part / name).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


def test_every_rule_of_one_network_and_its_page(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsm_mnist, "EPOCH", 3)
    monkeypatch.setattr(gsm_mnist, "LOOKS", 2)
    out = tmp_path / "a.jsonl"
    options = ["--data", str(there), "--epochs", "4", "--batch", "5", "--freeze", "0.25", "--seeds", "0"]
    main(["run", "gsm_mnist", "--out", str(out), *options])
    (record,) = read(out)[1].values()
    figures = record.figures
    assert (figures["weights"], figures["kept"], figures["epochs"]) == (266_200, 4436, 4)
    paper, held = figures["rules"]["the paper's"], figures["rules"]["held after 25%"]
    assert [look["epoch"] for look in paper] == [look["epoch"] for look in held] == [2, 4]
    assert all(look["active"] <= 4436 for look in held)
    assert all(look["active"] > 4436 for look in paper), "others in every step"
    assert all(0 <= look["norm_cut"] <= 1 and look["support"] > 4436 for look in (*paper, *held))
    beside = figures["beside"]
    assert [(name, each["epochs"]) for name, each in beside.items()] == [("magnitude", 4), ("ticket", 3)]
    assert all(each["left"] == 4436 for each in beside.values()), "zeros stay zeros"
    files = figures["files"]
    assert files["entropy"] < files["sparse, save"] < 0.1 * files["dense, save"]
    assert files["sparse, export (sparse=True)"] < 0.1 * files["sparse, export"]
    text = out.with_suffix(".md").read_text()
    assert "| the paper's table | 98.19 | 98.18 | 98.18 |" in text
    assert f"| ticket | {100 * beside['ticket']['cut']:.2f} | 3 |" in text
    assert f"| {paper[0]['epoch']} | {paper[0]['support']} ({paper[0]['active']}) |" in text


def test_a_branch_goes_on_as_the_training_itself_would(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsm_mnist, "EPOCH", 2)
    options = argparse.Namespace(batch=5, epochs=280, data=there)
    images = gsm_mnist.images_of(options)
    torch.manual_seed(0)
    settings = Sgd(280, 5, 0.01, 0.9, warmup=1)
    training = Training(lenet_300_100(), settings, 60, images, options, 0)
    training.run(1)
    branch = training.branched()
    training.run(2)
    branch.run(2)
    pairs = zip(training.network.parameters(), branch.network.parameters(), strict=True)
    assert all(torch.equal(one, other) and one is not other for one, other in pairs)


def test_what_cannot_be_read_is_said_before_anything_is_trained(tmp_path: Path, capsys: Any) -> None:
    for given, reason in (([], "pass --data DIR, where MNIST is"), (["--data", str(tmp_path / "no")], "no")):
        with pytest.raises(SystemExit):
            main(["run", "gsm_mnist", "--out", str(tmp_path / "a.jsonl"), *given])
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()
