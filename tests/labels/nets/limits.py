"""What cannot be cut: it is locked, with the reason and the line of the net, and nothing else is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from labels.nets import conv, exact, image, locked, net, result, rigid
from torch import Tensor, nn

ENDS = (image("a[1]"), exact(6, "b[0] h[1]"), result("h[0]"))


class _Between(nn.Module):
    """Something between two convolutions; ``b``'s outputs are free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 8), conv(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.b(self.inner(self.a(x))).mean((2, 3)))

    def inner(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@net(*ENDS, locked(8, "a[0]", "no rule for aten.renorm"), rigid(8, "b[1]"))
class UnknownOp(_Between):
    def inner(self, x: Tensor) -> Tensor:
        return torch.renorm(x, 2, 1, 1.0)  # line: UnknownOp


@net(*ENDS, locked(8, "a[0] b[1]", "cut along a convolved dimension"))
class StridedAcrossChannels(_Between):
    """A convolution that slides over channels, and takes every other one."""

    def __init__(self) -> None:
        super().__init__()
        self.slide = nn.Conv1d(1, 1, 3, padding=1, bias=False, stride=2)

    def inner(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3)).unsqueeze(1)
        y = self.slide(y)  # line: StridedAcrossChannels
        return x * y.mean((1, 2)).sigmoid()[:, None, None, None]


@net(*ENDS, locked(8, "a[0]", "cumsum across channels"), rigid(8, "b[1]"))
class RunningSum(_Between):
    def inner(self, x: Tensor) -> Tensor:
        return x.cumsum(1)  # line: RunningSum


@net(*ENDS, locked(8, "a[0] b[1]", "channels are rolled by a fixed number"))
class RolledChannels(_Between):
    def inner(self, x: Tensor) -> Tensor:
        return x.roll(1, 1)  # line: RolledChannels


@net(*ENDS, locked(8, "a[0] b[1]", "channels are rolled by a fixed number"))
class RolledWithPositions(_Between):
    def inner(self, x: Tensor) -> Tensor:
        return x.roll((2, 1), (-1, -3))  # line: RolledWithPositions


@net(*ENDS, locked(8, "a[0]", "roll of a flattened tensor"), rigid(8, "b[1]"))
class RolledFlat(_Between):
    def inner(self, x: Tensor) -> Tensor:
        return x.roll(3)  # line: RolledFlat


@net(*ENDS, locked(8, "a[0] b[1]", "diagonal works by position"))
class Diagonal(_Between):
    def inner(self, x: Tensor) -> Tensor:
        y = x.diagonal(0, 2, 3)  # line: Diagonal
        return x * y.mean(-1)[..., None, None]


@net(*ENDS, locked(8, "a[0]", "tril works by position"), rigid(8, "b[1]"))
class TriangleOfChannels(_Between):
    def inner(self, x: Tensor) -> Tensor:
        return x.flatten(2).tril(40).view_as(x)  # line: TriangleOfChannels


@net(*ENDS[1:], image("a[1] c[1]"), locked(8, "a[0] b[1]", "concatenated with something that cannot be cut"),
     locked(8, "c[0]", "cumsum across channels"))  # fmt: skip
class SideBySide(_Between):
    """Positions beside others whose channels stay."""

    def __init__(self) -> None:
        super().__init__()
        self.c = conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.c(x).cumsum(1)], 3)  # line: SideBySide
        return self.h(self.b(y).mean((2, 3)))


class _Copies(_Between):
    """Copies of what cannot be cut along a dimension of size 1: they cannot either."""

    def __init__(self) -> None:
        super().__init__()
        self.c = conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.c(x).mean(2, keepdim=True).cumsum(1)
        return self.h(self.b(self.a(x) + self.inner(rows)).mean((2, 3)))


COPIES = (
    *ENDS[1:], image("a[1] c[1]"), locked(8, "a[0] b[1]", "combined with something that cannot be cut"),
    locked(8, "c[0]", "cumsum across channels"),
)  # fmt: skip


@net(*COPIES)
class SumWithRepeated(_Copies):
    def inner(self, x: Tensor) -> Tensor:
        return x.repeat(1, 1, 8, 1)


@net(*COPIES)
class SumWithExpanded(_Copies):
    def inner(self, x: Tensor) -> Tensor:
        return x.expand(-1, -1, 8, -1)


@net(*ENDS, exact(3, "a[0]"), exact(5, "a[0] b[1]"), left_alone="does not follow (shape ")
class Cropped(_Between):
    """A padding below zero takes away: here the first two channels and the last."""

    def __init__(self) -> None:
        super().__init__()
        self.b = conv(5, 6)

    def inner(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, -2, -1))


