"""Losses: pointwise, and with ``reduction`` then a sum or a mean over all positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxprune.labels.factors import Labels
from fxprune.labels.rules.pointwise import join_positions
from fxprune.labels.rules.table import Call, rule

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation


@rule(
    "mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
)  # fmt: skip
def _loss(run: Propagation, call: Call) -> Labels:
    shape = tuple(torch.broadcast_shapes(*[t.shape for t in call.tensors]))
    labels = join_positions(run, [(tuple(t.shape), run.labels(t)) for t in call.tensors], shape)
    if call["reduction"] == 0:
        run.statistic("loss", ())
        return labels
    run.statistic("loss", labels)
    for factor in labels:
        run.approximate(factor.ids, f"{call.name} over channels")
    return ()
