"""From labels to channels: the analysis as plain data.

``analyse_graph`` runs the label propagation until no new fact appears and freezes the result as a ``ChannelGraph``.
A *channel* is a class of joined atoms, numbered 0..K-1; a plan is a boolean per channel.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from fxprune.cost import CostModel, Keep
from fxprune.labels.blocks import BlockSets
from fxprune.labels.classes import Ids, Reason
from fxprune.labels.factors import Factor, Labels, compact, pruned, settle_dim
from fxprune.labels.propagate import (
    Attention,
    Facts,
    Family,
    Interleaved,
    Propagation,
    Statistic,
    TensorLabels,
    Term,
    is_movement,
    label_parameter,
    propagate,
    set_labels,
)
from fxprune.recording import clone_structure, replace_tensors
from fxprune.text import quantity, table


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
    """One dimension of one parameter that a group of channels runs through."""

    name: str
    dim: int


@dataclass(frozen=True)
class ChannelGroup:
    """Interchangeable channels: the same dimensions of the same parameters.

    ``channels [blocks, size]``: channel numbers. Blocks keep equal counts, so a *slot* is one channel of each block.
    ``exact``: cutting changes no statistic. ``locked``: why these may not be cut, with the source line, or None.
    """

    name: str
    channels: Ids
    members: tuple[Member, ...]
    exact: bool
    approximate: Reason | None
    locked: Reason | None

    @property
    def blocks(self) -> int:
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
    """Everything later stages need to know of a model's channels. Plain data; ids in labels are channel numbers."""

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

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
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
        return tuple(group for group in self.groups if group.locked is None)

    def with_locked(self, channels: Sequence[int], reason: Reason) -> ChannelGraph:
        """The same graph with the groups of these channels locked."""
        hit = {int(self.group_of[c]) for c in channels}
        groups = tuple(
            replace(g, locked=reason) if i in hit and g.locked is None else g for i, g in enumerate(self.groups)
        )
        return replace(self, groups=groups)

    def everything(self) -> Keep:
        """The plan that cuts nothing."""
        return np.ones(self.channel_count, dtype=bool)

    @cached_property
    def cost(self) -> CostModel:
        """MACs and parameters of any plan."""
        return CostModel(self.terms, [(p.shape, p.labels) for p in self.parameters if p.trainable])

    def macs(self, plan: Any = None) -> int:
        """MACs of one forward pass on the example inputs, dense or with a ``PruningPlan`` or a boolean per channel."""
        return self.cost.macs(self._keep(plan))

    def params(self, plan: Any = None) -> int:
        """Parameters, dense or with a plan."""
        return self.cost.params(self._keep(plan))

    def _keep(self, plan: Any) -> Keep:
        if plan is None:
            return self.everything()
        return plan if isinstance(plan, np.ndarray) else plan.channels(self)

    def to_networkx(self) -> Any:
        """The bipartite graph of groups and the layers their channels run through, for people and plots."""
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
            for tensor in tree_flatten(value)[0]:
                if isinstance(tensor, TensorLabels):
                    for factor in tensor.labels:
                        assert all(n in (1, s) for n, s in zip(factor.ids.shape, tensor.shape, strict=True))

    def __str__(self) -> str:
        rows = [("group", "channels", "state", "why", "runs through")]
        for group in self.groups:
            size = f"{group.size}" if group.blocks == 1 else f"{group.size} x {group.blocks} blocks"
            state = "frozen" if group.locked else "exact" if group.exact else "approximate"
            layers = list(dict.fromkeys(m.name.rpartition(".")[0] or m.name for m in group.members))
            shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
            rows.append((group.name, size, state, str(group.locked or group.approximate or ""), shown))
        total = sum(g.channels.size for g in self.groups)
        free = sum(g.channels.size for g in self.prunable)
        head = f"{len(self.groups)} groups, {free} of {total} channels can be cut; {quantity(self.macs())} MACs"
        notes = ["", "notes:", *(f"  {note}" for note in self.notes)] if self.notes else []
        return "\n".join([head, "", *table(rows), *notes])


