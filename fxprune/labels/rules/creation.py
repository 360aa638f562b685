"""Factories. What is the same everywhere adapts to what it meets; what depends on position is rigid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.labels.factors import Factor, Labels, vector
from fxprune.labels.rules.table import Call, rule

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation


@rule(
    "empty", "zeros", "ones", "full", "rand", "randn", "randint", "empty_strided", "empty_permuted",
    "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "scalar_tensor",
)  # fmt: skip
def _uniform(run: Propagation, call: Call) -> Labels:
    out = call.out
    for like in call.tensors:
        run.labels(like)  # gives the dtype and the device, whatever it holds
    return tuple(Factor(vector(run.fresh(s), d, out.ndim), d) for d, s in enumerate(out.shape) if s > 1)


@rule("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
def _like(run: Propagation, call: Call) -> Labels:
    return run.labels(call.input)


@rule("arange", "linspace", "logspace", "eye", "range", "tril_indices", "triu_indices", "randperm")
def _by_position(run: Propagation, call: Call) -> Labels:
    return ()
