"""MACs and parameters of any plan, as products of counts: a few vector operations per plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fxprune.labels.classes import Ids
from fxprune.labels.factors import Factor, Labels
from fxprune.labels.propagate import Term

Keep = npt.NDArray[np.bool_]


class _Products:
    """Sum of ``constant * prod(counts of factors)``; a count is the kept size of a factor's cut dimension."""

    def __init__(self, entries: Sequence[tuple[float, Sequence[Factor]]]):
        index: dict[bytes, int] = {}
        channels: list[Ids] = []
        owners: list[Ids] = []
        weights: list[npt.NDArray[np.float64]] = []
        width = max((len(f) for _, f in entries), default=0)
        self._constants = np.array([c for c, _ in entries], dtype=np.float64)
        self._factors = np.zeros((len(entries), width), dtype=np.int64)  # index 0: the constant 1
        for row, (_, factors) in enumerate(entries):
            for place, factor in enumerate(factors):
                rows = factor.rows()
                key = rows.tobytes() + str(rows.shape).encode()
                if key not in index:
                    index[key] = len(index) + 1
                    ids, counts = np.unique(rows, return_counts=True)
                    channels.append(ids)
                    owners.append(np.full(len(ids), index[key]))
                    weights.append(counts / rows.shape[0])
                self._factors[row, place] = index[key]
        self._size = len(index) + 1
        self._channels = np.concatenate(channels) if channels else np.empty(0, dtype=np.int64)
        self._owners = np.concatenate(owners) if owners else np.empty(0, dtype=np.int64)
        self._weights = np.concatenate(weights) if weights else np.empty(0)

    def __call__(self, keep: Keep) -> int:
        counts = np.bincount(self._owners, self._weights * keep[self._channels], self._size)
        counts[0] = 1
        return round(float((self._constants * counts[self._factors].prod(1)).sum()))


class CostModel:
    """Counts for plans over one model. A plan is a boolean per channel.

    MACs follow the convention of ``torch.utils.flop_counter``: matrix products and convolutions (transposed ones and
    attention included), one multiply-accumulate each, without biases.

    Args:
        terms: one per contraction.
        parameters: shape and labels of every trainable parameter, tied ones once.
    """

    def __init__(self, terms: Sequence[Term], parameters: Sequence[tuple[Sequence[int], Labels]]):
        self._macs = _Products([(t.constant, t.factors) for t in terms])
        entries = []
        for shape, labels in parameters:
            cut = {f.dim for f in labels}
            entries.append((float(math.prod(s for d, s in enumerate(shape) if d not in cut)), labels))
        self._params = _Products(entries)

    def macs(self, keep: Keep) -> int:
        """Multiply-accumulates of one forward pass."""
        return self._macs(keep)

    def params(self, keep: Keep) -> int:
        """Elements of all parameters."""
        return self._params(keep)
