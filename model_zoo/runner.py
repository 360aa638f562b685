"""Runs studies: ``python -m model_zoo list``, ``run NAME``, ``page NAME``.

A study says what its cases are and how one is measured; everything else is here: arguments, what is left to do, the
processes and their limits, the header and the lines of the result file, the page and the plot.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import resource
import shlex
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import torch

from model_zoo.pictures import TimeUpError
from model_zoo.records import Record, Results, append, begin, begun, go_on, heading, read
from model_zoo.study import Options, Study, found_in, load

UNTOLD = (
    "resume",
    "again",
    "minutes",
    "threads",
)  # what results do not depend on, as on paths, or the header says itself
GRACE = 30.0  # seconds after the time is up in which processes must have stopped by themselves
SHOWN = 30  # names of cases in an error


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit code is 1 if a study that checks something found a mistake, 2 if it cannot be run."""
    studies = load()
    options = _parser(studies).parse_args(argv)
    if options.command == "list":
        for name in sorted(studies):
            needs = f" [{', '.join(studies[name].needs)}]" if studies[name].needs else ""
            print(f"{name:<16}{studies[name].about}{needs}")
        return 0
    study, parser = studies[options.study], vars(options).pop("parser")
    if options.command == "page":
        if not begun(options.out):
            parser.error(f"there is no result file {options.out}")
        write_page(study, options)
        return 0
    return execute(study, options, parser)


def execute(study: Study, options: Options, parser: argparse.ArgumentParser) -> int:
    """Measures what is to be measured, a line for each, and writes the page."""
    if reason := study.check(options):
        parser.error(reason)
    options.until = None if options.minutes is None else time.time() + 60 * options.minutes
    options.threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    cases = chosen(study, options, parser)
    with _quiet(options.threads):
        if (options.resume or options.again) and begun(options.out):
            try:
                go_on(options.out, _command(study, options, parser), study.layout, **study.head(options))
            except ValueError as error:
                parser.error(str(error))
        else:
            begin(options.out, _command(study, options, parser), study.layout, **study.head(options))
            study.anew(options)
        records = read(options.out, study.layout)[1]
        done = {name for name, record in records.items() if study.finished(record) and not options.again}
        try:
            for record in run(study, cases, done, options):
                records[record.name] = record
                append(options.out, record, study.layout)
                print(study.told(record), flush=True)
        finally:
            write_page(study, options)
    missing = [name for name in cases if not (name in records and study.finished(records[name]))]
    if missing:
        print(f"{len(cases) - len(missing)} of {len(cases)} cases are finished", file=sys.stderr)
    if study.strict:
        failed = sum(not record.passed for record in records.values())
        print(f"{len(records) - failed} of {len(records)} pass every check")
        return 1 if failed else 0
    return 0


