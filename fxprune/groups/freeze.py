"""From a finished propagation to plain data: channels get numbers, signatures make groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from fxprune.groups.channels import ChannelGraph, ChannelGroup, Gather, Member, Parameter
from fxprune.groups.cost import Keep
from fxprune.labels.blocks import BlockSets
from fxprune.labels.classes import Ids, Reason, distinct_rows
from fxprune.labels.factors import Factor, Labels, compact, settle_dim
from fxprune.labels.propagation import Propagation
from fxprune.labels.records import Floor, Statistic, TensorLabels, Term, labels_in


def freeze(
    run: Propagation,
    graph_module: fx.GraphModule,
    holders: list[tuple[Tensor, Parameter]],
    blocks: BlockSets,
    gathers: list[Gather],
) -> ChannelGraph:
    """What propagation has found, in numbers of channels. ``holders``: the parameters and what stands for them."""
    numbers, channels = _numbered(run)
    translate = numbers.labels
    in_atoms = [run.labels(stand) for stand, _ in holders]
    parameters = tuple(
        Parameter(p.names, p.shape, translate(labels), p.trainable, p.groups)
        for labels, (_, p) in zip(in_atoms, holders, strict=True)
    )
    terms = tuple(_without_fixed_sizes(term, numbers) for term in run.terms)

    def renumbered(known: TensorLabels) -> TensorLabels:
        return replace(known, labels=translate(known.labels))

    nodes = {
        name: renumbered(v) if isinstance(v, TensorLabels) else tree_map_only(TensorLabels, renumbered, v)
        for name, v in run.node_labels.items()
    }
    statistics = tuple(Statistic(s.node, s.index, s.op, translate(s.labels)) for s in run.statistics)
    owned = numbers.of_atom[: sum(o.count for o in run.owners)]
    members = _members(run, owned)
    locked = _first_reasons(run.classes.locks, numbers.of_atom, channels)
    chosen = np.concatenate([np.empty(0, dtype=np.int64), *(numbers.of_atom[ids] for ids in run.entries)])
    constant = np.setdiff1d(_constants(members, parameters, channels), chosen)
    locked.note(constant, Reason("constants of the model, made by no trainable parameter"))
    locked.note(_whole_dimensions(in_atoms, parameters, numbers), Reason("one channel fills a whole dimension"))
    approximate = _first_reasons(run.classes.approximations, numbers.of_atom, channels)
    groups = _groups(channels, members, terms, locked, approximate, blocks.translated(numbers.of_atom))
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
        owned=_are_among(owned, channels),
        group_of=group_of,
        lines=_first_lines(graph_module),
        uninterpreted=frozenset(run.failed),
        floors=_floors(run, numbers.of_atom),
        routed=frozenset(int(c) for ids in run.routed for c in numbers.of_atom[ids] if c >= 0),
    )


def _numbered(run: Propagation) -> tuple[_Numbers, int]:
    """A number for every channel, and how many there are.

    A channel is a class with a parameter in it; everything else follows from its neighbours or never changes.
    """
    classes = run.classes
    roots = classes.find(np.arange(len(classes)))
    fixed = roots[np.concatenate([*run.fixed, np.empty(0, dtype=np.int64)])]
    is_channel = np.zeros(len(classes), dtype=bool)
    is_channel[roots[: sum(o.count for o in run.owners)]] = True
    is_channel[fixed] = False
    companions = _companions(run, roots, is_channel)
    if len(companions):
        classes.lock(companions, Reason("made by the model, owned by no parameter"))
        is_channel[companions] = True
    channels = np.flatnonzero(is_channel)
    number = np.full(len(classes), -1, dtype=np.int64)
    number[channels] = np.arange(len(channels))
    return _Numbers(number[roots]), len(channels)


def _floors(run: Propagation, of_atom: Ids) -> tuple[Floor, ...]:
    found = [replace(floor, channels=of_atom[floor.channels]) for floor in run.floors]
    return tuple(floor for floor in found if (floor.channels >= 0).all())


def _constants(members: _Incidence, parameters: Sequence[Parameter], channels: int) -> Ids:
    """Channels that no trainable parameter makes."""
    trainable = {p.name for p in parameters if p.trainable}
    makes = np.array([m.name in trainable and not m.read for m in members.owners], dtype=bool)
    return np.flatnonzero(~_are_among(members.channel[makes[members.owner]], channels))


def _first_lines(graph_module: fx.GraphModule) -> dict[str, str]:
    """Module or parameter name -> the user's source line that uses it first, in the order of use."""
    lines: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            user = node if node.op == "call_module" else next(iter(node.users), node)
            lines.setdefault(str(node.target), str(user.meta.get("source", "")))
    return lines


