"""Scores and a budget give a plan: at or under the budget, near it, and the lowest scores go first."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from labels.nets import words
from labels.nets.structure import TiedWeight
from nets import Attentive, Shuffled, Small, chain, image, make
from torch import Tensor, nn

import fxprune
from fxprune.errors import BudgetError, InputError, ModelError
from fxprune.selection.budget import Budget, Selection, select


class Wide(Small):
    """The same with widths at which one channel is far less than 1 % of the cost."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 128, 1), nn.BatchNorm2d(128), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(128, 192, 3, padding=1), nn.BatchNorm2d(192), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(192, 128, 1), nn.BatchNorm2d(128))
        self.head = nn.Linear(128, 10)


def scores_for(graph: fxprune.ChannelGraph, seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    return [None if g.locked else random.random(g.channels.shape) for g in graph.groups]


def chosen(
    graph: fxprune.ChannelGraph, scores: list[Any], ratio: float, kind: Any = "channels", **options: Any
) -> Selection:
    return select(graph, scores, Budget(kind, ratio), **options)


@pytest.mark.parametrize("kind", ["flops", "params", "channels"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_a_budget_is_met_and_used(kind: str, ratio: float, scope: Any) -> None:
    graph = fxprune.analyze(make(Wide), image())
    keep = chosen(graph, scores_for(graph), ratio, kind, scope=scope).keep
    if kind == "channels":
        free = np.concatenate([g.channels.reshape(-1) for g in graph.prunable])
        found = keep[free].mean()
    else:
        found = graph.macs(keep) / graph.macs() if kind == "flops" else graph.params(keep) / graph.params()
    assert 0.99 * ratio < found <= ratio


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("round_to", [1, 8])
def test_nothing_more_can_be_put_back(ratio: float, round_to: int) -> None:
    """Of no group the best channels that go would still fit, however small they are beside what was cut last."""
    graph = fxprune.analyze(make(Wide), image())
    scores = scores_for(graph)
    scores[np.argmax([g.channels.size for g in graph.groups])] *= 100  # one unit of many channels is cut last
    keep = chosen(graph, scores, ratio, "flops", round_to=round_to).keep
    limit = int(ratio * graph.macs())
    assert graph.macs(keep) <= limit
    if graph.macs(keep) < limit - limit // 2000:
        for group, score in zip(graph.groups, scores, strict=True):
            gone = np.flatnonzero(~keep[group.channels[0]])
            if score is not None and len(gone):
                more = keep.copy()
                more[group.channels[0][gone[np.argsort(score[0][gone])][-round_to:]]] = True
                assert graph.macs(more) > limit, group.name


@pytest.mark.parametrize("spare", range(11))
def test_what_was_cut_too_much_comes_back_best_first(spare: int) -> None:
    """Every channel of the first layer costs 1; the last unit to go costs 10, and ``spare`` of it are over.

    If it does not fit, what went before it of its own group does not come back either.
    """
    graph = fxprune.analyze(chain(4, 12, 3, 2), np_image())
    cheap, dear = (g.channels[0] for g in graph.prunable)
    values = {"0": np.arange(1.0, 13.0)[None], "2": np.array([[20.0, 30.0, 40.0]])}

    def cost(keep: Any) -> int:
        return int(keep[cheap].sum() + keep[dear] @ [1, 10, 10])

    budget = Budget("flops", (11 + spare) / 33, whole=33, cost=cost)
    keep = select(graph, [values.get(g.name) if g.locked is None else None for g in graph.groups], budget).keep
    assert np.flatnonzero(keep[dear]).tolist() == ([2] if spare < 10 else [1, 2])
    assert np.flatnonzero(keep[cheap]).tolist() == [*range(11 - spare % 10, 12)]


@pytest.mark.parametrize("kind", ["flops", "params", "channels"])
@pytest.mark.parametrize("least", [3, 15])
def test_the_smallest_ratio_that_can_be_reached_is_named(kind: str, least: int) -> None:
    graph = fxprune.analyze(make(), image())
    with pytest.raises(BudgetError, match="cannot be reached") as caught:
        chosen(graph, scores_for(graph), 0.001, kind, min_channels=least)
    (named,) = re.findall(r": the smallest reachable ratio is (0\.\d{4})\.", str(caught.value))
    chosen(graph, scores_for(graph), float(named), kind, min_channels=least)
    with pytest.raises(BudgetError):
        chosen(graph, scores_for(graph), float(named) - 0.0001, kind, min_channels=least)


def test_nothing_to_prune_says_what_holds_it() -> None:
    few, many = (fxprune.analyze(chain(*[4] * n), np_image()) for n in (3, 8))
    with pytest.raises(ModelError) as caught:
        chosen(few, [None] * len(few.groups), 0.5)
    held = [f"{g.name}: {g.locked}" for g in few.groups if g.locked]
    held.append("0: the method gives these channels no score")
    assert str(caught.value) == f"The model has no prunable channels. What holds them: {'; '.join(held)}."
    with pytest.raises(ModelError, match=r"; 4: the method gives these channels no score; and 3 more\.$"):
        chosen(many, [None] * len(many.groups), 0.5)


@pytest.mark.parametrize(("limits", "left"), [
    ({"0": 0.5, "*": 0.75}, [4, 2]), ({"2.bias": 0.25}, [1, 6]), ({"4": 0.0}, [1, 1]), ({"[02]": 0.3}, [6, 6]),
    ({"0": 1.0, "2": 0.0}, [1, 8]),
])  # fmt: skip
def test_no_more_goes_of_a_layer_than_its_share(limits: dict[str, float], left: list[int]) -> None:
    """The smallest share of all patterns that fit what a layer makes."""
    graph = fxprune.analyze(chain(4, 8, 8, 2), np_image())
    keep = chosen(graph, scores_for(graph), 1.0, threshold=np.inf, max_ratio=limits).keep
    assert [int(keep[g.channels].sum()) for g in graph.prunable] == left


def test_a_share_of_an_embedding_whose_weight_reads_too() -> None:
    graph = fxprune.analyze(TiedWeight(), words(2))
    keep = chosen(graph, scores_for(graph), 1.0, threshold=np.inf, max_ratio={"emb": 0.25}).keep
    assert [int(keep[g.channels].sum()) for g in graph.prunable] == [6]


def test_a_share_of_no_layer() -> None:
    graph = fxprune.analyze(chain(4, 8, 2), np_image())
    with pytest.raises(InputError, match=r"^max_ratio has the pattern 'x\*', which fits no layer that makes channels"):
        chosen(graph, scores_for(graph), 0.5, max_ratio={"*": 0.5, "x*": 0.5})


def test_a_budget_of_1_cuts_nothing() -> None:
    graph = fxprune.analyze(make(), image())
    for kind in ("flops", "params", "channels"):
        assert chosen(graph, scores_for(graph), 1.0, kind).keep.all()


def test_the_lowest_scores_go_first() -> None:
    graph = fxprune.analyze(chain(4, 6, 8, 2), np_image())
    scores: list[Any] = [None] * len(graph.groups)
    names = [g.name for g in graph.groups]
    scores[names.index("0")] = np.array([[5.0, 1.0, 6.0, 2.0, 7.0, 3.0]]) / 4
    scores[names.index("2")] = np.array([[40.0, 80.0, 10.0, 70.0, 20.0, 60.0, 30.0, 50.0]]) / 45
    keep = chosen(graph, scores, 0.5).keep
    first, second = (graph.groups[names.index(name)].channels[0] for name in ("0", "2"))
    assert keep[first].tolist() == [True, False, True, False, True, False]
    assert keep[second].tolist() == [False, True, False, True, False, True, False, True]
    keep = chosen(graph, scores, 0.5, scope="uniform").keep
    assert keep[first].tolist() == [True, False, True, False, True, False]
    assert keep[second].tolist() == [False, True, False, True, False, True, False, True]


def np_image() -> Any:
    return image()[:, 0, 0, :4].contiguous()


@pytest.mark.parametrize(("scope", "left"), [("global", [1, 3, 8]), ("uniform", [4, 4, 4]), ("isomorphic", [1, 7, 4])])
def test_a_scope_says_what_is_ranked_together(scope: Any, left: list[int]) -> None:
    """Two layers with a bias and one without, of scores on scales of their own."""
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU()]
    graph = fxprune.analyze(nn.Sequential(*layers, nn.Linear(8, 2)), np_image())
    assert [g.name for g in graph.prunable] == ["0", "2", "4"]
    scale = {"0": 0.1, "2": 10.0, "4": 1000.0}
    scores = [None if g.locked else np.arange(1.0, 9.0)[None] * scale[g.name] for g in graph.groups]
    keep = chosen(graph, scores, 0.5, scope=scope).keep
    assert [int(keep[g.channels].sum()) for g in graph.prunable] == left


def test_ties_are_broken_by_position() -> None:
    graph = fxprune.analyze(make(), image())
    flat = [None if g.locked else np.ones(g.channels.shape) for g in graph.groups]
    first = chosen(graph, flat, 0.4).keep
    assert (first == chosen(graph, flat, 0.4).keep).all()
    for group in graph.prunable:
        stays = first[group.channels[0]]
        assert (np.diff(stays.astype(int)) >= 0).all(), "of equal channels the first go first"


def test_blocks_keep_equal_counts_and_choose_their_own_channels() -> None:
    graph = fxprune.analyze(make(Shuffled), image())
    keep = chosen(graph, scores_for(graph), 0.6).keep
    blocks = [g for g in graph.prunable if g.blocks > 1]
    assert blocks
    for group in blocks:
        counts = keep[group.channels].sum(1)
        assert (counts == counts[0]).all()
    assert any((keep[g.channels][0] != keep[g.channels][1]).any() for g in blocks)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("attention", ["head_dim", "heads"])
def test_round_to_is_kept_in_every_group(k: int, attention: Any) -> None:
    for kind in (Small, Shuffled, Attentive):
        graph = fxprune.analyze(make(kind), image(), attention=attention)
        keep = chosen(graph, scores_for(graph), 0.7, round_to=k).keep
        for group in graph.prunable:
            count = int(keep[group.channels].sum())
            assert count % k == 0 or count == group.channels.size
        assert not keep.all()


@pytest.mark.parametrize("least", [1, 2, 5])
def test_at_least_so_many_stay_along_every_dimension(least: int) -> None:
    for kind in (Small, Shuffled, Attentive):
        graph = fxprune.analyze(make(kind), image())
        for seed in range(3):
            keep = chosen(graph, scores_for(graph, seed), 0.7, min_channels=least).keep
            for extent in graph.extents:
                assert keep[extent].sum() >= min(least, len(extent))


class Picked(nn.Module):
    """Of 8 channels the first two are picked one by one, and stay; a linear layer reads all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.h(y) + y[:, :1] * y[:, 1:2]


@pytest.mark.parametrize(("least", "stay"), [(1, [0, 1]), (2, [0, 1]), (3, [0, 1, 4]), (4, [0, 1, 4, 7])])
def test_no_more_stay_than_must_and_those_are_the_best(least: int, stay: list[int]) -> None:
    """Channels that may not be cut count, and of equal ones the last stays."""
    graph = fxprune.analyze(make(Picked), np_image())
    scores = [None if g.locked else np.array([[1.0, 2.0, 9.0, 4.0, 5.0, 5.0]]) for g in graph.groups]
    selection = chosen(graph, scores, 1.0, threshold=np.inf, min_channels=least)
    (outputs,) = (p.labels[0].ids for p in graph.parameters if p.name == "a.bias")
    assert np.flatnonzero(selection.keep[outputs]).tolist() == stay
    assert selection.guarded == (("a#2",) if len(stay) > 2 else ())


def test_groups_left_alone_have_a_reason() -> None:
    graph = fxprune.analyze(make(Attentive), image())
    scores = scores_for(graph)
    names = [g.name for g in graph.groups]
    scores[names.index("mlp.1")] = None
    selection = chosen(graph, scores, 0.9, "flops", exact=True)
    assert selection.locked["mlp.1"] == "the method gives these channels no score"
    assert selection.locked["embed"].startswith("not exact: layer_norm over channels (")
    assert set(selection.locked) == {"mlp.1", "embed"}
    assert selection.keep[graph.groups[names.index("mlp.1")].channels].all()
    assert selection.keep[graph.groups[names.index("embed")].channels].all()


def test_the_one_budget_that_is_given() -> None:
    assert Budget.of(flops=None, params=0.3, channels=None) == Budget("params", 0.3)
    assert Budget.of(flops=1) == Budget("flops", 1.0)
    assert Budget.of(flops=np.float32(0.5)) == Budget("flops", 0.5)
    with pytest.raises(InputError, match="No budget"):
        Budget.of(flops=None)


@pytest.mark.parametrize("scope", ["global", "uniform", "isomorphic"])
@pytest.mark.parametrize("round_to", [1, 2])
def test_groups_that_the_least_number_of_channels_protects_are_named(scope: Any, round_to: int) -> None:
    graph = fxprune.analyze(chain(4, 8, 8, 2), np_image())
    first, second = (g.name for g in graph.prunable)
    low, high = np.linspace(0.1, 0.2, 8)[None], np.linspace(1, 2, 8)[None]
    scores = [{first: low, second: high}.get(g.name) for g in graph.groups]

    def guarded(ratio: float) -> tuple[str, ...]:
        return chosen(graph, scores, ratio, scope=scope, round_to=round_to, min_channels=2).guarded

    assert guarded(1.0) == guarded(0.75) == ()
    ranked = scope != "uniform"  # which takes from all alike
    assert guarded(0.5) == ((first,) if ranked else ())  # 6 of the first, then the others
    assert guarded(0.3) == ((first,) if ranked else ())
    assert guarded(0.625) == ()
    keep = chosen(graph, scores, 0.5, scope=scope, round_to=round_to, min_channels=2).keep
    assert keep[np.concatenate([g.channels.reshape(-1) for g in graph.prunable])].sum() == 8
