"""The papers' networks have the papers' sizes, run on small images, and can be pruned."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from conftest import randomise
from torch import Tensor, nn

import fxprune
from model_zoo.papers import (
    PAPERS,
    densenet_40_12,
    dncnn,
    edsr,
    lenet_5,
    lenet_300_100,
    mlp_784_500_300_10,
    mobilenet_v1,
    mobilenet_v2,
    preresnet,
    resnet,
    resnet_50,
    resnet_bottleneck,
    srresnet,
    unet,
    vgg16_bn,
    vgg19_bn,
    vgg_a_bn,
)

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


class Golden(NamedTuple):
    """``image``: the input's shape without the batch. Weights without biases; MACs of the layers that have them."""

    image: tuple[int, int, int]
    conv: int
    linear: int
    parameters: int
    macs: int


DIGIT, CIFAR, IMAGENET, GRAY, COLOUR = (1, 28, 28), (3, 32, 32), (3, 224, 224), (1, 128, 128), (3, 128, 128)

# Sums done by hand, or figures of the papers and of their code.
GOLDEN: dict[str, tuple[Callable[[], nn.Module], Golden]] = {
    "lenet_300_100": (lenet_300_100, Golden(DIGIT, 0, 266_200, 266_610, 266_200)),
    "lenet_5": (lenet_5, Golden(DIGIT, 25_500, 405_000, 431_080, 2_293_000)),
    "vgg16_bn": (vgg16_bn, Golden(CIFAR, 14_710_464, 5_120, 14_724_042, 313_201_664)),
    "vgg16_bn, 80 wide": (partial(vgg16_bn, width=1.25), Golden(CIFAR, 22_984_560, 6_400, 23_001_530, 488_823_040)),
    "vgg19_bn": (vgg19_bn, Golden(CIFAR, 20_018_880, 5_120, 20_035_018, 398_136_320)),
    "vgg_a_bn": (vgg_a_bn, Golden(IMAGENET, 9_217_728, 123_633_664, 132_885_224, 7_609_090_048)),
    "resnet_20": (partial(resnet, 20), Golden(CIFAR, 270_256, 640, 272_474, 40_813_184)),
    "resnet_56": (partial(resnet, 56), Golden(CIFAR, 850_864, 640, 855_770, 125_747_840)),
    "resnet_110": (partial(resnet, 110), Golden(CIFAR, 1_721_776, 640, 1_730_714, 253_149_824)),
    "resnet_20, pad": (partial(resnet, 20, "pad"), Golden(CIFAR, 267_696, 640, 269_722, 40_551_040)),
    "resnet_56, pad": (partial(resnet, 56, "pad"), Golden(CIFAR, 848_304, 640, 853_018, 125_485_696)),
    "resnet_110, pad": (partial(resnet, 110, "pad"), Golden(CIFAR, 1_719_216, 640, 1_727_962, 252_887_680)),
    "resnet_110_bottleneck": (
        partial(resnet_bottleneck, 110),
        Golden(CIFAR, 1_128_112, 2_560, 1_147_738, 167_430_656),
    ),
    "resnet_164_bottleneck": (
        partial(resnet_bottleneck, 164),
        Golden(CIFAR, 1_676_464, 2_560, 1_704_154, 247_646_720),
    ),
    "preresnet_164": (preresnet, Golden(CIFAR, 1_676_464, 2_560, 1_703_258, 247_646_720)),
    "densenet_40_12": (densenet_40_12, Golden(CIFAR, 1_036_008, 4_560, 1_059_298, 282_917_328)),
    "densenet_40_12, 16 first": (
        partial(densenet_40_12, init_channels=16),
        Golden(CIFAR, 997_136, 4_480, 1_019_722, 264_812_928),
    ),
    "mobilenet_v1": (mobilenet_v1, Golden(IMAGENET, 3_185_088, 1_024_000, 4_231_976, 568_740_352)),
    "mobilenet_v2": (mobilenet_v2, Golden(IMAGENET, 2_189_760, 1_280_000, 3_504_872, 300_774_272)),
    "resnet_50": (resnet_50, Golden(IMAGENET, 23_454_912, 2_048_000, 25_557_032, 4_089_184_256)),
    "srresnet": (srresnet, Golden(COLOUR, 1_528_704, 0, 1_535_619, 32_718_716_928)),
    "edsr": (edsr, Golden(COLOUR, 3_693_312, 0, 3_696_643, 90_351_599_616)),
    "dncnn": (dncnn, Golden(GRAY, 554_112, 0, 557_057, 9_078_571_008)),
    "unet": (unet, Golden(GRAY, 7_756_096, 0, 7_759_521, 3_008_364_544)),
}


