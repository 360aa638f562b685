"""The networks of the four papers whose methods fxprune reproduces, in plain PyTorch, one file per family.

- Pruning from Scratch: Wang et al., AAAI 2020
- Global Sparse Momentum: Ding et al., NeurIPS 2019
- Network Slimming: Liu et al., ICCV 2017
- DHP: Li et al., ECCV 2020

Every factory takes ``in_channels`` and ``width``, a factor on all channels; classifiers take ``num_classes``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from model_zoo.papers.densenet import densenet_40_12
from model_zoo.papers.lenet import lenet_5, lenet_300_100, mlp_784_500_300_10
from model_zoo.papers.mobilenet import mobilenet_v1, mobilenet_v2
from model_zoo.papers.resnet import preresnet, resnet, resnet_50, resnet_bottleneck
from model_zoo.papers.restoration import dncnn, edsr, srresnet, unet
from model_zoo.papers.vgg import vgg16_bn, vgg19_bn, vgg_a_bn

PAPERS: dict[str, Callable[..., nn.Module]] = {
    "lenet_300_100": lenet_300_100,
    "lenet_5": lenet_5,
    "mlp_784_500_300_10": mlp_784_500_300_10,
    "vgg16_bn": vgg16_bn,
    "vgg19_bn": vgg19_bn,
    "vgg_a_bn": vgg_a_bn,
    **{f"resnet_{depth}": partial(resnet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet_{depth}_bottleneck": partial(resnet_bottleneck, depth) for depth in (110, 164)},
    "preresnet_164": preresnet,
    "resnet_50": resnet_50,
    "densenet_40_12": densenet_40_12,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "srresnet": srresnet,
    "edsr": edsr,
    "dncnn": dncnn,
    "unet": unet,
}

__all__ = [
    "PAPERS",
    "densenet_40_12",
    "dncnn",
    "edsr",
    "lenet_5",
    "lenet_300_100",
    "mlp_784_500_300_10",
    "mobilenet_v1",
    "mobilenet_v2",
    "preresnet",
    "resnet",
    "resnet_50",
    "resnet_bottleneck",
    "srresnet",
    "unet",
    "vgg16_bn",
    "vgg19_bn",
    "vgg_a_bn",
]
