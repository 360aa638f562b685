"""The runner of studies: one file is one study, which is listed, run, resumed, stopped in time, and told about."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_zoo import records, studies
from model_zoo.records import read
from model_zoo.runner import main
from model_zoo.study import load

DROPPED = '''
"""Squares of numbers."""

import os

from model_zoo.records import Record, table
from model_zoo.study import Study, each


def measure(case, options):
    if case == "dies":
        os._exit(3)
    with open(options.out.with_suffix(".log"), "a") as log:
        log.write(f"{case} ")
    wrong = "odd" if int(case) % 2 else ""
    return Record(case, {"square": options.times * int(case) ** 2}, checks={"even": wrong})


def page(results):
    return ["Squares.", table(["number", "square"], ([r.name, str(r.figures["square"])] for r in results.lines))]


STUDY = Study(
    "squares", "what squares are", lambda options: ["2", "4", "12"], each(measure), page, needs=("patience",),
    open=True, options=lambda add: add("--times", type=int, default=1), finished=lambda record: record.passed,
    head=lambda options: {"device": f"slate {options.times}", "rules": {"odd": options.times % 2}},
)
'''


@pytest.fixture(autouse=True)
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module more in the package of studies."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more/squares.py").write_text(DROPPED)
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(tmp_path / "more")])


def run(out: Path, *words: str) -> list[str]:
    """The names of the cases that were measured."""
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)
    main(["run", "squares", *words, "--out", str(out)])
    return log.read_text().split() if log.exists() else []


def test_a_study_that_is_dropped_in_is_listed_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "squares         what squares are [patience]\n" in capsys.readouterr().out
    out = tmp_path / "new" / "squares.jsonl"
    out.parent.mkdir()
    assert run(out, "--times", "3") == ["2", "4", "12"]
    head, records = read(out)
    assert head["command"] == "python -m model_zoo run squares --times 3"
    assert {"torch", "python", "cpu", "cores", "date"} <= {*head}
    assert {name: record.figures["square"] for name, record in records.items()} == {"2": 12, "4": 48, "12": 432}
    first = out.with_suffix(".md").read_text()
    assert first.startswith("# python -m model_zoo run squares --times 3\n\nfxprune ")
    assert first.endswith("Squares.\n\n| number | square |\n| --- | ---: |\n| 2 | 12 |\n| 4 | 48 |\n| 12 | 432 |\n")
    out.with_suffix(".md").unlink()
    assert main(["page", "squares", "--out", str(out)]) == 0
    assert out.with_suffix(".md").read_text() == first


def test_what_is_not_finished_is_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "squares.jsonl"
    assert run(out, "2", "3") == ["2", "3"]
    assert "3: 0 s, even: odd\n" in capsys.readouterr().out
    lines = out.read_text().splitlines()
    assert run(out, "2", "3", "4", "--resume") == ["3", "4"]
    assert out.read_text().splitlines()[:3] == lines, "it only grows"
    assert capsys.readouterr().err == "2 of 3 cases are finished\n"
    with monkeypatch.context() as later:
        later.setattr(records, "header", lambda command: {"date": "2100-01-01 00:00 UTC", "torch": "9.0"})
        assert run(out, "2", "4", "--again") == ["2", "4"]
    head, found = read(out)
    assert records.days(head).endswith(" and 2100-01-01"), "every day that it was gone on with is in the file"
    assert head["torch"].endswith(" and 9.0")
    assert [*found] == ["2", "3", "4"]
    assert run(out, "2") == ["2"], "without --resume it begins anew"
    assert len(out.read_text().splitlines()) == 2
    out.write_text("")
    assert run(out, "2", "--resume") == ["2"], "an empty file is begun"


def test_a_file_is_gone_on_with_on_another_device_but_by_no_other_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "squares.jsonl"
    run(out, "2")
    assert run(out, "4", "--times", "3", "--resume") == ["4"]
    head, found = read(out)
    assert (head["device"], [*found]) == ("slate 1 and slate 3", ["2", "4"])
    before = out.read_text()
    with pytest.raises(SystemExit):
        run(out, "12", "--times", "2", "--resume")
    assert f"{out} was measured with odd 1, now 0: take what it has, or pass another --out" in capsys.readouterr().err
    assert out.read_text() == before


def test_patterns_and_shards_choose_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "squares.jsonl"
    assert run(out, "*2") == ["2", "12"]
    assert run(out, "--shard", "2/2") == ["4"]
    with pytest.raises(SystemExit):
        run(out, "x*")
    assert "no case of squares is named 'x*'; there are: 2, 4, 12\n" in capsys.readouterr().err
    assert not run(out, "--minutes", "0")


def test_what_cannot_be_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, why in (
        (["run", "cubes"], "invalid choice: 'cubes' (choose from"),
        (["page", "squares", "--out", str(tmp_path / "none")], f"there is no result file {tmp_path / 'none'}"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert why in capsys.readouterr().err


def test_two_studies_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "more/others.py").write_text(DROPPED)
    with pytest.raises(ValueError, match=r"studies.others and model_zoo.studies.squares both define a study 'squares'"):
        load()


def test_every_committed_page_is_that_of_its_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # without the plots, which take their time
    for name, study in load().items():
        if study.out.exists():
            out = tmp_path / study.out.name
            out.write_text(study.out.read_text())
            if study.plot is not None:
                out.with_suffix(".png").touch()
            main(["page", name, "--out", str(out)])
            assert out.with_suffix(".md").read_text() == study.out.with_suffix(".md").read_text(), name
