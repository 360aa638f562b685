"""A line per block, length and cut."""

from __future__ import annotations

from collections.abc import Sequence

from model_zoo.records import Results, table


def page(results: Results) -> Sequence[str]:
    rows = []
    for entry in (record.figures for record in results.lines):
        where = f"{entry['device']}, {entry['dtype'].removeprefix('torch.')}, batch {entry['batch']}"
        start = [entry["block"], str(entry["length"]), where]
        rows.append([*start, "dense", "1", *(f"{entry[how]['dense']:.3f}" for how in ("eager", "compiled"))])
        for kind, ratio in entry["macs"].items():
            pairs = [(entry[how][kind], entry[how]["dense"]) for how in ("eager", "compiled")]
            rows.append([*start, kind, f"{ratio:.3f}", *(f"{ms:.3f} ({ms / dense:.2f})" for ms, dense in pairs)])
        rows += [[*start, kind, f"**fails** {why}", "–", "–"] for kind, why in entry["failed"].items()]
    columns = {"block": "---", "length": "---:", "on": "---", "cut": "---"}
    columns |= dict.fromkeys(("MACs that stay", "eager: ms (of dense)", "compiled: ms (of dense)"), "---:")
    return [table(columns, rows)]
