"""VGGs with batch norm: for CIFAR (Pruning from Scratch, Network Slimming), and VGG-A for ImageNet (Network Slimming).

Pruning from Scratch and Network Slimming start with ``gamma`` 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from model_zoo.papers.initial import he

# channels of every convolution, in stages between which there is a pool
VGG16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
VGG19 = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)
VGG_A = ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2)


class VGG(nn.Module):
    """x [N, C, H, W] -> features -> pooled to [N, C_out, side, side] -> [N, classes]."""

    def __init__(self, features: Iterable[nn.Module], side: int, classifier: nn.Module):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


def vgg16_bn(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, gamma: float = 1.0) -> VGG:
    """VGG16 for CIFAR, of Pruning from Scratch: x [N, C, H, W], H and W at least 16.

    ``width`` 1.25 is the expanded network that Pruning from Scratch prunes: 80 channels instead of 64, and so on.
    """
    return _cifar(VGG16, num_classes, in_channels, width, gamma)


def vgg19_bn(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, gamma: float = 1.0) -> VGG:
    """VGG19 for CIFAR, of Network Slimming and Pruning from Scratch: x [N, C, H, W], H and W at least 16."""
    return _cifar(VGG19, num_classes, in_channels, width, gamma)


def vgg_a_bn(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, gamma: float = 1.0) -> VGG:
    """VGG-A for ImageNet, of Network Slimming: no dropout, batch norm in the classifier; H and W at least 32."""
    stages = _scaled(VGG_A, width)
    hidden, side = round(4096 * width), 7
    classifier = nn.Sequential(
        *_dense(stages[-1][-1] * side**2, hidden), *_dense(hidden, hidden), nn.Linear(hidden, num_classes)
    )
    layers = (*_features(stages, in_channels, bias=True), nn.MaxPool2d(2))
    return he(VGG(layers, side, classifier), gamma)


def _cifar(stages: tuple[tuple[int, ...], ...], num_classes: int, in_channels: int, width: float, gamma: float) -> VGG:
    stages = _scaled(stages, width)
    classifier = nn.Linear(stages[-1][-1], num_classes)
    return he(VGG(_features(stages, in_channels, bias=False), 1, classifier), gamma)


def _scaled(stages: tuple[tuple[int, ...], ...], width: float) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(round(c * width) for c in stage) for stage in stages)


def _features(stages: tuple[tuple[int, ...], ...], inputs: int, bias: bool) -> Iterator[nn.Module]:
    for number, stage in enumerate(stages):
        if number:
            yield nn.MaxPool2d(2)
        for outputs in stage:
            yield from (nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU())
            inputs = outputs


def _dense(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()
