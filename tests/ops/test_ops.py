"""Ops of other packages: what is registered is used by every stage, and what is not is never guessed."""

from __future__ import annotations

import copy
import doctest
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import ops
from fxprune.errors import BudgetError, InputError, ModelError, PlanError
from fxprune.labels.run import Labelling
from fxprune.ops import table as op_table
from fxprune.verification import DOUBLE_TOLERANCE, TOLERANCE


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ops.lookup("aten::mean")
    for namespace in op_table._BUILT_IN:  # what a test loads first would be gone after it, and is imported once
        op_table.load(namespace)
    before, loaded = dict(op_table.OPS), set(op_table._loaded)
    yield
    op_table.OPS.clear()
    op_table.OPS.update(before)
    op_table._loaded.clear()
    op_table._loaded.update(loaded)
    from fxprune.ops.call import signature

    signature.cache_clear()


def define(namespace: str, schema: str, function: Any, key: str = "CompositeExplicitAutograd") -> Any:
    """An op of a library of its own, which does the same on meta unless it has a ``key``."""
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(schema)
    library.impl(schema.partition("(")[0], function, key)
    _LIBRARIES.append(library)
    return getattr(getattr(torch.ops, namespace), schema.partition("(")[0])


_LIBRARIES: list[Any] = []


class Net(nn.Module):
    """4 -> 16 -> 3, with a function between."""

    def __init__(self, inner: Any):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.inner(self, self.a(x)))


def prune(net: nn.Module, **options: Any) -> Any:
    options = {"channels": 0.5, "method": "random", "progress": False, **options}
    return fxprune.prune(net.eval(), torch.randn(2, 4), **options)


def test_the_worked_example() -> None:
    """Of the docstring: it runs, and what it registers is pruned and proven."""
    test = doctest.DocTestFinder().find(ops, "ops")[0]
    assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
    _LIBRARIES.append(test.globs["library"])
    op = torch.ops.mylib.centre

    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__(lambda self, h: op(h, self.weight))
            self.weight = nn.Parameter(torch.rand(16) + 0.5)

    report = prune(Scaled()).meta["fxprune"]
    assert report.plan.kept["weight"][0] == report.plan.kept["a.weight"][0]
    assert len(report.plan.kept["weight"][0]) == 8
    assert report.oracle_error <= TOLERANCE
    record = ops.lookup("mylib::centre")
    op_table.OPS[record.name] = ops.Op(record.name, record.label)  # without the counterpart the proof fails
    with pytest.raises(fxprune.errors.VerificationError):
        prune(Scaled())


def test_a_repair_and_a_cost() -> None:
    op = define("fxprune_t1", "spread(Tensor x, int size) -> Tensor", lambda x, size: x[:, None].expand(-1, size) * 1.0)

    def spread(run: ops.Propagation, call: ops.Call) -> ops.Labels:
        ids = run.fresh(call["size"])
        return (ops.Factor(ids.reshape(1, -1), 1),)

    def repair(repair: Any, node: Any) -> None:
        node.args = (node.args[0], repair.promised(node)[1])

    ops.register("fxprune_t1::spread", label=spread, repair=repair, cost=lambda run, call: [(1000.0, ())])
    small = prune(Net(lambda self, h: h + op(h.mean(1), 16)))
    report = small.meta["fxprune"]
    assert report.macs_before == 2 * (4 * 16 + 16 * 3) + 1000
    assert report.macs_after == 2 * (4 * 8 + 8 * 3) + 1000
    assert report.oracle_error <= TOLERANCE
    assert small(torch.randn(3, 4)).shape == (3, 3)


def test_an_op_that_reads_values() -> None:
    op = define("fxprune_t2", "order(Tensor x) -> Tensor", lambda x: x.argsort(1).float())
    with pytest.raises(ModelError, match=r"no rule for fxprune_t2\.order"):
        prune(Net(lambda self, h: op(h)))
    ops.register("fxprune_t2::order", reads_values=True)
    with pytest.raises(ModelError, match="fxprune_t2::order reads values"):
        prune(Net(lambda self, h: op(h)))


