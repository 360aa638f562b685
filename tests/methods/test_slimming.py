"""Network Slimming, by the letter of the paper: sub-gradient, percentile, coupled and inner widths."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import Unchanged, chain, image, make, step
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import BudgetError, InputError, ModelError
from fxprune.methods import Slimming
from fxprune.training import Training
from model_zoo import papers

HALF = fxprune.Options(max_ratio=0.5)

pytestmark = pytest.mark.usefixtures("one_thread")

# Kept channels per layer of VGG19 with 70 % of all scales pruned, as published with the method's PyTorch port.
PORT_70 = [49, 64, 128, 128, 256, 254, 234, 198, 114, 41, 24, 11, 14, 13, 19, 104]


def begun(model: nn.Module | None = None, x: Tensor | None = None, **options: Any) -> Training:
    return fxprune.attach(
        make() if model is None else model, image() if x is None else x, method=Slimming(**options), channels=0.5,
        progress=False,
    )  # fmt: skip


def scales(model: nn.Module) -> dict[str, nn.Parameter]:
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
    return {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, norms)}


def test_the_sub_gradient_is_added_to_the_scales_and_to_nothing_else() -> None:
    training = begun(strength=0.01)
    names = scales(training.model)
    with torch.no_grad():
        names["up.1.weight"][3] = 0
        names["up.1.weight"][4] = -1
    F.cross_entropy(training.model(image()), torch.tensor([1, 2])).backward()
    before = {n: p.grad.clone() for n, p in training.model.named_parameters() if p.grad is not None}
    training.after_backward()
    assert names
    for name, parameter in training.model.named_parameters():
        assert parameter.grad is not None
        added = parameter.grad - before[name]
        expected = 0.01 * parameter.detach().sign() if name in names else torch.zeros_like(added)
        torch.testing.assert_close(added, expected, atol=1e-7, rtol=1e-4)
    assert float(names["up.1.weight"].grad[3] - before["up.1.weight"][3]) == 0  # type: ignore[index]


def test_a_plain_step() -> None:
    training = begun(strength=0.01)
    scale = training.model.get_parameter("up.1.weight")
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1, weight_decay=0.02)
    F.cross_entropy(training.model(image()), torch.tensor([1, 2])).backward()
    before, gradient = scale.detach().clone(), scale.grad.clone()  # type: ignore[union-attr]
    training.after_backward()
    optimizer.step()
    training.after_step()
    torch.testing.assert_close(scale.detach(), before - 0.1 * (gradient + 0.02 * before + 0.01 * before.sign()))


class InDouble(nn.LayerNorm):
    """In another precision, as many libraries have it: what multiplies is a copy of the scale."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.double(), self.bias.double()
        return F.layer_norm(x.double(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Doubled(nn.LayerNorm):
    """What multiplies is no scale of the model: twice a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.clone()
        weight.mul_(2)
        return F.layer_norm(x, self.normalized_shape, weight, self.bias, self.eps)


class Frozen(nn.Module):
    """A batch norm of buffers, as detectors have it: nothing in it is trained."""

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("weight", torch.arange(8.0)), ("shift", torch.ones(8)), ("var", torch.ones(8))):
            self.register_buffer(name, values)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.shift, self.var, self.get_buffer("weight"), self.shift)


def test_a_scale_that_is_a_buffer_ranks_and_is_not_moved() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3), Frozen(), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 3)
    )
    learner = begun(randomise(model), torch.randn(2, 3, 16), inner_only=True)
    scores = learner.hooks.outcome().scores
    group = learner.graph.groups.index(next(g for g in learner.graph.prunable if g.size == 8))
    assert scores[group] is not None
    assert np.array_equal(scores[group][0], np.arange(8.0))
    learner.model(torch.randn(2, 3, 16)).sum().backward()
    learner.after_backward()
    assert torch.equal(learner.model.get_buffer("1.weight"), torch.arange(8.0))
    assert learner.finish().get_parameter("0.weight").shape[0] < 8


@pytest.mark.parametrize("norm", [lambda: nn.InstanceNorm1d(8, affine=True), lambda: InDouble([8, 6])])
def test_scales_that_multiply_as_copies(norm: Callable[[], nn.Module]) -> None:
    """An instance norm repeats its scale for every sample; it, too, is a scale that is trained and ranked."""
    model = randomise(nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), norm(), nn.Conv1d(8, 4, 1)))
    x = torch.randn(2, 3, 6)
    small = fxprune.prune(model, x, method="bn_scale", channels=0.5, progress=False)
    sizes = model.get_parameter("1.weight").abs().reshape(8, -1).sum(1)
    kept = small.meta["fxprune"].plan.kept["0.weight"][0]
    assert set(kept) == {*sizes.topk(4).indices.tolist()}
    scales = begun(model, x, strength=0.1).hooks._scales  # type: ignore[attr-defined]
    assert [*scales] == ["1.weight"]


def test_what_is_no_scale_as_it_is_is_none() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), Doubled([8, 6]), nn.Conv1d(8, 4, 1))
    with pytest.raises(ModelError, match=r"^Network Slimming needs norm layers with a scale, and the model has none"):
        begun(model, torch.randn(2, 3, 6))


def test_the_first_value_of_the_scales() -> None:
    model = make()
    with Unchanged(model):
        assert all(bool((p == 0.5).all()) for p in scales(begun(model, gamma=0.5).model).values())
    assert not any(bool((p == 0.5).all()) for p in scales(begun(make()).model).values())


def test_the_first_value_is_not_that_of_a_frozen_scale() -> None:
    model = make()
    frozen = model.get_parameter("up.1.weight").requires_grad_(False).clone()
    learner = begun(model, gamma=0.5)
    assert torch.equal(learner.model.get_parameter("up.1.weight"), frozen)
    assert all(bool((p == 0.5).all()) for n, p in scales(learner.model).items() if n != "up.1.weight")
    assert "frozen scales stay as they are: up.1.weight" in learner.finish().meta["fxprune"].notes


@pytest.mark.parametrize(
    ("percent", "kept"), [(0.1, 4953), (0.2, 4403), (0.3, 3852), (0.4, 3302), (0.5, 2751), (0.6, 2201), (0.7, 1651)]
)
def test_the_percentile_of_the_paper(percent: float, kept: int) -> None:
    model = papers.vgg19_bn(num_classes=10)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scale in scales(model).values():
            scale.copy_(torch.rand(scale.shape, generator=generator) + 0.01)
    training = fxprune.attach(
        model, torch.randn(1, 3, 32, 32), method=Slimming(percent=percent), verify=False, progress=False
    )  # fmt: skip
    small = training.finish()
    after = {n: p.detach() for n, p in scales(small).items()}
    assert sum(p.numel() for p in after.values()) == kept
    everything = torch.cat([p.detach() for p in scales(model).values()]).sort().values
    threshold = everything[int(5504 * percent)]
    assert all(bool((p > threshold).all()) for p in after.values())


def test_the_published_widths_have_the_published_size() -> None:
    model = papers.vgg19_bn(num_classes=10)
    with torch.no_grad():
        for scale, width in zip(scales(model).values(), PORT_70, strict=True):
            scale.copy_(torch.where(torch.randperm(len(scale)) < width, 1.0, 0.01) * (1 + 0.1 * torch.rand(len(scale))))
    small = fxprune.attach(
        model, torch.randn(1, 3, 32, 32), method=Slimming(percent=0.7), verify=False, progress=False
    ).finish()
    convolutions = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == PORT_70
    assert sum(p.numel() for p in small.parameters()) == 2_366_600


def masked(model: nn.Module, kept: Any, *parts: str) -> nn.Module:
    """A copy in which the scales that go are zero, and what else ``parts`` names of their norms."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name in scales(result):
            for part in ("weight", *parts):
                parameter = result.get_parameter(f"{name.rpartition('.')[0]}.{part}")
                gone = torch.ones(len(parameter), dtype=torch.bool)
                gone[kept[name][0]] = False
                parameter[gone] = 0
    return result


@pytest.mark.parametrize("shifted", [True, False])
def test_shifts_of_what_goes_matter_just_where_they_are_not_zero(shifted: bool) -> None:
    """The masked network of the oracle has its shifts at zero; without that it would differ, if there are any."""
    model = make()
    if not shifted:
        with torch.no_grad():
            for name in scales(model):
                model.get_parameter(name.replace("weight", "bias")).zero_()
    small = begun(model).finish()
    report = small.meta["fxprune"]
    assert report.oracle_error < 1e-5
    x, kept = image(), report.plan.kept
    torch.testing.assert_close(masked(model, kept, "bias")(x), small(x), atol=1e-5, rtol=1e-5)
    assert torch.allclose(masked(model, kept)(x), small(x), atol=1e-5) == (not shifted)


def test_scales_at_zero_stay_there_with_a_masked_gradient_and_the_sliced_network_trains_alike() -> None:
    """The paper's masked variant against what is returned: momentum, weight decay, statistics over the batch."""
    model = make().train()
    model.dropout.p = 0.0
    small = begun(model).finish().train()
    kept = small.meta["fxprune"].plan.kept
    dense = masked(model, kept, "bias").train()
    networks = [
        (net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)) for net in (dense, small)
    ]
    norms = [name.rpartition(".")[0] for name in scales(dense)]
    zero = {name: p == 0 for name, p in scales(dense).items()}
    assert all(bool(z.any()) for z in zero.values())
    for seed in range(4):
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        for net, optimizer in networks:
            optimizer.zero_grad()
            F.cross_entropy(net(x), torch.arange(8)).backward()
            for norm in norms if net is dense else ():
                layer = dense.get_submodule(norm)
                alive = (layer.weight != 0).float()
                layer.weight.grad *= alive
                layer.bias.grad *= alive
            optimizer.step()
    for name, parameter in scales(dense).items():
        assert torch.equal(parameter == 0, zero[name])
        assert not dense.get_parameter(name.replace("weight", "bias"))[zero[name]].any()
    for name, parameter in small.named_parameters():
        expected = dense.get_parameter(name).detach()
        for dim, indices in kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.tensor(indices))
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-4, rtol=1e-4)


