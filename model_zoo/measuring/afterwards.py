"""A trained network that is cut, brought back in some way or in none, and then trained on."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import fxprune
from model_zoo import data
from model_zoo.comparison import over, recalibrated
from model_zoo.measuring.reconstruction import PEER, cut
from model_zoo.measuring.reconstruction import Job as Cut
from model_zoo.pictures import Batches, Pictures
from model_zoo.records import Record
from model_zoo.study import Options
from model_zoo.trained import NETWORKS, Trained

DENSE = "dense"
STARTS = ("cut", "norms", "refitted")
BATCH, RATE = 128, 0.01


class Job(NamedTuple):
    """``start``: what is done before training. ``images``: seen in it, in a random order, each as often as others."""

    case: str
    method: str
    start: str
    ratio: float
    images: int
    seed: int

    def __str__(self) -> str:
        what = self.method if self.method == DENSE else f"{self.method}, {self.start}, {self.ratio:g}"
        return f"{self.case}, {what}, {self.images} images, seed {self.seed}"


class Made:
    """A trained network and its images, shared by the jobs."""

    def __init__(self, name: str, options: Options):
        self.case: Trained = NETWORKS[name][0](options.data)
        pictures: Any = data.load("cifar10", options.data / "cifar10")[0]
        self.pictures: Pictures = replace(pictures, statistics=self.case.statistics)
        self.macs = fxprune.analyze(self.case.model, self.case.calibration(0)[:1]).macs()


def measured(job: Job, made: Made) -> Record:
    """Quality before and after training, at the end of a cosine."""
    record = Record(str(job), {**job._asdict(), "unit": made.case.unit})
    torch.manual_seed(job.seed)
    begun = time.perf_counter()
    try:
        network = start(job, made)
    except Exception as error:
        if job.method != PEER:
            raise
        record.checks["peer"] = f"{type(error).__name__}: {error}"
        return record
    record.seconds["start"] = round(time.perf_counter() - begun, 1)
    record.figures["macs_ratio"] = fxprune.analyze(network, made.case.calibration(0)[:1]).macs() / made.macs
    if job.method != DENSE:
        record.checks["budget"] = over(record)
    record.figures["before"] = made.case.quality(network.eval())
    begun = time.perf_counter()
    train(network, made.pictures, job.images, job.seed)
    record.seconds["train"] = round(time.perf_counter() - begun, 1)
    record.figures["after"] = made.case.quality(network.eval())
    return record


def start(job: Job, made: Made) -> nn.Module:
    """The network that training begins with, in eval mode."""
    if job.method == DENSE:
        return copy.deepcopy(made.case.model)
    inputs = made.case.calibration(job.seed)
    small = cut(Cut(job.case, job.method, job.ratio, job.seed), made.case, inputs)
    if job.start == "norms":
        return recalibrated(small, [(batch, None) for batch in inputs.split(32)]).eval()
    if job.start == "refitted":
        fitted: nn.Module = fxprune.reconstruct(small, made.case.model, inputs, seed=job.seed)
        return fitted.eval()
    return small


def train(network: nn.Module, pictures: Pictures, images: int, seed: int) -> None:
    """SGD with momentum on cross entropy, random crops and flips; the rate falls to zero along a cosine."""
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    batches, seen = Batches(pictures, BATCH, seed), 0
    schedule = CosineAnnealingLR(optimizer, -(-images // BATCH))
    network.train()
    while seen < images:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            schedule.step()
            seen += len(y)
            if seen >= images:
                break
