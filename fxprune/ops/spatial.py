"""Channel by channel; positions are mixed within the last dims."""

from __future__ import annotations

import math
from collections.abc import Callable

from fxprune.labels.classes import Ids
from fxprune.labels.factors import Factor, Labels, narrow
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation
from fxprune.ops.call import Call
from fxprune.ops.refit import NO_WEIGHT, Followed
from fxprune.ops.table import adder


def _last(count: int) -> Callable[[Propagation, Call], Labels]:
    def mix(run: Propagation, call: Call) -> Labels:
        run.unread(call.name, *call.tensors[1:])  # the places to sample at, say
        dims = list(range(call.input.ndim - count, call.input.ndim))
        mixed = [run.mix(f, dims, f"{call.name} along channels") for f in run.labels(call.input)]
        return tuple(f for f in mixed if f is not None)

    return mix


def _unpool(count: int) -> Callable[[Propagation, Call], Labels]:
    def mix(run: Propagation, call: Call) -> Labels:
        """Values ``[*, C, *]`` go to where the indices, of the same channels, say that they were."""
        shape = tuple(call.input.shape)
        operands = [(shape, run.labels(call.input)), (shape, run.labels(call["indices"]))]
        dims = list(range(len(shape) - count, len(shape)))
        mixed = [run.mix(f, dims, f"{call.name} along channels") for f in join_positions(run, operands, shape)]
        return tuple(f for f in mixed if f is not None)

    return mix


def _edge_pad(run: Propagation, call: Call) -> Labels:
    dims = range(call.input.ndim - len(call["padding"]) // 2, call.input.ndim)
    mixed = (run.mix(f, list(dims), "padded by reflection") for f in run.labels(call.input))
    return tuple(f for f in mixed if f is not None)


def _pixel_shuffle(run: Propagation, call: Call) -> Labels:
    """``[*, C r^2, H, W] -> [*, C, H r, W r]``: a channel's r^2 sub-pixels lie side by side, so they are joined."""
    return _rearranged(run, call, -(call["upscale_factor"] ** 2))


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


def _unfold(run: Propagation, call: Call) -> Labels:
    dim, result = call["dimension"] % call.input.ndim, []
    for factor in run.labels(call.input):
        mixed = run.mix(factor, [dim], "unfolded along channels")
        if mixed is not None:
            result.append(Factor(mixed.ids[..., None], mixed.dim))
    return tuple(result)


# -- the ops -----------------------------------------------------------------------------------------------------------

_op = adder(
    __name__,
    mask="channel by channel: what one holds stays its own",
    repair="sizes of windows and images, in which nothing is cut",
    refit=NO_WEIGHT,
)
_1d, _2d, _3d = _last(1), _last(2), _last(3)

_op("avg_pool1d", "adaptive_avg_pool1d", "max_pool1d", "max_pool1d_with_indices", "_upsample_nearest_exact1d",
    label=_1d)  # fmt: skip
_op("upsample_nearest1d", "upsample_linear1d", label=_1d, takes="floats of one kind")
_op(
    "adaptive_avg_pool2d", "max_pool2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    label=_2d,
)  # fmt: skip
_op(
    "avg_pool2d", "_adaptive_avg_pool2d", "max_pool2d_with_indices", "adaptive_max_pool2d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d", "grid_sampler_2d",
    label=_2d, takes="floats of one kind",
)  # fmt: skip
_op("adaptive_avg_pool3d", "adaptive_max_pool3d", "_upsample_nearest_exact3d", "grid_sampler_3d", label=_3d)
_op(
    "avg_pool3d", "_adaptive_avg_pool3d", "max_pool3d_with_indices", "upsample_nearest3d", "upsample_trilinear3d",
    label=_3d, takes="floats of one kind",
)  # fmt: skip
_op("max_unpool2d", label=_unpool(2))
_op("max_unpool3d", label=_unpool(3))
_op("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", label=_edge_pad,
    takes="floats of one kind")  # fmt: skip
_op("reflection_pad3d", "replication_pad3d", label=_edge_pad)
_op("pixel_shuffle", label=_pixel_shuffle, moves=True, takes="floats of one kind", refit=Followed.MOVED)
_op("pixel_unshuffle", label=_pixel_unshuffle, moves=True, takes="floats of one kind", refit=Followed.MOVED)
_op("im2col", label=_im2col, takes="floats of one kind")
_op("col2im", label=_col2im, takes="floats of one kind")
_op("unfold", label=_unfold, moves=True, refit=Followed.MOVED)
