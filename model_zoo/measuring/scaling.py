"""Seconds of the stages of pruning a network, of a search, of an import; memory of ``consume=True``."""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from typing import Any, cast

import torch
from torch import nn

import fxprune
from fxprune import ChannelGraph
from fxprune.groups import analyse_graph
from fxprune.methods import Criterion, ModelState, resolve, score_groups
from fxprune.pipeline import Cut, Dense, Stages, choose, compress, recorded
from fxprune.selection.budget import Budget, select
from model_zoo.measuring.meter import machine_gib, peak_gib, spent
from model_zoo.networks import load
from model_zoo.networks.growing import perceptron

INTERPRETERS = 5


def stages(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Seconds of processor time of every stage, at half of the MACs; of a model on meta with random scores."""
    kwargs = kwargs or {}
    method: Any = resolve("random" if any(p.is_meta for p in model.parameters()) else "l2")
    options = Cut(Budget("flops", 0.5), verify=False)
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    (module, runs), figures["record"] = spent(lambda: recorded(model, args, kwargs))
    graph, figures["label"] = spent(lambda: analyse_graph(module, args, kwargs))
    scores, figures["score"] = spent(lambda: score_groups(method, _state(graph, module)))
    _, figures["select"] = spent(lambda: choose(graph, scores, options))
    dense = Dense(module, runs, graph, args, kwargs, type(model).__name__, Stages(progress=False))
    pruned, both = spent(lambda: compress(dense, scores, options, "l2"))
    report = pruned.meta["fxprune"]
    return figures | {
        "rewrite": both - figures["select"],
        "nodes": len(module.graph.nodes),
        "ratio": report.macs_after / report.macs_before,
    }


def search(ratio: str) -> dict[str, Any]:
    """Seconds of a search on ResNet-152; the first builds the cost model, the least of five others is given."""
    model = load("timm:resnet152")
    graph, method = fxprune.analyze(model), cast(Criterion, resolve("l2"))
    scores = score_groups(method, _state(graph, model))
    first, *others = (spent(lambda: select(graph, scores, Budget("flops", float(ratio))))[1] for _ in range(6))
    return {"first": first, "select": min(others)}


def consume(gib: str) -> dict[str, Any]:
    """The machine's memory, what the dense weights take, and the most that the process held while they were pruned."""
    model, given = perceptron(float(gib)).eval(), fxprune.Options(consume=True)
    found = {"weights_gib": _weights(model), "before_gib": peak_gib(), "machine_gib": machine_gib()}
    how: dict[str, Any] = {"params": 0.5, "round_to": 1, "verify": False, "progress": False, "options": given}
    pruned, seconds = spent(lambda: fxprune.prune(model, torch.zeros(1, 4096), **how))
    return {"s": seconds, "pruned_gib": _weights(pruned), **found}


def _weights(model: nn.Module) -> float:
    return sum(p.nbytes for p in model.parameters()) / 2**30


def imported(name: str) -> dict[str, Any]:
    """Seconds of a new interpreter, the median of several."""
    code = (
        f"import time, torch; begun = time.process_time(); import fxprune; {name}; print(time.process_time() - begun)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(INTERPRETERS)]
    return {"import": median(float(run.stdout) for run in runs)}


def _state(graph: ChannelGraph, module: nn.Module) -> ModelState:
    return ModelState(graph, dict([*module.named_parameters(), *module.named_buffers()]), 0)
