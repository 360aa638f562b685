"""Magnitude relative to what is left of the layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxprune.groups.channels import ChannelGroup
from fxprune.methods.options import Aggregated
from fxprune.methods.registry import Normalize, register
from fxprune.methods.state import ModelState, Scores


@register("lamp")
@dataclass(frozen=True)
class LAMP(Aggregated):
    """Layer-adaptive magnitude (Lee et al. 2021), over channels: ``|W_c|^2 / sum of those at least as large``.

    Eq. 4 there with the squared group norm of a channel in place of a squared weight.
    """

    normalize: Normalize = "none"

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        squares = state.power_sums(group, 2, self.aggregate)
        flat = squares.reshape(-1)
        order = np.argsort(flat, kind="stable")
        left = np.cumsum(flat[order][::-1])[::-1]
        scores = np.empty_like(flat)
        scores[order] = flat[order] / np.where(left > 0, left, 1.0)
        return scores.reshape(squares.shape)
