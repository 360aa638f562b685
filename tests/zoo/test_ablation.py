"""Every variant of the reconstruction runs, uses what it says, and has its row on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model_zoo.measuring.ablation import USUAL, VARIANTS, Job, measured
from model_zoo.pages.ablation import page
from model_zoo.records import Record, Results
from tests.zoo.drawn import drawn

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_variant_differs_from_the_usual_in_one_thing(tmp_path: Path) -> None:
    records: dict[str, Record] = {}
    for name in VARIANTS:
        record = measured(Job("drawn", name, 0.5, 0), drawn(), 0.0)
        records[record.name] = record
    found: dict[str, Any] = {r.figures["variant"]: r.figures for r in records.values()}
    assert [found[name]["samples"] for name in (USUAL, "a quarter of the data", "twice the data")] == [16, 4, 32]
    assert found["all weights trained"]["refitted"] > found[USUAL]["refitted"]
    assert len({f["refitted"] for f in found.values()}) > len(VARIANTS) // 2
    _, text = page(Results({}, records, tmp_path / "ablation.jsonl"))
    assert all(f"| drawn, -error | 0.5 | {name} |" in text for name in VARIANTS)
