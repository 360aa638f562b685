"""Where weights can be solved for: every contraction of the pruned graph beside its dense counterpart."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxprune.depth import STANDS_KEY
from fxprune.reconstruction.entries import Counterparts, Entries, Numbers, is_in
from fxprune.reconstruction.lanes import Lane
from fxprune.reconstruction.survey import Call, Facts, Norm, Place

Columns = tuple[Tensor | None, Tensor]
"""Of every output of a product the group and the output of the dense product, both ``[g, O]``. No groups: it is the
same group; then ``[1, O]`` are the outputs of every one."""


@dataclass(frozen=True)
class Branch:
    """What becomes of a product before anything else reads it.

    ``norm``: what it goes through. ``other``: the node, there already, whose value it is added to then, if it is, and
    ``dense_other`` that in the dense graph. ``target``: where branches of the dense graph are missing behind it, the
    dense node whose values the result should have, beside its own counterpart, ``total``.
    """

    norm: Norm | None
    other: str | None
    dense_other: str | None
    total: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class Site:
    """One weight, and the calls that multiply with it.

    ``numbers [g, K, O]``, ``vector [g, O]``: entries of the pruned network; ``vector`` None without a bias of its own.
    ``group``: of every group of a call the one in ``numbers``, where several share one. ``columns``: per call the dense
    product's. ``norm``: takes up a shift of the outputs where there is no bias.
    """

    name: str
    op: str
    calls: tuple[Call, ...]
    numbers: Numbers
    vector: Tensor | None
    group: Tensor | None
    columns: tuple[Columns, ...]
    norm: Norm | None
    branch: Branch | None

    @property
    def matrix(self) -> Tensor:
        """Numbers of entries, ``[g, K, O]``."""
        return self.numbers.tensor

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(call.place for call in self.calls)


@dataclass(frozen=True)
class NormSite:
    """A norm whose mean can follow. ``columns [C]``: of the dense norm's channels, of which there are ``width``."""

    norm: Norm
    columns: Tensor
    width: int


def sites_of(
    lane: Lane, facts: Facts, dense_lane: Lane, dense: Facts, entries: Entries, counterparts: Counterparts
) -> tuple[list[Site], list[NormSite], list[tuple[Call, str]]]:
    """The weights to solve for in the order of their last call, norms that follow none, and what is left alone."""
    calls: dict[Hashable, list[Call]] = {}
    for call in facts.calls.values():
        calls.setdefault(call.numbers.key, []).append(call)
    sites, left_alone = [], []
    owners = _Owners(entries)
    for key, own in calls.items():
        owners.add(key, own[0].numbers)
        for vector in (call.vector for call in own):
            owners.add(key, None if vector is None else Numbers.of(vector))
    for place, norm in facts.norms.items():
        owners.add(place, Numbers.of(norm.mean))
    for own in calls.values():
        found = _site(own, lane, facts, dense_lane, dense, entries, counterparts, owners)
        if isinstance(found, Site):
            sites.append(found)
        else:
            left_alone.append((own[0], found))
    sites.sort(key=lambda s: max(lane.position[lane.named[node]] for node, _ in s.places))
    taken = {site.norm.place for site in sites if site.norm is not None}
    norms = []
    for place, norm in facts.norms.items():
        whole = dense.norms.get(place)
        columns = None if whole is None else _places_in(whole.mean, counterparts.dense(norm.mean))
        if whole is not None and place not in taken and columns is not None and not owners.shared(place, norm.mean):
            norms.append(NormSite(norm, columns, whole.mean.numel()))
    return sites, norms, left_alone


class _Owners:
    """Who reads an entry: contractions, by their matrix, and norms, by their place."""

    def __init__(self, entries: Entries):
        self._entries = entries
        self._known: dict[str, dict[Hashable, list[Numbers]]] = {}

    def add(self, owner: Hashable, numbers: Numbers | None) -> None:
        """``owner`` reads these entries."""
        if numbers is not None:
            for name in self._entries.names_of(numbers.tensor.reshape(-1)):
                self._known.setdefault(name, {}).setdefault(owner, []).append(numbers)

    def shared(self, owner: Hashable, numbers: Tensor) -> bool:
        """Whether another reads one of these entries."""
        numbers = numbers.reshape(-1)
        known = [self._known.get(name, {}) for name in self._entries.names_of(numbers)]
        others = [own for table in known for key, all_ in table.items() if key != owner for own in all_]
        return any(bool(torch.isin(numbers, other.tensor.reshape(-1)).any()) for other in others)


def distinct(numbers: Numbers) -> tuple[Tensor, Tensor | None]:
    """The different ones among groups ``[g, K, O]``, and of every group which it is, ``[g]``; None if all differ."""
    matrix = numbers.tensor
    if numbers.differ or matrix.unique().numel() == matrix.numel():
        return matrix, None
    rows, group = torch.unique(matrix.flatten(1), dim=0, return_inverse=True)
    return rows.unflatten(1, matrix.shape[1:]), group


