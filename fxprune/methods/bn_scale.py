"""The scale of norm layers."""

from __future__ import annotations

from dataclasses import dataclass

from fxprune.groups.channels import ChannelGroup
from fxprune.methods.options import Aggregated
from fxprune.methods.registry import register
from fxprune.methods.state import ModelState, Scores


@register("bn_scale")
@dataclass(frozen=True)
class BNScale(Aggregated):
    """Absolute scale of the norm layers a channel passes (the criterion of Liu et al. 2017); others stay.

    So do channels that a layer reads past all scales, which the report names.
    """

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        return state.norm_scales(group, self.aggregate)
