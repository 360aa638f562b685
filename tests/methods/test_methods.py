"""Criteria score as computed by hand; the registry lists, refuses and takes in methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Shuffled, image, make
from torch import nn

import fxprune
from fxprune import methods
from fxprune.errors import InputError
from fxprune.methods import registry


def two_layers() -> nn.Sequential:
    """3 -> 4 -> 2: the hidden channels own rows of the first layer, the norm, and columns of the second."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2, 2], [0, 3, 4], [1, 1, 1], [-6, 0, 8]]))
        net[0].bias.copy_(torch.tensor([4.0, 0, -1, 0]))
        net[1].weight.copy_(torch.tensor([-0.5, 2.0, 1.0, 0.0]))
        net[1].bias.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
        net[1].running_mean.fill_(100.0)  # statistics are no weights
        net[3].weight.copy_(torch.tensor([[1.0, 2, 3, 4], [-1, -2, 0, 5]]))
    return net


HAND = {
    # row, bias, scale, shift, column
    "l1": [1 + 2 + 2 + 4 + 0.5 + 0 + 2, 7 + 0 + 2 + 1 + 4, 3 + 1 + 1 + 1 + 3, 14 + 0 + 0 + 2 + 9],
    "l2": [(9 + 16 + 0.25 + 0 + 2) ** 0.5, (25 + 4 + 1 + 8) ** 0.5, (3 + 1 + 1 + 1 + 9) ** 0.5, (100 + 4 + 41) ** 0.5],
    "bn_scale": [0.5, 2.0, 1.0, 0.0],
}


def state_of(model: nn.Module, x: torch.Tensor, seed: int = 0) -> methods.ModelState:
    graph = fxprune.analyze(model, x)
    return methods.ModelState(graph, dict([*model.named_parameters(), *model.named_buffers()]), seed)


@pytest.mark.parametrize("name", list(HAND))
def test_scores_computed_by_hand(name: str) -> None:
    state = state_of(two_layers(), torch.randn(2, 3))
    (group,) = state.graph.prunable
    scores = methods.resolve(name).score(group, state)
    assert scores is not None
    assert scores.shape == (1, 4)
    order = np.argsort(group.channels[0])
    np.testing.assert_allclose(scores[0][order], HAND[name], rtol=1e-12)


@pytest.mark.parametrize("name", list(HAND))
def test_the_lowest_scores_go(name: str) -> None:
    pruned = fxprune.prune(two_layers(), torch.randn(2, 3), method=name, channels=0.5, progress=False)
    expected = sorted(int(i) for i in np.argsort(HAND[name])[2:])
    assert pruned.meta["fxprune"].plan.kept["0.weight"] == {0: expected}


def test_a_channel_of_a_residual_net_owns_all_layers_that_share_it() -> None:
    model = make()
    state = state_of(model, image())
    group = next(g for g in state.graph.groups if g.name == "stem.0")
    scores = methods.L1().score(group, state)
    assert scores is not None
    p = dict(model.named_parameters())
    by_hand = sum(
        p[name].detach().abs().double().transpose(0, dim).flatten(1 if p[name].ndim > 1 else 0).reshape(16, -1).sum(1)
        for name, dim in [("stem.0.weight", 0), ("stem.0.bias", 0), ("stem.1.weight", 0), ("stem.1.bias", 0),
                          ("up.0.weight", 1), ("down.0.weight", 0), ("down.0.bias", 0), ("down.1.weight", 0),
                          ("down.1.bias", 0), ("head.weight", 1)]
    )  # fmt: skip
    np.testing.assert_allclose(scores[0][np.argsort(group.channels[0])], np.asarray(by_hand), rtol=1e-9)


def test_grouped_weights_are_read_group_by_group() -> None:
    model = make(Shuffled)
    state = state_of(model, image())
    group = next(g for g in state.graph.groups if g.name == "stem")
    scores = methods.L1().score(group, state)
    assert scores is not None
    assert scores.shape == (2, 8)
    p = {name: parameter.detach().abs().double() for name, parameter in model.named_parameters()}
    own = p["stem.weight"].sum((1, 2, 3)) + p["stem.bias"]
    read = p["one.weight"].view(2, 8, 8, 9).sum((1, 3)).reshape(16)
    np.testing.assert_allclose(scores[np.argsort(group.channels[:, 0])], (own + read).reshape(2, 8), rtol=1e-9)


def test_bn_scale_says_nothing_of_channels_that_pass_no_norm() -> None:
    state = state_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))
    (group,) = state.graph.prunable
    assert methods.BNScale().score(group, state) is None
    report = fxprune.prune(make(), image(), method="bn_scale", channels=0.5, progress=False).meta["fxprune"]
    assert report.params_after < report.params_before


def test_random_scores_depend_on_the_seed_and_the_group() -> None:
    state, other = state_of(make(), image(), 1), state_of(make(), image(), 2)
    first, second = (methods.Random().score(g, state) for g in state.graph.prunable)
    assert first is not None
    assert second is not None
    assert first.shape == (1, 16)
    assert len(np.unique(np.concatenate([first[0], second[0]]))) == 40
    np.testing.assert_array_equal(first, methods.Random().score(state.graph.prunable[0], state))
    assert (first != methods.Random().score(other.graph.prunable[0], other)).all()


# -- the registry


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.mark.usefixtures("_own_registry")
def test_a_method_of_a_third_party() -> None:
    @methods.register("first")
    @dataclass(frozen=True)
    class First:
        """Keeps the first channels."""

        sign: int = -1

        def score(self, group: fxprune.ChannelGroup, state: methods.ModelState) -> Any:
            return np.tile(np.arange(group.size) * self.sign + 100.0, (group.blocks, 1))

    assert methods.available()["first"] == "Keeps the first channels."
    for method, expected in (("first", [0, 1]), (First(), [0, 1]), (First(sign=1), [2, 3])):
        report = fxprune.prune(two_layers(), torch.randn(2, 3), method=method, channels=0.5, progress=False).meta[
            "fxprune"
        ]
        assert report.plan.kept["0.weight"] == {0: expected}
    assert report.method == "First(sign=1)"
    with pytest.raises(InputError, match=r"Known methods: .*first, .*wanda\.$"):
        methods.resolve("second")


@pytest.mark.usefixtures("_own_registry")
def test_two_methods_of_one_name() -> None:
    with pytest.raises(ValueError, match=r"^two methods are named 'l2'$"):
        methods.register("l2")(type("Other", (), {}))
    assert type(methods.resolve("l2")) is methods.L2


def test_an_entry_point_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "theirs"

        @staticmethod
        def load() -> type:
            return methods.L1

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry] if group == "fxprune.methods" else [])
    assert set(methods.available()) == {*registry._METHODS, "theirs"}
    assert methods.resolve("theirs") == methods.L1()


def test_an_entry_point_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "broken_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken_methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fxprune.methods]\nbroken = broken_methods.nowhere:Method\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = (
        r"^The method 'broken' cannot be loaded from broken_methods\.nowhere:Method \(ModuleNotFoundError: .*\)\. "
    )
    for ask in (methods.available, lambda: methods.resolve("broken")):
        with pytest.raises(InputError, match=message + r"Repair or uninstall the package that brings it\.$"):
            ask()
    assert methods.resolve("l2") == methods.L2(), "others work"


def test_methods_have_a_description() -> None:
    assert all(len(line) > 20 for line in methods.available().values())
    assert methods.resolve("l2") == methods.L2()
