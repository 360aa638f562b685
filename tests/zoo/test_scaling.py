"""The growth of the stages, at small sizes: what is timed, what fails, resuming, the exponents, the page."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model_zoo import runner
from model_zoo.measuring.scaling import imported, stages
from model_zoo.networks.growing import Decoder, perceptron, residual
from model_zoo.pages.scaling import STAGES, exponent
from model_zoo.records import Record, append, begin, read
from model_zoo.runner import main
from model_zoo.studies import scaling
from model_zoo.studies.scaling import Point
from model_zoo.study import load


def page(out: Path) -> str:
    main(["page", "scaling", "--out", str(out)])
    return out.with_suffix(".md").read_text()


def test_every_stage_is_timed_and_half_of_the_macs_stay() -> None:
    figures = stages(residual(6, 4).eval(), (torch.randn(1, 3, 16, 16),))
    assert all(figures[stage] >= 0 for stage in (*STAGES, "score"))
    assert 0.3 < figures["ratio"] <= 0.5
    assert figures["nodes"] > 10


def test_a_decoder_on_meta_is_planned() -> None:
    with torch.device("meta"):
        model, tokens = Decoder(256, 1, 50).eval(), torch.zeros(1, 8, dtype=torch.int64)
    figures = stages(model, (tokens,))
    assert 0.3 < figures["ratio"] <= 0.5


def test_the_networks_are_as_deep_and_as_large_as_they_say() -> None:
    convolutions = [m for m in residual(18, 4).modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 18
    with torch.device("meta"):
        weights = sum(p.nbytes for p in perceptron(0.5).parameters())
    assert weights == pytest.approx(0.5 * 2**30, rel=0.01)


def test_the_exponent_is_that_of_the_upper_half() -> None:
    sizes = [1.0, 2, 4, 8, 16, 32]
    assert exponent(sizes, [1, 1, 1, *(3 * size**1.5 for size in sizes[3:])]) == pytest.approx(1.5)


def test_points_are_measured_once_and_failures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measured(study: Any, ready: Any, options: Any, total: int) -> Iterator[Record]:
        while (following := ready()) is not None:
            yield of(following[1])

    def of(point: Point) -> Record:
        kind, name = point
        asked.append(name)
        times = dict.fromkeys((*STAGES, "score"), 0.1 * float(name))
        figures: dict[str, Any] = {"fails": "no end within 1 s"} if name == "66" else times
        return Record(f"{kind} {name}", {"kind": kind, "point": name, "memory_gib": 1.0, **figures})

    monkeypatch.setattr(runner, "_apart", measured)
    monkeypatch.setitem(scaling.KINDS, "depth", (scaling._depth, ["18", "34"]))
    out = tmp_path / "scaling.jsonl"
    main(["run", "scaling", "depth *", "--out", str(out), "--timeout", "1"])
    monkeypatch.setitem(scaling.KINDS, "depth", (scaling._depth, ["18", "34", "66", "130"]))
    main(["run", "scaling", "depth *", "--out", str(out), "--timeout", "1", "--resume"])
    assert asked == ["18", "34", "66", "130"]
    text = out.with_suffix(".md").read_text()
    assert "- depth 66: no end within 1 s" in text
    assert "| layers | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |" in text
    assert out.with_suffix(".png").exists()


def test_the_import_is_timed_in_interpreters_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_zoo.measuring.scaling.INTERPRETERS", 1)
    out = tmp_path / "scaling.jsonl"
    begin(out, "python -m model_zoo run scaling")
    append(out, Record("import fxprune", {"kind": "import", "point": "fxprune", **imported("fxprune")}))
    (record,) = read(out)[1].values()
    assert record.figures["import"] > 0
    assert f"`fxprune` {record.figures['import']:.2f} s." in page(out)


def test_families_that_are_slow_are_named(tmp_path: Path) -> None:
    out = tmp_path / "scaling.jsonl"
    begin(out, "python -m model_zoo run scaling")
    for name, label in (("timm:quick", 0.5), ("timm:slow", 3.0)):
        times = {**dict.fromkeys((*STAGES, "score"), 0.6), "label": label}
        append(out, Record(f"families {name}", {"kind": "families", "point": name, **times}))
    text = page(out)
    assert "more than 2 s: timm:slow (3.0)." in text
    assert "more than 5 s: timm:slow (5.4)." in text
    assert len(read(out)[1]) == 2


def test_a_process_that_dies_is_told() -> None:
    options = Namespace(jobs=1, threads=1, until=None, timeout=120, memory=None)
    (record,) = runner.run(load()["scaling"], {"consume x": Point("consume", "no number")}, set(), options)
    assert "no number" in record.failures["process"]
