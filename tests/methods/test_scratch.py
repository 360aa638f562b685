"""Pruning from Scratch, by the letter of the paper's code: regulariser, gates, snapshots, widths, new weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from nets import Unchanged, chain, image, make, step
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import BudgetError, InputError
from fxprune.groups import analyse_graph
from fxprune.methods import Scratch
from fxprune.methods.scratch import scratch_b_epochs
from fxprune.selection.budget import Budget, select
from fxprune.training import Training, site_of
from model_zoo import papers

pytestmark = pytest.mark.usefixtures("one_thread")


def labelled(count: int = 32, classes: int = 10, batch: int = 16) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, classes, (count,), generator=generator)), batch)


def begun(model: nn.Module | None = None, **options: Any) -> Training:
    return fxprune.attach(model or make(), image(), method=Scratch(**options), flops=0.5, progress=False)


def gates_of(training: Training) -> nn.Parameter:
    (gates,) = (p for p in training.model.parameters() if p.requires_grad)
    return gates


@pytest.mark.parametrize(("strength", "sparsity", "expected"), [(0.5, 0.2, 0.32), (0.05, 0.5, 0.0125)])
def test_the_regulariser_at_the_start(strength: float, sparsity: float, expected: float) -> None:
    training = begun(strength=strength, sparsity=sparsity)
    assert float(training.loss(torch.zeros(())).detach()) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_the_regulariser() -> None:
    training = begun(strength=0.5, sparsity=0.3)
    gates = gates_of(training)
    with torch.no_grad():
        gates.copy_(torch.linspace(0, 1, len(gates)))
    training.loss(torch.zeros(())).backward()
    mean = float(gates.detach().mean())
    expected = 0.5 * 2 * (mean - 0.3) / len(gates) * torch.sign(gates.detach())
    assert gates.grad is not None
    torch.testing.assert_close(gates.grad, expected)
    assert float(gates.grad[0]) == 0  # at a gate of 0


def test_the_first_step_moves_every_gate_by_the_learning_rate() -> None:
    training = begun()
    optimizer = training.hooks.optimizer()
    x, y = next(iter(labelled()))
    step(training, optimizer, x, y)
    gates = gates_of(training).detach()
    assert {round(float(g), 4) for g in gates.unique()} <= {0.99, 1.0}
    assert (gates < 1).any()


def test_only_gates_and_running_statistics_change() -> None:
    model = make()
    with Unchanged(model):
        training = begun(model, lr=0.2)
        before = copy.deepcopy(training.model.state_dict())
        optimizer = training.hooks.optimizer()
        for _ in range(3):
            for x, y in labelled():
                step(training, optimizer, x, y)
                assert bool(((gates_of(training) >= 0) & (gates_of(training) <= 1)).all())
    changed = {n for n, value in training.model.state_dict().items() if not torch.equal(value, before[n])}
    statistics = {n for n in before if n.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == {"_fxprune_gates.values", *statistics}


@pytest.mark.parametrize(
    ("dtype", "gates"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_gates_are_no_narrower_than_float32_nor_than_the_model(dtype: torch.dtype, gates: torch.dtype) -> None:
    training = fxprune.attach(make().to(dtype), image().to(dtype), method="scratch", flops=0.5, progress=False)
    assert gates_of(training).dtype == gates
    assert training.model(image().to(dtype)).dtype == dtype


def test_equal_gates_go_in_the_same_share_everywhere_and_the_first_of_a_group_first() -> None:
    training = fxprune.attach(make(), image(), method="scratch", channels=0.5, round_to=1, progress=False)
    with torch.no_grad():
        gates_of(training).zero_()
    kept = training.finish().meta["fxprune"].plan.kept
    assert kept["stem.0.weight"][0] == [*range(8, 16)]
    assert kept["up.0.weight"][0] == [*range(12, 24)]


def test_the_lowest_gates_go() -> None:
    training = begun(inner_only=True)
    gates = gates_of(training)
    assert len(gates) == 24  # the inner layer; the stream has two producers
    order = torch.randperm(24)
    with torch.no_grad():
        gates.copy_(order / 24)
    small = training.finish()
    report = small.meta["fxprune"]
    kept = report.plan.kept["up.0.weight"][0]
    assert kept == sorted(torch.argsort(order, descending=True)[: len(kept)].tolist())
    assert small.get_parameter("stem.0.weight").shape[0] == 16  # the stream keeps its width
    assert report.macs_after <= 0.5 * report.macs_before


def test_a_snapshot_is_taken_of_the_best_epoch_that_is_sparse_enough() -> None:
    training = begun(sparsity=0.5)
    gates = gates_of(training)
    half = torch.cat([torch.ones(20), torch.zeros(20)])

    def epoch(values: Tensor, accuracy: float) -> None:
        with torch.no_grad():
            gates.copy_(values)
        training.hooks.after_epoch(accuracy)

    def taken() -> Tensor:
        scores = training.hooks.outcome().scores
        names = [g.name for g in training.graph.groups]
        index = training.hooks._gates.index  # type: ignore[attr-defined]
        found = torch.empty(40)
        for name, where in index.items():
            found[where] = torch.from_numpy(scores[names.index(name)]).float()
        return found

    epoch(torch.full((40,), 0.1), 0.9)  # every gate is small and none is zero: not sparse
    assert torch.equal(taken(), gates.detach())  # nothing was sparse enough yet: the last
    epoch(half * 0.5, 0.4)
    epoch(half * 0.6, 0.6)
    epoch(half * 0.7, 0.5)
    assert torch.equal(taken(), half * 0.6)
    state = training.hooks.state_dict()
    other = begun(sparsity=0.5)
    other.hooks.load_state_dict(state)
    assert "best epoch" in other.hooks.outcome().notes[0]


def test_new_weights() -> None:
    model = make()
    small = fxprune.prune(model, image(), method=Scratch(steps=2), flops=0.5, progress=False)
    again = fxprune.prune(model, image(), method=Scratch(steps=2), flops=0.5, progress=False)
    other = fxprune.prune(model, image(), method=Scratch(steps=2), flops=0.5, progress=False, seed=1)
    inherited = fxprune.apply(model, small.meta["fxprune"].plan, image())
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        if parameter.ndim > 1:
            assert not (parameter == inherited.get_parameter(name)).float().mean() > 0.01
            assert not torch.equal(parameter, other.get_parameter(name)) or parameter.shape != (1,)
    norm = small.get_submodule("stem.1")
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
    bound = 1 / np.sqrt(
        small.get_parameter("up.0.weight")[0].numel()
    )  # of torch's own initialiser, for the smaller layer
    assert float(small.get_parameter("up.0.weight").detach().abs().max()) == pytest.approx(bound, rel=0.05)
    notes = " / ".join(small.meta["fxprune"].notes)
    assert "learned without labels: on 2 batches of 8 Gaussian inputs, against the dense model's output" in notes
    assert "weights initialised anew" in notes
    assert [*small.meta["fxprune"].seconds] == [
        "recording", "probing", "analysing", "learning", "selecting", "rewriting", "verifying",
    ]  # fmt: skip


def test_with_data_the_report_names_no_other_objective() -> None:
    small = fxprune.prune(
        make(), image(), method="scratch", flops=0.5, data=labelled(), epochs=1, progress=False
    )  # fmt: skip
    assert not any("without labels" in note for note in small.meta["fxprune"].notes)


def test_a_parameter_that_no_layer_initialises_is_drawn_like_its_values() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.scale = nn.Parameter(torch.randn(64) * 3 + 5), nn.Parameter(torch.full((64,), 1e-6))
            self.one, self.two = nn.Linear(4, 64), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two((self.one(x) + self.token) * self.scale)

    model = Token()
    small = fxprune.prune(model, torch.randn(2, 4), method=Scratch(steps=2), flops=0.5, progress=False)
    assert not set(small.token.tolist()) & set(model.token.tolist())
    assert abs(float(small.token.detach().mean()) - 5) < 2
    assert torch.equal(small.scale, torch.full_like(small.scale, 1e-6))
    assert small.meta["fxprune"].notes[-1].endswith("drawn like their values: token, scale")


def test_what_is_frozen_is_not_drawn_anew() -> None:
    """No training would bring back the values of a fixed table or of a pretrained stem."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Linear(6, 24), nn.BatchNorm1d(24)
            self.one, self.two = nn.Linear(24, 32), nn.Linear(32, 4)
            self.table = nn.Parameter(torch.linspace(0, 6, 24).sin(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.norm(self.stem(x)).relu() + self.table).relu())

    model = randomise(Fixed()).eval()
    model.stem.requires_grad_(False)
    model.norm.requires_grad_(False)
    model.one.bias.requires_grad_(False)
    small = fxprune.prune(model, torch.randn(3, 6), method=Scratch(steps=2), flops=0.5, progress=False)
    cut = fxprune.apply(model, small.meta["fxprune"].plan, torch.randn(3, 6)).state_dict()
    same = {name for name, value in small.state_dict().items() if torch.equal(value, cut[name])}
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.weight", "stem.bias", "norm.weight", "norm.bias", "one.bias", "table"}
    assert same >= frozen
    assert same.isdisjoint({"one.weight", "two.weight", "two.bias"})
    assert "; frozen ones stay as they are: " in small.meta["fxprune"].notes[-1]


