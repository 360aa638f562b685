"""Classes of atoms: a vectorised union-find.

An *atom* is one index of one dimension of one parameter (or of something the model makes while it runs). Atoms that
must live or die together are joined; a class of joined atoms is a *channel*. The root of a class is its smallest atom,
so numbering never depends on the order of the joins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
_MANY = 4096  # ids, whose bytes take longer to copy than they to compare


def distinct_rows(rows: Ids) -> tuple[Ids, Ids]:
    """The distinct ones of ``rows`` [n, m], ordered by their first value, and for every row which of them it is.

    What ``np.unique(rows, axis=0)`` finds, by sorting one checksum per row instead of the rows.
    """
    if len(rows) < 2:
        return rows, np.zeros(len(rows), dtype=np.int64)
    weights = np.random.default_rng(0).integers(1, 2**62, rows.shape[1]) | 1
    keys, first, inverse = np.unique(rows @ weights, return_index=True, return_inverse=True)
    order = np.lexsort((keys, rows[first, 0]))
    distinct = rows[first[order]]
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    which = place[inverse.reshape(-1)]
    if not np.array_equal(distinct[which], rows):  # two rows with one checksum
        distinct, which = np.unique(rows, axis=0, return_inverse=True)
    return distinct, which.reshape(-1)


def equal_runs(ids: Ids) -> int:
    """The number of equal runs of identical rows along dim 0, if runs are longer than 1, else 0."""
    flat = ids.reshape(len(ids), -1)
    new = np.concatenate([[True], (flat[1:] != flat[:-1]).any(1)])
    starts = np.flatnonzero(new)
    length, rest = divmod(len(ids), len(starts))
    if rest or length == 1 or not np.array_equal(starts, np.arange(len(starts)) * length):
        return 0
    return len(starts)


def same(a: Ids, b: Ids) -> bool:
    """Are they equal, in shape too? By their bytes, which for the few hundred ids of a dimension is the fastest way."""
    if a is b or a.shape != b.shape:
        return a is b
    return a.tobytes() == b.tobytes() if a.size < _MANY else np.array_equal(a, b)


@dataclass(frozen=True)
class Reason:
    """Why something may not be cut, or is only approximate: in words, and the line of the user's code."""

    text: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.source})" if self.source else self.text


class Classes:
    """Union-find over atoms with locks. All arguments are integer arrays; shapes broadcast.

    ``state``: another object whenever a join changed something: what was a root in the same state still is.
    """

    def __init__(self) -> None:
        self._parent: Ids = np.empty(0, dtype=np.int64)
        self._locked: npt.NDArray[np.bool_] = np.empty(0, dtype=bool)
        self._size = 0
        self.state = object()
        self.locks: list[tuple[Ids, Reason]] = []
        self.approximations: list[tuple[Ids, Reason]] = []

    def __len__(self) -> int:
        return self._size

    def allocate(self, count: int) -> Ids:
        """``count`` new atoms, each a class of its own."""
        first, self._size = self._size, self._size + count
        if self._size > len(self._parent):
            room = max(2 * len(self._parent), self._size, 1024)
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), room)])
            self._locked = np.concatenate([self._locked, np.zeros(room - len(self._locked), dtype=bool)])
        return np.arange(first, self._size)

    def find(self, ids: Ids) -> Ids:
        """The root of every atom, same shape; ``ids`` themselves where all are roots."""
        roots = self._parent[ids]
        if same(roots, ids):
            return ids
        while True:
            above = self._parent[roots]
            if same(above, roots):
                break
            roots = above
        self._parent[ids] = roots
        return roots

    def join(self, a: Ids, b: Ids) -> None:
        """Union position by position."""
        if same(a, b):
            return
        if a.shape != b.shape:
            a, b = np.broadcast_arrays(a, b)
        a, b = self.find(a.reshape(-1)), self.find(b.reshape(-1))
        while True:
            differ = a != b
            count = np.count_nonzero(differ)
            if not count:
                return
            self.state = object()
            if count < len(a):
                a, b = a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            locked = self._locked[low] | self._locked[high]
            self._parent[high] = low
            linked = same(self._parent[high], low)
            if not linked:  # one atom has several partners
                np.minimum.at(self._parent, high, low)
            if np.count_nonzero(locked):
                self._locked[self.find(np.concatenate((low[locked], high[locked])))] = True
            if linked:
                return
            a, b = self.find(low), self.find(high)

    def lock(self, ids: Ids, reason: Reason) -> None:
        """No channel of these may be cut."""
        flat = ids.reshape(-1)
        self._locked[self.find(flat)] = True
        self.locks.append((flat, reason))

    def locked(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """For every atom: is its class locked?"""
        return self._locked[self.find(ids)]

    def approximate(self, ids: Ids, reason: Reason) -> None:
        """Cutting a channel of these changes a statistic computed over channels."""
        self.approximations.append((ids.reshape(-1), reason))
