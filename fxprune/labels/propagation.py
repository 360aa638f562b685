"""The verbs of labelling: one propagation, what it knows, and what a rule may do to it.

Rules call ``join``, ``lock``, ``fresh``, ``collapse`` ...; ``labels.run`` runs a graph and asks the rules. Facts that a
later op reveals about an earlier one (whole heads, the layout of a grouped convolution's weight, channels that must
align) are kept in ``Facts``, and the run is repeated with them until none is new.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx

from fxprune.labels.classes import Classes, Ids, Reason, distinct_rows, equal_runs, same
from fxprune.labels.factors import Factor, Labels, narrow
from fxprune.labels.records import (
    Alike,
    Attention,
    Facts,
    Family,
    Floor,
    Interleaved,
    Owner,
    Statistic,
    TensorLabels,
    Term,
    Usage,
    labels_in,
)
from fxprune.ops.table import is_movement

_LABELS = "_fxprune_labels"
_NAME = "_fxprune_name"
_DEMANDS = "_fxprune_demands"
_CHOSEN = "_fxprune_chosen"
_TALLY = "_fxprune_tally"
_SHARED_FROM = 4096  # atoms
_ONE_SIZE = "equal parts of one dimension"
_ONE_WIDTH = (
    "heads of one width, that of queries and that of values, of which one cannot be cut: attention='uneven' cuts the "
    "other, 'heads' whole heads"
)


class Propagation:
    """One run. Rules get this object and call its verbs: ``join``, ``lock``, ``fresh``, ``collapse`` ..."""

    def __init__(
        self,
        attention: Attention = "head_dim",
        facts: Facts | None = None,
        seeded: bool = False,
        lone: npt.NDArray[np.bool_] | None = None,
    ):
        """``seeded``: parameters carry the channels of an earlier run; groups that shrank to one channel stay groups.

        ``lone``: per channel of an earlier run, is it the only one left of its block?
        """
        self.attention = attention
        self.facts = facts or Facts()
        self.seeded = seeded
        self._lone = lone
        self.classes = Classes()
        self.owners: list[Owner] = []
        self.node_labels: dict[str, Any] = {}
        self.terms: list[Term] = []
        self.statistics: list[Statistic] = []
        self.families: list[Family] = []
        self.alikes: list[Alike] = []
        self.floors: list[Floor] = []
        self.routed: list[Ids] = []
        """Channels of which data choose some: what lies along them computes for those alone."""
        self.entries: list[Ids] = []
        """Entries of an index by which a layer chooses what it reads."""
        self.heads: list[tuple[Factor, Reason]] = []  # that must go whole, cut along the channels inside
        self.interleaved: list[Interleaved] = []
        self.norm_scales: set[str] = set()
        self.consumed: set[tuple[str, int]] = set()
        self.consumed_through: set[tuple[str, int]] = set()  # of parameters from which a weight is computed
        self.produced: set[tuple[str, int]] = set()  # dims that make the channels of an output, if consumed elsewhere
        self.usage = Usage()
        self.failed: set[str] = set()  # nodes that could not be interpreted
        self.asked: set[int] = set()  # identities of the tensors whose labels the rule under way looked at
        self.followed: set[int] = set()  # of those of which it looked at what they choose
        self.new_layouts: dict[str, int] = {}
        self.new_indices: set[str] = set()
        self.new_kernels: set[tuple[str, int]] = set()
        self.fixed: list[Ids] = []
        self.rows_joined = False
        self.made = 0  # atoms from here on belong to no parameter and no input
        self.notes: list[str] = []
        self.node: fx.Node | None = None
        self._factors: dict[Any, Factor] = {}
        self._calls: dict[str, int] = {}  # of the node under way, by what the oracle counts them as
        self._scale = 1

    # -- where we are -------------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        return str(self.node.meta.get("source", "")) if self.node is not None else ""

    @property
    def node_name(self) -> str:
        return self.node.name if self.node is not None else ""

    def reason(self, text: str) -> Reason:
        return Reason(text, self.source)

    def enter(self, node: fx.Node) -> None:
        """What follows is ``node``'s doing, until ``leave``."""
        self.node, self._calls = node, {}

    def leave(self) -> None:
        self.node = None

    @contextmanager
    def at(self, node: fx.Node) -> Iterator[None]:
        self.enter(node)
        try:
            yield
        finally:
            self.leave()

    # -- labels of tensors --------------------------------------------------------------------------------------

    def labels(self, tensor: object) -> Labels:
        if not isinstance(tensor, Tensor):
            return ()
        found: Labels = getattr(tensor, _LABELS, ())
        if found:
            self.asked.add(id(tensor))
            if self.rows_joined and any(factor.roots_in is not self.classes.state for factor in found):
                found = self._settled(found, tuple(tensor.shape))  # what it meets was labelled after that, maybe
                setattr(tensor, _LABELS, found)
        return found

    def attach(self, tensor: Tensor, labels: Sequence[Factor]) -> None:
        """Give ``tensor`` its labels: canonical, compact, at most one factor per cut dimension."""
        settled = self._settled(labels, tuple(tensor.shape))
        setattr(tensor, _LABELS, settled)
        for factor in settled:
            if len(factor.varying) > 1:
                self._record_rows(factor)

    def _settled(self, labels: Sequence[Factor], shape: tuple[int, ...]) -> Labels:
        filled = [self.canonical(f) for f in labels if f.ids.size]  # along a dimension of size 0 there are no channels
        alive = [f for f in filled if not self._rigid(f)]
        return tuple([self._shared(f) for f in self._settle(alive, shape)]) if alive else ()

    def _shared(self, factor: Factor) -> Factor:
        """The same factor, once in memory however many tensors carry it: the rows of a grouped weight are millions."""
        if factor.ids.size < _SHARED_FROM:
            return factor
        key = (factor.dim, factor.ids.shape, hash(factor.ids.tobytes()))
        known = self._factors.setdefault(key, factor)
        return known if same(known.ids, factor.ids) else factor

    def _rigid(self, factor: Factor) -> bool:
        """Sizes that the model makes itself and that met something fixed are no channels any more, but fixed too."""
        return self._is_made(factor) and self.all_locked(factor)

    def _is_made(self, factor: Factor) -> bool:
        """Does none of its atoms belong to a parameter or an input?"""
        return factor.ids.item(0) >= self.made and int(factor.ids.min()) >= self.made

    def canonical(self, factor: Factor) -> Factor:
        """Roots instead of atoms, compact, cut dimension along which they vary.

        A factor that is so already is given back itself: what tensors share is known by its identity later on.
        """
        state = self.classes.state
        if factor.roots_in is not state:
            roots = self.classes.find(factor.ids)
            factor = (factor if roots is factor.ids else Factor(roots, factor.dim)).settled()
            factor.roots_in = state
        return factor

    def _settle(self, factors: list[Factor], shape: tuple[int, ...]) -> Labels:
        kept: dict[int, Factor] = {}
        for factor in factors:
            if not factor.varying:
                if shape[factor.dim] > 1:
                    self.lock(factor.ids, "one channel fills a whole dimension")
                continue
            rival = kept.get(factor.dim)
            if rival is None:
                kept[factor.dim] = factor
            elif not same(rival.ids, factor.ids):
                goes = self.all_locked(rival) or (self._is_made(rival) and not self._is_made(factor))
                outer, inner = (rival, factor) if goes else (factor, rival)
                self.lock(outer.ids, "two kinds of channels meet in one dimension")
                kept[factor.dim] = inner
        return self._separate(kept, shape)

    def _separate(self, kept: dict[int, Factor], shape: tuple[int, ...]) -> Labels:
        """A dimension that one factor cuts and another is carried by: whole heads, groups of a weight, or a lock."""
        if len(kept) < 2:
            return tuple(kept.values())
        changed = False
        for factor in list(kept.values()):
            for other in list(kept.values()):
                if other is factor or factor.dim not in other.carriers or self.all_locked(factor):
                    continue
                if self.repeats(factor):  # a row goes with all its copies, and how many copies there are stays
                    self.lock(factor.ids, "copies of whole rows")
                    kept.pop(factor.dim, None)
                    continue
                runs = equal_runs(np.moveaxis(other.ids, factor.dim, 0))
                if runs and len(factor.varying) == 1:
                    self.family(factor.ids.reshape(runs, -1), "groups of a weight")
                elif self.attention == "heads":
                    self.join(factor.ids, other.ids)
                    self.rows_joined = changed = True
                else:
                    self.lock(factor.ids, "whole blocks of channels, where channels are pruned inside blocks")
        if changed:
            return self._settle([self.canonical(f) for f in kept.values()], shape)
        return tuple(kept[d] for d in sorted(kept))

    def _record_rows(self, factor: Factor) -> None:
        rows, _ = distinct_rows(factor.rows())
        if len(rows) > 1 and not self.classes.locked(rows).all():
            reason = self.reason("blocks of equal size")
            self.families.append(Family(rows, self.node_name, reason, is_movement(self.node), factor))

    # -- verbs of the rules -------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Ids:
        return self.classes.allocate(count)

    def join(self, a: Ids, b: Ids) -> None:
        self.classes.join(a, b)

    def lock(self, ids: Ids, text: str) -> None:
        self.classes.lock(ids, self.reason(text))

    def fix(self, ids: Ids, text: str) -> None:
        """These sizes are no channels at all: kernel sizes. Locked, and left out of every list."""
        self.lock(ids, text)
        self.fixed.append(ids.reshape(-1))

    def lock_all(self, labels: Sequence[Factor], text: str) -> None:
        for factor in labels:
            self.lock(factor.ids, text)

    def lock_if_used(self, tensor: Tensor, ids: Ids, text: str) -> None:
        """These channels must stay if anything reads ``tensor``, an output that is seldom read."""
        setattr(tensor, _DEMANDS, (ids, self.reason(text)))

    def used(self, tensor: Tensor) -> None:
        """Something reads ``tensor``."""
        ids, reason = getattr(tensor, _DEMANDS, (None, None))
        if ids is not None and reason is not None:
            self.classes.lock(ids, reason)

    def all_locked(self, factor: Factor) -> bool:
        return bool(self.classes.locked(factor.ids).all())

    def are_lone(self, factor: Factor) -> bool:
        """Blocks of one channel each: along a dimension of size 1, though they seem to lie along that of the blocks."""
        lone, ids = self._lone, factor.ids
        return lone is not None and int(ids.max()) < len(lone) and bool(lone[ids].all())

    def repeats(self, factor: Factor) -> bool:
        """Copies that the model makes of every row, ``[rows, copies]`` in one dimension: no row is any copy's own."""
        return self._is_made(factor) and len(np.unique(factor.ids)) < factor.ids.size

    def unread(self, op: str, *tensors: Tensor | None) -> None:
        """The rule for ``op`` says nothing of these operands: their channels stay as they are."""
        for tensor in tensors:
            for factor in self.labels(tensor):
                if not self.all_locked(factor):
                    self.lock(factor.ids, f"not read by the rule for {op}")

    def approximate(self, ids: Ids, text: str) -> None:
        self.classes.approximate(ids, self.reason(text))

    def family(self, rows: Ids, text: str) -> None:
        if len(rows) > 1:
            self.families.append(Family(distinct_rows(rows)[0], self.node_name, self.reason(text)))

    def attend(self, query: Tensor, value: Tensor) -> None:
        """One attention ``[..., heads, tokens, channels]``: heads go whole, or those of both keep one width."""
        found = [next((f for f in self.labels(t) if f.dim == t.ndim - 1), None) for t in (query, value)]
        one, other = found
        if self.attention == "heads":
            several = query.ndim > 2 and query.shape[-3] > 1
            self.heads += [(f, self.reason("heads")) for f in found if f is not None and several]
        elif self.attention == "head_dim" and query.shape[-1] == value.shape[-1]:
            if one is not None and other is not None:
                self.alikes.append(Alike(one, other, self.node_name, self.reason(_ONE_WIDTH)))
            else:
                self.lock_all([f for f in found if f is not None], _ONE_WIDTH)

    def parts(self, labels: Sequence[Labels], dim: int) -> None:
        """Equal parts of one dimension keep one size, for which the code may have a single number."""
        if self.attention == "uneven":
            return
        found = [f for factors in labels for f in factors if f.dim == dim and dim in f.varying]
        if len(found) == len(labels):
            alike = [Alike(found[0], f, self.node_name, self.reason(_ONE_SIZE), optional=True) for f in found[1:]]
            self.alikes += alike

    # -- channels that data choose ---------------------------------------------------------------------------------

    def choose(self, tensor: Tensor, ids: Ids) -> None:
        """The values of ``tensor``, integers, are places along a dimension with these channels ``[n]``.

        Where channels go, it holds the places among those that stay. What reads it otherwise locks them.
        """
        setattr(tensor, _CHOSEN, ids)

    def chosen(self, tensor: object) -> Ids | None:
        """The channels that the values of ``tensor`` are places of; the rule under way follows them."""
        ids: Ids | None = getattr(tensor, _CHOSEN, None)
        self.followed.add(id(tensor))
        return ids

    def has_chosen(self, tensor: object, ids: Ids) -> bool:
        """Whether the values of ``tensor`` are places of the same channels."""
        own: Ids | None = getattr(tensor, _CHOSEN, None)
        return own is not None and same(self.classes.find(own), self.classes.find(ids))

    def count_chosen(self, tensor: Tensor, ids: Ids, ends: bool = False) -> Labels:
        """``tensor [n]`` holds how often each of these channels was chosen; ``ends``: it and those before it."""
        setattr(tensor, _TALLY, (ids, ends))
        return (Factor(ids.reshape(-1), 0),)

    def copy_count(self, tensor: Tensor, copy: Tensor) -> None:
        """``copy`` counts what ``tensor`` does, if that counts channels."""
        if hasattr(tensor, _TALLY):
            setattr(copy, _TALLY, getattr(tensor, _TALLY))

    def counted_chosen(self, tensor: object, ends: bool = False) -> Ids | None:
        """The channels that ``tensor`` counts so, if it does."""
        ids, is_ends = getattr(tensor, _TALLY, (None, ends))
        return ids if is_ends == ends else None

    def route(self, ids: Ids, chosen: Ids) -> None:
        """What lies along ``ids`` computes for the chosen ones of these channels only: they are the same."""
        self.join(ids.reshape(-1), chosen)
        self.routed.append(chosen)

    def at_least(self, ids: Ids, least: int, text: str) -> None:
        """Of these channels so many are chosen, whichever."""
        self.floors.append(Floor(ids.reshape(-1), least, self.reason(text)))

    # -- for the proof and the report ------------------------------------------------------------------------------

    def count(self, op: str) -> None:
        """A call of ``op`` is under way, whose statistics the mask oracle takes: it counts the calls too."""
        self._calls[op] = self._calls.get(op, -1) + 1

    def statistic(self, op: str, labels: Labels) -> None:
        """Note that the call of ``op`` under way mixes these channels, for the mask oracle."""
        if labels:
            self.statistics.append(Statistic(self.node_name, self._calls.get(op, 0), op, labels))

    def note_norm_scale(self, scale: Tensor | None) -> None:
        """``scale`` multiplies normalised channels: criteria on norm layers read the parameter that it holds."""
        self.norm_scales |= self.usage.held.get(id(scale), frozenset())

    @contextmanager
    def scaled(self, factor: int) -> Iterator[None]:
        """Inside, the terms of contractions count ``factor`` times: kernel positions and pixels of a convolution."""
        before, self._scale = self._scale, self._scale * factor
        try:
            yield
        finally:
            self._scale = before

    def term(self, constant: float, factors: Labels) -> None:
        """MACs of a contraction: ``constant`` times the sizes the ``factors`` cut."""
        self.terms.append(Term(self.node_name, constant * self._scale, factors))

    def uncounted(self, tensors: Sequence[Tensor], what: str) -> None:
        """Say which parameters among ``tensors`` take part in work that nobody counts."""
        for tensor in tensors:
            name = getattr(tensor, _NAME, None) or getattr(tensor._base, _NAME, None)
            if name is not None and tensor.ndim > 1:
                count = (tensor if tensor._base is None else tensor._base).numel()
                note = f"not counted: {count} parameters of {name} in {what} ({self.source})"
                if note not in self.notes:
                    self.notes.append(note)

    def request_layout(self, ids: Ids, groups: int) -> bool:
        """Ask for the weight that owns ``ids`` along dim 1 to be labelled per group in the next run."""
        atom = int(ids.min())
        owner = next((o for o in self.owners if o.first <= atom < o.first + o.count), None)
        if owner is None or owner.dim != 1 or self.facts.layouts.get(owner.name) == groups:
            return False
        if next((o.count for o in self.owners if o.name == owner.name and o.dim == 0), 1) % groups:
            return False  # the rows are laid out as groups later: for every sample its own, say
        self.new_layouts[owner.name] = groups
        return True

    def request_kernel(self, factor: Factor, size: int) -> None:
        """Ask for the kernel's dims that this factor is of to have no atoms in the next run.

        Rows that hold one kernel in several orders, as it is and turned, would be blocks of channels otherwise.
        """
        roots = self.classes.find(np.unique(factor.ids))
        for owner in () if self.seeded else self.owners:
            if owner.dim > 1 and owner.count == size:
                own = self.classes.find(np.arange(owner.first, owner.first + owner.count))
                if np.isin(own, roots).any():
                    self.new_kernels.add((owner.name, owner.dim))

    def consume(self, names: Iterable[str], factors: Sequence[Factor]) -> None:
        """A weight that is computed from these parameters is contracted along ``factors``: so is a dim of each."""
        roots = self.classes.find(np.concatenate([np.empty(0, dtype=np.int64), *(f.ids.reshape(-1) for f in factors)]))
        for name in names:
            dims = {
                o.dim
                for o in self.owners
                if o.name == name and np.isin(self.classes.find(np.arange(o.first, o.first + o.count)), roots).any()
            }
            if len(dims) == 1:  # of two that are one channel it is not told which
                self.consumed_through.add((name, dims.pop()))

    def request_index(self, tensor: Tensor) -> bool:
        """Ask for the entries of a buffer of integers or flags to have atoms in the next run."""
        name = getattr(tensor, _NAME, None)
        if name is None or self.seeded or name in self.facts.indices:
            return False
        self.new_indices.add(name)
        return True

    def is_parameter(self, tensor: Tensor) -> bool:
        """Is this a parameter or buffer, or a view of one?"""
        return hasattr(tensor, _NAME) or hasattr(tensor._base, _NAME)

    def known(self, node: fx.Node) -> list[TensorLabels]:
        """The tensors that an earlier node made."""
        return labels_in(self.node_labels.get(node.name))

    def name_of(self, tensor: Tensor) -> str | None:
        """Of the parameter or buffer that this is, itself."""
        return getattr(tensor, _NAME, None)

    def parameter_dims(self, tensor: Tensor) -> tuple[str, tuple[int, ...]] | None:
        """The name of the parameter or buffer that this is, itself or transposed, and its dims in this order."""
        name, straight = getattr(tensor, _NAME, None), tuple(range(tensor.ndim))
        if name is not None:
            return name, straight
        owner = tensor._base
        if owner is None or not hasattr(owner, _NAME) or owner.ndim != tensor.ndim:
            return None
        order = straight if tensor.stride() == owner.stride() and tensor.shape == owner.shape else straight[::-1]
        return getattr(owner, _NAME), order

    def produces(self, tensor: Tensor, dim: int) -> None:
        """Channels of an output are made along this dim of a parameter, which another op may contract."""
        if (known := self.parameter_dims(tensor)) is not None:
            self.produced.add((known[0], known[1][dim]))

    def collapse(self, factor: Factor, dims: Sequence[int]) -> Factor:
        """Join along ``dims``: positions that differ only there become one channel."""
        ids = factor.ids
        for d in dims:
            if ids.shape[d] > 1:
                first = narrow(ids, d, 0, 1)
                self.join(ids, first)
                ids = first
        return self.canonical(factor if ids is factor.ids else Factor(ids, factor.dim))

    def mix(self, factor: Factor, dims: Sequence[int], text: str, *, ordered: bool = False) -> Factor | None:
        """An op that combines positions along ``dims``: carriers there are joined, a cut there is locked.

        Unless ``ordered``, a factor that also varies elsewhere is cut there (sub-pixels of a channel, say).
        """
        if not any(factor.ids.shape[d] > 1 for d in dims):
            return factor
        if all(d in dims for d in factor.varying) or (ordered and factor.dim in dims):
            self.lock(factor.ids, text)
            return None
        return self.collapse(factor, dims)

    def interleave(self, before: Factor) -> None:
        """See ``Interleaved``."""
        reason = self.reason("channels of several blocks are interleaved")
        self.interleaved.append(Interleaved(before, self.node_name, reason, not is_movement(self.node)))


def describe(run: Propagation, value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorLabels(tuple(value.shape), value.dtype, run.labels(value), hasattr(value, _CHOSEN))
    return value


def set_labels(tensor: Tensor, labels: Labels, name: str | None = None) -> None:
    """Attach labels as they are. ``name``: of the parameter or buffer that this is."""
    setattr(tensor, _LABELS, labels)
    if name is not None:
        setattr(tensor, _NAME, name)
