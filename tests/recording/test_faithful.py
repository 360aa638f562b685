"""What a recorded network keeps of the original besides its outputs, and what recording leaves behind: nothing."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import io
import itertools
import pickle
import random
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.errors import ExampleInputsError, GuardError, RecordError
from fxprune.recording import (
    RecordedModule,
    clone_modules,
    clone_structure,
    evaluated,
    named_tensors,
    record,
    recorded,
)
from fxprune.recording.guards import fits
from fxprune.recording.parts import Parts


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mask", torch.ones(4, 1, 1), persistent=False)
        self.norm = nn.BatchNorm2d(4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.scale[:, None, None] * self.mask


def _targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.target is not fits]


# --- structure ------------------------------------------------------------------------------------------------------


def test_tensors_are_shared_and_in_order() -> None:
    model = Block()
    gm = record(model, torch.randn(1, 3, 5, 5))
    assert isinstance(gm, RecordedModule)
    assert list(gm.state_dict()) == list(model.state_dict())
    assert [name for name, _ in gm.named_buffers()] == [name for name, _ in model.named_buffers()]
    assert all(a is b for a, b in zip(gm.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(gm.buffers(), model.buffers(), strict=True))
    assert gm.conv is not model.conv
    assert type(gm.conv) is nn.Conv2d


def test_code_is_written_when_it_is_asked_for() -> None:
    model, x = Block().eval(), torch.randn(1, 3, 5, 5)
    eager = record(model, x)
    for ask in (
        lambda gm: gm(x),
        lambda gm: gm.forward(x),
        lambda gm: copy.deepcopy(gm)(x),
        lambda gm: _reloaded(gm)(x),
    ):
        lazy = recorded(model, x, compiled=False)
        assert "forward" not in vars(type(lazy))
        assert torch.equal(ask(lazy), model(x))
        assert lazy.code == eager.code
        assert inspect.signature(lazy.forward) == inspect.signature(eager.forward)
    assert recorded(model, x, compiled=False).code == eager.code


def _reloaded(gm: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def test_a_second_tree_is_freed_with_its_last_reference() -> None:
    """A cycle would keep the weights that it shares alive until Python looks for cycles."""
    tree = clone_modules(record(Block(), torch.randn(1, 3, 5, 5)))
    parts = [weakref.ref(module) for module in tree.modules()]
    gc.disable()
    try:
        del tree
        assert all(part() is None for part in parts)
    finally:
        gc.enable()


def test_training_flags_are_the_models_own() -> None:
    model = Block()
    model.norm.eval()
    gm = record(model, torch.randn(1, 3, 5, 5))
    assert gm.training
    assert gm.conv.training
    assert not gm.norm.training


@pytest.mark.parametrize("duplicate", [copy.deepcopy, clone_structure])
def test_copies_keep_everything(duplicate: Callable[[Any], RecordedModule]) -> None:
    model = Block().eval()
    model.head = nn.Conv2d(3, 4, 3)
    model.head.weight = model.conv.weight
    x = torch.randn(2, 3, 5, 5)
    gm = record(model, x)
    again = duplicate(gm)
    assert isinstance(again, RecordedModule)
    assert list(again.state_dict()) == list(model.state_dict())
    assert again.head.weight is again.conv.weight
    assert (again.conv.weight is gm.conv.weight) == (duplicate is clone_structure)
    assert torch.equal(again(x), model(x))
    again.graph.lint()
    assert [node.meta for node in again.graph.nodes] == [node.meta for node in gm.graph.nodes]
    assert again.meta == gm.meta


def test_clone_structure_leaves_the_first_alone() -> None:
    gm = record(Block().eval(), torch.randn(1, 3, 5, 5))
    again = clone_structure(gm)
    again.conv.out_channels = 2
    again.conv.weight = nn.Parameter(torch.randn(2, 3, 3, 3))
    del again.norm
    assert gm.conv.out_channels == 4
    assert gm.conv.weight.shape[0] == 4
    gm(torch.randn(1, 3, 5, 5))


def test_state_dict_round_trip() -> None:
    gm = record(Block(), torch.randn(1, 3, 5, 5))
    file = io.BytesIO()
    torch.save(gm.state_dict(), file)
    file.seek(0)
    Block().load_state_dict(torch.load(file))


def test_hooks_of_leaves_run() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(3, 2)
    gm = record(model, x)
    assert _targets(gm) == ["input", "0", "output"]
    assert torch.equal(gm(x), model(x))


def test_record_again() -> None:
    model = Dropping().eval()
    x = torch.randn(2, 4)
    first = record(model, x)
    gm = record(first, x)
    assert list(gm.state_dict()) == list(model.state_dict())
    sources = [[node.meta["source"] for node in each.graph.nodes if node.op == "call_function"] for each in (first, gm)]
    assert sources[0] == sources[1]
    assert torch.equal(gm(x), model(x))
    gm.train()
    assert (gm(torch.ones(1000, 4)) == 0).any()


def test_every_node_says_where_it_is_from() -> None:
    gm = record(Block(), torch.randn(1, 3, 5, 5))
    conv = next(node for node in gm.graph.nodes if node.target == "conv")
    line = Block.forward.__code__.co_firstlineno + 1
    assert conv.meta["source"].endswith(f"test_faithful.py:{line} in forward")
    assert conv.meta["module"] == "conv"
    assert conv.meta["shape"] == (1, 4, 3, 3)
    assert all({"source", "module", "shape"} <= node.meta.keys() for node in gm.graph.nodes)


def test_containers_of_torch_stand_in_for_user_code() -> None:
    gm = record(nn.Sequential(nn.Linear(2, 2)), torch.randn(1, 2))
    for node in gm.graph.nodes:
        assert node.meta["source"].startswith("torch/nn/modules/container.py:")


# --- train and eval -------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=self.training)


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1) > 0.5)


class Nested(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("model", [Dropping(), Nested(Dropping()), Nested(DropPath()), Nested(Nested(nn.Dropout()))])
def test_dropout_follows_train_and_eval(model: nn.Module) -> None:
    gm = record(model, torch.randn(2, 4))
    x = torch.ones(100, 4)
    assert (gm.train()(x) == 0).any()
    assert (gm.eval()(x) == 1).all()
    assert (copy.deepcopy(gm).train()(x) == 0).any()
    assert (fx.Interpreter(clone_structure(gm).train()).run(x) == 0).any()


def test_attention_dropout_comes_back_in_train_mode() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.9, batch_first=True)
    x = torch.randn(2, 5, 8)
    gm = record(model, x)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(gm(x), expected)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_attention_weights_comes_back_in_train_mode(need_weights: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = nn.MultiheadAttention(8, 2, dropout=0.9, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.at(x, x, x, need_weights=need_weights)[0]

    model, x = Model(), torch.randn(2, 5, 8)
    gm = record(model, x)
    for mode in (True, False):
        model.train(mode)
        gm.train(mode)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.allclose(gm(x), expected, atol=1e-6)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


class Branches(nn.Module):
    """Asks its own flag and those of parts for the numbers of calls; ``structure``: for what is called as well."""

    def __init__(self, structure: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.rate, self.structure = Part(), Part(), 0.5, structure

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * (2 if self.training else 1)
        y = F.dropout(y, self.rate if self.a.training else 0.0)
        y = torch.stack([y, self.b(y)], dim=-1 if self.b.training else 0).sum(-1 if self.b.training else 0)
        return y.relu() if self.structure and self.training else y


def test_literals_follow_the_flag_that_chose_them() -> None:
    model, x = Branches(), torch.randn(3, 4)
    gm = record(model, x)
    assert gm.meta["notes"] == []
    again = pickle.loads(pickle.dumps(copy.deepcopy(gm)))
    for mode in itertools.product((False, True), repeat=3):
        for each in (model, gm, again):
            each.train(mode[0])
            each.a.train(mode[1])
            each.b.train(mode[2])
        torch.manual_seed(0)
        expected = model(x)
        for graph in (gm, again):
            torch.manual_seed(0)
            assert torch.equal(graph(x), expected), mode


def test_a_flag_that_is_asked_too_early_is_not_guessed() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Part(), Part()

        def forward(self, x: Tensor) -> Tensor:
            first, second = (0.5 if part.training else 0.0 for part in (self.a, self.b))
            return self.b(F.dropout(self.a(F.dropout(x, first)), second)) * (2 if self.training else 1)

    (note, *_) = record(Early(), torch.randn(1, 4)).meta["notes"]
    assert note.endswith("a branch on self.training was recorded as it goes in eval mode")


FLAGS = {
    "int": lambda flag: 1 + int(flag),
    "sum": lambda flag: 1.5 + flag,
    "lookup": lambda flag: {True: 2.0, False: 1.0}[flag],
    "equal": lambda flag: 2.0 if flag == True else 1.0,  # noqa: E712
    "place": lambda flag: [1.0, 2.0][flag],
    "order": lambda flag: 2.0 if flag > 0 else 1.0,
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_that_is_computed_with_is_followed(name: str) -> None:
    class Computes(Part):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * FLAGS[name](self.training)  # type: ignore[no-any-return]

    model, x = Computes(), torch.randn(3, 4)
    graph = record(model, x)
    for mode in (True, False):
        assert torch.equal(graph.train(mode)(x), model.train(mode)(x))


def test_a_flag_that_is_asked_only_where_another_says_yes_is_noted() -> None:
    class Inner(Part):
        def forward(self, x: Tensor, other: bool) -> Tensor:
            return self.linear(x) * (2.0 if self.training and other else 1.0)  # type: ignore[no-any-return]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, self.training)  # type: ignore[no-any-return]

    (note,) = record(Outer(), torch.randn(1, 4)).meta["notes"]
    assert note.endswith("a branch on self.training was recorded as it goes in eval mode")


def test_a_layer_that_chance_leaves_out_in_training_is_noted() -> None:
    """The run in which modules train may well have kept it."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Part(), Part()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if not (self.training and torch.rand([]) < 1e-6):
                    x = layer(x)
            return x

    (note,) = record(Dropped(), torch.randn(1, 4)).meta["notes"]
    assert note.endswith("a value read from a tensor is kept as a constant, where self.training is true")


