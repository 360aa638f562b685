"""What a propagation finds out, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from fxprune.labels.classes import Ids, Reason
from fxprune.labels.factors import Factor, Labels

Attention = Literal["head_dim", "uneven", "heads"]


@dataclass(frozen=True)
class TensorLabels:
    """What is known of one tensor: its shape, dtype and labels. ``chosen``: its values are places of channels."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    labels: Labels
    chosen: bool = False


@dataclass(frozen=True)
class Term:
    """MACs of one contraction: ``constant`` times the product of the sizes of ``factors``' cut dimensions."""

    node: str
    constant: float
    factors: Labels


@dataclass(frozen=True)
class Statistic:
    """The ``index``-th ``op`` of ``node``, which mixes channels of its input; ``labels`` are those it mixes."""

    node: str
    index: int
    op: str
    labels: Labels


@dataclass(frozen=True)
class Family:
    """Rows of atoms ``[rows, n]`` that must keep equal counts. ``node``: where; ``movable``: only moved there.

    ``optional``: if nothing has to be locked or joined for it.
    ``factor``: whose rows they are, where that may change: joins can leave fewer rows, or none, by the end of the run.
    """

    rows: Ids
    node: str
    reason: Reason
    movable: bool = False
    factor: Factor | None = None
    optional: bool = False


@dataclass(frozen=True)
class Alike:
    """Two dimensions of one size that keep it: every row of ``one`` has as many positions as every row of ``other``.

    ``optional``: if nothing has to be locked or joined for it.
    """

    one: Factor
    other: Factor
    node: str
    reason: Reason
    optional: bool = False


@dataclass(frozen=True)
class Interleaved:
    """A view in ``node`` lays the carrier rows of ``before`` side by side, position by position."""

    before: Factor
    node: str
    reason: Reason
    inside: bool


@dataclass(frozen=True)
class Floor:
    """Of these channels so many stay: the best of them are chosen, and there must be as many as are."""

    channels: Ids
    least: int
    reason: Reason


@dataclass
class Facts:
    """What earlier runs found out.

    ``layouts``: weight name -> groups. ``joins``: pairs of parameter atoms. ``indices``: names of integers that have
    atoms, as an op takes each of them as a channel of its own, and of flags, one for each channel. ``kernels``: dims of
    parameters that have none: the kernel's, of which rows have several orders.
    """

    layouts: dict[str, int] = field(default_factory=dict)
    joins: list[tuple[Ids, Ids]] = field(default_factory=list)
    indices: frozenset[str] = frozenset()
    kernels: frozenset[tuple[str, int]] = frozenset()


@dataclass(frozen=True)
class Owner:
    """The dimension of a parameter or buffer that a range of atoms labels."""

    name: str
    dim: int
    first: int
    count: int


@dataclass
class Usage:
    """What the recording used of the parameters; see ``labels.usage``.

    ``unread``: by identity, the tensors that hold parameters or parts of them, as they are. ``held``: the names of
    these. ``made``: by identity, parameters and what was computed from them alone, and their names. ``names``: of
    parameters that were read whole. ``inputs``: the positions of network inputs. ``follows``: is a node a number that
    depends on an input's size?
    """

    unread: dict[int, Tensor] = field(default_factory=dict)
    held: dict[int, frozenset[str]] = field(default_factory=dict)
    made: dict[int, tuple[Tensor, frozenset[str]]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    read: list[Ids] = field(default_factory=list)
    parted: list[tuple[Labels, Reason]] = field(default_factory=list)
    bounded: list[tuple[Ids, Reason]] = field(default_factory=list)
    inputs: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    follows: dict[fx.Node, bool] = field(default_factory=dict)

    def add(self, tensor: Tensor, names: frozenset[str] = frozenset()) -> None:
        """A parameter, or part of one; ``names``: of all whose numbers are in it."""
        self.unread[id(tensor)] = tensor
        self.held[id(tensor)] = names | self.held.get(id(tensor), frozenset())

    def sources(self, tensor: Tensor) -> frozenset[str] | None:
        """The parameters that this is, or that it was computed from, if nothing but parameters is in it."""
        return self.made.get(id(tensor), (tensor, None))[1]

    def add_input(self, ids: Ids) -> None:
        """The positions of a network input."""
        self.inputs = np.concatenate([self.inputs, ids])


def labels_in(value: Any) -> list[TensorLabels]:
    """What is known of the tensors in a node's value."""
    if isinstance(value, TensorLabels):
        return [value]
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, TensorLabels)]


def channels_of(known: Any) -> list[int]:
    """Every channel in the labels of a node's value."""
    labels = [t.labels for t in labels_in(known)]
    return sorted({int(c) for factors in labels for f in factors for c in np.unique(f.ids)})
