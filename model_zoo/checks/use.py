"""Use: in place of a part of a model, and exported to onnxruntime."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import fxprune
from fxprune.recording.inputs import make_inputs, tensors_of
from fxprune.verification import relative_error
from model_zoo.checks.case import Case, check

ONNX_TOLERANCE = 1e-3
ONNX_BATCH = 4  # neither the recorded one, nor the exported one, nor those that fxprune.export compares


@check("whole")
def _whole(case: Case) -> str:
    """The model that the part was taken from runs with the pruned one in its place, on one image and on others."""
    assert case.whole is not None
    assert case.whole_pruned is not None
    for seed, side in ((0, 320), (1, 256)):
        images = [torch.rand(3, side, side + 64 * i, generator=torch.Generator().manual_seed(seed)) for i in range(2)]
        with torch.no_grad():
            expected, found = ([sorted(each) for each in module(images)] for module in (case.whole, case.whole_pruned))
        if found != expected:
            return f"results {found} instead of {expected}"
    return ""


@check("onnx")
def _onnx(case: Case) -> str:
    """The exported file computes the same in onnxruntime, also with a batch that the export never saw."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        validation = fxprune.export(case.pruned, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        args, kwargs = make_inputs(case.inputs, batch=ONNX_BATCH, seed=3)
        feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors_of((args, kwargs)), strict=True)}
        found = [torch.as_tensor(output) for output in session.run(None, feeds)]
    error = relative_error(found, tensors_of(case.run(case.pruned, ONNX_BATCH, 3)))
    case.figures |= {
        "onnx": max(error, validation.max_rel_error),
        "opset": validation.opset,
        "onnx_latency_ms": round(validation.latency_ms, 2),
    }
    return "" if case.figures["onnx"] <= ONNX_TOLERANCE else f"relative error {case.figures['onnx']:.1e}"
