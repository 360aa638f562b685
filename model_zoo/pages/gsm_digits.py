"""Accuracy against compression, mean and standard error over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from model_zoo.measuring.gsm_digits import BATCH
from model_zoo.records import Results, bullets, mean_and_deviation, table

LEGEND = (
    "Accuracy in % on the test images, mean ± deviation over seeds. *norm cut*: of the weights that the cut after GSM "
    "takes, relative to that of all kernels. *decay*: what a passive weight shrinks by if nothing else moves it, as a "
    "power of e."
)


FIGURES = {
    "dense": "dense",
    "before": "GSM before the cut",
    "after": "GSM after the cut",
    "magnitude_cut": "magnitude, cut",
    "magnitude": "magnitude, fine-tuned",
    "ticket": "GSM ticket",
}


def page(results: Results) -> Sequence[str]:
    """Mean and deviation over seeds."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in results.lines:
        found.setdefault((record.figures["network"], record.figures["compression"]), []).append(record.figures)
    rows, settings = [], dict[str, str]()
    for (network, compression), figures in sorted(found.items()):
        kept = f"{figures[0]['kept']} of {figures[0]['weights']}"
        cells = [mean_and_deviation([100 * f[key] for f in figures]) for key in FIGURES]
        last = [f"{mean(f['norm_cut'] for f in figures):.1e}", f"{figures[0]['decay']:.1f}"]
        rows.append([network, f"{compression}x", kept, str(len(figures)), *cells, *last])
        for stage, chosen in figures[0]["settings"].items():
            settings[f"{network}, {stage}"] = ", ".join(f"{name} {value}" for name, value in chosen.items())
    columns = ["network", "compression", "weights kept", "seeds", *FIGURES.values(), "norm cut", "decay"]
    used = bullets(f"{name}: {chosen}" for name, chosen in settings.items())
    return [LEGEND, table(columns, rows), f"Batches of {BATCH} images.", used]
