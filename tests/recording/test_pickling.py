"""Graphs through pickle and torch.save: the same graph and the same answers, here and in another process."""

from __future__ import annotations

import io
import operator
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import GuardError
from fxprune.recording import RecordedModule, record
from fxprune.recording.boundary import Remade
from fxprune.recording.calls import Constant
from fxprune.recording.pickling import graph_of, lines_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 100


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Output:
    y: Tensor
    more: dict[str, Any]


class Holder:
    def __init__(self, y: Tensor) -> None:
        self.y, self.name = y, "holder"


class Setting:
    """A Python object that a graph hands on."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, setting: Setting) -> Tensor:
        return x * setting.scale


class Net(nn.Module):
    def __init__(self, head: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.head = head
        self.table = torch.arange(8.0)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        return self.head(self, x, self.a(x))


def _set_items(net: Any, x: Tensor, h: Tensor) -> Tensor:
    h = h.relu()
    h[:, :1] = 0
    h[..., 2:4] += 1
    return net.b(h)


def _fresh(net: Any, x: Tensor, h: Tensor) -> Tensor:
    return net.b(h + torch.zeros(h.shape[0], 1) + torch.arange(len(x))[:, None] + x.new_ones(1)) * len(x)


def _ops(net: Any, x: Tensor, h: Tensor) -> Tensor:
    h = torch.ops.aten.relu.default(h) + torch.ops.aten.add.Scalar(h, 2) + torch.ops.aten.mul(h, 2)
    return torch.ops.aten.sum.dim_IntList(h, [1], True)


def _functions(net: Any, x: Tensor, h: Tensor) -> Tensor:
    return Doubled.apply(h) + Doubled.apply(h * 2)


def _settings(net: Any, x: Tensor, h: Tensor) -> Tensor:
    return Scaled.apply(h, Setting(3.0))


def _constants(net: Any, x: Tensor, h: Tensor) -> Tensor:
    return (h + net.table) * torch.tensor([2.0]) + h.to(torch.float64).mean()


def _guards(net: Any, x: Tensor, h: Tensor) -> Tensor:
    return net.b(h) * (3 if x.shape[0] < 4 else 4) * (2 if (x < 100).all() else 1)


def _named(net: Any, x: Tensor, h: Tensor) -> Any:
    return Pair(h, net.b(h)), x.max(0)


def _data(net: Any, x: Tensor, h: Tensor) -> Any:
    return Output(h, {"shape": x.shape, "list": [h * 2, (h, None)]})


def _object(net: Any, x: Tensor, h: Tensor) -> Any:
    return Holder(h)


def _slices(net: Any, x: Tensor, h: Tensor) -> Tensor:
    n = x.shape[0]
    return F.pad(h[: n // 2, None, ..., 1:-1:2], (1, n)) + h[-1, n:, None].sum()


def _buffers(net: Any, x: Tensor, h: Tensor) -> Tensor:
    net.steps += 1
    return h + net.steps


def _contexts(net: Any, x: Tensor, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.b(h)
    with torch.no_grad():
        z = net.b(h)
    return F.dropout(y.float() + z, 0.5, training=net.training)


def _values(net: Any, x: Tensor, h: Tensor) -> Tensor:
    return h * x.sum().item() + int(h.argmax()) + max(x.shape[0], 3) ** 0.5


def _formats(net: Any, x: Tensor, h: Tensor) -> Tensor:
    y = h[:, :, None, None].contiguous(memory_format=torch.channels_last)
    return y.flatten(1) + torch.zeros_like(h, memory_format=torch.preserve_format, layout=torch.strided)


HEADS = [_set_items, _fresh, _ops, _functions, _settings, _constants, _guards, _named, _data, _object, _slices,
         _buffers, _contexts, _values, _formats]  # fmt: skip


def _pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def _saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (Holder, Output)):
        return [type(value), *_leaves(vars(value))]
    if isinstance(value, dict):
        return [*value, *_leaves([*value.values()])]
    if isinstance(value, (tuple, list)):
        return [type(value), *(leaf for item in value for leaf in _leaves(item))]
    return [value.tolist(), value.dtype] if isinstance(value, Tensor) else [value]


def _described(graph: fx.Graph) -> list[Any]:
    return [(n.op, n.name, str(n.args), str(n.kwargs), n.meta) for n in graph.nodes]


def _targets(graph: fx.Graph) -> list[Any]:
    """Those that hold an object of the user's are others: by their class."""
    return [type(n.target) if isinstance(n.target, (Constant, Remade)) else n.target for n in graph.nodes]


