"""A step of training with hypernetworks and without: seconds and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fxprune
from fxprune.methods import DHP
from fxprune.rewriting.hypernetworks import Hypernetwork
from model_zoo.papers import resnet
from model_zoo.papers.resnet import Bottleneck
from model_zoo.records import Record
from model_zoo.study import Options


class Network(NamedTuple):
    """``shape``: of a batch of inputs."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def block() -> nn.Module:
    """A block of the last stage of ResNet-50: 1x1 2048 -> 512, 3x3 512 -> 512, 1x1 512 -> 2048."""
    return Bottleneck(2048, 512, 1)


NETWORKS = {
    "ResNet-20": Network(lambda: resnet(20), (64, 3, 32, 32)),
    "block of ResNet-50": Network(block, (16, 2048, 7, 7)),
}


TINY = Network(lambda: resnet(8, width=0.5), (2, 3, 8, 8))
WAYS = ("as it is", "dhp", "dhp, kept")
MEGA = 2**20


class Case(NamedTuple):
    network: str
    way: str

    def __str__(self) -> str:
        return f"{self.network}, {self.way}"


def measure(case: Case, options: Options) -> Record:
    """The columns of one line."""
    make, shape = NETWORKS[case.network]
    torch.manual_seed(0)
    x = torch.randn(shape)
    _train(TINY.make(), torch.randn(TINY.shape), "dhp", 1)  # what torch loads at first use
    before = _resident()
    figures, seconds = _train(make(), x, case.way, options.steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures |= {"peak_mib": round((peak - before) / MEGA), "step_ms": round(1000 * sorted(seconds)[len(seconds) // 2])}
    return Record(str(case), {**case._asdict(), "shape": "x".join(map(str, shape)), **figures})


def _resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _train(model: nn.Module, x: Tensor, way: str, steps: int) -> tuple[dict[str, Any], list[float]]:
    after: Callable[..., None] = _nothing
    if way != "as it is":
        training = fxprune.attach(
            model, x[:1], method=DHP(classifier="generated"), flops=0.5, verify=False, progress=False
        )
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