def channels_of(known: Any) -> list[int]:
    """Every channel in the labels of a node's value."""
    labels = [t.labels for t in tree_flatten(known)[0] if isinstance(t, TensorLabels)]
    return sorted({int(c) for factors in labels for f in factors for c in np.unique(f.ids.numpy())})


def placeholder_values(graph_module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """One value per placeholder, as a call with ``args`` and ``kwargs`` binds them."""
    bound = inspect.signature(graph_module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    nodes = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    return [bound.arguments[str(n.target).lstrip("*")] for n in nodes]


def analyse_graph(
    graph_module: fx.GraphModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    attention: Attention = "head_dim",
    ignore: Sequence[str] = (),
) -> ChannelGraph:
    """Find the channels of a recorded model.

    Args:
        graph_module: from ``record``.
        args: example inputs; only shapes and dtypes matter.
        kwargs: example keyword inputs.
        attention: cut inside heads, or whole heads.
        ignore: names of modules and parameters whose output channels stay.
    """
    values = placeholder_values(graph_module, args, kwargs)
    facts, before = Facts(), None
    while True:
        run = Propagation(attention, facts, ignore=ignore)
        shadow, holders = _shadow(graph_module, run)
        for a, b in facts.joins:
            run.join(a, b)
        owned = len(run.classes)
        propagate(shadow, values, run, "network input")
        if run.new_layouts:
            facts = Facts({**facts.layouts, **run.new_layouts}, [])
            before = None
            continue
        if before is None:
            before = np.arange(owned)
        partition = run.classes.find(np.arange(owned))
        if run.rows_joined and not np.array_equal(partition, before):
            # order and blocks are settled when all rows are known: half of them joined would look like ragged blocks
            facts = Facts(facts.layouts, [(np.arange(owned), partition)])
            before = partition
            continue
        gathers = _settle_order(run, graph_module)
        blocks = _settle_blocks(run, {name for gather in gathers for name in gather[1]})
        partition = run.classes.find(np.arange(owned))
        changed = blocks.realigned or any(not g[1] for g in gathers)
        if changed and not np.array_equal(partition, before):
            facts = Facts(facts.layouts, [(np.arange(owned), partition)])
            before = partition
            continue
        return _freeze(run, graph_module, holders, blocks, [g[0] for g in gathers if g[0] is not None])


# -- the shadow on meta tensors -----------------------------------------------------------------------------------


def _shadow(graph_module: fx.GraphModule, run: Propagation) -> tuple[fx.GraphModule, list[tuple[Tensor, Parameter]]]:
    """The same graph over labelled meta tensors; integers stay real. Also returns each tensor with its description."""
    shadow = clone_structure(graph_module)
    shadow.eval()
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in (*graph_module.named_parameters(remove_duplicate=False),
                         *graph_module.named_buffers(remove_duplicate=False)):  # fmt: skip
        names[id(tensor)].append(name)
    replaced: dict[int, Tensor] = {}
    holders: list[tuple[Tensor, Parameter]] = []

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            own = tuple(names[id(tensor)])
            if tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta:
                stand = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad
                )  # torch takes other ways through its ops for tensors that need gradients
                label_parameter(run, own[0], stand)
                shape = tuple(tensor.shape)
                groups = run.facts.layouts.get(own[0], 1)
                holders.append((stand, Parameter(own, shape, (), isinstance(tensor, nn.Parameter), groups)))
            else:
                stand = tensor.detach().cpu()
            replaced[id(tensor)] = stand
        return replaced[id(tensor)]

    replace_tensors(shadow, stand_in)
    return shadow, holders


def replay(
    module: fx.GraphModule, graph: ChannelGraph, keep: Keep, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Propagation, str]:
    """Propagate the channel numbers of ``graph`` through ``module`` on other inputs or after a rewriting.

    Returns:
        The run, whose atoms below ``graph.channel_count`` are channel numbers, and the error that ended it, or "".
    """
    run = Propagation(graph.attention, seeded=True)
    run.fresh(graph.channel_count)
    run.lock(np.flatnonzero(graph.locked), "locked before")
    shadow = clone_structure(module)
    shadow.eval()
    names: dict[int, str] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), name)
    replaced: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            known = graph.by_name.get(names[id(tensor)])
            if known is None and not tensor.is_floating_point():
                replaced[id(tensor)] = tensor.detach().cpu()
            else:
                stand = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad
                )  # torch takes other ways through its ops for tensors that need gradients
                labels = () if known is None else pruned(known.labels, keep)
                set_labels(stand, names[id(tensor)], tuple(f for f in labels if f.ids.shape[f.dim] > 1))
                replaced[id(tensor)] = stand
        return replaced[id(tensor)]

    replace_tensors(shadow, stand_in)
    try:
        propagate(shadow, placeholder_values(module, args, kwargs), run, "network input")
    except Exception as error:
        return run, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return run, ""


