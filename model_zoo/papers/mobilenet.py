"""MobileNets for ImageNet, as in Pruning from Scratch and DHP.

``width`` multiplies every count of channels, without rounding to multiples of 8. ``strides`` are those of the five
places where the resolution may be halved, the stem first; DHP has (2, 1, 2, 2, 2) in MobileNetV2 for Tiny ImageNet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_zoo.papers.initial import he

Strides = tuple[int, int, int, int, int]
Activation = type[nn.Module]


class MobileNet(nn.Module):
    """x [N, C, H, W] -> features -> pooled to [N, C_out] -> [N, classes]."""

    def __init__(self, features: list[nn.Module], channels: int, dropout: float, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class Inverted(nn.Module):
    """Widens by ``expansion``, filters depthwise, narrows: x [N, C_in, H, W] -> [N, C_out, H / stride, W / stride].

    Where nothing changes shape, the input is added.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, act: Activation):
        super().__init__()
        hidden = inputs * expansion
        widen = [_conv(inputs, hidden, 1, 1, act)] if expansion > 1 else []
        narrow = (nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.body = nn.Sequential(*widen, _conv(hidden, hidden, 3, stride, act, depthwise=True), *narrow)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet_v1(
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    strides: Strides = (2, 2, 2, 2, 2),
    act: Activation = nn.ReLU,
    dropout: float = 0.0,
    gamma: float = 1.0,
) -> MobileNet:
    """MobileNetV1: x [N, C, H, W], any H and W. DHP has a dropout of 0.2."""
    first, second, third, fourth, fifth = strides
    inputs = round(32 * width)
    features: list[nn.Module] = [_conv(in_channels, inputs, 3, first, act)]
    pairs = ((64, 1), (128, second), (128, 1), (256, third), (256, 1), (512, fourth))
    for channels, stride in (*pairs, *[(512, 1)] * 5, (1024, fifth), (1024, 1)):
        outputs = round(channels * width)
        depthwise = _conv(inputs, inputs, 3, stride, act, depthwise=True)
        features.append(nn.Sequential(depthwise, _conv(inputs, outputs, 1, 1, act)))
        inputs = outputs
    return he(MobileNet(features, inputs, dropout, num_classes), gamma)


def mobilenet_v2(
    num_classes: int = 1000,
    in_channels: int = 3,
    width: float = 1.0,
    strides: Strides = (2, 2, 2, 2, 2),
    act: Activation = nn.ReLU6,
    dropout: float = 0.2,
    gamma: float = 1.0,
) -> MobileNet:
    """MobileNetV2: x [N, C, H, W], any H and W. With ``width`` 1 it is torchvision's; DHP has ``act`` ReLU."""
    first, second, third, fourth, fifth = strides
    inputs = round(32 * width)
    features: list[nn.Module] = [_conv(in_channels, inputs, 3, first, act)]
    stages = (  # expansion, channels, blocks, stride of the first
        (1, 16, 1, 1),
        (6, 24, 2, second),
        (6, 32, 3, third),
        (6, 64, 4, fourth),
        (6, 96, 3, 1),
        (6, 160, 3, fifth),
        (6, 320, 1, 1),
    )
    for expansion, channels, count, stride in stages:
        outputs = round(channels * width)
        for number in range(count):
            features.append(Inverted(inputs, outputs, stride if number == 0 else 1, expansion, act))
            inputs = outputs
    outputs = round(1280 * width)
    features.append(_conv(inputs, outputs, 1, 1, act))
    return he(MobileNet(features, outputs, dropout, num_classes), gamma)


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int, act: Activation, depthwise: bool = False
) -> nn.Sequential:
    groups = inputs if depthwise else 1
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())
