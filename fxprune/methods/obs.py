"""What is lost for good: the error that is left when a channel goes and all its readers are refitted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fxprune.groups.channels import ChannelGroup
from fxprune.methods.registry import Need, Normalize, register
from fxprune.methods.state import Gate, ModelState, Read, Scores

_RIDGE = 1e-3  # of every input's mean square
_ROUNDS = 32  # so many for a group, or one per channel


@register("obs")
@dataclass(frozen=True)
class OBS:
    """Error of the outputs that refitting all readers of a channel leaves, by its cost; needs data, of which no
    targets.

    For a weight ``W`` that reads inputs of Gram matrix ``C`` the error is ``tr(W_c^T ((C^-1)_cc)^-1 W_c)``, ``W_c`` the
    rows of the channel (optimal brain surgeon: Hassibi and Stork 1993; for structures Kurtic et al. 2023, eq. 4). It is
    summed over all weights that read the channel, weighed by how much the network's outputs depend on theirs, so
    groups compare. What a bias takes up, as all of a channel that is constant, is no error; of a weight that the
    refit leaves alone, as one that something else reads too, the error is all that its inputs gave. The channels of
    a group are taken round by round, the lowest first, and ``C^-1`` and ``W`` follow: a channel whose twin has gone
    counts in full. Channels that no weight reads, as queries and keys, are refitted by none: they count with the
    error of the outputs that their going makes, to first order, those that went before included. Of a pair of query
    and key channels that is the energy of ``q_c k_c^T``, every logit weighed by how much the outputs depend on it.
    Where gradients tell nothing of them they stay. The fewer data there are for the inputs of a weight, the less
    its refit is trusted: a ridge of as much as there are inputs per independent position. Slopes hold for small
    changes, so when half of a group has gone the outputs' error is measured, with its readers refitted, and the
    scores of the group are scaled to that. Errors are divided by what goes with the channel of what the budget counts:
    MACs, parameters, or predicted milliseconds.
    ``by_cost=False``: the error itself.
    """

    by_cost: bool = True
    needs: ClassVar[frozenset[Need]] = frozenset({"reads"})
    normalize: ClassVar[Normalize] = "none"

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        reads = state.measured.reads
        parts: list[_Part] = [p for r in reads if isinstance(r, Read) for p in _parts(r, group)]
        left = group.channels.reshape(-1).tolist()
        unread = set(left).difference(*[part.places for part in parts])
        if unread:
            gates = [r for r in reads if isinstance(r, Gate) and unread.issubset(r.channels.tolist())]
            if not gates:
                return None
            parts.append(_Gated.of(gates[0], unread))
        scores: dict[int, float] = {}
        at_once, least = max(1, len(left) // _ROUNDS), 0.0
        half, expected, scale = len(left) // 2, 0.0, 1.0
        while left:
            losses = sum((part.losses(left) for part in parts), np.zeros(len(left)))
            going = [(left[index], float(losses[index])) for index in np.argsort(losses, kind="stable")[:at_once]]
            for channel, loss in going:
                least = scores[channel] = max(least, loss)  # none comes before one that went earlier
                expected += loss
            left = [channel for channel in left if channel not in scores]
            for part in parts if left else ():
                part.remove([channel for channel, _ in going])
            if left and len(left) <= half:
                error = _measured(parts, state) if expected > 0 else 0.0
                # dead channels go first and tell nothing: then half of what is left is waited for
                scale, half = (error / expected, 0) if error else (1.0, len(left) // 2)
        result = scale * np.array([scores[channel] for channel in group.channels.reshape(-1).tolist()])
        return result.reshape(group.channels.shape) / (_cost(group, state) if self.by_cost else 1.0)


def _measured(parts: Sequence[_Part], state: ModelState) -> float:
    """The outputs' error without the channels that went, 0 where it cannot be known."""
    if state.measured.trial is None:
        return 0.0
    weights: dict[str, Tensor] = {}
    closed: dict[str, Any] = {}
    for part in parts:
        part.tell(weights, closed)
    return state.measured.trial(weights, closed)


