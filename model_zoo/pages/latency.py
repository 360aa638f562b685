"""Milliseconds that a cut leaves, of those that were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from model_zoo.measuring.latency import BATCHES, CUTS, MOST, Case
from model_zoo.records import Record, Results, bullets, table


def page(results: Results) -> Sequence[str]:
    records = results.records
    devices = sorted({f"{r.figures['provider']} on {r.figures['device']}" for r in records.values()})
    threads = sorted({str(r.figures["threads"] or "all") for r in records.values()})
    wanted = [r for r in records.values() if r.checks]
    return [
        f"{'; '.join(devices)}; threads of onnxruntime: {', '.join(threads)}.",
        latencies(records),
        f"{sum(r.passed for r in wanted)} of {len(wanted)} are where they should be (bold are not).",
        bullets(f"{name}: {r.checks['latency']}" for name, r in records.items() if r.failures),
    ]


def latencies(records: Mapping[str, Record]) -> str:
    """A line per network and batch size: MACs and latency that stay, as ratios."""
    rows = []
    for network in MOST:
        for batch in BATCHES:
            found = {cut: records.get(str(Case(network, batch, cut))) for cut in CUTS}
            known = [record for record in found.values() if record is not None]
            if known:
                aligned = {r.figures["round_to"] for c, r in found.items() if r and "round_to" not in CUTS[c].options}
                cells = [f"{known[0].figures['dense_ms']:.1f}", *map(cell, found.values())]
                rows.append([network, str(batch), *cells, ", ".join(map(str, sorted(aligned)))])
    return table(["network", "batch", "dense ms", *(f"{cut}: MACs → latency" for cut in CUTS), "aligned to"], rows)


def cell(record: Record | None) -> str:
    if record is None:
        return "–"
    ratio = f"{record.figures['ratio']:.3f}"
    return f"{record.figures['macs_ratio']:.3f} → {f'**{ratio}**' if record.failures else ratio}"
