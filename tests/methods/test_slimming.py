"""Network Slimming, by the letter of the paper: sub-gradient, percentile, coupled and inner widths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import Attentive, Unchanged, chain, image, make
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import InputError, ModelError
from fxprune.methods import Slimming
from fxprune.training import Training
from model_zoo import papers

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


def test_the_first_value_of_the_scales() -> None:
    model = make()
    with Unchanged(model):
        assert all(bool((p == 0.5).all()) for p in scales(begun(model, gamma=0.5).model).values())
    assert not any(bool((p == 0.5).all()) for p in scales(begun(make()).model).values())


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


def test_shifts_of_what_goes_count_for_nothing() -> None:
    """The masked network of the oracle has its shifts at zero; without that it would differ."""
    model = make()
    small = begun(model).finish()
    report = small.meta["fxprune"]
    assert report.oracle_error < 1e-5
    masked = copy.deepcopy(model)
    x = image()
    for zero_shift in (False, True):
        with torch.no_grad():
            for name, dims in report.plan.kept.items():
                parameter = dict(masked.named_parameters()).get(name)
                if parameter is not None and (name in scales(masked) or (zero_shift and name.endswith("1.bias"))):
                    gone = torch.ones(len(parameter), dtype=torch.bool)
                    gone[dims[0]] = False
                    parameter[gone] = 0
        same = torch.allclose(masked(x), small(x), atol=1e-5)
        assert same == zero_shift


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

    model = make(Attentive) if norm == "layer" else randomise(Grouped()).eval()
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
                loss = training.loss(F.cross_entropy(training.model(x), y))
                optimizer.zero_grad()
                loss.backward()
                training.after_backward()
                optimizer.step()
                training.after_step()
        sums.append(sum(float(p.detach().abs().sum()) for p in scales(training.model).values()))
    assert sums[0] > sums[1] > sums[2]
    assert sums[2] < 0.2 * sums[0]  # a huge strength pulls every scale towards zero


def test_what_goes_by_layer_is_limited() -> None:
    model = papers.vgg19_bn(num_classes=10, width=0.25)
    with torch.no_grad():
        for index, scale in enumerate(scales(model).values()):
            scale.fill_(0.01 if index == 4 else 1.0).mul_(1 + 0.1 * torch.rand(len(scale)))
    small = fxprune.attach(
        model, torch.randn(1, 3, 32, 32), method=Slimming(percent=0.5), max_ratio=0.5, verify=False, progress=False
    ).finish()
    kept = [a.numel() / b.numel() for a, b in zip(scales(small).values(), scales(model).values(), strict=True)]
    assert min(kept) == kept[4] == 0.5  # all of that layer is below the threshold; what it keeps no other layer pays
    assert sum(p.numel() for p in scales(small).values()) > 0.5 * sum(p.numel() for p in scales(model).values())


def test_pruned_again() -> None:
    once = begun().finish()
    twice = begun(once).finish()
    assert twice.meta["fxprune"].params_before == once.meta["fxprune"].params_after
    assert twice.meta["fxprune"].params_after < once.meta["fxprune"].params_after


def test_bad_options() -> None:
    with pytest.raises(InputError, match=r"^percent=1 is no share"):
        Slimming(percent=1)
    with pytest.raises(InputError, match=r"^strength=-1 must not be negative"):
        Slimming(strength=-1)
    with pytest.raises(ModelError, match=r"^Network Slimming needs norm layers with a scale, and the model has none"):
        begun(chain(4, 8, 2), torch.randn(2, 4))
    with pytest.raises(InputError, match=r"^slimming trains: pass data="):
        fxprune.prune(make(), image(), method="slimming", flops=0.5, progress=False)
