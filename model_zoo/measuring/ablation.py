"""One choice of the reconstruction at a time made otherwise, on a trained network that is cut."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.methods import OBS
from model_zoo.records import Record
from model_zoo.trained import Trained


@dataclass(frozen=True)
class Variant:
    """``cut``: keywords of prune. ``fit``: of reconstruct. ``share``: of the data. ``train``: steps after the refit."""

    cut: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    train: int = 0


USUAL = "as it is"
VARIANTS: dict[str, Variant] = {
    USUAL: Variant(),
    "a quarter of the data": Variant(share=0.25),
    "twice the data": Variant(share=2.0),
    **{f"ridge {ridge:g}": Variant(fit={"ridge": ridge}) for ridge in (1e-5, 1e-3, 1e-1)},
    "four steps": Variant({"options": fxprune.Options(steps=4), "reconstruct": True}),
    "l2 chooses": Variant({"method": "l2"}),
    "not by MACs": Variant({"method": OBS(by_cost=False)}),
    "every layer alike": Variant({"scope": "uniform"}),
    "scales and shifts tuned": Variant(fit={"tune": 400}),
    "all weights trained": Variant(train=400),
}
RATE, BATCH = 1e-4, 8


class Job(NamedTuple):
    case: str
    variant: str
    ratio: float
    seed: int

    def __str__(self) -> str:
        return f"{self.case}, {self.ratio:g}, {self.variant}, seed {self.seed}"


def measured(job: Job, case: Trained, dense: float) -> Record:
    """The quality of the refitted network. ``dense``: that of the dense one."""
    variant = VARIANTS[job.variant]
    record = Record(str(job), {**job._asdict(), "unit": case.unit, "dense": dense})
    inputs = case.calibration(job.seed)
    if variant.share > 1:
        inputs = torch.cat([inputs, case.calibration(job.seed + 1000)])
    inputs = inputs[: max(2, round(variant.share * len(case.calibration(job.seed))))]
    begun = time.perf_counter()
    given: dict[str, Any] = {"method": "obs", "flops": job.ratio, "round_to": 1, "seed": job.seed, "progress": False}
    given |= variant.cut
    if given["method"] != "l2":
        given["data"] = inputs
    small = fxprune.prune(case.model, inputs[:1], **given)
    if not given.get("reconstruct"):
        small = fxprune.reconstruct(small, case.model, inputs, seed=job.seed, **variant.fit)
    if variant.train:
        train(small, case.model, inputs, variant.train, job.seed)
    record.seconds["all"] = round(time.perf_counter() - begun, 1)
    told = small.meta["fxprune"].reconstruction
    record.figures |= {"refitted": case.quality(small.eval()), "error": told.output_after, "samples": len(inputs)}
    return record


def train(small: nn.Module, dense: nn.Module, inputs: Tensor, steps: int, seed: int) -> None:
    """All weights, to the dense outputs on the same data: what closed form leaves to be had."""
    generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(small.parameters(), RATE)
    reference = copy.deepcopy(dense).eval()
    small.eval()  # norm statistics stay
    for _ in range(steps):
        batch = inputs[torch.randperm(len(inputs), generator=generator)[:BATCH]]
        with torch.no_grad():
            wanted = reference(batch)
        optimizer.zero_grad()
        F.mse_loss(small(batch), wanted).backward()
        optimizer.step()