def test_with_nothing_to_cut_the_network_is_the_same() -> None:
    model = make()
    small = fxprune.attach(model, image(), method=Slimming(), flops=1.0, progress=False).finish()
    assert torch.equal(small(image()), model(image()))
    assert small.meta["fxprune"].plan.kept == {}


def test_one_channel_left_keeps_its_dims() -> None:
    model = make()
    with torch.no_grad():
        model.up[1].weight.fill_(1e-3).add_(torch.rand(24) * 1e-4)
    small = fxprune.attach(model, image(), method=Slimming(percent=0.55), progress=False).finish()
    seen: list[tuple[int, ...]] = []
    small.get_submodule("up.0").register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape)))
    assert small(image(3)).shape == (3, 10)
    assert seen == [(3, 1, 8, 8)]
    assert small.meta["fxprune"].oracle_error < 1e-5


def test_a_layer_below_the_threshold_keeps_a_channel_and_the_report_says_so() -> None:
    model = make()
    with torch.no_grad():
        for name, scale in scales(model).items():
            scale.copy_(torch.linspace(0.01, 0.02, 24) if name == "up.1.weight" else torch.linspace(1, 2, 16))
    for least in (1, 3):
        small = fxprune.attach(
            model, image(), method=Slimming(percent=0.7), options=fxprune.Options(min_channels=least), progress=False
        ).finish()  # fmt: skip
        report = small.meta["fxprune"]
        assert report.plan.kept["up.0.weight"][0] == [*range(24 - least, 24)]
        assert f"min_channels={least} kept channels that others outrank: of up.0" in report.notes
        assert "min_channels" in str(report)
    spared = fxprune.attach(model, image(), method=Slimming(percent=0.5), progress=False).finish()
    assert len(spared.meta["fxprune"].plan.kept["up.0.weight"][0]) == 3  # 40 * 0.5 + 1 go, all of this layer
    assert spared.meta["fxprune"].notes == ()


