"""Every criterion against the same number computed the long way, and the options of ranking that all criteria share.

What a channel owns is written down by hand (``OWNED``, ``READ``, ``FILTERS``); the sums are plain loops over masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import chain
from torch import Tensor, nn

import fxprune
from fxprune import methods
from fxprune.errors import InputError
from fxprune.methods import registry
from fxprune.training import measure

pytestmark = pytest.mark.usefixtures("one_thread")

AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "mean": lambda values: sum(values) / len(values),
    "max": max,
}
NORMALIZERS: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "sum": sum,
    "none": lambda values: 1.0,
}


class Mixed(nn.Module):
    """A residual stream of 8 around a depthwise convolution of 12, a convolution in two groups, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.expand, self.norm1 = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.follow(x)["logits"]

    def follow(self, x: Tensor) -> dict[str, Tensor]:
        """Every tensor that a layer reads, by the layer's name."""
        seen = {"expand": F.relu(self.norm(self.stem(x)))}
        y = F.relu(self.norm1(self.expand(seen["expand"])))
        seen["project"] = F.relu(self.norm2(self.depthwise(y)))
        seen["grouped"] = F.relu(seen["expand"] + self.project(seen["project"]))
        seen["hidden"] = F.relu(self.grouped(seen["grouped"])).mean((2, 3))
        seen["head"] = F.relu(self.hidden(seen["hidden"]))
        seen["logits"] = self.head(seen["head"])
        return seen


# group -> the (parameter, dim) that a channel owns a slice of; dim "in" of the grouped convolution is its input
OWNED: dict[str, list[tuple[str, Any]]] = {
    "stem": [("stem.weight", 0), ("stem.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("expand.weight", 1),
             ("project.weight", 0), ("project.bias", 0), ("grouped.weight", "in")],
    "expand": [("expand.weight", 0), ("expand.bias", 0), ("norm1.weight", 0), ("norm1.bias", 0),
               ("depthwise.weight", 0), ("depthwise.bias", 0), ("norm2.weight", 0), ("norm2.bias", 0),
               ("project.weight", 1)],
    "grouped": [("grouped.weight", 0), ("grouped.bias", 0), ("hidden.weight", 1)],
    "hidden": [("hidden.weight", 0), ("hidden.bias", 0), ("head.weight", 1)],
}  # fmt: skip
READ = {  # group -> the (weight, dim) that read it; the layer's name is that of the tensor in ``follow``
    "stem": [("expand.weight", 1), ("grouped.weight", "in")],
    "expand": [("project.weight", 1)],
    "grouped": [("hidden.weight", 1)],
    "hidden": [("head.weight", 1)],
}
FILTERS = {
    "stem": ["stem.weight", "project.weight"],
    "expand": ["expand.weight", "depthwise.weight"],
    "grouped": ["grouped.weight"],
    "hidden": ["hidden.weight"],
}
SIZES = {"stem": 8, "expand": 12, "grouped": 12, "hidden": 10}


def sliced(tensor: Tensor, dim: Any, channel: int) -> Tensor:
    """What a channel owns of a parameter."""
    if dim == "in":  # of 8 channels in two groups: four columns of the six filters of its own group
        group, column = divmod(channel, 4)
        return tensor[group * 6 : group * 6 + 6, column]
    return tensor.select(dim, channel)


@cache
def net() -> Mixed:
    model = randomise(Mixed(), seed=3).double().eval()
    assert isinstance(model, Mixed)
    return model


@cache
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 5, (size,), generator=generator),
        )
        for size in (4, 3, 4)
    ]


def weights() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net().named_parameters()}


@cache
def gradients(single: bool) -> list[dict[str, Tensor]]:
    """Of the loss of every batch, or of every sample by itself."""
    parts = batches()
    if single:
        parts = [(x[i : i + 1], y[i : i + 1]) for x, y in parts for i in range(len(x))]
    model, found = net(), []
    for x, y in parts:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        found.append(dict(zip([n for n, _ in model.named_parameters()], grads, strict=True)))
    return found


