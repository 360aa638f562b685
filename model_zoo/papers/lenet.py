"""The networks for handwritten digits of Global Sparse Momentum and Network Slimming. Images are 28 x 28."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from model_zoo.papers.initial import he, xavier

SIDE = 28  # pixels


def lenet_300_100(num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> nn.Sequential:
    """LeNet-300-100 of Global Sparse Momentum: x [N, C, 28, 28] -> [N, classes]."""
    sizes = (in_channels * SIDE**2, round(300 * width), round(100 * width))
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return xavier(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], num_classes)))


def lenet_5(num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> nn.Sequential:
    """LeNet-5 of Global Sparse Momentum, with the sizes of Caffe's: x [N, C, 28, 28] -> [N, classes]."""
    first, second, third = (round(c * width) for c in (20, 50, 500))
    features = (*_pooled(in_channels, first), *_pooled(first, second), nn.Flatten())
    classifier = (nn.Linear(second * 4 * 4, third), nn.ReLU(), nn.Linear(third, num_classes))
    return xavier(nn.Sequential(*features, *classifier))


def mlp_784_500_300_10(
    num_classes: int = 10, in_channels: int = 1, width: float = 1.0, gamma: float = 1.0
) -> nn.Sequential:
    """The perceptron of Network Slimming, with the batch norms whose scales it prunes by: x [N, C, 28, 28].

    Network Slimming starts with ``gamma`` 0.5.
    """
    sizes = (in_channels * SIDE**2, round(500 * width), round(300 * width))
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())]
    return he(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], num_classes)), gamma)


def _pooled(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 5), nn.ReLU(), nn.MaxPool2d(2)
