"""Criteria that need nothing but the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxprune.channels import ChannelGroup
from fxprune.methods.registry import ModelState, Scores, method


@method("l1")
@dataclass(frozen=True)
class L1:
    """Sum of absolute weights over everything a channel owns (Li et al. 2017, over coupled layers)."""

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        return state.power_sums(group, 1)


@method("l2")
@dataclass(frozen=True)
class L2:
    """Euclidean norm of the weights over everything a channel owns (group norm, Fang et al. 2023, eq. 5)."""

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        return np.asarray(np.sqrt(state.power_sums(group, 2)))


@method("bn_scale")
@dataclass(frozen=True)
class BNScale:
    """Absolute scale of the norm layers a channel passes (the criterion of Liu et al. 2017); others stay."""

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        return state.norm_scales(group)


@method("random")
@dataclass(frozen=True)
class Random:
    """Uniform random scores from the seed: the baseline every criterion must beat."""

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        return np.random.default_rng([state.seed, int(group.channels.min())]).random(group.channels.shape)