def _cost(group: ChannelGroup, state: ModelState) -> float:
    """What a channel of the group costs: a share of the whole."""
    keep = state.graph.everything()
    gone = group.channels[:, : max(1, group.size // 2)]
    keep[gone] = False
    saved = 1.0 - state.share(keep)
    return max(saved, 1e-9) / gone.size


class _Part(Protocol):
    """Something that reads channels. ``places``: channel -> what it is there."""

    @property
    def places(self) -> Mapping[int, Any]: ...

    def losses(self, channels: Sequence[int]) -> Scores:
        """Per channel what its going costs now, ``[n]``."""

    def remove(self, channels: Sequence[int]) -> None:
        """These are gone."""

    def tell(self, weights: dict[str, Tensor], closed: dict[str, Any]) -> None:
        """Note for a trial what becomes of the network without what went."""


@dataclass
class _Refitted:
    """One matrix that reads channels, and what is left of it while they go.

    ``inverse [K, K]``: of the Gram matrix. ``weight [K, O]``: in units of the network's outputs. ``places``: channel ->
    its inputs. ``read``, ``index``: of which weight it is, which of its matrices. ``gone``: inputs of those that went.
    """

    inverse: Tensor
    weight: Tensor
    places: dict[int, list[int]]
    read: Read
    index: int
    gone: list[int] = field(default_factory=list)

    def losses(self, channels: Sequence[int]) -> Scores:
        result = np.zeros(len(channels))
        by_size: dict[int, list[int]] = defaultdict(list)
        for number, channel in enumerate(channels):
            if channel in self.places:
                by_size[len(self.places[channel])].append(number)
        for numbers in by_size.values():
            rows = torch.tensor([self.places[channels[n]] for n in numbers], device=self.inverse.device)
            blocks = self.inverse[rows.unsqueeze(2), rows.unsqueeze(1)]  # [n, size, size]
            own = self.weight[rows]  # [n, size, O]
            result[numbers] = (own * torch.linalg.solve(blocks, own)).sum((1, 2)).cpu().numpy()
        return result

    def remove(self, channels: Sequence[int]) -> None:
        """The weight as refitted without these, and the inverse of what is left of the Gram matrix."""
        rows = [row for channel in channels for row in self.places.get(channel, ())]
        self.gone += rows
        if rows:
            across = self.inverse[:, rows]
            solved = torch.linalg.solve(across[rows], torch.cat([self.weight[rows], across.transpose(0, 1)], 1))
            self.weight = self.weight - across @ solved[:, : self.weight.shape[1]]
            self.inverse = self.inverse - across @ solved[:, self.weight.shape[1] :]

    def tell(self, weights: dict[str, Tensor], closed: dict[str, Any]) -> None:
        unit = self.read.sensitivity[self.index].sqrt()
        own = weights.setdefault(self.read.node, self.read.weight.clone())[self.index]
        own.copy_(torch.where(unit > 0, self.weight / unit, own.double()))
        own[self.gone] = 0


@dataclass
class _Lost:
    """Channels that nothing makes up for. ``energy [K, K]``: of the changes of the outputs when they go.

    ``places``: channel -> its place. ``gone``: places of those that went.
    """

    energy: Scores
    places: dict[int, int]
    gone: list[int] = field(default_factory=list, init=False)

    def losses(self, channels: Sequence[int]) -> Scores:
        """Less than nothing where it undoes another's."""
        result = np.zeros(len(channels))
        numbers = [number for number, channel in enumerate(channels) if channel in self.places]
        rows = [self.places[channels[number]] for number in numbers]
        result[numbers] = self.energy.diagonal()[rows] + 2 * self.energy[rows][:, self.gone].sum(1)
        return result

    def remove(self, channels: Sequence[int]) -> None:
        self.gone += [self.places[channel] for channel in channels if channel in self.places]


@dataclass
class _Gated(_Lost):
    """Channels that no weight reads."""

    gate: Gate

    @classmethod
    def of(cls, gate: Gate, channels: Collection[int]) -> _Gated:
        places = {int(channel): place for place, channel in enumerate(gate.channels) if channel in channels}
        return cls(gate.energy.cpu().numpy(), places, gate)

    def tell(self, weights: dict[str, Tensor], closed: dict[str, Any]) -> None:
        closed[self.gate.node] = self.gate.channels[self.gone]


@dataclass
class _LeftAlone(_Lost):
    """One matrix that the refit leaves alone. ``read``, ``index``: as of ``_Refitted``. ``rows``: place -> inputs."""

    read: Read
    index: int
    rows: Sequence[Sequence[int]]

    @classmethod
    def of(cls, read: Read, index: int, inputs: Mapping[int, Sequence[int]]) -> _LeftAlone:
        rows = list(inputs.values())
        weight = read.weight[index].double() * read.sensitivity[index].sqrt()
        energy = (read.gram[index] * (weight @ weight.transpose(0, 1))).cpu().numpy()
        by_row = np.stack([energy[own].sum(0) for own in rows])
        energy = np.stack([by_row[:, own].sum(1) for own in rows], 1)
        return cls(energy, {channel: place for place, channel in enumerate(inputs)}, read, index, rows)

    def tell(self, weights: dict[str, Tensor], closed: dict[str, Any]) -> None:
        own = weights.setdefault(self.read.node, self.read.weight.clone())[self.index]
        own[[row for place in self.gone for row in self.rows[place]]] = 0


def _parts(read: Read, group: ChannelGroup) -> list[_Part]:
    """The matrices of a weight that read channels of the group."""
    found: list[_Part] = []
    for index, channels in enumerate(read.channels):
        places: dict[int, list[int]] = defaultdict(list)
        for place in np.flatnonzero(np.isin(channels, group.channels)):
            places[int(channels[place])].append(int(place))
        if places and not read.refitted:
            found.append(_LeftAlone.of(read, index, places))
        elif places:
            gram = read.gram[index].clone()
            square = gram.diagonal()
            square.mul_(1 + _RIDGE + len(channels) / read.count).add_(
                square.mean().clamp_min(1e-300) * 1e-9
            )  # some may never be other than zero
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
            weight = read.weight[index].double() * read.sensitivity[index].sqrt()
            found.append(_Refitted(inverse, weight, dict(places), read, index))
    return found
