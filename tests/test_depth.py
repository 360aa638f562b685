"""Whole residual branches: which can go, that they do, and that what is left is what zeros for them would give."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import chain, image, make
from torch import Tensor, nn

import fxprune
from fxprune.depth import Branch, branches_of, compared_with_zeroed, without
from fxprune.errors import ConversionError, InputError, ModelError, PlanError
from fxprune.pipeline import Dense, Stages, record_and_analyse
from fxprune.verification import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, width: int, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        out += x
        return self.act(out)


class Residual(nn.Module):
    """A stem, ``blocks`` residual blocks, a projection to twice as many channels, one more block, a head."""

    def __init__(self, blocks: int = 3, width: int = 8, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(Block(width, inplace) for _ in range(blocks))
        self.wide, self.short = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(width, 2 * width, 1, 2)
        self.last, self.head = Block(2 * width, inplace), nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.wide(x) + self.short(x))
        return self.head(self.last(x).mean((2, 3)))


class Attending(nn.Module):
    """Pre-norm blocks of attention and MLP over embedded tokens with learned places."""

    def __init__(self, depth: int = 2, width: int = 16) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, width), nn.Parameter(torch.randn(6, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places
        for i, (qkv, proj, up, down) in enumerate(zip(self.qkv, self.proj, self.up, self.down, strict=True)):
            batch, length, width = x.shape
            q, k, v = qkv(self.norms[2 * i](x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
            x = x + proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
            x = x + 0.5 * down(F.gelu(up(self.norms[2 * i + 1](x))))
        return self.head(x)


def analysed(model: nn.Module, *args: Any) -> tuple[Dense, tuple[Branch, ...], dict[str, str]]:
    dense = record_and_analyse(model, args, {}, "head_dim", (), Stages(progress=False), verify=True)
    sizes = dense.other_run
    found, refused = branches_of(dense.module, dense.graph, lambda one, other: sizes.of(one) == sizes.of(other))
    return dense, found, {name: reason.text for name, reason in refused.items()}


def ids() -> Tensor:
    return torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(0))


def residual(**how: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Residual(**how)).eval()


def attending() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Attending()).eval()


# -- which there are ---------------------------------------------------------------------------------------------------


def test_branches_are_what_is_added_to_a_stream() -> None:
    dense, found, refused = analysed(residual(), image())
    assert [branch.name for branch in found] == ["blocks.0", "blocks.1", "blocks.2", "wide", "last"]
    assert not refused
    whole = dense.graph.macs()
    by_hand = 2 * 8 * 8 * 9 * image().shape[2] * image().shape[3] * len(image())
    assert found[0].macs == by_hand < whole
    assert "test_depth.py" in found[0].source


def test_of_a_transformer_embeddings_are_no_branch() -> None:
    _, found, _ = analysed(attending(), ids())
    # attention and MLP of two blocks; the places are added to the tokens, but computed from no input
    assert [branch.name for branch in found] == ["proj.0", "down.0", "proj.1", "down.1"]


class Sums(nn.Module):
    """``how``: what is done with two layers of one input."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3), how

    def forward(self, x: Tensor) -> Any:
        return self.how(self, self.a(x))


