"""onnxruntime against torch on a GPU, and latencies of both."""

from __future__ import annotations

import fcntl
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxprune
from fxprune.deploy.runtime import CUDA, Session
from fxprune.errors import FxpruneError
from fxprune.recording.inputs import describe_inputs, make_inputs, map_leaves, tensors_of
from model_zoo.checks import randomise
from model_zoo.networks import example_inputs, load
from model_zoo.records import Record, stage
from model_zoo.study import Options

BATCHES = (1, 32, 128)
DTYPES = ("float32", "float16")
KINDS = ("dense", "pruned")
ROUNDS, LEAST, SECONDS = 3, 10, 0.2  # rounds, and at least so many runs and seconds in each


@dataclass(frozen=True)
class Place:
    """Where to check. ``device``: of torch; ``provider``: of onnxruntime, on the same device."""

    device: str = "cuda"
    provider: str = CUDA

    def why_not(self) -> str:
        """Why nothing can be checked here, or ""."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA device"
        try:
            with tempfile.TemporaryDirectory() as folder:
                given = torch.randn(1, 4, device=self.device)
                fxprune.export(nn.Linear(4, 4).to(self.device), Path(folder) / "a.onnx", given, provider=self.provider)
        except FxpruneError as error:
            return str(error)
        return ""

    def described(self) -> dict[str, str]:
        """The device, by the name that its maker gave it."""
        if self.device != "cuda":
            return {"device": self.device, "provider": self.provider}
        return {"device": torch.cuda.get_device_name(), "provider": self.provider, "cuda": str(torch.version.cuda)}


def measured(spec: str, options: Options) -> Record:
    """One network, pruned, exported and checked, beside others; then timed, alone. Never raises."""
    place, record = place_of(options), Record(spec)
    with tempfile.TemporaryDirectory() as name:
        folder, networks = Path(name), dict[str, nn.Module]()
        with _turn(options.out, fcntl.LOCK_SH):
            with stage(record, "prune"):
                networks = _networks(spec, place, record)
            for dtype in DTYPES:
                for kind, network in networks.items():
                    with stage(record, f"{kind} {dtype}"):
                        found = fxprune.export(
                            network, _file(folder, kind, dtype), provider=place.provider, half=dtype == "float16"
                        )
                        record.figures.setdefault("onnx", {}).setdefault(dtype, {})[kind] = found.max_rel_error
            networks.clear()
        inputs = record.figures.pop("inputs", None)
        with _turn(options.out, fcntl.LOCK_EX):
            for dtype in DTYPES:
                if all(record.checks.get(f"{kind} {dtype}", "not run") == "" for kind in KINDS):
                    for batch in options.batches:
                        with stage(record, f"latency {dtype} {batch}"):
                            _time(folder, place, inputs, batch, dtype, record)
    return record


@contextmanager
def _turn(out: Path, kind: int) -> Iterator[None]:
    """With those who share, or alone, among all processes with this result file."""
    with Path(tempfile.gettempdir(), f"{out.resolve().as_posix().replace('/', '-')}.lock").open("w") as file:
        fcntl.flock(file, kind)
        yield


def _networks(spec: str, place: Place, record: Record) -> dict[str, nn.Module]:
    """Dense and pruned, both as recorded graphs, on the device."""
    torch.manual_seed(0)
    model = load(spec).eval()
    args, kwargs = example_inputs(model)
    inputs = record.figures["inputs"] = describe_inputs(args, kwargs)
    randomise(model, inputs)
    model.to(place.device)
    args, kwargs = map_leaves(lambda v: v.to(place.device) if isinstance(v, torch.Tensor) else v, (args, kwargs))
    dense = fxprune.record(model, args, kwargs)
    small = fxprune.prune(model, args, example_kwargs=kwargs, flops=0.5, method="l2", progress=False)
    report = small.meta["fxprune"]
    record.figures |= {"ratio": report.macs_after / report.macs_before, "oracle": report.oracle_error}
    return {"dense": dense, "pruned": small}


def _file(folder: Path, kind: str, dtype: str) -> Path:
    return folder / f"{kind}-{dtype}.onnx"


def _time(folder: Path, place: Place, inputs: Any, batch: int, dtype: str, record: Record) -> None:
    """Both networks in turn."""
    sessions = {kind: Session(_file(folder, kind, dtype), place.provider) for kind in KINDS}
    tensors = tensors_of(make_inputs(inputs, batch=batch))
    tensors = [t.to(getattr(torch, dtype)) if t.is_floating_point() else t for t in tensors]
    times: dict[str, list[float]] = {kind: [] for kind in sessions}
    for _ in range(ROUNDS):
        for kind, session in sessions.items():
            times[kind].append(session.latency_ms(tensors, SECONDS, least=LEAST))
    latencies = record.figures.setdefault("latency_ms", {}).setdefault(dtype, {})
    latencies[str(batch)] = {kind: round(statistics.median(found), 4) for kind, found in times.items()}


def place_of(options: Options) -> Place:
    return Place(options.device, options.provider)
