"""Latency as a budget: what is timed is what will run, and the whole model has the last word."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from nets import Attentive, Shuffled, Small, image, make
from torch import Tensor, nn

import fxprune
from fxprune.deploy import Kernel, latency
from fxprune.deploy.latency import LatencyModel
from fxprune.errors import BudgetError, InputError, ModelError
from fxprune.groups import workload
from fxprune.pipeline import Cut, Dense, Stages, choose, compress, record_and_analyse
from fxprune.selection.budget import Budget, remaining


class Everything(nn.Module):
    """Convolutions of all kinds, and products whose second factor is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(24, 24, 5, padding=2, groups=24)
        self.grouped = nn.Conv2d(24, 32, 3, padding=2, dilation=2, groups=4)
        self.up = nn.ConvTranspose2d(32, 20, 3, stride=2, padding=1, output_padding=1)
        self.line = nn.Conv1d(20, 16, 3, padding="same")
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(self.deep(self.stem(x).relu())).relu()).relu()
        x = self.line(x.flatten(2)).transpose(1, 2)
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return self.head((scores.softmax(-1) @ self.value(x)).mean(1))


def recorded(model: nn.Module, x: Tensor) -> Dense:
    return record_and_analyse(model, (x,), {}, "head_dim", (), Stages(progress=False))


def macs(kernel: Kernel) -> float:
    """Of a kernel, by its sizes alone."""
    first, second = kernel.shapes
    if kernel.kind == "product":
        return float(math.prod(first) * second[-1])
    options = dict(kernel.options)
    if options["transposed"]:
        return float(math.prod(first) * math.prod(second[1:]))
    stride, padding, dilation = (options[name] for name in ("stride", "padding", "dilation"))
    pixels = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(first[2:], second[2:], stride, padding, dilation, strict=True)
    ]
    return float(first[0] * math.prod(pixels) * math.prod(second))


def by_macs(kernels: Sequence[Kernel]) -> list[float]:
    return [macs(kernel) for kernel in kernels]


def model_of(dense: Dense, seen: list[Kernel] | None = None, align: int = 1, dense_ms: float = 0.0) -> LatencyModel:
    def time(kernels: Sequence[Kernel]) -> list[float]:
        if seen is not None:
            seen.extend(kernels)
        return by_macs(kernels)

    works = workload(dense.module, dense.graph, dense.args, dense.kwargs)
    return LatencyModel(works, dense.graph, dense_ms or dense.graph.macs(), align, time)


