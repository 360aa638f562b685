"""Ops that only move positions about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from labels.nets import conv, exact, image, locked, net, result
from torch import Tensor, nn


@net(exact(8, "a[0] b[1]"), image("a[1]"), result("b[0]"), gathers=1)
class ShuffleByHand(nn.Module):
    """A channel shuffle costs no freedom: it becomes a gather."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.b(x)


_BRANCHES = exact(4, "b[0] c[1]"), exact(6, "c[0] h[1]"), image("a[1]"), result("h[0]")


@net(
    exact(4, "a[0] b[1] c[1]", blocks=2), *_BRANCHES, gathers=1,
    uneven=(exact(4, "a[0] c[1]"), exact(4, "a[0] b[1]"), *_BRANCHES),
)  # fmt: skip
class ShuffledBranches(nn.Module):
    """ShuffleNet's unit. Its halves keep one size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.h = conv(3, 8), conv(4, 4), conv(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.a(x).chunk(2, 1)
        x = torch.cat([x, self.b(y)], 1)
        x = x.reshape(x.shape[0], 2, -1, *x.shape[2:]).permute(0, 2, 1, 3, 4).flatten(1, 2)
        return self.h(self.c(x).mean((2, 3)))


@net(exact(8, "a[0] b[1]"), image("a[1]"), result("b[0]"), gathers=1)
class ShuffleModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.shuffle, self.b = conv(3, 8), nn.ChannelShuffle(4), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.shuffle(self.a(x)))


@net(exact(4, "a[0] b[1]"), image("a[1]"), result("b[0]"))
class PixelShuffle(nn.Module):
    """The sub-pixels of a channel are one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = conv(3, 16), nn.PixelShuffle(2), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.up(self.a(x)))


@net(exact(4, "a[0] b[1]"), image("a[1]"), result("b[0]"))
class PixelShuffleByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)
        return self.b(x)


@net(exact(4, "a[0] b[1]"), image("a[1]"), result("b[0]"))
class PixelShuffleChannelsLast(nn.Module):
    """The sub-pixels are the outer part of the channel dimension, as in depth-to-space of other frameworks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), conv(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, _, h, w = x.shape
        x = x.view(n, 2, 2, 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, 4, 2 * h, 2 * w)
        return self.b(x)


@net(exact(4, "a[0] b[1]"), exact(6, "b[0] h[1]"), image("a[1]"), result("h[0]"))
class PixelUnshuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.b, self.h = conv(3, 4), nn.PixelUnshuffle(2), conv(16, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.b(self.down(self.a(x))).mean((2, 3)))


@net(exact(4, "a[0] b[1]"), image("a[1]"), result("b[0]"))
class Focus(nn.Module):
    """Space to depth by slices and concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.b(torch.cat(parts, 1))


@net(exact(4, "a[0] f[1]"), exact(6, "f[0] h[1]"), image("a[1]"), result("h[0]"))
class FlattenLinear(nn.Module):
    """All positions of a channel go with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f, self.h = conv(3, 4), nn.Linear(16, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.f(F.max_pool2d(self.a(x), 4).flatten(1)))


@net(exact(4, "a[0] b[0] b[1] h[1]"), exact(4, "b[0] h[1]"), image("a[1]"), result("h[0]"))
class PaddedShortcut(nn.Module):
    """Option A of ResNet: the shortcut is padded with zero channels. Those adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 4), conv(4, 8, stride=2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)
        return self.h(y.mean((2, 3)))


