"""DHP: differentiable meta pruning via hypernetworks (Li et al., ECCV 2020).

Every channel has a latent number; a hypernetwork of its own generates each weight from the latents of its output and
input channels. Training minimises ``loss + strength * sum |z|`` by proximal gradient: after every step of the optimizer
the latents are shrunk towards zero by ``strength`` times the learning rate. The search ends when the channels whose
latents are not small leave few enough MACs; the channels with small latents go, and the weights that were generated
become ordinary parameters. A latent of zero does not make a weight of zero, since hypernetworks have biases: accuracy
falls at the cut. What is returned keeps what it has learned, and the paper's converging stage is to fine-tune it, with
the schedule of a training from scratch.

As in the released code for ResNets, the classifier is an ordinary layer, and the channels it reads (the last stage's)
stay; ``classifier="cut"`` is its code for MobileNets, ``"generated"`` what it has not: a classifier that a hypernetwork
generates.

The latent vectors belong to the groups of channels that the analysis finds, which is the paper's sharing (of residual
streams, say) without its cases. Where the code shares more, as upsamplers do with the stream before them, ``shared=``
says so. The paper trains from scratch, and so does this: generated weights start at random,
whatever the model holds there; biases and norms start as they are given. The latents of what may not be cut are trained
and not shrunk.

Deviations from the released code: its stop rule is one-sided and may leave more than the target, so ``limit`` ends the
search only, and the channels that go are then chosen by the same latents until the budget holds; the ``minimum`` of
channels holds as far as the budget can be met with it; the learning rate of the soft threshold is that of the step, not
that of the start of the epoch; the fan-in of a transposed convolution is the number of products that reach an output;
blocks of channels that keep equal counts (attention heads) are latent vectors of their own and count by the mean of the
latents of equal rank; of latents that are equally small only the first count towards the minimum.

Hypernetworks have 11 (3x3) to 26 (1x1) times the parameters of the weights they generate; their intermediate tensors
are not kept for the backward pass. What this takes is measured in ``model_zoo/results/dhp_overhead.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from fxprune.errors import InputError, ModelError, check_count, check_number
from fxprune.groups.channels import ChannelGraph, ChannelGroup
from fxprune.io.text import some
from fxprune.methods.learner import Hooks, Outcome, Parameters, Site
from fxprune.methods.registry import register
from fxprune.methods.state import Scores


@register("dhp")
@dataclass(frozen=True)
class DHP:
    """Weights generated from latent vectors that shrink as the network trains (Li et al. 2020); needs data.

    Args:
        strength: lambda, of the L1 norm of the latents; the paper takes 1e-4 to 3e-4 for ResNets on CIFAR with SGD at
            0.1, and 0.1 for restoration with Adam at 1e-4.
        threshold: a channel counts while its latent is at least as large.
        minimum: so many channels of every latent vector count in any case; a vector with no more is shrunk no further.
        limit: the search is over when what counts leaves at most this much more than the budget, as a share of the
            dense model. None: it goes on to its last epoch.
        every: steps from one look at that to the next.
        embedding: size of a hypernetwork's inner vectors, ``m``.
        classifier: of linear layers whose outputs the network returns: ``"kept"``, ordinary layers, and what they read
            stays; ``"cut"``, ordinary layers, and what they read may go; ``"generated"``, weights like all others.
        shared: layers, by name, whose channels have one latent vector: a list of such lists. Of SRResNet or EDSR of the
            paper ``[["head", "tail.0", "tail.2"]]``, the stream and the upsamplers. At the edge of the budget one of
            them may keep a channel more.
    """

    strength: float = 2e-4
    threshold: float = 5e-3
    minimum: int = 4
    limit: float | None = 0.02
    every: int = 100
    embedding: int = 8
    classifier: Literal["kept", "cut", "generated"] = "kept"
    shared: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        check_number("strength", self.strength)
        if self.limit is not None:
            check_number("limit", self.limit)
        if not check_number("threshold", self.threshold):
            raise InputError(f"threshold={self.threshold} must be positive: latents are compared with it.")
        for name in ("minimum", "every", "embedding"):
            check_count(name, getattr(self, name))
        if not _is_list(self.shared) or not all(_is_list(names) and names for names in self.shared):
            raise InputError(f"shared={self.shared!r} must be a list of lists of layers: [['head', 'tail.0']].")
        if self.classifier not in (known := get_args(get_type_hints(DHP)["classifier"])):
            raise InputError(f"classifier={self.classifier!r} is unknown. Known: {', '.join(known)}.")

    def attach(self, site: Site) -> Hooks:
        return _Run(self, site)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def soft_threshold(values: Tensor, amount: Tensor | float) -> Tensor:
    """``sgn(z) max(|z| - amount, 0)``, the proximal operator of ``amount * |z|``."""
    return values.sign() * (values.abs() - amount).clamp_min(0)


def counted(latents: Scores, threshold: float, minimum: int) -> npt.NDArray[np.bool_]:
    """The channels of a group that count, ``[blocks, size]`` like its latents, as many in every block.

    Those with ``|z| >= threshold``, and the largest up to the minimum; of several blocks the ranks with such a mean.
    """
    sizes = np.abs(latents)
    order = np.argsort(-sizes, axis=1, kind="stable")
    ranks = np.take_along_axis(sizes, order, axis=1).mean(0)
    mask = np.zeros(latents.shape, dtype=bool)
    np.put_along_axis(mask, order[:, : max(minimum, int((ranks >= threshold).sum()))], True, axis=1)
    return mask


class _Run(Hooks):
    def __init__(self, options: DHP, site: Site):
        self._options, self._site = options, site
        graph = site.graph
        self._ordinary = () if options.classifier == "generated" else site.classifiers()
        shared = [[_made_by(graph, name) for name in names] for names in options.shared]
        for names, (first, *others) in zip(options.shared, shared, strict=True):
            if any(other.channels.shape != first.channels.shape for other in others):
                sizes = ", ".join(f"{n} {g.blocks} x {g.size}" for n, g in zip(names, (first, *others), strict=True))
                raise InputError(f"shared: layers of one latent vector have equally many channels, and here: {sizes}.")
        kept = set[int]()
        if options.classifier == "kept":
            read = [f for name in self._ordinary for f in graph.by_name[name].labels if f.dim == 1]
            kept = {int(c) for factor in read for c in np.unique(factor.ids)}
        self._latents = site.insert_hypernetworks(options.embedding, self._ordinary, shared)
        generated = [g for g in graph.prunable if g.name in self._latents.index]
        self._groups = [g for g in generated if kept.isdisjoint(g.channels.reshape(-1).tolist())]
        if not self._groups:
            if generated:
                raise ModelError(
                    f"The only channels that may be cut are those that {' and '.join(self._ordinary)} "
                    f"{'reads' if len(self._ordinary) == 1 else 'read'}, and what "
                    'the classifier reads stays. DHP(classifier="cut") lets it go.'
                )
            raise ModelError(
                "DHP generates the weights of convolutions and linear layers, and this model has none between channels "
                "that may be cut whose weights are trained. Are they frozen (requires_grad=False)?"
            )
        site.select(self._scores([np.ones(g.channels.shape) for g in self._groups]))  # whether the budget can be met
        rows = [row for group in self._groups for row in self._latents.index[group.name]]
        vectors = [*{tuple(row.tolist()): row for row in rows}.values()]
        self._places = torch.cat(vectors)
        self._vector = torch.cat([torch.full_like(row, number) for number, row in enumerate(vectors)])
        self._count = len(vectors)
        self._steps, self._done = 0, False

    def trained(self) -> Parameters:
        return self._site.model.parameters()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trained(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def schedule(self, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler | None:
        return MultiStepLR(optimizer, [max(1, epochs // 2)])

    def after_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._shrink(self._options.strength * self._rate(optimizer))
        self._steps += 1
        if self._options.limit is not None and self._steps % self._options.every == 0:
            self._done = self._ratio() - self._site.target <= self._options.limit

    def done(self) -> bool:
        return self._done

    def _rate(self, optimizer: torch.optim.Optimizer | None) -> float:
        """The learning rate that the latents have just been trained with."""
        if optimizer is None:
            raise InputError("DHP shrinks by the learning rate: call after_step(optimizer) with your optimizer.")
        for group in optimizer.param_groups:
            if any(p is self._latents.values for p in group["params"]):
                return float(group["lr"])
        raise InputError("The optimizer does not train the latents: give it all of training.model.parameters().")

    @torch.no_grad()
    def _shrink(self, amount: float) -> None:
        """Soft-threshold every latent vector of which more than the minimum counts."""
        values = self._latents.values
        self._places, self._vector = self._places.to(values.device), self._vector.to(values.device)
        places, vector = self._places, self._vector
        z = values[places]
        large = (z.abs() >= self._options.threshold).to(z.dtype)
        counts = z.new_zeros(self._count).index_add_(0, vector, large)
        values[places] = soft_threshold(z, amount * (counts > self._options.minimum).to(z.dtype)[vector])

    def alive(self) -> npt.NDArray[np.bool_]:
        result = self._site.graph.everything()
        for group, z in zip(self._groups, self._read(), strict=True):
            result[group.channels] = counted(z, self._options.threshold, self._options.minimum)
        return result

    def _read(self) -> list[Scores]:
        values = self._latents.values.detach().double().cpu()
        return [values[self._latents.index[group.name]].numpy() for group in self._groups]

    def _ratio(self) -> float:
        return self._site.remaining(self.alive())

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._done = state["steps"], state["done"]

    def outcome(self) -> Outcome:
        latents = self._read()
        most = max(float(np.abs(z).max()) for z in latents)
        # The minimum goes after everything else.
        scores = [np.abs(z) + most * counted(z, math.inf, self._options.minimum) for z in latents]
        ratio, target = self._ratio(), self._site.target
        end = "stopped by its rule" if self._done else "not stopped by its rule"
        notes = [
            f"search {end} after {self._steps} steps: latents of at least {self._options.threshold:g} leave "
            f"{ratio:.2%} of the dense model, the budget is {target:.2%}"
        ]
        if ratio - target > (self._options.limit or 0):
            notes.append("channels with larger latents had to go, too: search for longer, or with a larger strength")
        if self._latents.plain:
            notes.append(f"weights that are not generated: {', '.join(self._latents.plain)}")
        if self._ordinary:
            stays = "and what it reads stays" if self._options.classifier == "kept" else "and what it reads may go"
            notes.append(f"the classifier is an ordinary layer, {stays}: {', '.join(self._ordinary)}")
        return Outcome(self._scores(scores), notes=tuple(notes))

    def _scores(self, scores: Sequence[Scores]) -> list[Scores | None]:
        """For every group of the graph, of those of ``self._groups``."""
        named = {group.name: score for group, score in zip(self._groups, scores, strict=True)}
        return self._site.for_groups(named)


def _made_by(graph: ChannelGraph, name: str) -> ChannelGroup:
    """The group of the channels that a layer makes.

    Raises:
        InputError: there is no such layer with a weight, or it makes channels of several groups or none.
    """
    found = [g for g in graph.prunable if any((m.name, m.dim) == (f"{name}.weight", 0) for m in g.members)]
    if len(found) != 1:
        layers = dict.fromkeys(m.name.removesuffix(".weight") for g in graph.prunable for m in g.members if m.dim == 0)
        raise InputError(
            f"shared: {name!r} is no layer whose output channels are one group that may be cut. There are: "
            f"{some([*layers])}."
        )
    return found[0]
