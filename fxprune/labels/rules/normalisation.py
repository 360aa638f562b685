"""Normalisation layers. Per-channel statistics are exact; statistics over channels make a group approximate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fxprune.labels.factors import Labels
from fxprune.labels.rules.pointwise import join_positions
from fxprune.labels.rules.table import Call, rule

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation


def _affine(run: Propagation, x: Tensor, labels: Labels, parameters: list[Tensor | None], dim: int) -> Labels:
    """Join 1-D ``parameters`` with dimension ``dim`` of ``x``."""
    shape = tuple(x.shape)
    sizes = tuple([size if d == dim else 1 for d, size in enumerate(shape)])
    operands = [(shape, labels)]
    for parameter in parameters:
        if parameter is not None:
            operands.append((sizes, tuple([f.laid(f.ids.reshape(sizes), dim) for f in run.labels(parameter)])))
    return join_positions(run, operands, shape)


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "miopen_batch_norm",
)  # fmt: skip
def _batch_norm(run: Propagation, call: Call) -> list[Labels]:
    """``[N, C, *]``; trained statistics run over all other dims, which may hold a weight's input channels."""
    x = call["input"]
    labels = run.labels(x)
    if call.get("training"):
        over = tuple(f for f in labels if f.dim != 1 and f.ids.shape[f.dim] > 1)
        run.statistic("batch_norm", over)
        for factor in over:
            run.approximate(factor.ids, "statistics over input channels")
    scale = call.get("weight")
    run.note_norm_scale(scale)
    parameters = [scale, call.get("bias"), call.get("running_mean"), call.get("running_var")]
    return [_affine(run, x, labels, parameters, 1)] + [()] * (len(call.outputs) - 1)


@rule("native_layer_norm", "_fused_rms_norm", "_fused_layer_norm")
def _layer_norm(run: Propagation, call: Call) -> list[Labels]:
    x: Tensor = call["input"]
    count = len(call["normalized_shape"])
    dims = range(x.ndim - count, x.ndim)
    labels = run.labels(x)
    over = tuple(f for f in labels if f.dim in dims)
    name = "rms_norm" if "rms" in call.name else "layer_norm"
    run.statistic(name, over)
    for factor in over:
        run.approximate(factor.ids, f"{name} over channels")
    run.note_norm_scale(call.get("weight"))
    operands = [(tuple(x.shape), labels)]
    operands += [(tuple(p.shape), run.labels(p)) for p in (call.get("weight"), call.get("bias")) if p is not None]
    return [join_positions(run, operands, tuple(x.shape))] + [()] * (len(call.outputs) - 1)


@rule("native_group_norm")
def _group_norm(run: Propagation, call: Call) -> list[Labels]:
    x: Tensor = call["input"]
    groups, channels = call["group"], x.shape[1]
    labels = []
    for factor in run.labels(x):
        mixed = run.mix(factor, range(2, x.ndim), "group_norm over positions")
        if mixed is not None:
            labels.append(mixed)
    over = tuple(f for f in labels if f.dim == 1) if groups < channels else ()
    run.statistic("group_norm", over)
    for factor in over:
        run.approximate(factor.ids, "group_norm over channels")
        if groups > 1:
            rows = factor.rows()
            run.family(rows.reshape(rows.shape[0] * groups, channels // groups), "groups of group_norm")
    run.note_norm_scale(call.get("weight"))
    return [_affine(run, x, tuple(labels), [call.get("weight"), call.get("bias")], 1), (), ()]


@rule("_weight_norm_interface")
def _weight_norm(run: Propagation, call: Call) -> list[Labels]:
    """``v * g / ||v||``, the norm over every dimension but ``dim``."""
    v, g, dim = call["v"], call["g"], call["dim"] % call["v"].ndim
    over = tuple(f for f in run.labels(v) if f.dim != dim)
    run.statistic("weight_norm", over)
    for factor in over:
        run.approximate(factor.ids, "weight norm over input channels")
    operands = [(tuple(v.shape), run.labels(v)), (tuple(g.shape), run.labels(g))]
    return [join_positions(run, operands, tuple(v.shape)), ()]
