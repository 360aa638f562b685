"""How alike the structures are that Pruning from Scratch finds: from random weights, and from weights in training.

The paper (Wang et al., AAAI 2020, figure 2) says that structures from random weights are diverse and differ from those
of pretrained weights, which become homogeneous after about ten epochs of training.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import TensorDataset

import fxprune
from fxprune.io.files import replacing
from fxprune.methods import Scratch
from fxprune.reports.study import Similarity
from model_zoo.data import glyphs, loaders
from model_zoo.papers import vgg16_bn
from model_zoo.records import Record, Results, bullets, read, table
from model_zoo.study import Measure, Options, Study

Weights = Mapping[str, Tensor]

FLOPS = 0.5
METHOD = Scratch(strength=0.5, sparsity=0.2)  # of the paper's code, for CIFAR
PAPER_EPOCHS = 10  # of training, after which the paper calls structures homogeneous
TEST_SEED = 1_000_003


@dataclass(frozen=True)
class Sizes:
    """Sizes of the sizes. ``epochs``: of the first training, those whose weights are pruned; the last one of all."""

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


class Structure(NamedTuple):
    """``epoch``: of the training of this seed; 0: of its random weights."""

    seed: int
    epoch: int = 0

    def __str__(self) -> str:
        return f"training {self.seed}, epoch {self.epoch}" if self.epoch else f"random weights {self.seed}"


SMALL = Sizes(width=0.0625, side=16, images=64, gate_epochs=1, random_seeds=2, trainings=2, epochs=(1, 2))


# -- what is run -------------------------------------------------------------------------------------------------------


def worker(options: Options) -> Measure:
    sizes = _sizes(options)
    images = glyphs(sizes.images, sizes.side)
    held = glyphs(max(sizes.images // 5, 1), sizes.side, seed=TEST_SEED)

    def measured(structure: Structure) -> Record:
        model = _network(sizes, structure.seed)
        if structure.epoch:
            kept = options.out.with_suffix(f".{structure.seed}.pt")
            model.load_state_dict(_training(sizes, structure.seed, model, images, kept)[structure.epoch])
        return _pruned(sizes, str(structure), model, structure.seed, images, held)

    return measured


def _network(sizes: Sizes, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return vgg16_bn(width=sizes.width, gamma=0.5)


def _training(sizes: Sizes, seed: int, first: nn.Module, images: TensorDataset, kept: Path) -> dict[int, Weights]:
    """The weights after each of the study's epochs, from the file ``kept`` where it is there."""
    if kept.exists():
        loaded: dict[int, Weights] = torch.load(kept)
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


def _pruned(sizes: Sizes, name: str, model: nn.Module, seed: int, images: TensorDataset, held: TensorDataset) -> Record:
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


# -- what is left of it ------------------------------------------------------------------------------------------------


def compared(records: Mapping[str, Record], names: Sequence[str]) -> Similarity:
    """The structures side by side."""
    layers = [*records[names[0]].figures["kept"]]
    counts = np.array([[records[name].figures["kept"][layer] for layer in layers] for name in names], dtype=float)
    return Similarity.of(names, layers, counts[..., 0] / counts[..., 1])


def findings(sizes: Sizes, found: Similarity) -> list[tuple[str, float, int]]:
    """(of what, mean correlation, number of pairs)."""
    place = {name: index for index, name in enumerate(found.names)}

    def mean(what: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, float, int]:
        return what, float(np.mean([found.correlation[place[a], place[b]] for a, b in pairs])), len(pairs)

    random = [str(Structure(seed)) for seed in range(sizes.random_seeds)]
    path = [str(Structure(0, epoch)) for epoch in sizes.epochs]
    ends = [str(Structure(seed, sizes.epochs[-1])) for seed in range(sizes.trainings)]
    late = [str(Structure(0, epoch)) for epoch in sizes.epochs if epoch >= PAPER_EPOCHS] or path[-2:]
    early = [name for name in path if name not in late]
    result = [
        mean("random weights, among each other", [*combinations(random, 2)]),
        mean("ends of trainings, among each other", [*combinations(ends, 2)]),
        mean("random weights with ends of trainings", [(a, b) for a in random for b in ends]),
        mean("neighbouring epochs of one training", [*pairwise(path)]),
        mean(f"epochs of one training from {PAPER_EPOCHS} on, among each other", [*combinations(late, 2)]),
    ]
    if early:
        result.append(mean("those with earlier epochs of it", [(a, b) for a in early for b in late]))
    return result


