"""What a step of Global Sparse Momentum costs, against SGD.

Parameter lists of ResNet-56 and ResNet-50 with random gradients, both optimizers with ``foreach=True``; they take turns
with the rest in every round. CPU seconds of this process, medians over all rounds and in brackets the least, so that
what else runs on the machine counts for little; it still competes for the memory. Milliseconds.

*top-k* is what GSM does to find the ``Q``-th largest of the products ``|gradient * weight|``, once they are there, and
nothing else: products, marks and masks belong to the step. ``torch.topk`` of the same numbers is there to compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from fxprune.methods.optim import GSM, active_count, is_kernel, largest_left_out
from model_zoo.papers import resnet, resnet_50
from model_zoo.records import Record, Results, table
from model_zoo.study import Options, Study, each, rules

NETWORKS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "resnet_56": (lambda: resnet(56), 10),
    "resnet_50": (resnet_50, 4),
}
TARGET = 1.5


def times(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of everything in every round, but for the first one."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            found[name].append(1000 * (time.process_time() - begun))
    return {name: values[1:] for name, values in found.items()}


def measured(name: str, options: Options) -> Record:
    make, compression = NETWORKS[name]
    torch.manual_seed(0)
    parameters = list(make().parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    kernels: list[Any] = [p for p in parameters if is_kernel(p)]
    products = torch.cat([(p.detach() * p.grad).abs().flatten() for p in kernels])
    count = active_count(len(products), compression)
    given: Any = {"lr": 1e-9, "momentum": 0.9, "weight_decay": 1e-4, "foreach": True}
    steps = {
        "sgd": torch.optim.SGD(parameters, **given).step,
        "gsm": GSM(parameters, compression=compression, **given).step,
        "topk": lambda: largest_left_out(products, count),
        "torch.topk": lambda: torch.topk(products, count, sorted=False),
    }
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in parameters), "compression": compression}
    for what, found in times(steps, options.rounds).items():
        figures |= {what: median(found), f"{what}, least": min(found)}
    figures["ratio"] = (figures["gsm"] - figures["topk"]) / figures["sgd"]
    return Record(name, figures)


def page(results: Results) -> Sequence[str]:
    rows = []
    for name, record in results.records.items():
        f = record.figures
        spent = [f"{f[key]:.1f} ({f[f'{key}, least']:.1f})" for key in ("sgd", "gsm", "topk", "torch.topk")]
        rows.append([name, str(f["parameters"]), f"{f['compression']:g}x", *spent, f"{f['ratio']:.2f}"])
    columns = ["network", "parameters", "compression", "SGD", "GSM", "top-k", "torch.topk", "(GSM - top-k) / SGD"]
    missed = [name for name, record in results.records.items() if record.figures["ratio"] > TARGET]
    verdict = f"The target is {TARGET} at most; missed by {', '.join(missed) or 'none'}."
    return [table(columns, rows), verdict]


STUDY = Study(
    "gsm_step", "what a step of sparse momentum costs, against SGD", lambda _: NETWORKS, each(measured), page,
    doc=__doc__, rules=rules(__doc__),
    options=lambda add: add("--rounds", type=int, default=15, help="of all steps in turn (default: 15)"),
)  # fmt: skip
