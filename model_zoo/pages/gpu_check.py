"""What passes, and a table of errors and latencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from model_zoo.records import Record, Results, bullets, number, state, table

DTYPES = ("float32", "float16")


def page(results: Results) -> Sequence[str]:
    passing = sum(record.passed for record in results.lines)
    return [bullets([f"{passing} of {len(results.lines)} networks pass every check."]), latencies(results.records)]


def latencies(records: Mapping[str, Record]) -> str:
    """A line per network: errors of the pruned one, latencies of both."""
    timed = {
        (dtype, batch): None
        for record in records.values()
        for dtype, found in record.figures.get("latency_ms", {}).items()
        for batch in found
    }
    rows = []
    for record in records.values():
        f = record.figures
        cells = [record.name, number(f.get("ratio"), ".4f")]
        cells += [number(f.get("onnx", {}).get(dtype, {}).get("pruned"), ".0e") for dtype in DTYPES]
        for dtype, batch in timed:
            pair = f.get("latency_ms", {}).get(dtype, {}).get(batch)
            cells.append(
                f"{pair['dense']:.2f} → {pair['pruned']:.2f} ({pair['pruned'] / pair['dense']:.2f})" if pair else "–"
            )
        rows.append([*cells, state(record)])
    heads = ["MACs that stay", *(f"{dtype}: error" for dtype in DTYPES)]
    heads += [f"{dtype}, batch {batch}: dense → pruned ms" for dtype, batch in timed]
    return table({"network": "---", **dict.fromkeys(heads, "---:"), "checks": "---"}, rows)
