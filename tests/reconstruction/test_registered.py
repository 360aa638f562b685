"""Ops of other packages take part: what they are for the refit, their records say."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune import ops
from fxprune.ops.table import OPS
from fxprune.verification import relative_error

BY_ROW = "fxprune_refit::by_row"
SCALED = "fxprune_refit::scaled"


class Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight = nn.Linear(6, 16), nn.Parameter(torch.randn(16, 10) / 4)
        self.register_buffer("mean", torch.randn(10))
        self.register_buffer("spread", torch.rand(10) + 0.5)
        self.b = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.fxprune_refit.by_row(F.relu(self.a(x)), self.weight)
        return self.b(F.relu(torch.ops.fxprune_refit.scaled(x, self.mean, self.spread, 1e-5)))


class Alternate:
    """Every second channel of the first layer goes."""

    def score(self, group: fxprune.ChannelGroup, state: object) -> np.ndarray | None:
        if not any(member.name == "a.weight" for member in group.members):
            return None
        return np.tile([1.0, 2.0], group.size // 2).reshape(group.channels.shape)


@pytest.fixture
def library() -> Iterator[None]:
    library = torch.library.Library("fxprune_refit", "DEF")
    library.define("by_row(Tensor rows, Tensor weight) -> Tensor")
    library.define("scaled(Tensor x, Tensor centre, Tensor spread, float little) -> Tensor")
    library.impl("by_row", lambda x, w: x @ w, "CompositeExplicitAutograd")
    library.impl("scaled", lambda x, m, v, eps: (x - m) * (v + eps).rsqrt(), "CompositeExplicitAutograd")
    yield
    for name in (BY_ROW, SCALED):
        OPS.pop(name, None)
    library._destroy()


def by_row(run: ops.Propagation, call: ops.Call) -> ops.Labels:
    x, weight = call["rows"], call["weight"]
    operands = [ops.Operand(tuple(t.shape), run.labels(t), axes) for t, axes in ((x, "ik"), (weight, "kj"))]
    return ops.contract(run, operands, "ij")


def scaled(run: ops.Propagation, call: ops.Call) -> ops.Labels:
    tensors = (call["x"], call["centre"], call["spread"])
    return ops.join_positions(run, [(tuple(t.shape), run.labels(t)) for t in tensors], tuple(call.out.shape))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("told", [True, False])
def test_a_registered_op_is_refitted_if_its_record_says_how(told: bool) -> None:
    product = ops.product("rows", "weight", "ik,kj->ij")
    norm = ops.Statistics(input="x", mean="centre", var="spread", scale="", eps="little")
    given = [{"refit": known} if told else {} for known in (product, norm)]
    ops.register(BY_ROW, mask="by position", **given[0])(by_row)
    ops.register(SCALED, mask="by position", **given[1])(scaled)
    torch.manual_seed(0)
    model, data = Ours().eval(), torch.randn(400, 6)
    with torch.no_grad():  # of the 16 outputs of ``a`` every second one is like the one before it
        model.a.weight[1::2], model.a.bias[1::2] = model.a.weight[::2], model.a.bias[::2]
    small = fxprune.prune(model, data[:2], method=Alternate(), channels=0.7, round_to=1, progress=False)
    fitted = fxprune.reconstruct(small, model, data)
    layers = {layer.name: layer for layer in fitted.meta["fxprune"].reconstruction.layers}
    with torch.no_grad():
        error = relative_error(fitted(data), model(data))
        assert relative_error(small(data), model(data)) > 0.05
    if told:
        assert layers["weight"].kept
        assert layers["weight"].op == "by_row"
        assert error < 1e-5
    else:
        assert "weight" not in layers
        assert error > 1e-3
