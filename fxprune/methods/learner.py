"""What a learner is given, and what it does around every step of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fxprune.groups.channels import ChannelGraph, ChannelGroup
from fxprune.methods.state import Scores

Parameters = Iterable[nn.Parameter]


@dataclass(frozen=True)
class Gates:
    """One gate per channel of some groups, all in one parameter ``values [gates]``, 1 at first.

    They are of the wider of float32 and the model's dtype.

    Each path from the layer that makes a channel to a layer that reads it passes its gate exactly once, after the last
    op on it that holds parameters of the channel itself (a norm, a depthwise convolution). A gate at 0 removes all
    that the channel does downstream.
    """

    values: nn.Parameter
    index: Mapping[str, Tensor]

    def of(self, group: ChannelGroup) -> Tensor:
        """The gates of a group, ``[blocks, size]``."""
        return self.values[self.index[group.name].to(self.values.device)]


@dataclass(frozen=True)
class Latents:
    """One latent number per channel, all in one parameter ``values``, from which the weights are generated.

    They are of the wider of float32 and the model's dtype.

    ``index``: group -> the places in ``values``, ``[blocks, size]``; groups that no generated weight runs through are
    left out. ``plain``: names of the weights that stay ordinary parameters although a layer contracts them.
    """

    values: nn.Parameter
    index: Mapping[str, Tensor]
    plain: tuple[str, ...] = ()

    def of(self, group: ChannelGroup) -> Tensor:
        """The latents of a group, ``[blocks, size]``; every block is a latent vector."""
        return self.values[self.index[group.name].to(self.values.device)]


@dataclass(frozen=True)
class Site:
    """Where a learner attaches.

    ``graph``: the channels. ``model``: what will be trained, a copy of the user's. ``parameters``: those of the
    original model by name. ``producers``: how many layers make a group's channels; more than one for a residual stream.
    ``readers``: the places (name, dim) where weights of layers read a group's channels; None where something else takes
    them up (a product of activations, a sum over channels), or where one cannot tell. ``insert_gates(groups)`` puts
    gates into ``model``. ``insert_hypernetworks(embedding, ordinary, shared)`` puts hypernetworks in the place of the
    weights of ``model``, but for those that are named in ``ordinary``; groups that are ``shared`` have the latents of
    the first of them. ``target``: the budget, a ratio of the dense model; ``remaining(keep)``: the same ratio of a
    choice of channels, a boolean per channel. ``select(scores)``: the choice for these scores (see ``Outcome``) that
    meets it. ``unscaled``: see ``ModelState``. ``classifiers``: names of the weights ``[classes, channels]`` of linear
    layers whose outputs the network returns and no layer reads. ``idle``: names of the parameters that the recorded
    network does not use, so that no training changes them.
    """

    graph: ChannelGraph
    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    producers: Callable[[ChannelGroup], int]
    readers: Callable[[ChannelGroup], tuple[tuple[str, int], ...] | None]
    insert_gates: Callable[[Sequence[ChannelGroup]], Gates]
    insert_hypernetworks: Callable[..., Latents]
    target: float
    remaining: Callable[[npt.NDArray[np.bool_]], float]
    select: Callable[[Sequence[Scores | None]], npt.NDArray[np.bool_]]
    seed: int = 0
    unscaled: Callable[[], frozenset[int]] = frozenset
    classifiers: Callable[[], tuple[str, ...]] = tuple
    idle: frozenset[str] = frozenset()

    def for_groups(self, scores: Mapping[str, Scores]) -> list[Scores | None]:
        """Scores by the names of their groups as one per group of the graph, None where there are none."""
        return [scores.get(group.name) for group in self.graph.groups]

    def tensors(self) -> dict[str, Tensor]:
        """What ``ModelState`` reads: the parameters, and the buffers, of which some are weights or scales too."""
        return {**dict(self.model.named_buffers(remove_duplicate=False)), **self.parameters}

    def norm_scales(self) -> dict[str, nn.Parameter]:
        """The scales of the norm layers whose channels are known, by name."""
        named = {name: p for name, p in self.parameters.items() if name in self.graph.norm_scales}
        return {name: p for name, p in named.items() if name in self.graph.by_name and self.graph.by_name[name].labels}


@dataclass(frozen=True)
class Outcome:
    """What a learner says in the end.

    ``scores``: for every group of the graph ``[blocks, size]``, or None to leave it alone; compared as they are.
    ``threshold``: the largest score that goes, for methods that say so themselves; None: by the budget.
    ``reinitialise``: the weights of the smaller network are drawn anew. ``notes``: for the report.
    """

    scores: Sequence[Scores | None]
    threshold: float | None = None
    reinitialise: bool = False
    notes: tuple[str, ...] = ()


class Hooks:
    """One training with one learner. What a learner does not need it leaves as it is here.

    ``for_any_budget``: nothing is asked of the budget until the end, so that a checkpoint serves others too.
    """

    for_any_budget: ClassVar[bool] = False

    def begins(self, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        """Before the first step of fxprune's own loop, which is to take so many epochs."""

    def loss(self, loss: Tensor) -> Tensor:
        """The loss to differentiate, from the loss of the task."""
        return loss

    def after_backward(self) -> None:
        """When gradients are complete: unscaled, reduced over processes, before clipping and the step."""

    def after_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        """After the optimizer's step; a training loop may keep its optimizer to itself unless the method needs it."""

    def after_epoch(self, accuracy: float | None) -> None:
        """After every epoch, with the validation accuracy (or minus the loss, where there is no accuracy)."""

    def trained(self) -> Parameters:
        """What the optimizer is given."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the method's paper."""
        raise NotImplementedError

    def schedule(self, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler | None:
        """The learning rate schedule of the method's paper, stepped once per epoch."""
        return None

    def done(self) -> bool:
        """Whether the training is over before its last epoch; asked after every step."""
        return False

    def alive(self) -> npt.NDArray[np.bool_] | None:
        """Per channel, whether it still counts: what the progress bar computes the remaining MACs from."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beyond the model and the optimizer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up ``state_dict()``."""

    def outcome(self) -> Outcome:
        """What is to be pruned."""
        raise NotImplementedError
