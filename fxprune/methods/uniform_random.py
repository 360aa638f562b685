"""Chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxprune.groups.channels import ChannelGroup
from fxprune.methods.registry import register
from fxprune.methods.state import ModelState, Scores


@register("random")
@dataclass(frozen=True)
class Random:
    """Uniform random scores from the seed: the baseline every criterion must beat."""

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        return np.random.default_rng([state.seed, int(group.channels.min())]).random(group.channels.shape)