def test_inner_widths_only() -> None:
    net = randomise(papers.preresnet(20)).eval()
    x = torch.randn(1, 3, 32, 32)
    small = begun(net, x, inner_only=True).finish()
    plan = small.meta["fxprune"].plan
    for name, parameter in net.named_parameters():
        after = small.get_parameter(name).shape
        if parameter.ndim == 4 and ".conv3" in name:
            assert after[0] == parameter.shape[0]  # the stream
    assert any(d == {0: d[0]} for n, d in plan.kept.items() if "conv1" in n)
    everything = begun(net, x).finish().meta["fxprune"].plan
    assert {n for n, d in everything.kept.items() if 0 in d} > {n for n, d in plan.kept.items() if 0 in d}


def test_a_stream_is_ranked_by_the_mean_of_its_scales() -> None:
    training = begun()
    names = scales(training.model)
    with torch.no_grad():
        for parameter in names.values():
            parameter.fill_(1.0)
        names["stem.1.weight"][5] = 0.1
        names["down.1.weight"][5] = -0.3
    outcome = training.hooks.outcome()
    index = [g.name for g in training.graph.groups].index("stem.0")
    group, scores = training.graph.groups[index], outcome.scores[index]
    assert scores is not None
    low = int(scores.reshape(-1).argmin())
    assert float(scores.reshape(-1)[low]) == pytest.approx(0.2)
    assert sorted(group.channels.reshape(-1)).index(group.channels.reshape(-1)[low]) == 5


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_any_norm_with_a_scale(norm: str) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.Conv2d(12, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.norm(self.one(x)).relu()).mean((2, 3))

    layered = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 5))
    model = randomise(layered if norm == "layer" else Grouped()).eval()
    before = len(scales(model))
    report = begun(model).finish().meta["fxprune"]
    assert before >= 1
    assert report.params_after < report.params_before
    assert report.oracle_error < 1e-5