@net(*ENDS, locked(8, "a[0] b[1]", "combined with something that cannot be cut"))
class SumWithPositions(_Between):
    """Something that depends on the position in the channel dimension."""

    def inner(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[1])[:, None, None] / 8  # line: SumWithPositions


@net(*ENDS, exact(7, "a[0] b[1]"), locked(1, "a[0] b[1]", "a single channel is picked"))
class PickedChannel(_Between):
    def inner(self, x: Tensor) -> Tensor:
        return x * x[:, 2].sigmoid().unsqueeze(1)  # line: PickedChannel


@net(*ENDS, locked(8, "a[0] b[1]", "a single channel is picked"))
class ChannelsOneByOne(_Between):
    """Every one of them is picked, though one is read."""

    def inner(self, x: Tensor) -> Tensor:
        return x * x.unbind(1)[2].sigmoid().unsqueeze(1)  # line: ChannelsOneByOne


@net(*ENDS, locked(8, "a[0] b[1]", "distances between batches of two sizes"))
class DistancesToOneBatch(_Between):
    def inner(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3))
        y = torch.cdist(y[:, None], y.detach()[None]).mean((1, 2))  # line: DistancesToOneBatch
        return x * y[:, None, None, None]


@net(*ENDS, locked(8, "a[0] b[1]", "along channels"))
class PooledChannels(_Between):
    def inner(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3))
        y = F.avg_pool1d(y, 3, 1, 1)  # line: PooledChannels
        return x * y[:, :, None, None]


class _Sideways(_Between):
    """Positions in the channels' place, and channels along the height or the width."""

    def inner(self, x: Tensor) -> Tensor:
        return x * self.moved(x).mean((1, 2, 3))[:, None, None, None]

    def moved(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@net(*ENDS, locked(8, "a[0] b[1]", "pixels become channels"))
class ShuffledHeight(_Sideways):
    def moved(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x.transpose(1, 2), 2)  # line: ShuffledHeight


@net(*ENDS, locked(8, "a[0] b[1]", "pixels become channels"))
class ShuffledWidth(_Sideways):
    def moved(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x.transpose(1, 3), 2)  # line: ShuffledWidth


@net(*ENDS, locked(8, "a[0] b[1]", "patches are unfolded"))
class PatchesOfHeight(_Sideways):
    def moved(self, x: Tensor) -> Tensor:
        return F.unfold(x.transpose(1, 2), 2)[:, None]  # line: PatchesOfHeight


@net(*ENDS, locked(8, "a[0] b[1]", "patches are folded"))
class FoldedAlongChannels(_Sideways):
    def moved(self, x: Tensor) -> Tensor:
        return F.fold(x.flatten(2).transpose(1, 2), (2, 4), 1)  # line: FoldedAlongChannels


GATES = "rnn.weight_ih_l0[0] rnn.weight_hh_l0[0] rnn.weight_hh_l0[1] rnn.bias_ih_l0[0] rnn.bias_hh_l0[0]"


@net(
    image("e[1]"), result("h[0]"), exact(8, "e[0] f[1]"),
    exact(4, "f[0] rnn.weight_ih_l0[1]"), exact(6, f"{GATES} h[1]"), counted=False,
)  # fmt: skip
class Recurrent(nn.Module):
    """A recurrent layer: four gates and the state in step.

    On the CPU it is one fused kernel, whose MACs torch's counter does not see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.rnn, self.h = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4), nn.LSTM(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(self.e(x).flatten(2).permute(2, 0, 1))
        x, _ = self.rnn(x)
        return self.h(x[-1])


_THREE = "a product of three without a weight"


@net(
    image("a[1] c[1]"), locked(8, "a[0]", _THREE), locked(8, "c[0]", _THREE), locked(6, "w[0]", _THREE),
    locked(8, "w[1]", _THREE), locked(8, "w[2]", _THREE), exact(6, "f[0] h[1]"),
    locked(6, "f[1]", "contracted with something that cannot be cut"), result("h[0]"),
)  # fmt: skip
class BilinearInAMadeWeight(nn.Module):
    """What is computed of a weight is none: zeros need not stay zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.w = conv(3, 8), conv(3, 8), nn.Parameter(torch.randn(6, 8, 8))
        self.f, self.h = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, c = self.a(x).mean((2, 3)), self.c(x).mean((2, 3))
        x = F.bilinear(a, c, self.w.cos())  # line: BilinearInAMadeWeight
        return self.h(self.f(x).relu())
