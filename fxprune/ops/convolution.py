"""The channels under a kernel are contracted, inside their group; counted as MACs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.labels.classes import Ids, same
from fxprune.labels.contract import Operand, contract
from fxprune.labels.factors import Factor, Labels, expanded
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation
from fxprune.ops.call import Call
from fxprune.ops.meta import channels_last_of, empty, fits, is_plain
from fxprune.ops.refit import sliding
from fxprune.ops.repair import Repair, set_argument
from fxprune.ops.table import Shape, adder, argument, layer


def _convolution(run: Propagation, call: Call) -> Labels:
    x, weight, groups, transposed = call["input"], call["weight"], call["groups"], call["transposed"]
    across = _sliding(run, call)
    run.statistic("convolution", across)
    if across:
        return across
    apart = _apart(run, call)
    positions = [n for d, n in enumerate(x.shape if transposed else call.out.shape) if d > 1 and d not in apart]
    labels = convolve(run, x, weight, groups, math.prod(positions), transposed=transposed, apart=apart)
    return with_bias(run, call, labels, 1)


def with_bias(run: Propagation, call: Call, labels: Labels, dim: int) -> Labels:
    bias = call.get("bias")
    if bias is None:
        return labels
    shape = tuple(call.out.shape)
    sizes = tuple(shape[dim] if d == dim else 1 for d in range(len(shape)))
    spread = tuple([f.laid(f.ids.reshape(sizes), dim) for f in run.labels(bias)])
    return join_positions(run, [(shape, labels), (sizes, spread)], shape)


def _apart(run: Propagation, call: Call) -> tuple[int, ...]:
    """The dims with channels along which a kernel of size 1 takes every position by itself, as a linear layer does.

    That is how a mixer mixes tokens: ``x [N, tokens, C]``, to which the tokens are the channels.
    """
    x, weight = call["input"], call["weight"]
    cut = {f.dim for f in run.labels(x) if f.dim > 1 and f.varying == (f.dim,)}
    if not cut or call["groups"] > 1:
        return ()
    more = call["output_padding"] if call["transposed"] else [0] * len(call["padding"])
    one = zip(weight.shape[2:], call["stride"], call["padding"], more, strict=True)
    return tuple([d for d, numbers in enumerate(one, 2) if d in cut and numbers == (1, 1, 0, 0)])


def convolve(
    run: Propagation,
    x: Tensor,
    weight: Tensor,
    groups: int,
    positions: int,
    *,
    transposed: bool = False,
    apart: tuple[int, ...] = (),
) -> Labels:
    """The labels of what a convolution makes, without its bias; the MACs are noted.

    Args:
        run: the propagation.
        x: ``[N, C_in, *]``.
        weight: ``[C_out, C_in / groups, *]``, transposed ``[C_in, C_out / groups, *]``.
        groups: of channels.
        positions: where the kernel is laid: the output's, transposed the input's, without those along ``apart``.
        transposed: see ``weight``.
        apart: dims of ``x`` that are cut, and along which the kernel takes every position by itself.

    Returns:
        Labels of a tensor ``[N, C_out, *]``.
    """
    shape, shape_in = tuple(weight.shape), tuple(x.shape)
    spatial = range(2, len(shape))
    inputs = [
        f if f.varying == (f.dim,) and f.dim in apart else run.mix(f, spatial, "cut along a convolved dimension")
        for f in _cut_channels(run, x)
    ]
    weights, parameter, sources = [], run.parameter_dims(weight), run.usage.sources(weight)
    for factor in run.labels(weight):
        if factor.dim > 1 and min(factor.varying, default=2) > 1:
            if parameter is None and sources:
                run.consume(sources, [factor])
            run.fix(factor.ids, "kernel size")
        else:
            if factor.dim > 1:
                run.request_kernel(factor, shape[factor.dim])
            weights.append(run.collapse(factor, spatial))
    whole = (0, 1, *apart)
    places = "xyz"[: len(apart)]
    sizes = tuple([shape_in[d] for d in whole])
    channels_in = Operand(sizes, tuple([_flat(f, whole) for f in inputs if f is not None]), f"bi{places}")
    letters = "io" if transposed else "oi"
    flat = tuple([_flat(f) for f in weights])
    kernel_only = Operand(shape[:2], flat, letters, parameter, sources)
    with run.scaled(positions * math.prod(shape[2:])):
        if groups == 1:
            labels = contract(run, [channels_in, kernel_only], f"bo{places}")
        else:
            labels = _grouped(run, channels_in, kernel_only, groups, transposed)
    return tuple([_unflat(f, whole, len(shape)) for f in labels])


def _sliding(run: Propagation, call: Call) -> Labels:
    """The factors of an input that a kernel with one input and one output slides across, position by position.

    That is how efficient channel attention uses a 1-d convolution: what lies between two channels that stay goes, and
    they become neighbours.
    """
    x, weight, out = call["input"], call["weight"], call.out
    across = tuple([f for f in run.labels(x) if f.dim > 1 and f.varying == (f.dim,)])
    if not across:
        return ()
    same = all(s == 1 for s in call["stride"]) and all(out.shape[f.dim] == x.shape[f.dim] for f in across)
    if not same or weight.shape[:2] != (1, 1) or call["transposed"]:
        return ()
    for factor in run.labels(weight):
        run.fix(factor.ids, "kernel size")
    for factor in across:
        run.approximate(factor.ids, "convolution across channels")
    cut = {factor.dim for factor in across}
    run.term(float(weight.numel() * math.prod(n for d, n in enumerate(out.shape) if d not in cut)), across)
    return across


def _cut_channels(run: Propagation, x: Tensor) -> Labels:
    """A convolution's input is cut along dim 1 if it varies there, whatever a view before it suggested."""
    labels = run.labels(x)
    if any(f.dim == 1 for f in labels):
        return labels
    return tuple(Factor(f.ids, 1) if f.ids.shape[1] > 1 and f.dim > 1 else f for f in labels)