def test_sparsity_grows_with_the_strength() -> None:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(64, 3, 8, 8, generator=generator), torch.randint(0, 10, (64,), generator=generator)
    )
    sums = []
    for strength in (0.0, 1e-2, 1.0):
        training = begun(strength=strength)
        optimizer = torch.optim.SGD(training.model.parameters(), lr=0.05)
        for _ in range(5):
            for x, y in DataLoader(data, 16):
                step(training, optimizer, x, y)
        sums.append(sum(float(p.detach().abs().sum()) for p in scales(training.model).values()))
    assert sums[0] > sums[1] > sums[2]
    assert sums[2] < 0.2 * sums[0]  # a huge strength pulls every scale towards zero


def test_what_goes_by_layer_is_limited() -> None:
    model = papers.vgg19_bn(num_classes=10, width=0.25)
    with torch.no_grad():
        for index, scale in enumerate(scales(model).values()):
            scale.fill_(0.01 if index == 4 else 1.0).mul_(1 + 0.1 * torch.rand(len(scale)))
    small = fxprune.attach(
        model, torch.randn(1, 3, 32, 32), method=Slimming(percent=0.5), options=HALF, verify=False, progress=False
    ).finish()
    kept = [a.numel() / b.numel() for a, b in zip(scales(small).values(), scales(model).values(), strict=True)]
    assert min(kept) == kept[4] == 0.5  # all of that layer is below the threshold; what it keeps no other layer pays
    assert sum(p.numel() for p in scales(small).values()) > 0.5 * sum(p.numel() for p in scales(model).values())