def test_convolutions_are_timed_with_counts_that_their_groups_allow() -> None:
    """Groups that stay, groups that go with their channels, and a depthwise convolution with a multiplier."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(3, 96, 1), nn.ReLU(), nn.Conv2d(96, 96, 3, groups=12), nn.ReLU(),
                nn.Conv2d(96, 192, 3, groups=96), nn.ReLU(), nn.ConvTranspose2d(192, 96, 3, groups=6), nn.ReLU(),
                nn.Conv2d(96, 5, 1),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    seen: list[Kernel] = []
    model_of(recorded(Grouped().eval(), torch.randn(1, 3, 8, 8)), seen, align=16)
    for kernel in seen:
        x, weight = (torch.empty(shape, device="meta") for shape in kernel.shapes)
        torch.ops.aten.convolution(x, weight, None, **dict(kernel.options))  # raises where sizes do not fit
    groups = {dict(kernel.options)["groups"] for kernel in seen if kernel.shapes[1][2:] == (3, 3)}
    assert {12, 96, 48, 6} <= groups, "as in the dense model, and half of those that go with their channels"
    assert not {1, 2, 3, 4} & groups, "groups that stay are all there"


NETS = [(Small, image()), (Shuffled, image()), (Attentive, image()), (Everything, torch.randn(1, 3, 16, 16))]


def network(kind: type[nn.Module]) -> nn.Module:
    return make(kind) if kind is not Everything else randomise(Everything()).eval()


@pytest.mark.parametrize(("kind", "x"), NETS)
def test_the_timed_kernels_of_a_dense_model_are_its_macs(kind: type[nn.Module], x: Tensor) -> None:
    dense = recorded(network(kind), x)
    assert model_of(dense)(dense.graph.everything()) == pytest.approx(1e6 * dense.graph.macs(), rel=1e-6)


@pytest.mark.parametrize(("kind", "x"), NETS)
@pytest.mark.parametrize("attention", ["head_dim", "heads"])
def test_the_sizes_predicted_for_a_plan_are_those_of_the_pruned_model(
    kind: type[nn.Module], x: Tensor, attention: Any
) -> None:
    """Time here is a count of MACs, which interpolation in channels keeps: any wrong axis would show."""
    model = network(kind)
    dense = record_and_analyse(model, (x,), {}, attention, (), Stages(progress=False))
    pruned = fxprune.prune(
        model, x, channels=0.6, method="random", round_to=1, attention=attention, progress=False, verify=False
    )
    keep = pruned.meta["fxprune"].plan.channels(dense.graph)
    small = recorded(pruned, x)
    predicted = model_of(dense)(keep)
    assert predicted == pytest.approx(1e6 * small.graph.macs(), rel=1e-6)
    assert predicted < 0.9e6 * dense.graph.macs()


def test_kernels_are_timed_at_aligned_counts_and_at_the_dense_one() -> None:
    model, x, seen = nn.Sequential(nn.Linear(4, 72), nn.ReLU(), nn.Linear(72, 40)), torch.randn(7, 4), []
    model_of(recorded(model, x), seen, align=16)
    assert {kernel.shapes[1] for kernel in seen} == {
        *((4, size) for size in (16, 32, 48, 72)), *((size, 40) for size in (16, 32, 48, 72)),
    }  # fmt: skip


def test_equal_kernels_are_timed_once() -> None:
    layers = [layer for _ in range(5) for layer in (nn.Linear(32, 32), nn.ReLU())]
    seen: list[Kernel] = []
    model_of(recorded(nn.Sequential(nn.Linear(3, 32), *layers, nn.Linear(32, 3)), torch.randn(2, 3)), seen, align=8)
    assert len({kernel.name for kernel in seen}) == len(seen)


def test_what_no_kernel_explains_goes_by_the_elements_of_the_other_ops() -> None:
    model, x = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 4)), torch.randn(1, 4)
    dense = recorded(model, x)
    whole = dense.graph.everything()
    half = whole.copy()
    (group,) = dense.graph.prunable
    half[group.channels[0, :32]] = False
    alone, twice = (model_of(dense, dense_ms=share * dense.graph.macs()) for share in (1, 2))
    assert twice(whole) == 2 * alone(whole)
    assert alone(half) == pytest.approx(0.5 * alone(whole), rel=1e-6), "only the products"
    assert twice(half) == pytest.approx(0.5 * twice(whole), rel=1e-6), "and the activation between them"


# -- the loop ----------------------------------------------------------------------------------------------------------


class Fake:
    """A stopwatch whose measurements are a function of the MACs that are left."""

    def __init__(self, measure: Any, dense: int):
        self.measure, self.dense, self.seen = measure, dense, []

    def dense_ms(self) -> float:
        return float(self.dense)

    def ratio(self, pruned: Any) -> float:
        self.seen.append(pruned.meta["fxprune"].macs_after / self.dense)
        return float(self.measure(self.seen[-1]))

    def beside(self, pruned: Any, runs: int) -> fxprune.Latency:
        ratio = self.measure(pruned.meta["fxprune"].macs_after / self.dense)
        return fxprune.Latency(1.0, ratio, "FakeProvider", "fake", 0, 1, runs, "fake 1.0")


class Wide(Small):
    """Widths at which one channel is far less than 1 % of the cost."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(64, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(96, 64, 1), nn.BatchNorm2d(64))
        self.head = nn.Linear(64, 10)


def faked(monkeypatch: pytest.MonkeyPatch, measure: Any) -> tuple[nn.Module, list[float]]:
    model = make(Wide)
    fake = Fake(measure, fxprune.analyze(model, image()).macs())
    monkeypatch.setattr(latency, "Stopwatch", lambda *_: fake)
    monkeypatch.setattr(latency, "kernel_ms", lambda kernels, provider, threads: by_macs(kernels))
    return model, fake.seen


@pytest.mark.parametrize("measure", [lambda r: r, lambda r: 0.3 + 0.7 * r, lambda r: r**2, lambda r: 0.8 * r])
@pytest.mark.parametrize("target", [0.45, 0.6])
def test_the_measured_latency_is_the_budget(monkeypatch: pytest.MonkeyPatch, measure: Any, target: float) -> None:
    model, seen = faked(monkeypatch, measure)
    pruned = fxprune.prune(model, image(), latency=target, round_to=1, progress=False)
    report = pruned.meta["fxprune"]
    assert report.latency.ratio == pytest.approx(target, rel=latency.TOLERANCE)
    assert report.oracle_error is not None
    assert report.oracle_error < 1e-4
    assert len(seen) <= latency._ROUNDS
    assert "latency     1.00 ms -> " in str(report)
    assert "FakeProvider" in str(report)
    assert report.data()["latency"]["ratio"] == report.latency.ratio


def test_with_steps_in_the_latency_the_largest_plan_below_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = faked(monkeypatch, lambda ratio: 0.7 if ratio > 0.41 else 0.45)
    pruned = fxprune.prune(model, image(), latency=0.5, round_to=1, progress=False)
    assert pruned.meta["fxprune"].latency.ratio == 0.45


