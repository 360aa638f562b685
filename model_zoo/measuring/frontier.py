"""Trained networks made faster in several ways: what each keeps of its accuracy, and its time on onnxruntime."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

import fxprune
from fxprune.deploy.runtime import CPU
from fxprune.deploy.stopwatch import Stopwatch
from fxprune.errors import BudgetError
from fxprune.recording.inputs import describe_inputs, resolve_inputs
from model_zoo.comparison import recalibrated
from model_zoo.measuring import reconstruction
from model_zoo.measuring.meter import spent
from model_zoo.measuring.reconstruction import PEER, cut
from model_zoo.records import Record, raised
from model_zoo.trained import Trained

DENSE = "dense"
BATCHES = (1, 8)
ROUNDS = 31  # of the dense and the other network in turn


class Series(NamedTuple):
    """A way to make a network faster. ``latency``: the budget is of milliseconds, else of MACs.

    ``depth``: residual branches may go; ``widths``: channels may.
    """

    round_to: int = 1
    latency: bool = False
    peer: bool = False
    depth: bool = False
    widths: bool = True


SERIES = {
    "MACs": Series(),
    "MACs, aligned": Series(round_to=8),
    "latency, aligned": Series(round_to=8, latency=True),
    "branches": Series(depth=True, widths=False),
    "branches and MACs, aligned": Series(round_to=8, depth=True),
    "branches and latency, aligned": Series(round_to=8, latency=True, depth=True),
    PEER: Series(peer=True),
    f"{PEER}, aligned": Series(round_to=8, peer=True),
}


class Job(NamedTuple):
    """``series``: of ``SERIES``, or the dense network, whose ``ratio`` is 1."""

    case: str
    series: str
    method: str
    ratio: float
    seed: int

    def __str__(self) -> str:
        how = [] if self.series == DENSE else [*([] if SERIES[self.series].peer else [self.method]), f"{self.ratio:g}"]
        return ", ".join([self.case, self.series, *how, f"seed {self.seed}"])


class Clocks:
    """A dense network on onnxruntime, one thread, and others beside it."""

    def __init__(self, case: Trained):
        inputs = case.calibration(0)[: max(BATCHES)]
        self.macs = fxprune.analyze(case.model, inputs[:1]).macs()
        self._watches = {}
        for batch in BATCHES:
            watch = Stopwatch(case.model, describe_inputs(*resolve_inputs(case.model, inputs[:batch])), CPU, threads=1)
            self._watches[str(batch)] = watch, watch.timer(case.model)

    def beside(self, network: nn.Module) -> dict[str, dict[str, float]]:
        """Milliseconds by batch size, of the dense network and of the other."""
        found: dict[str, dict[str, float]] = {"dense_ms": {}, "ms": {}}
        for batch, (watch, dense) in self._watches.items():
            for key, value in least({"dense_ms": dense, "ms": watch.timer(network)}).items():
                found[key][batch] = value
        return found


def least(timers: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of processor time, the least of several runs in turn."""
    found = [{name: 1000 * spent(timer)[1] for name, timer in timers.items()} for _ in range(rounds)]
    return {name: min(times[name] for times in found) for name in timers}


def _depth(series: Series) -> dict[str, Any]:
    """Keywords of ``fxprune.prune``."""
    options = {} if series.widths else {"options": fxprune.Options(max_ratio=0.0)}
    return {"depth": True, **options} if series.depth else {}


def measured(job: Job, case: Trained, clocks: Clocks) -> Record:
    """One network, cut, brought back without labels, and timed. The peer's has its norms measured anew."""
    record = Record(str(job), {**job._asdict(), "unit": case.unit})
    if job.series == DENSE:
        record.figures |= {"macs_ratio": 1.0, "quality": case.quality(case.model), **clocks.beside(case.model)}
        return record
    series, inputs = SERIES[job.series], case.calibration(job.seed)
    asked = reconstruction.Job(job.case, PEER if series.peer else job.method, job.ratio, job.seed)
    begun = time.perf_counter()
    try:
        small = cut(asked, case, inputs, series.round_to, series.latency, **_depth(series))
    except BudgetError as error:
        record.checks["budget"] = raised(error)
        return record
    except Exception as error:
        if not series.peer:
            raise
        record.checks["peer"] = raised(error)
        return record
    record.seconds["prune"] = round(time.perf_counter() - begun, 1)
    begun = time.perf_counter()
    if series.peer:
        small = recalibrated(small, [(batch, None) for batch in inputs.split(32)]).eval()
    else:
        small = fxprune.reconstruct(small, case.model, inputs, seed=job.seed)
    record.seconds["bring back"] = round(time.perf_counter() - begun, 1)
    if series.depth:
        told: Any = small.meta
        record.figures["removed"] = list(told["fxprune"].plan.removed)
    record.figures |= {
        "macs_ratio": fxprune.analyze(small, inputs[:1]).macs() / clocks.macs, "quality": case.quality(small),
        **clocks.beside(small),
    }  # fmt: skip
    return record
