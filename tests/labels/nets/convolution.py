"""Convolutions of every kind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from labels.nets import approximate, conv, exact, image, locked, net, result
from torch import Tensor, nn
from torchvision.ops import DeformConv2d


@net(exact(8, "a[0] d[0] n[0] b[1]"), image("a[1]"), result("b[0]"))
class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.n, self.b = conv(3, 8), conv(8, 8, groups=8), nn.BatchNorm2d(8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu6(self.n(self.d(self.a(x)))))


@net(exact(8, "a[0] d[0] b[1]"), image("a[1]"), result("b[0]"))
class DepthwiseMultiplier(nn.Module):
    """Two outputs per input: they go with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.b = conv(3, 8), conv(8, 16, groups=8), conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.d(self.a(x)))


@net(exact(4, "a[0] g[1]", blocks=2), exact(3, "g[0] n[0] b[1]", blocks=2), image("a[1]"), result("b[0]"))
class Grouped(nn.Module):
    """Groups keep equal counts, of inputs and of outputs each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.n, self.b = conv(3, 8), conv(8, 6, groups=2), nn.BatchNorm2d(6), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.g(self.a(x))).relu())


@net(exact(3, "a[0] g[1] g[0] b[1]", blocks=4), image("a[1]"), result("b[0]"))
class GroupedResidual(nn.Module):
    """Inputs and outputs are the same channels in the same groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b = conv(3, 12), conv(12, 12, groups=4), conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x + self.g(x))


@net(
    exact(2, "a[0] f[1]", blocks=4), exact(4, "f[0] g[1]", blocks=4), exact(8, "g[0] b[1]", blocks=2),
    image("a[1]"), result("b[0]"),
)  # fmt: skip
class GroupsInGroups(nn.Module):
    """Four groups, then two: equal counts in four say all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f, self.g, self.b = conv(3, 8), conv(8, 16, groups=4), conv(16, 16, groups=2), conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.g(self.f(self.a(x))))


@net(exact(4, "a[0] c[0] g[1]", blocks=2), exact(4, "g[0] b[1]", blocks=2), image("a[1] c[1]"), result("b[0]"))
class GroupedAfterSum(nn.Module):
    """Groups reach back through a sum to every producer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.g, self.b = conv(3, 8), conv(3, 8), conv(8, 8, groups=2), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.g(self.a(x) + self.c(x)))


@net(exact(6, "a[0] c[0] g[1]", blocks=2), exact(3, "g[0] b[1]", blocks=2), image("a[1] c[1]"), result("b[0]"), least=2)
class GroupedAfterConcat(nn.Module):
    """The two pieces of a concatenation are the two groups: equal counts, though the channels differ in kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.g, self.b = conv(3, 6), conv(3, 6), conv(12, 6, groups=2), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.g(torch.cat([self.a(x), self.c(x)], 1)))


@net(exact(8, "a[0] up.weight[0]"), exact(6, "up.weight[1] up.bias[0] b[1]"), image("a[1]"), result("b[0]"))
class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.up(self.a(x)))


@net(
    exact(4, "a[0] up.weight[0]", blocks=2), exact(3, "up.weight[1] up.bias[0] b[1]", blocks=2),
    image("a[1]"), result("b[0]"),
)  # fmt: skip
class TransposedGrouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2, groups=2), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.up(self.a(x)))


@net(exact(8, "a[0] up.weight[0] up.bias[0] b[1]"), image("a[1]"), result("b[0]"))
class TransposedDepthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = conv(3, 8), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.up(self.a(x)))


def _sound(batch: int) -> Tensor:
    return torch.randn(batch, 3, 12)


@net(exact(8, "a[0] n[0] b[1]"), exact(6, "b[0] h[1]"), image("a[1]"), result("h[0]"), inputs=_sound)
class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 6, 5, dilation=2)
        self.h = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.b(F.max_pool1d(self.n(self.a(x)), 1)).amax(-1))


def _video(batch: int) -> Tensor:
    return torch.randn(batch, 3, 4, 6, 6)


@net(exact(8, "a[0] n[0] b[1]"), exact(6, "b[0] h[1]"), image("a[1]"), result("h[0]"), inputs=_video)
class Conv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv3d(3, 8, (1, 3, 3)), nn.BatchNorm3d(8), nn.Conv3d(8, 6, 3)
        self.h = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(self.n(self.a(x)).relu(), 1)
        return self.h(F.adaptive_avg_pool3d(self.b(x), 1).flatten(1))


class _StandardisedConv(nn.Conv2d):
    """The weight is normalised over input channels and kernel, for every output channel."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class _StandardisedByNorm(nn.Conv2d):
    """Input channels and kernel positions share a dimension for a while: the kernel stays."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, self.stride, self.padding)


@net(approximate(8, "a[0] s[1]", "mean over channels"), exact(6, "s[0] b[1]"), image("a[1]"), result("b[0]"))
class WeightStandardisation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.b = conv(3, 8), _StandardisedConv(8, 6, 3, padding=1), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.s(self.a(x)).relu())


@net(
    approximate(8, "a[0] s[1]", "statistics over input channels"), exact(6, "s[0] b[1]"), image("a[1]"), result("b[0]"),
    locked(3, "s.weight[2]", "two kinds of channels meet"), locked(3, "s.weight[3]", "two kinds of channels meet"),
)  # fmt: skip
class WeightStandardisationByNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.b = conv(3, 8), _StandardisedByNorm(8, 6, 3, padding=1), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.s(self.a(x)).relu())


@net(
    approximate(8, "a[0] w.parametrizations.weight.original1[1]", "weight norm over input channels"),
    exact(6, "w.bias[0] w.parametrizations.weight.original0[0] w.parametrizations.weight.original1[0] b[1]"),
    image("a[1]"), result("b[0]"),
)  # fmt: skip
class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(6, 5)
        self.w = nn.utils.parametrizations.weight_norm(conv(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.w(self.a(x)).relu())


@net(exact(8, "a[0] w[1]"), exact(6, "w[0] bias[0] b[1]"), image("a[1]"), result("b[0]"))
class WeightAsParameter(nn.Module):
    """A functional convolution with a weight scaled by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(6, 5)
        self.w, self.bias = nn.Parameter(torch.randn(6, 8, 3, 3)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.conv2d(self.a(x), self.w * 0.5, self.bias, padding=1))


