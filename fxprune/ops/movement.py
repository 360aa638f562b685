"""The very same op is applied to the label tensors, along the dimensions where they vary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor, fx

from fxprune.labels.classes import Ids, same
from fxprune.labels.factors import Factor, Labels, aligned, along, expanded, moved, narrow, vector, viewed, without
from fxprune.labels.propagation import Propagation
from fxprune.ops.call import Call
from fxprune.ops.refit import NOT_FOLLOWED, Followed
from fxprune.ops.repair import LEFT_ALONE, Repair, set_argument, shape_after_self
from fxprune.ops.table import adder, argument


def _same(run: Propagation, call: Call) -> Labels:
    return run.labels(call.input)


def _view(run: Propagation, call: Call) -> Labels:
    result = []
    for factor in run.labels(call.input):
        after, interleaved = viewed(factor, call.input.shape, call.out.shape)
        if interleaved:
            run.interleave(factor)
        result.append(after)
    return tuple(result)


def _permute(run: Propagation, call: Call) -> Labels:
    order = list(range(call.input.ndim))
    if call.name == "permute":
        order = call.dims("dims")
    elif call.name == "transpose":
        a, b = call["dim0"] % len(order), call["dim1"] % len(order)
        order[a], order[b] = b, a
    else:
        order.reverse()
    return tuple(moved(f, order) for f in run.labels(call.input))


def _unsqueeze(run: Propagation, call: Call) -> Labels:
    dim = call["dim"] % call.out.ndim
    return tuple(_with_dim(f, dim) for f in run.labels(call.input))


def _with_dim(factor: Factor, dim: int) -> Factor:
    """The factor of a tensor that got a dimension of size 1 at ``dim``."""
    return factor.laid(np.expand_dims(factor.ids, dim), factor.dim + (factor.dim >= dim))


def _squeeze(run: Propagation, call: Call) -> Labels:
    gone = [d for d in call.dims() if call.input.shape[d] == 1]
    return tuple(without(f, gone) for f in run.labels(call.input))


def _fresh_along(run: Propagation, tensor: Tensor, dims: Sequence[int]) -> Labels:
    return tuple(Factor(vector(run.fresh(tensor.shape[d]), d, tensor.ndim), d) for d in dims)


def _expand(run: Propagation, call: Call) -> Labels:
    """Copies along a dimension of size 1 constrain nothing: their number adapts to what they meet."""
    out, extra = call.out, call.out.ndim - call.input.ndim
    before = [1] * extra + list(call.input.shape)
    grown = [d for d, size in enumerate(out.shape) if size > 1 and before[d] == 1]
    return tuple(aligned(f, out.ndim) for f in run.labels(call.input)) + _fresh_along(run, out, grown)


def _repeat(run: Propagation, call: Call) -> Labels:
    repeats, out = call["repeats"], call.out
    before = [1] * (out.ndim - call.input.ndim) + list(call.input.shape)
    result = []
    for factor in run.labels(call.input):
        lifted = aligned(factor, out.ndim)
        counts = [r if size > 1 else 1 for r, size in zip(repeats, lifted.ids.shape, strict=True)]
        result.append(Factor(np.tile(lifted.ids, counts), lifted.dim))
    grown = [d for d, size in enumerate(out.shape) if size > 1 and before[d] == 1]
    return tuple(result) + _fresh_along(run, out, grown)


def _flip(run: Propagation, call: Call) -> Labels:
    factors = run.labels(call.input)
    for dim in call.dims("dims"):
        factors = tuple(along(f, dim, lambda ids: np.flip(ids, dim)) for f in factors)  # noqa: B023
    return factors


def _roll(run: Propagation, call: Call) -> Labels:
    if call["dims"] == []:
        run.lock_all(run.labels(call.input), "roll of a flattened tensor")
        return ()
    result = []
    for factor in run.labels(call.input):
        ids = factor.ids
        for shift, dim in zip(call["shifts"], call.dims("dims"), strict=True):
            if ids.shape[dim] > 1:
                if dim == factor.dim:
                    run.lock(ids, "channels are rolled by a fixed number")
                ids = np.roll(ids, shift, dim)
        result.append(Factor(ids, factor.dim))
    return tuple(result)


def _rot90(run: Propagation, call: Call) -> Labels:
    """A flip and, of an odd number of quarters, a transpose of the two dims."""
    turns, (a, b), result = call["k"] % 4, call.dims("dims"), []
    order = list(range(call.input.ndim))
    if turns % 2:
        order[a], order[b] = b, a
    for factor in run.labels(call.input):
        ids = np.rot90(factor.ids, turns, (a, b))
        result.append(factor.laid(ids, order[factor.dim]))
    return tuple(result)


def _concatenate(run: Propagation, call: Call) -> Labels:
    tensors: list[Tensor] = [t for t in call["tensors"] if t.numel()]
    dim = call["dim"] % call.out.ndim
    labels = [run.labels(t) for t in tensors]
    shapes = [tuple(t.shape) for t in tensors]
    if call.name == "stack":
        labels = [tuple(_with_dim(f, dim) for f in factors) for factors in labels]
        shapes = [(*s[:dim], 1, *s[dim:]) for s in shapes]
    cuts = sorted({f.dim for factors in labels for f in factors})
    joined = (_concatenated(run, shapes, labels, dim, cut) for cut in cuts)
    return tuple(factor for factor in joined if factor is not None)


def _concatenated(run: Propagation, shapes: list[tuple[int, ...]], labels: list[Labels], dim: int, cut: int) -> Factor:
    pieces: list[Ids] = []
    found = [[f for f in factors if f.dim == cut] for factors in labels]
    for shape, factors in zip(shapes, found, strict=True):
        if factors:
            pieces.append(factors[0].ids)
        else:
            ids = run.fresh(shape[cut])
            run.lock(ids, "concatenated with something that cannot be cut")
            pieces.append(vector(ids, cut, len(shape)))
    if dim != cut and not all(found):  # side by side with something that cannot be cut
        for piece in pieces:
            run.lock(piece, "concatenated with something that cannot be cut")
    alike = dim != cut and all(same(p, pieces[0]) for p in pieces)
    if alike and pieces[0].shape[dim] == 1:
        return Factor(pieces[0], cut)
    size = np.broadcast_shapes(*[narrow(p, dim, 0, 1).shape for p in pieces])
    whole = [
        expanded(p, [s[dim] if d == dim else n for d, n in enumerate(size)])
        for p, s in zip(pieces, shapes, strict=True)
    ]
    return Factor(np.concatenate(whole, dim), cut)


def _constant_pad(run: Propagation, call: Call) -> Labels:
    pads, ndim, result = list(call["pad"]), call.input.ndim, []
    for factor in run.labels(call.input):
        ids = factor.ids
        for k in range(len(pads) // 2):
            dim, before, after = ndim - 1 - k, pads[2 * k], pads[2 * k + 1]
            if ids.shape[dim] == 1 or (before == 0 and after == 0):
                continue
            if before < 0 or after < 0:
                ids = narrow(ids, dim, max(-before, 0), ids.shape[dim] + min(before, 0) + min(after, 0))
            rest = [1 if d == dim else s for d, s in enumerate(ids.shape)]
            grown = [ids]
            for count, place in ((before, 0), (after, 2)):
                if count > 0:
                    new = run.fresh(count * math.prod(rest))
                    new = new.reshape([count if d == dim else s for d, s in enumerate(ids.shape)])
                    grown.insert(0 if place == 0 else len(grown), new)
            ids = np.concatenate(grown, dim)
        result.append(Factor(ids, factor.dim))
    return tuple(result)


def _channel_shuffle(run: Propagation, call: Call) -> Labels:
    """``view``, ``transpose`` and ``view`` in one."""
    groups, result = call["groups"], []
    for factor in run.labels(call.input):
        ids = factor.ids
        if ids.shape[1] > 1:
            turned = ids.reshape(ids.shape[0], groups, -1, *ids.shape[2:]).swapaxes(1, 2)
            run.interleave(Factor(turned, 1))
            ids = turned.reshape(ids.shape)
        result.append(Factor(ids, factor.dim))
    return tuple(result)


def _square(run: Propagation, call: Call) -> Labels:
    """Ops whose meaning depends on positions: fine along other dims for tril and triu, locked otherwise."""
    ndim, result = call.input.ndim, []
    for factor in run.labels(call.input):
        if call.name in ("tril", "triu") and all(d < ndim - 2 for d in factor.varying):
            result.append(factor)
        else:
            run.lock(factor.ids, f"{call.name} works by position")
    return tuple(result)


def _view_as_complex(run: Propagation, call: Call) -> Labels:
    last = call.input.ndim - 1
    mixed = (run.mix(f, [last], "real and imaginary parts") for f in run.labels(call.input))
    return tuple(without(f, [last]) for f in mixed if f is not None)


def _view_as_real(run: Propagation, call: Call) -> Labels:
    return tuple(Factor(f.ids[..., None], f.dim) for f in run.labels(call.input))


# -- repairs -----------------------------------------------------------------------------------------------------------


def _repair_unflatten(repair: Repair, node: fx.Node) -> None:
    dim = repair.value(argument(node, 1, "dim"))
    sizes = argument(node, 2, "sizes")
    promised = repair.promised(node)
    start = dim % len(repair.dense(node.args[0]).shape)
    count = len(promised) - len(repair.dense(node.args[0]).shape) + 1
    set_argument(node, 2, "sizes", repair.size_list(node, sizes, promised[start : start + count]))


def _repair_repeat(repair: Repair, node: fx.Node) -> None:
    promised = repair.promised(node)
    source = repair.value(node.args[0]).shape
    source = (1,) * (len(promised) - len(source)) + tuple(source)
    times = [p // s for p, s in zip(promised, source, strict=True)]
    first = node.args[1]
    if isinstance(first, (tuple, list)):
        node.args = (node.args[0], repair.size_list(node, list(first), times[-len(first) :]))
    else:
        node.args = (node.args[0], *repair.sizes(node, node.args[1:], times[-(len(node.args) - 1) :]))


def _repair_assertion(repair: Repair, node: fx.Node) -> None:
    """The size is the new one; how a tensor lies in memory is not asked any more."""
    size = argument(node, 1, "size")
    if size is not None:
        set_argument(node, 1, "size", repair.size_list(node, size, repair.value(node.args[0]).shape))
    if argument(node, 2, "stride") is not None:
        set_argument(node, 2, "stride", None)


def _repair_pad(repair: Repair, node: fx.Node) -> None:
    known, out = repair.dense(node.args[0]), repair.dense(node)
    pads = [repair.dense(pad) for pad in repair.dense(argument(node, 1, "pad"))]
    given = repair.frozen(node, argument(node, 1, "pad"))
    changed = list(given) if isinstance(given, (tuple, list)) else list(pads)
    for k in range(len(pads) // 2):
        dim = len(known.shape) - 1 - k
        if not (repair.is_cut(out, dim) or repair.is_cut(known, dim)) or pads[2 * k] < 0 or pads[2 * k + 1] < 0:
            continue
        mask = repair.mask(out, dim, node)
        changed[2 * k] = int(mask[: pads[2 * k]].sum())
        changed[2 * k + 1] = int(mask[len(mask) - pads[2 * k + 1] :].sum()) if pads[2 * k + 1] else 0
    set_argument(node, 1, "pad", tuple(changed))


# -- the ops -----------------------------------------------------------------------------------------------------------

_FILLS = "what it fills in is no entry of a parameter"
_PAIRS = "a complex number holds two entries"
_op = adder(__name__, mask="positions only move: what a channel holds stays its own", refit=Followed.MOVED)

_op("alias", "detach", "positive", "lift_fresh_copy", label=_same, moves=True, refit=Followed.COPIED)
_op("_assert_tensor_metadata", label=_same, moves=True, repair=_repair_assertion, refit="it gives nothing")
_op("clone", label=_same, moves=True, rearranges=True, takes="anything", refit=Followed.COPIED)
_op("contiguous", label=_same, moves=True, rearranges=True, refit=Followed.COPIED)
_op("view", "reshape", label=_view, moves=True, rearranges=True, repair=shape_after_self, sizes=1)
_op("_unsafe_view", label=_view, moves=True, repair=shape_after_self, takes="anything")
_op("_reshape_copy", "view_copy", label=_view, moves=True, repair=shape_after_self)
_op("_reshape_alias", label=_view, moves=True, repair=LEFT_ALONE)
_op("permute", "transpose", "t", "swapaxes", label=_permute, moves=True, rearranges=True)
_op("numpy_T", label=_permute, moves=True)
_op("unsqueeze", label=_unsqueeze, moves=True, rearranges=True)
_op("squeeze", label=_squeeze, moves=True, rearranges=True)
_op("expand", label=_expand, moves=True, repair=shape_after_self, sizes=1)
_op("expand_copy", label=_expand, moves=True, repair=shape_after_self)
_op("repeat", label=_repeat, moves=True, repair=_repair_repeat, sizes=1, takes="anything")
_op("flip", label=_flip, moves=True, takes="anything")
_op("roll", label=_roll, moves=True, takes="anything", repair="along channels it locks them")
_op("cat", "stack", label=_concatenate, moves=True, takes="anything")
_op("constant_pad_nd", label=_constant_pad, moves=True, takes="anything", repair=LEFT_ALONE, refit=_FILLS)
_op("pad", label=_constant_pad, moves=True, repair=_repair_pad, refit=_FILLS)
_op("channel_shuffle", label=_channel_shuffle, rearranges=True, repair="the groups stay", refit=NOT_FOLLOWED)
_op("native_channel_shuffle", label=_channel_shuffle, takes="floats of one kind", repair="the groups stay",
    refit=NOT_FOLLOWED)  # fmt: skip
_op("diagonal", label=_square, moves=True)
_op("tril", "triu", label=_square, repair="the matrices stay, and so do their diagonals", refit=_FILLS)
_op("rot90", label=_rot90, moves=True, takes="anything")
_op("take", "put", "trace", label=_square, refit=NOT_FOLLOWED)
_op("view_as_complex", label=_view_as_complex, moves=True, refit=_PAIRS)
_op("view_as_real", label=_view_as_real, moves=True, refit=_PAIRS)

# Made of other ops; a recorded graph calls them.
_call = adder(__name__, rearranges=True)
_call("unflatten", repair=_repair_unflatten)
_call("flatten", "swapdims", "movedim", "moveaxis", "view_as", "reshape_as", "python::T", "python::mT")
_call("broadcast_to", rearranges=False, repair=shape_after_self)
_call("tile", rearranges=False, repair=_repair_repeat, sizes=1)