def layers(model: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]


def counted_macs(model: nn.Module, x: Tensor) -> int:
    """Of convolutions and linear layers, from the shapes that they see."""
    found = []

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        positions = inputs[0][0, 0].numel() if isinstance(module, nn.ConvTranspose2d) else output[0, 0].numel()
        found.append(positions * module.weight.numel())

    for module in layers(model, *CONVOLUTIONS, nn.Linear):
        module.register_forward_hook(count)
    model(x)
    return sum(found)


@pytest.mark.parametrize("name", GOLDEN)
def test_sizes(name: str) -> None:
    make, golden = GOLDEN[name]
    with torch.device("meta"):
        model, x = make().eval(), torch.empty(1, *golden.image)
    assert sum(module.weight.numel() for module in layers(model, *CONVOLUTIONS)) == golden.conv
    assert sum(module.weight.numel() for module in layers(model, nn.Linear)) == golden.linear
    # SRResNet was counted without the slopes of its 19 PReLUs, of which there is one in each.
    slopes = len(layers(model, nn.PReLU))
    assert slopes == (19 if name == "srresnet" else 0)
    assert sum(p.numel() for p in model.parameters()) - slopes == golden.parameters
    graph = fxprune.analyze(model, x)
    assert graph.macs() == counted_macs(model, x) == golden.macs
    assert graph.params() == golden.parameters + slopes


# Network Slimming ranks all scales of a network together: this many.
@pytest.mark.parametrize(("make", "scales"), [(vgg19_bn, 5504), (mlp_784_500_300_10, 800)])
def test_scales_to_rank(make: Callable[[], nn.Module], scales: int) -> None:
    assert sum(m.num_features for m in layers(make(), nn.BatchNorm1d, nn.BatchNorm2d)) == scales


# Pruning from Scratch has a gate for every channel of these: of VGGs and MobileNetV1 all but the depthwise layers, of
# MobileNetV2 the stem, the expansions and the last layer, which end in an activation.
@pytest.mark.parametrize(
    ("make", "gates"), [(vgg16_bn, 5280), (vgg19_bn, 6880), (mobilenet_v1, 7480), (mobilenet_v2, 10520)]
)
def test_expanded_networks(make: Callable[..., nn.Module], gates: int) -> None:
    with torch.device("meta"):
        parts = [*make(width=1.25).modules()]
    activated = [a for a, _, c in zip(parts, parts[1:], parts[2:], strict=False) if isinstance(c, (nn.ReLU, nn.ReLU6))]
    assert sum(conv.out_channels for conv in activated if conv.groups == 1) == gates


def test_mobilenet_v2_is_torchvisions() -> None:
    from torchvision import models

    with torch.device("meta"):
        ours, theirs = mobilenet_v2(), models.mobilenet_v2(weights=None)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


# -- they run on small images ------------------------------------------------------------------------------------------

FIXED = ("lenet_300_100", "lenet_5", "mlp_784_500_300_10")  # for 28 x 28
LARGER = ("vgg_a_bn",)  # halves the resolution five times
RESTORATION = {"srresnet": 4, "edsr": 4, "dncnn": 1, "unet": 1}


@pytest.mark.parametrize("name", PAPERS)
def test_small_images_of_one_channel(name: str) -> None:
    size = 28 if name in FIXED else 32 if name in LARGER else 16
    options = {} if name in RESTORATION else {"num_classes": 7}
    with torch.device("meta"):
        model = PAPERS[name](in_channels=1, width=0.5, **options).eval()
        y = model(torch.empty(2, 1, size, size))
    side = size * RESTORATION.get(name, 0)
    assert y.shape == ((2, 1, side, side) if side else (2, 7))