@cache
def inputs(layer: str) -> Tensor:
    """What a layer reads over all data, ``[channels, everything else]``."""
    with torch.no_grad():
        read = [net().follow(x)[layer].transpose(0, 1).flatten(1) for x, _ in batches()]
    return torch.cat(read, 1)


# -- the long way: group, channel, aggregate -> score ------------------------------------------------------------------

Long = Callable[[str, int, str], float]


def magnitude(power: int) -> Long:
    def score(group: str, channel: int, aggregate: str) -> float:
        owned = [sliced(weights()[name], dim, channel) for name, dim in OWNED[group]]
        total = AGGREGATES[aggregate]([float((w.abs() ** power).sum()) for w in owned])
        return total ** (1 / power)

    return score


def bn_scale(group: str, channel: int, aggregate: str) -> float:
    scales = [float(weights()[n][channel].abs()) for n, _ in OWNED[group] if n.startswith("norm") and "weight" in n]
    return AGGREGATES[aggregate](scales)


def fpgm(group: str, channel: int, aggregate: str) -> float:
    layers = [weights()[name] for name in FILTERS[group]]
    return AGGREGATES[aggregate]([sum(float((w[channel] - other).norm()) for other in w) for w in layers])


def lamp(group: str, channel: int, aggregate: str) -> float:
    squares = [magnitude(2)(group, c, aggregate) ** 2 for c in range(SIZES[group])]
    return squares[channel] / sum(s for s in squares if s >= squares[channel])


def saliency(single: bool, factor: float) -> Long:
    def score(group: str, channel: int, aggregate: str) -> float:
        found = []  # [batches or samples, places]
        for grads in gradients(single):
            products = {name: grads[name] * w for name, w in weights().items()}
            found.append([float(sliced(products[name], dim, channel).sum()) for name, dim in OWNED[group]])
        if aggregate == "sum":  # everything the channel owns goes at once
            return factor * sum(sum(places) ** 2 for places in found) / len(found)
        means = [sum(row[place] ** 2 for row in found) / len(found) for place in range(len(found[0]))]
        return factor * AGGREGATES[aggregate](means)

    return score


def activation(kind: str) -> Long:
    def score(group: str, channel: int, aggregate: str) -> float:
        rows = [inputs(name.partition(".")[0])[channel] for name, _ in READ[group]]
        if kind == "mean":
            return AGGREGATES[aggregate]([float(row.abs().mean()) for row in rows])
        return AGGREGATES[aggregate]([1 - sum(float(v) == 0 for v in row) / len(row) for row in rows])

    return score


def wanda(group: str, channel: int, aggregate: str) -> float:
    def of(name: str, dim: Any) -> float:
        row = inputs(name.partition(".")[0])[channel]
        return float(sliced(weights()[name], dim, channel).abs().sum() * (row**2).mean().sqrt())

    return AGGREGATES[aggregate]([of(name, dim) for name, dim in READ[group]])


CASES: dict[str, tuple[Callable[..., Any], Long, list[str]]] = {
    "l1": (methods.L1, magnitude(1), [*OWNED]),
    "l2": (methods.L2, magnitude(2), [*OWNED]),
    "bn_scale": (methods.BNScale, bn_scale, ["stem", "expand"]),
    "fpgm": (methods.FPGM, fpgm, [*OWNED]),
    "lamp": (methods.LAMP, lamp, [*OWNED]),
    "taylor": (methods.Taylor, saliency(False, 1.0), [*OWNED]),
    "fisher": (methods.Fisher, saliency(True, 0.5), [*OWNED]),
    "activation": (methods.Activation, activation("mean"), [*OWNED]),
    "apoz": (lambda **o: methods.Activation(kind="apoz", **o), activation("apoz"), [*OWNED]),
    "wanda": (methods.Wanda, wanda, [*OWNED]),
}


@cache
def graph() -> fxprune.ChannelGraph:
    return fxprune.analyze(net(), batches()[0][0])


@cache
def measured() -> Any:
    module = fxprune.record(net(), batches()[0][0])
    return measure(module, graph(), registry.NEEDS, batches(), None)


def state(**options: Any) -> methods.ModelState:
    tensors = dict([*net().named_parameters(), *net().named_buffers()])
    return methods.ModelState(graph(), tensors, 0, measured(), **options)


