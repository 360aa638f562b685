"""Digits: sparse momentum, magnitude and tickets on the same base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.methods.optim import GSM, active_count, hold_zero, is_kernel, magnitude_cut
from model_zoo.data import digits
from model_zoo.papers import lenet_5, lenet_300_100
from model_zoo.papers.lenet import SIDE
from model_zoo.records import Record

COMPRESSIONS = (10, 60, 125)
BATCH = 64


@dataclass(frozen=True)
class Settings:
    """SGD with Nesterov's momentum, without weight decay of biases; the rate falls tenfold after ``drops``."""

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    drops: tuple[float, ...]

    def rates(self) -> list[float]:
        """Of every epoch."""
        ends = [share * self.epochs for share in self.drops]
        return [self.lr / 10 ** sum(epoch >= end for end in ends) for epoch in range(self.epochs)]

    def decay(self, steps: int) -> float:
        """Minus the logarithm of what a passive weight is multiplied by, with so many steps in an epoch."""
        return sum(self.rates()) * steps * self.weight_decay / (1 - self.momentum)


class Plan(NamedTuple):
    """``tune``: of what magnitude has cut; as many epochs as ``sparse``."""

    make: Callable[[], nn.Module]
    dense: Settings
    sparse: Settings
    tune: Settings


def _plan(make: Callable[[], nn.Module], dense: int, sparse: int, weight_decay: float) -> Plan:
    usual = Settings(dense, lr=0.03, momentum=0.9, weight_decay=5e-4, drops=(0.5, 0.75))
    passive = Settings(sparse, lr=0.01, momentum=0.99, weight_decay=weight_decay, drops=(0.8, 0.9))
    return Plan(make, usual, passive, replace(usual, epochs=sparse))


NETWORKS = {
    "lenet_300_100": _plan(lenet_300_100, dense=40, sparse=120, weight_decay=3.5e-3),
    "lenet_5": _plan(lenet_5, dense=15, sparse=40, weight_decay=9e-3),
}


def train(model: nn.Module, images: Tensor, labels: Tensor, settings: Settings, seed: int, compression: float) -> None:
    """In place; with ``compression=1`` by plain SGD."""
    optimizer = GSM(
        model.parameters(), settings.lr, settings.momentum, settings.weight_decay, compression, nesterov=True
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for rate in settings.rates():
        for group in optimizer.param_groups:
            group["lr"] = rate
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose class the network finds."""
    return int((model.eval()(images).argmax(1) == labels).sum()) / len(labels)


def held(model: nn.Module, masks: Sequence[Tensor]) -> nn.Module:
    """A copy whose weights outside the masks are zero and stay so."""
    result = copy.deepcopy(model)
    hold_zero(result.parameters(), masks)
    return result


class Case(NamedTuple):
    network: str
    compression: int
    seed: int

    def __str__(self) -> str:
        return f"{self.network} {self.compression}x seed {self.seed}"


def begun(name: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """The network with first weights, and after its training."""
    torch.manual_seed(seed)
    first = NETWORKS[name].make()
    dense = copy.deepcopy(first)
    images, labels = digits(SIDE, seed)[0].tensors
    train(dense, images, labels, NETWORKS[name].dense, seed, 1)
    return first, dense


def measured(case: Case, first: nn.Module, dense: nn.Module) -> Record:
    name, compression, seed = case
    (images, labels), test = (part.tensors for part in digits(SIDE, seed))
    plan = NETWORKS[name]
    total = sum(p.numel() for p in first.parameters() if is_kernel(p))
    figures: dict[str, Any] = {"network": name, "compression": compression, "seed": seed, "weights": total}
    figures |= {"kept": active_count(total, compression), "dense": accuracy(dense, *test)}
    sparse = copy.deepcopy(dense)
    train(sparse, images, labels, plan.sparse, seed, compression)
    figures["before"] = accuracy(sparse, *test)
    whole = [p.detach().clone() for p in sparse.parameters()]
    masks = magnitude_cut(sparse.parameters(), compression)
    figures["after"] = accuracy(sparse, *test)
    lost = sum(float((w * ~mask).square().sum()) for w, mask in zip(whole, masks, strict=True))
    figures["norm_cut"] = (lost / sum(float(w.square().sum()) for w in whole if is_kernel(w))) ** 0.5
    tuned = held(dense, magnitude_cut(copy.deepcopy(dense).parameters(), compression))
    figures["magnitude_cut"] = accuracy(tuned, *test)
    train(tuned, images, labels, plan.tune, seed, 1)
    figures["magnitude"] = accuracy(tuned, *test)
    ticket = held(first, masks)
    train(ticket, images, labels, plan.dense, seed, 1)
    figures["ticket"] = accuracy(ticket, *test)
    figures["decay"] = plan.sparse.decay(-(-len(labels) // BATCH))
    figures["settings"] = {stage: asdict(getattr(plan, stage)) for stage in ("dense", "sparse", "tune")}
    return Record(str(case), figures)
