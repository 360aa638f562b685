"""Weights times what they are multiplied with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fxprune.groups.channels import ChannelGroup
from fxprune.methods.options import Aggregated
from fxprune.methods.registry import Need, register
from fxprune.methods.state import Aggregator, ModelState, Scores, places_of


@register("wanda")
@dataclass(frozen=True)
class Wanda(Aggregated):
    """``sum |W| * norm of the input`` over the weights that read a channel (Sun et al. 2024, eq. 1, by channel).

    The norm is the root mean square of the channel over data and positions. Channels that no weight reads stay. Needs
    data.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"activations"})

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        def compute() -> Scores:
            total = Aggregator(state.graph.channel_count, self.aggregate)
            for read in state.measured.activations:
                for name in read.parameters:
                    parameter = state.graph.by_name[name]
                    if not parameter.trainable:
                        continue
                    for place in places_of(parameter):
                        if np.array_equal(place.channels, read.channels):
                            total.add(place.channels, place.sums(state.values(name).abs()) * np.sqrt(read.square))
            return total.result(np.nan)

        scores: Scores = state.cached(("wanda", self.aggregate), compute)[group.channels]
        return None if np.isnan(scores).any() else scores
