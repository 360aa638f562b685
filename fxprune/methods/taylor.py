"""First-order change of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxprune.groups.channels import ChannelGroup
from fxprune.methods.options import Aggregated
from fxprune.methods.registry import Need, register
from fxprune.methods.state import ModelState, Scores


@register("taylor")
@dataclass(frozen=True)
class Taylor(Aggregated):
    """Squared first-order change of the loss when a whole channel goes, averaged over batches; needs data.

    ``mean over batches of (sum g * w)^2`` over everything the channel owns (Molchanov et al. 2019, eq. 8, with the
    channel as the unit). ``aggregate="mean"`` or ``"max"``: of the same for every slice by itself.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        return state.saliency(group, "batches", self.aggregate)