def test_a_measurement_that_does_not_follow_the_prediction_ends_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = faked(monkeypatch, lambda ratio: 0.65 if ratio > 0.35 else 0.48)
    pruned = fxprune.prune(model, image(), latency=0.5, round_to=1, progress=False)
    assert pruned.meta["fxprune"].latency.ratio == 0.48
    assert len(seen) > 2


def test_measurements_that_disagree_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = faked(monkeypatch, lambda ratio: ratio)
    steady = fxprune.prune(model, image(), latency=0.5, round_to=1, progress=False).meta["fxprune"]
    monkeypatch.setattr(Fake, "ratio", lambda self, pruned: 0.5)
    model, _ = faked(monkeypatch, lambda ratio: 0.9)
    busy = fxprune.prune(model, image(), latency=0.5, round_to=1, progress=False).meta["fxprune"]
    told = "the latency ratio was 0.50 in the search and 0.90 at the end"
    assert [any(told in note for note in report.notes) for report in (steady, busy)] == [False, True]


def test_a_latency_that_is_never_measured_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = faked(monkeypatch, lambda ratio: 0.8 + 0.2 * ratio)
    with pytest.raises(BudgetError, match=r"latency=0\.5 was not reached: the smallest ratio measured was 0\.8"):
        fxprune.prune(model, image(), latency=0.5, progress=False)


def test_a_latency_below_all_predictions_names_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = faked(monkeypatch, lambda ratio: ratio)
    with pytest.raises(BudgetError, match=r"latency=0\.1 cannot be reached: the smallest reachable ratio is 0\."):
        fxprune.prune(model, image(), latency=0.1, options=fxprune.Options(min_channels=32), progress=False)
    assert not seen


def test_a_learner_meets_a_latency_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = faked(monkeypatch, lambda ratio: 0.2 + 0.8 * ratio)
    data = [(image(), torch.tensor([1, 2]))] * 2
    pruned = fxprune.prune(model, image(), method="slimming", latency=0.6, data=data, epochs=1, progress=False)
    assert pruned.meta["fxprune"].latency.ratio == pytest.approx(0.6, rel=latency.TOLERANCE)


def test_what_cannot_run_has_no_latency() -> None:
    with pytest.raises(ModelError, match="latency= is measured, and weights on the meta device cannot run"):
        fxprune.prune(make().to("meta"), image().to("meta"), latency=0.5, progress=False)
    with pytest.raises(InputError, match="threads=0 must be a whole number of at least 1"):
        fxprune.LatencyBudget(0.5, threads=0)
    with pytest.raises(InputError, match=r"has no execution provider 'Nobody'; it has .*CPUExecutionProvider"):
        fxprune.prune(make(), image(), latency=fxprune.LatencyBudget(0.5, provider="Nobody"), progress=False)


@pytest.mark.parametrize("batch", [None, 5])
def test_pruning_to_a_latency_on_onnxruntime(batch: int | None) -> None:
    """The whole way, with a ratio that any measurement reaches in the end."""
    budget = fxprune.LatencyBudget(1.0, threads=1, batch=batch)
    pruned = fxprune.prune(make(Wide), image(), latency=budget, round_to=1, progress=False)
    found = pruned.meta["fxprune"].latency
    assert found.provider == "CPUExecutionProvider"
    assert found.threads == 1
    assert found.batch == (batch or len(image()))
    assert found.dense_ms > 0
    assert found.pruned_ms > 0
    assert found.runs >= 31


# -- alignment ---------------------------------------------------------------------------------------------------------


def kept_counts(pruned: Any) -> set[int]:
    return {size for row in pruned.meta["fxprune"].rows for size in row.after[:1] if row.before[0] > 10}


@pytest.mark.aligned
def test_channels_are_aligned_where_that_costs_little() -> None:
    pruned = fxprune.prune(make(Wide), image(), channels=0.5, progress=False)
    assert pruned.meta["fxprune"].round_to == 16
    assert all(size % 16 == 0 for size in kept_counts(pruned))


@pytest.mark.aligned
def test_an_alignment_that_wastes_more_than_1_percent_of_the_budget_is_not_taken() -> None:
    report = fxprune.prune(make(Wide), image(), channels=0.53, progress=False).meta["fxprune"]
    assert report.round_to < 16
    assert fxprune.prune(make(Wide), image(), channels=0.53, round_to=16, progress=False).meta["fxprune"].round_to == 16


