"""A checkpoint is written, read in a new process, and told on a page; on a network that is drawn."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest

import fxprune
from model_zoo.measuring import checkpoints
from model_zoo.measuring.checkpoints import Fitting, Job, command, loaded, quality_of, written
from model_zoo.pages.checkpoints import page
from model_zoo.records import Record, Results
from tests.zoo.drawn import drawn

pytestmark = pytest.mark.usefixtures("one_thread")
JOB = Job("drawn", 0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    """What is written, and where."""
    folder = tmp_path_factory.mktemp("out") / "checkpoints" / JOB.folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoints.CHECKPOINTS, "drawn", "what is drawn")
        return written(JOB, Fitting(), drawn(folder), 0.0, folder), folder


@pytest.fixture
def record(made: tuple[Record, Path]) -> Record:
    return copy.deepcopy(made[0])


@pytest.fixture
def folder(made: tuple[Record, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / JOB.folder))


def test_a_folder_has_the_same_quality_in_a_new_process(record: Record, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors", "plan.json"]
    loaded(record, drawn, folder, folder, 1)
    assert record.figures["loaded"] == record.figures["quality"] < 0
    assert {*record.checks} == {"prune", "budget", "onnxruntime", "folder", "loaded"}
    assert record.passed
    text = (folder / "README.md").read_text()
    assert f"| what is drawn, -error | 0 | {record.figures['quality']:g} |" in text
    assert record.figures["command"] in text
    assert record.figures["refit"] in text
    assert record.figures["ms"][1] > 0


def test_another_network_in_the_folder_is_noticed(record: Record, folder: Path) -> None:
    case = drawn(folder)
    fxprune.save_pretrained(fxprune.prune(case.model, case.calibration(0)[:1], flops=0.4, progress=False), folder)
    loaded(record, drawn, folder, folder, 1)
    assert record.checks["loaded"].startswith(f"AssertionError: {quality_of(drawn, folder, folder, 1)} instead of ")


def test_the_page_has_a_row_for_each_and_says_what_is_missing(record: Record, tmp_path: Path) -> None:
    failed = Record("other, 0.5", checks={"prune": "why"})
    records = {one.name: one for one in (record, failed)}
    text = "\n\n".join(page(Results({}, records, tmp_path / "checkpoints.jsonl")))
    assert "| [drawn, 0.5](checkpoints/drawn-0.5/README.md), [plan](checkpoints/drawn-0.5/plan.json) |" in text
    assert "- other, 0.5: **fails** prune: why" in text
    assert text.startswith("0 of 1 folders"), "nothing was read yet"


def test_the_command_names_what_is_not_as_usual() -> None:
    assert command(JOB, Fitting()) == "python -m model_zoo run checkpoints 'drawn, 0.5' --data DIR --again"
    assert "'drawn, 0.5' --round-to 1 --seed 2 --data DIR" in command(JOB, Fitting(round_to=1, seed=2))
