"""Latency of what is left, beside the dense network's, on onnxruntime.

Every network is pruned by the magnitude of its (random) weights: to half of its MACs with default settings, to half of
its MACs with any number of channels (``round_to=1``), and to half of its latency. Dense and pruned network then run in
turn, ``fxprune.bench``: medians of at least 31 runs each.
"""

from __future__ import annotations

from model_zoo.measuring.latency import BATCHES, CUTS, MOST, Case, measured
from model_zoo.pages.latency import page
from model_zoo.study import Add, Study, each


def _options(add: Add) -> None:
    add("--batches", nargs="+", type=int, default=[*BATCHES], help="sizes")
    add("--provider", help="onnxruntime's execution provider (default: CUDA, or the CPU)")


STUDY = Study(
    "latency", "milliseconds that half of the MACs, or half of the latency, leave of six networks; an hour",
    lambda options: [Case(n, batch, cut) for batch in options.batches for n in MOST for cut in CUTS], each(measured),
    page, options=_options, doc=__doc__, rules=__doc__.strip(),
    told=lambda r: f"{r.name}: MACs {r.figures['macs_ratio']:.3f}, latency {r.figures['ratio']:.3f} {r.failures or ''}",
)  # fmt: skip
