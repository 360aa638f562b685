"""Networks of whole libraries, called as the example inputs did not: with nothing cut, results must be the model's.

A network is pruned with nothing cut and then called a second time, with another batch, size and values, with padded
masks, and in a step that takes caches (``model_zoo/calls.py``). Every answer is free (the model's result), guarded (an
error of fxprune's at call time), wrong, or raw (an exception of another kind); where the model itself refuses, nothing
is asked. Every network runs in a process of its own, within limits of time and memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from model_zoo.answers import TOLERANCE, place, told
from model_zoo.libraries import GROUPS, names
from model_zoo.records import Record, Results, bullets, reasons, table
from model_zoo.study import Options, Study, each

STATES = ("free", "guarded", "wrong", "raw", "refused", "model refuses")
FINE = ("free", "guarded", "model refuses")
COUNTED = ("batch", "size")  # of these the share that is free is told


def measure(spec: str, options: Options) -> Record:
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


def calls_table(counts: dict[str, Counter[str]]) -> str:
    """One line per call: how many networks are in which state."""
    rows = ([name, *(str(column[key]) for key in (*STATES, "in objects", "blind"))] for name, column in counts.items())
    return table(["call", *STATES, "wrong in objects only", "free, but any result would be"], rows)


def networks_table(records: Iterable[Record]) -> str:
    """One line per network: its free, guarded and wrong calls."""
    rows = []
    for record in records:
        cells = record.figures.get("cells", {})
        free = ", ".join(name for name, cell in cells.items() if cell["state"] == "free")
        guarded = "; ".join(f"{n}: {c.get('line', 'no line')}" for n, c in cells.items() if c["state"] == "guarded")
        rows.append([record.name, free, guarded, reasons(record)])
    return table(dict.fromkeys(("network", "free", "guarded, by which line", "wrong"), "---"), rows)


def page(results: Results) -> Sequence[str]:
    records = sorted(results.lines, key=lambda record: record.name)
    parts = [bullets(summary(records)), calls_table(columns(records))]
    for group in sorted({_group(record) for record in records}):
        these = [record for record in records if _group(record) == group]
        parts += [f"## {group}", bullets(summary(these)), calls_table(columns(these)), networks_table(these)]
    return parts


def _group(record: Record) -> str:
    group: str = record.figures.get("group") or record.name.partition(":")[0]
    return group


def _told(record: Record) -> str:
    cells = record.figures.get("cells", {})
    states = ", ".join(f"{name} {cell['state']}" for name, cell in cells.items())
    stopped = "; ".join(f"{name}: {why}" for name, why in record.failures.items() if name not in cells)
    return f"{record.name}: {record.seconds.get('all', 0):.0f} s, {states or stopped}"


STUDY = Study(
    "beyond",
    "networks of five libraries, called as the example did not show; half an hour",
    lambda options: names(options.group),
    each(measure),
    page,
    options=lambda add: add("--group", nargs="+", action="extend", default=[], choices=[*GROUPS], help="libraries"),
    needs=("transformers, ultralytics, diffusers: what is missing is left out",),
    doc=__doc__,
    told=_told,
    open=True,
    strict=True,
    apart=True,
    jobs=True,
    timeout=600,
    memory=16,
    preload=(
        "torchvision", "timm", "fxprune.api", "model_zoo.libraries", "transformers.models.llama.modeling_llama",
        "transformers.models.auto.modeling_auto", "ultralytics.nn.tasks", "diffusers.models.unets",
    ),
)  # fmt: skip
