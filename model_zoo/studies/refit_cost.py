"""What a reconstruction costs: processor time beside that of the forward passes over the same data.

A network with random weights is cut to half of its MACs and refitted on random images, in a process of its own, on one
thread. *Dense*, *pruned*: one forward pass over all of the images. *Sums*: of products of inputs and outputs, the Gram
matrices. *Solves*: Cholesky for every ridge that is tried. *Rest*: everything else that the refit does, forward passes
of both networks among it. Seconds of processor time, which what else runs on the machine disturbs less than the clock;
it still competes for the memory.
"""

from __future__ import annotations

import cProfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import fxprune
from fxprune.reconstruction.solve import Sums, solve
from model_zoo import networks
from model_zoo.measuring.meter import spent
from model_zoo.records import Record, Results, table
from model_zoo.study import Add, Options, Study, each, rules

NETWORKS = ("timm:resnet50",)
MOST = 2.0  # times the forward passes, plus the solves


def measured(spec: str, options: Options) -> Record:
    torch.manual_seed(0)
    model = networks.load(spec).eval()
    (example,), _ = networks.example_inputs(model)
    images = torch.randn(options.images, *example.shape[1:])
    small = fxprune.prune(model, images[:1], flops=0.5, verify=False, progress=False)
    figures: dict[str, Any] = {
        "images": options.images,
        "dense": passes(model, images),
        "pruned": passes(small, images),
    }
    begun = time.perf_counter()
    refit = lambda: fxprune.reconstruct(small, model, images)  # noqa: E731
    figures["whole"], inside = profiled(refit, {"sums": Sums.add, "solves": solve})
    figures |= inside | {"clock": time.perf_counter() - begun}
    figures["times"] = (figures["whole"] - figures["solves"]) / (figures["dense"] + figures["pruned"])
    late = figures["times"] > MOST
    return Record(spec, figures, checks={"cost": f"{figures['times']:.2f}, at most {MOST} wanted" if late else ""})


def passes(network: nn.Module, images: torch.Tensor) -> float:
    """Seconds of a forward pass over all images."""
    with torch.no_grad():
        return spent(lambda: [network(batch) for batch in images.split(32)])[1]


def profiled(work: Callable[[], object], functions: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Seconds of the work, and of all calls of these functions in it."""
    profile = cProfile.Profile(time.process_time)
    _, whole = spent(lambda: profile.runcall(work))
    found = {entry.code: entry.totaltime for entry in profile.getstats()}
    return whole, {name: found.get(function.__code__, 0.0) for name, function in functions.items()}


def page(results: Results) -> Sequence[str]:
    rows = []
    for r in results.lines:
        f = r.figures
        rest = f["whole"] - f["sums"] - f["solves"]
        cells = [*(f[key] for key in ("dense", "pruned", "whole", "sums", "solves")), rest]
        times = f"{f['times']:.2f}"
        rows.append([r.name, str(f["images"]), *(f"{s:.1f}" for s in cells), f"**{times}**" if r.failures else times])
    columns = ["network", "images", "dense", "pruned", "refit", "sums", "solves", "rest", "(refit - solves) / forward"]
    return [table(columns, rows), f"At most {MOST:g} is aimed at (bold is more)."]


def _options(add: Add) -> None:
    add("--images", type=int, default=256, help="to refit on (default: 256)")


STUDY = Study(
    "refit_cost", "what a reconstruction costs, beside the forward passes over its data", lambda _: NETWORKS,
    each(measured), page, options=_options, doc=__doc__, rules=rules(__doc__), open=True, apart=True,
)  # fmt: skip