def _companions(run: Propagation, roots: Ids, is_channel: Keep) -> Ids:
    """Classes that no parameter owns, but that share a dimension of some tensor with channels: paddings."""
    found = [np.empty(0, dtype=np.int64)]
    of_channel = is_channel[roots]
    tensors = (tensor for value in run.node_labels.values() for tensor in labels_in(value))
    for factor in {id(factor): factor for tensor in tensors for factor in tensor.labels}.values():
        own = of_channel[factor.ids]
        if 0 < np.count_nonzero(own) < own.size:
            found.append(roots[factor.ids[~own]])
    return np.unique(np.concatenate(found))


class _Numbers:
    """Labels in channel numbers. ``of_atom``: for every atom its channel's number, or -1."""

    def __init__(self, of_atom: Ids):
        self.of_atom = of_atom
        self._known: dict[int, tuple[Ids, Ids, bool]] = {}  # by identity: many tensors share their factors
        self._labels: dict[tuple[int, int], Factor | None] = {}

    def ids(self, ids: Ids) -> tuple[Ids, bool]:
        """Atoms as numbers, compact, and whether these are several channels and nothing else."""
        known = self._known.get(id(ids))
        if known is None:
            result = compact(self.of_atom[ids])
            known = self._known[id(ids)] = ids, result, result.size > 1 and result.item(result.argmin()) >= 0
        return known[1:]

    def labels(self, labels: Labels) -> Labels:
        """The factors that are several channels."""
        found = []
        for factor in labels:
            key = id(factor.ids), factor.dim
            if key not in self._labels:
                ids, named = self.ids(factor.ids)
                self._labels[key] = Factor(ids, settle_dim(ids, factor.dim)) if named else None
            translated = self._labels[key]
            if translated is not None:
                found.append(translated)
        return tuple(found)


def _are_among(numbers: Ids, channels: int) -> Keep:
    """For every channel: is it among ``numbers``, of which -1 is none?"""
    result = np.zeros(channels + 1, dtype=bool)
    result[numbers] = True
    return result[:channels]


def _without_fixed_sizes(term: Term, numbers: _Numbers) -> Term:
    """Factors without a channel (sizes that never change) are folded into the constant.

    Such is also a factor whose rows were joined into a channel each: what may go is a carrier, which counts if no other
    factor cuts it.
    """
    constant, factors = term.constant, []
    cut = {factor.dim for factor in term.factors}
    for factor in term.factors:
        ids, named = numbers.ids(factor.ids)
        dim = settle_dim(ids, factor.dim)
        if not named or (dim != factor.dim and dim in cut):
            constant *= factor.ids.shape[factor.dim]
        else:
            constant *= factor.ids.shape[factor.dim] / factor.ids.shape[dim]
            factors.append(factor if dim == factor.dim else Factor(factor.ids, dim))
    return Term(term.node, constant, numbers.labels(tuple(factors)))


def _whole_dimensions(labels: Sequence[Labels], parameters: Sequence[Parameter], numbers: _Numbers) -> Ids:
    """Channels that are all there is along a dimension of a parameter, which cannot be cut then.

    ``labels``: of the parameters, in atoms.
    """
    found = [np.empty(0, dtype=np.int64)]
    for own, parameter in zip(labels, parameters, strict=True):
        for factor in own if len(parameter.labels) < len(own) else ():
            ids = numbers.ids(factor.ids)[0]
            if ids.size == 1 < factor.ids.size and ids.item() >= 0:
                found.append(ids.reshape(-1))
    return np.unique(np.concatenate(found))


class _Reasons:
    """The first reason noted for every channel, if any. ``index``: per channel into ``reasons``, or -1."""

    def __init__(self, channels: int):
        self.index: Ids = np.full(channels, -1, dtype=np.int64)
        self.reasons: list[Reason] = []
        self._known: dict[Reason, int] = {}

    def note(self, ids: Ids, reason: Reason) -> None:
        new = ids[self.index[ids] < 0]
        if len(new):
            place = self._known.setdefault(reason, len(self.reasons))
            if place == len(self.reasons):
                self.reasons.append(reason)
            self.index[new] = place

    def first(self, ids: Ids) -> Reason | None:
        """Of the first of these channels that has one."""
        found = self.index[ids.reshape(-1)]
        found = found[found >= 0]
        return self.reasons[int(found[0])] if len(found) else None


def _first_reasons(entries: Sequence[tuple[Ids, Reason]], of_atom: Ids, channels: int) -> _Reasons:
    result = _Reasons(channels)
    for atoms, reason in entries:
        ids = of_atom[atoms]
        result.note(ids[ids >= 0], reason)
    return result


