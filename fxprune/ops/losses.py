"""Pointwise; a sum or a mean over channels is approximate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.labels.factors import Labels
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation
from fxprune.ops.call import Call
from fxprune.ops.refit import NO_WEIGHT
from fxprune.ops.table import adder


def _loss(run: Propagation, call: Call) -> Labels:
    shape = tuple(torch.broadcast_shapes(*[t.shape for t in call.tensors]))
    labels = join_positions(run, [(tuple(t.shape), run.labels(t)) for t in call.tensors], shape)
    if call["reduction"] == 0:
        return labels
    run.statistic("loss", labels)
    for factor in labels:
        run.approximate(factor.ids, f"{call.name} over channels")
    return ()


# -- the oracle's counterparts, which share no code with what is above ------------------------------------------------


def _masked(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    """The mean or the sum of the kept positions."""
    names = [a.name for a in func._schema.arguments]
    given = {**{a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}, **kwargs}
    given.update(zip(names, args, strict=False))
    loss = func(**{**given, "reduction": 0})
    on = on.expand(loss.shape)
    total = loss.masked_fill(~on, 0).sum()
    return total if given["reduction"] == 2 else total / on.sum()


# -- the ops -----------------------------------------------------------------------------------------------------------

_op = adder(__name__, refit=NO_WEIGHT)

_op(
    "mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    label=_loss, mask=_masked, counted="loss",
)  # fmt: skip
