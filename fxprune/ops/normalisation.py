"""Per-channel statistics are exact; statistics over channels make a group approximate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.labels.factors import Labels
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation
from fxprune.ops.call import Call
from fxprune.ops.masks import normalised
from fxprune.ops.meta import channels_last_of, empty, fits, is_dense, is_plain, like
from fxprune.ops.refit import NOT_FOLLOWED, Affine, Statistics
from fxprune.ops.repair import Repair, set_argument
from fxprune.ops.table import Shape, adder, argument, layer


def _affine(run: Propagation, x: Tensor, labels: Labels, parameters: list[Tensor | None], dim: int) -> Labels:
    """Join 1-D ``parameters`` with dimension ``dim`` of ``x``."""
    shape = tuple(x.shape)
    sizes = tuple([size if d == dim else 1 for d, size in enumerate(shape)])
    operands = [(shape, labels)]
    for parameter in parameters:
        if parameter is not None:
            operands.append((sizes, tuple([f.laid(f.ids.reshape(sizes), dim) for f in run.labels(parameter)])))
    return join_positions(run, operands, shape)


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


def _weight_norm(run: Propagation, call: Call) -> list[Labels]:
    """``v * g / ||v||``, the norm over every dimension but ``dim``."""
    v, g, dim = call["v"], call["g"], call["dim"] % call["v"].ndim
    over = tuple(f for f in run.labels(v) if f.dim != dim)
    run.statistic("weight_norm", over)
    for factor in over:
        run.approximate(factor.ids, "weight norm over input channels")
    operands = [(tuple(v.shape), run.labels(v)), (tuple(g.shape), run.labels(g))]
    return [join_positions(run, operands, tuple(v.shape)), ()]


# -- repairs -----------------------------------------------------------------------------------------------------------


def _repair_layer_norm(repair: Repair, node: fx.Node) -> None:
    shape = argument(node, 1, "normalized_shape")
    after = repair.value(node.args[0]).shape
    count = len(repair.value(shape))
    set_argument(node, 1, "normalized_shape", repair.size_list(node, shape, after[len(after) - count :]))


def _repair_group_norm(repair: Repair, node: fx.Node) -> None:
    known = repair.dense(node.args[0])
    groups = argument(node, 1, "num_groups")
    if repair.is_cut(known, 1) and repair.dense(groups) == known.shape[1]:
        set_argument(node, 1, "num_groups", repair.value(node.args[0]).shape[1])
    else:
        set_argument(node, 1, "num_groups", repair.frozen(node, groups))


# -- on meta tensors --------------------------------------------------------------------------------------------------


def _meta_batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, ...] | None:
    """``x [N, C, *]`` -> the same, and two times ``[C]``."""
    if not is_plain(x) or x.ndim < 2 or not is_dense(x):
        return None
    shape = (x.shape[1],)
    if not all(fits(t, shape, x) for t in (weight, bias, mean, var)):
        return None
    return like(x), empty(shape, x), empty(shape, x)


def _meta_layer_norm(
    x: Tensor, normalized: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[Tensor, ...] | None:
    """``x [*, normalized]`` -> the same, contiguous, and two times ``[*, 1 ...]``."""
    count, shape = len(normalized), tuple(normalized)
    if not is_plain(x) or not count or tuple(x.shape[x.ndim - count :]) != shape:
        return None
    if not all(fits(t, shape, x) for t in (weight, bias)):
        return None
    outer = (*x.shape[: x.ndim - count], *[1] * count)
    return empty(tuple(x.shape), x), empty(outer, x), empty(outer, x)


def _meta_group_norm(
    x: Tensor, weight: Any, bias: Any, batch: int, channels: int, positions: int, groups: int, eps: float
) -> tuple[Tensor, ...] | None:
    """``x [N, C, *]`` -> the same, contiguous, and two times ``[N, groups]``."""
    if not is_plain(x) or x.ndim < 2 or tuple(x.shape[:2]) != (batch, channels) or channels % groups:
        return None
    if x.numel() != batch * channels * positions or not all(fits(t, (channels,), x) for t in (weight, bias)):
        return None
    return empty(tuple(x.shape), x), empty((batch, groups), x), empty((batch, groups), x)


def _laid_out(result: tuple[Tensor, ...], x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """The result with the strides that CPU kernels give it: channels last where ``x`` lies so, else first."""
    if not is_dense(x):
        return result
    first, *others = result
    layout = channels_last_of(x) or torch.contiguous_format
    return torch.empty(first.shape, dtype=first.dtype, device="meta", memory_format=layout), *others


# -- layers -----------------------------------------------------------------------------------------------------------


@layer(nn.modules.batchnorm._NormBase)
def _batch_norm_layer(module: nn.modules.batchnorm._NormBase, before: Shape, after: Shape) -> None:
    channels = {t.shape[0] for t in (module.weight, module.bias, module.running_mean) if t is not None}
    module.num_features = channels.pop() if channels else after[1]


@layer(nn.LayerNorm, nn.RMSNorm)
def _layer_norm_layer(module: Any, before: Shape, after: Shape) -> None:
    shape = after[len(after) - len(module.normalized_shape) :] if module.weight is None else module.weight.shape
    module.normalized_shape = tuple(shape)


@layer(nn.GroupNorm)
def _group_norm_layer(module: nn.GroupNorm, before: Shape, after: Shape) -> None:
    channels = after[1] if module.weight is None else module.weight.shape[0]
    if module.num_groups == module.num_channels:
        module.num_groups = channels
    module.num_channels = channels


# -- the oracle's counterparts, which share no code with what is above ------------------------------------------------


def _masked_layer_norm(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    x, shape, weight, bias, eps = args
    dims = list(range(x.ndim - len(shape), x.ndim))
    out, mean, rstd = normalised(x, on, dims, eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, rstd


def _masked_rms_norm(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    x, shape, weight, eps = args
    dims = list(range(x.ndim - len(shape), x.ndim))
    out, _, rstd = normalised(x, on, dims, torch.finfo(x.dtype).eps if eps is None else eps, centre=False)
    return out if weight is None else out * weight, rstd


def _masked_group_norm(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    x, weight, bias, _, _, _, groups, eps = args
    split = (x.shape[0], groups, -1)
    out, mean, rstd = normalised(x.reshape(split), on.reshape(split), [2], eps)
    shape = [1, -1] + [1] * (x.ndim - 2)
    out = out.reshape(x.shape)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape), mean, rstd


def _masked_batch_norm(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    x, weight, bias = args[:3]
    eps = args[-1] if isinstance(args[-1], float) else args[-2]
    dims = [d for d in range(x.ndim) if d != 1]
    out, mean, rstd = normalised(x, on, dims, eps)
    shape = [1, -1] + [1] * (x.ndim - 2)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape), mean.flatten(), rstd.flatten()


def _masked_weight_norm(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    v, g, *rest = args
    dim = rest[0] if rest else kwargs.get("dim", 0)
    v = v.masked_fill(~on, 0)
    return func(v, g, dim)


# -- the ops -----------------------------------------------------------------------------------------------------------

_SIZES = "a recorded graph calls the function above it"
_op = adder(__name__, refit=Affine())
_batch = adder(__name__, label=_batch_norm, mask=_masked_batch_norm, counted="batch_norm", refit=Statistics())

_batch("native_batch_norm", takes="floats of one kind", lays=_laid_out, meta={"default": _meta_batch_norm})
_batch("_native_batch_norm_legit_no_training", takes="floats of one kind", lays=_laid_out)
_batch("_native_batch_norm_legit", "_batch_norm_with_update")
_batch("cudnn_batch_norm", "miopen_batch_norm", refit=Statistics(eps="epsilon"))
_op(
    "native_layer_norm", label=_layer_norm, mask=_masked_layer_norm, counted="layer_norm", takes="floats of one kind",
    repair=_SIZES, meta={"default": _meta_layer_norm},
)  # fmt: skip
_op(
    "_fused_rms_norm", label=_layer_norm, mask=_masked_rms_norm, counted="rms_norm", takes="floats of one kind",
    repair=_SIZES, refit=Affine(("weight",)),
)  # fmt: skip
_op(
    "native_group_norm", label=_group_norm, mask=_masked_group_norm, counted="group_norm", repair=_SIZES,
    takes="floats of one kind", lays=_laid_out, meta={"default": _meta_group_norm},
)  # fmt: skip
_op("_weight_norm_interface", label=_weight_norm, mask=_masked_weight_norm, counted="weight_norm", refit=NOT_FOLLOWED)

# Made of these; a recorded graph calls them.
_call = adder(__name__)
_call("layer_norm", "rms_norm", repair=_repair_layer_norm)
_call("group_norm", repair=_repair_group_norm)
