"""Residual networks: for CIFAR of basic blocks, of bottlenecks, and pre-activated; ResNet-50 for ImageNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.papers.initial import he

Shortcut = Literal["conv", "pad"]
Block = Callable[[int, int, int], nn.Module]  # input channels, width, stride

CIFAR = (16, 32, 64)  # width of every stage
EXPANSION = 4  # outputs of a bottleneck / its width


class Pad(nn.Module):
    """A shortcut without weights, "option A": every ``stride``-th pixel, with zeros for the channels that are new."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class Basic(nn.Module):
    """Two 3x3 convolutions: x [N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1: x [N, C_in, H, W] -> [N, 4 width, H / stride, W / stride]. The stride is in the 3x3."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, "conv")

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class PreBottleneck(nn.Module):
    """A bottleneck whose norms and ReLUs come before the convolutions; what it adds to, nothing normalises."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = EXPANSION * width
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, outputs, 1, bias=False)
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return self.conv3(F.relu(self.bn3(y))) + self.shortcut(x)


class ResNet(nn.Module):
    """x [N, C, H, W] -> stem -> stages -> tail -> pooled to [N, C_out] -> [N, classes]."""

    def __init__(self, stem: Sequence[nn.Module], stages: nn.Module, tail: Sequence[nn.Module], head: nn.Module):
        super().__init__()
        self.stem, self.stages, self.tail = nn.Sequential(*stem), stages, nn.Sequential(*tail)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.tail(self.stages(self.stem(x)))), 1))


def resnet(
    depth: int = 20,
    shortcut: Shortcut = "conv",
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    gamma: float = 1.0,
) -> ResNet:
    """ResNet of basic blocks for CIFAR, of depth 6n + 2 (20, 32, 44, 56, 110): x [N, C, H, W], any H and W.

    Args:
        depth: layers with weights, shortcuts not counted.
        shortcut: where the shape changes, a 1x1 convolution with batch norm, as in Pruning from Scratch, Global Sparse
            Momentum and DHP; or zeros for the new channels, as in He et al. (2016).
        num_classes: of the last layer.
        in_channels: of the images.
        width: factor on all channels.
        gamma: first scale of the batch norms.
    """
    if shortcut not in ("conv", "pad"):
        raise ValueError(f"shortcut={shortcut!r} is unknown. Known: conv, pad.")
    counts, widths = [_blocks(depth, 6)] * 3, _scaled(CIFAR, width)
    stages = _stages(lambda c, w, s: Basic(c, w, s, shortcut), counts, widths, widths[0], 1)
    stem = (nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
    return he(ResNet(stem, stages, (), nn.Linear(widths[-1], num_classes)), gamma)


def resnet_bottleneck(
    depth: int = 164, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, gamma: float = 1.0
) -> ResNet:
    """ResNet of bottlenecks for CIFAR, of depth 9n + 2 (110, 164), as in DHP: x [N, C, H, W], any H and W."""
    counts, widths = [_blocks(depth, 9)] * 3, _scaled(CIFAR, width)
    stages = _stages(Bottleneck, counts, widths, widths[0], EXPANSION)
    stem = (nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
    return he(ResNet(stem, stages, (), nn.Linear(EXPANSION * widths[-1], num_classes)), gamma)


def preresnet(
    depth: int = 164, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, gamma: float = 1.0
) -> ResNet:
    """Pre-activation ResNet of bottlenecks for CIFAR, of depth 9n + 2, as in Network Slimming: x [N, C, H, W].

    Network Slimming starts with ``gamma`` 0.5. Its layers that select channels are not here: they are not needed.
    """
    counts, widths = [_blocks(depth, 9)] * 3, _scaled(CIFAR, width)
    stages = _stages(PreBottleneck, counts, widths, widths[0], EXPANSION)
    outputs = EXPANSION * widths[-1]
    stem = (nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),)
    return he(ResNet(stem, stages, (nn.BatchNorm2d(outputs), nn.ReLU()), nn.Linear(outputs, num_classes)), gamma)


def resnet_50(num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, gamma: float = 1.0) -> ResNet:
    """ResNet-50 for ImageNet, of Pruning from Scratch and Global Sparse Momentum: x [N, C, H, W], any H and W."""
    widths = _scaled((64, 128, 256, 512), width)
    stages = _stages(Bottleneck, (3, 4, 6, 3), widths, widths[0], EXPANSION)
    conv = nn.Conv2d(in_channels, widths[0], 7, stride=2, padding=3, bias=False)
    stem = (conv, nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
    return he(ResNet(stem, stages, (), nn.Linear(EXPANSION * widths[-1], num_classes)), gamma)


def _stages(block: Block, counts: Sequence[int], widths: Sequence[int], inputs: int, expansion: int) -> nn.Sequential:
    """``counts`` blocks of every width; all stages but the first halve the resolution."""
    stages = []
    for number, (count, width) in enumerate(zip(counts, widths, strict=True)):
        first = block(inputs, width, 1 if number == 0 else 2)
        inputs = expansion * width
        stages.append(nn.Sequential(first, *(block(inputs, width, 1) for _ in range(count - 1))))
    return nn.Sequential(*stages)


def _shortcut(inputs: int, outputs: int, stride: int, kind: Shortcut) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "pad":
        return Pad(inputs, outputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _scaled(widths: Sequence[int], width: float) -> list[int]:
    return [round(c * width) for c in widths]


def _blocks(depth: int, step: int) -> int:
    """Blocks of each of the three stages."""
    if depth < step + 2 or (depth - 2) % step:
        raise ValueError(f"depth={depth} must be 2 more than a multiple of {step}, like {step + 2} or {9 * step + 2}.")
    return (depth - 2) // step
