"""A network pruned, and all checks of the result."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

import fxprune
from fxprune.api import part_of
from fxprune.labels.records import Attention
from fxprune.recording.inputs import describe_inputs, make_inputs
from model_zoo.checks.case import CHECKS, Case, shapes_of
from model_zoo.checks.counts import outside_budget
from model_zoo.measuring.meter import peak_gib
from model_zoo.networks import example_inputs, load, split_part
from model_zoo.networks.random_weights import randomise
from model_zoo.records import Record, stage

MOST_REASONS = 3


def measure(
    spec: str,
    *,
    flops: float = 0.5,
    method: str = "l2",
    attention: Attention = "head_dim",
    size: Sequence[int] | None = None,
    onnx: bool = True,
) -> Record:
    """Prune the network that ``spec`` names and run every check on the result; never raises.

    Args:
        spec: see ``fxprune.io.specs.load_model``; ``SPEC@PART`` prunes a submodule.
        flops: the budget.
        method: by name.
        attention: see ``fxprune.prune``.
        size: shape of one input without the batch, where it is not the one that is inferred.
        onnx: also export, and run onnxruntime.
    """
    result = Record(spec)
    name, part = split_part(spec)
    with stage(result, "load"):
        torch.manual_seed(0)
        whole = load(name).eval()
        args, kwargs = example_inputs(whole, size)
        model = whole.get_submodule(part) if part else whole
        given: Any = part_of(whole, part, args, kwargs)[1] if part else (args, kwargs)
        inputs = describe_inputs(*given)
        randomise(model, inputs)
        state = copy.deepcopy(model.state_dict())  # with the versions of its modules
    if result.failures:
        return result
    with stage(result, "prune"):
        how: dict[str, Any] = {"method": method, "flops": flops, "attention": attention, "progress": False}
        if part:
            whole_pruned = fxprune.prune_submodule(whole, part, args, example_kwargs=kwargs, **how)
        else:
            whole_pruned = fxprune.prune(whole, args, example_kwargs=kwargs, **how)
        pruned: Any = whole_pruned.get_submodule(part)
        dense = fxprune.record(model, *make_inputs(inputs))
        case = Case(spec, flops, model, state, dense, pruned, inputs, result.figures)
        if part:
            case.whole, case.whole_pruned = whole, whole_pruned
        result.figures |= _figures_of(case.report)
    if result.failures:
        return result
    left_out = {name for name, wanted in (("onnx", onnx), ("whole", bool(part))) if not wanted}
    for name, function in CHECKS.items():
        if name in left_out:
            continue
        with stage(result, name):
            result.checks[name] = function(case)
    result.figures["memory_gib"] = round(peak_gib(), 2)
    return result


def measure_on_meta(spec: str, *, flops: float = 0.5, attention: Attention = "head_dim") -> Record:
    """Record, label, plan and rewrite without weights, with random scores; never raises."""
    result = Record(spec)
    with stage(result, "load"), torch.device("meta"):
        model = load(spec)
        args, kwargs = example_inputs(model)
    if result.failures:
        return result
    with stage(result, "prune"):
        pruned = fxprune.prune(
            model, args, example_kwargs=kwargs, method="random", flops=flops, attention=attention, progress=False
        )
        report: fxprune.Report = pruned.meta["fxprune"]
        counts = ("macs_before", "macs_after", "params_before", "params_after")
        result.figures |= _figures_of(report) | {name: getattr(report, name) for name in counts}
        result.figures["ratio"] = report.macs_after / report.macs_before
    if result.failures:
        return result
    with stage(result, "shapes"), torch.no_grad():
        before, after = (shapes_of(module.eval()(*args, **kwargs)) for module in (model, pruned))
        result.checks["shapes"] = "" if after == before else f"outputs {after} instead of {before}"
    result.checks["budget"] = outside_budget(result.figures["ratio"], flops)
    result.figures["memory_gib"] = round(peak_gib(), 2)
    return result


def halved(model: nn.Module, args: Any, kwargs: Any, figures: dict[str, Any]) -> fx.GraphModule:
    """Half of the MACs; the ratio and the oracle's error are put among the figures."""
    pruned = fxprune.prune(model, args, example_kwargs=kwargs, flops=0.5, method="l2", progress=False)
    report = pruned.meta["fxprune"]
    figures |= {"ratio": report.macs_after / report.macs_before, "oracle": report.oracle_error}
    return pruned


def _figures_of(report: fxprune.Report) -> dict[str, Any]:
    return {
        "stages": {stage: round(value, 2) for stage, value in report.seconds.items()},
        "notes": list(report.notes),
        "prunable_share": round(report.prunable_share, 4),
        "held": [f"{share:.1%}: {reason}" for reason, share in [*report.held.items()][:MOST_REASONS]],
    }
