"""Gates: one on every path from where a channel is made to where it is read, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import randomise
from nets import Attentive, Shuffled, Small, image, make
from torch import Tensor, fx, nn

import fxprune
from fxprune.groups import analyse_graph
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.flow import flows
from fxprune.methods import Gates
from fxprune.rewriting.gates import Gate, insert_gates
from fxprune.selection.plan import PruningPlan
from fxprune.verification import masked_output

pytestmark = pytest.mark.usefixtures("one_thread")


class PostNorm(nn.Module):
    """A stream that is read both as it is and through a norm at the end: ``x + norm(mlp(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(6, 16), nn.LayerNorm(16)
        self.mlp, self.norm = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)), nn.LayerNorm(16)
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.embed(x))
        x = x + self.norm(self.mlp(x))
        return self.head(self.last(x))


class Dense(nn.Module):
    """Concatenation before a norm, as in DenseNet: the channels of one layer pass several norms on several paths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(14), nn.BatchNorm2d(20)])
        self.convs = nn.ModuleList([nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(14, 6, 3, padding=1)])
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return self.head(self.norms[-1](x).relu().mean((2, 3)))


class PreAct(nn.Module):
    """A stream that has no norm of its own: only what reads it normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm, self.one = nn.BatchNorm2d(12), nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.inner, self.two = nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, padding=1, bias=False)
        self.last, self.head = nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.two(self.inner(self.one(self.norm(x).relu())).relu())
        return self.head(self.last(x).relu().mean((2, 3)))


class Separable(nn.Module):
    """Depthwise convolutions with biases, between pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU())
        self.point = nn.Sequential(nn.Conv2d(12, 16, 1), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.point(self.depth(self.stem(x))).mean((2, 3)))


class Halves(nn.Module):
    """Of the two halves of an image one goes through a norm, the other past it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).relu().chunk(2, 3)
        return self.head((self.norm(left) + right).mean((2, 3)))


def small_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: randomise(timm.create_model(name)).eval()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: make(Small), (2, 3, 8, 8)),
    "grouped": (lambda: make(Shuffled), (2, 3, 8, 8)),
    "attention": (lambda: make(Attentive), (2, 3, 8, 8)),
    "post-norm": (lambda: make(PostNorm), (2, 4, 6)),
    "dense": (lambda: make(Dense), (2, 3, 8, 8)),
    "pre-activation": (lambda: make(PreAct), (2, 3, 8, 8)),
    "separable": (lambda: make(Separable), (2, 3, 8, 8)),
    "halves": (lambda: make(Halves), (2, 3, 8, 8)),
    **{name: (small_timm(name), (2, 3, 64, 64)) for name in ("test_resnet", "test_efficientnet", "test_convnext")},
    "test_vit": (small_timm("test_vit"), (2, 3, 160, 160)),
}


def gated(name: str) -> tuple[fx.GraphModule, fx.GraphModule, ChannelGraph, Gates, Tensor]:
    """(dense, with gates, channels, gates, input)."""
    build, shape = NETS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dense = fxprune.record(build(), x)
    graph = analyse_graph(dense, (x,), {})
    module = copy.deepcopy(dense).eval()
    return dense.eval(), module, graph, insert_gates(module, graph, graph.prunable), x


@pytest.mark.parametrize("name", NETS)
def test_gates_of_one_change_nothing(name: str) -> None:
    dense, module, graph, gates, x = gated(name)
    assert gates.values.shape == (sum(g.channels.size for g in graph.prunable),)
    for training in (False, True):
        results = []
        for net in (dense, module):
            torch.manual_seed(0)
            results.append(copy.deepcopy(net).train(training)(x))
        assert torch.equal(*results)


