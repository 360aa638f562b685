"""The study of what an epoch over images takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_zoo.records import read
from model_zoo.runner import main


def test_every_way_reads_all_images(cifar10_folder: Path, tmp_path: Path) -> None:
    main(["run", "loading", "--data", str(cifar10_folder), "--out", str(tmp_path / "a.jsonl")])
    records = read(tmp_path / "a.jsonl")[1]
    assert {name: r.figures["images"] for name, r in records.items()} == {"files": 20, "decoded": 20, "decoding": 40}
    assert all(r.figures["cpu"] > 0 for r in records.values())
    assert "An epoch from files takes" in (tmp_path / "a.md").read_text()


def test_a_data_set_in_another_layout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "loading", "--data", str(tmp_path), "--out", str(tmp_path / "a.jsonl")])
    assert "where folders train and test of images are" in capsys.readouterr().err