@pytest.mark.parametrize(
    ("how", "names"),
    [
        (lambda net, x: net.c(x + net.b(x)), ["b"]),
        (lambda net, x: net.c(net.b(x) + x), ["b"]),
        (lambda net, x: net.c(x - net.b(x)), ["b"]),
        (lambda net, x: net.c(torch.add(x, net.b(x), alpha=2)), ["b"]),
        (lambda net, x: net.c(x.add(net.b(x))), ["b"]),
        (lambda net, x: net.c(x.clone().add_(net.b(x).sigmoid())), ["b"]),
        (lambda net, x: net.c(x * 0.5 + 3 * net.b(x)), ["b"]),
        (lambda net, x: net.c(net.b(x) - x), []),  # the stream would change its sign
        (lambda net, x: net.c(torch.add(net.b(x), x, alpha=2)), []),  # or be doubled
        (lambda net, x: net.c(x * net.b(x)), []),
        (lambda net, x: net.c(x + x.sigmoid()), []),  # nothing is contracted in it
        (lambda net, x: (net.c(x + net.b(x)), net.b(x)), ["b"]),
        (lambda net, x: (net.c(x + (y := net.b(x))), y), []),  # it is an output as well
    ],
)
def test_what_is_a_branch(how: Any, names: list[str]) -> None:
    dense, found, _ = analysed(make(lambda: Sums(how)), torch.randn(4, 8))
    assert [branch.name for branch in found] == names
    for branch in found:
        shallow = without(dense.module, [branch])
        assert compared_with_zeroed(dense.module, shallow, [branch], (dense.args, {})) == 0


def test_a_stream_of_another_shape_is_none() -> None:
    row = lambda net, x: net.c(x.mean(0, keepdim=True) + net.b(x))  # noqa: E731
    _, found, refused = analysed(make(lambda: Sums(row)), torch.randn(4, 8))
    assert not found
    assert "has the shape [1, 8], and the sum [4, 8]" in refused["b"]
    # with one row the shapes are the same, on the example alone
    _, found, refused = analysed(make(lambda: Sums(row)), torch.randn(1, 8))
    assert not found
    assert refused["b"] == "what it is added to is of the sum's shape on the example inputs only"


def test_what_only_the_branch_knows_of_the_inputs_stays() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(y))

    _, found, refused = analysed(make(Two), torch.randn(4, 8), torch.randn(4, 8))
    assert not found
    assert refused == dict.fromkeys("ab", "it brings what the other operand does not hold")


# -- the graph without them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_without_branches_it_computes_what_zeros_for_them_give(inplace: bool) -> None:
    dense, found, _ = analysed(residual(inplace=inplace), image())
    for going in (found[:1], found[1:3], found[:3], found):
        shallow = without(dense.module, going)
        assert compared_with_zeroed(dense.module, shallow, going, (dense.args, {})) == 0
        assert relative_error(shallow(image()), dense.module(image())) > 1e-3
    names = shallow.state_dict().keys()
    assert not any(name.startswith(("blocks", "wide", "last")) for name in names)
    assert {"stem.0.weight", "short.weight", "head.bias"} <= set(names)


def test_of_two_relus_in_a_row_one_is_left() -> None:
    dense, found, _ = analysed(residual(), image())
    count = lambda module: sum("relu" in str(n.target) or "act" in str(n.target) for n in module.graph.nodes)  # noqa: E731
    assert count(dense.module) - count(without(dense.module, found[:2])) == 4  # both of every block


def test_the_order_of_removal_does_not_matter() -> None:
    dense, found, _ = analysed(residual(), image())
    one, other = (without(dense.module, order) for order in (found, found[::-1]))
    assert one.code == other.code
    assert one.meta["fxprune_stands_for"] == other.meta["fxprune_stands_for"]


def test_tied_weights_stay_for_who_else_reads_them() -> None:
    model: Any = attending()
    model.up[1].weight = model.up[0].weight
    dense, found, _ = analysed(model, ids())
    shallow = without(dense.module, found[1:2])
    assert {"up.0.weight", "up.1.weight"} <= shallow.state_dict().keys()
    assert "down.0.weight" not in shallow.state_dict()
    assert compared_with_zeroed(dense.module, shallow, found[1:2], (dense.args, {})) == 0


# -- pruned ------------------------------------------------------------------------------------------------------------


def idle(model: Any, *names: str) -> nn.Module:
    """The model, in which these branches add next to nothing."""
    with torch.no_grad():
        for name in names:
            block = model.get_submodule(name)
            block.norm2.weight.mul_(1e-3)
            block.norm2.bias.mul_(1e-3)
    return model  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def shallower() -> tuple[nn.Module, Any]:
    model = idle(residual(blocks=5), "blocks.1")
    dense, found, _ = analysed(model, image())
    ratio = 1 - found[1].macs / dense.graph.macs()
    return model, fxprune.prune(model, image(), flops=ratio, depth=True, progress=False)