def test_a_hook_that_makes_weights_otherwise_in_train_mode_is_told() -> None:
    """The hook of spectral_norm takes a step of its power iteration then; a graph of eval mode never does."""
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    (note,) = record(net, torch.randn(3, 4)).meta["notes"]
    assert note.endswith("a branch on self.training was recorded as it goes in eval mode")
    parametrized = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    graph = record(parametrized, torch.randn(3, 4))
    assert not graph.meta["notes"]
    before = graph.get_buffer("0.parametrizations.weight.0._u").clone()
    graph.train()(torch.randn(3, 4))
    assert not torch.equal(graph.get_buffer("0.parametrizations.weight.0._u"), before)


def test_branch_on_training_is_noted() -> None:
    notes = record(Branches(structure=True), torch.randn(1, 4)).meta["notes"]
    assert notes
    assert all(
        note.endswith("in forward: a branch on self.training was recorded as it goes in eval mode") for note in notes
    )


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        with torch.no_grad():
            z = self.two(y) * 2
            y.mul_(3)
        return self.two(x) * z + y.detach() + y


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).detach() * self.one(x) + self.one.weight.data.sum()


@pytest.mark.parametrize("make", [NoGrad, Detached])
def test_gradients_are_those_of_the_original(make: Callable[[], nn.Module]) -> None:
    model = make()
    x = torch.randn(3, 4)
    gm = record(model, x)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
    got = torch.autograd.grad(gm(x).sum(), list(gm.parameters()), allow_unused=True)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 100


