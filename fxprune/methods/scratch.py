"""Pruning from Scratch (Wang et al., AAAI 2020).

The weights stay as they were initialised; only one gate per channel is learned, under the task's loss and a
regulariser that pulls the mean gate towards ``sparsity``. The gates give the number of channels of every layer, by
bisection to the budget; the smaller network is then initialised anew and trained from the start.

Deviations from the released code: channels that several layers share have gates too, unless ``inner_only``; a gate
comes after the last norm a channel passes (MobileNets: after the depthwise convolution's), so that a gate at zero
removes the channel's shift as well; every layer keeps at least one channel.

Clamping leaves many gates at exactly 0 or 1, so how ties are broken decides widths. Here, of gates that are equal over
the whole network, every group gives the same share of its channels: they go in the order of the share of their group
that goes before them, then of the groups. Within a group the first channels go first, as many in each of its blocks.
With ``round_to`` multiples of channels go together, in the same order. The released code leaves it to ``topk``, which
may empty a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fxprune.errors import InputError, check_count, check_number, is_real
from fxprune.methods.learner import Hooks, Outcome, Parameters, Site
from fxprune.methods.registry import register


@register("scratch")
@dataclass(frozen=True)
class Scratch:
    """Learn gates over random weights, take the widths, initialise anew (Wang et al. 2020); data are optional.

    Without data the gates are learned without labels: on Gaussian inputs, against the dense network's own output.

    Args:
        strength: of the regulariser ``(mean |gate| - sparsity)^2``; the paper's code takes 0.5 for CIFAR, 0.05 for
            ImageNet.
        sparsity: its target ``r``; 0.2 and 0.5 there.
        lr: of Adam on the gates.
        steps: without data, how many steps of ``batch`` inputs.
        batch: see ``steps``.
        inner_only: leave channels alone that more than one layer makes.
        factory: makes the network at a width, ``factory(1.25)``; needed for ``expand``.
        expand: search in a network that is wider by this factor. Budgets stay relative to the model that is given.
    """

    strength: float = 0.5
    sparsity: float = 0.5
    lr: float = 0.01
    steps: int = 100
    batch: int = 8
    inner_only: bool = False
    factory: Callable[[float], nn.Module] | None = None
    expand: float = 1.0
    label_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("strength", "lr", "expand"):
            check_number(name, getattr(self, name))
        for name in ("steps", "batch"):
            check_count(name, getattr(self, name))
        if not is_real(self.sparsity) or not 0 < self.sparsity <= 1:
            raise InputError(f"sparsity={self.sparsity!r} is the target of the mean gate: pass a number in (0, 1].")
        if not self.expand >= 1:
            raise InputError(f"expand={self.expand} must be at least 1.")
        if self.factory is not None and not callable(self.factory):
            raise InputError(f"factory= is a {type(self.factory).__name__}; pass a function that makes the network.")
        if self.expand > 1 and self.factory is None:
            raise InputError(
                "expand= needs factory=, a function that makes the network at a width, such as "
                "lambda width: vgg16_bn(width=width)."
            )

    def wider(self) -> nn.Module | None:
        """The network to search in, where that is not the one that is given.

        Raises:
            InputError: the factory made something else.
        """
        if self.factory is None or self.expand == 1:
            return None
        made: object = self.factory(self.expand)
        if not isinstance(made, nn.Module):
            raise InputError(f"factory= made a {type(made).__name__}; it must make the network at a width.")
        return made

    def attach(self, site: Site) -> Hooks:
        return _Run(self, site)


def scratch_b_epochs(epochs: int, kept: float) -> int:
    """Epochs that cost what ``epochs`` of the dense network do, for one with ``kept`` of its MACs (Scratch-B).

    ``int(epochs / kept)``: 160 epochs at half the MACs become 320.

    Raises:
        InputError: ``kept`` is outside (0, 1].
    """
    if not 0 < kept <= 1:
        raise InputError(f"kept={kept} is no ratio of MACs: pass a number in (0, 1].")
    return int(epochs / kept + 1e-9)


class _Run(Hooks):
    for_any_budget = True

    def __init__(self, options: Scratch, site: Site):
        self._options, self._site = options, site
        site.model.requires_grad_(False)
        self._groups = [g for g in site.graph.prunable if not options.inner_only or site.producers(g) == 1]
        if not self._groups:
            raise InputError("No channel group has a single producing layer: pass inner_only=False.")
        site.select(site.for_groups({g.name: np.ones(g.channels.shape) for g in self._groups}))  # can it be met?
        self._gates = site.insert_gates(self._groups)
        self._best: tuple[float, Tensor] | None = None

    def loss(self, loss: Tensor) -> Tensor:
        return loss + self.regulariser()

    def regulariser(self) -> Tensor:
        """``strength * (mean |gate| - sparsity)^2``, one mean over all gates."""
        return self._options.strength * (self._gates.values.abs().mean() - self._options.sparsity) ** 2

    def after_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        with torch.no_grad():
            self._gates.values.clamp_(0, 1)

    def after_epoch(self, accuracy: float | None) -> None:
        """The released code's snapshot: sparse enough, and better than every earlier one."""
        values = self._gates.values.detach()
        sparse = float((values != 0).float().mean()) <= self._options.sparsity
        if accuracy is not None and sparse and (self._best is None or accuracy > self._best[0]):
            self._best = (accuracy, values.cpu().clone())

    def trained(self) -> Parameters:
        return [self._gates.values]

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.trained(), lr=self._options.lr)

    def alive(self) -> npt.NDArray[np.bool_] | None:
        result = self._site.graph.everything()
        for group in self._groups:
            result[group.channels] = (self._gates.of(group) != 0).cpu().numpy()
        return result

    def state_dict(self) -> dict[str, Any]:
        return {} if self._best is None else {"accuracy": self._best[0], "gates": self._best[1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best = (state["accuracy"], state["gates"].cpu()) if state else None

    def outcome(self) -> Outcome:
        values = self._gates.values.detach().cpu() if self._best is None else self._best[1]
        gates = {g.name: values[self._gates.index[g.name]].double().numpy() for g in self._groups}
        which = "the last epoch" if self._best is None else "the best epoch that was sparse enough"
        note = f"gates of {which}: mean {float(values.mean()):.2f}, {float((values == 0).float().mean()):.0%} at zero"
        return Outcome(self._site.for_groups(gates), reinitialise=True, notes=(note,))