def test_the_branch_that_adds_nothing_goes(shallower: tuple[nn.Module, Any]) -> None:
    model, small = shallower
    report = small.meta["fxprune"]
    assert report.plan.removed == ("blocks.1",)
    assert report.macs_before == fxprune.analyze(model, image()).macs()
    assert report.macs_after < report.macs_before
    assert report.params_before == sum(p.numel() for p in model.parameters())
    assert report.params_after == sum(p.numel() for p in small.parameters())
    assert report.oracle_error <= 1e-5
    assert "branches    1 removed: blocks.1" in str(report)
    rows = {row.name: row for row in report.rows}
    assert (rows["blocks.1.conv1"].after, rows["blocks.1.conv1"].width) == ((), (8, 0))
    thinner = fxprune.prune(model, image(), flops=0.8, progress=False).meta["fxprune"]
    assert list(rows) == [row.name for row in thinner.rows]
    assert not any(name.startswith("blocks.1.") for name in small.state_dict())
    assert relative_error(small(image()), model(image())) < 1e-2


def test_depth_is_at_most_the_share_that_was_given() -> None:
    model = idle(residual(blocks=5), "blocks.0", "blocks.1")
    dense, found, _ = analysed(model, image())
    ratio = 1 - 2 * found[0].macs / dense.graph.macs()  # what the two that add nothing have
    counts = [
        len(fxprune.prune(model, image(), flops=ratio, depth=depth, progress=False).meta["fxprune"].plan.removed)
        for depth in (0.15, True)
    ]
    assert counts[0] <= 1
    assert counts[1] == 2


def test_a_limit_of_layers_that_went_is_no_error() -> None:
    model = idle(residual(blocks=5), "blocks.1")
    limited = fxprune.Options(max_ratio={"blocks.1.*": 0.5, "head": 0.5})
    small = fxprune.prune(model, image(), flops=0.8, depth=True, options=limited, progress=False)
    assert small.meta["fxprune"].macs_after <= 0.8 * small.meta["fxprune"].macs_before


@pytest.mark.parametrize("budget", ["params", "channels"])
def test_other_budgets_are_of_the_whole_model(budget: str) -> None:
    model = idle(residual(blocks=5), "last")
    report = fxprune.prune(model, image(), depth=True, progress=False, **{budget: 0.7}).meta["fxprune"]
    assert "last" in report.plan.removed
    assert report.budget_used <= 1
    if budget == "params":
        assert report.params_after <= 0.7 * report.params_before


