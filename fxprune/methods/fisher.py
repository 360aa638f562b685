"""Second-order change of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxprune.groups.channels import ChannelGroup
from fxprune.methods.options import Aggregated
from fxprune.methods.registry import Need, register
from fxprune.methods.state import ModelState, Scores


@register("fisher")
@dataclass(frozen=True)
class Fisher(Aggregated):
    """Second-order change of the loss with the Fisher information as curvature, sample by sample; needs data.

    ``1/2 mean over samples of (sum g * w)^2`` over everything the channel owns (Theis et al. 2018, eq. 8; over coupled
    channels as Liu et al. 2021). ``aggregate="mean"`` or ``"max"``: of the same for every slice by itself.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"sample_gradients"})

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        return 0.5 * state.saliency(group, "samples", self.aggregate)
