"""Norms of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxprune.groups.channels import ChannelGroup
from fxprune.methods.options import Aggregated
from fxprune.methods.registry import register
from fxprune.methods.state import ModelState, Scores


@register("l1")
@dataclass(frozen=True)
class L1(Aggregated):
    """Sum of absolute weights over everything a channel owns (Li et al. 2017, over coupled layers)."""

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        return state.power_sums(group, 1, self.aggregate)


@register("l2")
@dataclass(frozen=True)
class L2(Aggregated):
    """Euclidean norm of the weights over everything a channel owns (group norm, Fang et al. 2023, eq. 5)."""

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        return np.asarray(np.sqrt(state.power_sums(group, 2, self.aggregate)))
