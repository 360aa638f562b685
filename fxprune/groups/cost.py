"""MACs and parameters of any plan, as products of counts: a few vector operations per plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fxprune.labels.classes import Ids
from fxprune.labels.factors import Factor, Labels
from fxprune.labels.records import Term

Keep = npt.NDArray[np.bool_]


class Counts:
    """Kept sizes of the dimensions that factors cut, for any plan, as one vector. Place 0 is the constant 1."""

    def __init__(self) -> None:
        self._index: dict[bytes, int] = {}
        self._channels: list[Ids] = []
        self._weights: list[npt.NDArray[np.float64]] = []

    def place(self, factor: Factor) -> int:
        """Where the count of this factor will be; equal factors share a place."""
        rows = factor.rows()
        key = rows.tobytes() + str(rows.shape).encode()
        if key not in self._index:
            self._index[key] = len(self._index) + 1
            ids, weights = rows[0], np.ones(rows.shape[1])
            if len(rows) > 1 or not (ids[1:] > ids[:-1]).all():
                ids, counts = np.unique(rows, return_counts=True)
                weights = counts / rows.shape[0]
            self._channels.append(ids)
            self._weights.append(weights)
        return self._index[key]

    def reader(self) -> Callable[[Keep], npt.NDArray[np.float64]]:
        """The counts as a function of a plan, for all the places so far."""
        if not self._channels:
            return lambda keep: np.ones(1)
        channels, weights = np.concatenate(self._channels), np.concatenate(self._weights)
        starts = np.cumsum([0, *map(len, self._channels[:-1])])

        def counts(keep: Keep) -> npt.NDArray[np.float64]:
            return np.concatenate([[1.0], np.add.reduceat(weights * keep[channels], starts)])

        return counts


class Products:
    """Sum of ``constant * prod(counts of factors)``."""

    def __init__(self, entries: Sequence[tuple[float, Sequence[Factor]]]):
        counts = Counts()
        width = max((len(f) for _, f in entries), default=0)
        self._constants = np.array([c for c, _ in entries], dtype=np.float64)
        self._factors = np.zeros((len(entries), width), dtype=np.int64)
        for row, (_, factors) in enumerate(entries):
            self._factors[row, : len(factors)] = [counts.place(factor) for factor in factors]
        self._counts = counts.reader()

    def __call__(self, keep: Keep) -> int:
        return round(float((self._constants * self._counts(keep)[self._factors].prod(1)).sum()))


def elements(shape: Sequence[int], labels: Labels) -> tuple[float, Labels]:
    """The elements of a tensor, as an entry of ``Products``."""
    cut = {f.dim for f in labels}
    return float(math.prod(s for d, s in enumerate(shape) if d not in cut)), labels


class CostModel:
    """Counts for plans over one model. A plan is a boolean per channel.

    MACs follow the convention of ``torch.utils.flop_counter``: matrix products and convolutions (transposed ones and
    attention included), one multiply-accumulate each, without biases.

    Args:
        terms: one per contraction.
        parameters: shape and labels of every trainable parameter, tied ones once.
    """

    def __init__(self, terms: Sequence[Term], parameters: Sequence[tuple[Sequence[int], Labels]]):
        self._macs = Products([(t.constant, t.factors) for t in terms])
        self._params = Products([elements(shape, labels) for shape, labels in parameters])

    def macs(self, keep: Keep) -> int:
        """Multiply-accumulates of one forward pass."""
        return self._macs(keep)

    def params(self, keep: Keep) -> int:
        """Elements of all parameters."""
        return self._params(keep)
