"""Parameters and buffers under labels, before a run."""

from __future__ import annotations

from torch import Tensor

from fxprune.labels.factors import Factor, vector
from fxprune.labels.propagation import Propagation, set_labels
from fxprune.labels.records import Owner


def label_parameter(run: Propagation, name: str, tensor: Tensor) -> None:
    """Fresh atoms for every dimension of size > 1. A grouped weight's dim 1 gets atoms of its own in every group."""
    factors: list[Factor] = []
    for d, size in enumerate(tensor.shape):
        if size == 1 or (name, d) in run.facts.kernels:
            continue
        groups = run.facts.layouts.get(name, 1) if d == 1 else 1
        ids = run.fresh(groups * size)
        run.owners.append(Owner(name, d, int(ids[0]), len(ids)))
        if groups == 1:
            factors.append(Factor(vector(ids, d, tensor.ndim), d))
        else:
            rows = ids.reshape(groups, size).repeat(tensor.shape[0] // groups, 0)
            factors.append(Factor(rows.reshape(rows.shape + (1,) * (tensor.ndim - 2)), d))
    set_labels(tensor, tuple(factors), name)
    run.usage.add(tensor, frozenset({name}))
    run.usage.made[id(tensor)] = tensor, frozenset({name})
