"""A training under way: what ``fxprune.attach`` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import InputError
from fxprune.groups.channels import ChannelGraph, ChannelGroup
from fxprune.groups.cost import Keep
from fxprune.groups.flow import ADDED, flows, producers, readers, unscaled
from fxprune.methods.learner import Hooks, Outcome, Site
from fxprune.methods.registry import checked_outcome
from fxprune.methods.state import Scores
from fxprune.recording.checks import check_finite
from fxprune.rewriting import Hypernetworks, classifiers, insert_gates, insert_hypernetworks
from fxprune.selection.budget import Budget, remaining
from fxprune.training.batches import Gaussian, Loss, distance

DIVERGED = "The training diverged: lower the learning rate, or clip the gradients."


class Training:
    """A model to train, and what a method does around every step.

    ``model``: a copy of the user's model, as a graph, in train mode; train its parameters that require gradients.
    ``method``: what the class of the method is called. ``settings``: what else decides what
    is learned, by name, where it is a plain value.

    In several processes wrap ``model`` in ``DistributedDataParallel``, and call everything here in each of them.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        hooks: Hooks,
        graph: ChannelGraph,
        record: Mapping[str, Any],
        reference: Callable[[], fx.GraphModule],
        finish: Callable[[fx.GraphModule, Outcome], fx.GraphModule],
        method: str,
        settings: Mapping[str, str],
    ):
        self.model, self.graph, self.method, self.settings = model, graph, method, settings
        self.hooks, self.record = hooks, record
        self.notes: list[str] = []
        self._reference, self._finish = reference, finish
        self._watched = [*model.parameters()]
        self._finished = False

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the method's paper, of what the method trains."""
        return self.hooks.optimizer()

    def loss(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward()`` on, from the task's loss."""
        return self.hooks.loss(loss)

    def after_backward(self) -> None:
        """Call when the gradients are complete: after unscaling, before clipping and the optimizer's step.

        Raises:
            InputError: ``model`` has other parameters than it had.
        """
        self._check_watched()
        self.hooks.after_backward()

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Call after the optimizer's step; with the optimizer, for methods that need its learning rate.

        Not after a step that ``GradScaler`` left out, which its scale shows: it falls.

        Raises:
            InputError: the method needs the optimizer.
        """
        self.hooks.after_step(optimizer)

    @property
    def done(self) -> bool:
        """Whether the method has what it wants, so that the training may stop."""
        return self.hooks.done()

    def after_epoch(self, score: float) -> None:
        """Call after an epoch, if you like, with its validation accuracy or another figure that is higher if better.

        Methods that keep the best of several epochs need it; without it they take the last.
        """
        self.hooks.after_epoch(score)

    def label_free(self, steps: int, batch: int, seed: int) -> tuple[Gaussian, Loss]:
        """Random inputs with the dense model's own output on them as the target, and the loss that compares them."""
        self.notes.append(
            f"learned without labels: on {steps} batches of {batch} Gaussian inputs, against the dense model's output"
        )
        return Gaussian(self.record, self._reference(), steps, batch, seed), distance

    def finish(self) -> fx.GraphModule:
        """The pruned module, as ``fxprune.prune`` returns it; ``model`` is of no use afterwards.

        Raises:
            InputError: called a second time, or ``model`` has other parameters than it had, or the method says what
                cannot be.
            BudgetError, ModelError, VerificationError: see ``fxprune.prune``.
        """
        if self._finished:
            raise InputError("finish() was called before. Attach again to train once more.")
        self._check_watched()
        check_finite(self.model, DIVERGED)
        outcome = checked_outcome(self.method, self.hooks.outcome(), self.graph)
        result = self._finish(self.model, replace(outcome, notes=(*self.notes, *outcome.notes)))
        self._finished = True
        return result

    def _check_watched(self) -> None:
        """The method holds the parameters themselves: of others it would know nothing, and prune by the old ones."""
        here = [*self.model.parameters()]
        if len(here) != len(self._watched) or any(a is not b for a, b in zip(here, self._watched, strict=True)):
            raise InputError(
                "The parameters of learner.model are no longer those that attach() made, which the method watches: "
                "load_state_dict(assign=True), fully_shard and parametrizations put others in their place. Load values "
                "into those that are there (load_state_dict does), and train with DistributedDataParallel."
            )


def site_of(
    model: fx.GraphModule,
    graph: ChannelGraph,
    budget: Budget,
    select: Callable[[Sequence[Scores | None]], Keep],
    seed: int,
) -> Site:
    """What a learner sees of a model that is to be trained."""
    steps = flows(model, graph)
    makes, read = producers(steps), readers(model, graph, steps)

    def count(group: ChannelGroup) -> int:
        return max((makes.get(int(c), 0) for c in group.channels.reshape(-1)), default=0)

    def reading(group: ChannelGroup) -> tuple[tuple[str, int], ...] | None:
        found = {read.get(int(c)) for c in group.channels.reshape(-1)}
        places = found.pop()
        return None if found or places is None else tuple(sorted(places))

    named = dict(model.named_parameters(remove_duplicate=False))
    return Site(
        graph,
        model,
        named,
        count,
        reading,
        lambda groups: insert_gates(model, graph, groups),
        lambda embedding, ordinary=(), shared=(): insert_hypernetworks(model, graph, embedding, seed, ordinary, shared),
        budget.ratio,
        lambda keep: remaining(graph, budget, keep),
        select,
        seed,
        lambda: unscaled(model, graph, steps),
        lambda: classifiers(model, graph),
        _idle(model, named),
    )


def _idle(model: fx.GraphModule, named: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the parameters that no node has or is given."""
    held = [attrgetter(str(node.target))(model) for node in model.graph.nodes if node.op in ("call_module", "get_attr")]
    used = {id(p) for found in held for p in (found.parameters() if isinstance(found, nn.Module) else (found,))}
    return frozenset(name for name, parameter in named.items() if id(parameter) not in used)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a trained model without what learners have put in, and with the weights they generate."""
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(ADDED)}
    for part in model.children():
        if isinstance(part, Hypernetworks):
            state |= part.weights()
    return state
