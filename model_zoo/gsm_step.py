"""What a step of Global Sparse Momentum costs: ``python -m model_zoo.gsm_step``.

Parameter lists of ResNet-56 and ResNet-50 with random gradients, both optimizers with ``foreach=True``; they take turns
with the rest in every round. CPU seconds of this process, medians over all rounds and in brackets the least, so that
what else runs on the machine counts for little; it still competes for the memory. Milliseconds.

*top-k* is what GSM does to find the ``Q``-th largest of the products ``|gradient * weight|``, once they are there, and
nothing else: products, marks and masks belong to the step. ``torch.topk`` of the same numbers is there to compare.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from fxprune.methods.optim import GSM, active_count, is_kernel, largest_left_out
from model_zoo.papers import resnet, resnet_50
from model_zoo.records import RESULTS, Record, append, begin, heading, markdown, read

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


def measured(name: str, rounds: int) -> Record:
    make, compression = NETWORKS[name]
    torch.manual_seed(0)
    parameters = list(make().parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    kernels = [p for p in parameters if is_kernel(p)]
    products = torch.cat([(p.detach() * p.grad).abs().flatten() for p in kernels])
    count = active_count(len(products), compression)
    options: Any = {"lr": 1e-9, "momentum": 0.9, "weight_decay": 1e-4, "foreach": True}
    steps = {
        "sgd": torch.optim.SGD(parameters, **options).step,
        "gsm": GSM(parameters, compression=compression, **options).step,
        "topk": lambda: largest_left_out(products, count),
        "torch.topk": lambda: torch.topk(products, count, sorted=False),
    }
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in parameters), "compression": compression}
    for what, found in times(steps, rounds).items():
        figures |= {what: median(found), f"{what}, least": min(found)}
    figures["ratio"] = (figures["gsm"] - figures["topk"]) / figures["sgd"]
    return Record(name, figures)


def page(results: Path) -> str:
    head, records = read(results)
    columns = ["network", "parameters", "compression", "SGD", "GSM", "top-k", "torch.topk", "(GSM - top-k) / SGD"]
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for name, record in records.items():
        f = record.figures
        spent = [f"{f[key]:.1f} ({f[f'{key}, least']:.1f})" for key in ("sgd", "gsm", "topk", "torch.topk")]
        rows.append([name, str(f["parameters"]), f"{f['compression']:g}x", *spent, f"{f['ratio']:.2f}"])
    missed = [name for name, record in records.items() if record.figures["ratio"] > TARGET]
    verdict = f"The target is {TARGET} at most; missed by {', '.join(missed) or 'none'}."
    parts = heading(head)
    parts += [(__doc__ or "").partition("\n")[2].strip(), markdown(rows), verdict]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gsm_step.jsonl", help="one line per network, and a page")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    begin(options.out, "python -m model_zoo.gsm_step")
    for name in options.networks:
        append(options.out, measured(name, options.rounds))
    options.out.with_suffix(".md").write_text(page(options.out))


if __name__ == "__main__":
    main()