def chosen(study: Study, options: Options, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The cases that were asked for, by name: of the study's order or of the patterns', then those of the shard."""
    found: dict[str, Any] = {}
    known: dict[str, Any] | None = None
    for word in options.cases or ["*"]:
        if study.open and not any(sign in word for sign in "*?"):
            found[word] = word
            continue
        known = {str(case): case for case in study.cases(options)} if known is None else known
        matching = {name: case for name, case in known.items() if name == word or fnmatchcase(name, word)}
        if not matching and word != "*":
            some = ", ".join([*itertools.islice(known, SHOWN), *(["…"] if len(known) > SHOWN else [])])
            parser.error(f"no case of {study.name} is named {word!r}; there are: {some}")
        found |= matching
    first, count = options.shard
    return dict(itertools.islice(found.items(), first - 1, None, count))


def write_page(study: Study, options: Options) -> None:
    """The result file as a page beside it, and its plot."""
    results = Results(*read(options.out, study.layout), options.out)
    if study.plot is not None and results.records:
        if importlib.util.find_spec("matplotlib") is None:
            print("matplotlib is not installed (pip install '.[plots]'): no plot", file=sys.stderr)
        else:
            study.plot(results)
    rules = study.rules(results) if callable(study.rules) else study.rules
    body = [rules, *study.page(results)] if results.records else ["Nothing was measured yet."]
    parts = [*heading(results.head), *body]
    options.out.with_suffix(".md").write_text("\n\n".join(part for part in parts if part) + "\n")


# -- arguments ---------------------------------------------------------------------------------------------------------


def _parser(studies: Mapping[str, Study]) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m model_zoo", description="Studies of fxprune on real networks.")
    commands = result.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the studies, and what they need")
    for command, about in (("run", "measure, and write the page"), ("page", "write the page of a result file anew")):
        names = commands.add_parser(command, help=about).add_subparsers(dest="study", required=True, metavar="NAME")
        for name, study in sorted(studies.items()):
            raw = argparse.RawDescriptionHelpFormatter
            parser = names.add_parser(name, help=study.about, description=study.doc, formatter_class=raw)
            parser.set_defaults(parser=parser)
            _declare(parser, study)
    return result


def _declare(parser: argparse.ArgumentParser, study: Study) -> None:
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help="names or patterns (default: all)")
    add("--out", type=Path, default=study.out, metavar="FILE", help="the result file; only grows")
    add("--resume", action="store_true", help="keep the file, run what is not finished in it")
    add("--again", action="store_true", help="keep the file, measure the cases again: of each the last line counts")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help="every Nth case, from the Ith")
    add("--minutes", type=float, help="stop by then")
    add("--threads", type=int, default=study.threads, help=f"of a case (default: {study.threads or 'the cores'})")
    if study.jobs:
        add("--jobs", type=int, default=1, help="cases at a time (default: 1)")
    else:
        parser.set_defaults(jobs=1)
    if study.apart:
        add("--timeout", type=float, default=study.timeout, help=f"seconds for a case (default: {study.timeout:g})")
        add("--memory", type=int, default=study.memory, help=f"GiB for a case (default: {study.memory or 'no limit'})")
    study.options(add)


def _shard(text: str) -> tuple[int, int]:
    first, count = (int(number) for number in text.split("/"))
    if not 1 <= first <= count:
        raise argparse.ArgumentTypeError(f"{text}: the first of three is 1/3")
    return first, count


def _command(study: Study, options: Options, parser: argparse.ArgumentParser) -> str:
    """The command with whatever is not as by default, paths left out."""
    words = ["run", study.name, *options.cases]
    for action in parser._actions:
        value = getattr(options, action.dest, action.default)
        if not action.option_strings or value == action.default or action.dest in UNTOLD or isinstance(value, Path):
            continue
        if isinstance(value, bool):
            words.append(action.option_strings[0 if value else -1])
        elif action.dest == "shard":
            words += ["--shard", "{}/{}".format(*value)]
        else:
            words += [action.option_strings[0], *map(str, value if isinstance(value, list) else [value])]
    return f"python -m model_zoo {shlex.join(words)}"


# -- running -----------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet(threads: int) -> Iterator[None]:
    """Warnings are ignored, and torch has so many threads, inside."""
    before = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def run(study: Study, cases: Mapping[str, Any], done: set[str], options: Options) -> Iterator[Record]:
    """The records of the cases that are not done, as they come; those are left out that wait for one that failed."""
    waiting = {name: case for name, case in cases.items() if name not in done}
    done, everything = set(done), [*cases.values()]

    def ready() -> tuple[str, Any] | None:
        if options.until is not None and time.time() >= options.until:
            return None
        for name, case in waiting.items():
            if all(other in done or other not in cases for other in study.after(case, everything)):
                return name, waiting.pop(name)
        return None

    how = _apart if study.apart or options.jobs > 1 else _here
    for record in how(study, ready, options, len(waiting)):
        if study.finished(record):
            done.add(record.name)
        yield record


def _here(study: Study, ready: Any, options: Options, total: int) -> Iterator[Record]:
    """One after the other, in this process."""
    worker = None
    while (following := ready()) is not None:
        worker = worker or study.worker(options)
        try:
            yield worker(following[1])
        except TimeUpError:
            return


@dataclass
class _Process:
    """One that measures. ``name``: of its case; ``until``: when it must have an answer; ``said``: what it prints."""

    process: Any
    said: IO[str]
    name: str = ""
    until: float = float("inf")

    def failed(self, why: str = "") -> Record:
        """What the record says of one that ended without an answer, or is ended for this reason."""
        if why:
            self.process.kill()
        self.process.join()
        words = " ".join(self.said.read().split())[-400:]
        return Record(self.name, checks={"process": why or f"exit code {self.process.exitcode}: {words}"})

    def end(self, pipe: Connection, kill: bool = False) -> None:
        """It gets no more cases."""
        pipe.close()
        if kill:
            self.process.kill()
        self.process.join()
        self.said.close()


def _apart(study: Study, ready: Any, options: Options, total: int) -> Iterator[Record]:
    """In ``options.jobs`` processes, with a progress bar on a terminal; each measures one case, or one after the other.

    A process whose case is not finished is not used again: what an error leaves of a GPU's memory and state, nothing
    later should have to work with.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep: cores may be shared
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*study.preload, study.module])
    busy: dict[Connection, _Process] = {}
    idle: list[tuple[Connection, _Process]] = []

    def started() -> tuple[Connection, _Process]:
        ours, theirs = context.Pipe()
        said = tempfile.NamedTemporaryFile(mode="r", errors="replace")  # noqa: SIM115  as long as the process
        process = context.Process(target=_works, args=(study.module, study.name, options, said.name, theirs))
        process.start()
        theirs.close()
        return ours, _Process(process, said)

    bar, task = _bar(study.name, total)
    with bar:
        try:
            while True:
                while len(busy) < options.jobs and (following := ready()) is not None:
                    ours, process = idle.pop() if idle else started()
                    process.name = following[0]
                    process.until = time.time() + options.timeout if study.apart else float("inf")
                    ours.send(following[1])
                    busy[ours] = process
                if not busy:
                    return
                last = float("inf") if options.until is None else options.until + GRACE
                left = min(last, *(process.until for process in busy.values())) - time.time()
                answered = wait([*busy], timeout=None if left == float("inf") else max(0.0, left))
                late = [pipe for pipe, process in busy.items() if time.time() >= process.until]
                for pipe in [*busy]:
                    if pipe not in answered and pipe not in late:
                        continue
                    process = busy.pop(pipe)
                    record = _answer(pipe, process, f"no end within {options.timeout:g} s" if pipe in late else "")
                    if record is not None and not study.apart and study.finished(record):
                        idle.append((pipe, process))
                    else:
                        process.end(pipe)
                    if record is not None:
                        bar.advance(task)
                        yield record
                if time.time() >= last:
                    return
        finally:
            for pipe, process in idle:
                process.end(pipe)
            for pipe, process in busy.items():
                process.end(pipe, kill=True)


def _answer(pipe: Connection, process: _Process, late: str) -> Record | None:
    """What a process sent; what became of it, if it is gone or late; None: its time was up."""
    try:
        if pipe.poll():
            found: Record | None = pipe.recv()
            return found
        return process.failed(late)
    except (EOFError, ConnectionResetError):
        return process.failed()


def _bar(what: str, total: int) -> Any:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    return bar, bar.add_task(what, total=total)


def _works(module: str, name: str, options: Options, said: str, pipe: Connection) -> None:
    """A process: takes cases and sends records, None for one whose time was up; what it prints goes to ``said``."""
    if limit := (getattr(options, "memory", None) or 0) * 2**30:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    output = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    torch.set_num_threads(options.threads)
    study = found_in(module)[name]
    worker = study.worker(options)
    while True:
        try:
            pipe.send(worker(pipe.recv()))
        except TimeUpError:
            pipe.send(None)
            return
        except EOFError:  # no more cases
            return


def _end_with_the_command() -> None:
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os._exit(1)