def test_the_alignment_is_the_coarsest_that_uses_the_budget_up() -> None:
    dense = recorded(make(Wide), image())
    scores = [None if g.locked else np.random.default_rng(0).random(g.channels.shape) for g in dense.graph.groups]
    for ratio in (0.3, 0.5, 0.51, 0.7):
        used, lost = {}, {}
        for steps in ((16,), (8,), (4,), (2,), (1,), (16, 8, 4, 2, 1)):
            pruned = compress(dense, scores, Cut(Budget("flops", ratio), round_to=steps, verify=False), "random")
            report = pruned.meta["fxprune"]
            used[steps] = report.round_to, report.macs_after / report.macs_before / ratio
            keep = report.plan.channels(dense.graph)
            pairs = zip(dense.graph.groups, scores, strict=True)
            lost[steps] = sum(score[~keep[group.channels]].sum() for group, score in pairs if score is not None)
        good = [step for step in (16, 8, 4, 2) if used[(step,)][1] >= 0.99 and lost[(step,)] <= 1.1 * lost[(1,)]]
        wanted = next(iter(good), 1)
        assert used[(16, 8, 4, 2, 1)] == used[(wanted,)]


def test_a_multiple_that_loses_much_more_is_not_taken() -> None:
    """Of 64 and of 96 channels 24 are worth nothing: that is three times 8, and 16 would take others or leave some."""
    dense = recorded(make(Wide), image())
    scores = [None if g.locked else 1.0 * (np.arange(g.channels.size) >= 24)[None] for g in dense.graph.groups]
    free = sum(g.channels.size for g in dense.graph.prunable)
    budget = Budget("channels", 1 - 24 * len(dense.graph.prunable) / free)
    selection, unreachable = choose(dense.graph, scores, Cut(budget, round_to=(16, 8, 4, 2, 1)))
    assert unreachable is None
    assert selection.round_to == 8
    assert choose(dense.graph, scores, Cut(budget, round_to=(16,)))[0].round_to == 16


_PRUNING = """
import sys
if sys.argv[2] == "without onnxruntime":
    sys.modules.update(dict.fromkeys(("onnx", "onnxruntime", "onnxscript", "onnx_ir")))  # an import of these fails
else:
    from fxprune.deploy.store import store
    store("CPUExecutionProvider", 1).add({"alignment": 4.0})  # as if measured
import fxprune
from nets import image, make
from test_budget import Wide
small = fxprune.prune(make(Wide), image(), channels=0.5, round_to=sys.argv[3], progress=False)
small.meta["fxprune"].plan.save(sys.argv[1])
print(small.meta["fxprune"].round_to)
"""


def test_the_default_plan_is_the_same_in_every_environment(tmp_path: Path) -> None:
    """Whatever was measured on the device, and where there is no onnxruntime; what is measured decides on request."""
    tests = Path(__file__).parents[1]
    path_of = os.pathsep.join(map(str, (tests.parent, tests, tests / "selection")))

    def plan(name: str, *arguments: str, rounds_to: int) -> str:
        path = tmp_path / f"{name}.json"
        run = subprocess.run(
            [sys.executable, "-c", _PRUNING, str(path), *arguments], capture_output=True, text=True, check=False,
            env={**os.environ, "FXPRUNE_CACHE": str(tmp_path), "PYTHONPATH": path_of},
        )  # fmt: skip
        assert (run.returncode, run.stdout) == (0, f"{rounds_to}\n"), run.stderr
        return path.read_text()

    default = plan("one", "that likes 4", "auto", rounds_to=16)
    assert plan("other", "without onnxruntime", "auto", rounds_to=16) == default
    plan("measured", "that likes 4", "measured", rounds_to=4)


@pytest.mark.aligned
@pytest.mark.parametrize(("kind", "ratio"), [("flops", 0.6), ("params", 0.4), ("channels", 0.5)])
def test_the_report_says_what_the_alignment_leaves_of_the_budget(kind: Any, ratio: float) -> None:
    pruned = fxprune.prune(make(Wide), image(), progress=False, **{kind: ratio})
    report = pruned.meta["fxprune"]
    graph = fxprune.analyze(make(Wide), image())
    left = remaining(graph, Budget(kind, ratio), report.plan.channels(graph))
    assert report.budget_used == pytest.approx(left / ratio)
    assert 0.99 <= report.budget_used <= 1
    unused = f"{report.round_to}, which leaves {1 - report.budget_used:.1%} of the budget unused"
    assert f"channels    kept in multiples of {unused}" in str(report).splitlines()
    assert report.round_to > 1


@pytest.mark.aligned
def test_a_method_that_says_itself_how_much_goes_is_not_rounded() -> None:
    data = [(image(), torch.tensor([1, 2]))] * 2
    pruned = fxprune.prune(
        make(Wide), image(), method=fxprune.methods.Slimming(percent=0.3), data=data, epochs=1, progress=False
    )
    assert pruned.meta["fxprune"].round_to == 1
