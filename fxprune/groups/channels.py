"""Channels as plain data: what the analysis finds, and every later stage reads.

A *channel* is a class of joined atoms, numbered 0..K-1; a plan is a boolean per channel.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fxprune.errors import check_installed
from fxprune.groups.cost import CostModel, Keep
from fxprune.labels.classes import Ids, Reason
from fxprune.labels.factors import Labels
from fxprune.labels.records import Attention, Floor, Statistic, Term, labels_in

_FEW = 4  # slots: what cannot be rewritten with so many of a group left cannot be rewritten with more


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer: all the names it has in the state_dict, its shape, and labels in channel numbers.

    ``groups``: of a grouped convolution's weight; its dim 1 is local to each group.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    labels: Labels
    trainable: bool
    groups: int = 1

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter that a group of channels runs through.

    ``read``: the parameter's layers contract over them; otherwise one makes them or passes them on. ``as_is``: one
    contracts over them with the parameter itself, and not with a weight that is computed from it.
    """

    name: str
    dim: int
    read: bool
    as_is: bool


@dataclass(frozen=True)
class ChannelGroup:
    """Interchangeable channels: the same dimensions of the same parameters.

    ``channels [blocks, size]``: channel numbers. Blocks keep equal counts, so a *slot* is one channel of each block: of
    12 heads of 64 channels [12, 64], slot 3 is the fourth channel of every head.
    ``exact``: cutting changes no statistic. ``locked``: why these may not be cut, with the source line, or None.
    ``least``: so many slots stay, whatever the tensors need.

    Examples:
        >>> group = fxprune.analyze(model, x).prunable[0]
        >>> print(group)
        0: 16 channels, exact; 0.weight[0], 0.bias[0], 1.weight[0], 1.bias[0] and ...
        >>> group.channels.shape
        (1, 16)
    """

    name: str
    channels: Ids
    members: tuple[Member, ...]
    exact: bool
    approximate: Reason | None
    locked: Reason | None
    least: int = 0

    @property
    def blocks(self) -> int:
        """How many blocks keep equal counts; 1 of most groups."""
        return int(self.channels.shape[0])

    @property
    def size(self) -> int:
        """Slots."""
        return int(self.channels.shape[1])

    def __len__(self) -> int:
        return self.size

    def __str__(self) -> str:
        state = (
            f"locked: {self.locked}" if self.locked else "exact" if self.exact else f"approximate: {self.approximate}"
        )
        blocks = f" x {self.blocks} blocks" if self.blocks > 1 else ""
        members = ", ".join(f"{m.name}[{m.dim}]" for m in self.members[:4])
        more = f" and {len(self.members) - 4} more" if len(self.members) > 4 else ""
        return f"{self.name}: {self.size}{blocks} channels, {state}; {members}{more}"


