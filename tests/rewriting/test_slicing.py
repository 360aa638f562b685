"""What is cut of a tensor does not depend on how much of it is cut at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fxprune.labels.factors import Factor, vector
from fxprune.rewriting import slicing

KEEP = np.array([False, True, True, False, True, True, False, True, True, False, True, True])


def along(dim: int, ndim: int, first: int, size: int) -> Factor:
    return Factor(vector(np.arange(first, first + size), dim, ndim), dim)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), (0, 1, 2), (1, 2)])
def test_large_tensors_are_cut_a_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, dims: tuple[int, ...], layout: torch.memory_format
) -> None:
    monkeypatch.setattr(slicing, "_LARGE", 100)
    monkeypatch.setattr(slicing, "_ENTRIES_IN_CACHE", 50)
    dense = torch.randn(7, 5, 4, 2).to(memory_format=layout)
    labels = tuple(along(dim, 4, dim, dense.shape[dim]) for dim in dims)
    wanted = dense
    for factor in labels:
        wanted = wanted.index_select(factor.dim, torch.from_numpy(np.flatnonzero(KEEP[factor.ids.reshape(-1)])))
    found = slicing.cut(dense, labels, KEEP)
    assert torch.equal(found, wanted)
    assert found.is_contiguous(memory_format=layout)


def test_rows_with_channels_of_their_own_are_cut_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight of a grouped convolution: other columns in every group."""
    monkeypatch.setattr(slicing, "_LARGE", 10)
    dense = torch.randn(4, 3)
    columns = np.array([[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]])
    keep = np.array([False, True, True, True, False, True, True, True, False, True])
    found = slicing.cut(dense, (along(0, 2, 6, 4), Factor(columns, 1)), keep)
    assert torch.equal(found, torch.stack([dense[0, [1, 2]], dense[1, [1, 2]], dense[3, [0, 2]]]))
