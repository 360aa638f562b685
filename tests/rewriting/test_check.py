"""The check of a rewritten graph finds what the rewriter could get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import Tensor, fx, nn

import fxprune
from fxprune import ops
from fxprune.ops.table import OPS
from fxprune.rewriting import OnMeta, check_rewrite, draft
from fxprune.rewriting.check import Mismatch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.h(self.b(x.view(x.shape[0], 8, 6, 6)).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A network rewritten without some of its channels, before its check."""

    module: fx.GraphModule
    graph: fxprune.ChannelGraph
    keep: Any
    x: Tensor

    @classmethod
    def of(cls, model: nn.Module, **left: list[int]) -> Case:
        """``left``: of which groups of one block so many channels stay, and which."""
        model, x = randomise(model).eval(), torch.randn(2, 3, 8, 8)
        dense, graph = fxprune.record(model, x), fxprune.analyze(model, x)
        keep = graph.everything()
        for group in graph.groups:
            if group.name in left:
                keep[group.channels] = False
                keep[group.channels[0, left[group.name]]] = True
        numbers = OnMeta(dense).run((torch.randn(3, 3, 8, 8),), {}).numbers
        return cls(draft(dense, graph, keep, numbers).module, graph, keep, x)

    def channels(self, name: str) -> list[int]:
        (group,) = (g for g in self.graph.groups if g.name == name)
        return group.channels.reshape(-1).tolist()

    def mismatch(self) -> Mismatch | None:
        return check_rewrite(self.module, self.graph, self.keep, (self.x,), {})


def flip_around(code: fx.Graph, node: fx.Node, before: int, after: int) -> None:
    """The channels of ``node`` in reverse, and back behind it; along these dims of what it takes and gives."""
    with code.inserting_before(node):
        node.args = (code.call_function(torch.flip, (node.args[0], [before])),)
    with code.inserting_before(node.next):
        back = code.call_function(torch.flip, (node, [after]))
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)


def after_relu(module: fx.GraphModule, change: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
    """Put something behind the relu."""
    graph = module.graph
    before = set(graph.nodes)
    relu = next(n for n in graph.nodes if n.name == "relu")
    with graph.inserting_before(relu.next):
        new = change(graph, relu)
    made = set(graph.nodes) - before
    relu.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made)
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
    case = Case.of(Net(), a=[1, 2, 5, 7])
    if fault is None:
        assert case.mismatch() is None
        return
    fault(case.module)
    mismatch = case.mismatch()
    assert mismatch is not None
    assert mismatch.text
    assert set(mismatch.channels) & set(case.channels("a"))


@pytest.mark.parametrize("left", [[2, 3, 4, 5, 6, 7], [2, 5]])
def test_a_wrong_order_is_named_with_the_line(left: list[int]) -> None:
    """Even where a second turn undoes it: every node must carry what was promised for it."""
    case = Case.of(Net(), a=left)
    wrong_order(case.module)
    code = case.module.graph
    relu = next(n for n in code.nodes if n.name == "relu")
    with code.inserting_before(relu):
        relu.args = (code.call_function(torch.flip, (relu.args[0], [1])),)
    mismatch = case.mismatch()
    assert mismatch is not None
    assert mismatch.text == "channels in another order along dim 1"
    assert (mismatch.node, mismatch.source.split(" in ")[1]) == ("relu", "forward")


def test_channels_that_meet_are_named_and_no_others() -> None:
    """Of the six that stay two are added to two others, and nothing else is different: not even a size."""
    case = Case.of(Net(), a=[1, 2, 4, 5, 6, 7])

    def add_up(code: fx.Graph, relu: fx.Node) -> fx.Node:
        first, second, rest = (code.call_function(torch.narrow, (relu, 1, *part)) for part in ((0, 2), (2, 2), (2, 4)))
        total = code.call_function(torch.add, (first, second))
        return code.call_function(torch.cat, ([total, rest], 1))

    after_relu(case.module, add_up)
    mismatch = case.mismatch()
    assert mismatch is not None
    assert (mismatch.node, mismatch.text) == ("a", "different channels meet")
    assert mismatch.channels == tuple(case.channels("a")[i] for i in (1, 2, 4, 5))


