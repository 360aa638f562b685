"""Labels: which channel does each position of a tensor belong to?

A tensor carries *factors*. A factor is an integer tensor of atoms, with as many dimensions as the tensor it labels and
size 1 wherever the atom does not vary, and ``dim``, the dimension a removal cuts. A position of the tensor survives
when every factor's channel there survives. The other dimensions along which a factor varies are its *carriers*: for
queries ``[B, heads, N, d]`` the factor varies along ``heads`` and ``d``, cuts ``d``, and is carried by ``heads``.
A dimension of size > 1 that no factor cuts is *rigid*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, repr=False)
class Factor:
    """``ids``: atoms, size 1 where constant. ``dim``: the dimension that is cut."""

    ids: Tensor
    dim: int

    def __repr__(self) -> str:
        return f"Factor({list(self.ids.shape)}, dim={self.dim}, ids={self.ids.flatten()[:4].tolist()}...)"

    @property
    def varying(self) -> tuple[int, ...]:
        return tuple(d for d, size in enumerate(self.ids.shape) if size > 1)

    @property
    def carriers(self) -> tuple[int, ...]:
        return tuple(d for d in self.varying if d != self.dim)

    def rows(self) -> npt.NDArray[np.int64]:
        """The atoms as ``[carrier positions, size of the cut dimension]``."""
        moved = self.ids.movedim(self.dim, -1)
        return moved.reshape(-1, moved.shape[-1]).numpy()


Labels: TypeAlias = tuple[Factor, ...]


def compact(ids: Tensor) -> Tensor:
    """``ids`` with size 1 in every dimension along which they do not vary."""
    for d, size in enumerate(ids.shape):
        if size > 1:
            first = ids.narrow(d, 0, 1)
            if bool((ids == first).all()):
                ids = first
    return ids


def vector(ids: npt.NDArray[np.int64], dim: int, ndim: int) -> Tensor:
    """One-dimensional ``ids`` laid along ``dim`` of a tensor with ``ndim`` dimensions."""
    return torch.from_numpy(np.ascontiguousarray(ids)).reshape([-1 if d == dim else 1 for d in range(ndim)])


def moved(factor: Factor, order: Sequence[int]) -> Factor:
    """The factor after ``permute(order)``."""
    return Factor(factor.ids.permute(list(order)), list(order).index(factor.dim))


def aligned(factor: Factor, ndim: int) -> Factor:
    """The factor with leading dimensions of size 1 added, as broadcasting does."""
    extra = ndim - factor.ids.ndim
    return factor if not extra else Factor(factor.ids.reshape([1] * extra + list(factor.ids.shape)), factor.dim + extra)


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
    cut, interleaved = -1, False
    for a, b in view_blocks(old, new):
        varying = [d for d in a if factor.ids.shape[d] > 1]
        if not varying:
            continue
        for d in a:
            pattern_old[d] = old[d]
        for d in b:
            pattern_new[d] = new[d]
        if factor.dim in a:
            cut = b[-1]
            interleaved = len(a) > 1 and factor.dim != varying[-1]
    ids = compact(factor.ids.expand(pattern_old).reshape(pattern_new))
    return Factor(ids, settle_dim(ids, cut)), interleaved


def settle_dim(ids: Tensor, hint: int) -> int:
    """``hint`` where the ids vary along it, else the innermost dimension along which they do (or the hint)."""
    varying = [d for d, size in enumerate(ids.shape) if size > 1]
    if hint in varying or not varying:
        return max(hint, 0)
    return varying[-1]


def along(factor: Factor, dim: int, op: Callable[[Tensor], Tensor]) -> Factor:
    """Apply ``op``, which keeps the number of dims and acts on ``dim`` alone, unless the ids do not vary there."""
    if factor.ids.shape[dim] == 1:
        return factor
    ids = compact(op(factor.ids))
    return Factor(ids, settle_dim(ids, factor.dim))


def full(factor: Factor, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """The ids expanded to the tensor's size along ``dims`` only."""
    return factor.ids.expand([shape[d] if d in dims else s for d, s in enumerate(factor.ids.shape)])


def cut_sizes(shape: Sequence[int], labels: Labels, keep: npt.NDArray[np.bool_]) -> list[int]:
    """The shape after removal of every channel ``c`` with ``keep[c]`` false (ids in ``labels`` index ``keep``)."""
    sizes = list(shape)
    for factor in labels:
        mask = keep[factor.rows()]
        sizes[factor.dim] = int(mask[0].sum()) if mask.shape[0] == 1 else round(mask.sum() / mask.shape[0])
    return sizes


def left_rows(factor: Factor, labels: Labels, keep: npt.NDArray[np.bool_]) -> Tensor:
    """The factor's ids where the other factors of ``labels`` leave its carriers (the groups of a weight)."""
    ids = factor.ids
    for other in labels:
        if other is not factor and other.dim in factor.carriers:
            ids = ids.index_select(other.dim, torch.from_numpy(np.flatnonzero(keep[other.rows()[0]])))
    return ids


def pruned(labels: Labels, keep: npt.NDArray[np.bool_]) -> Labels:
    """The labels of the tensor after the removal.

    Raises:
        ValueError: if what survives is not rectangular.
    """
    result = []
    for factor in labels:
        last = left_rows(factor, labels, keep).movedim(factor.dim, -1)
        mask = torch.from_numpy(keep[last.numpy()])
        counts = mask.sum(-1)
        if bool((counts != counts.reshape(-1)[0]).any()):
            raise ValueError("rows keep different counts")
        size = int(counts.reshape(-1)[0])
        result.append(Factor(last[mask].reshape(*last.shape[:-1], size).movedim(-1, factor.dim), factor.dim))
    return tuple(result)