@net(exact(8, "a[0] b[1]"), exact(6, "b[0] w[1]"), image("a[1]"), result("w[0]"))
class Windows(nn.Module):
    """Window partition and back, cyclic shift: nothing of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.w = conv(3, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        x = torch.roll(x, (-2, -2), dims=(1, 2))
        x = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        x = self.b(x)
        x = x.view(n, h // 4, w // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
        return self.w(torch.roll(x, shifts=(2, 2), dims=(1, 2)).flip(1))


@net(exact(8, "a[0] c[1]"), locked(2, "c[1]", "concatenated with something that cannot be cut"),
     exact(6, "c[0] h[1]"), image("a[1]"), result("h[0]"))  # fmt: skip
class Coordinates(nn.Module):
    """Coordinates of positions are concatenated: their inputs stay, the others are free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.h = conv(3, 8), conv(10, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(n, 1, h, w)
        columns = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(n, 1, h, w)
        return self.h(self.c(torch.cat([x, torch.cat([rows, columns], 1)], 1)).mean((2, 3)))


@net(exact(4, "a[0] b[1]"), exact(6, "b[0] h[1]"), image("a[1]"), result("h[0]"))
class Patches(nn.Module):
    """``unfold``: every channel becomes a patch of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 4), nn.Linear(16, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.unfold(self.a(x), 2, stride=2).transpose(1, 2)
        return self.h(self.b(x).mean(1))


@net(exact(8, "a[0] p[1]"), exact(6, "p[0] b[1]"), image("a[1]"), result("b[0]"))
class PatchesAndBack(nn.Module):
    """``fold``: the values of a patch are one channel again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.b = conv(3, 8), nn.Conv1d(32, 24, 1), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.p(F.unfold(self.a(x), 2, stride=2))
        return self.b(F.fold(x, (8, 8), 2, stride=2))


@net(exact(8, "a[0] b[1]"), exact(6, "b[0] h[1]"), image("a[1]"), result("h[0]"))
class Reversed(nn.Module):
    """Channels in reverse order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 8), conv(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.b(self.a(x).flip(1)).mean((2, 3)))


@net(exact(8, "a[0] b[1]"), exact(6, "b[0] h[1]"), image("a[1]"), result("h[0]"))
class Permuted(nn.Module):
    """Channels in an order that a buffer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 8), conv(8, 6), nn.Linear(6, 5)
        self.register_buffer("order", torch.tensor([3, 1, 4, 0, 5, 2, 7, 6]))

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.b(self.a(x).index_select(1, self.order)).mean((2, 3)))