@pytest.mark.parametrize("name", NETS)
def test_every_path_has_one_gate(name: str) -> None:
    dense, module, graph, _, _ = gated(name)
    steps = {node.name: step for node, step in flows(dense, graph).items()}
    counted = 0
    for channel in (int(c) for g in graph.prunable for c in g.channels[:, :2].reshape(-1)):
        seen: dict[fx.Node, set[int]] = {}  # how many gates on the paths to a node
        for node in module.graph.nodes:
            before = set().union(*(seen.get(i, set()) for i in node.all_input_nodes))
            if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), Gate):
                here = any(lets_through(module, node, channel, graph))
                seen[node] = {count + here for count in before}
                continue
            step = steps.get(node.name)
            if step is None:
                continue
            if channel in step.reads:
                assert before == {1}, f"{node.name} reads channel {channel} behind {before} gates"
                counted += 1
            made = {0} if channel in step.makes else set()
            passed = before if channel in step.out and channel not in step.makes else set()
            if made or passed:
                seen[node] = made | passed
    assert counted > 0


def lets_through(module: fx.GraphModule, node: fx.Node, channel: int, graph: ChannelGraph) -> list[bool]:
    """Does the gate node scale this channel? Found by trial: a gate of 3 shows in what it makes of ones."""
    gate = module.get_submodule(str(node.target))
    bank = gate._bank[0]  # type: ignore[index, union-attr]
    place = 0
    for group in graph.prunable:
        where = np.flatnonzero(group.channels.reshape(-1) == channel)
        if len(where):
            used = [bool((index == place + where[0]).any()) for _, index in gate.named_buffers()]
            assert len(bank.values) > place
            return used
        place += group.channels.size
    return [False]


@pytest.mark.parametrize("name", [
    "residual", "grouped", "dense", "pre-activation", "separable", "halves", "test_resnet",
])  # fmt: skip
def test_a_gate_of_zero_is_a_channel_that_is_not_there(name: str) -> None:
    dense, module, graph, gates, x = gated(name)
    exact = [g for g in graph.prunable if g.exact]
    keep = graph.everything()
    with torch.no_grad():
        for group in exact:
            keep[group.channels[:, ::2]] = False
            gates.values[gates.index[group.name][:, ::2]] = 0
        expected = masked_output(dense, graph, PruningPlan.of(graph, keep), keep, ((x,), {}))
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, dense(x), rtol=1e-2)


def test_gates_keep_the_precision_of_activations() -> None:
    _, module, _, _, x = gated("residual")
    seen: list[Any] = []
    handle = module.get_submodule("_fxprune_gates_0").register_forward_hook(lambda _, a, y: seen.append((a[0], y)))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        module(x)
    handle.remove()
    assert seen[0][0].dtype == seen[0][1].dtype


def test_only_the_chosen_groups_have_gates() -> None:
    build, shape = NETS["residual"]
    x = torch.randn(shape)
    dense = fxprune.record(build(), x)
    graph = analyse_graph(dense, (x,), {})
    inner = [g for g in graph.prunable if g.name == "up.0"]
    module = copy.deepcopy(dense)
    gates = insert_gates(module, graph, inner)
    assert gates.of(inner[0]).shape == (1, 24)
    assert sum(isinstance(m, Gate) for m in module.modules()) == 1
    assert module.state_dict().keys() - dense.state_dict().keys() == {"_fxprune_gates.values"}
    (node,) = (n for n in module.graph.nodes if str(n.target).startswith("_fxprune_gates"))
    assert node.args[0].target == "up.1"  # after the norm, before the activation


@pytest.mark.parametrize("name", ["dense", "pre-activation", "attention"])
def test_channels_without_a_gate_beside_others_are_left_as_they_are(name: str) -> None:
    build, shape = NETS[name]
    x = torch.randn(shape)
    dense = fxprune.record(build(), x).eval()
    graph = analyse_graph(dense, (x,), {})
    for group in graph.prunable:
        module = copy.deepcopy(dense)
        gates = insert_gates(module, graph, [group])
        assert torch.equal(module(x), dense(x))
        with torch.no_grad():
            gates.values.zero_()
            keep = graph.everything()
            keep[group.channels] = False
            if group.exact:
                expected = masked_output(dense, graph, PruningPlan.of(graph, keep), keep, ((x,), {}))
                torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_producers_are_counted() -> None:
    training = fxprune.attach(make(), image(), method="scratch", flops=0.5, progress=False)
    site = training.hooks._site  # type: ignore[attr-defined]
    assert {g.name: site.producers(g) for g in training.graph.prunable} == {"stem.0": 2, "up.0": 1}