def verdicts(found: Sequence[tuple[str, float, int]]) -> list[str]:
    """The paper's statements, and whether these figures show them."""
    random, ends, between, _, late, *early = (value for _, value, _ in found)
    shown = {
        "Structures from random weights are more diverse than those from trained ones": random < ends,
        "Structures from random weights differ from trained ones more than these do from each other": between < ends,
    }
    if early:
        shown[f"After about {PAPER_EPOCHS} epochs structures are more alike than before"] = late > early[0]
    return [f"{statement}: {'shown' if holds else 'not shown'} here." for statement, holds in shown.items()]


def _found(results: Results) -> tuple[Sizes, list[str], Similarity]:
    """The sizes of the study, what is not run yet, and the rest side by side."""
    sizes = SMALL if "--smoke" in results.head["command"] else Sizes()
    names = [name for name in sizes.names() if name in results.records]
    missing = [name for name in sizes.names() if name not in names]
    return sizes, missing, compared(results.records, names)


def page(results: Results) -> Sequence[str]:
    sizes, missing, found = _found(results)
    parts = [f"Not run yet: {', '.join(missing)}." if missing else ""]
    parts.append(
        f"VGG16-BN at {sizes.width:g} of its width, {sizes.images} drawn images of {sizes.side} x {sizes.side} pixels "
        f"(`model_zoo.data.glyphs`), {sizes.epochs[-1]} epochs of training; gates learned for {sizes.gate_epochs} "
        f"epochs in batches of {sizes.batch} with {METHOD.strength:g} (mean |gate| - {METHOD.sparsity:g})^2, Adam at "
        f"{METHOD.lr:g}; {FLOPS:.0%} of the MACs stay. This is far smaller than the paper's CIFAR-10 study: it says "
        "whether the effect shows here, not that it does there."
    )
    if not missing:
        rows = findings(sizes, found)
        means = ([what, f"{value:.3f}", str(pairs)] for what, value, pairs in rows)
        parts += [bullets(verdicts(rows)), table(["structures", "mean correlation", "pairs"], means)]
    return [*parts, results.image("correlation"), _structures(found, results.records)]


def plot(results: Results) -> None:
    _found(results)[2].plot(results.plot)


def _structures(found: Similarity, records: Mapping[str, Record]) -> str:
    rows = []
    for name, kept in zip(found.names, found.kept, strict=True):
        figures = [f"{records[name].figures['accuracy']:.1%}", f"{records[name].seconds['gates']:.0f}"]
        rows.append([name, *figures, *(f"{share:.2f}" for share in kept)])
    return table(["structure", "accuracy before pruning", "seconds", *found.layers], rows)


def _sizes(options: Options) -> Sizes:
    return SMALL if options.smoke else Sizes()


def _check(options: Options) -> str:
    if options.resume and options.out.exists():
        command = read(options.out)[0]["command"]
        if ("--smoke" in command) != options.smoke:
            return f"{options.out} was made by another command: {command}"
    return ""


def _anew(options: Options) -> None:
    for kept in options.out.parent.glob(f"{options.out.stem}.*.pt"):
        kept.unlink()


STUDY = Study(
    "similarity",
    "how alike structures from random and from trained weights are: Pruning from Scratch, figure 2; 20 minutes",
    lambda options: _sizes(options).structures(), worker, page, plot,
    lambda add: add("--smoke", action="store_true", help="the same code in seconds, on tiny sizes"), doc=__doc__,
    check=_check, anew=_anew,
)  # fmt: skip