def test_a_name_that_pytorch_has_too_is_not_taken_for_it() -> None:
    """An op called ``mean`` need not be a mean, nor one called ``view`` a view."""
    op = define("fxprune_t3", "relu(Tensor x) -> Tensor", lambda x: x.cumsum(1))
    with pytest.raises(ModelError, match=r"no rule for fxprune_t3\.relu"):
        prune(Net(lambda self, h: op(h)))
    where = define("fxprune_t3", "where(Tensor x) -> Tensor", lambda x: x.cumsum(1))
    with pytest.raises(ModelError, match=r"no rule for fxprune_t3\.where"):
        prune(Net(lambda self, h: where(h)))


def test_an_entry_point_is_loaded_when_its_op_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = define("fxprune_t4", "twice(Tensor x) -> Tensor", lambda x: x * 2)
    (tmp_path / "fxprune_t4_ops.py").write_text(
        "from fxprune import ops\n"
        "@ops.register('fxprune_t4::twice')\n"
        "def twice(run, call):\n"
        "    return run.labels(call.input)\n"
    )
    info = tmp_path / "fxprune_t4-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fxprune_t4\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fxprune.ops]\nfxprune_t4 = fxprune_t4_ops\nfxprune_t5 = nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    prune(Net(lambda self, h: h.relu()))
    assert "fxprune_t4_ops" not in sys.modules
    assert prune(Net(lambda self, h: op(h))).get_parameter("a.weight").shape == (8, 4)
    other = define("fxprune_t5", "twice(Tensor x) -> Tensor", lambda x: x * 2)
    with pytest.raises(
        InputError, match=r"The ops of 'fxprune_t5' cannot be loaded from nowhere \(ModuleNotFoundError"
    ):
        prune(Net(lambda self, h: other(h)))


def test_names_are_checked() -> None:
    define("fxprune_t6", "smooth(Tensor x) -> Tensor", lambda x: x)
    ops.register("fxprune_t6::smooth")
    with pytest.raises(InputError, match=r"^Two records for the op fxprune_t6::smooth\.$"):
        ops.register("fxprune_t6::smooth")
    with pytest.raises(InputError, match=r"^Two records for the op aten::mean\.$"):
        ops.register("aten::mean")
    with pytest.raises(InputError, match="'smooth' names no op; write namespace::name"):
        ops.register("smooth")
    with pytest.raises(InputError, match=r"no op 'fxprune_t6::smoth'\. Did you mean fxprune_t6::smooth\?$"):
        ops.register("fxprune_t6::smoth")
    with pytest.raises(InputError, match=r"^No op 'fxprune_t6::smoth' is registered\. Did you mean"):
        ops.lookup("fxprune_t6::smoth")
    assert ops.lookup("torchvision::deform_conv2d").label is not None
    ops.register("a_library_that_comes_later::op")


# -- what is not interpreted is counted -------------------------------------------------------------------------------


def test_parameters_in_an_op_without_a_rule_are_told() -> None:
    op = define("fxprune_t7", "lookup(Tensor x, Tensor table) -> Tensor", lambda x, table: x @ table)

    class Table(Net):
        def __init__(self) -> None:
            super().__init__(lambda self, h: h)
            self.table = nn.Parameter(torch.randn(3, 50))

        def forward(self, x: Tensor) -> Any:
            return op(super().forward(x), self.table.t().t())

    notes = prune(Table()).meta["fxprune"].notes
    told = [note for note in notes if note.startswith("not counted")]
    assert len(told) == 1
    assert told[0].startswith(
        "not counted: 150 parameters of table in fxprune_t7.lookup.default (tests/ops/test_ops.py:"
    )
    ops.register("fxprune_t7::lookup", cost=lambda run, call: [(2.0 * 150, ())])
    report = prune(Table()).meta["fxprune"]
    assert not [note for note in report.notes if note.startswith("not counted")]
    assert report.macs_before == 2 * (4 * 16 + 16 * 3) + 2 * 150


