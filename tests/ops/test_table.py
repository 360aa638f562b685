"""The table of ops is complete: what a stage may ask of an op is answered, or it is said why nothing is to answer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

import fxprune
from fxprune import ops
from fxprune.labels.factors import Factor
from fxprune.labels.propagation import Propagation, set_labels
from fxprune.labels.run import Labelling
from fxprune.ops.refit import Addition, Affine, Contraction, Followed, Statistics
from fxprune.ops.table import KINDS, OPS, Op, load
from fxprune.reconstruction.survey import arguments_of

load("aten")
BUILT_IN = [op for op in OPS.values() if op.name.startswith(("aten::", "python::"))]
NAMES = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
OLDER = {"aten::cholesky"}
"""Ops that the newest PyTorch has no more, and older ones that fxprune runs on do."""

records = pytest.mark.parametrize("op", BUILT_IN, ids=lambda op: op.name)


def overloads(op: Op) -> Iterator[Any]:
    """The ops that the record is of; none of what only Python knows."""
    namespace, _, name = op.name.partition("::")
    packet = getattr(torch.ops.aten, name) if namespace == "aten" and op.name in NAMES else None
    for overload in () if packet is None else packet.overloads():
        yield getattr(packet, overload)


def is_taken_apart(op: Op) -> bool:
    """Is what a graph calls by this name made of other ops, by PyTorch or Python?"""
    key = "CompositeImplicitAutograd"
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f.name(), key) for f in overloads(op))


@records
def test_every_record_is_of_an_op_and_says_what_becomes_of_channels(op: Op) -> None:
    assert op.kind in KINDS
    assert op.name in NAMES | OLDER or op.name.startswith("python::")
    assert op.label is not None or op.reads_values or is_taken_apart(op)


@records
def test_every_op_has_a_counterpart_in_the_oracle_or_needs_none(op: Op) -> None:
    if op.label is None and not op.reads_values:  # what it is made of has
        assert op.mask is None
    else:
        assert callable(op.mask) or op.mask


@records
def test_where_an_argument_may_be_a_size_it_is_repaired_or_it_names_none_that_is_cut(op: Op) -> None:
    if any("SymInt" in str(f._schema).partition("->")[0] for f in overloads(op)):
        assert callable(op.repair) or op.repair


def test_a_third_of_the_ops_has_an_argument_that_may_be_a_size() -> None:
    """So that the test above looks at something."""
    sized = {op.name for op in BUILT_IN for f in overloads(op) if "SymInt" in str(f._schema)}
    assert len(sized) > 90
    assert {"aten::view", "aten::narrow", "aten::native_layer_norm", "aten::split"} <= sized


@records
def test_what_multiplies_is_counted(op: Op) -> None:
    if any(f.overloadpacket in flop_registry for f in overloads(op)) and not is_taken_apart(op):
        assert op.cost is not None
    if op.multiplies:
        arguments = {a.name for f in overloads(op) for a in f._schema.arguments}
        assert arguments.issuperset(op.multiplies)


@records
def test_every_op_says_what_it_is_for_the_refit(op: Op) -> None:
    if op.label is None and not op.reads_values:  # what it is made of says so
        assert op.refit is None
        return
    assert isinstance(op.refit, Contraction | Statistics | Affine | Addition | Followed) or op.refit
    assert op.moves or not isinstance(op.refit, Followed)
    named = {
        Contraction: lambda known: {*known.operands},
        Statistics: lambda known: {known.input, known.mean, known.var, *known.vectors, known.eps},
        Affine: lambda known: {*known.vectors},
        Addition: lambda known: {*known.vectors},
    }.get(type(op.refit), lambda known: set())(op.refit)
    assert not named or any(named <= {a.name for a in f._schema.arguments} for f in overloads(op))


def matrix(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double)


PRODUCTS = {
    "mm": (matrix(5, 4), matrix(4, 3)),
    "bmm": (matrix(2, 5, 4), matrix(2, 4, 3)),
    "mv": (matrix(5, 4), matrix(4)),
    "dot": (matrix(4), matrix(4)),
    "addmm": (matrix(3), matrix(5, 4), matrix(4, 3)),
    "addmv": (matrix(5), matrix(5, 4), matrix(4)),
    "baddbmm": (matrix(1, 1, 3), matrix(2, 5, 4), matrix(2, 4, 3)),
    "linear": (matrix(2, 5, 4), matrix(3, 4), matrix(3)),
    "convolution": (matrix(2, 4, 7, 6), matrix(6, 2, 3, 2), matrix(6), (2, 1), (1, 0), (1, 2), False, (0, 0), 2),
    "_convolution": (matrix(2, 4, 7), matrix(4, 3, 3), None, (2,), (1,), (1,), True, (1,), 2, False, False, True, True),
}
SAME = {"convolution_overrideable": "convolution"}


@pytest.mark.parametrize("op", [op for op in BUILT_IN if isinstance(op.refit, Contraction)], ids=lambda op: op.name)
def test_a_contraction_is_the_product_that_it_is_read_as(op: Op) -> None:
    name = op.name.removeprefix("aten::")
    func, args = getattr(torch.ops.aten, SAME.get(name, name)).default, PRODUCTS[SAME.get(name, name)]
    known: Any = op.refit
    out, arguments = func(*args), arguments_of(func, args, {})
    found = [p for p in (known.read(arguments, out, weight) for weight in known.operands) if p is not None]
    assert len(found) == 2 - ("convolution" in name)
    for product in found:
        rows = torch.arange(product.rows)
        expected = product.inputs(rows) @ product.matrix(product.weight)
        if product.bias is not None and product.vector(product.bias).unique().numel() == product.bias.numel():
            expected = expected + product.vector(product.bias).unsqueeze(1)
            torch.testing.assert_close(product.outputs(out, rows), expected)
        elif product.bias is None:
            torch.testing.assert_close(product.outputs(out, rows), expected)
        assert torch.equal(product.outputs(out, rows[:1]), product.outputs(out, rows)[:, :1])
        assert torch.equal(product.inputs(rows[1:]), product.inputs(rows)[:, 1:])


def test_a_factor_in_front_is_no_plain_product() -> None:
    func, args = torch.ops.aten.addmm.default, PRODUCTS["addmm"]
    known: Any = OPS["aten::addmm"].refit
    for factors in ({"beta": 2}, {"alpha": 0.5}):
        assert known.read(arguments_of(func, args, factors), func(*args, **factors), "mat2") is None


@records
def test_the_oracle_shares_no_code_with_what_it_checks(op: Op) -> None:
    """A counterpart calls PyTorch, Python and ``ops.masks``."""
    left, seen = [op.mask] if callable(op.mask) else [], set()
    while left:
        function: Any = left.pop()
        seen.add(function)
        assert function.__module__ == "fxprune.ops.masks" or "mask" in function.__qualname__, function
        used = [function.__globals__.get(name) for name in function.__code__.co_names]
        used += [cell.cell_contents for cell in function.__closure__ or ()]
        own = [f for f in used if inspect.isfunction(f) and f.__module__.startswith("fxprune.")]
        left += [f for f in own if f not in seen]
        assert not [u for u in used if inspect.isclass(u) and u.__module__.startswith("fxprune.")]


def test_what_the_labels_note_for_the_oracle_has_a_counterpart() -> None:
    """Every rule that notes a statistic is of a record whose ``mask`` takes it."""
    noting = {op.name for op in BUILT_IN if op.label and "run.statistic(" in inspect.getsource(op.label)}
    assert len(noting) > 40
    assert not [name for name in noting if not callable(OPS[name].mask)]
    assert {op.counted for op in BUILT_IN if op.counted} >= {"product", "softmax", "batch_norm"}


# -- a rule is held to an answer --------------------------------------------------------------------------------------


def labelled(run: Propagation, *shape: int) -> Tensor:
    tensor = torch.empty(shape, device="meta")
    set_labels(tensor, tuple(Factor(run.fresh(shape[1]).reshape(1, -1), 1) for _ in shape[1:]))
    return tensor


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, label: Any) -> None:
    record = ops.lookup(f"aten::{name}")
    monkeypatch.setitem(OPS, record.name, ops.Op(record.name, label, record.mask))


def test_a_rule_that_leaves_out_an_operand_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, "where", lambda run, call: run.labels(call["self"]))
    run = Propagation()
    flags, x, y = (labelled(run, 2, 6) for _ in range(3))
    with Labelling(run), pytest.raises(AssertionError, match=r"^the rule for where does not look at operand 0$"):
        torch.where(flags > 0, x, y)
    run.lock_all(run.labels(flags), "locked")
    with Labelling(run), pytest.raises(AssertionError, match=r"^the rule for where does not look at operand 2$"):
        torch.where(flags > 0, x, y)

    def says(run: Propagation, call: ops.Call) -> Any:
        run.unread(call.name, call["other"])
        return run.labels(call["self"])

    replaced(monkeypatch, "where", says)
    with Labelling(run):
        assert run.labels(torch.where(flags > 0, x, y)) == run.labels(x)
    assert all(run.all_locked(factor) for factor in run.labels(y))
    assert run.classes.locks[-1][1].text == "not read by the rule for where"


def test_a_rule_that_leaves_out_an_output_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, "unbind", lambda run, call: [run.labels(call.input)])
    run = Propagation()
    x = labelled(run, 2, 6)
    with Labelling(run), pytest.raises(AssertionError, match=r"^the rule for unbind speaks of 1 of 2 outputs$"):
        x.unbind(0)


def test_labels_that_do_not_fit_an_output_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, "transpose", lambda run, call: run.labels(call.input))
    run = Propagation()
    x = labelled(run, 2, 6)
    with Labelling(run), pytest.raises(AssertionError, match=r"^the rule for transpose labels \[6, 2\] as \[1, 6\]$"):
        x.transpose(0, 1)


def test_what_nobody_can_interpret_and_writes_nowhere_new_does_not_refuse_a_model() -> None:
    """Choosing boxes has no meta kernel, and what it chooses are indices, of which a write at them makes no tensor."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.boxes, self.scores = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.b(self.a(x).relu()).relu()
            boxes, scores = self.boxes(x), self.scores(x)[:, 0]
            places = torch.where(scores < 1e9)[0]
            kept = torchvision.ops.nms(boxes, scores, 0.5)
            best = torch.zeros_like(scores, dtype=torch.bool)
            best[places[kept]] = True
            return boxes, torch.where(best, scores, 0)

    model = Detector().eval()
    small = fxprune.prune(model, torch.randn(6, 4), channels=0.5, round_to=1, progress=False)
    assert small.a.out_features < 8
    assert small.b.out_features < 8
    assert [note for note in small.meta["fxprune"].notes if "cannot be interpreted" in note and "nms" not in note] == []
    assert fxprune.analyze(model, torch.randn(6, 4)).uninterpreted == {"nms"}, "which boxes it chose is unknown"
    again = torch.randn(6, 4)
    for found, expected in zip(small(again), fxprune.into(model, small)(again), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_fault_of_a_rule_costs_channels_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "aten::maximum", ops.Op("aten::maximum", lambda run, call: run.labels(call.input)))

    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.o = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.c(torch.maximum(self.a(x), self.b(x))))

    small = fxprune.prune(Largest().eval(), torch.randn(2, 4), channels=0.5, round_to=1, progress=False)
    assert [small.get_parameter(f"{name}.weight").shape[0] for name in "abc"] == [8, 8, 4]
    notes = small.meta["fxprune"].notes
    assert any("maximum cannot be interpreted: AssertionError: the rule for maximum does not" in note for note in notes)
