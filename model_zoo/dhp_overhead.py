"""What the hypernetworks of DHP take: ``python -m model_zoo.dhp_overhead``.

Writes ``results/dhp_overhead.jsonl`` and ``.md``. Every line is a training with SGD and momentum in a process of its
own: the network as it is, with hypernetworks (``dhp``), and with hypernetworks whose intermediate tensors are kept for
the backward pass instead of being computed anew (``dhp, kept``). One thread, float32, on the CPU.

Columns: parameters that are trained; what the forward pass keeps for the backward pass, parameters left out; the peak
of resident memory above what the process holds before there is a network, so with gradients and momentum; CPU time of a
step, the median.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fxprune
from fxprune.methods import DHP
from fxprune.rewriting.hypernetworks import Hypernetwork
from model_zoo.papers import resnet
from model_zoo.papers.resnet import Bottleneck
from model_zoo.records import RESULTS, header


class Case(NamedTuple):
    """``shape``: of a batch of inputs."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def block() -> nn.Module:
    """A block of the last stage of ResNet-50: 1x1 2048 -> 512, 3x3 512 -> 512, 1x1 512 -> 2048."""
    return Bottleneck(2048, 512, 1)


CASES = {
    "ResNet-20": Case(lambda: resnet(20), (64, 3, 32, 32)),
    "block of ResNet-50": Case(block, (16, 2048, 7, 7)),
    "tiny": Case(lambda: resnet(8, width=0.5), (2, 3, 8, 8)),
}
WAYS = ("as it is", "dhp", "dhp, kept")
MEGA = 2**20


def measure(case: Case, way: str, steps: int) -> dict[str, Any]:
    """The columns of one line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(case.shape)
    _train(CASES["tiny"].make(), torch.randn(CASES["tiny"].shape), "dhp", 1)  # what torch loads at first use
    before = _resident()
    figures, seconds = _train(case.make(), x, way, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures |= {"peak_mib": round((peak - before) / MEGA), "step_ms": round(1000 * sorted(seconds)[len(seconds) // 2])}
    return figures


def _resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _train(model: nn.Module, x: Tensor, way: str, steps: int) -> tuple[dict[str, Any], list[float]]:
    after: Callable[..., None] = _nothing
    if way != "as it is":
        training = fxprune.attach(model, x[:1], method=DHP(), flops=0.5, verify=False, progress=False)
        model, after = training.model, training.after_step
        for part in model.modules():
            if isinstance(part, Hypernetwork):
                part.recompute = way == "dhp"
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), x)}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds = []
    for step in range(steps + 1):
        begun = time.process_time()
        optimizer.zero_grad()
        if step:
            loss = model(x).square().mean()
        else:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        after(optimizer)
        if step:
            seconds.append(time.process_time() - begun)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "kept_mib": round(sum(kept.values()) / MEGA, 1)}, seconds


def _nothing(optimizer: torch.optim.Optimizer) -> None:
    """What is to be done after a step of a network as it is."""


def page(path: Path) -> str:
    """The result file as a table."""
    head, *lines = (json.loads(line) for line in path.read_text().splitlines())
    made = ", ".join(f"{key} {value}" for key, value in head.items() if key != "command")
    dense = {line["network"]: line for line in lines if line["way"] == WAYS[0]}
    rows = [
        "| network, batch | weights | parameters | kept for backward, MiB | peak, MiB | CPU ms per step |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for line in lines:
        base = dense[line["network"]]

        def shown(key: str, line: dict[str, Any] = line, base: dict[str, Any] = base) -> str:
            return f"{line[key]:,}" + ("" if line is base else f" ({line[key] / max(base[key], 1e-9):.1f}x)")

        figures = [shown(key) for key in ("parameters", "kept_mib", "peak_mib", "step_ms")]
        rows.append(f"| {line['network']}, {line['shape']} | {line['way']} | {' | '.join(figures)} |")
    return (
        "\n\n".join([f"# {head['command']}", (__doc__ or "").partition("\n\n")[2].strip(), made, "\n".join(rows)])
        + "\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=3, help="the median of so many is shown")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[name for name in CASES if name != "tiny"])
    parser.add_argument("--one", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        name, way = options.one
        print(json.dumps(measure(CASES[name], way, options.steps)))
        return
    path = options.out / "dhp_overhead.jsonl"
    lines = [header("python -m model_zoo.dhp_overhead")]
    for name in options.cases:
        for way in WAYS:
            command = [
                sys.executable,
                "-m",
                "model_zoo.dhp_overhead",
                "--steps",
                str(options.steps),
                "--one",
                name,
                way,
            ]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            shape = "x".join(map(str, CASES[name].shape))
            lines.append({"network": name, "shape": shape, "way": way, **json.loads(told)})
            print(json.dumps(lines[-1]), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path.with_suffix(".md").write_text(page(path))


if __name__ == "__main__":
    main()
