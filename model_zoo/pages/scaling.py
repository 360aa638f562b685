"""Seconds of the stages, and how they grow, with the curves; a search, an import, ``consume=True``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from model_zoo.records import Record, Results, bullets, table

STAGES = ("record", "label", "select", "rewrite")
CURVES = {  # what grows -> kind, where
    "layers": ("depth", ""),
    "times the channels": ("width", ""),
    "times the channels, on meta": ("width", "meta"),
    "parameters, on meta": ("parameters", ""),
}
SLOW = {"label": 2.0, "all": 5.0}  # seconds that no family's smallest should need


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the power of the size that the values follow, in the upper half of the sizes."""
    half = len(sizes) // 2
    logs = np.log([sizes[half:], values[half:]])
    return float(np.polyfit(logs[0], logs[1], 1)[0])


def _curves(records: Sequence[Record]) -> dict[str, tuple[list[float], list[dict[str, Any]]]]:
    """What grows -> sizes and figures of the points, in ascending order, where there are more than two."""
    found = {}
    for label, (kind, where) in CURVES.items():
        points = [r.figures for r in records if "record" in r.figures and r.figures["kind"] == kind]
        points = [f for f in points if f["point"].partition(" ")[2] == where]
        sizes = [float(f["parameters"] if kind == "parameters" else f["point"].split()[0]) for f in points]
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        if len(order) > 2:
            found[label] = [sizes[i] for i in order], [points[i] for i in order]
    return found


def page(results: Results) -> Sequence[str]:
    records = results.lines
    figures = [record.figures for record in records]
    times = []
    for f in (f for f in figures if "record" in f and f["kind"] != "families"):
        seconds = [f[stage] for stage in STAGES]
        cells = (f"{value:.2f}" for value in (*seconds, sum(seconds), f["memory_gib"]))
        times.append([f"{f['kind']} {f['point']}", *cells])
    growth = []
    for label, (sizes, curve) in _curves(records).items():
        columns = [[f[stage] for f in curve] for stage in STAGES]
        sums = [sum(seconds) for seconds in zip(*columns, strict=True)]
        growth.append([label, *(f"{exponent(sizes, column):.2f}" for column in (*columns, sums))])
    parts = [
        "## Seconds of processor time",
        table(["", *STAGES, "all four", "GiB"], times),
        "## Growth",
        table(["exponent in", *STAGES, "all four"], growth),
        results.image("the curves"),
    ]
    if of_families := [f for f in figures if "record" in f and f["kind"] == "families"]:
        parts += ["## The smallest architecture of every family", _of_families(of_families)]
    searches = [f for f in figures if "first" in f]
    if found := [f"{1000 * f['select']:.0f} ms at {f['point']} (the first {1000 * f['first']:.0f})" for f in searches]:
        parts += ["## Search on ResNet-152, once scores are known", "; ".join(found) + "."]
    for f in (f for f in figures if "weights_gib" in f):
        parts += [
            "## consume=True",
            f"{f['weights_gib']:.1f} GiB of weights were cut to {f['pruned_gib']:.1f} GiB; the process held "
            f"{f['before_gib']:.1f} GiB before and {f['memory_gib']:.1f} GiB at most, of {f['machine_gib']:.1f} that "
            "the machine has.",
        ]
    if imported := [f"`{f['point']}` {f['import']:.2f} s" for f in figures if "import" in f]:
        parts += ["## Import, beyond torch", "; ".join(imported) + "."]
    failing = {r.name: r.figures.get("fails") or "; ".join(r.failures.values()) for r in records}
    if any(failing.values()):
        parts += ["## Fails", bullets(f"{name}: {why}" for name, why in failing.items() if why)]
    return parts


def _of_families(figures: Sequence[dict[str, Any]]) -> str:
    lines = [f"{len(figures)} architectures; *all* is from recording to the rewritten module, scores included."]
    for what, limit in SLOW.items():
        of = ("label",) if what == "label" else (*STAGES, "score")
        taken = {f["point"]: sum(f[stage] for stage in of) for f in figures}
        over = sorted((name for name in taken if taken[name] > limit), key=lambda name: -taken[name])
        lines.append(
            f"- {what}: {np.median([*taken.values()]):.2f} s at the median, {max(taken.values()):.2f} s at most; "
            f"more than {limit:g} s: " + (", ".join(f"{name} ({taken[name]:.1f})" for name in over) or "none") + "."
        )
    return "\n".join(lines)


def plot(results: Results) -> None:
    """A log-log plot per curve."""
    from matplotlib.figure import Figure

    curves = _curves(results.lines)
    if not curves:
        return
    figure = Figure(figsize=(4 * len(curves), 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (label, (sizes, curve)) in zip(panels, curves.items(), strict=True):
        for stage in STAGES:
            values = [f[stage] for f in curve]
            axis.plot(sizes, values, "o-", label=f"{stage} ^{exponent(sizes, values):.2f}")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(results.plot, dpi=120)