def by_index(group: fxprune.ChannelGroup, scores: Any) -> list[float]:
    """Scores in the order of the rows of the layer that makes the channels."""
    (factor,) = (f for f in graph().by_name[f"{group.name}.weight"].labels if f.dim == 0)
    of = dict(zip(group.channels.reshape(-1).tolist(), scores.reshape(-1).tolist(), strict=True))
    return [of[channel] for channel in factor.rows()[0].tolist()]


def test_the_net_has_these_groups() -> None:
    found = {group.name: (group.blocks, group.size) for group in graph().prunable}
    assert found == {"stem": (2, 4), "expand": (1, 12), "grouped": (2, 6), "hidden": (1, 10)}


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", CASES)
def test_a_criterion_scores_as_computed_the_long_way(name: str, aggregate: str) -> None:
    make, long, scored = CASES[name]
    expected = {g: [long(g, c, aggregate) for c in range(SIZES[g])] for g in scored}
    assert all(len({round(v, 12) for v in values}) > 1 for values in expected.values()), "a flat score shows nothing"
    for normalize, scale in NORMALIZERS.items():
        found = methods.score_groups(make(aggregate=aggregate, normalize=normalize), state())
        for group, scores in zip(graph().groups, found, strict=True):
            if group.name not in scored:
                assert scores is None
                continue
            assert scores is not None
            by = scale(expected[group.name])
            np.testing.assert_allclose(
                by_index(group, scores), [v / by for v in expected[group.name]], rtol=2e-6 if name in APPROX else 1e-9
            )


APPROX = ("activation", "apoz", "wanda")  # activations are summed in float32


