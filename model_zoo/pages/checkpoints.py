"""A row for each checkpoint, what makes it again, and what its card says of how it was checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model_zoo.records import Record, Results, bullets, number, state, table

COLUMNS = {
    "checkpoint": "---", "measured on": "---", "dense": "---:", "pruned": "---:", "loaded": "---:", "M MACs": "---:",
    "stays": "---:", "M parameters": "---:", "MB": "---:", "ms": "---:", "masked ≡ pruned": "---:", "ONNX": "---:",
    "checks": "---",
}  # fmt: skip


def page(results: Results) -> Sequence[str]:
    records = [record for record in results.lines if "bytes" in record.figures]
    broken = [f"{r.name}: {state(r)}" for r in results.lines if "bytes" not in r.figures]
    same = sum(r.figures.get("loaded") == r.figures["quality"] for r in records)
    return [
        f"{same} of {len(records)} folders, read in a new process, have the quality that was measured before they were "
        "written, to the last digit. → is from dense to pruned.",
        table(COLUMNS, map(_row, records)),
        "Not made:" if broken else "",
        bullets(broken),
        "## Make them again",
        "Card and plan of each are linked above; weights are not kept here. The command writes them beside both; `DIR` "
        "is the folder that `model_zoo/trained.py` tells of.",
        "\n".join(["```sh", *(record.figures["command"] for record in records), "```"]),
        "Any weights are cut alike by `fxprune.apply(model, fxprune.PruningPlan.load('plan.json'), inputs)`.",
        "## Refitted",
        bullets(f"{r.name}: {r.figures['refit']}" for r in records),
    ]


def _row(record: Record) -> list[str]:
    f = record.figures
    place, digits = f"checkpoints/{f['folder']}", ".4f" if f["dense"] <= 1 else ".2f"
    name = f"[{record.name}]({place}/README.md), [plan]({place}/plan.json)"
    return [
        name, f"{f['data']}, {f['unit']}", *(number(f.get(key), digits) for key in ("dense", "quality", "loaded")),
        _both(f["macs"], 1e6, ".1f"), f"{f['macs_ratio']:.3f}", _both(f["params"], 1e6, ".3f"),
        _both(f["bytes"], 1e6, ".2f"), _both(f["ms"], 1, ".2f"), number(f["oracle_error"], ".0e"),
        number(f["onnx_error"], ".0e"), state(record),
    ]  # fmt: skip


def _both(pair: Sequence[Any], unit: float, form: str) -> str:
    return " → ".join(format(value / unit, form) for value in pair)
