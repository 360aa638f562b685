"""Super-resolution and denoising, as in DHP: SRResNet, EDSR, DnCNN and U-Net. All are made of convolutions only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.papers.initial import xavier

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, for images in [0, 1]


class Residual(nn.Module):
    """Adds what the layers make of it: x [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SuperResolution(nn.Module):
    """x [N, C, H, W] -> head -> body, with a residual around it -> tail [N, C, scale H, scale W].

    ``mean``: of the images, one number per channel; subtracted from the input, and added to the output.
    """

    mean: Tensor

    def __init__(self, head: nn.Module, body: nn.Module, tail: nn.Module, mean: Sequence[float] = (0.0,)):
        super().__init__()
        self.head, self.body, self.tail = head, body, tail
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(self.head(x - self.mean))) + self.mean


class UNet(nn.Module):
    """A level down halves the resolution and doubles the channels: x [N, C, H, W] -> [N, C, H, W].

    H and W are multiples of 2 ** (depth - 1).
    """

    def __init__(self, in_channels: int, features: int, depth: int):
        super().__init__()
        widths = [features * 2**level for level in range(depth)]
        self.down = nn.ModuleList(_double(a, b) for a, b in zip((in_channels, *widths), widths, strict=False))
        pairs = [*zip(widths[:0:-1], widths[-2::-1], strict=True)]
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(_double(2 * b, b) for _, b in pairs)
        self.last = nn.Conv2d(features, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for number, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if number else x)
            kept.append(x)
        for skipped, grow, up in zip(kept[-2::-1], self.grow, self.up, strict=True):
            x = up(torch.cat((grow(x), skipped), 1))
        return self.last(x)


def srresnet(in_channels: int = 3, width: float = 1.0, blocks: int = 16, scale: int = 4) -> SuperResolution:
    """SRResNet: x [N, C, H, W] -> [N, C, scale H, scale W]; ``scale`` is a power of two."""
    features = round(64 * width)
    head = nn.Sequential(nn.Conv2d(in_channels, features, 9, padding=4), nn.PReLU())
    residuals = (
        Residual(_conv(features), nn.BatchNorm2d(features), nn.PReLU(), _conv(features), nn.BatchNorm2d(features))
        for _ in range(blocks)
    )
    body = Residual(*residuals, _conv(features), nn.BatchNorm2d(features))
    tail = nn.Sequential(*_upsample(features, scale, nn.PReLU), nn.Conv2d(features, in_channels, 3, padding=1))
    return SuperResolution(head, body, tail)


def edsr(
    in_channels: int = 3, width: float = 1.0, blocks: int = 8, scale: int = 4, mean: Sequence[float] | None = None
) -> SuperResolution:
    """EDSR of DHP, 8 blocks of 128 channels without norms: x [N, C, H, W] -> [N, C, scale H, scale W].

    Args:
        in_channels: of the images.
        width: factor on all channels.
        blocks: with a residual each.
        scale: of the output, a power of two.
        mean: of the images; that of DIV2K in [0, 1] unless given, which for other than 3 channels is one number.
    """
    features = round(128 * width)
    residuals = (Residual(_conv(features), nn.ReLU(), _conv(features)) for _ in range(blocks))
    tail = nn.Sequential(*_upsample(features, scale), nn.Conv2d(features, in_channels, 3, padding=1))
    if mean is None:
        mean = RGB_MEAN if in_channels == len(RGB_MEAN) else (sum(RGB_MEAN) / len(RGB_MEAN),)
    head = nn.Conv2d(in_channels, features, 3, padding=1)
    return SuperResolution(head, Residual(*residuals, _conv(features)), tail, mean)


def dncnn(in_channels: int = 1, width: float = 1.0, blocks: int = 15) -> Residual:
    """DnCNN: x [N, C, H, W] -> [N, C, H, W]. What it adds to the image is minus the noise."""
    features = round(64 * width)
    body = [layer for _ in range(blocks) for layer in (_conv(features), nn.BatchNorm2d(features), nn.ReLU())]
    head = (nn.Conv2d(in_channels, features, 3, padding=1), nn.ReLU())
    return Residual(*head, *body, nn.Conv2d(features, in_channels, 3, padding=1))


def unet(in_channels: int = 1, width: float = 1.0, depth: int = 5) -> UNet:
    """U-Net with transposed convolutions: x [N, C, H, W] -> [N, C, H, W], H and W multiples of 2 ** (depth - 1)."""
    return xavier(UNet(in_channels, round(32 * width), depth), nn.init.xavier_normal_)


def _conv(features: int) -> nn.Conv2d:
    return nn.Conv2d(features, features, 3, padding=1)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    first, second = nn.Conv2d(inputs, outputs, 3, padding=1), _conv(outputs)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def _upsample(features: int, scale: int, *acts: type[nn.Module]) -> list[nn.Module]:
    if scale < 1 or scale & (scale - 1):
        raise ValueError(f"scale={scale} must be a power of two.")
    layers: list[nn.Module] = []
    for _ in range(scale.bit_length() - 1):
        layers += (nn.Conv2d(features, 4 * features, 3, padding=1), nn.PixelShuffle(2), *(act() for act in acts))
    return layers
