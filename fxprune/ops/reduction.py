"""A reduction, a softmax or a top-k over channels is approximate; sorting and cumulation across them lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.labels.factors import Factor, Labels, settle_dim
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation
from fxprune.labels.records import TensorLabels, channels_of
from fxprune.ops.call import Call
from fxprune.ops.masks import largest, one, smallest, zero
from fxprune.ops.meta import empty, is_plain, on_meta, recorded_shape
from fxprune.ops.refit import NOT_FOLLOWED
from fxprune.ops.repair import Repair, UnrepairableError
from fxprune.ops.table import adder, argument


def _reduce(run: Propagation, call: Call) -> Labels:
    """A channel dimension that is summed over: the result is a statistic of the kept channels."""
    if len(call.tensors) > 1:  # torch.max(a, b)
        operands = [(tuple(t.shape), run.labels(t)) for t in call.tensors]
        return join_positions(run, operands, tuple(call.out.shape))
    gone = call.dims()
    labels = run.labels(call.input)
    cut = [f for f in labels if f.dim in gone and f.ids.shape[f.dim] > 1]
    run.statistic(call.name, tuple(cut))
    for factor in cut:
        run.approximate(factor.ids, f"{call.name} over channels")
        for index in call.outputs[1:] if call.name in ("max", "min") else ():
            run.lock_if_used(index, factor.ids, "the index of the largest channel")
    rest = [run.collapse(f, gone) for f in labels if all(f is not c for c in cut)]
    return tuple(_reduced(f, gone, call.out.ndim) for f in rest)


def _reduced(factor: Factor, gone: list[int], ndim: int) -> Factor:
    """The factor, which no longer varies along ``gone``, after their removal (unless the dims were kept)."""
    if ndim == factor.ids.ndim:
        return factor
    left = [d for d in range(factor.ids.ndim) if d not in gone]
    ids = factor.ids.reshape([factor.ids.shape[d] for d in left])
    return Factor(ids, settle_dim(ids, left.index(factor.dim) if factor.dim in left else 0))


def _by_rank(run: Propagation, call: Call) -> Labels:
    gone = call.dims()
    mixed = [run.mix(f, gone, f"{call.name} over channels") for f in run.labels(call.input)]
    return tuple(_reduced(f, gone, call.out.ndim) for f in mixed if f is not None)


def _softmax(run: Propagation, call: Call) -> Labels:
    """Over channels: those that stay share what the others had."""
    dims, labels = call.dims(), run.labels(call.input)
    cut = tuple(f for f in labels if f.dim in dims and f.ids.shape[f.dim] > 1)
    run.statistic("softmax", cut)
    for factor in cut:
        run.approximate(factor.ids, "softmax over channels")
    return tuple(f if f.dim in dims else run.collapse(f, dims) for f in labels)


def _topk(run: Propagation, call: Call) -> Labels | list[Labels]:
    """Of the channels that stay the largest are taken: there must be as many. Their places are theirs among those."""
    dim, labels = call.dims()[0], run.labels(call.input)
    cut = [f for f in labels if f.ids.shape[dim] > 1]
    if not call["largest"] or not cut or any(f.varying != (dim,) for f in cut):
        return _along(run, call)
    run.statistic("topk", tuple(cut))
    for factor in cut:
        run.approximate(factor.ids, "topk over channels")
        run.at_least(factor.ids, call["k"], f"topk takes {call['k']} of them")
        run.choose(call.outputs[1], factor.ids.reshape(-1))
    rest = tuple(f for f in labels if f.ids.shape[dim] == 1)
    return [rest, rest]


def _sort(run: Propagation, call: Call) -> Labels:
    """Places among channels that stay lie in the same order as before."""
    chosen = run.chosen(call.input)
    if chosen is not None and call.name == "sort":
        run.choose(call.out, chosen)
    return _along(run, call)


def _cumsum(run: Propagation, call: Call) -> Labels:
    """Counts of channels that go are 0: where those of the others end stays."""
    counted = run.counted_chosen(call.input)
    if counted is not None:
        run.labels(call.input)
        return run.count_chosen(call.out, counted, ends=True)
    return _along(run, call)


def _along(run: Propagation, call: Call) -> Labels:
    mixed = [run.mix(f, call.dims(), f"{call.name} across channels", ordered=True) for f in run.labels(call.input)]
    return tuple(f for f in mixed if f is not None)


# -- repairs -----------------------------------------------------------------------------------------------------------


def _repair_topk(repair: Repair, node: fx.Node) -> None:
    """As many are taken as before: there must be so many."""
    of, k, dim = argument(node, 0, "input"), repair.value(argument(node, 1, "k")), argument(node, 2, "dim", -1)
    left = repair.promised(of)[dim] if isinstance(repair.dense(of), TensorLabels) else k
    if left < k:
        text = f"topk takes {k} channels, and {left} would be left"
        raise UnrepairableError(node, text, channels_of(repair.dense(of)))


# -- on meta tensors --------------------------------------------------------------------------------------------------


def _meta_mean(x: Tensor, dims: Any, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    """``x``, contiguous, without the dims, or with ones in their place."""
    if dtype is not None or not dims or not is_plain(x) or not x.is_contiguous():
        return None
    if not all(-x.ndim <= dim < x.ndim for dim in dims) or len({dim % x.ndim for dim in dims}) < len(dims):
        return None
    gone = {dim % x.ndim for dim in dims}
    shape = [1 if dim in gone else size for dim, size in enumerate(x.shape) if keepdim or dim not in gone]
    return empty(tuple(shape), x)


def _unique_rows(node: fx.Node | None, x: Tensor, dim: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape, size = recorded_shape(node), x.shape[dim]
    count = int(shape[dim]) if shape and len(shape) == x.ndim else size
    found = [count if d == dim % x.ndim else n for d, n in enumerate(x.shape)]
    return on_meta(found, x.dtype), on_meta((size,)), on_meta((count,))


def _dim_is_refused(x: Tensor, dim: int, *_: Any) -> bool:
    return not -x.ndim <= dim < max(x.ndim, 1)


# -- the oracle's counterparts, which share no code with what is above ------------------------------------------------


def _with(neutral: Callable[[Tensor], Any]) -> Callable[[Any, Tensor, Any, Any], Any]:
    """What a position must hold to leave the result as it is without the position."""

    def masked(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
        x, *rest = args
        return func(x.masked_fill(~on, neutral(x)), *rest, **kwargs)

    return masked


def _masked_norm(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    order = rest[0] if rest else kwargs.get("ord", kwargs.get("p"))
    least = isinstance(order, (int, float)) and order < 0  # of the norms with a negative order
    return func(x.masked_fill(~on, torch.inf if least else 0), *rest, **kwargs)


def _masked_aminmax(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    low, _ = func(x.masked_fill(~on, largest(x)), *rest, **kwargs)
    return low, func(x.masked_fill(~on, smallest(x)), *rest, **kwargs)[1]


def _masked_mean(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    x, dims, keepdim = _masked_operand(args, kwargs)
    keepdim = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
    mean = (x.masked_fill(~on, 0).sum(dims, keepdim=True) / on.sum(dims, keepdim=True)).to(x.dtype)
    return mean if keepdim else mean.sum(dims)


def _masked_spread(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    """``var``, ``std``, and these with the mean."""
    x, dims, keepdim = _masked_operand(args, kwargs)
    name, count = func.overloadpacket.__name__, on.sum(dims, keepdim=True)
    mean = x.masked_fill(~on, 0).sum(dims, keepdim=True) / count
    correction = kwargs.get("correction", 1)
    correction = 1 if correction is None else correction
    squares = (x - mean).masked_fill(~on, 0).abs().square()
    spread = squares.sum(dims, keepdim=True) / (count - correction).clamp(min=0)
    spread = spread.sqrt() if name.startswith("std") else spread
    both = (spread, mean) if keepdim else (spread.sum(dims), mean.sum(dims))
    return both if name.endswith("_mean") else both[0]


def _masked_operand(args: Any, kwargs: Any) -> tuple[Tensor, Any, bool]:
    """The operand in its dtype, the dims, and whether they are kept."""
    x, *rest = args
    dims = rest[0] if rest and isinstance(rest[0], (list, tuple, int)) and not isinstance(rest[0], bool) else None
    dims = kwargs.get("dim") if dims is None else dims
    dims = dims if dims not in (None, [], ()) else list(range(x.ndim))
    return x if kwargs.get("dtype") is None else x.to(kwargs["dtype"]), dims, bool(kwargs.get("keepdim", False))


def _masked_softmax(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    return func(x.masked_fill(~on, -torch.inf), *rest, **kwargs)


def _masked_topk(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    return func(x.masked_fill(~on, -torch.inf if x.is_floating_point() else smallest(x)), *rest, **kwargs)


# -- the ops -----------------------------------------------------------------------------------------------------------

_op = adder(__name__, label=_reduce, refit=NOT_FOLLOWED)

_op("mean", mask=_masked_mean, takes="floats of one kind", meta={"dim": _meta_mean})
_op("var", "std", "var_mean", "std_mean", mask=_masked_spread, takes="floats of one kind")
_op("sum", mask=_with(zero), takes="floats of one kind")
_op("nansum", "any", "count_nonzero", "_is_any_true", mask=_with(zero))
_op("prod", "all", "_is_all_true", mask=_with(one))
_op("amax", "logsumexp", mask=_with(smallest), takes="floats of one kind")
_op("max", mask=_with(smallest))
_op("amin", mask=_with(largest), takes="floats of one kind")
_op("min", mask=_with(largest))
_op("aminmax", mask=_masked_aminmax)
_op("linalg_vector_norm", mask=_masked_norm, takes="floats of one kind")
_op("norm", mask=_masked_norm)

_softmaxes = adder(__name__, label=_softmax, mask=_masked_softmax, counted="softmax", refit=NOT_FOLLOWED)
_softmaxes("_softmax", "_log_softmax", takes="floats of one kind", refuses=_dim_is_refused)
_softmaxes("_safe_softmax", takes="floats of one kind")
_softmaxes("softmax", "log_softmax")

_held = adder(__name__, mask="across channels it locks them; else every channel by itself", refit=NOT_FOLLOWED)
_held("argmax", "argmin", "median", "mode", "kthvalue", "nanmedian", label=_by_rank, repair="a rank is no size")
_held("unique_dim", label=_by_rank, without_values=_unique_rows)
_held("cumsum", label=_cumsum, takes="floats of one kind")
_held("sort", "argsort", label=_sort, repair="across channels it locks them")
_held("cumprod", "logcumsumexp", "cummax", "cummin", label=_along, repair="across channels it locks them")
_op("topk", label=_topk, mask=_masked_topk, repair=_repair_topk)
