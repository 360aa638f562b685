"""Recorded networks compute bit for bit what the originals compute, also with another batch size."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import scripted
from torch import Tensor, fx, nn

from fxprune.recording import clone_structure, record


def _same(one: Any, other: Any) -> bool:
    first, second = (torch.utils._pytree.tree_leaves(value) for value in (one, other))
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(first, second, strict=True)
    )


def _check(model: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]]) -> fx.GraphModule:
    """Record with batch 2; compare outputs with batch 2 and batch 3, in every way a graph is run or copied."""
    model.eval()
    gm = record(model, inputs(2))
    gm.graph.lint()
    for batch in (2, 3):
        x = inputs(batch)
        with torch.no_grad():
            expected = model(*copy.deepcopy(x))
            for run in (gm, fx.Interpreter(gm).run, clone_structure(gm), copy.deepcopy(gm)):
                assert _same(run(*copy.deepcopy(x)), expected), batch
    assert list(gm.state_dict()) == list(model.state_dict())
    return gm


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[..., 0] = x[..., 1]
        y[:, 1].add_(x[:, 0])
        z = torch.empty_like(x)
        torch.mul(x, 2, out=z)
        y += z
        unused = torch.zeros(3)
        unused[0] = 1.0
        return y


class Dunders(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.abs() + 1
        y = 2**y + (1 - y) + 3 / y + 7 // y + 5 % y
        y = (y.T @ y).mT + y.real[0, 0]
        first, *_ = y
        return -abs(first) + sum(row.sum() for row in y) + (y > 0).float().sum()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.other = self.one
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(self.one(x)))


class Identities(nn.Module):
    """Ops that hand back their very input."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = self.same(x)
        z = self.drop(y).contiguous().to(torch.float32)
        z = z + y
        z.mul_(2)
        return z + x


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        y = x.view(b * n, -1).reshape(len(x), -1, c).view(x.shape[:2] + torch.Size((2, c // 2)))
        y = y.flatten(2).expand(x.size(0), *x.shape[1:]) + torch.arange(b, device=x.device)[:, None, None]
        width = math.ceil(int(b) / 2) * 2
        y = F.pad(y, (0, 0, 0, 0, 0, width - b)).view(int(b / 2 + 0.5) * 2, n, c)[: x.size(dim=0)]
        return y.reshape(int(x.shape[0]), n * c) * (1.0 if n > 3 else 2.0) + x.numel() + torch.zeros(int(b), n * c)


class Cached(nn.Module):
    """Keeps a tensor computed from its parameters in a plain dict, in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.bias * 2
        if "cpu" not in self.cache:
            self.cache["cpu"] = self.bias * 2
        return x + self.cache["cpu"]


@scripted
def _scripted(x: Tensor, flag: bool = True) -> Tensor:
    if flag:
        x = x.transpose(0, 1)
    return (x * 2).relu() + x


@scripted
def _scripted_write(x: Tensor) -> Tensor:
    x[0].add_(1)
    return x.relu_()


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        z = _scripted_write(y)
        return _scripted(x).transpose(0, 1) + y * z


class ForEach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = [x.clone(), x.exp()]
        torch._foreach_mul_(y, 3)
        return y[0] + y[1]


class Data(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.data = y.data * 2
        return y + x


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float() + self.linear(x)


class Swapped(nn.Module):
    """Puts a computed weight in the place of a layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = {"weight": self.linear.weight * 2, "bias": self.linear.bias}
        return torch.func.functional_call(self.linear, weights, (x,)) + self.linear(x)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 100


_doubled = _Doubled.apply


class CustomBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Doubled.apply(x) + _doubled(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attention(x, x, x)
        z, _ = self.attention(x, y, y, need_weights=False)
        return z + weights.sum()


class NonLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, _) = self.lstm(self.norm(x).flatten(1, 2))
        return y.sum(1) + h[0]


def _flat(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 4),)


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(x, x)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "in-place": (InPlace, lambda b: (torch.randn(b, 3, 4),)),
    "dunders": (Dunders, lambda b: (torch.randn(b, 4),)),
    "module called twice, tied": (Twice, _flat),
    "identities": (Identities, _flat),
    "sizes": (Sizes, lambda b: (torch.randn(b, 4, 6),)),
    "eval-mode cache": (Cached, _flat),
    "scripted": (Scripted, _flat),
    "foreach": (ForEach, _flat),
    "data": (Data, _flat),
    "autocast": (Autocast, _flat),
    "swapped weights": (Swapped, _flat),
    "transformer": (Sequences, lambda b: (torch.randn(b, 5, 8),)),
    "autograd function": (CustomBackward, _flat),
    "attention": (Attention, lambda b: (torch.randn(b, 5, 8),)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda b: (torch.randn(b, 5, 8),)),
    "encoder stack": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2,
                                      enable_nested_tensor=False),
        lambda b: (torch.randn(b, 5, 8),),
    ),
    "weight norm, lstm": (NonLinear, lambda b: (torch.randn(b, 3, 6, 8),)),
    "single layer": (lambda: nn.Linear(4, 3), _flat),
    "double": (lambda: nn.Linear(4, 3).double(), lambda b: (torch.randn(b, 4).double(),)),
    "bfloat16": (lambda: nn.Sequential(nn.Linear(4, 3)).bfloat16(), lambda b: (torch.randn(b, 4).bfloat16(),)),
    "channels last": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).to(
            memory_format=torch.channels_last
        ),
        lambda b: (torch.randn(b, 3, 5, 5).to(memory_format=torch.channels_last),),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _python_path() -> Iterator[None]:
    """The fused inference kernel of nn.TransformerEncoderLayer rounds differently from the layer's Python code."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", CASES)
def test_bit_identical(name: str) -> None:
    make, inputs = CASES[name]
    torch.manual_seed(0)
    _check(make(), inputs)


def test_activations_are_let_go_as_early_as_the_model_does() -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Deep(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = torch.relu(layer(x).view(-1, 4)) * torch.ones(4, device=x.device)
                seen.append(weakref.ref(x))
                alive.append(sum(reference() is not None for reference in seen))
            return x

    model = Deep(*(nn.Linear(4, 4) for _ in range(20)))
    _check(model, lambda batch: (torch.randn(batch, 4),))
    assert max(alive) <= 2


def test_a_view_of_memory_that_is_taken_again_is_not_the_tensor_that_was_there() -> None:
    class Reuse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros_like(x)
            for power in range(1, 30):
                total = total + (x * power).flatten().view(x.shape).contiguous()  # its memory is free for the next one
            return total

    _check(Reuse(), lambda batch: (torch.randn(batch, 1000),))
