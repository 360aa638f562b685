"""Accuracy after training, by what was done before it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from model_zoo.measuring.afterwards import DENSE, RATE, STARTS
from model_zoo.records import Results, mean_and_deviation, table

COLOURS = {"cut": "#888888", "norms": "#c2570c", "refitted": "#1a7f37"}
NOTE = (
    "Every network begins as *start* says (the cut alone; norm statistics measured anew; weights refitted by "
    "fxprune.reconstruct on 512 images without labels) and is then trained with labels: SGD, batches of 128, rate "
    f"{RATE} falling to zero along a cosine, crops and flips, for so many images in all; an epoch has 50,000. The "
    "dense network is trained in the same way, since its weights are from sharper images."
)


def page(results: Results) -> Sequence[str]:
    known = [record.figures for record in results.lines if "after" in record.figures]
    budgets = sorted({f["images"] for f in known})
    rows = []
    for key in dict.fromkeys((f["case"], f["ratio"], f["method"], f["start"]) for f in known):
        own = [f for f in known if (f["case"], f["ratio"], f["method"], f["start"]) == key]
        case, ratio, method, start = key
        after = [[f["after"] for f in own if f["images"] == n] for n in budgets]
        cells = [mean_and_deviation(values) if values else "" for values in ([f["before"] for f in own], *after)]
        named = [DENSE, "", ""] if method == DENSE else [f"{ratio:g}", method, start]
        rows.append([f"{case}, {own[0]['unit']}", *named, *cells])
    columns = {"network": "---", "MACs": "---:", "method": "---", "start": "---", "no training": "---:"}
    columns |= {f"{n:,} images": "---:" for n in budgets}
    return [NOTE, table(columns, rows), results.image("accuracy by images seen")]


def plot(results: Results) -> None:
    from matplotlib.figure import Figure

    known: list[dict[str, Any]] = [record.figures for record in results.lines if "after" in record.figures]
    panels = sorted({(f["case"], f["ratio"], f["method"]) for f in known if f["method"] != DENSE}, key=str)
    figure = Figure((3.6 * len(panels), 3.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for start in STARTS:
            own = [f for f in known if (f["case"], f["ratio"], f["method"]) == panel and f["start"] == start]
            points: dict[int, list[float]] = {0: [f["before"] for f in own]}
            for f in own:
                points.setdefault(f["images"], []).append(f["after"])
            if own:
                seen = sorted(points)
                means = [statistics.fmean(points[n]) for n in seen]
                axes.plot([n / 50000 for n in seen], means, marker="o", label=start, color=COLOURS[start])
        case, ratio, method = panel
        axes.set_title(f"{case}, {method}, {ratio:g} of the MACs", fontsize=9)
        axes.set_xlabel("epochs")
        axes.legend(fontsize=7)
    figure.savefig(results.plot, dpi=110)