@pytest.mark.parametrize("width", [0.5, 2.0])
@pytest.mark.parametrize("name", PAPERS)
def test_width_is_of_everything_but_the_last_layer(name: str, width: float) -> None:
    with torch.device("meta"):
        one, other = PAPERS[name](), PAPERS[name](width=width)
    inner = [(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True) if a.dim() > 1][:-1]
    assert all(b.shape[0] == width * a.shape[0] for a, b in inner)


def test_gamma_is_the_first_scale_of_every_norm() -> None:
    model = preresnet(11, gamma=0.5)
    assert all(bool((m.weight == 0.5).all()) for m in layers(model, nn.BatchNorm2d))


def test_convolutions_start_as_in_the_papers() -> None:
    deep = vgg16_bn().features[-3]
    assert float(deep.weight.detach().std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("factor", [2, 4])
def test_edsr_takes_the_mean_off_and_adds_it(factor: int) -> None:
    model = edsr(width=0.0625, blocks=1, scale=factor)
    nn.init.zeros_(model.tail[-1].weight)
    nn.init.zeros_(model.tail[-1].bias)
    y = model(torch.rand(1, 3, 4, 4))
    assert torch.equal(y, model.mean.expand(1, 3, 4 * factor, 4 * factor))


def test_zeros_are_added_on_both_sides() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)
    y = resnet(8, "pad", width=0.125).stages[1][0].shortcut(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(resnet, 21), "depth=21 must be 2 more than a multiple of 6, like 8 or 56."),
        (partial(preresnet, 32), "depth=32 must be 2 more than a multiple of 9, like 11 or 83."),
        (partial(resnet, 20, "A"), "shortcut='A' is unknown. Known: conv, pad."),
        (partial(densenet_40_12, depth=41), "depth=41 must be 4 more than a multiple of 3, like 10 or 40."),
        (partial(edsr, scale=3), "scale=3 must be a power of two."),
    ],
)
def test_what_cannot_be_built_says_why(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# -- they can be pruned ------------------------------------------------------------------------------------------------

PRUNED: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "lenet_5": (partial(lenet_5, width=0.5), DIGIT),
    "mlp_784_500_300_10": (partial(mlp_784_500_300_10, width=0.25), DIGIT),
    "vgg16_bn": (partial(vgg16_bn, width=0.25, in_channels=1), (1, 16, 16)),
    "resnet_20": (partial(resnet, 20), CIFAR),
    "resnet_20, pad": (partial(resnet, 20, "pad"), CIFAR),
    "resnet_bottleneck": (partial(resnet_bottleneck, 20), (3, 16, 16)),
    "preresnet": (partial(preresnet, 29), (3, 16, 16)),
    "densenet_40_12": (partial(densenet_40_12, init_channels=16), (3, 8, 8)),
    "mobilenet_v1": (partial(mobilenet_v1, width=0.25), (3, 64, 64)),
    "mobilenet_v2": (partial(mobilenet_v2, width=0.5), (3, 64, 64)),
    "srresnet": (partial(srresnet, width=0.25, blocks=3), (3, 8, 8)),
    "edsr": (partial(edsr, width=0.25, blocks=3), (3, 8, 8)),
    "dncnn": (partial(dncnn, width=0.5, blocks=5), (1, 16, 16)),
    "unet": (partial(unet, width=0.25), (1, 16, 16)),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PRUNED)
def test_half_the_macs(name: str) -> None:
    make, image = PRUNED[name]
    model, x = randomise(make()).eval(), torch.randn(2, *image)
    pruned = fxprune.prune(model, x, flops=0.5, progress=False)
    report = pruned.meta["fxprune"]
    assert 0.45 < report.macs_after / report.macs_before <= 0.5
    assert report.oracle_error is not None, "it was not verified"
    assert report.prunable_share == 1
    assert pruned(x).shape == model(x).shape