def test_what_fails_without_data_is_told_too() -> None:
    op = define("fxprune_t8", "lookup(Tensor x, Tensor table) -> Tensor", lambda x, table: x @ table, "CPU")

    class Fails(Net):
        def __init__(self) -> None:
            super().__init__(lambda self, h: h)
            self.table = nn.Parameter(torch.randn(3, 50))

        def forward(self, x: Tensor) -> Any:
            return op(super().forward(x), self.table)

    notes = prune(Fails()).meta["fxprune"].notes
    assert [note for note in notes if note.startswith("not counted: 150 parameters of table in lookup (")]


def test_what_pytorch_counts_is_counted() -> None:
    """Ops that have no rule, but a formula in ``torch.utils.flop_counter``."""
    run = ops.Propagation()
    q = torch.empty(2, 4, 6, 8, device="meta")
    with Labelling(run):
        torch.ops.aten._scaled_dot_product_efficient_attention(q, q, q, None, False)
    assert [(term.constant, term.factors) for term in run.terms] == [(2 * 2 * 4 * 6 * 6 * 8, ())]


class Mixture(nn.Module):
    """Tokens, and four experts that share them; in the middle as wide as asked for."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)
        self.up, self.down = (nn.Parameter(torch.randn(4, *size) / 4) for size in ((16, width), (width, 16)))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        rows = self.a(x).to(self.dtype)
        ends = (torch.arange(1, 5) * len(x) // 4).to(torch.int32)  # PyTorch leaves rows beyond the last end unset
        rows = torch._grouped_mm(rows, self.up.to(self.dtype), ends).relu()
        return self.b(torch._grouped_mm(rows, self.down.to(self.dtype), ends).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6])
def test_experts_are_counted_cut_and_proven(dtype: torch.dtype, ratio: float) -> None:
    """Every row goes to one expert. Widths that the kernel cannot are filled up, whatever is cut."""
    model, x = Mixture(32, dtype).eval(), torch.randn(8, 4)
    small = fxprune.prune(model, x, channels=ratio, method="random", progress=False, round_to=1)
    report = small.meta["fxprune"]
    assert report.macs_before == 8 * (4 * 16 + 16 * 32 + 32 * 16 + 16 * 3)
    a, b = small.get_parameter("up").shape[1:]
    c = small.get_parameter("down").shape[2]
    assert report.macs_after == 8 * (4 * a + a * b + b * c + c * 3)
    assert small.get_parameter("down").shape[1] == b < 32
    if dtype is torch.float32:
        assert report.oracle_error <= TOLERANCE
    else:  # what bfloat16 rounds is no mistake
        assert report.oracle_error < 0.1
        assert report.oracle_error_in_double is None or report.oracle_error_in_double <= DOUBLE_TOLERANCE
    assert not report.notes
    assert small(torch.randn(12, 4)).shape == (12, 3)


def test_a_mistake_in_bfloat16_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graph casts to bfloat16 is compared in double: 1e-3 of a weight is seen."""
    from fxprune.rewriting import Draft

    original = Draft.finished

    def finished(self: Draft, consume: bool = False) -> Any:
        result = original(self, consume)
        result.get_parameter("up").data.mul_(1.0001)
        return result

    monkeypatch.setattr(Draft, "finished", finished)
    with pytest.raises(fxprune.errors.VerificationError, match="in double"):
        fxprune.prune(Mixture(32, torch.bfloat16).eval(), torch.randn(8, 4), channels=0.5, progress=False)


@pytest.mark.parametrize("kind", ["2d x 3d", "3d x 3d", "3d x 2d", "2d x 2d"])
def test_grouped_products_in_double_are_pytorchs(kind: str) -> None:
    from fxprune.ops.meta import MetaKernels
    from fxprune.verification.double import InDouble

    first, second = kind.split(" x ")
    ends = None if kind == "3d x 3d" else torch.tensor([8, 24, 32], dtype=torch.int32)
    a = torch.randn(3, 16, 32) if first == "3d" else torch.randn(16, 32) if second == "2d" else torch.randn(32, 16)
    b = torch.randn(32, 8)
    if second == "3d":
        b = torch.randn(3, a.shape[-1], 8)
    elif first == "3d":
        b = torch.randn(32, 32)
    expected = torch._grouped_mm(a, b, ends)
    with InDouble():
        found = torch._grouped_mm(a.double(), b.double(), ends)
    torch.testing.assert_close(found.float(), expected)
    given = [None if t is None else t.to("meta") for t in (a, b, ends)]
    assert MetaKernels()(torch.ops.aten._grouped_mm.default, given, {}).shape == expected.shape


