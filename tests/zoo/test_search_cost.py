"""The comparison of searches, on narrow networks and few images: what is timed, what is trained, resuming, the page."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from model_zoo.measuring import search_cost
from model_zoo.measuring.search_cost import NETWORKS
from model_zoo.papers import resnet, vgg16_bn
from model_zoo.records import Record, append, begin, read
from model_zoo.runner import main

SIZE = ["--images", "16", "--gates", "1", "--train", "2", "--tune", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"vgg16_bn": partial(vgg16_bn, in_channels=1, width=0.125)}
    narrow["resnet_20"] = partial(resnet, 8, in_channels=1, width=0.5)
    for name, make in narrow.items():
        monkeypatch.setitem(NETWORKS, name, replace(NETWORKS[name], make=make))


def test_both_searches_are_timed_in_turns_and_end_at_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[tuple[str, int]] = []
    fit = search_cost.fit

    def noted(training: Any, data: Any, loss: Any, epochs: int, *args: Any, **options: Any) -> None:
        fits.append((type(training.hooks).__module__.rpartition(".")[2], epochs))
        fit(training, data, loss, epochs, *args, **options)

    monkeypatch.setattr(search_cost, "fit", noted)
    file = tmp_path / "cost.jsonl"
    where = ["--out", str(file), "--work", str(tmp_path / "runs")]
    main(["run", "search_cost", "resnet_20", *SIZE, *where])
    assert fits == [("scratch", 1), ("slimming", 2), ("scratch", 1)]
    figures, seconds = (record := read(file)[1]["resnet_20"]).figures, record.seconds
    assert {*seconds} == {"scratch wall", "scratch cpu", "slimming wall", "slimming cpu"}
    assert figures["times_cpu"] == pytest.approx(seconds["slimming cpu"] / seconds["scratch cpu"], rel=0.1)
    for method, epochs in (("scratch", 3), ("slimming", 1)):
        of = figures[method]
        assert of["epochs"] == epochs
        assert 0.45 < of["macs"] / figures["dense_macs"] <= 0.5
        assert 0 <= of["accuracy"] <= 1
    fits.clear()
    main(["run", "search_cost", "resnet_20", "vgg16_bn", *SIZE, *where, "--resume"])
    assert len(fits) == 3, "resnet_20 is there already"
    known = read(file)[1]
    assert [*known] == ["resnet_20", "vgg16_bn"]
    assert known["resnet_20"] == record


def test_the_page(tmp_path: Path) -> None:
    file = tmp_path / "cost.jsonl"
    begin(file, "python -m model_zoo run search_cost")
    of = {"macs": 50, "accuracy": 0.9, "before": 0.1, "params": 1}
    figures = {"dense_macs": 100, "gates": 10, "train": 160, "times_wall": 12.3, "times_cpu": 14.5}
    figures |= {"scratch": {**of, "epochs": 200}, "slimming": {**of, "epochs": 40, "accuracy": 0.8}}
    seconds = {"scratch wall": 10.0, "scratch cpu": 8.0, "slimming wall": 123.0, "slimming cpu": 116.0}
    append(file, Record("vgg16_bn", figures, seconds))
    main(["page", "search_cost", "--out", str(file)])
    page = file.with_suffix(".md").read_text()
    assert "| vgg16_bn | scratch | 10 | 10.0 | 8.0 | 50.00% | 200 | 90.00% |" in page
    assert "| vgg16_bn | slimming | 160 | 123.0 | 116.0 | 50.00% | 40 | 80.00% |" in page
    assert "takes 12.3 times as long as that of scratch by the clock, 14.5 times by processor seconds." in page
    assert "fine-tuned for 40 epochs, scratch's has new weights and\ntrains for 200." in page
