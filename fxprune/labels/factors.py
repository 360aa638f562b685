"""Labels: which channel does each position of a tensor belong to?

A tensor carries *factors*. A factor is an integer array of atoms, with as many dimensions as the tensor it labels and
size 1 wherever the atom does not vary, and ``dim``, the dimension a removal cuts. A position of the tensor survives
when every factor's channel there survives. The other dimensions along which a factor varies are its *carriers*: for
queries ``[B, heads, N, d]`` the factor varies along ``heads`` and ``d``, cuts ``d``, and is carried by ``heads``.
A dimension of size > 1 that no factor cuts is *rigid*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.labels.classes import Ids


@dataclass(slots=True, repr=False, eq=False)  # as many are made as a network has dims: too many to freeze each
class Factor:
    """``ids``: atoms, size 1 where constant; never written to. ``dim``: the dimension that is cut. Neither changes.

    ``roots_in``: the state of the classes in which it was last found canonical.
    """

    ids: Ids
    dim: int
    roots_in: object = field(default=None, init=False)
    _varying: tuple[int, ...] | None = field(default=None, init=False)
    _is_settled: bool | None = field(default=None, init=False)

    def __repr__(self) -> str:
        return f"Factor({list(self.ids.shape)}, dim={self.dim}, ids={self.ids.flatten()[:4].tolist()}...)"

    @property
    def varying(self) -> tuple[int, ...]:
        if self._varying is None:
            self._varying = tuple([d for d, size in enumerate(self.ids.shape) if size > 1])
        return self._varying

    @property
    def carriers(self) -> tuple[int, ...]:
        if self.ids.size == self.ids.shape[self.dim]:  # as nearly always
            return ()
        return tuple([d for d in self.varying if d != self.dim])

    @property
    def is_settled(self) -> bool:
        """Compact, and cut along a dimension along which it varies."""
        if self._is_settled is None:
            self._is_settled = compact(self.ids) is self.ids and settle_dim(self.ids, self.dim) == self.dim
        return self._is_settled

    def laid(self, ids: Ids, dim: int) -> Factor:
        """The same, where dims changed places and dims of size 1 came or went: ``ids``, cut along ``dim``."""
        result = Factor(ids, dim)
        result.roots_in = self.roots_in
        return result

    def settled(self) -> Factor:
        """The same, compact and cut along a dimension along which it varies."""
        if self.is_settled:
            return self
        ids = compact(self.ids)
        return Factor(ids, settle_dim(ids, self.dim))

    def rows(self) -> Ids:
        """The atoms as ``[carrier positions, size of the cut dimension]``."""
        size = self.ids.shape[self.dim]
        if size == self.ids.size:
            return self.ids.reshape(1, size)
        return np.moveaxis(self.ids, self.dim, -1).reshape(-1, size)

    def tensor(self) -> Tensor:
        """The atoms as a tensor."""
        return torch.from_numpy(self.ids.copy())  # a view may run backwards, which torch cannot


Labels: TypeAlias = tuple[Factor, ...]


def narrow(ids: Ids, dim: int, start: int, size: int) -> Ids:
    """``size`` positions from ``start`` on along ``dim``."""
    return ids[(slice(None),) * dim + (slice(start, start + size),)]


def compact(ids: Ids) -> Ids:
    """``ids`` with size 1 in every dimension along which they do not vary; themselves if there is none to shrink."""
    if ids.size == max(ids.shape, default=1) > 1 and ids.item(0) != ids.item(-1):  # one row, as nearly always
        return ids
    for d, size in enumerate(ids.shape):
        if size > 1 and ids.size:
            first, last = narrow(ids, d, 0, 1), narrow(ids, d, size - 1, 1)
            if first.item(0) == last.item(0) and not np.count_nonzero(ids != first):  # one look settles most of them
                ids = first
    return ids


def vector(ids: Ids, dim: int, ndim: int) -> Ids:
    """One-dimensional ``ids`` laid along ``dim`` of a tensor with ``ndim`` dimensions."""
    return ids.reshape((1,) * dim + (-1,) + (1,) * (ndim - dim - 1))


def moved(factor: Factor, order: Sequence[int]) -> Factor:
    """The factor after ``permute(order)``."""
    return factor.laid(factor.ids.transpose(order), list(order).index(factor.dim))


def without(factor: Factor, gone: Sequence[int]) -> Factor:
    """The factor of a tensor that lost the dimensions ``gone``, along which it does not vary."""
    left = [d for d in range(factor.ids.ndim) if d not in gone]
    ids = factor.ids.reshape([factor.ids.shape[d] for d in left])
    return Factor(ids, settle_dim(ids, left.index(factor.dim) if factor.dim in left else 0))


def aligned(factor: Factor, ndim: int) -> Factor:
    """The factor with leading dimensions of size 1 added, as broadcasting does."""
    extra = ndim - factor.ids.ndim
    return factor if not extra else factor.laid(factor.ids.reshape((1,) * extra + factor.ids.shape), factor.dim + extra)


def view_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest split of a view into independent blocks ``(old dims, new dims)``; dimensions of size 1 left out."""
    olds = [d for d, s in enumerate(old) if s != 1]
    news = [d for d, s in enumerate(new) if s != 1]
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(olds) and j < len(news):
        a, b = [olds[i]], [news[j]]
        left, right = old[olds[i]], new[news[j]]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, a, i = left * old[olds[i]], [*a, olds[i]], i + 1
            else:
                right, b, j = right * new[news[j]], [*b, news[j]], j + 1
        blocks.append((a, b))
    return blocks