# -- order: channels that movements interleave ----------------------------------------------------------------------


def _ragged(run: Propagation, factor: Factor) -> Factor | None:
    """The factor as it stands at the end of the run, if it still varies along several dims and may be cut."""
    final = run.canonical(factor)
    if len(final.varying) < 2 or run.all_locked(final):
        return None
    return final


def _settle_order(run: Propagation, graph_module: fx.GraphModule) -> list[tuple[Gather | None, set[str]]]:
    """For each interleaving view: a gather and the nodes it replaces, or (None, empty) and the rows aligned."""
    found: list[tuple[Gather | None, set[str]]] = []
    nodes = {n.name: n for n in graph_module.graph.nodes}
    done: set[str] = set()
    for event in run.interleaved:
        final = _ragged(run, event.before)
        if final is None or final.dim == final.varying[-1]:
            continue
        region = None if event.inside else _region(run, nodes, event)
        if region is None:
            first = final.ids
            for d in final.carriers:
                run.join(final.ids, first.narrow(d, 0, 1))
                first = first.narrow(d, 0, 1)
            found.append((None, set()))
        elif region[0].output not in done:
            done.add(region[0].output)
            found.append(region)
    return found


def _region(run: Propagation, nodes: Mapping[str, fx.Node], event: Interleaved) -> tuple[Gather, set[str]] | None:
    """The chain of movement nodes around an interleaving view, from plain labels to plain labels."""

    def plain(node: fx.Node) -> bool:
        value = run.node_labels.get(node.name)
        return isinstance(value, TensorLabels) and all(
            len(run.canonical(f).varying) < 2 or run.all_locked(f) for f in value.labels
        )

    last = nodes[event.node]
    chain = [last]
    while not plain(chain[0].all_input_nodes[0]):
        before = chain[0].all_input_nodes[0]
        if not is_movement(before) or len(before.users) > 1:
            return None
        chain.insert(0, before)
    while not plain(chain[-1]):
        users = list(chain[-1].users)
        if len(users) != 1 or not is_movement(users[0]):
            return None
        chain.append(users[0])
    start = chain[0].all_input_nodes[0]
    before, after = run.node_labels[start.name], run.node_labels[chain[-1].name]
    if before.shape != after.shape or before.dtype != after.dtype:
        return None
    for factor in before.labels:
        final = run.canonical(factor)
        permutation = _permutation(run, chain, start, before.shape, final.dim)
        if permutation is not None and len(final.varying) == 1:
            gather = Gather(start.name, chain[-1].name, final.dim, permutation)
            return gather, {n.name for n in chain}
    return None


