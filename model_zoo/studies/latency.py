"""Latency of what is left, beside the dense network's, on onnxruntime or another engine.

Every network is pruned by the magnitude of its (random) weights: to half of its MACs with default settings, to half of
its MACs with any number of channels (``round_to=1``), to half of its MACs with whole residual branches among what goes
(``depth=True``, in multiples of 16), and to half of its latency. Dense and pruned network then run in turn,
``fxprune.bench``: medians of at least 31 runs each.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

import fxprune
from fxprune.io.specs import load_model
from fxprune.recording.inputs import infer_inputs
from model_zoo.pages.latency import page
from model_zoo.records import Record
from model_zoo.study import Add, Options, Study, each

BATCHES = (1, 8)
NETWORKS = (
    "resnet50", "mobilenetv3_large_100", "efficientnet_b0", "convnext_tiny", "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
)  # fmt: skip
MOST = 0.5  # of the dense network's latency, that half of the MACs should take by default
CUTS: dict[str, dict[str, Any]] = {
    "flops=0.5": {"flops": 0.5},
    "flops=0.5, round_to=1": {"flops": 0.5, "round_to": 1},
    "flops=0.5, depth, round_to=16": {"flops": 0.5, "depth": True, "round_to": 16},
    "latency=0.5": {"latency": 0.5},
}
TOLERANCE = 0.05  # of the latency that was asked for


class Case(NamedTuple):
    """One network pruned in one way. ``provider``: another than the one at hand."""

    network: str
    batch: int
    cut: str
    provider: str | None = None

    def __str__(self) -> str:
        where = f", {self.provider}" if self.provider else ""
        return f"{self.network}, batch {self.batch}, {self.cut}{where}"


def measured(case: Case, options: Options) -> Record:
    (network, batch, cut, provider), threads = case, options.threads
    torch.manual_seed(0)
    model = load_model(f"timm:{network}").eval()
    args, _ = infer_inputs(model)
    x = torch.randn(batch, *args[0].shape[1:])
    asked = dict(CUTS[cut])
    if "latency" in asked:
        asked["latency"] = fxprune.LatencyBudget(asked["latency"], provider, threads)
    pruned = fxprune.prune(model, x, **asked, progress=False)
    report = pruned.meta["fxprune"]
    latency = fxprune.bench(model, pruned, x, threads=threads, provider=provider)
    figures = {
        "network": network, "batch": batch, "cut": cut, "macs_ratio": report.macs_after / report.macs_before,
        "round_to": report.round_to, "oracle": report.oracle_error, **latency.data(),
    }  # fmt: skip
    record = Record(str(case), figures, dict(report.seconds))
    if cut == "flops=0.5" and provider is None:
        record.checks["latency"] = "" if latency.ratio <= MOST else f"{latency.ratio:.3f}, at most {MOST} wanted"
    if "latency" in CUTS[cut]:
        aim = CUTS[cut]["latency"]
        far = abs(latency.ratio - aim) > TOLERANCE
        record.checks["latency"] = f"{latency.ratio:.3f}, {aim} +- {TOLERANCE} wanted" if far else ""
    return record


def _options(add: Add) -> None:
    add("--batches", nargs="+", type=int, default=[*BATCHES], help="sizes")
    add("--cuts", nargs="+", choices=CUTS, default=[*CUTS])
    engines = "of onnxruntime, eager, inductor, openvino (default: CUDA, or the CPU)"
    add("--provider", nargs="+", default=[None], help=engines)


def cases(options: Options) -> list[Case]:
    """Where first, then how many at once."""
    places = itertools.product(options.provider, options.batches)
    return [Case(network, batch, cut, place) for place, batch in places for network in NETWORKS for cut in options.cuts]


STUDY = Study(
    "latency", "milliseconds that half of the MACs, or half of the latency, leave of six networks; an hour",
    cases, each(measured), page, options=_options, doc=__doc__, rules=__doc__.strip(),
    told=lambda r: f"{r.name}: MACs {r.figures['macs_ratio']:.3f}, latency {r.figures['ratio']:.3f} {r.failures or ''}",
)  # fmt: skip
