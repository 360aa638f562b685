"""Floats before a size, wherever a model has them: ``0.5 * x.shape[2]`` is followed as ``x.shape[2] * 0.5`` is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import randomise
from torch import Tensor, nn

from fxprune.recording import recorded
from fxprune.recording.guards import guards_of

HALF = 0.5
SIZES = (0.5, 0.25)


def _scaled(size: int, by: float = 0.5, *, more: float = 0.25) -> int:
    return int(by * size) + int(more * size)


@functools.cache
def _remembered(size: int) -> float:
    return 0.5 * size


class Scaled(nn.Module):
    """As many rows as ``count`` says."""

    third = 1 / 3

    def __init__(self, count: Callable[[Any, int], Any]) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(4, 8), count
        self.half, self.halves, self.pair, self.by_name = 0.5, [0.5, 0.25], (0.5, 2.0), {"half": 0.5}
        self.config = SimpleNamespace(half=0.5)
        self.register_buffer("held", torch.tensor(0.5))

    @property
    def quarter(self) -> float:
        return 0.25

    def of(self, size: int) -> int:
        return int(0.5 * size)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, : int(self.count(self, x.shape[1]))]


COUNTS: dict[str, Callable[[Scaled, int], Any]] = {
    "a literal": lambda net, n: 0.5 * n,
    "a literal that divides": lambda net, n: 60.0 / n,
    "before a root": lambda net, n: 0.5 * math.sqrt(n * n),
    "before a quotient": lambda net, n: 4.0 - 8.0 / (1.0 + n / 2.0) + n,
    "a comparison in a choice": lambda net, n: max(2.5, 0.5 * n),
    "what literals give": lambda net, n: (1.5 - 1.0) * n,
    "what functions give": lambda net, n: math.sqrt(0.25) * n,
    "a conversion": lambda net, n: float(1) * n,
    "in a comprehension": lambda net, n: sum(int(part * n) for part in (0.5, 0.25)),
    "in a function inside": lambda net, n: functools.reduce(lambda total, m: total + 0.5 * m, [n], 0),
    "a variable of the file": lambda net, n: HALF * n,
    "a tuple of the file": lambda net, n: SIZES[1] * n,
    "a default": lambda net, n: _scaled(n),
    "what a function remembers": lambda net, n: _remembered(n),
    "an attribute": lambda net, n: net.half * n,
    "an attribute of the class": lambda net, n: net.third * n,
    "a property": lambda net, n: net.quarter * n,
    "a method": lambda net, n: net.of(n),
    "in a list": lambda net, n: net.halves[0] * n,
    "in a tuple": lambda net, n: net.pair[0] * n,
    "in a dict": lambda net, n: net.by_name["half"] * n,
    "of a config": lambda net, n: net.config.half * n,
    "read from a buffer": lambda net, n: net.held.item() * n,
}


@pytest.mark.parametrize("rehearse", [True, False], ids=["rehearsed", "run"])
@pytest.mark.parametrize("name", COUNTS)
def test_a_size_beside_a_float_is_followed(name: str, rehearse: bool) -> None:
    net = randomise(Scaled(COUNTS[name])).eval()
    module = recorded(net, torch.randn(2, 8, 4), rehearse=rehearse)
    assert not guards_of(module.graph)
    for rows in (8, 12, 20, 3):
        x = torch.randn(2, rows, 4)
        assert torch.equal(module(x), net(x)), rows


def test_floats_are_what_they_were_afterwards() -> None:
    code, defaults = Scaled.of.__code__, _scaled.__defaults__
    net = Scaled(lambda net, n: 0.5 * n)
    recorded(net, torch.randn(2, 8, 4))
    assert Scaled.of.__code__ is code
    assert (_scaled.__defaults__, _scaled.__kwdefaults__) == (defaults, {"more": 0.25})
    held = (HALF, SIZES[0], Scaled.third, net.half, net.halves[0], net.pair[0], net.by_name["half"], net.config.half)
    assert {*map(type, held)} == {float}


def test_the_graph_has_plain_floats() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, float, list[float]]:
            return x * 0.5 + HALF, 0.5, [HALF, 0.25]

    module = recorded(Plain(), torch.randn(2, 3))
    arguments = [a for node in module.graph.nodes if node.op == "call_function" for a in node.args]
    assert {type(a) for a in arguments if isinstance(a, float)} == {float}
    _, half, listed = module(torch.randn(2, 3))
    assert [*map(type, (half, *listed))] == [float] * 3
