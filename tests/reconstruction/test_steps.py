"""Budgets that are reached in steps: what a step leaves is refitted before the next one scores it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fxprune
from fxprune import methods, running
from fxprune.labels.classes import Reason
from fxprune.methods import obs


class Twins(nn.Sequential):
    """The second half of the hidden channels says what the first says, and is what ``InTurn`` gives up first."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        with torch.no_grad():
            self[0].weight[4:] = self[0].weight[:4]
            self[1].running_mean.copy_(torch.randn(4).mul(0.1).repeat(2))
            self[1].running_var.copy_(torch.rand(4).add(0.5).repeat(2))
        self.eval()


@dataclass(frozen=True)
class InTurn:
    needs: ClassVar[frozenset[Any]] = frozenset()
    normalize: ClassVar[str] = "none"
    seen: list[dict[str, Tensor]] = field(default_factory=list)

    def score(self, group: fxprune.ChannelGroup, state: methods.ModelState) -> Any:
        self.seen.append({name: tensor.detach().clone() for name, tensor in state.tensors.items()})
        return np.arange(group.channels.size, 0, -1.0).reshape(group.channels.shape)


def test_the_next_step_scores_refitted_weights() -> None:
    torch.manual_seed(0)
    net, data = Twins(), torch.randn(32, 3, 6, 6)
    given: dict[str, Any] = {"channels": 0.5, "round_to": 1, "progress": False, "options": fxprune.Options(steps=2)}
    plain, refits = InTurn(), InTurn()
    fxprune.prune(net, data[:1], method=plain, **given)
    small = fxprune.prune(net, data[:1], method=refits, data=data, reconstruct=True, **given)
    assert small.meta["fxprune"].notes == ()
    expected = net(data)
    first, second = (functional_call(net, tensors, data) for tensors in (plain.seen[-1], refits.seen[-1]))
    gone = plain.seen[-1]["3.weight"].abs().sum((0, 2, 3)) == 0
    assert gone.tolist() == [False] * 6 + [True] * 2
    assert torch.equal(refits.seen[-1]["3.weight"].abs().sum((0, 2, 3)) == 0, gone)
    assert not torch.allclose(first, expected, atol=1e-2)
    assert torch.allclose(second, expected, atol=1e-4)
    assert torch.equal(plain.seen[-1]["3.weight"][:, :6], net[3].weight[:, :6])


def test_obs_counts_on_the_refit_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, data = Twins(), torch.randn(32, 3, 6, 6)
    seen: list[bool] = []
    score = obs.OBS.score

    def watched(self: Any, group: fxprune.ChannelGroup, state: methods.ModelState) -> Any:
        tensors = {name: tensor.detach() for name, tensor in state.tensors.items()}
        seen.append(torch.allclose(functional_call(net, tensors, data), net(data), atol=1e-4))
        return score(self, group, state)

    monkeypatch.setattr(obs.OBS, "score", watched)
    options = fxprune.Options(steps=3)
    fxprune.prune(
        net, data[:1], method="obs", data=data, channels=0.5, round_to=1, progress=False, options=options
    )  # fmt: skip
    assert seen == [True] * 3


def test_a_step_that_cannot_be_refitted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = Twins(), torch.randn(32, 3, 6, 6)
    monkeypatch.setattr(running, "rewrite_as", lambda *_: Reason("a reason", "net.py:3"))
    small = fxprune.prune(
        net, data[:1], method="obs", data=data, channels=0.5, round_to=1, progress=False,
        options=fxprune.Options(steps=2),
    )  # fmt: skip
    note = small.meta["fxprune"].notes[0]
    assert note == "not refitted after step 1 of 2: a reason (net.py:3)"
