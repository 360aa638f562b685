"""Filters that the others of their layer can stand in for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fxprune.groups.channels import ChannelGroup
from fxprune.methods.options import Aggregated
from fxprune.methods.registry import register
from fxprune.methods.state import Aggregator, ModelState, Scores

_ROWS = 1024


@register("fpgm")
@dataclass(frozen=True)
class FPGM(Aggregated):
    """Sum of the distances to all other filters of the layer: the nearest to the geometric median go (He et al. 2019).

    Eq. 5 there: ``sum_j |F_i - F_j|_2`` over the filters that are left, for every layer that has filters of the channel
    (a depthwise one, too); None for channels that no weight of two or more dims makes alone.
    """

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        places = Aggregator(group.channels.size, self.aggregate)
        kept = slice(None) if state.kept is None else torch.from_numpy(state.kept[group.channels.reshape(-1)])
        for _, rows in state.slices(group):
            distances = torch.cat([torch.cdist(part, rows[kept]).sum(1) for part in rows.split(_ROWS)])
            places.add(np.arange(group.channels.size), distances.numpy())
        scores = places.result(np.nan)
        return None if np.isnan(scores).any() else scores.reshape(group.channels.shape)