@pytest.mark.parametrize("entries", [1, 30, 100])
def test_large_weights_are_summed_a_few_rows_at_a_time(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = methods.score_groups(methods.L1(), state())
    monkeypatch.setattr("fxprune.methods.state._ENTRIES_IN_CACHE", entries)
    for found, expected in zip(methods.score_groups(methods.L1(), state()), whole, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-12)


class Complex(nn.Module):
    """A product with complex numbers, as one parameter or as two."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(4, 6), nn.Linear(5, 3)
        real, imaginary = torch.randn(2, 6, 5, dtype=torch.float64).unbind()
        if pairs:
            self.real, self.imaginary = nn.Parameter(real), nn.Parameter(imaginary)
        else:
            self.weight = nn.Parameter(torch.complex(real, imaginary))

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        if hasattr(self, "real"):
            return self.back((x @ self.real).square() + (x @ self.imaginary).square())
        return self.back(torch.einsum("bi,io->bo", x.to(torch.complex128), self.weight).abs().square())


@pytest.mark.parametrize("criterion", [methods.L2(), methods.Taylor(), methods.Fisher()])
def test_a_complex_weight_counts_with_both_parts(criterion: Any) -> None:
    def scored(pairs: bool) -> list[Any]:
        torch.manual_seed(0)
        model = Complex(pairs).double()
        data = [(torch.randn(4, 4, dtype=torch.float64), torch.randint(0, 3, (4,))) for _ in range(2)]
        found = fxprune.analyze(model, data[0][0])
        seen = measure(fxprune.record(model, data[0][0]), found, registry.NEEDS, data, None)
        state = methods.ModelState(found, dict(model.named_parameters()), 0, seen)
        scores = zip(found.groups, methods.score_groups(criterion, state), strict=True)
        return sorted(np.sort(own.reshape(-1)).tolist() for group, own in scores if own is not None)

    np.testing.assert_allclose(np.concatenate(scored(False)), np.concatenate(scored(True)), rtol=1e-9)


def test_activations_that_are_complex_count_by_their_magnitude() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(4, 6), nn.Linear(3, 2)
            self.first = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64))
            self.second = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))

        def between(self, x: Tensor) -> Tensor:
            return self.front(x).to(torch.complex64) @ self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.back((self.between(x) @ self.second).abs())

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(16, 4)
    found = fxprune.analyze(model, x)
    seen = measure(fxprune.record(model, x), found, registry.NEEDS, [(x, torch.zeros(16).long())], None)
    group = next(group for group in found.groups if group.size == 5)
    by_channel = [dict(zip(a.channels.tolist(), a.absolute.tolist(), strict=True)) for a in seen.activations]
    read = next(values for values in by_channel if group.channels.reshape(-1)[0] in values)
    with torch.no_grad():
        expected = model.between(x).abs().mean(0)
    np.testing.assert_allclose([read[c] for c in group.channels.reshape(-1)], expected, rtol=1e-5)


def test_the_slices_of_channels_that_make_several_rows() -> None:
    class Threefold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.deep = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 12, 3, groups=4)
            self.head = nn.Conv2d(12, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.deep(self.stem(x)))

    model = randomise(Threefold()).eval()
    found = fxprune.analyze(model, torch.randn(2, 3, 4, 4))
    (group,) = found.prunable
    slices = dict(methods.ModelState(found, dict(model.named_parameters())).slices(group))
    assert slices.keys() == {"stem.weight", "deep.weight"}
    torch.testing.assert_close(slices["deep.weight"], model.get_parameter("deep.weight").reshape(4, 27).double())


def test_every_registered_criterion_is_among_these() -> None:
    criteria = {name for name in methods.available() if isinstance(methods.resolve(name), methods.Criterion)}
    assert criteria == {*CASES, "random", "obs"} - {"apoz"}  # of obs see tests/reconstruction


def test_random_scores_are_uniform_and_of_the_seed() -> None:
    first, again, other = (
        methods.score_groups(methods.Random(), methods.ModelState(graph(), {}, seed)) for seed in (0, 0, 1)
    )
    for a, b, c in zip(first, again, other, strict=True):
        if a is None:
            continue
        assert b is not None
        assert c is not None
        np.testing.assert_array_equal(a, b)
        assert (a != c).all()
        assert len(np.unique(a)) == a.size
        assert a.mean() == pytest.approx(1)


# -- what is left after a step -----------------------------------------------------------------------------------------


def three(seed: int = 0) -> nn.Sequential:
    """4 -> 6 -> 8 -> 3, linear."""
    model = randomise(chain(4, 6, 8, 3), seed).eval()
    assert isinstance(model, nn.Sequential)
    return model


def cut(model: nn.Module, x: Tensor, method: Any, **options: Any) -> dict[str, list[int]]:
    """Layer -> kept rows, of the layers that lost some."""
    rare = {name: options.pop(name) for name in ("steps", "max_ratio") if name in options}
    options["options"] = fxprune.Options(**rare)
    small = fxprune.prune(model, x, method=method, verify=False, progress=False, **options)
    kept = small.meta["fxprune"].plan.kept
    return {name.removesuffix(".weight"): dims[0] for name, dims in kept.items() if 0 in dims and "weight" in name}


LONG = {
    "l2": lambda own, filters: own.norm(dim=1),
    "fpgm": lambda own, filters: torch.cdist(filters, filters).sum(1),
}


def rows(model: nn.Sequential, layer: int, left: dict[int, list[int]], name: str) -> Tensor:
    """Scores of the units that are left, with the weights that are left, divided by their mean."""
    here, after = model[layer], model[layer + 2]
    before = left.get(layer - 2, [*range(here.in_features)])
    filters = here.weight.detach().double()[left[layer]][:, before]
    behind = after.weight.detach().double()[:, left[layer]]
    behind = behind[left.get(layer + 2, [*range(after.out_features)])]
    own = torch.cat([filters, here.bias.detach().double()[left[layer], None], behind.T], 1)
    scores = LONG[name](own, filters)
    return scores / scores.mean()


@pytest.mark.parametrize("name", LONG)
def test_every_step_scores_what_is_left(name: str) -> None:
    differ = 0
    for seed in range(3):
        model = three(seed)
        left = {0: [*range(6)], 2: [*range(8)]}
        for keep in (11, 9, 7):  # of 14: half in three steps
            ranked = sorted(
                (float(s), layer, unit)
                for layer in left
                for unit, s in zip(left[layer], rows(model, layer, left, name), strict=True)
            )
            for _, layer, unit in ranked[: len(ranked) - keep]:
                left[layer].remove(unit)
        found = cut(model, torch.randn(2, 4), name, channels=0.5, steps=3)
        assert found == {str(layer): units for layer, units in left.items() if len(units) < model[layer].out_features}
        differ += found != cut(model, torch.randn(2, 4), name, channels=0.5)
    assert differ, "one step gives the same in all cases: the test shows nothing"


def test_data_are_measured_again_after_every_step() -> None:
    seen = []

    @dataclass(frozen=True)
    class Watch(methods.Activation):
        def score(self, group: fxprune.ChannelGroup, state: methods.ModelState) -> Any:
            scores = super().score(group, state)
            seen.append((group.name, None if state.kept is None else state.kept[group.channels].copy(), scores))
            return scores

    model = three()
    data = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    found = cut(model, data[0][0], Watch(), channels=0.5, steps=2, data=data)
    assert [name for name, *_ in seen] == ["0", "2", "0", "2"]
    assert all(kept is None for _, kept, _ in seen[:2])
    left = {}
    for (name, kept, scores), (_, _, before) in zip(seen[2:], seen[:2], strict=True):
        assert (scores[~kept] <= before[~kept]).all()
        left[int(name)] = np.flatnonzero(kept[0]).tolist()
    assert sum(map(len, left.values())) == 10  # of 14, after half of the way to 7: 10.5
    with torch.no_grad():
        hidden = F.relu(model[0](data[0][0]))[:, left[0]]
        second = F.relu(F.linear(hidden, model[2].weight[:, left[0]], model[2].bias)).abs().mean(0)
    kept, scores = seen[3][1][0], seen[3][2][0]
    np.testing.assert_allclose(scores[kept], second[left[2]].numpy(), rtol=1e-5)
    assert set(found["2"]) <= set(left[2])


def test_what_an_earlier_step_cut_stays_cut_whatever_the_scores() -> None:
    @dataclass(frozen=True)
    class Falling:
        """Scores below zero, far apart between groups, that are turned over in every step."""

        normalize = "none"

        def score(self, group: fxprune.ChannelGroup, state: methods.ModelState) -> Any:
            turn = 1 if state.kept is None else -1
            return np.arange(group.size)[None] * turn - {"0": 1.0, "2": 1000.0}[group.name] * (turn < 0)

    first = cut(three(), torch.randn(2, 4), Falling(), channels=0.75)
    both = cut(three(), torch.randn(2, 4), Falling(), channels=0.5, steps=2)
    assert all(set(both[layer]) <= set(kept) for layer, kept in first.items())
    assert sum(map(len, both.values())) == 7


# -- which channels are compared, and how far --------------------------------------------------------------------------


class Towers(nn.Module):
    """Two linear and two convolutional hidden layers, the convolutions with weights a hundred times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 16), (16, 16), (16, 16)))
        self.a, self.b, self.head = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.one(F.relu(self.stem(x)))))).mean((2, 3))
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


