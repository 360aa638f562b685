"""Call networks of whole libraries as the example inputs did not: with nothing cut, results must be the model's.

    python -m model_zoo.beyond                             every library that is installed, to model_zoo/results/beyond
    python -m model_zoo.beyond transformers:llama timm:test_vit
    python -m model_zoo.beyond --group transformers        one library; may be repeated
    python -m model_zoo.beyond --shard 1/3                 the first, fourth, seventh … of them
    python -m model_zoo.beyond --resume                    those without a line in the file
    python -m model_zoo.beyond --page                      the page of the file anew

A network is pruned with nothing cut and then called a second time, with another batch, size and values, with padded
masks, and in a step that takes caches (``model_zoo/calls.py``). Every answer is free (the model's result), guarded (an
error of fxprune's at call time), wrong, or raw (an exception of another kind); where the model itself refuses, nothing
is asked. Every network runs in a process of its own, within limits of time and memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model_zoo.answers import TOLERANCE, place, told
from model_zoo.coverage import MEMORY, run
from model_zoo.libraries import GROUPS, names
from model_zoo.records import RESULTS, Record, append, begin, heading, markdown, read

OUT = RESULTS / "beyond.jsonl"
TIMEOUT = 600  # seconds
STATES = ("free", "guarded", "wrong", "raw", "refused", "model refuses")
FINE = ("free", "guarded", "model refuses")
COUNTED = ("batch", "size")  # of these the share that is free is told
PRELOADED = ["torchvision", "timm", "fxprune.api", "model_zoo.libraries", "transformers.models.llama.modeling_llama"]
PRELOADED += ["transformers.models.auto.modeling_auto", "ultralytics.nn.tasks", "diffusers.models.unets"]


def measure(spec: str, options: dict[str, Any]) -> Record:
    """All calls of one network; never raises."""
    from model_zoo import calls, libraries

    record = Record(spec, {"group": spec.partition(":")[0]}, checks={"load": ""})
    stage, start = "load", time.perf_counter()
    try:
        subject = libraries.load(spec)
        stage = "prune"
        record.seconds["load"] = round(time.perf_counter() - start, 2)
        cells, record.checks["prune"] = calls.measure(subject)
        record.figures["cells"] = {name: _plain(asdict(cell)) for name, cell in cells.items()}
        record.checks |= {name: _reason(cell) for name, cell in record.figures["cells"].items()}
    except Exception as error:
        record.checks[stage] = f"{told(error)} ({place(error)})"
    record.seconds["all"] = round(time.perf_counter() - start, 2)
    return record


def _plain(cell: dict[str, Any]) -> dict[str, Any]:
    """What is not empty."""
    return {key: value for key, value in cell.items() if value not in ("", None, False)}


def _reason(cell: dict[str, Any]) -> str:
    if cell["state"] in FINE:
        return ""
    if cell["state"] == "wrong":
        inside = " in objects only" if cell.get("plain", 0.0) < TOLERANCE else ""
        return f"off by {cell['error']:.1e}{inside} at {cell.get('where', '')}; {cell.get('parts', '')}"
    return f"{cell['state']}: {cell.get('message', '')} ({cell.get('line', '')})"


# -- the page ---------------------------------------------------------------------------------------------------------


def columns(records: Iterable[Record]) -> dict[str, Counter[str]]:
    """Call -> how many networks are in which state; "blind" counts free ones that would be free whatever happened."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        for name, cell in record.figures.get("cells", {}).items():
            counts = found.setdefault(name, Counter())
            counts[cell["state"]] += 1
            counts["blind"] += cell.get("blind", False)
            counts["in objects"] += cell["state"] == "wrong" and cell.get("plain", 0.0) < TOLERANCE
    return found


def summary(records: Sequence[Record]) -> list[str]:
    """What holds for all of them together, one sentence each."""
    ran = [record for record in records if record.figures.get("cells")]
    counts = columns(ran)
    lines = [
        f"{len(ran)} of {len(records)} networks are recorded, {sum(r.passed for r in ran)} of them are nowhere wrong."
    ]
    for name in COUNTED:
        column = counts.get(name, Counter())
        asked = sum(column[state] for state in STATES) - column["model refuses"]
        if asked:
            lines.append(f"Another {name}: free in {column['free']} of the {asked} networks whose model takes it.")
    return lines


