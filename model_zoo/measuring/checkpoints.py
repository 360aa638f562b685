"""A trained network, pruned and refitted without labels, as a folder with a card that another process reads."""

from __future__ import annotations

import multiprocessing
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fxprune
from fxprune.deploy.runtime import CPU
from model_zoo.comparison import over
from model_zoo.measuring import reconstruction
from model_zoo.measuring.reconstruction import cut
from model_zoo.records import Record, stage
from model_zoo.trained import NETWORKS, Trained

CHECKPOINTS = {
    "resnet20": "CIFAR-10 test images, as JPEG",
    "resnet56": "CIFAR-10 test images, as JPEG",
    "vit": "CIFAR-10 test images, as JPEG",
    "efficientnet_lite0": "650 images of ImageNet that nothing was fitted to",
    "dncnn-set12": "Set12 with noise of 25/255",
    "vdsr-x2": "Set5 at twice its size",
    "minilm": "512 windows of PyTorch's documentation, beside the dense network",
}
"""A network of ``model_zoo/trained.py`` -> what its quality is measured on. One of those that share weights."""
LOADED = "loaded"
TIMEOUT = 3600.0  # seconds for the new process


class Job(NamedTuple):
    """``ratio``: of the MACs, at most."""

    case: str
    ratio: float

    def __str__(self) -> str:
        return f"{self.case}, {self.ratio:g}"

    @property
    def folder(self) -> str:
        return f"{self.case}-{self.ratio:g}"


class Fitting(NamedTuple):
    """``round_to``: a multiple for numbers of channels; ``tune``: steps after the refit; ``seed``: of the data."""

    round_to: int = 8
    tune: int = 0
    seed: int = 0


def command(job: Job, how: Fitting) -> str:
    """What makes the folder again, in a file of results that keeps what it has."""
    given = {key: value for key, value in how._asdict().items() if value != Fitting._field_defaults[key]}
    words = [str(job), *(word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value)))]
    return f"python -m model_zoo run checkpoints {shlex.join(words)} --data DIR --again"


def written(job: Job, how: Fitting, case: Trained, dense: float, folder: Path) -> Record:
    """Prune, refit, time and write. ``dense``: quality of the dense network."""
    data = CHECKPOINTS[job.case]
    asked = {"folder": job.folder, **job._asdict(), **how._asdict(), "command": command(job, how)}
    record = Record(str(job), {**asked, "data": data, "unit": case.unit, "dense": dense})
    inputs = case.calibration(how.seed)
    example = inputs[:1]
    with stage(record, "prune"):
        small = cut(reconstruction.Job(job.case, "obs", job.ratio, how.seed), case, inputs, how.round_to)
        small = fxprune.reconstruct(small, case.model, inputs, seed=how.seed, tune=how.tune)
    if record.failures:
        return record
    report, quality = small.meta["fxprune"], case.quality(small)
    record.figures |= {
        "quality": quality, "macs": [report.macs_before, report.macs_after],
        "params": [report.params_before, report.params_after], "macs_ratio": report.macs_after / report.macs_before,
        "oracle_error": report.oracle_error, "refit": report.reconstruction.summary,
    }  # fmt: skip
    record.checks["budget"] = over(record)
    with stage(record, "onnxruntime"), tempfile.TemporaryDirectory() as place:
        validation = fxprune.export(small, Path(place) / "model.onnx", example, provider=CPU)
        record.figures["onnx_error"] = validation.max_rel_error
        latency = fxprune.bench(case.model, small, example, provider=CPU, threads=1)
        record.figures["ms"] = [latency.dense_ms, latency.pruned_ms]
    if record.failures:
        return record
    with stage(record, "folder"):
        accuracy = {f"{data}, {case.unit}": (dense, quality)}
        folder.parent.mkdir(exist_ok=True)
        how_made = str(asked["command"])
        fxprune.save_pretrained(
            small, folder, accuracy=accuracy, latency=latency, validation=validation, command=how_made
        )
        weights = folder / "model.safetensors"
        record.figures["bytes"] = [sum(t.nbytes for t in _tensors(case.model.state_dict())), weights.stat().st_size]
    return record


def _tensors(state: dict[str, Tensor]) -> list[Tensor]:
    """Shared ones once."""
    return [*{tensor.data_ptr(): tensor for tensor in state.values()}.values()]


def loaded(record: Record, make: Callable[[Path], Trained], data: Path, folder: Path, threads: int) -> None:
    """Adds what a new process finds of the folder: the same quality, in an instance of other weights."""
    with stage(record, LOADED):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply_async(quality_of, (make, data, folder, threads)).get(TIMEOUT)
        record.figures["loaded"] = found
        if found != record.figures["quality"]:
            raise AssertionError(f"{found} instead of {record.figures['quality']}")


def quality_of(make: Callable[[Path], Trained], data: Path, folder: Path, threads: int) -> float:
    """Of the folder's network, loaded into an instance whose weights and buffers were drawn."""
    torch.set_num_threads(threads)
    case = make(data)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in case.model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return case.quality(fxprune.load_pretrained(folder, case.model).eval())


def make_of(job: Job) -> Callable[[Path], Trained]:
    return NETWORKS[job.case][0]
