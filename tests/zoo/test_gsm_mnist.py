"""The study of sparse momentum on MNIST, on a few drawn images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
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
    options += ["--work", str(tmp_path)]
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


@pytest.fixture
def begin(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Training]:
    """A training that has the same first weights every time, and a file of this name."""
    monkeypatch.setattr(gsm_mnist, "EPOCH", 2)
    options = argparse.Namespace(batch=5, epochs=280, data=there, until=None)
    images = gsm_mnist.images_of(options)

    def made(name: str) -> Training:
        torch.manual_seed(0)
        settings = Sgd(280, 5, 0.01, 0.9, warmup=1)
        return Training(lenet_300_100(), settings, 60, tmp_path / name, images=images, options=options, seed=0)

    return made


def test_what_was_written_goes_on_as_the_training_itself_would(begin: Callable[[str], Training]) -> None:
    training = begin("one")
    training.look(1, 60)
    again = begin("one")
    assert (again.epoch, again.looks) == (1, training.looks)
    for each in (training, again):
        each.look(2, 60)
    assert again.looks == training.looks
    assert same(training, again)


def test_a_branch_leaves_the_training_alone_and_goes_on_from_its_file(
    begin: Callable[[str], Training], tmp_path: Path
) -> None:
    alone, training = begin("alone"), begin("one")
    alone.run(2)
    training.run(1)
    branch = training.held(tmp_path / "held")
    branch.run(2)
    training.run(2)
    assert same(training, alone)
    assert not same(training, branch), "its set of active weights is held"
    assert same(branch, begin("one").held(tmp_path / "held"))


def same(one: Training, other: Training) -> bool:
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    return all(torch.equal(a, b) and a is not b for a, b in pairs)


def test_a_run_that_is_stopped_anywhere_finds_what_one_that_is_not_finds(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gsm_mnist, "EPOCH", 2)
    monkeypatch.setattr(gsm_mnist, "LOOKS", 2)
    given = ["--data", str(there), "--epochs", "4", "--batch", "5", "--freeze", "0.25", "--seeds", "0"]

    def run(name: str, *more: str) -> dict[str, Any]:
        out = tmp_path / f"{name}.jsonl"
        main(["run", "gsm_mnist", "--out", str(out), "--work", str(tmp_path / name), *given, *more])
        return {case: record.figures | {"files": None} for case, record in read(out)[1].items()}  # times differ

    whole = run("whole")
    clock = count(0.0)
    monkeypatch.setattr(gsm_mnist, "time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr("model_zoo.runner.time", SimpleNamespace(time=lambda: 0.0, monotonic=lambda: 0.0))
    stops = 0
    while not (found := run("stopped", "--minutes", "0.04", *["--resume"] * (stops > 0))):
        clock = count(0.0)
        stops += 1
    assert stops > 4
    assert found == whole
    assert [file.name for file in tmp_path.glob("stopped/*/*")] == ["dense.pt"], "for other compressions"


def test_what_cannot_be_read_is_said_before_anything_is_trained(tmp_path: Path, capsys: Any) -> None:
    for given, reason in (([], "pass --data DIR, where MNIST is"), (["--data", str(tmp_path / "no")], "no")):
        with pytest.raises(SystemExit):
            main(["run", "gsm_mnist", "--out", str(tmp_path / "a.jsonl"), *given])
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()
