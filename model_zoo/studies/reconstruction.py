"""Pruned networks refitted without labels: what comes back of the dense network's quality.

The networks are those of ``model_zoo/trained.py``, and ``--data`` is the folder that is told of there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from model_zoo.comparison import over, recalibrated
from model_zoo.peers import is_here, torch_pruning
from model_zoo.records import Record, Results, mean_and_deviation, table
from model_zoo.study import Add, Measure, Options, Study
from model_zoo.trained import NETWORKS, Trained

PEER = "Torch-Pruning"
METHODS = ("l2", "taylor", "obs", PEER)
QUALITIES = ("dense", "cut", "norms", "unseen", "refitted", "tuned")
COLUMNS = ("dense", "cut", "norm statistics", "refitted without data", "refitted", "tuned", "seconds")
NOTE = (
    "Calibration data are unlabelled, a fifth of them held out; a number is the mean over the seeds of calibration "
    "data, with the standard deviation where there are several. *cut*: as the method leaves it; *norm statistics*: "
    "batch norms measured anew on the data, and nothing else; *refitted*: fxprune.reconstruct, where nothing is "
    "trained, on the data and, of l2, which needs none, without; *tuned*: scales, shifts and biases trained afterwards "
    "on the same data (tune=). Torch-Pruning: group norm, global, at the same MACs; empty where its network fails. "
    "Without data the refit needs batch norms."
)
COLOURS = {"l2": "#0b62b5", "taylor": "#c2570c", "obs": "#1a7f37", PEER: "#888888"}


class Job(NamedTuple):
    case: str
    method: str
    ratio: float
    seed: int

    def __str__(self) -> str:
        return f"{self.case}, {self.method}, {self.ratio:g}, seed {self.seed}"


def jobs(options: Options) -> list[Job]:
    """One seed of all, then the next."""
    return [
        Job(name, method, ratio, seed)
        for seed in options.seeds
        for name in options.case
        for ratio in options.ratio or NETWORKS[name][1]
        for method in options.method
    ]


def worker(options: Options) -> Measure:
    @lru_cache(maxsize=1)
    def made(name: str) -> tuple[Trained, float]:
        case = NETWORKS[name][0](options.data)
        return case, case.quality(case.model)

    return lambda job: measured(job, *made(job.case), options.tune)


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


def cut(job: Job, case: Trained, inputs: Tensor) -> nn.Module:
    """By the method alone. ``inputs``: of the calibration."""
    if job.method == PEER:
        macs = int(job.ratio * fxprune.analyze(case.model, inputs[:1]).macs())
        return torch_pruning(case.model, inputs[:1], macs, "group_norm", ignored=case.outputs).eval()
    given: dict[str, Any] = {"data": inputs} if job.method == "obs" else {}
    if job.method == "taylor":  # without labels: the dense outputs, with noise, as targets that have a gradient
        with torch.no_grad():
            wanted = torch.cat([case.model(batch) for batch in inputs.split(16)])
        wanted = wanted + wanted.std() * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(job.seed))
        given = {"data": list(zip(inputs.split(16), wanted.split(16), strict=True)), "loss_fn": F.mse_loss}
    options = {"flops": job.ratio, "round_to": 1, "seed": job.seed, "progress": False, **given}
    return fxprune.prune(case.model, inputs[:1], method=job.method, **options)


# -- the page and the plot ---------------------------------------------------------------------------------------------


def page(results: Results) -> Sequence[str]:
    known, rows = _known(results), []
    groups = list(dict.fromkeys((f["case"], f["ratio"], f["method"]) for f in known))
    for case, ratio, method in sorted(groups, key=lambda g: (list(NETWORKS).index(g[0]), -g[1], METHODS.index(g[2]))):
        alike = [f for f in known if (f["case"], f["ratio"], f["method"]) == (case, ratio, method)]
        seen = [[f[key] for f in alike if key in f] for key in (*QUALITIES, "s")]
        cells = [mean_and_deviation(values) if values else "" for values in seen]
        rows.append([f"{case}, {alike[0]['unit']}", f"{ratio:g}", method, *cells])
    columns = {"case": "---", "MACs": "---:", "method": "---", **dict.fromkeys(COLUMNS, "---:")}
    return [NOTE, table(columns, rows), results.image("quality by MACs")]


def _known(results: Results) -> list[dict[str, Any]]:
    return [record.figures | {"s": sum(record.seconds.values())} for record in results.lines if record.figures]


def plot(results: Results) -> None:
    from matplotlib.figure import Figure

    known = _known(results)
    cases = [case for case in NETWORKS if any(f["case"] == case for f in known)]
    figure = Figure((4.2 * len(cases), 3.4), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        own = [f for f in known if f["case"] == case]
        axes.axhline(own[0]["dense"], color="#888888", linewidth=1, label="dense")
        for method in METHODS:
            for key, style in (("norms", ":"), ("unseen", "--"), ("refitted", "-")):
                found = [f for f in own if f["method"] == method and key in f]
                points = sorted({f["ratio"] for f in found})
                values = [statistics.fmean(f[key] for f in found if f["ratio"] == p) for p in points]
                if points:
                    label = f"{method}, {key}"
                    axes.plot(points, values, style, marker="o", markersize=3, label=label, color=COLOURS[method])
        axes.set_title(f"{case}, {own[0]['unit']}")
        axes.set_xlabel("MACs that stay")
        axes.legend(fontsize=6)
    figure.savefig(results.plot, dpi=110)


def told(record: Record) -> str:
    found = ", ".join(f"{key} {record.figures[key]:.2f}" for key in QUALITIES if key in record.figures)
    return f"{record.name}: {found} {record.figures['unit']}, {sum(record.seconds.values()):.0f} s"


def options(add: Add) -> None:
    here = [method for method in METHODS if method != PEER or is_here()]
    add("--data", type=Path, metavar="DIR", help="the folder")
    add("--case", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    add("--method", nargs="+", choices=METHODS, default=here, help=f"{PEER} only where it is installed")
    add("--ratio", nargs="+", type=float, help="instead of the case's own")
    add("--tune", type=int, default=400, metavar="N", help="steps of tuning after the refit; 0: none")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of calibration data")


STUDY = Study(
    "reconstruction", "what refitting a pruned network gives back, on real images and trained weights, without labels",
    jobs, worker, page, plot, options, needs=("--data DIR: images and weights",), doc=__doc__,
    check=lambda options: "" if options.data else "give --data DIR, with images and weights", told=told, jobs=True,
)  # fmt: skip
