"""Plans side by side: kept ratios, correlations, and what cannot be compared."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import Attentive, Small, chain, image, make
from torch import nn

import fxprune
from fxprune import study
from fxprune.errors import InputError, PlanError
from fxprune.selection.plan import PruningPlan


def plan_of(model: nn.Module, x: torch.Tensor, seed: int = 0, **options: object) -> PruningPlan:
    small = fxprune.prune(
        model, x, method="random", channels=0.5, seed=seed, verify=False, progress=False, **options
    )  # fmt: skip
    plan: PruningPlan = small.meta["fxprune"].plan
    return plan


def of_counts(*counts: int) -> PruningPlan:
    """A plan that keeps the first so many units of the hidden layers of 4 -> 8 -> 10 -> 20 -> 3."""
    graph = fxprune.analyze(chain(4, 8, 10, 20, 3), torch.randn(2, 4))
    keep = graph.everything()
    for group, count in zip(graph.prunable, counts, strict=True):
        keep[group.channels[:, count:]] = False
    return PruningPlan.of(graph, keep)


def test_kept_ratios_and_correlation_by_hand() -> None:
    plans = {"a": of_counts(2, 5, 20), "b": of_counts(8, 5, 5), "c": of_counts(4, 1, 3)}
    found = study.similarity(plans)
    assert found.names == ("a", "b", "c")
    assert found.layers == ("0", "2", "4")
    np.testing.assert_array_equal(found.kept, [[0.25, 0.5, 1.0], [1.0, 0.5, 0.25], [0.5, 0.1, 0.15]])
    for i, x in enumerate(found.kept):
        for j, y in enumerate(found.kept):
            dx, dy = x - x.mean(), y - y.mean()
            by_hand = (dx * dy).sum() / ((dx**2).sum() * (dy**2).sum()) ** 0.5
            assert found.correlation[i, j] == pytest.approx(by_hand, abs=1e-12)
    assert found.correlation[0, 1] < 0


def test_a_list_of_plans_is_numbered_and_a_file_says_the_same(tmp_path: Path) -> None:
    plans = [plan_of(make(), image(), seed) for seed in (0, 1)]
    for number, plan in enumerate(plans):
        plan.save(tmp_path / f"{number}.json")
    found = study.similarity([PruningPlan.load(tmp_path / f"{number}.json") for number in (0, 1)])
    assert found.names == ("plan 1", "plan 2")
    np.testing.assert_array_equal(found.kept, study.similarity(plans).kept)


def test_layers_that_share_their_channels_count_once() -> None:
    found = study.similarity([plan_of(make(), image(), seed) for seed in (0, 1)])
    assert found.layers == ("stem.0", "up.0")  # down.0 makes the channels of the stem
    shapes = [
        fxprune.apply(make(), plan_of(make(), image(), seed), image()).get_parameter("up.0.weight").shape
        for seed in (0, 1)
    ]
    np.testing.assert_array_equal(found.kept, [[i / 16, o / 24] for o, i, *_ in shapes])


def test_blocks_of_attention_count_all_their_channels() -> None:
    plans = [plan_of(make(Attentive), image(), seed) for seed in (0, 2)]
    found = study.similarity(plans)
    graph = fxprune.analyze(make(Attentive), image())
    for plan, row in zip(plans, found.kept, strict=True):
        keep = plan.channels(graph)
        by_name = {group.name: keep[group.channels].mean() for group in graph.prunable}
        assert dict(zip(found.layers, row, strict=True)) == by_name


def test_a_layer_that_was_ignored_is_whole() -> None:
    x = torch.randn(2, 4)
    free, held = (plan_of(chain(4, 8, 10, 20, 3), x, ignore=ignore) for ignore in ((), ("2",)))
    for plans in ([free, held], [held, free]):
        found = study.similarity(plans)
        assert sorted(found.layers) == ["0", "2", "4"]
        assert found.kept[plans.index(held), found.layers.index("2")] == 1.0
        assert found.kept[plans.index(free), found.layers.index("2")] < 1.0


def test_the_table() -> None:
    text = str(study.similarity({"a": of_counts(2, 5, 20), "b": of_counts(8, 5, 5)})).splitlines()
    assert text[0] == "correlation of the kept ratios of 3 layers"
    assert text[2].split() == ["plan", "1", "2", "mean", "kept", "least", "most"]
    assert text[4].split() == ["1", "a", "1.00", "-0.93", "58%", "25%", "100%"]


def test_the_plot_shows_the_matrix(tmp_path: Path) -> None:
    found = study.similarity({"a": of_counts(2, 5, 20), "b": of_counts(8, 5, 5), "c": of_counts(4, 1, 3)})
    figure = found.plot(tmp_path / "similarity.png")
    assert (tmp_path / "similarity.png").read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), found.correlation)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in axes.texts] == [f"{r:.2f}" for r in found.correlation.reshape(-1)]
    assert "pyplot" not in {name.rpartition(".")[2] for name in sys.modules if name.startswith("matplotlib")}


def test_a_plot_in_the_format_that_the_path_names_though_it_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("target.dat")
    study.similarity([of_counts(2, 5, 20), of_counts(8, 5, 5)]).plot(tmp_path / "link.png")
    assert (tmp_path / "target.dat").read_bytes().startswith(b"\x89PNG")


def test_a_plot_finds_an_unwritable_path_before_it_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="does not exist; create it first"):
        study.similarity([of_counts(2, 5, 20), of_counts(8, 5, 5)]).plot(tmp_path / "no" / "a.png")


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = study.similarity([of_counts(2, 5, 20), of_counts(8, 5, 5)])
    with pytest.raises(InputError, match=r"^Plots need matplotlib: pip install 'fxprune\[plots\]'\.$"):
        found.plot()


def test_what_cannot_be_compared() -> None:
    a, b = of_counts(2, 5, 20), of_counts(8, 5, 5)
    with pytest.raises(InputError, match=r"^1 plans cannot be compared: pass at least two, made for the same model"):
        study.similarity([a])
    with pytest.raises(InputError, match=r"^0 plans cannot be compared"):
        study.similarity({})
    with pytest.raises(InputError, match=r"^plans is a PruningPlan: pass plans by name, or a list of them\.$"):
        study.similarity(a)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^'b' is a str, no PruningPlan: pass report\.plan\.$"):
        study.similarity({"a": a, "b": "plan.json"})  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"^The plan 'dense' keeps 100% of every layer, so its correlation .* Leave"):
        study.similarity({"a": a, "dense": of_counts(8, 10, 20)})
    with pytest.raises(InputError, match=r"^The plan 'half' keeps 50% of every layer"):
        study.similarity({"a": a, "half": of_counts(4, 5, 10)})
    with pytest.raises(PlanError, match=r"^'plan 1' and 'plan 2' are plans of different models: parameter names"):
        study.similarity([a, plan_of(make(Small), image())])
    with pytest.raises(PlanError, match=r"^'plan 2' does not say how wide its layers were"):
        study.similarity([a, replace(b, widths={})])
    with pytest.raises(PlanError, match=r"^0 has 8 channels that may be cut in one plan and 6 in 'plan 2'"):
        study.similarity([a, replace(b, widths={**b.widths, "0": (3, 6)})])


def test_attention_modes_do_not_mix() -> None:
    plans = [plan_of(make(Attentive), image(), attention=mode) for mode in ("head_dim", "heads")]
    with pytest.raises(PlanError, match=r"^'plan 1' was made with attention='head_dim', 'plan 2' with 'heads'\."):
        study.similarity(plans)
