"""The cost of a reconstruction, on a tiny network: what is counted, and what the page says of the aim."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

import pytest

from model_zoo.records import Record, Results
from model_zoo.studies.refit_cost import measured, page, profiled

pytestmark = pytest.mark.usefixtures("one_thread")


def _busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def _work() -> None:
    _busy(0.05)
    _busy(0.05)
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass


def test_seconds_inside_of_functions_are_part_of_the_whole() -> None:
    whole, inside = profiled(_work, {"busy": _busy, "never": page})
    assert inside["never"] == 0
    assert 0.1 <= inside["busy"] < whole


def test_sums_and_solves_are_parts_of_a_refit() -> None:
    f = measured("timm:test_resnet", Namespace(images=8)).figures
    assert 0 < f["solves"] < f["solves"] + f["sums"] < f["whole"]
    assert f["times"] == (f["whole"] - f["solves"]) / (f["dense"] + f["pruned"])


def test_the_page_marks_what_is_more_than_was_aimed_at() -> None:
    seconds = {"dense": 2.0, "pruned": 1.0, "whole": 10.0, "sums": 1.0, "solves": 3.0}
    lines = [Record("a", {"images": 8, **seconds, "times": 1.5}), Record("b", {"images": 8, **seconds, "times": 7 / 3})]
    lines[1].checks["cost"] = "2.33, at most 2.0 wanted"
    text = "\n".join(page(Results({}, {r.name: r for r in lines}, Path("x.jsonl"))))
    assert "| a | 8 | 2.0 | 1.0 | 10.0 | 1.0 | 3.0 | 6.0 | 1.50 |" in text
    assert "| **2.33** |" in text
