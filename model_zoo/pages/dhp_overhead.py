"""What hypernetworks take, way by way."""

from __future__ import annotations

from collections.abc import Sequence

from model_zoo.measuring.dhp_overhead import WAYS
from model_zoo.records import Results, table


def page(results: Results) -> Sequence[str]:
    lines = [record.figures for record in results.lines if not record.failures]
    dense = {line["network"]: line for line in lines if line["way"] == WAYS[0]}
    rows = []
    for line in lines:
        base = dense.get(line["network"], line)
        cells = [
            f"{line[key]:,}" + ("" if line is base else f" ({line[key] / max(base[key], 1e-9):.1f}x)")
            for key in ("parameters", "kept_mib", "peak_mib", "step_ms")
        ]
        rows.append([f"{line['network']}, {line['shape']}", line["way"], *cells])
    figures = dict.fromkeys(("parameters", "kept for backward, MiB", "peak, MiB", "CPU ms per step"), "---:")
    return [table({"network, batch": "---", "weights": "---", **figures}, rows)]
