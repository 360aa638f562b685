"""A network pruned and saved in one process, and read, exported and run in another."""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fxprune
from fxprune.errors import ConversionError
from fxprune.recording.inputs import describe_inputs, make_inputs, tensors_of
from fxprune.verification import relative_error
from model_zoo.checks import ONNX_TOLERANCE, SAME, randomise
from model_zoo.networks import example_inputs, load
from model_zoo.records import Record, stage
from model_zoo.study import Options

NETWORKS = (
    *(
        f"timm:{name}"
        for name in """
        resnet50 resnext50_32x4d densenet121 efficientnet_b0 mobilenetv3_large_100 regnety_008 convnext_tiny
        vit_small_patch16_224 swin_tiny_patch4_window7_224 mobilevit_s
        """.split()
    ),
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:deeplabv3_resnet50",
)


OTHER_BATCH = 3
TIMEOUT = 1800  # seconds
LOADED = "loaded: tensors and outputs identical"


def measure(spec: str, options: Options) -> Record:
    """The whole way of one network; never raises."""
    record = Record(spec)
    with tempfile.TemporaryDirectory() as name:
        with stage(record, "prune and save"):
            _write(spec, Path(name), record.figures)
        if not record.failures:
            with stage(record, "new process"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    told = pool.apply_async(_read, (spec, Path(name), options.threads)).get(TIMEOUT)
                record.figures |= told.figures
                record.checks |= told.checks
                record.seconds |= told.seconds
    return record


def _write(spec: str, folder: Path, figures: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = load(spec).eval()
    args, kwargs = example_inputs(model)
    inputs = describe_inputs(args, kwargs)
    randomise(model, inputs)
    small = fxprune.prune(model, args, example_kwargs=kwargs, flops=0.5, method="l2", progress=False)
    report = small.meta["fxprune"]
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    small.eval()
    for suffix in ("safetensors", "pt2"):
        fxprune.save(small, folder / f"small.{suffix}")
        figures[f"{suffix}_mb"] = round((folder / f"small.{suffix}").stat().st_size / 1e6, 1)
    try:
        fxprune.into(model, small)
        figures["original_class"] = ""
    except ConversionError as error:
        figures["original_class"] = str(error)
    figures |= {"ratio": report.macs_after / report.macs_before, "oracle": report.oracle_error}
    args, kwargs = make_inputs(inputs, batch=OTHER_BATCH, seed=1)
    with torch.no_grad():
        expected = tensors_of(small(*args, **kwargs))
    torch.save({"inputs": (args, kwargs), "expected": expected, "state": small.state_dict()}, folder / "expected.pt")


def _read(spec: str, folder: Path, threads: int) -> Record:
    """What the new process does."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    record, small = Record(spec), None
    torch.manual_seed(1)
    model = load(spec).eval()
    given = torch.load(folder / "expected.pt", weights_only=True)
    (args, kwargs), expected = given["inputs"], given["expected"]

    def outputs(module: torch.nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            return tensors_of(module(*args, **kwargs))

    def same(found: Sequence[torch.Tensor]) -> bool:
        return len(found) == len(expected) and all(map(torch.equal, found, expected))

    with stage(record, LOADED):
        small = fxprune.load(folder / "small.safetensors", model).eval()
        state = small.state_dict()
        if list(state) != list(given["state"]) or not all(torch.equal(state[n], t) for n, t in given["state"].items()):
            raise AssertionError("a tensor differs")
        if not same(outputs(small)):
            raise AssertionError(f"outputs differ by {relative_error(outputs(small), expected):.1e}")
    with stage(record, "program"):
        found = outputs(fxprune.load(folder / "small.pt2"))
        record.figures["program"] = error = relative_error(found, expected)
        record.figures["program_identical"] = same(found)
        if error > SAME:
            raise AssertionError(f"outputs differ by {error:.1e}")
    if small is not None:
        with stage(record, "onnxruntime"):
            validation = fxprune.export(small, folder / "small.onnx")
            record.figures["onnx"], record.figures["provider"] = validation.max_rel_error, validation.provider
            if validation.max_rel_error > ONNX_TOLERANCE:
                raise AssertionError(f"outputs differ by {validation.max_rel_error:.1e}")
    return record
