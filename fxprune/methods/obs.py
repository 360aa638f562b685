"""What is lost for good: the error that is left when a channel goes and all its readers are refitted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
    """Error of the outputs that refitting all readers of a channel leaves, per MAC; needs data, of which no targets.

    For a weight ``W`` that reads inputs of Gram matrix ``C`` the error is ``tr(W_c^T ((C^-1)_cc)^-1 W_c)``, ``W_c`` the
    rows of the channel (optimal brain surgeon: Hassibi and Stork 1993; for structures Kurtic et al. 2023, eq. 4). It is
    summed over all weights that read the channel, weighed by how much the network's outputs depend on theirs, so groups
    compare. The channels of a group are taken round by round, the lowest first, and ``C^-1`` and ``W`` follow: a
    channel whose twin has gone counts in full. Channels that no weight reads, as queries and keys, are refitted by
    none: they count with the error of the outputs that their going makes, to first order, those that went before
    included. Of a pair of query and key channels that is the energy of ``q_c k_c^T``, every logit weighed by how much
    the outputs depend on it. Where gradients tell nothing of them they stay. The fewer data there are for the inputs of
    a weight, the less its refit is trusted: a ridge of as much as there are inputs per independent position.
    Slopes hold for small changes, so when half of a group has gone the outputs' error is measured, with its readers
    refitted, and the scores of the group are scaled to that.
    ``per_mac=False``: the error itself, not divided by the MACs that go with the channel.
    """

    per_mac: bool = True
    needs: ClassVar[frozenset[Need]] = frozenset({"reads"})
    normalize: ClassVar[Normalize] = "none"

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        reads = state.measured.reads
        parts: list[_Part | _Gated] = [p for r in reads if isinstance(r, Read) for p in _parts(r, group)]
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
        return result.reshape(group.channels.shape) / (_macs(group, state) if self.per_mac else 1.0)


def _measured(parts: Sequence[_Part | _Gated], state: ModelState) -> float:
    """The outputs' error without the channels that went, 0 where it cannot be known."""
    if state.measured.trial is None:
        return 0.0
    weights: dict[str, Tensor] = {}
    closed: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, _Gated):
            closed[part.gate.node] = part.gate.channels[part.gone]
        else:
            if part.read.node not in weights:
                weights[part.read.node] = part.read.weight.clone()
            weights[part.read.node][part.index] = part.refitted()
    return state.measured.trial(weights, closed)


def _macs(group: ChannelGroup, state: ModelState) -> float:
    """What a channel of the group costs: a share of the MACs."""
    keep = state.graph.everything()
    gone = group.channels[:, : max(1, group.size // 2)]
    keep[gone] = False
    saved = 1.0 - state.graph.macs(keep) / max(state.graph.macs(), 1)
    return max(saved, 1e-9) / gone.size


@dataclass
class _Part:
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
        """Per channel what its going costs now, ``[n]``."""
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

    def refitted(self) -> Tensor:
        """The weight without what went, ``[K, O]``."""
        unit = self.read.sensitivity[self.index].sqrt()
        own = self.read.weight[self.index]
        found = torch.where(unit > 0, self.weight / unit, own.double())
        found[self.gone] = 0
        return found.to(own.dtype)


@dataclass
class _Gated:
    """Channels that no weight reads. ``energy [K, K]``: of the changes of the outputs.

    ``places``: channel -> its place. ``gone``: places of those that went.
    """

    gate: Gate
    energy: Scores
    places: dict[int, int]
    gone: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, gate: Gate, channels: Collection[int]) -> _Gated:
        places = {int(channel): place for place, channel in enumerate(gate.channels) if channel in channels}
        return cls(gate, gate.energy.cpu().numpy(), places)

    def losses(self, channels: Sequence[int]) -> Scores:
        """Per channel how much its going adds to the error, ``[n]``; less than nothing where it undoes another's."""
        result = np.zeros(len(channels))
        numbers = [number for number, channel in enumerate(channels) if channel in self.places]
        rows = [self.places[channels[number]] for number in numbers]
        result[numbers] = self.energy.diagonal()[rows] + 2 * self.energy[rows][:, self.gone].sum(1)
        return result

    def remove(self, channels: Sequence[int]) -> None:
        self.gone += [self.places[channel] for channel in channels if channel in self.places]


def _parts(read: Read, group: ChannelGroup) -> list[_Part]:
    """The matrices of a weight that read channels of the group."""
    found = []
    for index, channels in enumerate(read.channels):
        places: dict[int, list[int]] = defaultdict(list)
        for place in np.flatnonzero(np.isin(channels, group.channels)):
            places[int(channels[place])].append(int(place))
        if places:
            gram = read.gram[index].clone()
            square = gram.diagonal()
            square.mul_(1 + _RIDGE + len(channels) / read.count).add_(
                square.mean().clamp_min(1e-300) * 1e-9
            )  # some may never be other than zero
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
            weight = read.weight[index].double() * read.sensitivity[index].sqrt()
            found.append(_Part(inverse, weight, dict(places), read, index))
    return found