def test_a_plan_with_branches_is_applied_and_read_back(shallower: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, small = shallower
    plan = small.meta["fxprune"].plan
    assert plan.widths["blocks.1.conv1"] == (0, 8)
    plan.save(tmp_path / "plan.json")
    assert fxprune.PruningPlan.load(tmp_path / "plan.json") == plan
    again = fxprune.apply(model, plan, image())
    assert torch.equal(again(image()), small.eval()(image()))
    fxprune.save(small, tmp_path / "small.safetensors")
    loaded = fxprune.load(tmp_path / "small.safetensors", residual(blocks=5))
    assert torch.equal(loaded.eval()(image()), small(image()))
    with pytest.raises(PlanError, match=r"removes residual branches \(blocks.1\), which this graph has"):
        fxprune.analyze(model, image()).macs(plan)


def test_a_plan_of_another_model_names_the_branch_that_is_missing(shallower: tuple[nn.Module, Any]) -> None:
    plan = replace(shallower[1].meta["fxprune"].plan, removed=("blocks.7",))
    with pytest.raises(PlanError, match=r"removes blocks\.7, which is no residual branch of this model"):
        fxprune.apply(shallower[0], plan, image())


def test_the_optimizer_forgets_what_went(shallower: tuple[nn.Module, Any]) -> None:
    model, small = copy.deepcopy(shallower[0]), copy.deepcopy(shallower[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()(image()).square().mean().backward()
    optimizer.step()
    carried = fxprune.carry_over(optimizer, model, small)
    held = {id(p) for group in carried.param_groups for p in group["params"]}
    assert held == {id(p) for p in small.parameters()}
    small.train()(image()).square().mean().backward()
    carried.step()


def test_it_goes_to_onnx(shallower: tuple[nn.Module, Any], tmp_path: Path) -> None:
    assert fxprune.export(shallower[1], tmp_path / "small.onnx").max_rel_error < 1e-4


def test_the_class_has_nothing_in_the_place_of_a_block(shallower: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, small = shallower
    same_class: Any = fxprune.into(model, small)
    assert isinstance(same_class, Residual)
    assert isinstance(same_class.blocks[1], nn.Identity)
    assert same_class.state_dict().keys() == small.state_dict().keys()
    assert relative_error(same_class(image()), small.eval()(image())) < 1e-5
    fxprune.save(same_class, tmp_path / "class.safetensors")
    loaded = fxprune.load(tmp_path / "class.safetensors", model)
    assert torch.equal(loaded.eval()(image()), same_class(image()))


class Halves(nn.Module):
    """A branch that is a part of its block: ``norm`` is before it, and its result is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norms = nn.Linear(6, 8), nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.parts, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, part in zip(self.norms, self.parts, strict=True):
            x = x + 0.1 * part(norm(x))
        return self.head(x)


def test_the_class_has_zeros_in_the_place_of_a_branch() -> None:
    model, x = make(Halves), torch.randn(4, 6)
    small = fxprune.prune(model, x, flops=1 - 64 / 216, depth=True, progress=False)
    (gone,) = small.meta["fxprune"].plan.removed
    same_class = fxprune.into(model, small)
    assert relative_error(same_class(x), small(x)) < 1e-5
    assert same_class.state_dict().keys() == small.state_dict().keys()
    assert not [*same_class.get_submodule(gone).parameters()]


class Called(nn.Module):
    """The parts are given as an argument, and something else than a tensor comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part, self.head = nn.Linear(6, 8), Pair(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.part(x)[0])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(x).unsqueeze(0).squeeze(0), None


def test_a_class_that_cannot_skip_them() -> None:
    model, x = make(Called), torch.randn(4, 6)
    with torch.no_grad():
        model.part.layer.weight.mul_(1e-3)
    small = fxprune.prune(model, x, flops=88 / 152, depth=True, progress=False)
    assert small.meta["fxprune"].plan.removed == ("part.layer",)
    same_class = fxprune.into(model, small)  # the layer alone gives zeros
    assert relative_error(same_class(x), small(x)) < 1e-5
    broken = copy.deepcopy(small)
    report = broken.meta["fxprune"]
    broken.meta["fxprune"] = replace(report, plan=replace(report.plan, removed=("part.layer#2",)))
    with pytest.raises(ConversionError, match=r"and cannot skip them: part\.layer#2"):
        fxprune.into(model, broken)


# -- refitted ----------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A branch that adds something linear in the stream, and a layer that can take that over."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x + self.branch(x))


def test_what_a_linear_branch_added_the_next_layer_takes_over() -> None:
    model = make(Linear)
    data = torch.randn(256, 6)
    small = fxprune.prune(model, data[:4], flops=88 / 152, depth=True, data=data, reconstruct=True, progress=False)
    report = small.meta["fxprune"]
    assert report.plan.removed == ("branch",)
    assert report.reconstruction.output_before > 0.01
    assert relative_error(small(data), model(data)) < 1e-5


def test_the_stream_before_a_branch_that_went_is_refitted_to_that_behind_it() -> None:
    """The last layer before the gap is linear in what the branch read: it can give what the branch added."""

    class Gap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.stem(x))
            x = x + self.one(x)
            x = x + self.two(x)
            return torch.tanh(x)  # nothing behind the gap can be refitted

    model, data = make(Gap), torch.randn(256, 6)
    dense, found, _ = analysed(model, data[:4])
    from fxprune.pipeline import shallower
    from fxprune.running import Cut, rewrite_as
    from fxprune.selection.budget import Budget

    cut = shallower(dense, found[1:])
    small = rewrite_as(cut, cut.graph.everything(), Cut(Budget("flops", 1.0)), "plan")
    assert not isinstance(small, tuple)
    fitted = fxprune.reconstruct(small, model, data)
    assert relative_error(fitted(data), model(data)) < 1e-5 < relative_error(small(data), model(data))


def test_reconstruct_finds_the_dense_graph_again(tmp_path: Path) -> None:
    model = idle(residual(), "blocks.0")
    small = fxprune.prune(model, image(), flops=0.5, depth=True, progress=False)
    assert "blocks.0" in small.meta["fxprune"].plan.removed
    data = torch.randn(64, *image().shape[1:])
    fxprune.save(small, tmp_path / "small.safetensors")
    fitted, again = (
        fxprune.reconstruct(net, model, data) for net in (small, fxprune.load(tmp_path / "small.safetensors", model))
    )
    told = fitted.meta["fxprune"].reconstruction
    assert told.output_after < told.output_before
    assert relative_error(again(data), fitted(data)) < 1e-5


@pytest.mark.parametrize("method", ["obs", "taylor", "random"])
def test_criteria_that_read_data_choose_branches_too(method: str) -> None:
    model, data = attending(), torch.randint(20, (40, 6))
    loader = [(part, torch.randint(20, part.shape)) for part in data.split(8)]
    loss = lambda output, target: F.cross_entropy(output.flatten(0, 1), target.flatten())  # noqa: E731
    given = {"obs": {"data": data}, "taylor": {"data": loader, "loss_fn": loss}, "random": {}}[method]
    small = fxprune.prune(model, ids(), method=method, flops=0.6, depth=True, progress=False, **given)
    report = small.meta["fxprune"]
    assert report.macs_after <= 0.6 * report.macs_before
    assert report.oracle_error <= 1e-5


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, -0.5, 1.5, "some", float("nan")])
def test_a_depth_that_is_none(depth: Any) -> None:
    with pytest.raises(InputError, match="must be True or the share of residual branches that may go"):
        fxprune.prune(residual(), image(), flops=0.5, depth=depth)


def test_where_no_branch_can_go_that_is_said_with_the_reason() -> None:
    with pytest.raises(ModelError, match=r"no residual branch can go \(nothing is added to a stream"):
        fxprune.prune(chain(), image(), flops=0.5, depth=True, progress=False)
    row = lambda net, x: net.c(x.mean(0, keepdim=True) + net.b(x))  # noqa: E731
    with pytest.raises(ModelError, match=r"b: what it is added to has the shape \[1, 8\].*test_depth.py"):
        fxprune.prune(make(lambda: Sums(row)), torch.randn(4, 8), flops=0.5, depth=True, progress=False)


def test_a_share_of_less_than_one_branch() -> None:
    with pytest.raises(InputError, match=r"depth=0.01 of 5 branches is none of them: pass at least 0.2"):
        fxprune.prune(residual(), image(), flops=0.5, depth=0.01, progress=False)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"for_class": True}, "removes branches that the class's own forward has"),
        ({"method": "slimming", "data": [1], "epochs": 1}, "trains the channels; depth=1 is for criteria"),
        ({"options": fxprune.Options(consume=True)}, "which consume=True empties"),
    ],
)
def test_what_does_not_go_with_depth(more: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        fxprune.prune(residual(), image(), flops=0.5, depth=True, progress=False, **more)


def test_weights_on_meta_cannot_be_measured() -> None:
    with pytest.raises(ModelError, match="depth= chooses by what is measured"):
        fxprune.prune(residual().to("meta"), image().to("meta"), flops=0.5, depth=True, progress=False)