def table(counts: dict[str, Counter[str]]) -> str:
    """One line per call: how many networks are in which state."""
    heads = ["call", *STATES, "wrong in objects only", "free, but any result would be"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, column in counts.items():
        rows.append([name, *(str(column[key]) for key in (*STATES, "in objects", "blind"))])
    return markdown(rows)


def networks_table(records: Iterable[Record]) -> str:
    """One line per network: its free, guarded and wrong calls."""
    rows = [["network", "free", "guarded, by which line", "wrong"], ["---"] * 4]
    for record in records:
        cells = record.figures.get("cells", {})
        free = ", ".join(name for name, cell in cells.items() if cell["state"] == "free")
        guarded = "; ".join(f"{n}: {c.get('line', 'no line')}" for n, c in cells.items() if c["state"] == "guarded")
        wrong = "; ".join(f"{name}: {reason}" for name, reason in record.failures.items())
        rows.append([record.name, free, guarded, wrong.replace("|", "\\|")])
    return markdown(rows)


def write_page(path: Path) -> None:
    """The result file as a page beside it."""
    head, found = read(path)
    records = sorted(found.values(), key=lambda record: record.name)
    parts = [*heading(head), "\n".join(f"- {line}" for line in summary(records)), table(columns(records))]
    for group in sorted({record.figures.get("group", "") for record in records}):
        these = [record for record in records if record.figures.get("group", "") == group]
        parts += [f"## {group}", "\n".join(f"- {line}" for line in summary(these)), table(columns(these))]
        parts.append(networks_table(these))
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


# -- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if an answer is wrong or raw, or a network is not recorded."""
    options = _options(argv)
    records: dict[str, Record] = {}
    if options.page or (options.resume and options.out.exists()):
        records = read(options.out)[1]
    else:
        begin(options.out, " ".join(["python -m model_zoo.beyond", *_words(options)]))
    todo = [] if options.page else [spec for spec in _chosen(options) if spec not in records]
    for record in run(todo, options, measure, PRELOADED):
        record.figures.setdefault("group", record.name.partition(":")[0])
        records[record.name] = record
        append(options.out, record)
        print(_line(record), flush=True)
    write_page(options.out)
    print("\n".join([*summary([*records.values()]), table(columns(records.values()))]))
    return 1 if any(not record.passed for record in records.values()) else 0


def _line(record: Record) -> str:
    cells = record.figures.get("cells", {})
    states = ", ".join(f"{name} {cell['state']}" for name, cell in cells.items())
    stopped = "; ".join(f"{name}: {why}" for name, why in record.failures.items() if name not in cells)
    return f"{record.name}: {record.seconds.get('all', 0):.0f} s, {states or stopped}"


def _chosen(options: argparse.Namespace) -> Iterator[str]:
    first, count = options.shard
    chosen = options.names or [*names(options.group)]
    yield from chosen[first - 1 :: count]


def _words(options: argparse.Namespace) -> list[str]:
    first, count = options.shard
    words = [*options.names, *(f"--group {group}" for group in options.group)]
    return [*words, f"--shard {first}/{count}"] if count > 1 else words


def _shard(text: str) -> tuple[int, int]:
    first, count = (int(number) for number in text.split("/"))
    if not 1 <= first <= count:
        raise argparse.ArgumentTypeError(f"{text}: the first of three is 1/3")
    return first, count


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m model_zoo.beyond", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="LIBRARY:NAME, or FILE.py:FACTORY of a Subject (default: all)")
    parser.add_argument("--group", action="append", default=[], choices=[*GROUPS], help="a library; may be repeated")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="every Nth network, from the Ith")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads for a network (default: 1)")
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help=f"seconds for a network (default: {TIMEOUT})")
    parser.add_argument("--memory", type=int, default=MEMORY, help=f"GiB for a network (default: {MEMORY})")
    parser.add_argument("--out", type=Path, default=OUT, help="result file, one JSON object per line")
    parser.add_argument("--resume", action="store_true", help="keep the file, run what has no line in it")
    parser.add_argument("--page", action="store_true", help="only write the page of the result file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
