"""What a method has read and learned is gone when its result is."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.methods import Learner
from fxprune.methods.registry import available, resolve

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Convolutions with norms, a residual branch, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.between = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.outer = nn.Conv2d(16, 8, 3, padding=1)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = x + self.outer(F.relu(self.between(self.inner(x))))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture(autouse=True)
def frozen() -> None:
    """What is there before a test is neither searched nor counted, which took most of its time."""
    gc.collect()
    gc.freeze()


def alive() -> int:
    """Tensors that something refers to; a circle through what autograd keeps is not collected."""
    gc.collect()
    return sum(isinstance(found, Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("method", available())
def test_again_and_again(method: str) -> None:
    model, images = Net().eval(), torch.randn(16, 3, 8, 8)
    asked: dict[str, Any] = {"method": method, "flops": 0.7, "data": [(images, torch.arange(16) % 4)]}
    asked |= {"epochs": 1} if isinstance(resolve(method), Learner) else {"reconstruct": True}
    counts = []
    for _ in range(3):
        fxprune.prune(model, images[:1], **asked, progress=False)
        counts.append(alive())
    assert counts[1] == counts[2]
