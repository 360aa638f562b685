"""Norms. Statistics per channel are exact; statistics over channels make a group approximate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from labels.nets import approximate, conv, exact, image, net, result
from torch import Tensor, nn

ENDS = (image("a[1]"), result("b[0]"))


class _Between(nn.Module):
    """A norm between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = conv(3, 8), self.norm(), conv(8, 5)

    def norm(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(x)))


@net(*ENDS, approximate(4, "a[0] n[0] b[1]", "group_norm over channels", blocks=2))
class GroupNorm(_Between):
    def norm(self) -> nn.Module:
        return nn.GroupNorm(2, 8)


@net(*ENDS, approximate(8, "a[0] n[0] b[1]", "group_norm over channels"))
class GroupNormOfOne(_Between):
    def norm(self) -> nn.Module:
        return nn.GroupNorm(1, 8)


@net(*ENDS, exact(8, "a[0] n[0] b[1]"))
class GroupNormOfEach(_Between):
    """As many groups as channels: every channel has its own statistics."""

    def norm(self) -> nn.Module:
        return nn.GroupNorm(8, 8)


@net(*ENDS, exact(8, "a[0] n[0] b[1]"))
class InstanceNorm(_Between):
    def norm(self) -> nn.Module:
        return nn.InstanceNorm2d(8, affine=True)


@net(*ENDS, exact(8, "a[0] n[0] b[1]"))
class InstanceNormWithHistory(_Between):
    def norm(self) -> nn.Module:
        return nn.InstanceNorm2d(8, affine=True, track_running_stats=True)


@net(*ENDS, approximate(4, "a[0] weight[0] b[1]", "group_norm over channels", blocks=2))
class FunctionalGroupNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.weight = conv(3, 8), conv(8, 5), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.group_norm(self.a(x), 2, self.weight))


class _ChannelsLast(nn.LayerNorm):
    """ConvNeXt's norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


@net(*ENDS, approximate(8, "a[0] n[0] b[1]", "layer_norm over channels"))
class LayerNormOfImages(_Between):
    def norm(self) -> nn.Module:
        return _ChannelsLast(8)


@net(image("a[1]"), result("h[0]"), approximate(8, "a[0] n[0] f[1]", "layer_norm over channels"), exact(6, "f[0] h[1]"))
class LayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.f, self.h = conv(3, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.f(self.n(self.a(x).mean((2, 3)))).relu())


@net(image("a[1]"), result("h[0]"), approximate(8, "a[0] n[0] f[1]", "over channels"), exact(6, "f[0] h[1]"))
class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.f, self.h = conv(3, 8), nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.f(self.n(self.a(x).mean((2, 3)))).relu())


@net(image("a[1]"), result("h[0]"), approximate(8, "a[0] scale[0] h[1]", "mean over channels"))
class RMSNormByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.h, self.scale = conv(3, 8), nn.Linear(8, 5), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).mean((2, 3))
        return self.h(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale)


@net(image("a[1]"), result("b[0]"), approximate(8, "a[0] gamma[1] beta[1] b[1]", "mean over channels"))
class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2: the norm of a channel over positions, divided by its mean over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 5)
        self.gamma, self.beta = nn.Parameter(torch.randn(1, 8, 1, 1)), nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        g = x.norm(p=2, dim=(2, 3), keepdim=True)
        n = g / (g.mean(dim=1, keepdim=True) + 1e-6)
        return self.b(self.gamma * (x * n) + self.beta + x)


@net(image("a[1]"), result("h[0]"), approximate(8, "a[0] h[1]", "linalg_vector_norm over channels"))
class UnitLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = conv(3, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(F.normalize(self.a(x).mean((2, 3)), dim=1))


@net(*ENDS, approximate(8, "a[0] b[1]", "softmax over channels"))
class SoftmaxOfChannels(_Between):
    def norm(self) -> nn.Module:
        return nn.Softmax(1)


@net(
    image("e[1]"), result("h[0]"), exact(8, "e[0] qkv[1]"),
    approximate(4, "qkv[0] h[1]", "softmax over channels", blocks=4),
)  # fmt: skip
class CrossCovariance(nn.Module):
    """Attention between channels instead of tokens. One reshape splits queries, keys and values: blocks of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.qkv, self.h = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 4, 1)
        q, k = (F.normalize(each, dim=-1) for each in (q, k))
        x = (q @ k.mT).softmax(-1) @ v
        return self.h(x.permute(0, 3, 1, 2).flatten(2).mean(1))


@net(*ENDS, approximate(8, "a[0] b[1]", "convolution across channels"))
class EfficientChannelAttention(_Between):
    """A convolution that slides over channels: those that stay become neighbours."""

    def norm(self) -> nn.Module:
        return nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.n(x.mean((2, 3)).unsqueeze(1))
        return self.b(x * y.sigmoid().transpose(1, 2).unsqueeze(-1))