def viewed(factor: Factor, old: Sequence[int], new: Sequence[int]) -> tuple[Factor, bool]:
    """The factor after ``view(new)`` of a tensor of shape ``old``.

    The second value says that channels of different carrier rows come to lie interleaved in one dimension, so that
    cutting before the view and cutting after it give a different order.
    """
    pattern_old, pattern_new = [1] * len(old), [1] * len(new)
    cut: list[int] = []
    interleaved = False
    for a, b in view_blocks(old, new):
        varying = [d for d in a if factor.ids.shape[d] > 1]
        if not varying:
            continue
        for d in a:
            pattern_old[d] = old[d]
        for d in b:
            pattern_new[d] = new[d]
        if factor.dim in a:
            cut = b
            interleaved = len(a) > 1 and factor.dim != varying[-1]
    ids = compact(expanded(factor.ids, pattern_old).reshape(pattern_new))
    return Factor(ids, settle_dim(ids, next((d for d in reversed(cut) if ids.shape[d] > 1), -1))), interleaved


def settle_dim(ids: Ids, hint: int) -> int:
    """``hint`` where the ids vary along it, else the innermost dimension along which they do (or the hint)."""
    if hint >= 0 and ids.shape[hint] > 1:
        return hint
    varying = [d for d, size in enumerate(ids.shape) if size > 1]
    return varying[-1] if varying else max(hint, 0)


def along(factor: Factor, dim: int, op: Callable[[Ids], Ids]) -> Factor:
    """Apply ``op``, which keeps the number of dims and acts on ``dim`` alone, unless the ids do not vary there."""
    if factor.ids.shape[dim] == 1:
        return factor
    ids = compact(op(factor.ids))
    return Factor(ids, settle_dim(ids, factor.dim))


def expanded(ids: Ids, shape: Sequence[int]) -> Ids:
    """``ids`` broadcast to ``shape``."""
    return ids if ids.shape == tuple(shape) else np.broadcast_to(ids, tuple(shape))


def full(factor: Factor, shape: Sequence[int], dims: Sequence[int]) -> Ids:
    """The ids expanded to the tensor's size along ``dims`` only."""
    return expanded(factor.ids, [shape[d] if d in dims else s for d, s in enumerate(factor.ids.shape)])


def cut_sizes(shape: Sequence[int], labels: Labels, keep: npt.NDArray[np.bool_]) -> list[int]:
    """The shape after removal of every channel ``c`` with ``keep[c]`` false (ids in ``labels`` index ``keep``)."""
    sizes = list(shape)
    for factor in labels:
        rows = factor.rows()
        kept = int(np.count_nonzero(keep[rows]))
        sizes[factor.dim] = kept if len(rows) == 1 else round(kept / len(rows))
    return sizes


def left_rows(factor: Factor, labels: Labels, keep: npt.NDArray[np.bool_]) -> Ids:
    """The factor's ids where the other factors of ``labels`` leave its carriers (the groups of a weight)."""
    ids = factor.ids
    carriers = factor.carriers
    for other in labels if carriers else ():
        if other is not factor and other.dim in carriers:
            ids = ids.take(np.flatnonzero(keep[other.rows()[0]]), other.dim)
    return ids


def pruned(labels: Labels, keep: npt.NDArray[np.bool_]) -> Labels:
    """The labels of the tensor after the removal.

    Raises:
        ValueError: if what survives is not rectangular.
    """
    result = []
    for factor in labels:
        ids = left_rows(factor, labels, keep)
        if ids.size == ids.shape[factor.dim]:  # one row, as nearly always
            row = ids.reshape(-1)
            result.append(Factor(vector(row[keep[row]], factor.dim, ids.ndim), factor.dim))
            continue
        last = np.moveaxis(ids, factor.dim, -1)
        mask = keep[last]
        counts = mask.sum(-1)
        size = int(counts.flat[0])
        if np.count_nonzero(counts != size):
            raise ValueError("rows keep different counts")
        result.append(Factor(np.moveaxis(last[mask].reshape(*last.shape[:-1], size), -1, factor.dim), factor.dim))
    return tuple(result)