def _flat(factor: Factor, whole: Sequence[int] = (0, 1)) -> Factor:
    """Without the other trailing dimensions than ``whole``, along which it does not vary."""
    ids = factor.ids.reshape([factor.ids.shape[d] for d in whole])
    return factor.laid(ids, whole.index(factor.dim) if factor.dim in whole else 1)


def _unflat(factor: Factor, whole: Sequence[int], ndim: int) -> Factor:
    """The reverse, with ``ndim`` dims."""
    sizes = dict(zip(whole, factor.ids.shape, strict=True))
    return factor.laid(factor.ids.reshape([sizes.get(d, 1) for d in range(ndim)]), whole[factor.dim])


def _grouped(run: Propagation, x: Operand, weight: Operand, groups: int, transposed: bool) -> Labels:
    """A grouped convolution: ``groups`` contractions side by side, ``weight [O, I/g]``, transposed ``[I, O/g]``.

    Groups keep equal counts of inputs and of outputs. With one input or one output per group, whole groups live or
    die (depthwise convolution, with its multiplier).
    """
    first, second = weight.shape[0] // groups, weight.shape[1]
    per_in, per_out = (first, second) if transposed else (second, first)
    inputs = next((f for f in x.labels if f.dim == 1), None)
    outer = next((f for f in weight.labels if f.dim == 0), None)
    inner = next((f for f in weight.labels if f.dim == 1), None)
    in_ids = None if inputs is None else run.collapse(inputs, [0]).ids.reshape(-1)
    dim0 = None if outer is None else run.collapse(outer, [1]).ids.reshape(-1)
    if in_ids is None or dim0 is None or len(in_ids) != x.shape[1] or len(dim0) != weight.shape[0]:
        run.lock_all((*x.labels, *weight.labels), "grouped convolution with something that cannot be cut")
        run.term(float(x.shape[0]) * weight.shape[0] * weight.shape[1], ())
        return () if transposed or dim0 is None or len(dim0) == 1 else (Factor(dim0.reshape(1, -1), 1),)
    ins, rows = in_ids.reshape(groups, per_in), dim0.reshape(groups, first)
    whole = per_in == 1 or per_out == 1
    if whole and run.seeded:
        if transposed:
            whole = inner is None or inner.ids.shape[0] == 1
        else:
            whole = same(expanded(ins[:, :1], rows.shape), rows)
    if whole:
        outs = _whole_groups(run, ins, rows, inner, per_out, transposed)
        constant, factors = float(x.shape[0]) * second, [Factor(dim0.reshape(-1, 1), 0)]
    else:
        if weight.parameter is not None:
            name, order = weight.parameter
            run.consumed.add((name, order[0 if transposed else 1]))
        elif weight.sources and (read := outer if transposed else inner) is not None:
            run.consume(weight.sources, [read])
        local = _local(run, inner, groups, first, second)
        run.join(ins, rows if transposed else local)
        outs = local if transposed else rows
        run.family(ins, "groups of a convolution")
        run.family(outs, "groups of a convolution")
        constant, factors = float(x.shape[0]), [Factor(dim0.reshape(-1, 1), 0), Factor(local, 1)]
    run.term(constant, tuple(run.canonical(f) for f in factors))
    return (run.canonical(Factor(outs.reshape(1, -1), 1)),)


def _whole_groups(run: Propagation, ins: Ids, rows: Ids, inner: Factor | None, per_out: int, transposed: bool) -> Ids:
    """Join every group's inputs and outputs to one channel; the weight's dim 1 stays. Returns output ids."""
    if inner is not None and inner.ids.shape[1] > 1:
        run.lock(inner.ids, "inside the groups of a convolution")
    head = ins[:, :1]
    run.join(ins, head)
    run.join(rows, head)
    return expanded(head, (len(head), per_out)) if transposed else rows


