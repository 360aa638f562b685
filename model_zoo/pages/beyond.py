"""Which calls are free, guarded or wrong: per library, call and network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from model_zoo.checks.answers import TOLERANCE
from model_zoo.records import Record, Results, bullets, reasons, table

STATES = ("free", "guarded", "wrong", "raw", "refused", "model refuses")
COUNTED = ("batch", "size")  # of these the share that is free is told


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
