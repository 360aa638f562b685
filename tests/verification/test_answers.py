"""A network that is cut so far that it answers the same whatever goes in is told of."""

from __future__ import annotations

import pytest
import torch
from nets import make
from torch import Tensor, nn

import fxprune
from fxprune.reports.report import Report

TOLD = "the pruned network answers the same whatever goes in"


class Mixed(nn.Module):
    """A hidden layer over whose channels a statistic is taken."""

    def __init__(self, mixing: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.mixing, self.down = nn.Linear(4, 8), mixing or nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.down(self.mixing(self.up(x)))
        return mixed


class WithItsInput(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), x], 1)


class Unread(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.zeros_like(x))


class SumOfRows(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(0)


def left(model: nn.Module, channels: int, batch: int = 2) -> list[str]:
    """What is told of the network with so many hidden channels."""
    small = fxprune.prune(model, torch.randn(batch, 4), channels=channels / 8, progress=False)
    report: Report = small.meta["fxprune"]
    assert len(report.plan.kept["up.weight"][0]) == channels
    return [note for note in report.notes if note.startswith(TOLD)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mixing", [nn.LayerNorm(8), nn.Softmax(-1)])
def test_one_channel_under_a_statistic_says_nothing(mixing: nn.Module, batch: int) -> None:
    model = make(lambda: Mixed(mixing))
    (note,) = left(model, 1, batch)
    assert note == f"{TOLD} (one channel is left of up): give it a larger budget, or Options(min_channels=...)"
    assert left(model, 2, batch) == []


def test_answers_without_a_batch() -> None:
    assert len(left(make(SumOfRows), 1)) == 1
    assert left(make(SumOfRows), 2) == []


@pytest.mark.parametrize("kind", [WithItsInput, Unread])
def test_an_answer_that_depends_on_inputs_as_ever_is_not_told_of(kind: type[Mixed]) -> None:
    """Of a part of it that does not, or where the dense one's does not either."""
    assert left(make(kind), 1) == []