@dataclass(frozen=True)
class Given:
    """Scores that are written down: ``scale[group] * (1, 2, 3, ...)``, the first channels lowest."""

    scale: tuple[tuple[str, float], ...]
    normalize: str = "none"

    def score(self, group: fxprune.ChannelGroup, state: methods.ModelState) -> Any:
        scale = dict(self.scale)[group.name]
        return np.broadcast_to((np.arange(group.size) + 1.0) * scale, group.channels.shape)


SCALES = Given((("stem", 100.0), ("one", 100.0), ("two", 5.0), ("a", 1.0), ("b", 3.0)))


def test_isomorphic_ranking_compares_groups_of_one_structure_only() -> None:
    model, x = randomise(Towers()).eval(), torch.randn(2, 3, 6, 6)
    sizes = {"stem": 16, "one": 16, "two": 16, "a": 24, "b": 24}
    structures = [("stem", "one"), ("two",), ("a", "b")]  # two convolutions, a convolution and a linear, two linears
    kept = {name: len(v) for name, v in cut(model, x, SCALES, channels=0.5, scope="isomorphic").items()}
    for same in structures:
        total = sum(sizes[n] for n in same)
        assert abs(sum(kept.get(n, sizes[n]) for n in same) - total / 2) <= 1, "every structure loses the same share"
    assert kept["stem"] == kept["one"] == 8
    # of 1, 2, ..., 24 and 3, 6, ..., 72 the smallest half: 18 and 6
    assert (kept["a"], kept["b"]) == (24 - 18, 24 - 6)
    everywhere = {name: len(v) for name, v in cut(model, x, SCALES, channels=0.5).items()}
    assert "stem" not in everywhere, "together, only the small scores go"
    assert everywhere["a"] < kept["a"]


