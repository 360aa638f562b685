"""The 24 networks on a GPU: pruned there, exported in float32 and float16, compared with torch on it, and timed.

Without a GPU that torch and onnxruntime both work on, the command says so, writes nothing, and ends with exit code 2.
A network with random weights is pruned to half its MACs on the GPU. Dense and pruned network are exported, and
onnxruntime's CUDA provider must give what torch gives on the same GPU. Then both are timed in turn at several batch
sizes, inputs and outputs on the device; a latency is the median of three medians.
"""

from __future__ import annotations

import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn

import fxprune
from fxprune.deploy.runtime import CUDA, Session
from fxprune.recording.inputs import describe_inputs, make_inputs, map_leaves, tensors_of
from model_zoo.checks.measured import halved
from model_zoo.measuring.gpu_check import Place, turn
from model_zoo.measuring.meter import in_turn
from model_zoo.networks import NETWORKS
from model_zoo.networks.random_weights import drawn
from model_zoo.pages.gpu_check import DTYPES, page
from model_zoo.records import Layout, Record, read, stage
from model_zoo.study import Add, Options, Study, each, passed

LAYOUT = Layout("networks")
ROUNDS, LEAST, SECONDS = 3, 10, 0.2  # rounds, and at least so many runs and seconds in each


def measured(spec: str, options: Options) -> Record:
    """One network, pruned, exported and checked, beside others; then timed, alone. Never raises."""
    place, record, networks = _place(options), Record(spec), dict[str, nn.Module]()
    with tempfile.TemporaryDirectory() as folder:
        files = {d: {kind: Path(folder) / f"{kind}-{d}.onnx" for kind in ("dense", "pruned")} for d in DTYPES}
        with turn(options.out):
            with stage(record, "prune"):
                networks = _networks(spec, place, record)
            for dtype in DTYPES:
                for kind, network in networks.items():
                    with stage(record, f"{kind} {dtype}"):
                        path, half = files[dtype][kind], dtype == "float16"
                        error = fxprune.export(network, path, provider=place.provider, half=half).max_rel_error
                        record.figures.setdefault("onnx", {}).setdefault(dtype, {})[kind] = error
            networks.clear()
        inputs = record.figures.pop("inputs", None)
        with turn(options.out, alone=True):
            for dtype, batch in product(DTYPES, options.batches):
                if all(record.checks.get(f"{kind} {dtype}", "not run") == "" for kind in files[dtype]):
                    with stage(record, f"latency {dtype} {batch}"):
                        found = _latencies(files[dtype], place, make_inputs(inputs, batch=batch), dtype)
                        record.figures.setdefault("latency_ms", {}).setdefault(dtype, {})[str(batch)] = found
    return record


def _networks(spec: str, place: Place, record: Record) -> dict[str, nn.Module]:
    """Dense and pruned, both as recorded graphs, on the device."""
    model, args, kwargs = drawn(spec)
    record.figures["inputs"] = describe_inputs(args, kwargs)
    model.to(place.device)
    args, kwargs = map_leaves(lambda v: v.to(place.device) if isinstance(v, torch.Tensor) else v, (args, kwargs))
    return {"dense": fxprune.record(model, args, kwargs), "pruned": halved(model, args, kwargs, record.figures)}


def _latencies(files: dict[str, Path], place: Place, inputs: object, dtype: str) -> dict[str, float]:
    """Milliseconds of both networks, in turn."""
    tensors = [t.to(getattr(torch, dtype)) if t.is_floating_point() else t for t in tensors_of(inputs)]
    sessions = {kind: Session(path, place.provider) for kind, path in files.items()}
    return in_turn({k: partial(s.latency_ms, tensors, SECONDS, LEAST) for k, s in sessions.items()}, ROUNDS)


def _place(options: Options) -> Place:
    return Place(options.device, options.provider)


def _options(add: Add) -> None:
    add("--batches", type=int, nargs="+", default=[1, 32, 128], help="batch sizes to time (1 32 128)")
    add("--device", default="cuda", help="of torch (default: cuda)")
    add("--provider", default=CUDA, help=f"of onnxruntime, on the same device (default: {CUDA})")


def _check(options: Options) -> str:
    place = _place(options)
    if reason := place.why_not():
        return f"nothing can be checked here, and nothing was written: {reason}"
    before = read(options.out, LAYOUT)[0] if options.resume and options.out.exists() else place.described()
    other = before["device"] != place.described()["device"]
    return f"{options.out} is of another device, {before['device']}; give another --out" if other else ""


STUDY = Study(
    "gpu_check", "the 24 on a GPU: onnxruntime against torch there, in float32 and float16, and latencies",
    lambda _: NETWORKS, each(measured), page, options=_options, needs=("a GPU",), doc=__doc__, check=_check,
    head=lambda options: _place(options).described(), finished=passed, open=True, strict=True, jobs=True,
    file="gpu.json", layout=LAYOUT,
)  # fmt: skip