def _local(run: Propagation, inner: Factor | None, groups: int, first: int, second: int) -> Ids:
    """The ids of the weight's dim 1, local to each group, as ``[groups, second]``."""
    if inner is None:
        ids = run.fresh(groups * second).reshape(groups, second)
        run.lock(ids, "a weight that cannot be cut")
        return ids
    if inner.ids.shape[0] == 1:  # not labelled per group yet: asked for, and until then equal offsets
        run.request_layout(inner.ids, groups)
        return expanded(inner.ids.reshape(1, second), (groups, second))
    rows = inner.ids.reshape(groups, first, second)
    run.join(rows, rows[:, :1])
    return rows[:, 0]


# -- repairs -----------------------------------------------------------------------------------------------------------


def _repair_op(repair: Repair, node: fx.Node) -> None:
    _repair_groups(repair, node, 8, transposed=bool(repair.value(argument(node, 6, "transposed", False))))


def _repair_function(repair: Repair, node: fx.Node) -> None:
    _repair_groups(repair, node, 6)


def _repair_transposed(repair: Repair, node: fx.Node) -> None:
    _repair_groups(repair, node, 6, transposed=True)


def _repair_groups(repair: Repair, node: fx.Node, place: int, *, transposed: bool = False) -> None:
    """Whole groups that went: ``groups``, at ``place``, follows the weight."""
    groups: Any = argument(node, place, "groups", 1)
    new = repair.groups(argument(node, 0, "input"), argument(node, 1, "weight"), groups, transposed=transposed)
    if new is not groups:
        set_argument(node, place, "groups", new)


# -- on meta tensors --------------------------------------------------------------------------------------------------


def _meta_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor | None:
    """``x [N, C_in, *]``, ``weight [C_out, C_in / groups, *]`` -> ``[N, C_out, *]``, contiguous."""
    count = x.ndim - 2
    if transposed or not is_plain(x) or not weight.is_meta or weight.dtype != x.dtype or weight.ndim != x.ndim:
        return None
    out, per_group, *kernel = weight.shape
    if x.shape[1] != per_group * groups or out % groups or not fits(bias, (out,), x):
        return None
    if not len(stride) == len(padding) == len(dilation) == count or min(*stride, *dilation) < 1 or min(padding) < 0:
        return None
    sizes = [
        (size + 2 * pad - step * (length - 1) - 1) // every + 1
        for size, pad, step, length, every in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    return empty((x.shape[0], out, *sizes), x) if min(sizes) > 0 else None


def _is_refused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> bool:
    """``x [N, C_in, *]``, ``weight [C_out, C_in / groups, *]`` or, transposed, ``[C_in, C_out / groups, *]``."""
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    out = weight.shape[1] * groups if transposed else weight.shape[0]
    fits = x.ndim == weight.ndim and x.shape[1] == channels and weight.shape[0] % groups == 0
    fits_bias = bias is None or tuple(bias.shape) == (out,)
    steps = zip(output_padding, stride, dilation, strict=False)
    return not fits or not fits_bias or (transposed and any(more >= max(s, d) for more, s, d in steps))


def _laid_out(result: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """The result with the strides that CPU kernels give it, which a later ``view`` may refuse."""
    layout = channels_last_of(x) or channels_last_of(weight)
    if layout is not None:
        return torch.empty(result.shape, dtype=result.dtype, device="meta", memory_format=layout)
    return result


# -- layers -----------------------------------------------------------------------------------------------------------


@layer(nn.modules.conv._ConvNd)
def _layer(module: nn.modules.conv._ConvNd, before: Shape, after: Shape) -> None:
    first, second = module.weight.shape[:2]
    per_in, per_out = module.in_channels // module.groups, module.out_channels // module.groups
    if module.groups > 1 and 1 in (per_in, per_out):  # whole groups went
        module.groups = first // (per_in if module.transposed else per_out)
    channels = (first, second * module.groups)
    module.in_channels, module.out_channels = channels if module.transposed else channels[::-1]


# -- the oracle's counterparts, which share no code with what is above ------------------------------------------------


def _masked(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    """Across channels: those that stay are neighbours."""
    x, *rest = args
    shape, kept = list(x.shape), {}
    for d in range(x.ndim):
        stays = on.any([e for e in range(x.ndim) if e != d])
        if not bool(stays.all()):
            kept[d] = stays.nonzero().reshape(-1)
            x = x.index_select(d, kept[d])
    result = func(x, *rest, **kwargs)
    for d, stays in reversed(kept.items()):
        whole = [shape[d] if e == d else n for e, n in enumerate(result.shape)]
        result = result.new_zeros(whole).index_copy(d, stays, result)
    return result


# -- the ops -----------------------------------------------------------------------------------------------------------

_op = adder(
    __name__,
    label=_convolution,
    mask=_masked,
    counted="convolution",
    repair=_repair_op,
    cost="counted where its labels are contracted",
    multiplies=("input", "weight"),
    refit=sliding("input", "weight", "bias"),
)

_op(
    "convolution", takes="floats of one kind", refuses=_is_refused, lays=_laid_out, meta={"default": _meta_convolution}
)  # fmt: skip
_op("_convolution", "convolution_overrideable")

# Made of ``convolution``; a recorded graph calls them.
_call = adder(__name__)
_call("conv1d", "conv2d", "conv3d", repair=_repair_function)
_call("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", repair=_repair_transposed)
