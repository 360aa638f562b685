"""A plan is data: JSON in and out, read on any model of the same shape, checked against it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise
from nets import Attentive, Shuffled, Small, image, make
from torch import Tensor, nn

import fxprune
from fxprune.errors import PlanError
from fxprune.selection.plan import PruningPlan, kept_of
from fxprune.selection.plan import _digest as digest_of


def plan_of(kind: type[nn.Module], attention: str = "head_dim", **options: object) -> PruningPlan:
    pruned = fxprune.prune(
        make(kind), image(), channels=0.6, method="random", attention=attention, progress=False, **options
    )
    plan: PruningPlan = pruned.meta["fxprune"].plan
    return plan


@pytest.mark.parametrize("kind", [Small, Shuffled, Attentive])
@pytest.mark.parametrize("attention", ["head_dim", "heads"])
def test_json_in_and_out(kind: type[nn.Module], attention: str, tmp_path: Path) -> None:
    plan = plan_of(kind, attention)
    plan.save(str(tmp_path / "plan.json"))
    assert PruningPlan.load(str(tmp_path / "plan.json")) == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["attention"] == attention
    assert data["torch"] == torch.__version__
    for name, dims in data["kept"].items():
        assert {int(d): v for d, v in dims.items()} == plan.kept[name]


def test_kept_names_every_cut_tensor_and_no_other() -> None:
    plan, model = plan_of(Small), make()
    stem, up = plan.kept["stem.0.weight"][0], plan.kept["up.0.weight"][0]
    assert len(stem) + len(up) == 24
    expected: dict[str, dict[int, list[int]]] = {
        "stem.0.weight": {0: stem},
        "up.0.weight": {0: up, 1: stem},
        "down.0.weight": {0: stem, 1: up},
        "head.weight": {1: stem},
    }
    for layer, kept in (("stem", stem), ("up", up), ("down", stem)):
        for name in (f"{layer}.0.bias", *(f"{layer}.1.{n}" for n in ("weight", "bias", "running_mean", "running_var"))):
            expected[name] = {0: kept}
    assert plan.kept == {name: dims for name, dims in expected.items() if name in model.state_dict()}
    assert plan.widths == {"stem.0": (len(stem), 16), "up.0": (len(up), 24)}
    assert all(type(i) is int for dims in plan.kept.values() for kept in dims.values() for i in kept)


def test_a_grouped_convolution_has_one_list_per_group() -> None:
    plan = plan_of(Shuffled)
    for name in ("one.weight", "two.weight"):
        lists = plan.kept[name][1]
        assert len(lists) == 2, "also where both groups keep the same"
        assert len(lists[0]) == len(lists[1]) < 8
        assert all(0 <= i < 8 for row in lists for i in row)
    outer, rows = plan.kept["stem.weight"][0], plan.kept["one.weight"][1]
    assert outer == rows[0] + [8 + i for i in rows[1]]


def test_a_plan_says_the_same_on_a_fresh_graph() -> None:
    for kind in (Small, Shuffled, Attentive):
        plan, graph = plan_of(kind), fxprune.analyze(make(kind, seed=3), image())
        keep = plan.channels(graph)
        assert kept_of(graph, keep) == plan.kept
        assert PruningPlan.of(graph, keep) == plan
        assert PruningPlan.of(graph, graph.everything()).kept == {}


def test_the_plan_that_cuts_nothing() -> None:
    model = make()
    graph = fxprune.analyze(model, image())
    plan = PruningPlan.of(graph, graph.everything())
    same = fxprune.apply(model, plan, image())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in same.state_dict().items())
    assert same.meta["fxprune"].macs_after == same.meta["fxprune"].macs_before


def test_the_mode_of_attention_belongs_to_the_plan() -> None:
    heads = plan_of(Attentive, "heads", seed=1)
    assert len(heads.kept["proj.weight"][1]) in (4, 8, 12), "whole heads of four channels were cut"
    assert fxprune.apply(make(Attentive), heads, image()).meta["fxprune"].plan.attention == "heads"
    with pytest.raises(PlanError, match=r"The plan is inconsistent: .* with the attention mode and"):
        heads.channels(fxprune.analyze(make(Attentive), image(), attention="head_dim"))


def test_a_plan_that_cuts_what_may_not_be_cut_is_refused() -> None:
    """Of every locked group, as soon as one channel goes, also beside others that may."""
    graph = fxprune.analyze(make(), image(), ignore=["up"])
    locked = [g for g in graph.groups if g.locked]
    assert [g.name for g in locked] == ["stem.0#2", "up.0", "head"]
    for group in locked:
        keep = graph.everything()
        keep[group.channels[0, -1]] = False
        keep[graph.prunable[0].channels[0, 0]] = False
        with pytest.raises(PlanError) as caught:
            PruningPlan.of(graph, keep).channels(graph)
        assert str(caught.value) == f"The plan cuts channels of {group.name}, which cannot be cut here: {group.locked}."


def test_blocks_of_a_plan_keep_equal_counts() -> None:
    graph = fxprune.analyze(make(Shuffled), image())
    group = next(g for g in graph.prunable if g.blocks == 2)
    keep = graph.everything()
    keep[group.channels[[0, 1], [2, 5]]] = False
    assert np.array_equal(PruningPlan.of(graph, keep).channels(graph), keep)
    keep[group.channels[1, 0]] = False
    with pytest.raises(PlanError, match=r"^The plan is inconsistent: it keeps a channel in one layer and cuts it in"):
        PruningPlan.of(graph, keep).channels(graph)


def test_a_buffer_may_have_another_shape() -> None:
    class Cached(Small):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(size))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.cache.sum()

    graphs = [fxprune.analyze(Cached(size).eval(), image()) for size in (3, 4)]
    first, second = (PruningPlan.of(graph, graph.everything()) for graph in graphs)
    assert first.fingerprint == second.fingerprint


def test_a_fingerprint_is_of_names_and_shapes_alone() -> None:
    graph = fxprune.analyze(make(), image())
    other = fxprune.analyze(make(seed=7).double(), image(3).double())
    assert (
        PruningPlan.of(graph, graph.everything()).fingerprint == PruningPlan.of(other, other.everything()).fingerprint
    )
    wider = make()
    wider.head = nn.Linear(16, 11)
    graph = fxprune.analyze(wider, image())
    with pytest.raises(PlanError, match="The plan belongs to another model"):
        plan_of(Small).channels(graph)


def test_a_hand_made_plan_can_be_applied() -> None:
    model = make()
    graph = fxprune.analyze(model, image())
    keep = graph.everything()
    group = next(g for g in graph.groups if g.name == "up.0")
    keep[group.channels[0, np.arange(24) % 2 == 1]] = False
    pruned = fxprune.apply(model, PruningPlan.of(graph, keep), image())
    assert torch.equal(pruned.get_parameter("up.0.weight"), model.get_parameter("up.0.weight")[::2])
    assert torch.equal(pruned.get_parameter("down.0.weight"), model.get_parameter("down.0.weight")[:, ::2])
    assert torch.equal(pruned.get_parameter("head.weight"), model.get_parameter("head.weight"))


def test_the_plan_of_a_network_pruned_before_is_applied_to_the_dense_one_and_to_what_it_was_made_for(
    tmp_path: Path,
) -> None:
    model = make(Attentive)
    first = fxprune.prune(model, image(), channels=0.7, for_class=True, progress=False)
    second = fxprune.prune(first, image(), channels=0.7, attention="heads", progress=False)
    plan: PruningPlan = second.meta["fxprune"].plan
    assert plan.earlier == first.meta["fxprune"].plan
    assert plan.steps == (plan.earlier, plan)
    plan.save(tmp_path / "plan.json")
    read = PruningPlan.load(tmp_path / "plan.json")
    assert (read, read.digest) == (plan, plan.digest)
    for start in (model, first, fxprune.into(model, first)):
        again = fxprune.apply(start, read, image())
        assert again.meta["fxprune"].plan == plan
        assert torch.equal(again.eval()(image(5)), second.eval()(image(5)))
    assert read.digest != replace(read, earlier=None).digest
    other = fxprune.prune(make(), image(), channels=0.7, progress=False)
    with pytest.raises(PlanError, match=r"Pass the model as its last pruning found it \(fxprune.apply makes it with"):
        fxprune.into(model, second)
    with pytest.raises(PlanError, match="Pass the model as it was before pruning"):
        fxprune.into(model, other)


def test_a_layer_that_was_exchanged_between_two_prunings_is_told_of() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(2, 4)
    first = fxprune.prune(model, x, channels=0.7, progress=False)
    first.set_submodule("2", nn.Linear(first.get_submodule("2").in_features, 5))  # type: ignore[arg-type]
    second = fxprune.prune(first, x, channels=0.7, progress=False)
    plan: PruningPlan = second.meta["fxprune"].plan
    with pytest.raises(PlanError, match=r"pruned 2 times: if a layer was exchanged in between, .* pass what the last"):
        fxprune.apply(model, plan, x)
    assert torch.equal(fxprune.apply(first, plan, x)(x), second(x))


def test_a_file_whose_earlier_plans_are_none(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    first = fxprune.prune(make(), image(), channels=0.7, progress=False)
    plan: PruningPlan = fxprune.prune(first, image(), channels=0.7, progress=False).meta["fxprune"].plan

    def refusal(**changed: object) -> str:
        data = {**plan.data(), **changed}
        del data["digest"]
        path.write_text(json.dumps(data | {"digest": digest_of(data)}))
        with pytest.raises(PlanError) as caught:
            PruningPlan.load(path)
        return str(caught.value)

    assert "it lacks 'kept' or 'digest'" in refusal(earlier=[{}])
    assert "is damaged: earlier" in refusal(earlier=3)
    assert "a step of it has steps of its own" in refusal(earlier=[plan.data()])
    with pytest.raises(PlanError, match="The plan is damaged: earlier"):
        replace(plan, earlier=3).save(path)  # type: ignore[arg-type]


def test_a_plan_of_a_network_some_of_whose_channels_no_rewriting_could_cut_is_applied() -> None:
    class Parts(nn.Module):
        """A layer over the parts of a split: whole parts are its channels, and their number is that of what returns."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a = nn.Linear(6, 6), nn.Conv1d(10, 8, 1)
            self.b, self.head = nn.Linear(6, 8), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            h = self.b(self.a(torch.hstack([h, -h]))).flatten(1)
            return self.head(torch.stack(h.split(32, -1), 1).mT)

    model, x = randomise(Parts()).eval(), torch.randn(2, 5, 6)
    pruned = fxprune.prune(model, x, channels=0.5, method="random", round_to=1, progress=False)
    report = pruned.meta["fxprune"]
    assert any(note.startswith("locked: the rewritten graph does not follow") for note in report.notes)
    assert torch.equal(fxprune.apply(model, report.plan, x)(x), pruned(x))
