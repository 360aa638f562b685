"""Movement ops: the very same op is applied to the label tensors, along the dimensions where they vary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fxprune.labels.classes import Ids, same
from fxprune.labels.factors import (
    Factor,
    Labels,
    aligned,
    along,
    expanded,
    moved,
    narrow,
    settle_dim,
    vector,
    viewed,
)
from fxprune.labels.rules.table import Call, rule

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation


@rule("alias", "detach", "clone", "contiguous", "lift_fresh_copy", "positive", "_to_copy_", "_assert_tensor_metadata")
def _same(run: Propagation, call: Call) -> Labels:
    return run.labels(call.input)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy")
def _view(run: Propagation, call: Call) -> Labels:
    result = []
    for factor in run.labels(call.input):
        after, interleaved = viewed(factor, call.input.shape, call.out.shape)
        if interleaved:
            run.interleave(factor)
        result.append(after)
    return tuple(result)


@rule("permute", "transpose", "t", "numpy_T", "swapaxes")
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


@rule("unsqueeze")
def _unsqueeze(run: Propagation, call: Call) -> Labels:
    dim = call["dim"] % call.out.ndim
    return tuple(_with_dim(f, dim) for f in run.labels(call.input))


def _with_dim(factor: Factor, dim: int) -> Factor:
    """The factor of a tensor that got a dimension of size 1 at ``dim``."""
    return factor.laid(np.expand_dims(factor.ids, dim), factor.dim + (factor.dim >= dim))


@rule("squeeze")
def _squeeze(run: Propagation, call: Call) -> Labels:
    gone = [d for d in call.dims() if call.input.shape[d] == 1]
    return tuple(_without(f, gone) for f in run.labels(call.input))


def _without(factor: Factor, gone: Sequence[int]) -> Factor:
    """The factor of a tensor that lost the dimensions ``gone``, along which it does not vary."""
    left = [d for d in range(factor.ids.ndim) if d not in gone]
    ids = factor.ids.reshape([factor.ids.shape[d] for d in left])
    return Factor(ids, settle_dim(ids, left.index(factor.dim) if factor.dim in left else 0))


def _fresh_along(run: Propagation, tensor: Tensor, dims: Sequence[int]) -> Labels:
    return tuple(Factor(vector(run.fresh(tensor.shape[d]), d, tensor.ndim), d) for d in dims)


@rule("expand", "expand_copy")
def _expand(run: Propagation, call: Call) -> Labels:
    """Copies along a dimension of size 1 constrain nothing: their number adapts to what they meet."""
    out, extra = call.out, call.out.ndim - call.input.ndim
    before = [1] * extra + list(call.input.shape)
    grown = [d for d, size in enumerate(out.shape) if size > 1 and before[d] == 1]
    return tuple(aligned(f, out.ndim) for f in run.labels(call.input)) + _fresh_along(run, out, grown)


@rule("repeat")
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


@rule("select", "select_copy")
def _select(run: Propagation, call: Call) -> Labels:
    dim, result = call.dims()[0], []
    for factor in run.labels(call.input):
        ids = factor.ids
        if ids.shape[dim] > 1:
            ids = narrow(ids, dim, call["index"] % ids.shape[dim], 1)
            if factor.varying == (dim,):
                run.lock(ids, "a single channel is picked")
                continue
        result.append(_without(Factor(ids, factor.dim), [dim]))
    return tuple(result)


@rule("slice", "slice_copy")
def _slice(run: Propagation, call: Call) -> Labels:
    dim = call.dims()[0]
    window = slice(call["start"], call["end"], call["step"])
    index = tuple(window if d == dim else slice(None) for d in range(call.input.ndim))
    return _picked(run, [along(f, dim, lambda ids: ids[index]) for f in run.labels(call.input)], call.out)


def _picked(run: Propagation, labels: Sequence[Factor], out: Tensor) -> Labels:
    """Part of a dimension. Where it is one channel, that one must stay: the dimension would be empty."""
    for factor in labels:
        if factor.ids.size == 1 and out.shape[factor.dim] == 1:
            run.lock(factor.ids, "a single channel is picked")
    return tuple(labels)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split")
def _split(run: Propagation, call: Call) -> list[Labels]:
    dim, start, result = call.dims()[0], 0, []
    for out in call.outputs:
        size, first = out.shape[dim], start
        labels = [along(f, dim, lambda ids: narrow(ids, dim, first, size)) for f in run.labels(call.input)]  # noqa: B023
        result.append(_picked(run, labels, out))
        start += size
    return result


@rule("unbind")
def _unbind(run: Propagation, call: Call) -> list[Labels]:
    dim = call.dims()[0]
    result = []
    for index in range(len(call.outputs)):
        labels = []
        for factor in run.labels(call.input):
            ids = factor.ids
            if ids.shape[dim] > 1:
                ids = narrow(ids, dim, index, 1)
                if factor.varying == (dim,):
                    run.lock(ids, "a single channel is picked")
                    continue
            labels.append(_without(Factor(ids, factor.dim), [dim]))
        result.append(tuple(labels))
    return result


@rule("flip")
def _flip(run: Propagation, call: Call) -> Labels:
    factors = run.labels(call.input)
    for dim in call.dims("dims"):
        factors = tuple(along(f, dim, lambda ids: np.flip(ids, dim)) for f in factors)  # noqa: B023
    return factors


@rule("roll")
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


@rule("cat", "stack")
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


@rule("constant_pad_nd", "pad")
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


@rule("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def _reflection_pad(run: Propagation, call: Call) -> Labels:
    return _edge_pad(run, call)


@rule("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _replication_pad(run: Propagation, call: Call) -> Labels:
    return _edge_pad(run, call)


def _edge_pad(run: Propagation, call: Call) -> Labels:
    dims = range(call.input.ndim - len(call["padding"]) // 2, call.input.ndim)
    mixed = (run.mix(f, list(dims), "padded by reflection") for f in run.labels(call.input))
    return tuple(f for f in mixed if f is not None)


@rule("pixel_shuffle")
def _pixel_shuffle(run: Propagation, call: Call) -> Labels:
    """``[*, C r^2, H, W] -> [*, C, H r, W r]``: a channel's r^2 sub-pixels lie side by side, so they are joined."""
    return _rearranged(run, call, -(call["upscale_factor"] ** 2))


