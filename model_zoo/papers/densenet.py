"""DenseNet for CIFAR without bottlenecks, of Network Slimming (24 first channels) and Global Sparse Momentum (16)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.papers.initial import he


class Layer(nn.Module):
    """Appends ``growth`` channels: x [N, C, H, W] -> [N, C + growth, H, W]."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(F.relu(self.norm(x)))), 1)


class Transition(nn.Module):
    """x [N, C, H, W] -> [N, C, H / 2, W / 2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """Three blocks of ``layers``, with transitions between them: x [N, C, H, W] -> [N, classes]."""

    def __init__(self, layers: int, growth: int, first: int, num_classes: int, in_channels: int):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        channels = first
        parts: list[nn.Module] = []
        for block in range(3):
            if block:
                parts.append(Transition(channels))
            parts.append(nn.Sequential(*(Layer(channels + i * growth, growth) for i in range(layers))))
            channels += layers * growth
        self.features = nn.Sequential(*parts, nn.BatchNorm2d(channels), nn.ReLU())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.features(self.stem(x))), 1))


def densenet_40_12(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    init_channels: int = 24,
    depth: int = 40,
    gamma: float = 1.0,
) -> DenseNet:
    """DenseNet of growth 12 and depth 3n + 4: x [N, C, H, W], H and W at least 4.

    Args:
        num_classes: of the last layer.
        in_channels: of the images.
        width: factor on the growth and on ``init_channels``.
        init_channels: of the stem; 24 in the PyTorch code of Network Slimming, 16 in Huang et al. (2017), in Global
            Sparse Momentum, and in the 1.02 M parameters that Network Slimming prints.
        depth: layers with weights.
        gamma: first scale of the batch norms; 0.5 in Network Slimming.
    """
    if depth < 7 or (depth - 4) % 3:
        raise ValueError(f"depth={depth} must be 4 more than a multiple of 3, like 10 or 40.")
    net = DenseNet((depth - 4) // 3, round(12 * width), round(init_channels * width), num_classes, in_channels)
    return he(net, gamma)
