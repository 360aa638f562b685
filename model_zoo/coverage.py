"""Prune real networks to half their MACs and check everything that fxprune promises of the result.

    python -m model_zoo.coverage                      the 24 networks, to model_zoo/results/coverage.jsonl
    python -m model_zoo.coverage timm:resnet50        some
    python -m model_zoo.coverage --families           the smallest architecture of every timm family
    python -m model_zoo.coverage --torchvision        everything in torchvision
    python -m model_zoo.coverage --all                every architecture of timm, on the meta device: no oracle
    python -m model_zoo.coverage --list FILE          those that a file names, one a line
    python -m model_zoo.coverage --resume             those without a passing line in the file
    python -m model_zoo.coverage --table              the file as a markdown table

Every network runs in a process of its own, with a limit of time and memory: one that fails loses nothing. What is
checked: ``model_zoo/checks.py``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from model_zoo.networks import NETWORKS, everything, families, read_list, torchvision
from model_zoo.records import RESULTS, Record, append, begin, read, table, write_page

LISTS = {"families": families, "torchvision": torchvision, "all": everything}
TIMEOUT = 1800  # seconds
MEMORY = 16  # GiB
# What every process needs; imported once, in the process that the others are forked from.
PRELOADED = ["torchvision", "timm", "onnxscript", "torch.onnx", "fxprune.api", "fxprune.deploy", "model_zoo.checks"]


Measure = Callable[[str, dict[str, Any]], Record]


def run_apart(spec: str, options: argparse.Namespace, measure: Measure | None = None) -> Record:
    """``measure`` in a process of its own, within the limits; whatever happens to it becomes a line."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(mode="r", errors="replace") as said:
        process = context.Process(target=_measure, args=(spec, vars(options), said.name, sender, measure or _pruned))
        process.start()
        sender.close()
        try:
            if not receiver.poll(options.timeout):
                process.kill()
                return Record(spec, checks={"process": f"no end within {options.timeout} s"})
            record: Record = receiver.recv()
            return record
        except EOFError:
            process.join()
            why = " ".join(said.read().split())[-400:]
            return Record(spec, checks={"process": f"exit code {process.exitcode}: {why}"})
        finally:
            process.join()
            receiver.close()


def _measure(spec: str, options: dict[str, Any], said: str, sender: Connection, measure: Measure) -> None:
    """Runs in the new process; what it prints goes to the file ``said``."""
    limit = options["memory"] * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    output = os.open(said, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_the_command, daemon=True).start()

    import torch

    torch.set_num_threads(options["threads"])
    sender.send(measure(spec, options))


def _pruned(spec: str, options: dict[str, Any]) -> Record:
    from model_zoo.checks import measure, measure_on_meta

    given = {"flops": options["flops"], "attention": options["attention"]}
    if options["meta"]:
        return measure_on_meta(spec, **given)
    return measure(spec, **given, method=options["method"], onnx=options["onnx"])


def _end_with_the_command() -> None:
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os._exit(1)


def run(
    specs: Sequence[str],
    options: argparse.Namespace,
    measure: Measure | None = None,
    preload: Sequence[str] = PRELOADED,
) -> Iterator[Record]:
    """The records as they come in, ``options.jobs`` networks at a time, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep: cores may be shared
    multiprocessing.get_context("forkserver").set_forkserver_preload([*preload])
    extra = (measure,) if measure else ()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    with bar, ThreadPoolExecutor(options.jobs) as pool:
        task = bar.add_task("networks", total=len(specs))
        for future in as_completed([pool.submit(run_apart, spec, options, *extra) for spec in specs]):
            yield future.result()
            bar.advance(task)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if a check failed."""
    options = _options(argv)
    if options.table:
        print(table(read(options.out)[1].values()))
        return 0
    records: dict[str, Record] = {}
    if options.resume and options.out.exists():
        records = read(options.out)[1]
    else:
        begin(options.out, _command(options))
    todo = [spec for spec in _chosen(options) if not (spec in records and records[spec].passed)]
    for record in run(todo, options):
        records[record.name] = record
        append(options.out, record)
        write_page(options.out)
        print(_line(record), flush=True)
    failed = [name for name, record in records.items() if not record.passed]
    print(f"{len(records) - len(failed)} of {len(records)} networks pass every check")
    return 1 if failed else 0


def _line(record: Record) -> str:
    state = "ok" if record.passed else "; ".join(f"{n}: {why}" for n, why in record.failures.items())
    ratio = record.figures.get("ratio", float("nan"))
    return f"{record.name}: {sum(record.seconds.values()):.0f} s, ratio {ratio:.4f}, {state}"


def _chosen(options: argparse.Namespace) -> Iterable[str]:
    for flag, names in LISTS.items():
        if getattr(options, flag):
            return names()
    return read_list(options.list) if options.list else options.names or NETWORKS


def _command(options: argparse.Namespace) -> str:
    words = [*options.names, *(f"--{flag}" for flag in LISTS if getattr(options, flag))]
    words += ["--list", str(options.list)] if options.list else []
    words += ["--flops", str(options.flops), "--attention", options.attention]
    words += ["--meta"] if options.meta and not options.all else []
    words += [] if options.meta else ["--method", options.method, "--onnx" if options.onnx else "--no-onnx"]
    return " ".join(["python -m model_zoo.coverage", *words, "--jobs", str(options.jobs)])


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m model_zoo.coverage", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="timm:NAME or torchvision:NAME (default: the 24)")
    parser.add_argument("--families", action="store_true", help="the smallest architecture of every timm family")
    parser.add_argument("--torchvision", action="store_true", help="everything in torchvision")
    parser.add_argument("--all", action="store_true", help="every architecture of timm, on the meta device")
    parser.add_argument("--list", type=Path, help="a file with one name a line")
    parser.add_argument("--meta", action="store_true", help="without weights: record, label, plan, rewrite")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time (default: 1)")
    parser.add_argument("--threads", type=int, help="threads for a network (default: the cores, shared by the jobs)")
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help=f"seconds for a network (default: {TIMEOUT})")
    parser.add_argument("--memory", type=int, default=MEMORY, help=f"GiB for a network (default: {MEMORY})")
    parser.add_argument("--out", type=Path, help="result file, one JSON object per line")
    parser.add_argument("--resume", action="store_true", help="keep the file, run what has no passing line in it")
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True, help="export and check ONNX")
    parser.add_argument("--flops", type=float, default=0.5, help="budget (default: 0.5)")
    parser.add_argument("--method", default="l2", help="method (default: l2)")
    parser.add_argument("--attention", default="head_dim", help="head_dim or heads (default: head_dim)")
    parser.add_argument("--table", action="store_true", help="print the result file as a markdown table")
    options = parser.parse_args(argv)
    options.meta |= options.all
    options.threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    if options.out is None:
        kind = next((flag for flag in LISTS if getattr(options, flag)), "coverage")
        options.out = RESULTS / f"{kind}{'-heads' if options.attention == 'heads' else ''}.jsonl"
    return options


if __name__ == "__main__":
    sys.exit(main())
