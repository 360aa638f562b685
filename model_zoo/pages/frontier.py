"""Accuracy by milliseconds, and which networks no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model_zoo.measuring.frontier import BATCHES, DENSE, ROUNDS, SERIES
from model_zoo.records import Results, bullets, reasons, table
from model_zoo.trained import PANELS

NOTE = (
    f"onnxruntime on the processor, one thread: dense and pruned network run in turn, {ROUNDS} times, and the least of "
    "their processor time counts, which other programs disturb little; without any, it is the time on the clock. A "
    "pruned network's milliseconds are its ratio to the dense one's times the least of those in any run. "
    "*MACs*, *latency*: what the budget is of (latency at batch 1); *aligned*: channels in multiples of 8; *branches*: "
    "whole residual branches go, alone or beside channels. Ours are "
    "refitted by fxprune.reconstruct, which cannot be done to Torch-Pruning's: these (group norm, global) have their "
    "batch norms measured anew on the same unlabelled images. Nothing is trained. In bold: no other network of the "
    "same data is at least as fast and more accurate."
)
WHY = (
    "What chooses them keeps the outputs close to the dense network's, on the images of the refit. Where the budget is "
    "of MACs, time counts for nothing in that: few branches go where channels cost less, and the thin layers that are "
    "left take longer. Where it is of milliseconds, channels go in multiples of 8, which are large steps of a layer of "
    "16: what is a little above a budget has to give away much to meet it."
)
_HUES = ("#000000", "#1a7f37", "#0b62b5", "#c2570c", "#8250df", "#cf222e", "#bf3989", "#aaaaaa", "#777777")
COLOURS = dict(zip((DENSE, *SERIES), _HUES, strict=True))
MARKS = "os^"


def page(results: Results) -> Sequence[str]:
    parts, behind_others = [NOTE], list[str]()
    for panel, known in _panels(results).items():
        behind_others += behind(known)
        rows = []
        for f in known:
            how = [f["case"], f["series"], f"{f['ratio']:g}", f"{f['macs_ratio']:.3f}", f"{f['quality']:.2f}"]
            times = [f"{f['ms'][b]:.2f}" for b in _batches()]
            firsts = [beaten(f, known, b) is None for b in _batches()]
            rows.append([*how, *(f"**{ms}**" if first else ms for ms, first in zip(times, firsts, strict=True))])
        columns = {"network": "---", "budget of": "---", "budget": "---:", "MACs": "---:", known[0]["unit"]: "---:"}
        columns |= {f"ms, batch {b}": "---:" for b in _batches()}
        parts += [f"## {panel}", table(columns, rows)]
    if behind_others:
        parts += ["## Where branches and channels together are not ahead", WHY, bullets(behind_others)]
    failed = [f"{r.name}: {reasons(r)}" for r in results.lines if r.failures]
    failures = ["## Where there is no network", bullets(failed)] if failed else []
    return [*parts, *failures, results.image("accuracy by milliseconds")]


def _batches() -> list[str]:
    return [str(batch) for batch in BATCHES]


def _panels(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Data -> what was measured there, in order, with comparable ``ms``."""
    figures = [r.figures for r in results.lines if "quality" in r.figures]
    least = {
        (case, b): min(f["dense_ms"][b] for f in figures if f["case"] == case)
        for case in {f["case"] for f in figures}
        for b in _batches()
    }
    known = [f | {"ms": {b: f["ms"][b] / f["dense_ms"][b] * least[f["case"], b] for b in _batches()}} for f in figures]
    order = [DENSE, *SERIES]
    known.sort(key=lambda f: (f["case"], order.index(f["series"]), -f["ratio"], f["seed"]))
    found = {panel: [f for f in known if f["case"] in cases] for panel, cases in PANELS.items()}
    return {panel: own for panel, own in found.items() if own}


def beaten(one: dict[str, Any], others: Sequence[dict[str, Any]], batch: str) -> dict[str, Any] | None:
    """A network that takes no longer and is more accurate."""
    return next((o for o in others if o["ms"][batch] <= one["ms"][batch] and o["quality"] > one["quality"]), None)


def behind(known: Sequence[dict[str, Any]]) -> list[str]:
    """Networks cut in both ways that another cut of the same network beats, and which one does."""
    lines = []
    for f in known:
        of = SERIES.get(f["series"])
        if of is None or not (of.depth and of.widths):
            continue
        own = [other for other in known if other["case"] == f["case"]]
        told = [
            f"batch {b}: {f['ms'][b]:.2f} ms, and {o['series']}, {o['ratio']:g} has {o['quality']:.2f} in "
            f"{o['ms'][b]:.2f}"
            for b in _batches()
            if (o := beaten(f, own, b)) is not None
        ]
        if told:
            gone = f"branches gone: {len(f['removed'])}"
            lines.append("; ".join([f"{f['case']}, {f['series']}, {f['ratio']:g} ({gone}): {f['quality']:.2f}", *told]))
    return lines


def plot(results: Results) -> None:
    from matplotlib.figure import Figure

    panels = _panels(results)
    figure = Figure((5 * len(BATCHES), 3.8 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), len(BATCHES), squeeze=False)
    for row, (panel, known) in zip(rows, panels.items(), strict=True):
        for axes, batch in zip(row, _batches(), strict=True):
            for case, mark in zip(PANELS[panel], MARKS, strict=True):
                for series, colour in COLOURS.items():
                    own = [(f["ms"][batch], f["quality"]) for f in known if (f["case"], f["series"]) == (case, series)]
                    if own:
                        line = zip(*sorted(own), strict=True)
                        axes.plot(*line, marker=mark, markersize=4, label=f"{case}, {series}", color=colour)
            axes.set(title=f"{panel}, batch {batch}", xlabel="milliseconds", ylabel=known[0]["unit"])
            axes.grid(alpha=0.3)
        row[-1].legend(fontsize=6)
    figure.savefig(results.plot, dpi=110)
