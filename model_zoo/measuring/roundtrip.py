"""A pruned network saved, and loaded in a new process into an instance with other weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ConversionError
from fxprune.recording.inputs import describe_inputs, make_inputs, tensors_of
from fxprune.verification import relative_error
from model_zoo.checks.case import SAME, equal
from model_zoo.checks.measured import halved
from model_zoo.checks.use import ONNX_TOLERANCE
from model_zoo.networks import load
from model_zoo.networks.random_weights import drawn
from model_zoo.networks.subject import Inputs
from model_zoo.pages.roundtrip import LOADED
from model_zoo.records import Record, stage

OTHER_BATCH = 3


def write(spec: str, folder: Path, record: Record) -> None:
    """Prunes a network, changes its weights as fine-tuning would, and saves it; what it gives is written beside."""
    model, args, kwargs = drawn(spec)
    small = halved(model, args, kwargs, record.figures)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    small.eval()
    for suffix in ("safetensors", "pt2"):
        fxprune.save(small, folder / f"small.{suffix}")
        record.figures[f"{suffix}_mb"] = round((folder / f"small.{suffix}").stat().st_size / 1e6, 1)
    try:
        fxprune.into(model, small)
        record.figures["original_class"] = ""
    except ConversionError as error:
        record.figures["original_class"] = str(error)
    inputs = make_inputs(describe_inputs(args, kwargs), batch=OTHER_BATCH, seed=1)
    torch.save((inputs, _outputs(small, inputs), small.state_dict()), folder / "expected.pt")


def read(spec: str, folder: Path, threads: int) -> Record:
    """Loads it in a new process, with the class and without, and exports it; all of them must give the same."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    record, small = Record(spec), None
    torch.manual_seed(1)
    model = load(spec).eval()
    inputs, expected, state = torch.load(folder / "expected.pt", weights_only=True)
    with stage(record, LOADED):
        small = fxprune.load(folder / "small.safetensors", model).eval()
        found = small.state_dict()
        if [*found] != [*state] or not equal([*found.values()], [*state.values()]):
            raise AssertionError("a tensor differs")
        outputs = _outputs(small, inputs)
        if not equal(outputs, expected):
            raise AssertionError(_apart(relative_error(outputs, expected)))
    with stage(record, "program"):
        outputs = _outputs(fxprune.load(folder / "small.pt2"), inputs)
        record.figures["program"] = error = relative_error(outputs, expected)
        record.figures["program_identical"] = equal(outputs, expected)
        if error > SAME:
            raise AssertionError(_apart(error))
    if small is not None:
        with stage(record, "onnxruntime"):
            validation = fxprune.export(small, folder / "small.onnx")
            record.figures["onnx"], record.figures["provider"] = validation.max_rel_error, validation.provider
            if validation.max_rel_error > ONNX_TOLERANCE:
                raise AssertionError(_apart(validation.max_rel_error))
    return record


def _apart(error: float) -> str:
    return f"outputs differ by {error:.1e}"


def _outputs(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(module(*inputs[0], **inputs[1]))
