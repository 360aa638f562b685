"""A graph that is cast runs as the model does: dtypes that a forward reads from its tensors are read by the graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import Tensor, nn

import fxprune
from fxprune.recording import recorded
from fxprune.recording.dtypes import NOTE


class Reads(nn.Module):
    """Two layers, and what is made between them of the dtype of a tensor."""

    def __init__(self, between: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(8, 16), nn.Linear(16, 4), between
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x), x))


def _normed(net: Any, h: Tensor, x: Tensor) -> Tensor:
    asked, wide = h.dtype, h.float()
    return net.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(asked)


def _asked_twice(net: Any, h: Tensor, x: Tensor) -> Tensor:
    wide = h.softmax(-1, dtype=torch.float32)
    return wide.to(h.dtype) * (wide > 0).to(wide.dtype).sum().to(dtype=x.dtype)


def _branched(net: Any, h: Tensor, x: Tensor) -> Tensor:
    return (h * 2 if h.dtype == torch.float32 else h).to(x.dtype)


BETWEEN: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "softmax in float32": lambda net, h, x: F.softmax(h, -1, dtype=torch.float32).to(h.dtype),
    "a norm in float32": _normed,
    "two tensors asked": _asked_twice,
    "a range": lambda net, h, x: h * torch.arange(1, 17, dtype=x.dtype) / 16,
    "the least number": lambda net, h, x: h.masked_fill(h < 0, torch.finfo(h.dtype).min).softmax(-1),
    "the smallest step": lambda net, h, x: h.clamp(min=torch.finfo(h.dtype).eps),
    "of a weight": lambda net, h, x: h.double().to(net.second.weight.dtype),
    "zeros": lambda net, h, x: h + torch.zeros(16, dtype=h.dtype, device=h.device),
    "a mask": lambda net, h, x: h * (x[..., :1] > 0).to(h.dtype),
    "beside a branch on training": lambda net, h, x: F.dropout(h, 0.1 if net.training else 0.0).double().to(x.dtype),
    "attention": lambda net, h, x: net.attention(h, h, h, key_padding_mask=x.sum(-1) > 3)[0],
}
WIDTHS = (torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("rehearse", [True, False], ids=["rehearsed", "run"])
@pytest.mark.parametrize("name", BETWEEN)
def test_a_graph_is_cast_as_its_model_is(name: str, rehearse: bool) -> None:
    net, x = randomise(Reads(BETWEEN[name])).eval(), torch.randn(2, 5, 8)
    module = recorded(net, x, rehearse=rehearse)
    assert torch.equal(module(x), net(x))
    assert not any(note.endswith(NOTE) for note in module.meta["notes"])
    for dtype in WIDTHS:
        cast, own = copy.deepcopy(module).to(dtype), copy.deepcopy(net).to(dtype)
        assert cast(x.to(dtype)).dtype == dtype
        assert torch.equal(cast(x.to(dtype)), own(x.to(dtype)))


def test_a_graph_of_narrow_floats_is_widened() -> None:
    net, x = randomise(Reads(_normed)).eval().bfloat16(), torch.randn(2, 5, 8).bfloat16()
    module = recorded(net, x)
    assert torch.equal(module.float()(x.float()), copy.deepcopy(net).float()(x.float()))


def _widened(net: Any, h: Tensor, x: Tensor) -> Tensor:
    asked = h.dtype
    return (h.float() if asked in (torch.bfloat16, torch.float16) else h).to(asked)


@pytest.mark.parametrize("between", [_branched, _widened])
def test_a_branch_on_the_dtype_is_noted(between: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    module = recorded(randomise(Reads(between)).eval(), torch.randn(2, 5, 8))
    assert [note for note in module.meta["notes"] if note.endswith(NOTE)] == [f"Reads: {NOTE}"]


def test_a_dtype_that_is_written_stays() -> None:
    def between(net: Any, h: Tensor, x: Tensor) -> Tensor:
        return h.softmax(-1, dtype=torch.float32) if x.dtype.is_floating_point else h

    module = recorded(randomise(Reads(between)).eval(), torch.randn(2, 5, 8))
    assert torch.float32 in {a for node in module.graph.nodes for a in (*node.args, *node.kwargs.values())}
    assert getattr not in {node.target for node in module.graph.nodes}


def test_a_pruned_network_is_cast() -> None:
    net, x = randomise(Reads(_normed)).eval(), torch.randn(2, 5, 8)
    small = fxprune.prune(net, x, params=0.9, round_to=1, progress=False)
    assert torch.allclose(copy.deepcopy(small).bfloat16()(x.bfloat16()).float(), small(x), atol=0.1)
