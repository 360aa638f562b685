"""Reductions and everything else that combines positions along named dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.labels.factors import Factor, Labels, settle_dim
from fxprune.labels.rules.table import Call, rule

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation


@rule(
    "mean", "sum", "nansum", "amax", "amin", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm",
    "logsumexp", "prod", "max", "min", "any", "all", "aminmax", "count_nonzero", "_is_all_true",
    "_is_any_true",
)  # fmt: skip
def _reduce(run: Propagation, call: Call) -> Labels:
    """A channel dimension that is summed over: the result is a statistic of the kept channels."""
    if len(call.tensors) > 1:  # torch.max(a, b)
        from fxprune.labels.rules.pointwise import join_positions

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
    return tuple(reduced(f, gone, call.out.ndim) for f in rest)


def reduced(factor: Factor, gone: list[int], ndim: int) -> Factor:
    """The factor, which no longer varies along ``gone``, after their removal (unless the dims were kept)."""
    if ndim == factor.ids.ndim:
        return factor
    left = [d for d in range(factor.ids.ndim) if d not in gone]
    ids = factor.ids.reshape([factor.ids.shape[d] for d in left])
    return Factor(ids, settle_dim(ids, left.index(factor.dim) if factor.dim in left else 0))


@rule("argmax", "argmin", "median", "mode", "kthvalue", "nanmedian", "unique_dim")
def _by_rank(run: Propagation, call: Call) -> Labels:
    gone = call.dims()
    mixed = [run.mix(f, gone, f"{call.name} over channels") for f in run.labels(call.input)]
    return tuple(reduced(f, gone, call.out.ndim) for f in mixed if f is not None)


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def _softmax(run: Propagation, call: Call) -> Labels:
    """Over channels: those that stay share what the others had."""
    dims, labels = call.dims(), run.labels(call.input)
    cut = tuple(f for f in labels if f.dim in dims and f.ids.shape[f.dim] > 1)
    run.statistic("softmax", cut)
    for factor in cut:
        run.approximate(factor.ids, "softmax over channels")
    return tuple(f if f.dim in dims else run.collapse(f, dims) for f in labels)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "argsort", "topk")
def _along(run: Propagation, call: Call) -> Labels:
    mixed = [run.mix(f, call.dims(), f"{call.name} across channels", ordered=True) for f in run.labels(call.input)]
    return tuple(f for f in mixed if f is not None)