def test_a_cap_and_a_percentile_in_several_passes() -> None:
    """The paper's multi-pass scheme: train, cut half of all and of no layer more than half, and again from there."""
    model: nn.Module = papers.vgg16_bn(num_classes=10, width=0.125)
    x, y = torch.randn(10, 3, 32, 32), torch.arange(10)
    with torch.no_grad():
        for number, scale in enumerate(scales(model).values()):
            scale.copy_(torch.rand(len(scale)) * (0.1 if number == 2 else 1.0))
    for number in range(3):
        before = {name: p.numel() for name, p in scales(model).items()}
        training = fxprune.attach(model, x, method=Slimming(strength=1e-3, percent=0.5), options=HALF, progress=False)
        optimizer = torch.optim.SGD(training.model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            step(training, optimizer, x, y)
        trained = {name: p.detach().clone() for name, p in scales(training.model).items()}
        small = training.finish()
        report = small.meta["fxprune"]
        assert report.oracle_error < 1e-5
        after = {name: p.numel() for name, p in scales(small).items()}
        assert all(count >= before[name] / 2 for name, count in after.items())
        total = sum(before.values())
        if number == 0:
            third = [*scales(model)][2]
            assert after[third] == before[third] / 2  # the cap holds it
        # The pass cuts by its threshold alone: nothing above it goes, and what stays below it stays by the cap.
        threshold = float(torch.cat([*trained.values()]).abs().sort().values[int(total * 0.5)])
        for name, scale in trained.items():
            most = min(int((scale.abs() <= threshold).sum()), before[name] // 2)
            assert before[name] - after[name] == most
        for name, scale in scales(small).items():  # the next pass starts from these weights
            kept = report.plan.kept.get(name, {0: [*range(before[name])]})[0]
            assert torch.equal(scale.detach(), trained[name][kept])
        model = small


@pytest.mark.parametrize("budget", ["flops", "params", "channels"])
def test_a_budget_in_place_of_a_percentile(budget: str) -> None:
    model = papers.vgg16_bn(num_classes=10, width=0.25)
    training = fxprune.attach(model, torch.randn(1, 3, 32, 32), method="slimming", **{budget: 0.4}, progress=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scale in scales(training.model).values():
            scale.copy_(torch.rand(scale.shape, generator=generator) + 0.01)
    dense = {n: p.detach().clone() for n, p in scales(training.model).items()}
    small = training.finish()
    report = small.meta["fxprune"]
    left = {
        "flops": report.macs_after / report.macs_before,
        "params": report.params_after / report.params_before,
        "channels": sum(p.numel() for p in scales(small).values()) / sum(p.numel() for p in dense.values()),
    }[budget]
    assert 0.396 <= left <= 0.4
    # Small scales went, up to one threshold; a few were put back to fill the budget.
    gone = torch.cat([p[sorted({*range(len(p))} - {*report.plan.kept[n][0]})] for n, p in dense.items()])
    stay = torch.cat([p.detach() for p in scales(small).values()])
    assert float((stay < gone.max()).float().mean()) < 0.05


def test_a_percentile_of_inner_widths() -> None:
    net = randomise(papers.preresnet(20)).eval()
    x = torch.randn(1, 3, 16, 16)
    inner = {n: p for n, p in scales(net).items() if ".bn2" in n or ".bn3" in n}
    everything = sum(p.numel() for p in inner.values())
    method = Slimming(percent=0.4, inner_only=True)
    small = fxprune.attach(net, x, method=method, progress=False).finish()
    kept = sum(p.numel() for n, p in scales(small).items() if n in inner)
    assert kept == everything - int(everything * 0.4) - 1
    streams = [n for n in scales(net) if n not in inner]
    assert all(scales(small)[n].shape == scales(net)[n].shape for n in streams)
    assert small.meta["fxprune"].oracle_error < 1e-5


def test_a_scale_that_some_reader_does_not_see_scores_nothing() -> None:
    """The stem and the first stages of a pre-activation network: shortcuts with a convolution read them unscaled."""
    net = randomise(papers.preresnet(20)).eval()
    with torch.no_grad():
        for name, scale in scales(net).items():
            if ".bn1" in name:
                scale.fill_(1e-6)
    x = torch.randn(1, 3, 16, 16)
    learned = fxprune.attach(net, x, method=Slimming(percent=0.4), progress=False).finish().meta["fxprune"]
    measured = fxprune.prune(net, x, method="bn_scale", channels=0.6, round_to=1, progress=False).meta["fxprune"]
    for report in (learned, measured):
        widths = {row.name: row.width for row in report.rows}
        assert widths["stem.0"] == (16, 16)
        first, second, last = (widths[f"stages.{n}.0.conv3"] for n in range(3))
        assert (first, second) == ((64, 64), (128, 128))
        assert last[1] < last[0] == 256, "all that reads the last stage is scaled"
        assert report.notes[-1] == (
            "no score for stem.0, stages.0.0.conv3, stages.1.0.conv3: layers read them past the scales of norms"
        )


class Squeezed(nn.Module):
    """Channels times what is computed of them, before or after their norm."""

    def __init__(self, late: bool):
        super().__init__()
        self.conv, self.norm, self.late = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), late
        self.down, self.up, self.head = nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x = y if self.late else self.norm(y)
        x = x * self.up(self.down(x.mean((2, 3)))).sigmoid()[:, :, None, None]
        return self.head((self.norm(x) if self.late else x).mean((2, 3)))


@pytest.mark.parametrize("late", [False, True])
def test_what_is_multiplied_by_something_scaled_is_scaled(late: bool) -> None:
    net = randomise(Squeezed(late)).eval()
    asked: dict[str, Any] = {"ignore": ("down",), "channels": 0.5, "round_to": 1, "progress": False}
    if late:  # the squeeze reads channels before their norm
        with pytest.raises(ModelError, match=r"conv: the method gives these channels no score\.$"):
            fxprune.attach(net, image(), method=Slimming(), **asked)
    else:
        small = fxprune.attach(net, image(), method=Slimming(), **asked).finish()
        assert small.get_parameter("conv.weight").shape[0] == 4


def test_layers_that_pass_no_norm_are_left_alone_and_reported() -> None:
    """Of a vision transformer the stream has scales; insides of attention and of perceptrons have none."""
    net = randomise(
        VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    training = fxprune.attach(net, x, method=Slimming(percent=0.5), progress=False)
    mean = torch.stack([p.detach().abs() for p in scales(net).values()]).mean(0)
    small = training.finish()
    report = small.meta["fxprune"]
    assert report.plan.kept["patch_embed.proj.weight"][0] == sorted(mean.argsort()[13:].tolist())  # 24 - 12 - 1 stay
    rows = {row.name: row for row in report.rows}
    assert rows["blocks.0.mlp.fc1"].after[0] == 96
    assert rows["blocks.0.mlp.fc1"].locked == "the method gives these channels no score"
    assert report.oracle_error < 1e-5


@pytest.mark.parametrize(("epochs", "rates"), [(1, [0.1]), (2, [0.1, 0.01]), (4, [0.1, 0.1, 0.01, 0.001])])
def test_the_papers_schedule_however_short(epochs: int, rates: list[float]) -> None:
    training = begun()
    optimizer, found = training.optimizer(), []
    schedule = training.hooks.schedule(optimizer, epochs)
    assert schedule is not None
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates)


def test_a_budget_that_cannot_be_met_is_told_before_the_training() -> None:
    with pytest.raises(BudgetError, match=r"^flops=0\.0001 cannot be reached: the smallest reachable ratio is"):
        fxprune.attach(make(), image(), method="slimming", flops=0.0001, progress=False)


def test_bad_options() -> None:
    with pytest.raises(InputError, match=r"^percent=1 is no share"):
        Slimming(percent=1)
    with pytest.raises(InputError, match=r"^percent='half' is no share"):
        Slimming(percent="half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^gamma=-0\.5 must not be negative\.$"):
        Slimming(gamma=-0.5)
    with pytest.raises(InputError, match=r"^strength=-1 must not be negative"):
        Slimming(strength=-1)
    with pytest.raises(ModelError, match=r"^Network Slimming needs norm layers with a scale, and the model has none"):
        begun(chain(4, 8, 2), torch.randn(2, 4))
    with pytest.raises(InputError, match=r"^slimming trains: pass data="):
        fxprune.prune(make(), image(), method="slimming", flops=0.5, progress=False)
