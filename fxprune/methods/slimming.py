"""Network Slimming (Liu et al., ICCV 2017).

A sub-gradient of ``strength * sum |gamma|`` is added to the gradients of the scales of all norm layers, so that it
passes through the optimizer; channels with small scales go. What differs from the original:

- It ranks the scales of a residual stream too, and there selects for every block which channels it reads; the stream
  stays whole. That is what this does with ``fxprune.select_inputs(model)``. With the model itself channels go
  everywhere or nowhere: those of a stream by the mean of their scales, or not at all with ``inner_only``. That is no
  rule of the paper's: it ranks fewer scales, so that a percentile is one of fewer channels.
- A scale tells of a channel what it multiplies. Where a layer reads the channel past all scales (a shortcut that takes
  a stream before a block's first norm), the channel has no score and stays; the report names it.
- The shift of a channel that goes is zero in the masked network too, so that masked and sliced networks agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from fxprune.errors import InputError, ModelError, check_number, is_real
from fxprune.groups.channels import ChannelGroup
from fxprune.io.text import some
from fxprune.methods.learner import Hooks, Outcome, Parameters, Site
from fxprune.methods.registry import register
from fxprune.methods.state import ModelState, Scores


@register("slimming")
@dataclass(frozen=True)
class Slimming:
    """L1 on the scales of norm layers while the network trains; small ones go (Liu et al. 2017); needs data.

    Args:
        strength: lambda of eq. 1; the paper takes 1e-4 for VGG, 1e-5 for ResNet and DenseNet.
        gamma: the scales' value before training; the paper trains from scratch with 0.5. None: as they are, which
            frozen ones stay in any case.
        percent: prune this share of all channels by one global threshold, as the paper does, instead of a budget. Of
            ``N`` channels ``N - int(N * percent) - 1`` stay (the threshold itself goes) where ``min_channels`` and
            ``max_ratio`` allow it.
        inner_only: leave channels alone that more than one layer makes, such as those of a residual stream.
    """

    strength: float = 1e-4
    gamma: float | None = None
    percent: float | None = None
    inner_only: bool = False

    def __post_init__(self) -> None:
        check_number("strength", self.strength)
        if self.gamma is not None:
            check_number("gamma", self.gamma)
        if self.percent is not None and not (is_real(self.percent) and 0 <= self.percent < 1):
            raise InputError(f"percent={self.percent!r} is no share: pass one in [0, 1), such as 0.7.")

    @property
    def decides(self) -> bool:
        """Whether ``percent`` takes the place of a budget."""
        return self.percent is not None

    def attach(self, site: Site) -> Hooks:
        return _Run(self, site)


class _Run(Hooks):
    for_any_budget = True

    def __init__(self, options: Slimming, site: Site):
        self._options, self._site = options, site
        self._scales, self._unscaled = site.norm_scales(), site.unscaled()
        self._groups = [g for g in site.graph.prunable if not options.inner_only or site.producers(g) == 1]
        if not self._scales:
            raise ModelError("Network Slimming needs norm layers with a scale, and the model has none.")
        if options.gamma is not None:
            with torch.no_grad():
                for scale in self._scales.values():
                    if scale.requires_grad:
                        scale.fill_(options.gamma)
        site.select(site.for_groups(self._scores(self._groups, self._state())))  # whether the budget can be met

    def after_backward(self) -> None:
        moved = [(scale.grad, scale.detach()) for scale in self._scales.values() if scale.grad is not None]
        if moved:
            gradients, scales = zip(*moved, strict=True)
            torch._foreach_add_(gradients, torch._foreach_sign(scales), alpha=self._options.strength)

    def trained(self) -> Parameters:
        return self._site.model.parameters()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trained(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def schedule(self, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler | None:
        return MultiStepLR(optimizer, sorted({max(1, epochs // 2), max(1, epochs * 3 // 4)}))

    def alive(self) -> npt.NDArray[np.bool_] | None:
        scores = self._scores(self._groups, self._state())
        mean = np.mean([s.mean() for s in scores.values()]) if scores else 0.0
        result = self._site.graph.everything()
        for group in self._groups:
            if group.name in scores:
                result[group.channels] = scores[group.name] > 0.01 * mean
        return result

    def _state(self) -> ModelState:
        return ModelState(self._site.graph, self._site.tensors(), unscaled=lambda: self._unscaled)

    def _scores(self, groups: Iterable[ChannelGroup], state: ModelState) -> dict[str, Scores]:
        scored = {group.name: state.norm_scales(group, "mean") for group in groups}
        return {name: scores for name, scores in scored.items() if scores is not None}

    def outcome(self) -> Outcome:
        options, state = self._options, self._state()
        scores = self._scores(self._groups, state)
        threshold = None
        if options.percent is not None and scores:
            everything = np.sort(np.concatenate([s.reshape(-1) for s in scores.values()]))
            threshold = float(everything[int(len(everything) * options.percent)])
        return Outcome(self._site.for_groups(scores), threshold=threshold, notes=(*state.notes, *self._untrained()))

    def _untrained(self) -> tuple[str, ...]:
        """Of scales that no gradient reaches the penalty makes none smaller; they are compared all the same."""
        frozen = [name for name, scale in self._scales.items() if not scale.requires_grad]
        return (f"frozen scales stay as they are: {some(frozen)}",) if frozen else ()
