"""The comparison of searches, on narrow networks and few images: what is timed, what is trained, resuming, the page."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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
    narrow["resnet_20_cifar10"] = partial(resnet, 8, width=0.5)
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


def test_images_of_cifar(tmp_path: Path, capsys: Any) -> None:
    out = ["--out", str(tmp_path / "cost.jsonl"), "--work", str(tmp_path / "runs")]
    with pytest.raises(SystemExit):
        main(["run", "search_cost", "*cifar10", "--data", str(tmp_path / "no"), *out])
    assert str(tmp_path / "no") in capsys.readouterr().err
    rng = np.random.default_rng(0)
    for folder in (tmp_path / part / f"{name}" for part in ("train", "test") for name in range(10)):
        folder.mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
    main(["run", "search_cost", "*cifar10", "--data", str(tmp_path), *SIZE, *out])
    (record,) = read(tmp_path / "cost.jsonl")[1].values()
    assert (record.name, record.figures["images"]) == ("resnet_20_cifar10", 16)
    assert 0.45 < record.figures["slimming"]["macs"] / record.figures["dense_macs"] <= 0.5


def test_the_page(tmp_path: Path) -> None:
    file = tmp_path / "cost.jsonl"
    begin(file, "python -m model_zoo run search_cost")
    of = {"macs": 50, "accuracy": 0.9, "before": 0.1, "params": 1}
    figures = {"dense_macs": 100, "images": 2 * 10**9, "gates": 10, "train": 160, "times_wall": 12.3, "times_cpu": 14.5}
    figures |= {"scratch": {**of, "epochs": 200}, "slimming": {**of, "epochs": 40, "accuracy": 0.8}}
    seconds = {"scratch wall": 10.0, "scratch cpu": 8.0, "slimming wall": 123.0, "slimming cpu": 116.0}
    append(file, Record("vgg16_bn", figures, seconds))
    main(["page", "search_cost", "--out", str(file)])
    page = file.with_suffix(".md").read_text()
    assert "| vgg16_bn | 2000000000 | scratch | 10 | 10.0 | 8.0 | 2 | 22 | 50.00% | 200 | 90.00% |" in page
    assert "| vgg16_bn | 2000000000 | slimming | 160 | 123.0 | 116.0 | 32 | 36 | 50.00% | 40 | 80.00% |" in page
    assert "takes 12.3 times as long as that of scratch by the clock, 14.5 times by processor seconds." in page
    assert "fine-tuned for 40 epochs, scratch's has new weights and\ntrains for 200." in page
