"""Structures that scratch finds from random and from trained weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import Dataset

import fxprune
from fxprune.io.files import replacing
from fxprune.methods import Scratch
from model_zoo.data import glyphs, load, loaders
from model_zoo.papers import vgg16_bn
from model_zoo.records import Record

Weights = Mapping[str, Tensor]


FLOPS = 0.5
METHOD = Scratch(strength=0.5, sparsity=0.2)  # of the paper's code, for CIFAR
TEST_SEED = 1_000_003


@dataclass(frozen=True)
class Sizes:
    """What the study is made of.

    ``dataset``: drawn ``glyphs``, or ``cifar10``. ``images``: to train on, at most; a fifth as many to choose gates by.
    ``epochs``: of the first training, those whose weights are pruned; the last one of all.
    """

    dataset: str = "glyphs"
    width: float = 0.25
    side: int = 32
    images: int = 1500
    batch: int = 64
    gate_epochs: int = 10
    random_seeds: int = 5
    trainings: int = 3
    epochs: tuple[int, ...] = (1, 3, 5, 10, 15)

    def structures(self) -> Iterator[Structure]:
        """Of random weights, of one training, of the ends of others."""
        yield from (Structure(seed) for seed in range(self.random_seeds))
        yield from (Structure(0, epoch) for epoch in self.epochs)
        yield from (Structure(seed, self.epochs[-1]) for seed in range(1, self.trainings))

    def names(self) -> list[str]:
        return [*map(str, self.structures())]

    @classmethod
    def of(cls, head: Mapping[str, Any]) -> Sizes:
        """Those that the header of a result file says."""
        found = head["sizes"]
        return cls(**{**found, "epochs": tuple(found["epochs"])})


class Structure(NamedTuple):
    """``epoch``: of the training of this seed; 0: of its random weights."""

    seed: int
    epoch: int = 0

    def __str__(self) -> str:
        return f"training {self.seed}, epoch {self.epoch}" if self.epoch else f"random weights {self.seed}"


SMALL = Sizes(width=0.0625, side=16, images=64, gate_epochs=1, random_seeds=2, trainings=2, epochs=(1, 2))
PAPER = Sizes("cifar10", 1.0, images=50_000, trainings=5, epochs=(1, 3, 5, 10, 20, 40, 80, 160))

Split = tuple[Dataset[Any], Dataset[Any]]  # to train on, and to choose gates by


def drawn(sizes: Sizes) -> Split:
    held = glyphs(max(sizes.images // 5, 1), sizes.side, seed=TEST_SEED)
    return glyphs(sizes.images, sizes.side), held


def cifar10(sizes: Sizes, directory: Path, device: str) -> Split:
    """So many at random, and a fifth as many of the images to test on.

    Raises:
        ValueError, FileNotFoundError: there is no CIFAR-10 in ``directory``, or it is broken.
    """

    def some(part: Any, count: int) -> Any:
        return part.part(torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count]).to(device)

    train, test = load("cifar10", directory)
    return some(train, sizes.images), some(test, max(sizes.images // 5, 1))


def network(sizes: Sizes, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return vgg16_bn(width=sizes.width, gamma=0.5)


def training(sizes: Sizes, seed: int, first: nn.Module, images: Dataset[Any], kept: Path) -> dict[int, Weights]:
    """The weights after each of the study's epochs, from the file ``kept`` where it is there."""
    if kept.exists():
        loaded: dict[int, Weights] = torch.load(kept, map_location="cpu")
        return loaded
    model = copy.deepcopy(first).train()
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    last = sizes.epochs[-1]
    schedule = MultiStepLR(optimizer, sorted({max(last // 2, 1), max(last * 3 // 4, 1)}))
    batches, _ = loaders(images, images, sizes.batch, seed)
    found: dict[int, Weights] = {}
    for epoch in range(1, last + 1):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
        if epoch in sizes.epochs:
            found[epoch] = copy.deepcopy(model.state_dict())
    with replacing(kept) as draft:
        torch.save(found, draft)
    return found


def pruned(sizes: Sizes, name: str, model: nn.Module, seed: int, images: Dataset[Any], held: Dataset[Any]) -> Record:
    begun = time.perf_counter()
    batches, tests = loaders(images, held, sizes.batch, seed)
    small = fxprune.prune(
        model, images[0][0][None], method=METHOD, flops=FLOPS, round_to=1, data=batches, epochs=sizes.gate_epochs,
        options=fxprune.Options(loop=fxprune.Loop(validation=tests)), seed=seed, progress=False,
    )  # fmt: skip
    report = small.meta["fxprune"]
    figures = {
        "accuracy": _accuracy(model, tests),
        "ratio": report.macs_after / report.macs_before,
        "kept": {layer: list(counts) for layer, counts in report.plan.widths.items()},
        "notes": list(report.notes),
    }
    return Record(name, figures, {"gates": round(time.perf_counter() - begun, 1)})


def _accuracy(model: nn.Module, batches: Any) -> float:
    right = count = 0
    model.eval()
    with torch.no_grad():
        for x, y in batches:
            right, count = right + int((model(x).argmax(1) == y).sum()), count + len(y)
    return right / count
