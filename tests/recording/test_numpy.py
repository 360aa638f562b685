"""What NumPy computes from sizes stays in the graph, and is what NumPy computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import Tensor, nn

import fxprune
from fxprune.errors import GuardError
from fxprune.recording import recorded
from fxprune.recording.guards import guards_of


class Sized(nn.Module):
    """A convolution, and what is made of its output and its height and width."""

    def __init__(self, made: Callable[[Tensor, int, int], Any]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        return self.head(self.made(y, *x.shape[2:]).mean((2, 3)))


def _anchors(y: Tensor, h: int, w: int) -> Tensor:
    """Boxes around every place of two grids, as detectors lay them."""
    shapes = [(np.array([h, w]) + 2**level - 1) // 2**level for level in (1, 2)]
    base, found = np.array([[-1, -1, 1, 1], [-2, -1, 2, 1]]) * 1.5, np.zeros((0, 4)).astype(np.float32)
    for level, (rows, columns) in zip((1, 2), shapes, strict=True):
        xs, ys = np.meshgrid((np.arange(0, columns) + 0.5) * 2**level, (np.arange(rows) + 0.5) * 2**level)
        shifts = np.vstack((xs.ravel(), ys.ravel(), xs.ravel(), ys.ravel())).transpose()
        boxes = base.reshape((1, 2, 4)) + shifts.reshape((1, -1, 4)).transpose((1, 0, 2))
        found = np.append(found, boxes.reshape((-1, 4)), axis=0)
    return y * torch.from_numpy(np.expand_dims(found, axis=0).astype(np.float32)).mean()


def _waves(y: Tensor, h: int, w: int) -> Tensor:
    angles = np.arange(h, dtype=np.float32)[:, None] * np.exp(np.arange(w) * -(4.6 / w))
    return y * torch.tensor(np.sin(angles), dtype=torch.float32)


def _upper(y: Tensor, h: int, w: int) -> Tensor:
    mask = np.zeros((h, w), dtype=np.float32)
    mask[: h // 2] += 1
    mask *= 2
    return y * torch.from_numpy(mask)


def _later(y: Tensor, h: int, w: int) -> Tensor:
    return y @ (torch.from_numpy(np.triu(np.ones((w, w)), k=1).astype("uint8")) == 0).float()


def _beside(y: Tensor, h: int, w: int) -> Tensor:
    """Numbers keep the type of the array beside them, as NumPy has it."""
    one = np.arange(h, dtype=np.float32) * w
    assert str(one.dtype) in ("float32", 'dtype("float32")')
    return y * torch.as_tensor(one + np.float32(0.5) + (w / 2))[:, None].float()


MADE: dict[str, Callable[[Tensor, int, int], Any]] = {
    "half of the size": lambda y, h, w: F.interpolate(y, size=tuple(int(n) for n in np.array([h, w]) // 2)),
    "as a list": lambda y, h, w: F.interpolate(y, size=(np.array((h, w)) * 0.5).astype(np.int64).tolist()),
    "rounded up": lambda y, h, w: F.adaptive_avg_pool2d(y, tuple(np.ceil(np.asarray((h, w)) / 3).astype(int))),
    "rounded": lambda y, h, w: F.avg_pool2d(y, int(np.round(h / 4))),
    "the larger": lambda y, h, w: F.adaptive_max_pool2d(y, [int(n) for n in np.maximum(np.array([h, w]) // 4, 1)]),
    "the product": lambda y, h, w: y / np.prod(y.shape[2:]) * np.log2(np.array([h, w]) / 2).min(),
    "as an entry": lambda y, h, w: y.reshape(*_with_entry(np.array(y.shape), 1, 1)[:2], -1, w),
    "anchors": _anchors,
    "waves": _waves,
    "a mask": _upper,
    "a triangle": _later,
    "beside an array": _beside,
    "a line": lambda y, h, w: y * torch.as_tensor(np.linspace(-1, 1, num=w, dtype=np.float32)),
    "ones": lambda y, h, w: y + torch.tensor(np.concatenate([np.ones((h, w)), np.full((1, w), 0.5)])[1:].mean()),
    "diagonal": lambda y, h, w: y @ torch.from_numpy(np.eye(w, dtype=np.float32)),
}


def _with_entry(sizes: Any, place: int, number: int) -> Any:
    sizes[place] *= number
    return sizes


@pytest.mark.parametrize("rehearse", [True, False], ids=["rehearsed", "run"])
@pytest.mark.parametrize("name", MADE)
def test_sizes_are_followed_through_numpy(name: str, rehearse: bool) -> None:
    net = randomise(Sized(MADE[name])).eval()
    module = recorded(net, torch.randn(2, 3, 16, 16), rehearse=rehearse)
    assert not guards_of(module.graph)
    for size in ((16, 16), (24, 20), (9, 31)):
        x = torch.randn(2, 3, *size)
        assert torch.allclose(module(x), net(x), atol=1e-5), size


BOUND: dict[str, Callable[[Tensor, int, int], Any]] = {
    "a function that torch lacks": lambda y, h, w: y * torch.from_numpy(np.hanning(w).astype(np.float32)),
    "an option that torch lacks": lambda y, h, w: (
        y * torch.as_tensor(np.linspace(-1, 1, w, endpoint=False, dtype=np.float32))
    ),
    "a grid by slices": lambda y, h, w: y * torch.from_numpy(np.mgrid[0:h, 0:w][0]).float(),
    "a constructor": lambda y, h, w: y * torch.Tensor(np.arange(w)),
    "values that leave": lambda y, h, w: y * float(np.arange(w)[-1]),
    "a narrower type": lambda y, h, w: y * float(np.array([h, w], dtype=np.float32)[1]),
}


@pytest.mark.parametrize("name", BOUND)
def test_what_is_not_followed_binds_the_graph(name: str) -> None:
    net = randomise(Sized(BOUND[name])).eval()
    x = torch.randn(2, 3, 16, 16)
    module = recorded(net, x)
    assert torch.allclose(module(x), net(x), atol=1e-6)
    guards = guards_of(module.graph)
    assert guards
    assert all("test_numpy.py" in str(guard.args[-1]) for guard in guards)
    with pytest.raises(GuardError, match=r"test_numpy\.py"):
        module.forward(torch.randn(2, 3, 16, 20))


def test_a_pruned_network_runs_at_other_sizes() -> None:
    net, x = randomise(Sized(_anchors)).eval(), torch.randn(2, 3, 16, 16)
    small = fxprune.prune(net, x, flops=0.5, round_to=1, progress=False)
    assert small(torch.randn(2, 3, 24, 20)).shape == (2, 4)


def test_numpy_is_what_it_was_afterwards() -> None:
    from_numpy = torch.from_numpy
    recorded(randomise(Sized(_waves)).eval(), torch.randn(2, 3, 16, 16))
    assert torch.from_numpy is from_numpy
    assert type(np).__name__ == "module"