_bound_early = _Doubled.apply


@pytest.mark.parametrize("apply", ["bound late", "bound early"])
def test_custom_backward_survives(apply: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _Doubled.apply(x) if apply == "bound late" else _bound_early(x)

    gm = record(Model(), torch.randn(2))
    x = torch.randn(2, requires_grad=True)
    gm(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2,), 100.0))
    ops = [node.op for node in gm.graph.nodes if node.target is not fits]
    assert ops == ["placeholder", "call_function", "output"], "a call adds nothing"


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: nn.Module, found: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        found.append(x * 2 if ctx.needs_input_grad[0] else x * 3)
        return layers(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None


class _ThroughInTwoSteps(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layers: nn.Module, found: list[Tensor]) -> Tensor:
        found.append(x * 3)
        return layers(x)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise AssertionError("nothing goes back")


@pytest.mark.parametrize("function", [_Through, _ThroughInTwoSteps])
def test_modules_given_to_an_autograd_function_belong_to_the_graph(function: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))])

        def forward(self, x: Tensor) -> Tensor:
            found: list[Tensor] = []
            y = function.apply(x, self.layers[0], found)
            return y + found[0]  # type: ignore[no-any-return]

    model, x = Model(), torch.randn(2, 4)
    gm = record(model, x)
    assert [node.target for node in gm.graph.nodes if node.op == "call_module"] == [
        "layers.0.0",
        "layers.0.1",
        "layers.0.2",
    ]
    other = torch.randn(3, 4)
    assert torch.equal(gm(other), model.layers[0](other) + other * 3)
    assert [note.partition(": ")[2] for note in gm.meta["notes"]] == [
        f"{function.__name__} runs modules, so its own backward is not kept"
    ]


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, *args: Tensor) -> Any:
        ctx.run, ctx.args = run, args
        with torch.no_grad():
            return run(args[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *parameters = ctx.args
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        return None, *torch.autograd.grad(y, (x, *parameters), grad)


@pytest.mark.parametrize("way", ["method", "closure", "partial", "default", "in a list"])
def test_checkpointing_of_ones_own_is_looked_through_and_gradients_are_those_of_the_model(way: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)

        def inner(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())  # type: ignore[no-any-return]

        def forward(self, x: Tensor) -> Tensor:
            ways: dict[str, Any] = {
                "method": self.inner,
                "closure": lambda x: self.inner(x + 0),
                "partial": partial(Model.inner, self),
                "default": lambda x, up=self.up, down=self.down: down(up(x).relu()),
                "in a list": lambda x, layers=[self.up, self.down]: layers[1](layers[0](x).relu()),
            }
            parameters = [*self.up.parameters(), *self.down.parameters()]
            return _Checkpoint.apply(ways[way], self.stem(x), *parameters)  # type: ignore[no-any-return]

    model, x = Model(), torch.randn(2, 4)
    gm = record(model, x)
    assert {node.target for node in gm.graph.nodes if node.op == "call_module"} >= {"stem", "up", "down"}
    for module in (model, gm):
        module(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(gm.get_parameter(name).grad, parameter.grad), name  # type: ignore[arg-type]


# --- the call -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: dict[str, Tensor]
    extra: int | None = None


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Structured(nn.Module):
    def forward(self, batch: dict[str, Any], scale: float = 2.0, *, bias: Tensor | None = None) -> Output:
        x = batch["x"] * scale + batch["more"][0]
        if bias is not None:
            x = x + bias
        return Output(x, {"pair": Pair(x, batch["x"]), "ordered": OrderedDict(a=x)}, extra=len(batch))  # type: ignore[dict-item]


def test_nested_inputs_and_outputs() -> None:
    model = Structured()

    def batch(size: int) -> dict[str, Any]:
        return {"x": torch.randn(size, 3), "more": [torch.randn(size, 3)]}

    gm = record(model, batch(2), {"bias": torch.ones(3)})
    for size in (2, 5):
        x = batch(size)
        expected, got = model(x, bias=torch.ones(3)), gm(x, bias=torch.ones(3))
        assert isinstance(got, Output)
        assert torch.equal(got.logits, expected.logits)
        assert isinstance(got.hidden["pair"], Pair)
        assert isinstance(got.hidden["ordered"], OrderedDict)
        assert torch.equal(got.hidden["pair"].second, x["x"])
        assert got.extra == 2


@dataclasses.dataclass
class Named(OrderedDict[str, Any]):
    """A dataclass that is a dict of its fields that were given, as libraries return."""

    last: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is not None:
            self[name] = value


def test_items_of_an_output_stay_in_order() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Named:
            out = Named(hidden=x)
            out.last = x * 2
            return out

    x = torch.ones(3)
    (gm := record(Model(), torch.ones(2)))(x)
    for module in (gm, copy.deepcopy(gm), _reloaded(gm)):
        got = module(x)
        assert isinstance(got, Named)
        assert [(key, value.tolist()) for key, value in got.items()] == [("hidden", [1.0] * 3), ("last", [2.0] * 3)]
        assert got.last is got["last"]


def test_defaults_and_signature() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, times: int = 3, mask: Tensor | None = None, *rest: Tensor, name: str = "a") -> Any:
            return x * times if mask is None else x

    gm = record(Model(), torch.ones(2))
    assert torch.equal(gm(torch.ones(4)), torch.full((4,), 3.0))
    assert torch.equal(gm(torch.ones(4), 3, None, name="a"), torch.full((4,), 3.0))


def test_variadic() -> None:
    class Model(nn.Module):
        def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
            return sum(xs, more["y"])  # type: ignore[arg-type]

    model = Model()
    x = (torch.randn(2), torch.randn(2))
    gm = record(model, x, {"y": torch.ones(2)})
    assert torch.equal(gm(*x, y=torch.ones(2)), model(*x, y=torch.ones(2)))


def test_the_same_tensor_as_two_inputs() -> None:
    class Model(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    x = torch.ones(2)
    assert torch.equal(record(Model(), (x, x))(x, x + 1), torch.full((2,), -3.0))


def test_written_input_is_written_again_and_the_example_is_not() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> int:
            x[0] = 7.0
            return 1

    example = torch.zeros(2)
    gm = record(Model(), example)
    assert example.tolist() == [0.0, 0.0]
    x = torch.zeros(2)
    assert gm(x) == 1
    assert x.tolist() == [7.0, 0.0]


# --- constants ------------------------------------------------------------------------------------------------------


def test_values_read_from_tensors_stay_values() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item() if x.mean() > -100 else x

    model = Model()
    gm = record(model, torch.ones(2))
    x = torch.randn(5)
    assert torch.equal(gm(x), model(x))
    line = "forward goes another way for these inputs than in the recorded run, where False == True would have held"
    with pytest.raises(GuardError, match=rf"test_faithful.py:\d+ in forward: {line}"):
        gm(torch.full((2,), -101.0))


def test_values_read_from_parameters_are_noted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.item()

    (note,) = record(Model(), torch.ones(2)).meta["notes"]
    assert note.endswith("in forward: a value read from a tensor is kept as a constant")


def test_unknown_tensors_become_buffers() -> None:
    table = torch.arange(3.0)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + table

    gm = record(Model(), torch.ones(3))
    assert torch.equal(gm(torch.ones(3)), table + 1)
    assert gm.state_dict() == {}
    assert gm._constant_0 is table
    assert "is kept as the buffer _constant_0" in gm.meta["notes"][0]


def test_cached_parameters_lead_back_to_the_parameters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(2))
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if "b" not in self.cache:
                self.cache["b"] = self.bias * 2
            return x + self.cache["b"]

    model = Model().eval()
    model(torch.ones(2))
    kept = model.cache["b"]
    gm = record(model, torch.ones(2))
    assert model.cache["b"] is kept
    assert "bias" in _targets(gm)
    assert not gm.meta["notes"]


def test_a_dict_of_constants_is_no_cache() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = {"a": torch.ones(2)}

        def forward(self, x: Tensor) -> Tensor:
            return x + self.tables["a"] + self.tables.get("b", torch.ones(1))

    model = Model()
    assert torch.equal(record(model, torch.ones(2))(torch.ones(2)), model(torch.ones(2)))


# --- nothing is left behind -----------------------------------------------------------------------------------------


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(2))
        self.history: list[Tensor] = []
        self.plain = torch.zeros(2)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.mean = self.mean + x.mean(0)
        self.last = x
        self.history.append(x)
        self.plain.add_(1)
        torch.rand(3)
        random.random()
        if self.fail:
            raise ValueError("no such thing")
        return self.linear(x) + self.steps + self.mean


@pytest.mark.parametrize("fail", [False, True])
def test_model_is_left_as_it_was(fail: bool) -> None:
    model = Writing()
    model.fail = fail
    model.linear.bias.requires_grad_(False)
    model.linear.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = dict(model.__dict__)
    hooks = (nn.Module.__call__, torch.autograd.Function.__dict__["apply"], torch.backends.mha.get_fastpath_enabled())
    torch.manual_seed(0)
    random.seed(0)
    expected = (torch.rand(1), random.random())
    torch.manual_seed(0)
    random.seed(0)
    if fail:
        with pytest.raises(ExampleInputsError):
            record(model, torch.randn(1, 2, generator=torch.Generator()))
    else:
        record(model, torch.ones(1, 2))
    assert (torch.rand(1), random.random()) == expected
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.__dict__ == attributes
    assert model.history == []
    assert model.plain.tolist() == [0.0, 0.0]
    assert model.training
    assert not model.linear.training
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert hooks == (
        nn.Module.__call__,
        torch.autograd.Function.__dict__["apply"],
        torch.backends.mha.get_fastpath_enabled(),
    )
    assert "int" not in vars(sys.modules[__name__])


def test_buffers_are_written_by_the_graph() -> None:
    model = Writing().eval()
    twin = copy.deepcopy(model)
    gm = record(model, torch.ones(1, 2))
    for _ in range(2):
        x = torch.randn(3, 2)
        with torch.no_grad():
            assert torch.equal(gm(x), twin(x))
    assert torch.equal(gm.steps, twin.steps)
    assert torch.equal(gm.mean, twin.mean)


class Placed(nn.Module):
    """Keeps its buffer where the input is, as layers of speechbrain do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mask", torch.tensor([0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.mask = self.mask.to(x.device)
        return cast(Tensor, self.linear(x) * self.mask)


def test_a_buffer_that_is_put_where_it_is_lets_gradients_through() -> None:
    """It was written over itself, and backward raised: modified by an inplace operation."""
    model, x = Placed().eval(), torch.randn(3, 2)
    gm = record(model, x)
    gm(x).sum().backward()
    found = model.linear.weight.grad
    model.linear.weight.grad = None
    model(x).sum().backward()
    assert found is not None
    assert torch.equal(found, cast(Tensor, model.linear.weight.grad))


# --- errors ---------------------------------------------------------------------------------------------------------


def test_failing_forward_names_the_line_and_the_shapes() -> None:
    with pytest.raises(ExampleInputsError) as caught:
        record(nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 4))
    assert "mat1 and mat2 shapes cannot be multiplied (1x4 and 3x2)" in str(caught.value)
    assert "(Tensor[1, 4])" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_missing_argument() -> None:
    with pytest.raises(ExampleInputsError, match=r"missing a required argument: 'batch'.*Given: \(\)"):
        record(Structured(), ())


def test_wrong_type_of_example_inputs() -> None:
    with pytest.raises(ExampleInputsError, match="must be a tensor or a tuple"):
        record(Structured(), 3)


def test_name_that_graph_modules_use() -> None:
    model = nn.Sequential()
    model.add_module("graph", nn.Linear(2, 2))
    with pytest.raises(RecordError, match="attribute named 'graph'"):
        record(model, torch.ones(1, 2))


def test_vmap_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(torch.sin)(x)

    with pytest.raises(RecordError, match=r"in forward: code inside torch.vmap, .* cannot be recorded"):
        record(Model(), torch.ones(2))


def test_uninitialised_parameters_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules say that they are new
        model = nn.LazyLinear(3)
    with pytest.raises(RecordError, match="weight of LazyLinear is not initialised yet"):
        record(model, torch.ones(1, 2))


def test_unrolled_loops_are_noted() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return sum(x[i] for i in range(x.shape[0]))

    (note,) = record(Model(), torch.ones(2, 3)).meta["notes"]
    assert "a loop over range(2,), which depends on the inputs, is unrolled" in note


def test_direct_use_of_the_flag_by_a_builtin_is_noted() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.dropout(x, 0.5, self.training)

    gm = record(Model(), torch.ones(2))
    assert gm.meta["notes"] == ["Model: functional dropout is recorded as it goes in eval mode"]


def test_data_that_is_assigned_stands_for_the_parameter_for_this_call() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data * 2
            return x * self.weight

    model = Model()
    gm = record(model, torch.ones(2))
    assert model.weight.tolist() == [1.0, 1.0]
    assert gm(torch.ones(2)).tolist() == [2.0, 2.0]
    assert gm(torch.ones(2)).tolist() == [2.0, 2.0]
    assert model.weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("put", [lambda layer, x: layer.to(x.device), lambda layer, _: layer.float()])
def test_a_layer_that_forward_puts_where_it_is_keeps_its_gradients(put: Callable[..., nn.Module]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return put(self.linear, x)(x)

    gm = record(Model(), torch.ones(2, 4))
    gm(torch.ones(2, 4)).sum().backward()
    assert gm.linear.weight.grad is not None
    assert gm.linear.bias.grad is not None
    assert [node.op for node in gm.graph.nodes if node.op in ("get_attr", "call_module")] == ["call_module"]
    assert gm.meta["notes"] == []


def test_a_norm_that_forward_puts_where_it_is_follows_the_mode() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.norm.to(x.device)
            return self.norm(x)

    model, x = Model().eval(), torch.randn(8, 4) + 3
    gm = record(model, x)
    assert torch.equal(gm.train()(x), model.train()(x))
    assert torch.equal(gm.norm.running_mean, model.norm.running_mean)
    assert torch.equal(gm.eval()(x), model.eval()(x))


def test_a_parameter_whose_data_are_computed_anew_is_told_to_get_no_gradient() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data / self.weight.data.norm()
            return x * self.weight

    (note,) = record(Model(), torch.ones(2)).meta["notes"]
    assert "no gradient reaches a parameter whose data forward computes anew" in note


def test_sizes_of_buffers_and_devices_follow_the_module() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            ramp = torch.arange(x.shape[1], device=x.device) + torch.zeros(4, device=self.linear.weight.device)
            return self.linear(x) + ramp

    gm = record(Model(), torch.ones(1, 4)).to("meta")
    assert gm(torch.ones(3, 4, device="meta")).shape == (3, 4)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Block().eval()
        gm = record(model, torch.randn(1, 3, 5, 5))
        assert gm(torch.randn(7, 3, 5, 5)).shape == (7, 4, 3, 3)


# --- what the recorder looks up by itself ---------------------------------------------------------------------------


class Folding(nn.Module):
    """Keeps its weight times two until it is put in another mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))
        self.kept: Tensor | None = None

    def train(self, mode: bool = True) -> Folding:
        self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.weight * 2
        return x * self.kept