def test_channels_that_stay_anyway_may_meet() -> None:
    case = Case.of(Net(), a=[2, 3, 4, 5, 6, 7])
    code = case.module.graph
    given = next(n for n in code.nodes if n.op == "placeholder")
    with code.inserting_before(given.next):
        turned = code.call_function(torch.flip, (given, [1]))
        total = code.call_function(torch.add, (given, turned))
    given.replace_all_uses_with(total, delete_user_cb=lambda user: user not in (turned, total))
    assert case.mismatch() is None


def test_one_channel_has_none() -> None:
    case = Case.of(Net(), a=[4], b=[1])
    assert case.mismatch() is None
    wrong_order(case.module)
    assert case.mismatch() is None


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.h = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 1), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.cat([self.a(x), self.c(x)], 1).relu().mean((2, 3)))


@pytest.mark.parametrize("left", [[2], [1, 4, 5]])
def test_one_channel_beside_others_may_have_lost_its_label(left: list[int]) -> None:
    """But the others have an order."""
    case = Case.of(Pair(), a=[4], c=left)
    assert case.mismatch() is None
    if len(left) == 1:
        return
    code = case.module.graph
    relu = next(n for n in code.nodes if n.name == "relu")
    flip_around(code, relu, 1, 1)
    mismatch = case.mismatch()
    assert mismatch is not None
    assert (mismatch.node, mismatch.text) == ("relu", "channels in another order along dim 1")


class NoneOfThem(nn.Module):
    """Heads are divided among two kinds of attention, of which one has none."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.h = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 5)
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        q, k, v = (layer(x).view(*x.shape[:2], 2, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        other = v[:, 2:]
        y = self.h(F.scaled_dot_product_attention(q[:, :2], k[:, :2], v[:, :2]).transpose(1, 2).flatten(2))
        return (y, other) if self.returned else y


def test_no_entries_are_no_channels() -> None:
    """A size beside them was promised, and all of the queries and keys were locked."""
    x = torch.randn(2, 6, 8)
    small = fxprune.prune(NoneOfThem(False).eval(), x, channels=0.5, round_to=1, progress=False)
    assert small.v.weight.shape == (8, 8)
    assert small.meta["fxprune"].notes == ()
    with pytest.raises(fxprune.FxpruneError, match=r"the rewritten graph does not follow \(shape \[2, 0, 6, \d\]"):
        fxprune.prune(NoneOfThem(True).eval(), x, channels=0.5, round_to=1, progress=False)


def test_a_shape_that_was_not_promised() -> None:
    case = Case.of(Net(), a=[1, 2, 5, 7])
    view = next(n for n in case.module.graph.nodes if n.target == "view")
    view.args = (*view.args[:3], 4, 9)
    mismatch = case.mismatch()
    assert mismatch is not None
    assert mismatch.text == "shape [2, 4, 4, 9] instead of [2, 4, 6, 6]"
    assert mismatch.channels == tuple(case.channels("a"))


def test_no_channels_where_some_were_promised() -> None:
    case = Case.of(Net(), a=[1, 2, 5, 7])
    after_relu(case.module, lambda code, relu: code.call_function(torch.cumsum, (relu, 1)))
    mismatch = case.mismatch()
    assert mismatch is not None
    assert mismatch.text == "no channels along dim 1"
    assert mismatch.channels == tuple(case.channels("a"))


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Conv2d(3, 8, 1), nn.Linear(6, 5)
        self.w = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.a(x).mean((2, 3)) @ self.w.t())


def test_the_other_dims_of_a_tensor_of_which_one_channel_is_left() -> None:
    case = Case.of(Matrix(), a=[3], w=[1, 2, 4])
    assert case.mismatch() is None
    code = case.module.graph
    turned = next(n for n in code.nodes if n.name == "t")
    flip_around(code, turned, 0, 1)
    mismatch = case.mismatch()
    assert mismatch is not None
    assert (mismatch.node, mismatch.text) == ("t", "channels in another order along dim 1")


def test_a_node_that_fails_is_a_mismatch_even_if_no_channels_come_out_of_it() -> None:
    case = Case.of(Net(), b=[2, 3, 4, 5])
    code = case.module.graph
    head = next(n for n in code.nodes if n.name == "h")
    with code.inserting_before(head):
        head.args = (code.call_function(torch.narrow, (head.args[0], 1, 0, 3)),)
    mismatch = case.mismatch()
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