def _permutation(
    run: Propagation, chain: list[fx.Node], start: fx.Node, shape: tuple[int, ...], dim: int
) -> tuple[int, ...] | None:
    """The permutation of ``dim`` that the chain of nodes performs, if that is all it does."""
    positions = torch.arange(int(np.prod(shape))).reshape(shape)
    env: dict[fx.Node, Any] = {start: positions}

    def value(n: fx.Node) -> Any:
        return env[n] if n in env else run.node_labels[n.name]

    result = positions
    for node in chain:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            target: Any = node.target
            result = target(*args, **kwargs)
        env[node] = result
    first = tuple(slice(None) if d == dim else 0 for d in range(len(shape)))
    stride = positions.stride(dim)
    order = (result[first] // stride) % shape[dim]
    if not torch.equal(result, positions.index_select(dim, order)):
        return None
    return tuple(int(i) for i in order)


# -- blocks -----------------------------------------------------------------------------------------------------


def _settle_blocks(run: Propagation, gathered: set[str]) -> BlockSets:
    families: dict[bytes, Family] = {}
    for family in run.families:
        if family.movable and family.node in gathered:
            continue
        rows = np.unique(run.classes.find(family.rows), axis=0)
        if family.factor is not None:
            final = run.canonical(family.factor)
            rows = np.unique(final.rows(), axis=0) if len(final.varying) > 1 else rows[:1]
        if len(rows) > 1 and not run.classes.locked(rows).all():
            families.setdefault(rows.tobytes() + str(rows.shape).encode(), replace(family, rows=rows))
    return BlockSets.of(run.classes, list(families.values()))


# -- freezing ---------------------------------------------------------------------------------------------------


def _freeze(
    run: Propagation,
    graph_module: fx.GraphModule,
    holders: list[tuple[Tensor, Parameter]],
    blocks: BlockSets,
    gathers: list[Gather],
) -> ChannelGraph:
    classes = run.classes
    roots = classes.find(np.arange(len(classes)))
    owned = sum(o.count for o in run.owners)
    # a channel is a class with a parameter in it; everything else follows from its neighbours or never changes
    fixed = roots[np.concatenate([*run.fixed, np.empty(0, dtype=np.int64)])]
    channel_roots = np.setdiff1d(roots[:owned], fixed)
    companions = _companions(run, roots, channel_roots)
    if len(companions):
        run.classes.lock(companions, Reason("made by the model, owned by no parameter"))
        channel_roots = np.union1d(channel_roots, companions)
    number = np.full(len(classes), -1, dtype=np.int64)
    number[channel_roots] = np.arange(len(channel_roots))
    channels = len(channel_roots)

    def translate(labels: Labels) -> Labels:
        result = []
        for factor in labels:
            ids = compact(torch.from_numpy(number[roots[factor.ids.numpy()]]))
            if int(ids.min()) >= 0 and ids.numel() > 1:
                result.append(Factor(ids, settle_dim(ids, factor.dim)))
        return tuple(result)

    parameters = tuple(replace(p, labels=translate(run.labels(stand))) for stand, p in holders)
    terms = tuple(replace(t, factors=translate(t.factors)) for t in _missing_sizes(run.terms, number, roots))
    nodes = {
        name: tree_map_only(TensorLabels, lambda t: replace(t, labels=translate(t.labels)), value)
        for name, value in run.node_labels.items()
    }
    statistics = tuple(replace(s, labels=translate(s.labels)) for s in run.statistics)
    locked = _first_reasons(classes.locks, roots, number, channels)
    approximate = _first_reasons(classes.approximations, roots, number, channels)
    trainable = {p.name for p in parameters if p.trainable}
    members = _members(run, roots, number)
    sources = [m.name in trainable and (m.name, m.dim) not in run.consumed for m in members.owners]
    made = np.zeros(channels, dtype=bool)
    made[members.channel[np.asarray(sources, dtype=bool)[members.owner]]] = True
    for channel in np.flatnonzero(~made):
        locked.setdefault(int(channel), Reason("constants of the model, made by no trainable parameter"))
    for why, ids in _tied_dimensions(parameters):
        for channel in ids:
            locked.setdefault(int(channel), why)
    groups = _groups(channels, members, terms, locked, approximate, blocks.translated(number, roots))
    group_of = np.empty(channels, dtype=np.int64)
    for index, group in enumerate(groups):
        group_of[group.channels] = index
    return ChannelGraph(
        parameters=parameters,
        groups=groups,
        terms=terms,
        extents=_extents(parameters, nodes),
        nodes=nodes,
        statistics=tuple(s for s in statistics if s.labels),
        gathers=tuple(gathers),
        norm_scales=frozenset(run.norm_scales),
        sources={n.name: str(n.meta.get("source", "")) for n in graph_module.graph.nodes},
        channel_count=channels,
        attention=run.attention,
        notes=tuple(dict.fromkeys([*graph_module.meta.get("notes", ()), *run.notes])),
        owned=np.isin(np.arange(channels), number[roots[:owned]]),
        group_of=group_of,
    )


def _companions(run: Propagation, roots: Ids, channel_roots: Ids) -> Ids:
    """Classes that no parameter owns, but that share a dimension of some tensor with channels: paddings."""
    found = [np.empty(0, dtype=np.int64)]
    is_channel = np.zeros(len(roots), dtype=bool)
    is_channel[channel_roots] = True
    for value in run.node_labels.values():
        for tensor in tree_flatten(value)[0]:
            for factor in tensor.labels if isinstance(tensor, TensorLabels) else ():
                ids = roots[factor.ids.numpy()]
                own = is_channel[ids]
                if own.any() and not own.all():
                    found.append(ids[~own])
    return np.unique(np.concatenate(found))


def _missing_sizes(terms: Sequence[Term], number: Ids, roots: Ids) -> list[Term]:
    """Terms whose factors without a channel (sizes that never change) are folded into the constant."""
    result = []
    for term in terms:
        constant, factors = term.constant, []
        for factor in term.factors:
            final = compact(torch.from_numpy(number[roots[factor.ids.numpy()]]))
            if int(final.min()) < 0 or final.numel() == 1:
                constant *= factor.ids.shape[factor.dim]
            else:
                factors.append(factor)
        result.append(Term(term.node, constant, tuple(factors)))
    return result


def _tied_dimensions(parameters: Sequence[Parameter]) -> list[tuple[Reason, Ids]]:
    """A dimension all of whose positions are one channel cannot be cut."""
    result = []
    for parameter in parameters:
        cut = {f.dim for f in parameter.labels}
        result += [
            (Reason("one channel fills a whole dimension"), np.unique(f.ids.numpy()))
            for f in parameter.labels
            if len(np.unique(f.ids.numpy())) == 1 and f.dim in cut
        ]
    return result


def _first_reasons(entries: Sequence[tuple[Ids, Reason]], roots: Ids, number: Ids, channels: int) -> dict[int, Reason]:
    result: dict[int, Reason] = {}
    for atoms, reason in entries:
        for channel in np.unique(number[roots[atoms]]):
            if channel >= 0:
                result.setdefault(int(channel), reason)
    return result


@dataclass(frozen=True)
class _Incidence:
    """Which owners each channel has: parallel arrays of channel, owner index and count."""

    channel: Ids
    owner: Ids
    count: Ids
    owners: tuple[Member, ...]


def _members(run: Propagation, roots: Ids, number: Ids) -> _Incidence:
    channels, owners = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for index, owner in enumerate(run.owners):
        channels.append(number[roots[owner.first : owner.first + owner.count]])
        owners.append(np.full(owner.count, index))
    both = np.stack([np.concatenate(channels), np.concatenate(owners)])
    pairs, counts = np.unique(both[:, both[0] >= 0], axis=1, return_counts=True)
    return _Incidence(pairs[0], pairs[1], counts, tuple(Member(o.name, o.dim) for o in run.owners))


def _groups(
    channels: int,
    members: _Incidence,
    terms: Sequence[Term],
    locked: Mapping[int, Reason],
    approximate: Mapping[int, Reason],
    blocks: list[list[Ids]],
) -> tuple[ChannelGroup, ...]:
    """Channels with the same signature form a group; blocks that keep equal counts form one group together."""
    random = np.random.default_rng(0)
    signature = np.zeros(channels, dtype=np.uint64)

    def mix(ids: Ids, counts: Ids | int = 1) -> None:
        weight = random.integers(1, 2**63, dtype=np.uint64)
        np.add.at(signature, ids, weight * np.asarray(counts, dtype=np.uint64))

    weights = random.integers(1, 2**63, size=len(members.owners), dtype=np.uint64)
    np.add.at(signature, members.channel, weights[members.owner] * members.count.astype(np.uint64))
    seen: set[bytes] = set()
    for term in terms:
        for factor in term.factors:
            key = factor.rows().tobytes()
            if key not in seen:
                seen.add(key)
                mix(factor.rows().reshape(-1))
    if locked:
        by_reason: dict[Reason, list[int]] = defaultdict(list)
        for channel, why in locked.items():
            by_reason[why].append(channel)
        for same in by_reason.values():
            mix(np.array(same))
    sets: list[list[Ids]] = []
    in_blocks = np.zeros(channels, dtype=bool)
    for block_set in blocks:
        flat = np.concatenate(block_set)
        if any(int(c) in locked for c in flat):
            why = next(locked[int(c)] for c in flat if int(c) in locked)
            for c in flat:
                locked.setdefault(int(c), Reason(f"in one block with channels that stay: {why.text}", why.source))  # type: ignore[attr-defined]
            for block in block_set:
                signature[block] += np.uint64(0x5851F42D4C957F2D)
            continue
        in_blocks[flat] = True
        sets.append(block_set)
    rest = np.flatnonzero(~in_blocks)
    _, inverse = np.unique(signature[rest], return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    splits = np.flatnonzero(np.diff(inverse[order])) + 1
    sets += [[rest[part]] for part in np.split(order, splits) if len(part)]
    sets.sort(key=lambda s: int(min(block.min() for block in s)))
    owners_of: dict[int, list[int]] = defaultdict(list)
    for channel, owner in zip(members.channel.tolist(), members.owner.tolist(), strict=True):
        owners_of[channel].append(owner)
    taken: dict[str, int] = {}
    result = []
    for block_set in sets:
        ids = np.stack(block_set)
        owners = sorted({o for block in block_set for o in owners_of[int(block[0])]})
        own = tuple(members.owners[o] for o in owners)
        first = int(ids[0, 0])
        rough = next((approximate[int(c)] for c in ids.reshape(-1) if int(c) in approximate), None)
        name = _name(own, taken)
        result.append(ChannelGroup(name, ids, own, rough is None, rough, locked.get(first)))
    return tuple(result)


def _name(members: Sequence[Member], taken: dict[str, int]) -> str:
    """Named after the first parameter whose output they are."""
    producers = [m for m in members if m.dim == 0] or list(members)
    base = producers[0].name.removesuffix(".weight") if producers else "channels"
    taken[base] = taken.get(base, 0) + 1
    return base if taken[base] == 1 else f"{base}#{taken[base]}"


def _extents(parameters: Sequence[Parameter], nodes: Mapping[str, Any]) -> tuple[Ids, ...]:
    """Every distinct row of channels that fills a dimension of some tensor: none may become empty."""
    found: dict[bytes, Ids] = {}
    tensors = [t for value in nodes.values() for t in tree_flatten(value)[0] if isinstance(t, TensorLabels)]
    for labels in [*(p.labels for p in parameters), *(t.labels for t in tensors)]:
        for factor in labels:
            for row in factor.rows():
                unique = np.unique(row)
                found.setdefault(unique.tobytes(), unique)
    return tuple(found.values())