class Routed(nn.Module):
    """[N, 4] -> [N, 3]: two of eight experts for every row, as libraries sort and count them."""

    def __init__(self, chosen: int = 2) -> None:
        super().__init__()
        self.experts, self.chosen = 8, chosen
        self.a, self.router, self.b = nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(16, 3)
        self.up, self.down = nn.Parameter(torch.randn(8, 16, 32) / 4), nn.Parameter(torch.randn(8, 32, 16) / 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.a(x)
        weights, places = self.router(rows).softmax(-1).topk(self.chosen, -1)
        flat, order = places.reshape(-1).sort()
        ends = torch.histc(flat.float(), self.experts, 0, self.experts - 1).cumsum(0, dtype=torch.int32)
        inner = torch._grouped_mm(rows[order // self.chosen], self.up, ends).relu()
        outer = torch._grouped_mm(inner, self.down, ends) * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return self.b(rows + outer[back].view(-1, self.chosen, outer.shape[-1]).sum(1))


def without_experts(model: nn.Module, stay: list[int], x: Tensor) -> Tensor:
    """What the dense model computes where the router gives no probability to the others."""
    masked = copy.deepcopy(model)
    gone = [i for i in range(8) if i not in stay]
    with torch.no_grad():
        masked.router.bias[gone] = -torch.inf
        return masked(x)


@pytest.mark.parametrize("name", ["l2", "random"])
def test_whole_experts_go_as_if_the_router_never_chose_them(name: str) -> None:
    torch.manual_seed(0)
    model, x = Routed().eval(), torch.randn(12, 4)
    small = fxprune.prune(
        model, x, params=0.75, method=name, scope="uniform", round_to=4, ignore=["a", "up"], progress=False
    )
    stay = small.meta["fxprune"].plan.kept["router.weight"][0]
    assert 2 <= len(stay) < 8
    assert small.meta["fxprune"].plan.kept["up"][0] == small.meta["fxprune"].plan.kept["down"][0] == stay
    with torch.no_grad():
        assert torch.allclose(small(x), without_experts(model, stay, x), atol=1e-5)
    own = fxprune.into(model, small)
    assert own.experts == own.up.shape[0] == own.router.out_features == len(stay)


def test_whole_experts_and_budgets() -> None:
    """They save parameters and no MACs, and as many are left as are chosen."""
    model, x = Routed(6).eval(), torch.randn(12, 4)
    given: Any = {"method": "random", "scope": "uniform", "round_to": 1, "progress": False}
    by_macs = fxprune.prune(model, x, flops=0.5, **given)
    assert by_macs.up.shape[0] == 8
    (row,) = [row for row in by_macs.meta["fxprune"].rows if row.name == "router"]
    assert row.locked == "as many are chosen as before, so no MACs go: params= counts them"
    assert fxprune.prune(model, x, params=0.3, **given).up.shape[0] == 6
    with pytest.raises(BudgetError, match=r"held up by: .*topk takes 6 of them \(.*test_ops\.py"):
        fxprune.prune(model, x, params=0.001, **given)
    plan = fxprune.prune(model, x, params=0.3, **given).meta["fxprune"].plan
    cut = {"router.weight": 0, "router.bias": 0, "up": 0, "down": 0}
    kept = {name: {d: k[:4] if cut.get(name) == d else k for d, k in dims.items()} for name, dims in plan.kept.items()}
    with pytest.raises(PlanError, match="topk takes 6 channels, and 4 would be left"):
        fxprune.apply(model, replace(plan, kept=kept), x)
