"""Outputs for every position: a U-Net with a time embedding, a detector with heads at several scales."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import network, pixels


class TimeBlock(nn.Module):
    """Group norm, convolution, scale and shift from the time embedding, residual."""

    def __init__(self, inputs: int, outputs: int, time: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, 2 * outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        y = self.norm2(y) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))


class AttentionBlock(nn.Module):
    """Packed QKV by a 1-d convolution over flattened pixels, heads folded into the batch."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = (
            nn.GroupNorm(4, width),
            nn.Conv1d(width, 3 * width, 1),
            nn.Conv1d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        flat = x.reshape(n, c, -1)
        packed = self.qkv(self.norm(flat))
        q, k, v = packed.reshape(n * self.heads, -1, h * w).chunk(3, dim=1)
        weights = torch.einsum("bct,bcs->bts", q / math.sqrt(c // self.heads), k).softmax(-1)
        y = torch.einsum("bts,bcs->bct", weights, v).reshape(n, -1, h * w)
        return (flat + self.proj(y)).reshape(n, c, h, w)


def time_embedding(steps: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=steps.device) / (width // 2))
    angles = steps[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@network(
    lambda: (torch.randn(2, 3, 8, 8), torch.rand(2)),
    """stem.weight[0] time.0.weight[0] time.2.weight[0] down1.conv1.weight[0] down1.time.weight[0] down2.conv2.weight[0]
    up1.conv1.weight[1] up1.skip.weight[1] grow.weight[0] attention.qkv.weight[0]""",
    heads=True,
)
class UNet(nn.Module):
    """Concatenated skips, attention at the bottom, a time embedding into every block."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down1, self.shrink = TimeBlock(16, 16, 32), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.down2, self.attention, self.middle = TimeBlock(16, 32, 32), AttentionBlock(32, 4), TimeBlock(32, 32, 32)
        self.up2, self.grow = TimeBlock(64, 32, 32), nn.Conv2d(32, 16, 3, padding=1)
        self.up1, self.norm, self.head = TimeBlock(32, 16, 32), nn.GroupNorm(4, 16), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        time = self.time(time_embedding(steps, 16))
        skip1 = self.down1(self.stem(x), time)
        skip2 = self.down2(self.shrink(skip1), time)
        x = self.middle(self.attention(skip2), time)
        x = self.up2(torch.cat([x, skip2], dim=1), time)
        x = self.grow(F.interpolate(x, scale_factor=2, mode="nearest"))
        x = self.up1(torch.cat([x, skip1], dim=1), time)
        return self.head(F.silu(self.norm(x)))


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class Split(nn.Module):
    """Half goes through a bottleneck, and every stage of it into the concatenation."""

    def __init__(self, width: int):
        super().__init__()
        self.one, self.inner = (
            conv(width, width, 1),
            nn.Sequential(conv(width // 2, width // 2), conv(width // 2, width // 2)),
        )
        self.two = conv(3 * width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.one(x).chunk(2, 1))
        parts.append(parts[-1] + self.inner(parts[-1]))
        return self.two(torch.cat(parts, 1))


BINS, CLASSES = 8, 5


class Decode(nn.Module):
    """Expected distance over the bins: [N, 4 * bins, A] -> [N, 4, A]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(BINS, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(BINS, dtype=torch.float).view(1, BINS, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, anchors = x.shape
        return self.conv(x.view(n, 4, BINS, anchors).transpose(2, 1).softmax(1)).view(n, 4, anchors)


@network(
    pixels(size=32),
    """stem.0.weight[0] c2.one.0.weight[0] c2.inner.0.0.weight[0] lateral.one.0.weight[1] boxes.0.0.0.weight[0]
    scores.1.0.0.weight[0] reduce.0.weight[0]""",
)
class Detector(nn.Module):
    """A path down and up again, heads at two scales, reshaped maps joined, distances to the four sides decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c2 = conv(3, 16, stride=2), Split(16)
        self.down3, self.c3 = conv(16, 24, stride=2), Split(24)
        self.down4, self.c4 = conv(24, 32, stride=2), Split(32)
        self.reduce, self.lateral = conv(56, 24, 1), Split(24)
        self.boxes = nn.ModuleList(nn.Sequential(conv(c, 16), nn.Conv2d(16, 4 * BINS, 1)) for c in (24, 32))
        self.scores = nn.ModuleList(nn.Sequential(conv(c, 16), nn.Conv2d(16, CLASSES, 1)) for c in (24, 32))
        self.decode = Decode()

    def forward(self, x: Tensor) -> Tensor:
        low = self.c3(self.down3(self.c2(self.stem(x))))
        high = self.c4(self.down4(low))
        low = self.lateral(self.reduce(torch.cat([F.interpolate(high, scale_factor=2.0), low], 1)))
        maps = [
            torch.cat((box(level), score(level)), 1)
            for box, score, level in zip(self.boxes, self.scores, (low, high), strict=True)
        ]
        anchors, strides = self.anchors(maps)
        joined = torch.cat([m.view(m.shape[0], 4 * BINS + CLASSES, -1) for m in maps], 2)
        box, score = joined.split((4 * BINS, CLASSES), 1)
        near, far = self.decode(box).chunk(2, 1)
        one, two = anchors - near, anchors + far
        return torch.cat((torch.cat(((one + two) / 2, two - one), 1) * strides, score.sigmoid()), 1)

    def anchors(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        points, strides = [], []
        for m, stride in zip(maps, (4.0, 8.0), strict=True):
            h, w = m.shape[2:]
            y, x = torch.meshgrid(*(torch.arange(s, device=m.device) + 0.5 for s in (h, w)), indexing="ij")
            points.append(torch.stack((x, y)).flatten(1))
            strides.append(torch.full((1, h * w), stride, device=m.device))
        return torch.cat(points, 1)[None], torch.cat(strides, 1)
