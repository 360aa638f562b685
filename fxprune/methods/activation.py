"""How strongly channels are active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fxprune.errors import InputError
from fxprune.groups.channels import ChannelGroup
from fxprune.methods.options import Aggregated
from fxprune.methods.registry import Need, Normalize, register
from fxprune.methods.state import Aggregate, Aggregator, ModelState, Scores


@register("activation")
@dataclass(frozen=True)
class Activation(Aggregated):
    """Mean absolute activation where a channel is read (``kind="mean"``), or the share that is not zero (``"apoz"``).

    APoZ is the average percentage of zeros (Hu et al. 2016, eq. 1); the score is one minus it. Measured at the inputs
    of the layers that read the channel; channels that none reads stay. Needs data.
    """

    kind: Literal["mean", "apoz"] = "mean"
    aggregate: Aggregate = "mean"
    normalize: Normalize = "mean"
    needs: ClassVar[frozenset[Need]] = frozenset({"activations"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("mean", "apoz"):
            raise InputError(f"kind={self.kind!r} is unknown. Known: mean, apoz.")

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        def compute() -> Scores:
            places = Aggregator(state.graph.channel_count, self.aggregate)
            for read in state.measured.activations:
                places.add(read.channels, read.absolute if self.kind == "mean" else read.nonzero)
            return places.result(np.nan)

        scores: Scores = state.cached((self.kind, self.aggregate), compute)[group.channels]
        return None if np.isnan(scores).any() else scores
