"""Small networks that several test files share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from conftest import randomise
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fxprune.training import Training


def compiled(how: Callable[..., Any], what: Any, *example: Any) -> Any:
    """By ``torch.jit.script`` or ``torch.jit.trace``, which are deprecated, and still around."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return how(what, *example)


def scripted(what: Any) -> Any:
    """A function or a module, compiled by ``torch.jit.script``."""
    return compiled(torch.jit.script, what)


class Small(nn.Module):
    """A residual network with a dropout: 3 -> 16 -> 24 -> 16 channels, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(24, 16, 1), nn.BatchNorm2d(16))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.down(self.up(x)))
        return self.head(self.dropout(x.mean((2, 3))))


class Perceptron(nn.Module):
    """8 -> 16 -> 4 channels in ``body``; how it is called is up to the test."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Ascending(Perceptron):
    """Goes another way for inputs whose rows do not ascend."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.diff().min() < 0 else self.body(x)


class Shuffled(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.Conv2d(16, 16, 1, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(self.stem(x)))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.norm(self.two(x)).mean((2, 3)))


class Attentive(nn.Module):
    """Tokens, two layers of attention with packed QKV and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 2, stride=2)
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
        return self.head((x + self.mlp(x)).mean(1))


def chain(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with a ReLU between each two."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make(kind: type[nn.Module] = Small, seed: int = 0) -> Any:
    """A network with random weights and statistics, in eval mode."""
    return randomise(kind(), seed).eval()


def image(batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def outputs(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(*args, **kwargs))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


class Unchanged:
    """A context in which a model must stay as it is: values, identity of tensors, flags, hooks, attributes."""

    def __init__(self, model: nn.Module):
        self._model = model

    def __enter__(self) -> None:
        self._before, self._values = self._look(), copy.deepcopy(self._model.state_dict())

    def __exit__(self, *_: object) -> None:
        assert self._look() == self._before
        after = self._model.state_dict()
        assert list(after) == list(self._values)
        assert all(torch.equal(t, self._values[n]) or not bool(t.isfinite().all()) for n, t in after.items())

    def _look(self) -> list[Any]:
        model = self._model
        found: list[Any] = [(n, id(t), t.requires_grad, t.grad is None) for n, t in model.named_parameters()]
        for name, module in model.named_modules():
            hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks")]
            plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple))}
            found.append((name, id(module), module.training, hooks, sorted(vars(module)), plain))
        return found


def step(training: Training, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step of a training loop of one's own, with cross entropy."""
    loss = training.loss(F.cross_entropy(training.model(x), y))
    optimizer.zero_grad()
    loss.backward()
    training.after_backward()
    optimizer.step()
    training.after_step()
