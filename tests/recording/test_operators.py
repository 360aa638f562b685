"""Python's operators on tensors are recorded as they are written."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import randomise
from torch import Tensor, nn

import fxprune
from fxprune.recording.calls import SLOTS

X, Y = torch.rand(3, 3) + 1, torch.rand(3, 3) + 1
M, N = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])

# What is written, its target, and its operands: names of inputs, or numbers.
FLOATS = [
    ("x + y", operator.add, ["x", "y"]),
    ("1 + x", operator.add, [1, "x"]),
    ("x - 1", operator.sub, ["x", 1]),
    ("1 - x", operator.sub, [1, "x"]),
    ("x * y", operator.mul, ["x", "y"]),
    ("2.5 * x", operator.mul, [2.5, "x"]),
    ("x / y", operator.truediv, ["x", "y"]),
    ("2 / x", operator.truediv, [2, "x"]),
    ("x // y", operator.floordiv, ["x", "y"]),
    ("7 // x", operator.floordiv, [7, "x"]),
    ("x % y", operator.mod, ["x", "y"]),
    ("7 % x", operator.mod, [7, "x"]),
    ("x ** 2", operator.pow, ["x", 2]),
    ("2 ** x", operator.pow, [2, "x"]),
    ("x @ y", operator.matmul, ["x", "y"]),
    ("-x", operator.neg, ["x"]),
    ("+x", operator.pos, ["x"]),
    ("abs(x)", operator.abs, ["x"]),
    ("x == y", operator.eq, ["x", "y"]),
    ("x != y", operator.ne, ["x", "y"]),
    ("x < y", operator.lt, ["x", "y"]),
    ("x <= 1", operator.le, ["x", 1]),
    ("1 < x", operator.gt, ["x", 1]),  # Python asks the tensor which is greater
    ("x >= y", operator.ge, ["x", "y"]),
    ("sum([x])", operator.add, [0, "x"]),
    ("operator.add(x, y)", operator.add, ["x", "y"]),
    ("x.add(y)", "add", ["x", "y"]),
    ("x.mul(2)", "mul", ["x", 2]),
    ("torch.add(x, y)", torch.add, ["x", "y"]),
    ("torch.mul(x, 2)", torch.mul, ["x", 2]),
]
INTEGERS = [
    ("x & y", operator.and_, ["x", "y"]),
    ("1 | x", operator.or_, [1, "x"]),
    ("x ^ 3", operator.xor, ["x", 3]),
    ("~x", operator.invert, ["x"]),
    ("x << 1", operator.lshift, ["x", 1]),
    ("1 << x", operator.lshift, [1, "x"]),
    ("x >> y", operator.rshift, ["x", "y"]),
]
IN_PLACE = {
    "+=": operator.iadd, "-=": operator.isub, "*=": operator.imul, "/=": operator.itruediv, "//=": operator.ifloordiv,
    "%=": operator.imod, "**=": operator.ipow,
}  # fmt: skip
ON_BITS = {
    "&=": operator.iand, "|=": operator.ior, "^=": operator.ixor, "<<=": operator.ilshift, ">>=": operator.irshift,
}  # fmt: skip


class Written(nn.Module):
    """Runs one line of code on ``x`` and ``y``, which leaves its result in ``out``."""

    def __init__(self, line: str) -> None:
        super().__init__()
        self.line = line

    def forward(self, x: Tensor, y: Tensor) -> Any:
        names = {"x": x, "y": y, "operator": operator, "torch": torch}
        exec(self.line, names)
        return names["out"]


def calls(module: Any) -> list[tuple[Any, list[Any]]]:
    nodes = [n for n in module.graph.nodes if n.op in ("call_method", "call_function")]
    return [(n.target, [getattr(a, "name", a) for a in n.args]) for n in nodes if n.target is not fits(module)]


def fits(module: Any) -> Any:
    return next((n.target for n in module.graph.nodes if getattr(n.target, "__name__", "") == "fits"), None)


@pytest.mark.parametrize(
    ("text", "target", "operands", "x", "y"), [(*f, X, Y) for f in FLOATS] + [(*i, M, N) for i in INTEGERS]
)
def test_an_operator_is_written_as_the_user_wrote_it(
    text: str, target: Any, operands: list[Any], x: Tensor, y: Tensor
) -> None:
    model = Written(f"out = {text}")
    recorded = fxprune.record(model, (x, y))
    assert calls(recorded) == [(target, operands)]
    assert torch.equal(recorded(x + 1, y), model(x + 1, y))
    assert calls(fxprune.record(recorded, (x, y))) == [(target, operands)]


@pytest.mark.parametrize(
    ("sign", "target", "x", "y"), [(*f, X, Y) for f in IN_PLACE.items()] + [(*i, M, N) for i in ON_BITS.items()]
)
def test_an_operator_in_place_writes_where_the_user_wrote(
    sign: str, target: Callable[..., Any], x: Tensor, y: Tensor
) -> None:
    model = Written(f"z = x.clone()\nview = z[0]\nz {sign} y\nout = z, view")
    recorded = fxprune.record(model, (x, y))
    node = next(n for n in recorded.graph.nodes if n.target is target)
    assert [a.name for a in node.args] == ["clone", "y"]
    assert node.meta["mutates"]
    for got, right in zip(recorded(x, y), model(x, y), strict=True):
        assert torch.equal(got, right)


def test_a_size_is_an_operand_on_either_side() -> None:
    recorded = fxprune.record(Written("out = x.shape[0] * (x + x.shape[1])"), (X, Y))
    assert calls(recorded)[-2:] == [(operator.add, ["x", "size"]), (operator.mul, ["size_1", "add"])]
    assert torch.equal(recorded(X[:2], Y), 2 * (X[:2] + 3))


def test_what_the_operand_does_itself_is_recorded() -> None:
    class Shift:
        """Adds a parameter of the model's."""

        def __init__(self, by: Tensor) -> None:
            self.by = by

        def __radd__(self, x: Tensor) -> Tensor:
            return x + self.by

        def __eq__(self, other: object) -> Any:
            return other.relu() if isinstance(other, Tensor) else NotImplemented

        __hash__ = None  # type: ignore[assignment]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            shift = Shift(self.by)
            return (x + shift) * (x == shift)

    net = Net()
    recorded = fxprune.record(net, X)
    assert calls(recorded) == [(operator.add, ["x", "by"]), ("relu", ["x"]), (operator.mul, ["add", "relu"])]
    with torch.no_grad():
        net.by.fill_(2.0)
    assert torch.equal(recorded(-X), net(-X))