@net(exact(8, "a[0] b[1]"), exact(6, "b[0] h[1]"), image("a[1]"), result("h[0]"))
class Stacked(nn.Module):
    """Stacked along a new dimension and taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 8), conv(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = torch.stack([x, x.relu(), -x], 2)
        x, y, z = y.unbind(2)
        return self.h(self.b(x + y * z).mean((2, 3)))


@net(exact(8, "a[0] b[0] b[1] h[1]"), image("a[1]"), result("h[0]"))
class Resampled(nn.Module):
    """Pooling and upsampling work channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 8), conv(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.a(x), (1, 1, 1, 1), mode="reflect")[:, :, 1:-1, 1:-1]
        y = F.interpolate(F.avg_pool2d(self.b(x), 2), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.h((x + F.interpolate(F.max_pool2d(y, 2), scale_factor=2.0)).mean((2, 3)))


@net(exact(8, "a[0] b[0] b[1] h[1]"), image("a[1]"), result("h[0]"))
class Unpooled(nn.Module):
    """Values go back to where their channel had its largest ones, so they are of the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 8), conv(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, places = F.max_pool2d(self.a(x), 2, return_indices=True)
        y = F.max_unpool2d(self.b(y), places, 2, output_size=x.shape[-2:])
        return self.h(y.mean((2, 3)))


@net(
    image("a[1]"), result("h[0]"), locked(8, "a[0]", "no rule for aten.fractional_max_pool2d"),
    locked(8, "b[1]", "contracted with something that cannot be cut"), exact(6, "b[0] h[1]"),
)  # fmt: skip
class PooledAtRandom(nn.Module):
    """Windows are drawn for every channel: with fewer channels others were drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 8), conv(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.fractional_max_pool2d(self.a(x), 2, output_size=3)  # line: PooledAtRandom
        return self.h(self.b(y).mean((2, 3)))


@net(
    image("a[1] g[1]"), result("b[0]"), exact(8, "a[0] b[1]"), locked(2, "g[0]", "a single channel is picked"),
)  # fmt: skip
class GatesOneByOne(nn.Module):
    """FocalNet's gates: every one of them is a slice of one channel, which nothing would be left of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b = conv(3, 8), conv(3, 2), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.g(x).split(1, 1)
        x, second = self.a(x), self.g(x)[:, 1:2]
        return self.b(x * first + x.relu() * second)


class _Between(nn.Module):
    """Something that moves positions, between two convolutions; ``b`` reads ``read`` channels."""

    read = 8

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(self.read, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.inner(self.a(x)))

    def inner(self, x: Tensor) -> Tensor:
        raise NotImplementedError


ENDS = (image("a[1]"), result("b[0]"))


@net(*ENDS, exact(8, "a[0] b[1]"))
class Repeated(_Between):
    """Copies behind one another, of channels and of positions."""

    read = 16

    def inner(self, x: Tensor) -> Tensor:
        return x.repeat(1, 2, 3, 1)


@net(*ENDS, exact(8, "a[0] b[1]"))
class Tiled(_Between):
    """The same, with fewer numbers than dims."""

    read = 24

    def inner(self, x: Tensor) -> Tensor:
        return x.tile((3, 1, 2))


@net(*ENDS, exact(8, "a[0] b[1]"))
class RepeatedAnew(_Between):
    """Copies along a dimension that was not there."""

    def inner(self, x: Tensor) -> Tensor:
        return x.repeat(2, 1, 1, 1, 1).sum(0)


@net(*ENDS, exact(8, "a[0] b[1]"))
class ExpandedAnew(_Between):
    def inner(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).expand(3, -1, -1, 8, 8).sum(0)


@net(*ENDS, exact(8, "a[0] b[1]"))
class WindowsFromTheEnd(_Between):
    """The dimension of windows is counted from the last one."""

    def inner(self, x: Tensor) -> Tensor:
        return x.unfold(-1, 3, 1).mean(-1)


@net(exact(8, "a[0] c[0] c[1] b[1]"), exact(4, "c[0] b[1]"), *ENDS)
class PaddedUnevenly(_Between):
    """One channel of zeros before, three after, and positions around them, as many as there are images."""

    read = 12

    def __init__(self) -> None:
        super().__init__()
        self.c = conv(8, 12)

    def inner(self, x: Tensor) -> Tensor:
        return self.c(x) + F.pad(x, (2, x.shape[0], 0, 0, 1, 3))[..., 2 : -x.shape[0]]


@net(*ENDS, exact(8, "a[0] b[1]"))
class StackedInTurn(_Between):
    """Copies of a channel come to lie next to it."""

    read = 16

    def inner(self, x: Tensor) -> Tensor:
        return torch.stack([x, x.relu()], 2).flatten(1, 2)


@net(*ENDS, exact(8, "a[0] b[1]"))
class StackedBehind(_Between):
    read = 16

    def inner(self, x: Tensor) -> Tensor:
        return torch.stack([x, x.relu()], -4).flatten(1, 2)


@net(*ENDS, exact(4, "a[0] b[1]", blocks=2))
class ReversedInHalves(_Between):
    def inner(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (2, 4)).flip(2).flatten(1, 2)


@net(*ENDS, exact(8, "a[0] b[1]"))
class Turned(_Between):
    """Dims change places and come back."""

    def inner(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1).mT.permute(0, 2, -1, 1)
        return x.transpose(-3, -1).swapaxes(1, 3)


@net(*ENDS, exact(8, "a[0] b[1]"))
class PooledAndSqueezed(_Between):
    """Squeezing takes away dims of size 1 alone."""

    def inner(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).squeeze((1, 2)).squeeze(-1).unsqueeze(-1).unsqueeze(2)


@net(*ENDS, exact(8, "a[0] b[1]"))
class Triangles(_Between):
    """Of matrices per channel."""

    def inner(self, x: Tensor) -> Tensor:
        return x.tril(1).triu(-2)


@net(*ENDS, exact(8, "a[0] b[1]"))
class ShuffledPositions(_Between):
    def inner(self, x: Tensor) -> Tensor:
        return torch.channel_shuffle(x.transpose(1, 2), 4).transpose(1, 2)


@net(*ENDS, exact(4, "a[0] b[1]"))
class ComplexChannels(_Between):
    """The first half of the channels are real parts, the second imaginary ones: a pair is one channel."""

    def inner(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(1, (2, 4)).movedim(1, -1).contiguous())
        return torch.view_as_real(pairs * 1j).movedim(-1, 1).flatten(1, 2)


@net(*ENDS, exact(8, "a[0] b[1]"))
class ComplexPositions(_Between):
    def inner(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * 1j).flatten(-2)


@net(*ENDS, exact(8, "a[0] b[1]"))
class RepeatedForEveryChannel(_Between):
    """There are as many copies as channels stay."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * x.mean(1, keepdim=True).repeat(1, 8, 1, 1))