@pytest.mark.parametrize("inside", [False, True])
def test_a_mode_that_does_more_is_called(inside: bool) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(4, 4), Folding()) if inside else Folding()
    model.eval()
    x = torch.rand(2, 4)
    expected = model(x)  # and what it keeps is made
    gm = record(model, x)
    assert "weight" in {target.rpartition(".")[2] for target in map(str, _targets(gm))}
    assert not any("_constant" in str(target) for target in _targets(gm))
    assert torch.equal(gm(x), expected)


def test_eval_mode_for_a_while_calls_what_a_class_overrides() -> None:
    folding = Folding()
    folding(torch.rand(4))
    assert folding.kept is not None
    with evaluated(nn.Sequential(folding, nn.ReLU())):
        assert folding.kept is None
        assert not folding.training
    assert folding.training


def test_parts_have_the_names_that_torch_gives() -> None:
    shared, tied = nn.Linear(2, 2), nn.Linear(2, 2)
    tied.weight = shared.weight
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(OrderedDict(b=nn.Sequential(shared, norm), a=shared, c=tied, d=norm))
    parts = Parts.of(model)
    assert list(parts.modules.items()) == list(model.named_modules())
    for own, torchs in ((parts.parameters, model.named_parameters()), (parts.buffers, model.named_buffers())):
        wanted = dict(torchs)
        assert list(own) == list(wanted)
        assert all(own[name] is tensor for name, tensor in wanted.items())
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    named = named_tensors(model)
    assert list(named) == [name for name, _ in every]
    assert all(named[name] is tensor for name, tensor in every)
