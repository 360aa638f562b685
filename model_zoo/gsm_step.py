"""What a step of Global Sparse Momentum costs: ``python -m model_zoo.gsm_step``.

Parameter lists of ResNet-56 and ResNet-50 with random gradients, both optimizers with ``foreach=True``. *top-k* is
``torch.topk`` of the products ``|gradient * weight|`` alone. The least of several times in CPU seconds of this process:
what else runs on the machine counts for little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.optim import GSM, active_count, is_kernel
from model_zoo.papers import resnet, resnet_50
from model_zoo.records import RESULTS, Record, append, begin, read

NETWORKS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "resnet_56": (lambda: resnet(56), 10),
    "resnet_50": (resnet_50, 4),
}
TARGET = 1.5


def least(step: Callable[[], Any], repeats: int) -> float:
    """Milliseconds."""
    step()
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        step()
        found.append(time.process_time() - begun)
    return 1000 * min(found)


def measured(name: str, repeats: int) -> Record:
    make, compression = NETWORKS[name]
    torch.manual_seed(0)
    parameters = list(make().parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    kernels = [p.detach() for p in parameters if is_kernel(p)]
    products = torch.cat([(p * q.grad).flatten() for p, q in zip(kernels, filter(is_kernel, parameters), strict=True)])
    count = active_count(len(products), compression)
    options: Any = {"lr": 1e-9, "momentum": 0.9, "weight_decay": 1e-4, "foreach": True}
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in parameters), "compression": compression}
    figures["sgd"] = least(torch.optim.SGD(parameters, **options).step, repeats)
    figures["gsm"] = least(GSM(parameters, compression=compression, **options).step, repeats)
    products.abs_()
    figures["topk"] = least(lambda: torch.topk(products, count, sorted=False), repeats)
    figures["ratio"] = (figures["gsm"] - figures["topk"]) / figures["sgd"]
    return Record(name, figures)


def page(results: Path) -> str:
    head, records = read(results)
    columns = ["network", "parameters", "compression", "SGD ms", "GSM ms", "top-k ms", "(GSM - top-k) / SGD"]
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for name, record in records.items():
        f = record.figures
        times = [f"{f[key]:.1f}" for key in ("sgd", "gsm", "topk")]
        rows.append([name, str(f["parameters"]), f"{f['compression']:g}x", *times, f"{f['ratio']:.2f}"])
    missed = [name for name, record in records.items() if record.figures["ratio"] > TARGET]
    verdict = f"The target is {TARGET} at most; missed by {', '.join(missed) or 'none'}."
    parts = [f"# {head['command']}", ", ".join(f"{key} {value}" for key, value in head.items() if key != "command")]
    parts += [(__doc__ or "").partition("\n")[2].strip(), "\n".join(f"| {' | '.join(row)} |" for row in rows), verdict]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gsm_step.jsonl", help="one line per network, and a page")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    begin(options.out, "python -m model_zoo.gsm_step")
    for name in options.networks:
        append(options.out, measured(name, options.repeats))
    options.out.with_suffix(".md").write_text(page(options.out))


if __name__ == "__main__":
    main()