@dataclass(frozen=True)
class Gather:
    """Nodes that only move channels of several blocks into each other's gaps, to be replaced by one gather.

    ``permutation``: for every dense position of ``output`` along ``dim`` the position in ``input``.
    """

    input: str
    output: str
    dim: int
    permutation: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGraph:
    """Everything later stages need to know of a model's channels. Plain data; ids in labels are channel numbers.

    ``sources``: node -> the user's source line. ``lines``: module or parameter -> the line that uses it first, in the
    order of use. ``kinds``: module -> class name; that of '' is the model's. ``uninterpreted``: nodes that do not run
    without data; what reaches them is locked. ``floors``: of some channels so many stay. ``routed``: channels of which
    data choose some, such as experts: how many there are changes no MACs. ``follows [pairs, 2]``: a channel that one
    layer reads of a stream, and that channel of the stream, with which it goes.

    Examples:
        >>> graph = fxprune.analyze(model, x)
        >>> graph.macs(), graph.params()
        (..., ...)
        >>> keep = graph.everything()
        >>> keep[graph.prunable[0].channels[0, :8]] = False  # half of the first group
        >>> graph.macs(keep) < graph.macs()
        True
    """

    parameters: tuple[Parameter, ...]
    groups: tuple[ChannelGroup, ...]
    terms: tuple[Term, ...]
    extents: tuple[Ids, ...]
    nodes: Mapping[str, Any]
    statistics: tuple[Statistic, ...]
    gathers: tuple[Gather, ...]
    norm_scales: frozenset[str]
    sources: Mapping[str, str]
    channel_count: int
    attention: Attention
    notes: tuple[str, ...] = ()
    owned: Keep = field(default_factory=lambda: np.empty(0, dtype=bool))
    group_of: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    lines: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    uninterpreted: frozenset[str] = frozenset()
    floors: tuple[Floor, ...] = ()
    routed: frozenset[int] = frozenset()
    follows: Ids = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
        """Every name in the state_dict -> its parameter or buffer."""
        return {name: parameter for parameter in self.parameters for name in parameter.names}

    @cached_property
    def locked(self) -> Keep:
        """Per channel: may it not be cut?"""
        result = np.zeros(self.channel_count, dtype=bool)
        for group in self.groups:
            if group.locked:
                result[group.channels] = True
        return result

    @cached_property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups that may be cut."""
        return tuple(group for group in self.groups if group.locked is None)

    def with_locked(self, channels: Sequence[int], reason: Reason) -> ChannelGraph:
        """The same graph with the groups of these channels locked."""
        hit = {int(self.group_of[c]) for c in channels}
        groups = tuple(
            replace(g, locked=reason) if i in hit and g.locked is None else g for i, g in enumerate(self.groups)
        )
        return replace(self, groups=groups)

    def without(self, keep: Keep, channels: Sequence[int], reason: Reason) -> tuple[ChannelGraph, str]:
        """The same graph, if ``keep`` cannot be had on account of these channels, and what no longer may be cut.

        Of groups that it leaves next to nothing of, a little more must stay, which may be all there is to it: first of
        those of one structure, where that costs least. If there are none, these channels' groups are locked.
        """
        thin: dict[Any, dict[int, int]] = defaultdict(dict)
        for index in sorted({int(self.group_of[c]) for c in channels if not self.locked[c]}):
            group, left = self.groups[index], int(keep[self.groups[index].channels[0]].sum())
            more = min(max(1, 2 * left), group.size - 1)
            if left < more < 2 * _FEW:
                thin[left, self.structure(group)][index] = more
        if not thin:
            return self.with_locked(channels, reason), f"locked: {reason}"

        def macs(raised: Mapping[int, int]) -> int:
            more = keep.copy()
            for index, least in raised.items():
                more[self.groups[index].channels[:, :least]] = True
            return self.macs(more)

        fewest = min(left for left, _ in thin)
        raised = min((own for (left, _), own in thin.items() if left == fewest), key=macs)
        names = ", ".join(f"{least * self.groups[i].blocks} of {self.groups[i].name}" for i, least in raised.items())
        return self.with_least(raised), f"at least {names} stay: {reason}"

    def with_least(self, least: Mapping[int, int]) -> ChannelGraph:
        """The same graph, of which groups so many slots stay at least."""
        groups = tuple(replace(g, least=least[i]) if i in least else g for i, g in enumerate(self.groups))
        return replace(self, groups=groups)

    def structure(self, group: ChannelGroup) -> Any:
        """What groups have in common whose layers are of the same kinds: the parameters their channels run through."""
        shapes = [(m, self.by_name[m.name].shape) for m in group.members]
        return group.blocks, tuple(sorted((m.name.rpartition(".")[2], m.dim, len(s), s[2:]) for m, s in shapes))

    def closed(self, keep: Keep) -> Keep:
        """``keep`` without what is read of channels that go."""
        if not len(self.follows):
            return keep
        reads, streams = self.follows.T
        result: Keep = keep.copy()
        result[reads] &= keep[streams]
        return result

    def everything(self) -> Keep:
        """The plan that cuts nothing: a boolean per channel ``[channel_count]``, all True."""
        return np.ones(self.channel_count, dtype=bool)

    @cached_property
    def cost(self) -> CostModel:
        """MACs and parameters of any plan."""
        return CostModel(self.terms, [(p.shape, p.labels) for p in self.parameters if p.trainable])

    def macs(self, plan: Any = None) -> int:
        """MACs of one forward pass on the example inputs, dense or with a ``PruningPlan`` or a boolean per channel."""
        return self.cost.macs(self._keep(plan))

    @cached_property
    def prunable_share(self) -> float:
        """The share of the dense model's MACs, in [0, 1], whose contraction has a dimension that may be cut."""
        return 1.0 - sum(self.held.values()) if self.terms else 0.0

    @cached_property
    def held(self) -> dict[str, float]:
        """What no cut can lower: reason -> share of the dense model's MACs, in (0, 1], the largest first."""
        held: dict[str, float] = defaultdict(float)
        dense = [term.constant * math.prod(f.ids.shape[f.dim] for f in term.factors) for term in self.terms]
        total = sum(dense)
        for term, macs in zip(self.terms, dense, strict=True):
            ids = np.concatenate([np.empty(0, dtype=np.int64), *(f.ids.reshape(-1) for f in term.factors)])
            if self.locked[ids].all():
                groups = np.unique(self.group_of[ids])
                reasons = sorted({str(self.groups[g].locked) for g in groups})
                held["; ".join(reasons) or "no channels"] += macs / total
        return dict(sorted(held.items(), key=lambda item: -item[1]))

    def params(self, plan: Any = None) -> int:
        """Parameters, dense or with a plan."""
        return self.cost.params(self._keep(plan))

    def _keep(self, plan: Any) -> Keep:
        if plan is None:
            return self.everything()
        return plan if isinstance(plan, np.ndarray) else plan.channels(self)

    def to_networkx(self) -> Any:
        """The bipartite graph of groups and the layers their channels run through, for people and plots."""
        check_installed("graph", "networkx")
        import networkx as nx

        graph = nx.Graph()
        for group in self.groups:
            graph.add_node(
                group.name, kind="group", size=group.size, blocks=group.blocks, exact=group.exact,
                locked=str(group.locked or ""),
            )  # fmt: skip
            for member in group.members:
                layer = member.name.rpartition(".")[0] or member.name
                graph.add_node(layer, kind="layer")
                graph.add_edge(group.name, layer, parameter=member.name, dim=member.dim)
        return graph

    def to_html(self, path: str | Path) -> None:
        """Write a page: every layer in graph order, the groups that run through it, what is locked and why.

        Raises:
            InputError: ``path`` cannot be written.
        """
        from fxprune.reports import graph

        graph.write_html(self, path)

    def check(self) -> None:
        """The specification of a channel graph, executed.

        Raises:
            AssertionError: naming what does not hold.
        """
        seen = np.zeros(self.channel_count, dtype=np.int64)
        for group in self.groups:
            np.add.at(seen, group.channels.reshape(-1), 1)
            assert group.size > 0 and group.blocks > 0, f"{group.name} is empty"
        assert (seen == 1).all(), "a channel must belong to exactly one group"
        names = [group.name for group in self.groups]
        assert len(set(names)) == len(names), "two groups have one name"
        for parameter in self.parameters:
            cuts = [factor.dim for factor in parameter.labels]
            assert len(set(cuts)) == len(cuts), f"{parameter.name}: two factors cut one dimension"
            for factor in parameter.labels:
                assert factor.ids.shape[factor.dim] == parameter.shape[factor.dim], parameter.name
        for value in self.nodes.values():
            for tensor in labels_in(value):
                for factor in tensor.labels:
                    assert all(n in (1, s) for n, s in zip(factor.ids.shape, tensor.shape, strict=True))

    def __str__(self) -> str:
        from fxprune.reports import graph

        return graph.text_of(self)
