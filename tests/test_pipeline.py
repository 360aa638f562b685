"""The rounds of selecting and rewriting: what a budget error names is reached, and a plan that fails is one of many."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from labels.nets import CASES
from torch import Tensor, nn

import fxprune
from fxprune import pipeline
from fxprune.errors import BudgetError
from fxprune.labels.classes import Reason
from fxprune.rewriting.check import Mismatch
from fxprune.verification import TOLERANCE


class Attentive(nn.Module):
    """Attention with heads of 8, and a wide layer: most of what can go lies inside the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.q, self.k, self.v, self.o = (nn.Linear(n, 32) for n in (16, 32, 32, 32, 32))
        self.m = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        q, k, v = (p(x).view(*x.shape[:-1], -1, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.o(y.reshape(*x.shape[:-1], -1))
        return x + self.m(x)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))


def prune(model: nn.Module, x: Any, flops: float, **options: Any) -> Any:
    return fxprune.prune(model.eval(), x, flops=flops, round_to=1, progress=False, **options)


def fewer(report: fxprune.Report) -> list[str]:
    """What the rewriting could not follow."""
    return [note for note in report.notes if "does not follow" in note]


def smallest(model: nn.Module, x: Any, **options: Any) -> float:
    """What the budget error names."""
    with pytest.raises(BudgetError) as error:
        prune(model, x, 0.001, **options)
    found = re.search(r"the smallest reachable ratio is ([0-9.]+[0-9])", str(error.value))
    assert found is not None
    return float(found[1])


def test_the_smallest_ratio_leaves_one_channel_per_head() -> None:
    model, x = randomise(Attentive()), torch.randn(2, 6, 16)
    ratio = smallest(model, x)
    report = (pruned := prune(model, x, ratio)).meta["fxprune"]
    assert pruned.q.weight.shape == pruned.k.weight.shape == pruned.v.weight.shape == (4, 32)
    assert report.oracle_error < TOLERANCE
    assert not fewer(report)
    with pytest.raises(BudgetError):
        prune(model, x, 0.99 * ratio)


KINDS = ["HeadsOfTwoSizes", "ScalePerHead", "LinearAttention", "GroupedAfterConcat", "TransposedGrouped", "Concat",
         "Dense", "ShuffledBranches", "Coordinates", "Residual"]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_the_ratio_that_is_named_is_the_smallest_that_is_reached(name: str) -> None:
    case = CASES[name]
    model, x = randomise(case.build()), case.inputs(2)
    ratio = smallest(model, x, method="random")
    report = prune(model, x, ratio, method="random").meta["fxprune"]
    assert report.oracle_error < TOLERANCE
    assert not any(note.startswith("locked") for note in fewer(report))
    for lower in (0.99, 0.8, 0.6):
        with pytest.raises(BudgetError):
            prune(model, x, lower * ratio, method="random")


@pytest.mark.parametrize("name", ["Concat", "Dense", "ShuffledBranches"])
def test_one_channel_beside_others_is_no_mismatch(name: str) -> None:
    case = CASES[name]
    model, x = randomise(case.build()), case.inputs(2)
    report = prune(model, x, smallest(model, x)).meta["fxprune"]
    assert not fewer(report)
    assert 1 in {row.after for row in report.groups}


def test_a_plan_that_fails_leaves_other_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel of ``0`` cannot be rewritten, let us say: then two are kept, not all."""
    model = layers()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)  # all of them go first
    checked = pipeline.check_rewrite

    def check(module: Any, graph: Any, keep: Any, args: Any, kwargs: Any) -> Mismatch | None:
        channels = next(g for g in graph.groups if g.name == "0").channels
        if np.count_nonzero(keep[channels]) < 2:
            return Mismatch("0", "net.py:1 in forward", "too few", tuple(channels[0].tolist()))
        return checked(module, graph, keep, args, kwargs)

    monkeypatch.setattr(pipeline, "check_rewrite", check)
    pruned = prune(model, torch.randn(2, 16), 0.028)
    assert pruned.get_parameter("0.weight").shape == (2, 16)
    report = pruned.meta["fxprune"]
    assert {row.name: row.after for row in report.groups}["0"] == 2
    assert fewer(report) == [
        "at least 2 of 0 stay: the rewritten graph does not follow (too few) (net.py:1 in forward)"
    ]
    with pytest.raises(BudgetError) as error:
        prune(model, torch.randn(2, 16), 0.001)
    text = (
        " A smaller plan could not be rewritten: the rewritten graph does not follow (too few) (net.py:1 in forward)."
    )
    assert str(error.value).endswith(text)


def test_what_fails_with_a_few_channels_left_is_locked_after_two_rounds() -> None:
    graph, reason = fxprune.analyze(layers(), torch.ones(2, 16)), Reason("too few", "net.py:1")
    group = next(g for g in graph.groups if g.name == "0")
    found = []
    for left in (1, 2, 4):
        keep = graph.everything()
        keep[group.channels[0, left:]] = False
        graph, note = graph.without(keep, group.channels[0].tolist(), reason)
        found.append(note)
    assert found == [
        "at least 2 of 0 stay: too few (net.py:1)", "at least 4 of 0 stay: too few (net.py:1)",
        "locked: too few (net.py:1)",
    ]  # fmt: skip
    assert next(g for g in graph.groups if g.name == "0").locked == reason
    assert next(g for g in graph.groups if g.name == "2").locked is None
