"""Numbers of entries: kept for all weights of a network, they must not be as large as the network."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from fxprune.reconstruction.entries import Entries, Numbers
from fxprune.reconstruction.lanes import Lane
from fxprune.reconstruction.survey import survey

COUNTED = torch.arange(24).view(2, 3, 4)
UNEVEN = torch.tensor([[0, 1, 2], [3, 4, 6]])


@pytest.mark.parametrize(
    "numbers",
    [
        COUNTED,
        COUNTED.transpose(0, 2),
        COUNTED[:, 1:, ::2],
        COUNTED[:, :1],
        COUNTED[1, 1, 1],
        COUNTED[0].unfold(1, 2, 1),
        UNEVEN,
    ],
)
def test_they_come_back(numbers: Tensor) -> None:
    found = Numbers.of(numbers)
    assert torch.equal(found.tensor, numbers)
    assert not found.differ or numbers.unique().numel() == numbers.numel()
    assert found.key == Numbers.of(numbers.clone()).key
    assert found.key != Numbers.of(numbers + 1).key
    assert Numbers.of(UNEVEN).key != Numbers.of(UNEVEN + (UNEVEN == 6)).key


def test_those_of_weights_take_no_memory() -> None:
    module = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(256, 32)))
    with torch.no_grad():
        facts, _ = survey(lane := Lane(module), lane.begin((torch.randn(1, 8, 6, 6),), {}))
    assert len(facts.calls) == 2
    for call in facts.calls.values():
        kept = [value for value in vars(call.numbers).values() if isinstance(value, Tensor)]
        assert not kept
        assert sys.getsizeof(call.numbers.key) < 200
        (name,) = Entries(module).names_of(call.matrix.reshape(-1))
        assert module.get_parameter(name).numel() == call.matrix.numel()