@dataclass(frozen=True)
class _Incidence:
    """Who owns which channel: parallel arrays of channel and owner index, one entry for every owned atom of one."""

    channel: Ids
    owner: Ids
    owners: tuple[Member, ...]

    def of(self, channels: Ids) -> dict[int, list[int]]:
        """The owners of each of these channels, ascending."""
        width = max(len(self.owners), 1)
        wanted = _are_among(channels, int(self.channel.max(initial=channels.max(initial=-1))) + 1)
        hits = np.flatnonzero(wanted[self.channel])
        pairs = np.unique(self.channel[hits] * width + self.owner[hits])
        starts, ends = np.searchsorted(pairs, channels * width), np.searchsorted(pairs, (channels + 1) * width)
        return {int(c): (pairs[i:j] % width).tolist() for c, i, j in zip(channels, starts, ends, strict=True)}


def _members(run: Propagation, numbers: Ids) -> _Incidence:
    """``numbers``: of the owners' atoms, one owner's after the other's."""
    owner = np.repeat(np.arange(len(run.owners)), [o.count for o in run.owners])
    named = numbers >= 0
    read = (run.consumed | run.consumed_through) - run.produced
    members = tuple(Member(o.name, o.dim, (o.name, o.dim) in read, (o.name, o.dim) in run.consumed) for o in run.owners)
    return _Incidence(numbers[named], owner[named], members)


def _groups(
    channels: int,
    members: _Incidence,
    terms: Sequence[Term],
    locked: _Reasons,
    approximate: _Reasons,
    blocks: list[list[Ids]],
) -> tuple[ChannelGroup, ...]:
    """Channels with the same signature form a group; blocks that keep equal counts form one group together."""
    random = np.random.default_rng(0)
    signature = np.zeros(channels, dtype=np.uint64)
    weights = random.integers(1, 2**63, size=len(members.owners), dtype=np.uint64)
    np.add.at(signature, members.channel, weights[members.owner])
    seen: set[bytes] = set()
    for term in terms:
        for factor in term.factors:
            rows = factor.rows()
            key = rows.tobytes()
            if key not in seen:
                seen.add(key)
                np.add.at(signature, rows.reshape(-1), random.integers(1, 2**63, dtype=np.uint64))
    by_reason = random.integers(1, 2**63, size=len(locked.reasons), dtype=np.uint64)
    stays = locked.index >= 0
    signature[stays] += by_reason[locked.index[stays]]
    sets: list[list[Ids]] = []
    in_blocks = np.zeros(channels, dtype=bool)
    for block_set in blocks:
        flat = np.concatenate(block_set)
        why = locked.first(flat)
        if why is not None:
            locked.note(flat, Reason(f"in one block with channels that stay: {why.text}", why.source))
            for block in block_set:
                signature[block] += np.uint64(0x5851F42D4C957F2D)
            continue
        in_blocks[flat] = True
        sets.append(block_set)
    rest = np.flatnonzero(~in_blocks)
    order = np.argsort(signature[rest], kind="stable")  # neighbours are alike, which that makes use of
    ordered = signature[rest][order]
    splits = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    sets += [[rest[part]] for part in np.split(order, splits) if len(part)]
    sets.sort(key=lambda s: int(min(block.min() for block in s)))
    owners_of = members.of(np.array([block[0] for block_set in sets for block in block_set], dtype=np.int64))
    taken: dict[str, int] = {}
    result = []
    for block_set in sets:
        ids = np.stack(block_set)
        own = tuple(members.owners[o] for o in sorted({o for block in block_set for o in owners_of[int(block[0])]}))
        rough = approximate.first(ids)
        result.append(ChannelGroup(_name(own, taken), ids, own, rough is None, rough, locked.first(ids[:1, :1])))
    return tuple(result)


def _name(members: Sequence[Member], taken: dict[str, int]) -> str:
    """Named after the first parameter whose output they are."""
    producers = [m for m in members if m.dim == 0] or list(members)
    base = producers[0].name.removesuffix(".weight") if producers else "channels"
    taken[base] = taken.get(base, 0) + 1
    return base if taken[base] == 1 else f"{base}#{taken[base]}"


def _ascending(rows: Ids) -> Ids:
    """Every row sorted; most are."""
    return rows if not np.count_nonzero(rows[:, 1:] < rows[:, :-1]) else np.sort(rows, axis=1)


def _extents(parameters: Sequence[Parameter], nodes: Mapping[str, Any]) -> tuple[Ids, ...]:
    """Every distinct row of channels that fills a dimension of some tensor: none may become empty."""
    found: dict[bytes, Ids] = {}
    seen: set[Any] = set()
    tensors = [t for value in nodes.values() for t in labels_in(value)]
    for labels in [*(p.labels for p in parameters), *(t.labels for t in tensors)]:
        for factor in labels:
            if id(factor) in seen:  # tensors share their factors, which ``labels`` keep alive
                continue
            seen.add(id(factor))
            key = (factor.ids.tobytes(), factor.ids.shape, factor.dim)
            if key not in seen:
                seen.add(key)
                for row in distinct_rows(_ascending(factor.rows()))[0]:
                    unique = np.concatenate((row[:1], row[1:][row[1:] != row[:-1]]))
                    found.setdefault(unique.tobytes(), unique)
    return tuple(found.values())
