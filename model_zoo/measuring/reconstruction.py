"""A trained network that is cut, and what comes back of its quality."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.deploy.runtime import CPU
from fxprune.errors import InputError
from model_zoo.comparison import over, recalibrated
from model_zoo.peers import torch_pruning
from model_zoo.records import Record
from model_zoo.trained import Trained

PEER = "Torch-Pruning"
METHODS = ("l2", "taylor", "obs", PEER)
QUALITIES = ("dense", "cut", "norms", "unseen", "refitted", "tuned")


class Job(NamedTuple):
    case: str
    method: str
    ratio: float
    seed: int

    def __str__(self) -> str:
        return f"{self.case}, {self.method}, {self.ratio:g}, seed {self.seed}"


def measured(job: Job, case: Trained, dense: float, steps: int) -> Record:
    """One cut, and what is made of it. ``dense``: quality of the dense network. ``steps``: of tuning."""
    record = Record(str(job), {**job._asdict(), "unit": case.unit, "dense": dense})
    inputs = case.calibration(job.seed)
    begun = time.perf_counter()
    try:
        small = cut(job, case, inputs)
    except Exception as error:
        if job.method != PEER:
            raise
        record.checks["peer"] = f"{type(error).__name__}: {error}"
        return record
    record.seconds["prune"] = round(time.perf_counter() - begun, 1)
    whole, left = (fxprune.analyze(network, inputs[:1]).macs() for network in (case.model, small))
    measure_norms = recalibrated(small, [(batch, None) for batch in inputs.split(32)]).eval()
    record.figures |= {
        "macs": left, "macs_ratio": left / whole, "cut": case.quality(small), "norms": case.quality(measure_norms)
    }  # fmt: skip
    record.checks["budget"] = over(record)
    if job.method == PEER:
        return record
    if job.method == "l2":
        with suppress(InputError):  # for want of batch norms
            record.figures["unseen"] = case.quality(fxprune.reconstruct(small, case.model, seed=job.seed))
    fitted = fxprune.reconstruct(small, case.model, inputs, seed=job.seed)
    told = fitted.meta["fxprune"].reconstruction
    record.seconds["reconstruct"] = round(told.seconds, 1)
    record.figures |= {
        "refitted": case.quality(fitted), "error": [told.output_before, told.output_after],
        "samples": told.samples, "held_out": told.held_out,
        "layers": [[layer.name, layer.before, layer.after, layer.ridge, layer.kept] for layer in told.layers],
    }  # fmt: skip
    if steps:
        tuned = fxprune.reconstruct(small, case.model, inputs, seed=job.seed, tune=steps)
        tuning = tuned.meta["fxprune"].reconstruction.tuning
        record.seconds["tune"] = round(tuning.seconds, 1)
        record.figures |= {"tuned": case.quality(tuned), "tuning": [tuning.steps, tuning.before, tuning.after]}
    return record


def cut(job: Job, case: Trained, inputs: Tensor, round_to: int = 1, latency: bool = False, **depth: Any) -> nn.Module:
    """By the method alone.

    ``inputs``: of the calibration. ``latency``: the ratio is of the time on onnxruntime, one image and one thread.
    ``depth``: keywords of ``fxprune.prune``.
    """
    if job.method == PEER:
        macs = int(job.ratio * fxprune.analyze(case.model, inputs[:1]).macs())
        how: dict[str, Any] = {"ignored": case.outputs, "round_to": round_to}
        return torch_pruning(case.model, inputs[:1], macs, "group_norm", **how).eval()
    given: dict[str, Any] = {"data": inputs} if job.method == "obs" else {}
    if job.method == "taylor":  # without labels: the dense outputs, with noise, as targets that have a gradient
        with torch.no_grad():
            wanted = torch.cat([case.model(batch) for batch in inputs.split(16)])
        wanted = wanted + wanted.std() * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(job.seed))
        given = {"data": list(zip(inputs.split(16), wanted.split(16), strict=True)), "loss_fn": F.mse_loss}
    budget = {"latency": fxprune.LatencyBudget(job.ratio, CPU, 1)} if latency else {"flops": job.ratio}
    options = {**budget, "round_to": round_to, "seed": job.seed, "progress": False, **given, **depth}
    return fxprune.prune(case.model, inputs[:1], method=job.method, **options)
