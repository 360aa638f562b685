"""The check of a rewritten graph finds what the rewriter could get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import Tensor, fx, nn

import fxprune
from fxprune import ops
from fxprune.ops.table import OPS
from fxprune.rewriting import check_rewrite, draft, run_on_meta


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.h(self.b(x.view(x.shape[0], 8, 6, 6)).mean((2, 3)))


def after_relu(module: fx.GraphModule, change: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
    """Put something behind the relu."""
    graph = module.graph
    relu = next(n for n in graph.nodes if n.name == "relu")
    with graph.inserting_after(relu):
        new = change(graph, relu)
    relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    module.recompile()


def wrong_order(module: fx.GraphModule) -> None:
    after_relu(module, lambda graph, relu: graph.call_function(torch.flip, (relu, [1])))


def wrong_size(module: fx.GraphModule) -> None:
    after_relu(module, lambda graph, relu: graph.call_function(torch.narrow, (relu, 1, 0, 3)))


def wrong_literal(module: fx.GraphModule) -> None:
    view = next(n for n in module.graph.nodes if n.target == "view")
    view.args = (*view.args[:2], 8, *view.args[3:])


def other_channels(module: fx.GraphModule) -> None:
    """Channels 0, 1, 2 and 0 instead of 0, 1, 2, 3."""
    module.register_buffer("index", torch.tensor([0, 1, 2, 0]), persistent=False)
    graph = module.graph
    relu = next(n for n in graph.nodes if n.name == "relu")
    with graph.inserting_after(relu):
        constant = graph.get_attr("index")
    with graph.inserting_after(constant):
        new = graph.call_function(torch.index_select, (relu, 1, constant))
    relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    module.recompile()


@pytest.mark.parametrize("fault", [None, wrong_order, wrong_size, wrong_literal, other_channels])
def test_faults_are_found(fault: Callable[[fx.GraphModule], None] | None) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = randomise(Net()).eval()
    dense, graph = fxprune.record(model, x), fxprune.analyze(model, x)
    keep = graph.everything()
    group = next(g for g in graph.groups if g.name == "a")
    keep[group.channels[0, [0, 3, 4, 6]]] = False
    module = draft(dense, graph, keep, run_on_meta(dense, (torch.randn(3, 3, 8, 8),), {}).numbers).module
    if fault is None:
        assert check_rewrite(module, graph, keep, (x,), {}) is None
        return
    fault(module)
    mismatch = check_rewrite(module, graph, keep, (x,), {})
    assert mismatch is not None
    assert mismatch.text
    assert set(mismatch.channels) & set(group.channels.reshape(-1).tolist())


def test_a_wrong_order_is_named_with_the_line() -> None:
    """Even where a second turn undoes it: every node must carry what was promised for it."""
    x = torch.randn(2, 3, 8, 8)
    model = randomise(Net()).eval()
    dense, graph = fxprune.record(model, x), fxprune.analyze(model, x)
    keep = graph.everything()
    keep[next(g for g in graph.groups if g.name == "a").channels[0, :2]] = False
    module = draft(dense, graph, keep, run_on_meta(dense, (torch.randn(3, 3, 8, 8),), {}).numbers).module
    wrong_order(module)
    relu = next(n for n in module.graph.nodes if n.name == "relu")
    with module.graph.inserting_before(relu):
        relu.args = (module.graph.call_function(torch.flip, (relu.args[0], [1])),)
    mismatch = check_rewrite(module, graph, keep, (x,), {})
    assert mismatch is not None
    assert mismatch.text == "channels in another order along dim 1"
    assert (mismatch.node, mismatch.source.split(" in ")[1]) == ("relu", "forward")


def test_a_node_that_fails_is_a_mismatch_even_if_no_channels_come_out_of_it() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = randomise(Net()).eval()
    dense, graph = fxprune.record(model, x), fxprune.analyze(model, x)
    keep = graph.everything()
    group = next(g for g in graph.groups if g.name == "b")
    keep[group.channels[0, :2]] = False
    module = draft(dense, graph, keep, run_on_meta(dense, (torch.randn(3, 3, 8, 8),), {}).numbers).module
    head = next(n for n in module.graph.nodes if n.name == "h")
    with module.graph.inserting_before(head):
        head.args = (module.graph.call_function(torch.narrow, (head.args[0], 1, 0, 3)),)
    mismatch = check_rewrite(module, graph, keep, (x,), {})
    assert mismatch is not None
    assert mismatch.node == "h"
    assert mismatch.text.startswith("RuntimeError: ")
    assert mismatch.source.endswith(" in forward")


def replace_rule(monkeypatch: pytest.MonkeyPatch, name: str, label: Any) -> None:
    record = ops.lookup(f"aten::{name}")
    monkeypatch.setitem(OPS, record.name, replace(record, label=label))


class Grid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.o(self.a(x).relu()).tanh().permute(0, 2, 3, 1)
        return F.grid_sample(x, grid, align_corners=False)


def test_a_rule_that_is_wrong_costs_channels_and_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It overlooks that two coordinates are needed: what cannot be run is locked, and the rest is cut."""
    replace_rule(monkeypatch, "grid_sampler_2d", lambda run, call: [run.labels(t) for t in call.tensors] and ())
    notes: list[str] = []
    for seed in range(3):
        torch.manual_seed(seed)
        pruned = fxprune.prune(Grid().eval(), torch.randn(2, 3, 8, 8), flops=0.5, round_to=1, progress=False)
        assert pruned.o.weight.shape == (2, 4, 1, 1)
        notes += pruned.meta["fxprune"].notes
    assert notes
    assert all(note.startswith("locked: the rewritten graph does not follow (") for note in notes)
    assert all("grid" in note and "test_check.py:" in note for note in notes)


def test_what_cannot_be_interpreted_may_fail_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Any, call: Any) -> Any:
        raise NotImplementedError("no shapes here")

    replace_rule(monkeypatch, "cumsum", fails)

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.h = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(self.b(self.a(x).cumsum(1)).relu())

    model, x = Sums().eval(), torch.randn(2, 4)
    assert fxprune.analyze(model, x).uninterpreted == {"cumsum"}
    pruned = fxprune.prune(model, x, channels=0.5, round_to=1, progress=False)
    assert (pruned.a.out_features, pruned.b.out_features) == (8, 3)
    notes = pruned.meta["fxprune"].notes
    assert any("cumsum cannot be interpreted: NotImplementedError: no shapes here" in n for n in notes)
    assert not any(n.startswith("locked") for n in notes)
