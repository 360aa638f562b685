"""The study of a decoder that two processes share, on a tiny one."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from model_zoo.records import Results
from model_zoo.studies import sharded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("name", "width"), [("whole", 32), ("whole, refitted", 8)])
def test_one_process(name: str, width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for size, value in {"WIDTH": 32, "HEADS": 2, "HIDDEN": 48, "TOKENS": 8}.items():
        monkeypatch.setattr(sharded, size, value)
    monkeypatch.setattr(sharded, "start_processes", lambda run, given, nprocs, start_method: run(0, *given))
    record = sharded.measured(name, Namespace(layers=1, words=16))
    (found,) = record.figures["processes"]
    assert found["params"][1] <= 0.5 * found["params"][0]
    assert found["held"] * 2**20 == 2 * found["params"][0]
    assert found["gathered"] * 2**20 == 2 * width * max(16, width * 3 // 2)
    (told,) = sharded.page(Results({}, {name: record}, tmp_path / "sharded.jsonl"))
    assert f"| {name} | 0 | 0 M -> 0 M | 0 | 0 |" in told
    if name == "whole":
        assert found["outputs"] is None
    else:
        before, after = found["outputs"]
        assert after < before
        assert f"| {before:.3f} -> {after:.3f} |" in told