@pytest.mark.parametrize("again", [_pickled, _saved], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__.strip("_"))
def test_the_same_graph_and_the_same_answers(head: Any, again: Callable[[nn.Module], Any]) -> None:
    net = randomise(Net(head)).eval()
    module = record(net, torch.randn(2, 4))
    copied = again(module)
    assert type(copied).__mro__[1] is RecordedModule
    assert type(copied).__name__ == type(module).__name__ == "Net"
    assert copied.code == module.code
    assert _described(copied.graph) == _described(module.graph)
    assert _targets(copied.graph) == _targets(module.graph)
    assert copied.meta == module.meta
    assert list(copied.state_dict()) == list(module.state_dict())
    assert all(a is not b for a, b in zip(copied.parameters(), module.parameters(), strict=True))
    copied.graph.lint()
    x = torch.randn(3, 4)
    for _ in range(2):
        assert _leaves(copied(x)) == _leaves(module(x))
    assert again(copied).code == module.code


def test_guards_and_backward_functions_are_what_they_were() -> None:
    copied = _saved(record(randomise(Net(_guards)).eval(), torch.randn(2, 4)))
    with pytest.raises(GuardError, match=r"test_pickling.py:\d+ in _guards: forward goes another way"):
        copied.forward(torch.randn(4, 4))
    with pytest.raises(GuardError, match=r"test_pickling.py:\d+ in _guards: forward goes another way"):
        copied.forward(torch.full((2, 4), 200.0))
    copied = _pickled(record(Net(_functions).eval(), torch.randn(2, 4)))
    copied.a.weight.requires_grad_(False)
    copied(torch.randn(2, 4)).sum().backward()
    assert copied.a.bias.grad.tolist() == [2 * (100 + 200.0)] * 8


def test_flags_ties_and_modes_survive() -> None:
    net = Net(_contexts)
    net.b = nn.Linear(8, 8)
    net.c = nn.Linear(8, 8)
    net.c.weight = net.b.weight
    net.a.eval()
    copied = _saved(record(net, torch.randn(2, 4)))
    assert copied.c.weight is copied.b.weight
    assert (copied.training, copied.a.training, copied.b.training) == (True, False, True)
    assert (copied(torch.ones(64, 4)) == 0).any()
    assert (copied.eval()(torch.ones(64, 4)) != 0).all()


def test_an_object_of_the_users_goes_along() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.at = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.at(h, h, h)[0]

    module = record(Local().eval(), torch.randn(2, 3, 4))
    x = torch.randn(3, 5, 4)
    assert torch.equal(_pickled(module)(x), module(x)), "its class is local, and not asked for"


@pytest.mark.parametrize("again", [_pickled, _saved], ids=["pickle", "torch.save"])
def test_pruned_networks_and_their_reports(again: Callable[[nn.Module], Any]) -> None:
    net = randomise(Net(_set_items))
    small = fxprune.prune(net, torch.randn(2, 4), channels=0.5, round_to=1, progress=False)
    copied = again(small)
    x = torch.randn(3, 4)
    assert torch.equal(copied(x), small(x))
    assert str(copied.meta["fxprune"]) == str(small.meta["fxprune"])
    assert copied.meta["fxprune"].plan == small.meta["fxprune"].plan
    smaller = fxprune.prune(copied, torch.randn(2, 4), channels=0.5, round_to=1, progress=False)
    assert smaller.a.weight.shape[0] < small.a.weight.shape[0] < 8


def test_a_graph_as_plain_data() -> None:
    graph = record(Net(_ops).eval(), torch.randn(2, 4)).graph
    lines = pickle.loads(pickle.dumps(lines_of(graph)))
    assert not any(isinstance(part, (fx.Node, fx.Graph, torch._ops.OpOverload)) for line in lines for part in line)
    again = graph_of(lines)
    assert [n.target for n in again.nodes] == [n.target for n in graph.nodes]
    assert torch.ops.aten.add.Scalar in [n.target for n in again.nodes]
    assert _described(again) == _described(graph)


def test_structures_of_arguments_survive() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(operator.getitem, (x, (slice(None, x, 2), [x, {"a": (x, None)}], ...)), {})
    graph.output({"y": [made, torch.float16]})
    found = graph_of(pickle.loads(pickle.dumps(lines_of(graph))))
    assert [str(n.args) for n in found.nodes] == [str(n.args) for n in graph.nodes]
    first, getitem, output = found.nodes
    assert getitem.args[1][0].stop is first  # type: ignore[index,union-attr]
    assert getitem.args[1][1][1]["a"][0] is first  # type: ignore[index,union-attr,call-overload]
    assert output.all_input_nodes == [getitem]


def test_another_process_reads_it(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    modules = {head.__name__: record(randomise(Net(head)).eval(), torch.randn(2, 4)) for head in (_set_items, _fresh, _ops, _guards)}  # fmt: skip  # noqa: E501
    torch.save((modules, x), tmp_path / "modules.pt")
    program = (
        "import torch\n"
        f"modules, x = torch.load({str(tmp_path / 'modules.pt')!r}, weights_only=False)\n"
        f"torch.save({{n: m(x) for n, m in modules.items()}}, {str(tmp_path / 'found.pt')!r})\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, timeout=120
    )
    found = torch.load(tmp_path / "found.pt")
    assert {name: torch.allclose(y, modules[name](x)) for name, y in found.items()} == dict.fromkeys(modules, True)
