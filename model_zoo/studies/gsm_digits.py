"""Global Sparse Momentum on digits, and what it is compared with.

LeNet-300-100 and LeNet-5 on the digits of scikit-learn at 28 x 28 pixels; for every compression and seed:

- *dense*: the network trained as usual. All that follows starts from it, as in the paper.
- *GSM*: trained on with ``fxprune.optim.GSM``, before and after the magnitude cut. Nothing is trained after the cut.
- *magnitude*: the dense network cut to its largest weights, and fine-tuned with the zeros fixed for as many epochs.
- *ticket*: the dense network's first weights, with the zeros that GSM found, trained as the dense one was.

Passive weights only vanish if ``lr * weight_decay / (1 - momentum)``, summed over all steps, is well above 1. These
data give few steps, so the weight decay is larger than the paper's; the last column is that sum. Rates,
weight decay and epochs were chosen in a few trials of seed 0, by the accuracy on its test images: there are none to
spare for a validation set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.methods.optim import GSM, active_count, hold_zero, is_kernel, magnitude_cut
from model_zoo.data import digits
from model_zoo.papers import lenet_5, lenet_300_100
from model_zoo.papers.lenet import SIDE
from model_zoo.records import Record, Results, bullets, mean_and_deviation, table
from model_zoo.study import Measure, Options, Study

COMPRESSIONS = (10, 60, 125)
SEEDS = (0, 1, 2)
BATCH = 64
LEGEND = (
    "Accuracy in % on the test images, mean ± deviation over seeds. *norm cut*: of the weights that the cut after GSM "
    "takes, relative to that of all kernels. *decay*: what a passive weight shrinks by if nothing else moves it, as a "
    "power of e."
)


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
FIGURES = {
    "dense": "dense",
    "before": "GSM before the cut",
    "after": "GSM after the cut",
    "magnitude_cut": "magnitude, cut",
    "magnitude": "magnitude, fine-tuned",
    "ticket": "GSM ticket",
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


def worker(_: Options) -> Measure:
    networks = lru_cache(maxsize=1)(begun)
    return lambda case: measured(case, *networks(case.network, case.seed))


def page(results: Results) -> Sequence[str]:
    """Mean and deviation over seeds."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in results.lines:
        found.setdefault((record.figures["network"], record.figures["compression"]), []).append(record.figures)
    rows, settings = [], dict[str, str]()
    for (network, compression), figures in sorted(found.items()):
        kept = f"{figures[0]['kept']} of {figures[0]['weights']}"
        cells = [mean_and_deviation([100 * f[key] for f in figures]) for key in FIGURES]
        last = [f"{mean(f['norm_cut'] for f in figures):.1e}", f"{figures[0]['decay']:.1f}"]
        rows.append([network, f"{compression}x", kept, str(len(figures)), *cells, *last])
        for stage, chosen in figures[0]["settings"].items():
            settings[f"{network}, {stage}"] = ", ".join(f"{name} {value}" for name, value in chosen.items())
    columns = ["network", "compression", "weights kept", "seeds", *FIGURES.values(), "norm cut", "decay"]
    used = bullets(f"{name}: {chosen}" for name, chosen in settings.items())
    rules = (__doc__ or "").partition("\n")[2].strip()
    return [rules, LEGEND, table(columns, rows), f"Batches of {BATCH} images.", used]


STUDY = Study(
    "gsm_digits", "sparse momentum on LeNets, against magnitude pruning and lottery tickets",
    lambda _: [Case(name, c, seed) for seed in SEEDS for name in NETWORKS for c in COMPRESSIONS], worker, page,
    doc=__doc__, told=lambda record: f"{record.name} { ({key: record.figures[key] for key in FIGURES}) }", jobs=True,
)  # fmt: skip
