"""Factories. What is the same everywhere adapts to what it meets; what depends on position is rigid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.labels.factors import Factor, Labels, vector
from fxprune.labels.rules.pointwise import join_positions
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


@rule("normal")
def _normal(run: Propagation, call: Call) -> Labels | list[Labels]:
    """Around the numbers of a tensor, with those of another as deviations; or of a size that is given; or in place."""
    operands = [(tuple(t.shape), run.labels(t)) for t in call.tensors]
    return join_positions(run, operands, tuple(call.out.shape)) if operands else _uniform(run, call)


@rule("multinomial")
def _multinomial(run: Propagation, call: Call) -> Labels:
    """Draws positions along the last dimension."""
    mixed = (run.mix(f, [call.input.ndim - 1], "drawn among channels", ordered=True) for f in run.labels(call.input))
    return tuple(f for f in mixed if f is not None)