@pytest.mark.parametrize("scope", ["global", "isomorphic", "uniform"])
@pytest.mark.parametrize("steps", [1, 3])
def test_alignment_limits_and_steps_together(scope: Any, steps: int) -> None:
    model, x = randomise(Towers()).eval(), torch.randn(2, 3, 6, 6)
    options: dict[str, Any] = {"scope": scope, "steps": steps, "round_to": 4, "max_ratio": {"one": 0.25, "[ab]": 0.5}}
    kept = cut(model, x, SCALES, channels=0.62, **options)
    sizes = {"stem": 16, "one": 16, "two": 16, "a": 24, "b": 24}
    counts = {name: len(kept.get(name, range(size))) for name, size in sizes.items()}
    assert all(count % 4 == 0 for count in counts.values())
    assert counts["one"] >= 12
    assert counts["a"] >= 12
    assert counts["b"] >= 12
    assert 0.62 * 96 - 4 < sum(counts.values()) <= 0.62 * 96
    for name, rows_kept in kept.items():
        assert rows_kept == [*range(sizes[name] - counts[name], sizes[name])], "the highest scores stay"


def test_max_ratio_by_pattern() -> None:
    model, x = randomise(Towers()).eval(), torch.randn(2, 3, 6, 6)
    free = cut(model, x, SCALES, channels=0.7)
    assert len(free["a"]) <= 6
    assert set(free) == {"two", "a", "b"}
    for pattern, share in (("a", 0.5), ("a.weight", 0.26), ("[a]*", 0.0)):
        held = cut(model, x, SCALES, channels=0.7, max_ratio={pattern: share})
        assert len(held.get("a", range(24))) == 24 - int(24 * share)
        assert len(held["b"]) < len(free["b"]), "others make up for it"
    least = cut(model, x, SCALES, channels=0.7, max_ratio={"*": 0.5, "a": 0.25})
    assert len(least["a"]) == 18, "of two limits the smaller holds"
    assert min(len(v) for v in least.values()) >= 8


def test_a_limit_is_of_what_a_layer_makes_not_of_what_it_reads() -> None:
    model, x = randomise(Towers()).eval(), torch.randn(2, 3, 6, 6)
    free = cut(model, x, SCALES, channels=0.7)
    assert cut(model, x, SCALES, channels=0.7, max_ratio={"stem": 0.1}) == free
    assert len(cut(model, x, SCALES, channels=0.7, max_ratio={"b": 0.0})["a"]) <= len(free["a"]), "b reads what a makes"
    with pytest.raises(InputError, match=r"^max_ratio has the pattern 'layer\*', which fits no layer that makes"):
        cut(model, x, SCALES, channels=0.7, max_ratio={"layer*": 0.5})


@pytest.mark.parametrize("name", [name for name in CASES if name != "apoz"])
def test_a_weight_that_an_embedding_shares_is_known_by_both_names(name: str) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.one, self.two = nn.Embedding(11, 12), nn.Linear(12, 16), nn.Linear(16, 12)
            self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(12, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.table(tokens).mean(1)
            return self.head(x + self.two(self.norm(self.one(x)).relu()))

    tokens = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(0))
    options: Any = {} if name in ("l1", "l2", "bn_scale", "fpgm", "lamp") else {"data": [(tokens, torch.arange(6))]}
    small = fxprune.prune(
        randomise(Words()).eval(), tokens, method=name, channels=0.6, round_to=1, progress=False, **options
    )
    assert small.meta["fxprune"].oracle_error < 1e-5
    assert small.get_parameter("head.weight") is small.get_parameter("table.weight")