@rule("pixel_unshuffle")
def _pixel_unshuffle(run: Propagation, call: Call) -> Labels:
    return _rearranged(run, call, call["downscale_factor"] ** 2)


def _rearranged(run: Propagation, call: Call, times: int) -> Labels:
    dim, result = call.input.ndim - 3, []
    for factor in run.labels(call.input):
        mixed = run.mix(factor, [dim + 1, dim + 2], "pixels become channels")
        if mixed is None:
            continue
        ids = mixed.ids
        if ids.shape[dim] > 1:
            if times > 0:
                ids = ids.repeat(times, dim)
            else:
                ids = _first_of(run, ids, dim, -times)
        result.append(Factor(ids, mixed.dim))
    return tuple(result)


def _first_of(run: Propagation, ids: Ids, dim: int, times: int) -> Ids:
    """``times`` neighbours each along ``dim`` become one channel: the first of them."""
    split = ids.reshape(*ids.shape[:dim], -1, times, *ids.shape[dim + 1 :])
    first = narrow(split, dim + 1, 0, 1)
    run.join(split, first)
    return first.squeeze(dim + 1)


@rule("channel_shuffle", "native_channel_shuffle")
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


@rule("im2col")
def _im2col(run: Propagation, call: Call) -> Labels:
    """``[N, C, H, W] -> [N, C k k, L]``."""
    if call.input.ndim != 4:
        run.lock_all(run.labels(call.input), "unfold of an unbatched tensor")
        return ()
    window, result = math.prod(call["kernel_size"]), []
    for factor in run.labels(call.input):
        mixed = run.mix(factor, [2, 3], "patches are unfolded")
        if mixed is not None and mixed.varying:
            ids = mixed.ids.reshape(mixed.ids.shape[0], mixed.ids.shape[1], 1)
            ids = ids.repeat(window, 1) if ids.shape[1] > 1 else ids
            result.append(Factor(ids, mixed.dim))
    return tuple(result)


@rule("col2im")
def _col2im(run: Propagation, call: Call) -> Labels:
    """``[N, C k k, L] -> [N, C, H, W]``: overlapping patches are summed, so a channel's k k values are joined."""
    if call.input.ndim != 3:
        run.lock_all(run.labels(call.input), "fold of an unbatched tensor")
        return ()
    window, result = math.prod(call["kernel_size"]), []
    for factor in run.labels(call.input):
        mixed = run.mix(factor, [2], "patches are folded")
        if mixed is None or not mixed.varying:
            continue
        ids = mixed.ids
        if ids.shape[1] > 1:
            ids = _first_of(run, ids, 1, window)
        result.append(Factor(ids[..., None], mixed.dim))
    return tuple(result)


@rule("unfold")
def _unfold(run: Propagation, call: Call) -> Labels:
    dim, result = call["dimension"] % call.input.ndim, []
    for factor in run.labels(call.input):
        mixed = run.mix(factor, [dim], "unfolded along channels")
        if mixed is not None:
            result.append(Factor(mixed.ids[..., None], mixed.dim))
    return tuple(result)


@rule("diagonal", "tril", "triu", "rot90", "take", "put", "trace")
def _square(run: Propagation, call: Call) -> Labels:
    """Ops whose meaning depends on positions: fine along other dims for tril and triu, locked otherwise."""
    ndim, result = call.input.ndim, []
    for factor in run.labels(call.input):
        if call.name in ("tril", "triu") and all(d < ndim - 2 for d in factor.varying):
            result.append(factor)
        else:
            run.lock(factor.ids, f"{call.name} works by position")
    return tuple(result)


@rule("view_as_complex")
def _view_as_complex(run: Propagation, call: Call) -> Labels:
    last = call.input.ndim - 1
    mixed = (run.mix(f, [last], "real and imaginary parts") for f in run.labels(call.input))
    return tuple(_without(f, [last]) for f in mixed if f is not None)


@rule("view_as_real")
def _view_as_real(run: Propagation, call: Call) -> Labels:
    return tuple(Factor(f.ids[..., None], f.dim) for f in run.labels(call.input))
