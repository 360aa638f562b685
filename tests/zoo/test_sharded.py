"""The study of a decoder that two processes share, on a tiny one."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from model_zoo.records import Results
from model_zoo.studies import sharded

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, size in (("WIDTH", 32), ("HEADS", 2), ("HIDDEN", 48)):
        monkeypatch.setattr(sharded, name, size)
    monkeypatch.setattr(sharded, "start_processes", lambda run, given, nprocs, start_method: run(0, *given))
    record = sharded.measured("whole", Namespace(layers=1, words=16))
    (found,) = record.figures["processes"]
    assert found["params"][1] <= 0.5 * found["params"][0]
    assert found["held"] * 2**20 == 2 * found["params"][0]
    assert found["gathered"] * 2**20 == 2 * 32 * 48
    (told,) = sharded.page(Results({}, {"whole": record}, tmp_path / "sharded.jsonl"))
    assert "| whole | 0 | 0 M -> 0 M | 0 | 0 |" in told