def test_the_budget_is_relative_to_the_network_that_was_not_widened() -> None:
    x = torch.randn(1, 3, 32, 32)
    training = fxprune.attach(
        papers.vgg16_bn(), x, method=Scratch(factory=lambda width: papers.vgg16_bn(width=width), expand=1.25),
        flops=0.5, verify=False, progress=False,
    )  # fmt: skip
    gates = gates_of(training)
    assert len(gates) == 5280
    with torch.no_grad():
        gates.copy_(torch.rand(5280, generator=torch.Generator().manual_seed(0)))
    report = training.finish().meta["fxprune"]
    assert report.macs_before == 313_201_664
    assert abs(report.macs_after / report.macs_before - 0.5) / 0.5 <= 1e-3
    assert report.macs_after <= 0.5 * report.macs_before


def test_the_stream_of_an_expanded_network_keeps_the_expanded_width() -> None:
    """ResNet-20 as in the paper's code: gates inside of blocks only, the budget that of 16, 32, 64 channels."""
    method = Scratch(factory=lambda width: papers.resnet(20, width=width), expand=1.25, inner_only=True)
    training = fxprune.attach(
        papers.resnet(20), torch.randn(1, 3, 32, 32), method=method, flops=0.5, verify=False, progress=False
    )
    gates = gates_of(training)
    assert len(gates) == 21 * 20
    with torch.no_grad():
        gates.copy_(torch.rand(len(gates), generator=torch.Generator().manual_seed(0)))
    small = training.finish()
    report = small.meta["fxprune"]
    assert report.macs_before == 40_817_280 - 4096  # that code counts average pooling too
    assert abs(report.macs_after / report.macs_before - 0.5) / 0.5 <= 2e-3  # one channel is up to 0.9 % of all
    streams = [(n, m) for n, m in small.named_modules() if isinstance(m, nn.Conv2d) and not n.endswith("conv1")]
    assert [m.out_channels for n, m in streams if "stages.0" in n or n == "stem.0"] == [20] * 4
    assert [m.out_channels for n, m in streams if "stages.2" in n] == [80] * 4
    inner = [m.out_channels for n, m in small.named_modules() if n.endswith("conv1")]
    assert len(inner) == 9
    assert min(inner) >= 1


