"""What a study is: its cases, what is measured of one, and the page that the records make.

A study is one file: a module in ``model_zoo/studies`` that defines a ``Study``. ``model_zoo/runner.py`` runs it.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model_zoo import studies
from model_zoo.records import LINES, RESULTS, Layout, Record, Results

Options = argparse.Namespace
Measure = Callable[[Any], Record]
Add = Callable[..., Any]  # argparse's add_argument


def told(record: Record) -> str:
    """What is said of a record when it comes in."""
    why = "; ".join(f"{name}: {reason}" for name, reason in record.failures.items())
    return f"{record.name}: {sum(record.seconds.values()):.0f} s, {why or 'ok'}"


@dataclass(frozen=True)
class Study:
    """One thing to measure, as data for the runner.

    Args:
        name: on the command line, and of the result file unless ``file`` is another.
        about: what it shows, in one line.
        cases: what is measured, in this order: strings, or values whose ``str`` is their name.
        worker: called once in every process that measures, with the options; what it returns measures a case, and may
            keep from one case to the next what they share. Its record has the case's name. An error that it raises ends
            the run, unless ``apart``; ``TimeUpError`` ends it in peace.
        page: the paragraphs of the page below its heading; empty ones are left out.
        plot: draws into the file ``results.plot``.
        options: declares the study's own options.
        needs: what it takes besides the package, for the list.
        doc: of the module, for ``--help`` and the list of options.
        rules: how it is measured, which may depend on what was; the page begins with it.
        check: why it cannot be run as asked, or "": said before anything is written.
        head: what the header has besides versions and machine.
        anew: removes what an earlier run left, before one that does not resume.
        finished: whether ``--resume`` leaves a case alone that has this record.
        after: of a case and all cases, the names of those that must be finished before.
        told: what is said of a record when it comes in.
        open: names that are not among the cases are cases, too.
        strict: a check that fails is an error of the command.
        apart: every case has a process of its own, with limits; whatever happens to it becomes a record.
        jobs: whether several cases at a time leave each other's results alone.
        threads: of a case; None: the cores, shared by the jobs.
        timeout: seconds for a case, where it is apart.
        memory: GiB for a case, where it is apart; None: no limit.
        preload: modules that are imported before processes are forked.
        file: in ``model_zoo/results``.
        layout: of the result file.
        module: where it is defined; known once it is found.
    """

    name: str
    about: str
    cases: Callable[[Options], Iterable[Any]]
    worker: Callable[[Options], Measure]
    page: Callable[[Results], Sequence[str]]
    plot: Callable[[Results], None] | None = None
    options: Callable[[Add], Any] = lambda add: None
    needs: tuple[str, ...] = ()
    doc: str | None = None
    rules: str | Callable[[Results], str] = ""
    check: Callable[[Options], str] = lambda options: ""
    head: Callable[[Options], dict[str, Any]] = lambda options: {}
    anew: Callable[[Options], None] = lambda options: None
    finished: Callable[[Record], bool] = lambda record: True
    after: Callable[[Any, Sequence[Any]], Sequence[str]] = lambda case, cases: ()
    told: Callable[[Record], str] = told
    open: bool = False
    strict: bool = False
    apart: bool = False
    jobs: bool = False
    threads: int | None = 1
    timeout: float = 1800
    memory: int | None = None
    preload: tuple[str, ...] = ()
    file: str = ""
    layout: Layout = LINES
    module: str = ""

    @property
    def out(self) -> Path:
        return RESULTS / (self.file or f"{self.name}.jsonl")


def rules(doc: str | None, after: str = "\n") -> str:
    """What a module's docstring says below its first line, or after another text."""
    return (doc or "").partition(after)[2].strip()


def each(measure: Callable[[Any, Options], Record]) -> Callable[[Options], Measure]:
    """The worker of a study whose cases share nothing."""
    return lambda options: lambda case: measure(case, options)


def passed(record: Record) -> bool:
    return record.passed


def found_in(module: str) -> dict[str, Study]:
    """The studies that a module defines."""
    defined = vars(importlib.import_module(module)).values()
    return {study.name: replace(study, module=module) for study in defined if isinstance(study, Study)}


def load() -> dict[str, Study]:
    """All studies by name.

    Raises:
        ValueError: two have the same name.
    """
    found: dict[str, Study] = {}
    for info in sorted(pkgutil.iter_modules(studies.__path__), key=lambda info: info.name):
        for name, study in found_in(f"{studies.__name__}.{info.name}").items():
            if name in found:
                raise ValueError(f"{found[name].module} and {study.module} both define a study {name!r}")
            found[name] = study
    return found
