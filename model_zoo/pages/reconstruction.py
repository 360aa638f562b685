"""Quality by MACs, of every way to get it back."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from model_zoo.measuring.reconstruction import METHODS, PEER, QUALITIES
from model_zoo.records import Results, mean_and_deviation, table
from model_zoo.trained import NETWORKS

COLUMNS = ("dense", "cut", "norm statistics", "refitted without data", "refitted", "tuned", "seconds")
NOTE = (
    "Channels are kept in any number (round_to=1): of networks as narrow as those for CIFAR-10, whose layers have 16 "
    "to 64, multiples of 16 leave all of a layer or none. Calibration data are unlabelled, a fifth of them held out; a "
    "number is the mean over the seeds of calibration "
    "data, with the standard deviation where there are several. *cut*: as the method leaves it; *norm statistics*: "
    "batch norms measured anew on the data, and nothing else; *refitted*: fxprune.reconstruct, where nothing is "
    "trained, on the data and, of l2, which needs none, without; *tuned*: scales, shifts and biases trained afterwards "
    "on the same data (tune=). Torch-Pruning: group norm, global, at the same MACs; empty where its network fails. "
    "Without data the refit needs batch norms."
)


COLOURS = {"l2": "#0b62b5", "taylor": "#c2570c", "obs": "#1a7f37", PEER: "#888888"}


def page(results: Results) -> Sequence[str]:
    known, rows = _known(results), []
    groups = list(dict.fromkeys((f["case"], f["ratio"], f["method"]) for f in known))
    for case, ratio, method in sorted(groups, key=lambda g: (list(NETWORKS).index(g[0]), -g[1], METHODS.index(g[2]))):
        alike = [f for f in known if (f["case"], f["ratio"], f["method"]) == (case, ratio, method)]
        digits = dict.fromkeys(QUALITIES, 2 if "%" in alike[0]["unit"] or alike[0]["unit"] == "dB" else 4) | {"s": 0}
        seen = {key: [f[key] for f in alike if key in f] for key in digits}
        cells = [mean_and_deviation(values, digits[key]) if values else "" for key, values in seen.items()]
        rows.append([f"{case}, {alike[0]['unit']}", f"{ratio:g}", method, *cells])
    columns = {"case": "---", "MACs": "---:", "method": "---", **dict.fromkeys(COLUMNS, "---:")}
    return [NOTE, table(columns, rows), results.image("quality by MACs")]


def _known(results: Results) -> list[dict[str, Any]]:
    return [record.figures | {"s": sum(record.seconds.values())} for record in results.lines if record.figures]


def plot(results: Results) -> None:
    from matplotlib.figure import Figure

    known = _known(results)
    cases = [case for case in NETWORKS if any(f["case"] == case for f in known)]
    figure = Figure((4.2 * len(cases), 3.4), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        own = [f for f in known if f["case"] == case]
        axes.axhline(own[0]["dense"], color="#888888", linewidth=1, label="dense")
        for method in METHODS:
            for key, style in (("norms", ":"), ("unseen", "--"), ("refitted", "-")):
                found = [f for f in own if f["method"] == method and key in f]
                points = sorted({f["ratio"] for f in found})
                values = [statistics.fmean(f[key] for f in found if f["ratio"] == p) for p in points]
                if points:
                    label = f"{method}, {key}"
                    axes.plot(points, values, style, marker="o", markersize=3, label=label, color=COLOURS[method])
        axes.set_title(f"{case}, {own[0]['unit']}")
        axes.set_xlabel("MACs that stay")
        axes.legend(fontsize=6)
    figure.savefig(results.plot, dpi=110)