# What the paper's code gates, and what else is made by one layer alone: the stem of ResNet-50, and the outputs of two
# stages of MobileNetV2 that have no residual.
@pytest.mark.parametrize(
    ("build", "paper", "others"),
    [
        (lambda: papers.resnet(20), 21 * 16, 0),
        (lambda: papers.resnet(56), 63 * 16, 0),
        (papers.resnet_50, 118 * 64, 64),
        (lambda: papers.mobilenet_v1(width=1.25), 7480, 0),
        (lambda: papers.mobilenet_v2(width=1.25), 10520, 20 + 400),
    ],
    ids=["resnet-20", "resnet-56", "resnet-50", "mobilenet-v1", "mobilenet-v2"],
)
def test_as_many_gates_as_in_the_paper(build: Any, paper: int, others: int) -> None:
    with torch.device("meta"):
        net, x = build().eval(), torch.empty(1, 3, 64, 64)
    module = fxprune.record(net, x)
    graph = analyse_graph(module, (x,), {})
    site = site_of(module, graph, Budget("flops", 0.5), lambda scores: graph.everything(), 0)
    inner = [g for g in site.graph.prunable if site.producers(g) == 1]
    assert len(site.insert_gates(inner).values) == paper + others


def test_a_gate_of_zero_leaves_no_shift_behind_and_a_scale_of_zero_does() -> None:
    """What tells the two papers' masks apart: a gate is after the norm, its scale within."""
    model = make()
    training = begun(model, inner_only=True)
    gated, scaled, gone = training.model.eval(), copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        gates_of(training)[:5] = 0
        scaled.up[1].weight[:5] = 0
        gone.up[1].weight[:5] = gone.up[1].bias[:5] = 0
    torch.testing.assert_close(gated(image()), gone(image()))
    assert not torch.allclose(scaled(image()), gone(image()), rtol=1e-2)


def test_fewer_channels_never_cost_more() -> None:
    graph = fxprune.analyze(papers.vgg16_bn(width=0.25), torch.randn(1, 3, 32, 32))
    scores = [None if g.locked else np.random.default_rng(0).random(g.channels.shape) for g in graph.groups]
    total = sum(g.channels.size for g in graph.prunable)
    before = 0
    for ratio in (0.2, 0.35, 0.5, 0.8, 1.0):
        keep = select(graph, scores, Budget("channels", ratio)).keep
        assert sum(int(keep[g.channels].sum()) for g in graph.prunable) == int(total * ratio + 1e-9)
        assert before < graph.macs(keep)
        before = graph.macs(keep)


