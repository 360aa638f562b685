"""Subclasses of nn.Linear that compute what nn.Linear does are that layer in the graph; others stay functions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune


class Positional(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class Named(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input=input, weight=self.weight, bias=self.bias) * 2


class Computed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 2, self.bias)


class WithoutItsBias(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class Scaled(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) * self.scale


def net(layer: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(layer(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("layer", [Positional, Named, lambda *sizes: Positional(*sizes, bias=False)])
def test_what_is_a_linear_layer_is_one(layer: Any) -> None:
    model, x = net(layer), torch.randn(2, 6)
    recorded = fxprune.record(model, x)
    assert torch.equal(recorded(x), model(x))
    assert [*recorded.state_dict()] == [*model.state_dict()]
    small = fxprune.prune(model, x, channels=0.5, progress=False)
    for module in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        restored = module.get_submodule("0")
        assert type(restored) is nn.Linear
        assert (restored.in_features, restored.out_features) == (6, 4)
        assert not [node for node in module.graph.nodes if node.op == "get_attr"]
        assert torch.equal(module(x), small(x))
    back = fxprune.into(model, small)
    assert type(back[0]) is type(model[0])
    assert torch.equal(back(x), small(x))


@pytest.mark.parametrize("layer", [Computed, WithoutItsBias, Scaled])
def test_what_is_more_than_a_linear_layer_is_none(layer: Any) -> None:
    model, x = net(layer), torch.randn(2, 6)
    recorded = fxprune.record(model, x)
    assert torch.equal(recorded(x), model(x))
    assert not isinstance(recorded.get_submodule("0"), nn.Linear)


def test_a_weight_that_others_read_too_stays_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Positional(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).relu() @ self.inner.weight

    model, x = Tied().eval(), torch.randn(2, 6)
    recorded = fxprune.record(model, x)
    assert torch.equal(recorded(x), model(x))
    assert type(recorded.inner) is nn.Linear
    assert [*recorded.state_dict()] == ["inner.weight", "inner.bias"]


@pytest.mark.parametrize("layer", [Positional, Computed])
def test_a_model_that_is_such_a_layer_itself_stays_a_function(layer: Any) -> None:
    model, x = layer(6, 3, bias=False).eval(), torch.randn(2, 6)
    recorded = fxprune.record(model, x)
    assert torch.equal(recorded(x), model(x))
    assert type(recorded).__name__ == layer.__name__