def _site(
    calls: Sequence[Call], lane: Lane, facts: Facts, dense_lane: Lane, dense: Facts, entries: Entries,
    counterparts: Counterparts, owners: _Owners,
) -> Site | str:  # fmt: skip
    """The weight that these calls share, or why it is left alone."""
    first, key = calls[0], calls[0].numbers.key
    names = entries.names_of(first.matrix.reshape(-1))
    elsewhere = next((facts.elsewhere[name] for name in names if name in facts.elsewhere), "")
    if elsewhere:
        return f"its weight is also read by {elsewhere}"
    if owners.shared(key, first.matrix):
        return "another contraction reads a part of its weight"
    matrix, group = distinct(first.numbers)
    if group is not None and matrix.unique().numel() < matrix.numel():
        return "it reads an entry of its weight more than once"
    vector = first.vector if group is None else None
    numbers = counterparts.dense(first.matrix)
    if numbers is None:
        return "it has no counterpart in the dense network"
    columns = []
    for call in calls:
        whole = dense.calls.get(call.place)
        if whole is None:
            return "it has no counterpart in the dense network"
        if whole.rows != call.rows:
            return "its rows are channels that were cut"
        places = _columns(whole.numbers, numbers)
        if isinstance(places, str):
            return places
        columns.append(places)
    if vector is not None and (
        any(name in facts.elsewhere for name in entries.names_of(vector.reshape(-1)))
        or any(c.vector is None or not torch.equal(c.vector, vector) for c in calls)
        or owners.shared(key, vector)
    ):
        vector = None
    norm = _norm_after(lane, facts, first) if vector is None and group is None and len(calls) == 1 else None
    if norm is not None and owners.shared(norm.place, norm.mean):
        norm = None
    branch = None
    if len(calls) == 1 and first.whole:
        branch = _branch(lane, facts, first, dense_lane, dense, dense.calls[first.place])
    return Site(
        ", ".join(names), first.op, tuple(calls), Numbers.of(matrix), vector, group, tuple(columns), norm, branch
    )


def _columns(dense: Numbers, numbers: Tensor) -> Columns | str:
    """Where the matrix ``dense [g, K, O]`` has the columns of ``numbers [g, K, O]``, or why that is not known."""
    firsts, (different, group), whole = numbers[:, 0], distinct(dense), dense.tensor
    if group is not None:
        if len(whole) != len(numbers):
            return "which of the groups that share its weight went, the weight does not tell"
        if len(different) == 1:
            whole, firsts = whole[:1], firsts[:1]
        apart = (int(whole.max()) + 1) * torch.arange(len(whole)).unsqueeze(1)
        whole, firsts = whole + apart.unsqueeze(2), firsts + apart
    places = _places_in(whole.reshape(-1), firsts.reshape(-1))
    if places is None:
        return "it has no counterpart in the dense network"
    outputs, inputs = whole.shape[2], whole.shape[1]
    found = (places % outputs).view(firsts.shape)
    return (places // (inputs * outputs)).view(firsts.shape) if len(whole) > 1 and group is None else None, found


def _places_in(whole: Tensor, numbers: Tensor | None) -> Tensor | None:
    """For every number its place in ``whole``, both ``[n]``; None if one is not there."""
    if numbers is None:
        return None
    there = is_in(whole, numbers).nonzero().squeeze(1)
    if not len(there):
        return None
    order = whole[there].argsort(stable=True)
    ordered = whole[there][order]
    found = torch.searchsorted(ordered, numbers.contiguous()).clamp_max(len(ordered) - 1)
    return there[order][found] if torch.equal(ordered[found], numbers) else None


def _norm_after(lane: Lane, facts: Facts, call: Call) -> Norm | None:
    """The norm that alone reads a product, one statistic for every output of it."""
    node = lane.named[call.place[0]]
    if not call.whole:
        return None
    for following in lane.path(node):
        if following.name not in facts.same:
            norm = facts.norms.get((following.name, 0))
            return norm if norm is not None and norm.mean.numel() == call.outputs else None
    return None


def _branch(lane: Lane, facts: Facts, call: Call, dense_lane: Lane, dense: Facts, dense_call: Call) -> Branch | None:
    found = _Path(lane, facts, call)
    stands: Mapping[str, str] = lane.module.meta.get(STANDS_KEY, {})
    other = found.other if found.is_early else None
    total = next((name for name in reversed(found.results) if name in stands and name in dense_lane.named), None)
    if other is None and (found.other is not None or total is None):
        return None
    whole = _Path(dense_lane, dense, dense_call)
    dense_other = whole.other if whole.is_early else None
    if (other is None) != (dense_other is None):
        return None
    if total is None or stands[total] not in dense_lane.named:
        return Branch(found.norm, other, dense_other)
    return Branch(found.norm, other, dense_other, total, stands[total])


def _is_sum(node: fx.Node, facts: Facts) -> bool:
    return node.name in facts.adds and node.op != "call_module"


class _Path:
    """From a product on, as long as each node is all that the one before is used for.

    ``norm``: what it goes through first; ``other``: the node it is added to then; ``is_early``: whether that is there
    before the product. ``results``: nodes that give what comes out, in their order.
    """

    def __init__(self, lane: Lane, facts: Facts, call: Call):
        self.norm: Norm | None = None
        self.other: str | None = None
        self.is_early = False
        node = last = lane.named[call.place[0]]
        self.results = [node.name]
        for following in lane.path(node):
            ops = facts.ops[following.name]
            own = facts.norms.get((following.name, 0))
            if own is not None and own.whole and len(ops) == 1 and self.norm is None and self.other is None:
                if own.mean.numel() != call.outputs:
                    return
                self.norm, self.results = own, []
            elif self.other is None and len(ops) == 1 and _is_sum(following, facts):
                others = [a for a in following.args if a is not last]
                other = others[0] if len(others) == 1 and len(following.args) == 2 and not following.kwargs else None
                while isinstance(other, fx.Node) and other.name in facts.same:
                    other = other.all_input_nodes[0]
                if not isinstance(other, fx.Node):
                    return
                self.other, self.results = other.name, []
                self.is_early = other in lane.position and lane.position[other] < lane.position[node]
            elif following.name not in facts.same:
                return
            self.results.append(following.name)
            last = following
