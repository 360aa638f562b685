"""Other sizes of a recording's inputs: which dims vary together, and what is tried of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.recording.inputs import describe_inputs
from fxprune.rewriting import is_equal
from fxprune.verification.sizes import SizeRuns, dims_together, other_sizes


def record_of(*shapes: tuple[int, ...]) -> dict[str, Any]:
    return describe_inputs(tuple(torch.ones(shape) for shape in shapes), {})


@pytest.mark.parametrize(("shapes", "together"), [
    ([(2, 3, 8, 8)], [[(0, 0)], [(0, 1)], [(0, 2), (0, 3)]]),
    ([(2, 7), (2, 7, 5)], [[(0, 0), (1, 0)], [(0, 1), (1, 1)], [(1, 2)]]),
    ([(2, 5), (3, 5)], [[(0, 0)], [(0, 1), (1, 1)], [(1, 0)]]),
    ([(4, 1, 1)], [[(0, 0)], [(0, 1)], [(0, 2)]]),
    ([(2, 2)], [[(0, 0)], [(0, 1)]]),
    ([()], []),
])  # fmt: skip
def test_dims_of_one_size_vary_together_but_for_the_batch(shapes: Any, together: Any) -> None:
    assert dims_together(record_of(*shapes)) == together


@pytest.mark.parametrize(("size", "tried"), [(1, [2]), (2, [3, 4, 1]), (3, [2, 6, 1]), (4, [2, 8, 1])])
def test_other_batches(size: int, tried: list[int]) -> None:
    record = record_of((size, 5), (size, 6))
    assert [*other_sizes(record, [(0, 0), (1, 0)])] == [{(0, 0): n, (1, 0): n} for n in tried]


@pytest.mark.parametrize(("size", "tried"), [
    (1, [2]), (3, [2, 4, 6, 1]), (15, [14, 16, 30, 7]), (16, [8, 24, 32, 17]), (63, [55, 71, 126, 31, 64]),
    (64, [32, 96, 128, 65]), (224, [192, 256, 448, 112, 225]),
])  # fmt: skip
def test_other_lengths(size: int, tried: list[int]) -> None:
    assert [*other_sizes(record_of((2, size)), [(0, 1)])] == [{(0, 1): n} for n in tried]


def test_a_first_dim_of_another_length_than_the_batch_is_no_batch() -> None:
    assert [*other_sizes(record_of((2, 5), (3, 5)), [(1, 0)])] == [{(1, 0): n} for n in (2, 4, 6, 1)]


def test_an_image_that_is_no_square_is_tried_first() -> None:
    height, width = (0, 2), (0, 3)
    sizes = [*other_sizes(record_of((2, 3, 64, 64)), [height, width])]
    assert sizes[:2] == [{height: 32, width: 96}, {height: 32, width: 32}]
    assert [*other_sizes(record_of((2, 1, 1, 1)), [height, width])] == [{height: 2, width: 2}]
    assert next(other_sizes(record_of((2, 3, 2, 2)), [height, width])) == {height: 1, width: 3}
    for group in ([(0, 1), (0, 3)], [(0, 1), (1, 2)], [(0, 1), (0, 2), (0, 3)]):  # not a plane of one tensor
        assert next(other_sizes(record_of((2, 8, 8, 8), (2, 3, 8)), group)) == dict.fromkeys(group, 7)


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0] * 3, -1)


def test_a_run_is_made_once_and_says_what_came_out() -> None:
    x = torch.randn(2, 3, 4)
    runs = SizeRuns(fxprune.record(Rows(), x), (x,), {})
    assert runs({}).shapes == ((6, 4),)
    assert runs({(0, 0): 5, (0, 2): 7}).shapes == ((15, 7),)
    assert runs({(0, 2): 7, (0, 0): 5}) is runs({(0, 0): 5, (0, 2): 7})
    assert runs({(0, 0): 1, (0, 2): 3}).shapes == ((3, 3),)
    assert runs.other_batch().shapes == ((9, 4),)
    assert str(runs({(0, 1): 4}).failed) == "view"
    fixed = torch.randn(())
    alone = SizeRuns(fxprune.record(nn.ReLU(), fixed), (fixed,), {})
    assert alone.other_batch() is alone({})


def test_what_cannot_say_whether_it_is_equal_counts_as_different() -> None:
    assert is_equal(((2, 3),), ((2, 3),))
    assert not is_equal(((2, 3),), ((2, 4),))
    assert not is_equal(np.ones(2), np.ones(2))
    assert is_equal(own := np.ones(2), own)
