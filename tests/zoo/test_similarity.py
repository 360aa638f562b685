"""The command of the similarity study: what it runs, what it leaves, and that it goes on where it was stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fxprune.reports.study import Similarity
from model_zoo.measuring.similarity import PAPER, SMALL, Sizes
from model_zoo.pages.similarity import findings, verdicts
from model_zoo.records import read
from model_zoo.runner import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_small_run_stopped_and_resumed(tmp_path: Path) -> None:
    out = tmp_path / "similarity.jsonl"
    main(["run", "similarity", "--smoke", "--out", str(out)])
    head, records = read(out)
    assert head["command"] == "python -m model_zoo run similarity --smoke"
    assert sorted(records) == sorted(SMALL.names())
    assert all(0 < r.figures["ratio"] <= 0.5 for r in records.values())
    assert all(len(r.figures["kept"]) == 13 for r in records.values())
    page = out.with_suffix(".md").read_text()
    assert "Not run yet" not in page
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    lines = out.read_text().splitlines()
    gone = [line for line in lines if json.loads(line).get("name") == "training 0, epoch 2"]
    out.write_text("\n".join(line for line in lines if line not in gone) + "\n")
    main(["page", "similarity", "--out", str(out)])
    assert "Not run yet: training 0, epoch 2." in out.with_suffix(".md").read_text()
    main(["run", "similarity", "--smoke", "--out", str(out), "--resume"])
    again = out.read_text().splitlines()
    assert again[:-1] == [line for line in lines if line not in gone], "what was there stays"
    assert json.loads(again[-1])["figures"] == json.loads(gone[0])["figures"]

    with pytest.raises(SystemExit):
        main(["run", "similarity", "--out", str(out), "--resume"])  # another command's file


def test_on_cifar10_with_sizes_of_options(
    cifar10_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_zoo.studies.similarity.PAPER", replace(PAPER, random_seeds=2, trainings=2))
    out, sizes = tmp_path / "a.jsonl", ["--width", "0.0625", "--images", "20", "--epochs", "4"]
    command = ["run", "similarity_cifar10", "--data", str(cifar10_folder), "--out", str(out)]
    main([*command, *sizes])
    head, records = read(out)
    assert Sizes.of(head).epochs == (1, 3, 4)
    assert [*records] == Sizes.of(head).names()
    page = out.with_suffix(".md").read_text()
    assert "VGG16-BN at 0.0625 of its width, 20 images of CIFAR-10, 4 epochs of training" in page
    assert all(f"training {seed}, epoch 4" in page for seed in (0, 1))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "pass --data DIR, where CIFAR-10 is"),
        (["--data", "nowhere"], "cifar10 is not complete"),
        (["--data", "nowhere", "--epochs", "1"], "--epochs 1: structures along a training take at least 2"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["run", "similarity_cifar10", "--out", str(tmp_path / "a.jsonl"), *more])
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_findings_are_means_over_pairs() -> None:
    names = [*SMALL.names()]
    assert names == ["random weights 0", "random weights 1", *(f"training 0, epoch {e}" for e in (1, 2)),
                     "training 1, epoch 2"]  # fmt: skip
    kept = np.random.default_rng(0).random((5, 7))
    found = Similarity.of(names, [str(layer) for layer in range(7)], kept)
    r = found.correlation
    rows = findings(SMALL, found)
    expected = [r[0, 1], r[3, 4], np.mean([r[0, 3], r[0, 4], r[1, 3], r[1, 4]]), r[2, 3], r[2, 3]]
    np.testing.assert_allclose([value for _, value, _ in rows], expected)
    assert [pairs for _, _, pairs in rows] == [1, 1, 4, 1, 1]


@pytest.mark.parametrize("holds", [True, False])
def test_verdicts_follow_the_figures(holds: bool) -> None:
    low, high = (0.2, 0.9) if holds else (0.9, 0.2)
    rows = [("", value, 1) for value in (low, high, low, 0.5, high, low)]
    word = "shown" if holds else "not shown"
    assert [line.rpartition(": ")[2] for line in verdicts(rows)] == [f"{word} here."] * 3