@net(
    exact(8, "a[0] o[1] d[1]"), exact(6, "d[0] b[1]"), image("a[1]"), result("b[0]"),
    locked(18, "o[0]", "offsets of a deformable convolution"), counted=False,
)  # fmt: skip
class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.b = conv(3, 8), conv(8, 18), conv(6, 5)
        self.d = DeformConv2d(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.d(x, self.o(x)))


@net(
    exact(4, "a[0] o[1] m[1] d[1]", blocks=2), exact(6, "d[0] b[1]"), image("a[1]"), result("b[0]"),
    locked(36, "o[0]", "offsets of a deformable convolution"),
    locked(18, "m[0]", "offsets of a deformable convolution"), counted=False,
)  # fmt: skip
class DeformableWithMask(nn.Module):
    """Half of the channels share offsets each, and keep equal counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.m, self.b = conv(3, 8), conv(8, 36), conv(8, 18), conv(6, 5)
        self.d = DeformConv2d(8, 6, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.d(x, self.o(x), self.m(x).sigmoid()))


@net(
    exact(8, "a[0] o[1] d[0] b[1]"), image("a[1]"), result("b[0]"),
    locked(18, "o[0]", "offsets of a deformable convolution"), counted=False,
)  # fmt: skip
class DeformableDepthwise(nn.Module):
    """Whole groups go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.b = conv(3, 8), conv(8, 18), conv(8, 5)
        self.d = DeformConv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.d(x, self.o(x)))


@net(
    exact(4, "a[0] o[1] d[1]", blocks=2), exact(3, "d[0] b[1]", blocks=2), image("a[1]"), result("b[0]"),
    locked(18, "o[0]", "offsets of a deformable convolution"), counted=False,
)  # fmt: skip
class DeformableGrouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.b = conv(3, 8), conv(8, 18), conv(6, 5)
        self.d = DeformConv2d(8, 6, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.d(x, self.o(x)))


class _Modulated(nn.Module):
    """A convolution with another weight for every sample, in one call: every sample is a group, as in StyleGAN2."""

    def __init__(self, channels_in: int, channels_out: int, upsampling: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, channels_out, channels_in, 3, 3))
        self.style, self.upsampling = nn.Linear(7, channels_in), upsampling

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        n, c, *sides = x.shape
        weight = self.weight * self.style(style).view(n, 1, c, 1, 1)
        x = x.reshape(1, n * c, *sides)
        if self.upsampling:
            y = F.conv_transpose2d(x, weight.transpose(1, 2).reshape(n * c, -1, 3, 3), stride=2, groups=n)
        else:
            y = F.conv2d(x, weight.reshape(-1, c, 3, 3), groups=n)
        return y.view(n, -1, *y.shape[2:])


@net(
    exact(6, "start[1] a.weight[2] a.style[0]"),
    exact(8, "a.weight[1] b.weight[2] b.style[0]"),
    exact(10, "b.weight[1] h[1]"),
    exact(7, "style[0] a.style[1] b.style[1]"),
    image("style[1]"),
    result("h[0]"),
    locked(4, "start[2]", "cut along a convolved dimension"),
    locked(4, "start[3]", "cut along a convolved dimension"),
)
class EverySampleItsOwnWeight(nn.Module):
    """From what every sample begins with alike, repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 6, 4, 4))
        self.style, self.a, self.b = nn.Linear(3, 7), _Modulated(6, 8), _Modulated(8, 10, upsampling=True)
        self.h = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        style = self.style(x.mean((2, 3))).relu()
        y = self.a(self.start.repeat(len(x), 1, 1, 1), style).relu()
        return self.h(self.b(y, style).relu().mean((2, 3)))
