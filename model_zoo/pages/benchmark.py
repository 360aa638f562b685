"""Seconds and memory of both, what they come to, and a plot of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from model_zoo.records import Record, Results, bullets, number, table


def page(results: Results) -> Sequence[str]:
    lines = results.lines
    parts = [_table(lines), _verdict(lines)]
    if timed := [r for r in lines if "ours_ms" in r.figures]:
        rows = ([r.name, *(f"{r.figures[key]:.2f}" for key in ("dense_ms", "ours_ms", "peer_ms"))] for r in timed)
        heads = ["network", "dense ms", "fxprune ms", "Torch-Pruning ms"]
        parts += ["## Latency in onnxruntime at equal MACs", table(heads, rows)]
    if fails := [f"{r.name}: {r.figures['peer_fails']}" for r in lines if "peer_fails" in r.figures]:
        parts += ["## Where Torch-Pruning gives no network", bullets(fails)]
    return [*parts, results.image("seconds of both")]


def _table(records: Sequence[Record]) -> str:
    columns = [
        "network", "forward s", "floor s", "fxprune s", "Torch-Pruning s", "ratio", "in processor time",
        "fxprune / floor", "verified s", "MiB fxprune", "MiB Torch-Pruning", "MACs fxprune", "MACs Torch-Pruning",
    ]  # fmt: skip
    rows = []
    for record in records:
        f = record.figures
        rows.append([
            record.name,
            *(_pair(f, what) for what in ("forward", "floor", "ours", "peer")),
            _quotient(f, "ours_s", "peer_s"), _quotient(f, "ours_cpu_s", "peer_cpu_s"),
            _quotient(f, "ours_cpu_s", "floor_cpu_s"), number(f.get("verified_s"), ".3g"),
            *(number(f.get(key), ".0f") for key in ("ours_mib", "peer_mib")),
            *(f"{f[key] / f['ours_dense_macs']:.3f}" if key in f else "–" for key in ("ours_macs", "peer_macs")),
        ])  # fmt: skip
    return table(columns, rows) + "\n\n(In brackets: processor time.)"


def short_table(records: Sequence[Record]) -> str:
    """Seconds of processor time and memory of both, a line per network."""
    rows = []
    for record in records:
        f = record.figures
        seconds, mib = ([f.get(f"{who}_{what}") for who in ("ours", "peer")] for what in ("cpu_s", "mib"))
        cells = [*(number(s, ".3g") for s in seconds), _quotient(f, "ours_cpu_s", "peer_cpu_s")]
        rows.append([record.name.partition(":")[2], *cells, *(number(m, ".0f") for m in mib)])
    return table(["network", "fxprune s", "Torch-Pruning s", "ratio", "fxprune MiB", "Torch-Pruning MiB"], rows)


def _pair(figures: dict[str, Any], what: str) -> str:
    if f"{what}_s" not in figures:
        return "–"
    return f"{figures[f'{what}_s']:.3g} ({figures[f'{what}_cpu_s']:.3g})"


def _quotient(figures: dict[str, Any], top: str, bottom: str) -> str:
    return f"{figures[top] / figures[bottom]:.2f}" if top in figures and bottom in figures else "–"


def _verdict(records: Sequence[Record]) -> str:
    both = {r.name: r.figures for r in records if "ours_cpu_s" in r.figures and "peer_cpu_s" in r.figures}
    if not both:
        return ""
    ratios = {name: f["ours_cpu_s"] / f["peer_cpu_s"] for name, f in both.items()}
    slower = ", ".join(f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio > 1)
    long = ", ".join(f"{name} {ratios[name]:.2f}" for name, f in both.items() if f["peer_cpu_s"] > 10)
    return (
        "Ratios of processor time, fxprune to Torch-Pruning, against what was aimed at:\n"
        f"- never above 1: {f'missed by {slower}' if slower else 'reached'};\n"
        f"- at most 0.5 at the median: {statistics.median(ratios.values()):.2f};\n"
        f"- at most 0.1 where Torch-Pruning takes more than 10 s: {long or 'there is none'}."
    )


def plot(results: Results) -> None:
    """Seconds of both, of a forward run and of the floor, one row per network."""
    from matplotlib.figure import Figure

    records = [r for r in results.lines if "ours_s" in r.figures]
    figure = Figure(figsize=(8, 1 + 0.45 * len(records)), layout="constrained")
    axes = figure.subplots()
    labels = {"peer": "Torch-Pruning", "ours": "fxprune", "floor": "floor", "forward": "forward"}
    for (what, label), mark in zip(labels.items(), "so|x", strict=True):
        points = [(r.figures[f"{what}_cpu_s"], row) for row, r in enumerate(records) if f"{what}_cpu_s" in r.figures]
        if points:
            axes.plot(*zip(*points, strict=True), mark, label=label)
    axes.set(xscale="log", xlabel="seconds of processor time", yticks=range(len(records)))
    axes.set_yticklabels([r.name.partition(":")[2] for r in records])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(results.plot, dpi=120)