@pytest.mark.parametrize("wrong", ["x + 'a'", "x @ None", "{} - x", "~x"])
def test_what_no_operand_can_is_the_models_error(wrong: str) -> None:
    with pytest.raises(fxprune.errors.ExampleInputsError, match="TypeError"):
        fxprune.record(Written(f"out = {wrong}"), (X, Y))


def test_tensors_are_as_before_afterwards_and_elsewhere() -> None:
    before = {slot: getattr(Tensor, slot) for slot in SLOTS}
    own = {slot for slot in SLOTS if slot in vars(Tensor)}
    elsewhere: list[Tensor] = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: elsewhere.append(1 + Y))
            thread.start()
            thread.join()
            return x + 1

    assert calls(fxprune.record(Net(), X)) == [(operator.add, ["x", 1])]
    assert torch.equal(elsewhere[0], Y + 1)
    assert {slot: getattr(Tensor, slot) for slot in SLOTS} == before
    assert {slot for slot in SLOTS if slot in vars(Tensor)} == own


@pytest.mark.filterwarnings("ignore")  # of torch's, which has other quantisers by now
def test_the_sums_of_a_pruned_network_are_quantised() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            x = x + self.b(x)
            x += self.b(x)
            return self.head(x.mean((2, 3)))

    x = torch.randn(2, 3, 8, 8)
    small = fxprune.prune(randomise(Net()).eval(), x, channels=0.5, round_to=1, progress=False).eval()
    expected = small(x)
    prepared = prepare_fx(small, get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    quantised = convert_fx(prepared)
    assert [n.target for n in quantised.graph.nodes].count(torch.ops.quantized.add) == 2
    assert float((quantised(x) - expected).abs().max()) < 0.1 * float(expected.abs().max())
