"""A search from random weights, and what trains first, each with the seconds that it takes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

import fxprune
from fxprune.methods import Learner, Scratch, Slimming
from fxprune.training import fit, seeded
from model_zoo import data
from model_zoo.papers import resnet, vgg16_bn
from model_zoo.papers.initial import he
from model_zoo.recipes.common import Run, Sgd
from model_zoo.records import Record
from model_zoo.study import Options

SIDE, IMAGES = 32, 320  # pixels; to train on, all others to test on
RATIO = 0.5  # MACs that stay
GATES, TRAIN, TUNE = 10, 160, 40  # epochs
SGD = Sgd(TRAIN, batch=64, lr=0.1, nesterov=True, weight_decay=1e-4, drops=(0.5, 0.75))
SCRATCH = Scratch(strength=0.5, sparsity=0.2, lr=0.01)


@dataclass(frozen=True)
class Network:
    """``gamma``: first scale of the norms. ``strength``: of slimming's penalty. ``dataset``: digits or cifar10."""

    make: Callable[..., nn.Module]
    gamma: float
    strength: float
    dataset: str = "digits"


NETWORKS = {
    "vgg16_bn": Network(partial(vgg16_bn, in_channels=1, width=0.25), 0.5, 1e-4),
    "resnet_20": Network(partial(resnet, 20, in_channels=1, width=0.5), 1.0, 1e-5),
    "resnet_20_cifar10": Network(partial(resnet, 20), 1.0, 1e-5, "cifar10"),
}


class Case:
    """One network: its data, how both searches and both trainings go."""

    def __init__(self, name: str, options: Options):
        self.network, self.options = NETWORKS[name], options
        chosen = {"dataset": self.network.dataset, "network": name, "seed": options.seed}
        rest = {"out": options.work, "smoke": False, "device": "cpu", "amp": False, "workers": 0, "resume": False}
        self.run = Run("search_cost", Options(**chosen, **rest), *images(self.network, options))
        self.settings = replace(SGD, epochs=options.train)
        self.seconds: dict[str, list[float]] = {}

    def initial(self) -> nn.Module:
        self.run.reseed()
        return self.network.make(gamma=self.network.gamma)

    def search(self, method: Learner, epochs: int, **settings: Any) -> nn.Module:
        training = fxprune.attach(
            self.initial(), self.run.example, method=method, flops=RATIO, round_to=1, seed=self.options.seed,
            progress=False,
        )  # fmt: skip
        with seeded(self.options.seed):
            batches = self.run.batches(self.settings.batch)[0]
            fit(training, batches, None, epochs, fxprune.Loop(**settings), progress=False)
        pruned: nn.Module = training.finish()
        return pruned

    def scratch(self) -> nn.Module:
        with self.timed("scratch"):
            return self.search(SCRATCH, self.options.gates)

    def slimming(self) -> nn.Module:
        with self.timed("slimming"):
            return self.search(
                Slimming(self.network.strength, gamma=self.network.gamma), self.settings.epochs,
                optimizer=self.settings.optimizer, schedule=self.settings.schedule,
            )  # fmt: skip

    def trained(self, stage: str, model: nn.Module, epochs: int, **changed: Any) -> dict[str, Any]:
        result = self.run.train(stage, model, replace(self.settings, epochs=epochs, **changed))
        return {"before": self.run.accuracy(model), **self.run.figures(result), "epochs": epochs}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        wall, worked = time.perf_counter(), time.process_time()
        yield
        for clock, seconds in (("wall", time.perf_counter() - wall), ("cpu", time.process_time() - worked)):
            self.seconds.setdefault(f"{what} {clock}", []).append(seconds)


def images(network: Network, options: Options) -> tuple[Dataset[Any], Dataset[Any]]:
    """So many to train on as are asked for, drawn at random, and all to test on."""
    if network.dataset == "digits":
        train, test = data.digits(SIDE, options.seed, test=0.5)
        return Subset(train, range(min(options.images, len(train)))), test
    parts: Any = data.load(network.dataset, options.data)
    drawn = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(options.seed))
    return parts[0].part(drawn[: options.images]), parts[1]


def measured(name: str, options: Options) -> Record:
    case, epochs = Case(name, options), options.train + options.tune
    found, slim = case.scratch(), case.slimming()
    case.scratch()
    seconds = {what: mean(taken) for what, taken in case.seconds.items()}
    case.run.reseed()
    he(found, case.network.gamma)
    figures = {
        "dense_macs": fxprune.analyze(case.initial(), case.run.example).macs(),
        "scratch": case.trained("scratch", found, epochs),
        "slimming": case.trained("slimming", slim, options.tune, lr=SGD.lr / 10),
        "images": len(case.run.images),
        "gates": options.gates,
        "train": options.train,
        **{f"times_{clock}": seconds[f"slimming {clock}"] / seconds[f"scratch {clock}"] for clock in ("wall", "cpu")},
    }
    shutil.rmtree(case.run.file("."))
    return Record(name, figures, {what: round(taken, 2) for what, taken in seconds.items()})