def test_a_layer_whose_gates_are_all_zero_keeps_a_channel_and_the_report_says_so() -> None:
    training = fxprune.attach(make(), image(), method=Scratch(), flops=0.05, progress=False)
    index = training.hooks._gates.index  # type: ignore[attr-defined]
    with torch.no_grad():
        gates_of(training)[index["up.0"]] = 0
        gates_of(training)[index["stem.0"]] = torch.linspace(0.5, 1, 16)
    small = training.finish()
    report = small.meta["fxprune"]
    assert len(report.plan.kept["up.0.weight"][0]) == 1
    assert "min_channels=1 kept channels that others outrank: of up.0" in report.notes
    assert small.train()(image()).shape == (2, 10)


def test_depthwise_convolutions_follow() -> None:
    net = papers.mobilenet_v2(num_classes=4, width=0.25)
    small = fxprune.prune(net, torch.randn(2, 3, 32, 32), method=Scratch(steps=2, batch=2), flops=0.5, progress=False)
    depthwise = [m for m in small.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert depthwise
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)
    small.train()(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize(("pruned", "expected"), [(0.3, 228), (0.5, 320), (0.52, 333), (0.7, 533), (0.75, 640)])
def test_epochs_of_scratch_b(pruned: float, expected: int) -> None:
    assert scratch_b_epochs(160, 1 - pruned) == expected


def test_bad_options() -> None:
    with pytest.raises(InputError, match=r"^sparsity=0 is the target of the mean gate"):
        Scratch(sparsity=0)
    with pytest.raises(InputError, match=r"^expand=1\.25 *needs factory=|^expand= needs factory="):
        Scratch(expand=1.25)
    with pytest.raises(InputError, match=r"^expand=0\.5 must be at least 1"):
        Scratch(expand=0.5)
    with pytest.raises(InputError, match=r"^kept=0 is no ratio of MACs"):
        scratch_b_epochs(160, 0)

    with pytest.raises(InputError, match=r"^expand=inf must be finite\.$"):
        Scratch(expand=float("inf"))
    with pytest.raises(InputError, match=r"^strength=-1 must not be negative\.$"):
        Scratch(strength=-1)
    with pytest.raises(InputError, match=r"^steps=1\.5 must be a whole number of at least 1\.$"):
        Scratch(steps=1.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^factory= is a int; pass a function that makes the network\.$"):
        Scratch(factory=3, expand=1.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^factory= made a NoneType; it must make the network at a width\.$"):
        fxprune.attach(
            make(),
            image(),
            method=Scratch(factory=lambda width: None, expand=1.5),
            flops=0.5,
            progress=False,  # type: ignore[arg-type,return-value]
        )
    with pytest.raises(InputError, match=r"^factory= made a network whose outputs are \[2, 7\], and .* are \[2, 3\]\."):
        fxprune.attach(
            chain(4, 8, 3), torch.randn(2, 4), flops=0.5, progress=False,
            method=Scratch(factory=lambda width: chain(4, int(8 * width), 7), expand=1.5),
        )  # fmt: skip
    validated = fxprune.Options(loop=fxprune.Loop(validation=[(image(), torch.tensor([0, 1]))]))
    with pytest.raises(InputError, match=r"learns without labels where there are no data, and validation= has some"):
        fxprune.prune(make(), image(), method=Scratch(steps=1), flops=0.5, progress=False, options=validated)


def test_an_unreachable_budget_says_so_before_learning() -> None:
    with pytest.raises(BudgetError, match=r"smallest reachable ratio"):
        fxprune.attach(make(), image(), method=Scratch(steps=1, inner_only=True), flops=0.05, progress=False)


@pytest.mark.parametrize("kind", ["flops", "params", "channels"])
def test_every_budget_is_relative_to_the_network_that_is_given(kind: str) -> None:
    def net(width: float) -> nn.Module:
        return chain(4, int(16 * width), int(16 * width), 3)

    x = torch.randn(2, 4)
    small = fxprune.prune(
        net(1), x, method=Scratch(factory=net, expand=2, steps=1), **{kind: 0.5}, round_to=1, progress=False
    )
    report, dense = small.meta["fxprune"], fxprune.analyze(net(1), x)
    assert (report.macs_before, report.params_before) == (dense.macs(), dense.params())
    kept = {"flops": report.macs_after, "params": report.params_after}
    kept["channels"] = sum(after for after, _ in report.plan.widths.values())
    whole = {"flops": dense.macs(), "params": dense.params(), "channels": 32}
    assert 0.4 * whole[kind] < kept[kind] <= 0.5 * whole[kind]


class Called(nn.Module):
    """Takes positional and keyword inputs together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        return self.head((self.first(x) + self.second(shift)).relu())


def test_inputs_by_place_and_by_name_together() -> None:
    x, shift = torch.randn(2, 4), torch.randn(2, 3)
    small = fxprune.prune(
        Called(), x, example_kwargs={"shift": shift}, method=Scratch(steps=2), flops=0.5, progress=False
    )
    assert small(x, shift=shift).shape == (2, 2)
