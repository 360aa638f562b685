"""What the example does not show: parameters and rows that no op consumed stay, and operands that a rule overlooks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from labels.nets import conv, exact, image, locked, net, result
from torch import Tensor, nn

UNUSED = "not used on the example inputs"
BOUNDED = "cut to a size that depends on an input's"
TOKENS = "combined with something that cannot be cut"


def _patches(x: Tensor) -> Tensor:
    """``[N, 3, 8, 8] -> [N, 16, 12]``."""
    return F.unfold(x, 2, stride=2).transpose(1, 2)


@net(
    image("a[1]"), exact(8, "a[0] e[1]"), result("e[0]"),
    locked(7, "h.weight[0]", UNUSED), locked(5, "h.weight[1]", UNUSED), locked(7, "h.bias[0]", UNUSED),
    locked(6, "scale[0]", UNUSED),
)  # fmt: skip
class UnusedHead(nn.Module):
    """A head that another argument switches on, and a constant beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.e, self.h = conv(3, 8), nn.Linear(8, 5), nn.Linear(5, 7)
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x: Tensor, logits: bool = False) -> Tensor:
        y = self.e(self.a(x).mean((2, 3)))
        return self.h(y) * self.scale[0] if logits else y


@net(
    image("a[1]"), exact(8, "a[0] table[2] h[1]"), result("h[0]"),
    locked(16, "table[1]", TOKENS), locked(14, "table[1]", UNUSED),
)  # fmt: skip
class PositionsBeyondTheLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(12, 8), nn.Linear(8, 5)
        self.table = nn.Parameter(torch.randn(1, 30, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(_patches(x))
        table = self.table.to(x.dtype)[:, : x.shape[1]]  # line: PositionsBeyondTheLength
        return self.h((x + table).relu())


@net(
    image("a[1]"), exact(6, "a[0] table[1] h[1]"), result("h[0]"),
    locked(8, "table[2]", TOKENS), locked(3, "table[2]", UNUSED),
    locked(8, "table[3]", TOKENS), locked(4, "table[3]", UNUSED),
)  # fmt: skip
class PositionsBeyondTheImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = conv(3, 6), nn.Linear(6, 5)
        self.table = nn.Parameter(torch.randn(1, 6, 11, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + self.table[:, :, : x.shape[2], : x.shape[3]]
        return self.h(x.relu().mean((2, 3)))


@net(
    image("a[1]"), exact(8, "a[0] first[2] rest[2] h[1]"), result("h[0]"),
    locked(2, "first[1]", ""), locked(16, "rest[1]", ""), locked(9, "rest[1]", UNUSED),
    locked(2, "first[1]", UNUSED),
)  # fmt: skip
class PositionsSideBySide(nn.Module):
    """Moved about before they are read: concatenated, split and copied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(12, 8), nn.Linear(8, 5)
        self.first, self.rest = nn.Parameter(torch.randn(1, 4, 8)), nn.Parameter(torch.randn(1, 25, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(_patches(x))
        head = self.first.split([2, 2], 1)[0]
        table = torch.cat([head, self.rest.narrow(1, 0, x.shape[1]).clone()], 1)
        return self.h((F.pad(x, (0, 0, 2, 0)) + table).relu())


@net(
    image("a[1]"), exact(8, "a[0] table[2] h[1]"), result("h[0]"),
    locked(16, "table[1]", TOKENS), locked(14, "table[1]", BOUNDED),
)  # fmt: skip
class PositionsReadElsewhere(nn.Module):
    """All rows are read, and yet a longer input needs more of them in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(12, 8), nn.Linear(8, 5)
        self.table = nn.Parameter(torch.randn(1, 30, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(_patches(x))
        x = x + self.table[:, : x.shape[1]]  # line: PositionsReadElsewhere
        return self.h(x.relu() * self.table.square().amax(1, keepdim=True))


@net(image("a[1]"), locked(24, "a[0] b[1]", BOUNDED), exact(8, "b[0] h[1]"), result("h[0]"))
class ChannelsByLength(nn.Module):
    """As many channels as the image is high."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 24), conv(24, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        part = y[:, : x.shape[2]]  # line: ChannelsByLength
        return self.h(self.b(y).mean((2, 3))) * part.mean((1, 2, 3))[:, None]


@net(image("a[1]"), exact(6, "a[0] b[1]"), exact(8, "b[0] h[1]"), result("h[0]"))
class HalfOfTheChannels(nn.Module):
    """Numbers of channels are no sizes of an input: both halves are cut, and the slices follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 12), conv(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        half = y.shape[1] // 2
        return self.h(self.b(y[:, :half] * y[:, half:].sigmoid()).mean((2, 3)))


@net(image("a[1]"), exact(8, "a[0] o[1]"), locked(2, "o[0]", "not read by the rule for grid_sampler_2d"))
class GridOfChannels(nn.Module):
    """Two channels are the two coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = conv(3, 8), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.o(self.a(x).relu()).tanh().permute(0, 2, 3, 1)
        return F.grid_sample(x, grid, align_corners=False)  # line: GridOfChannels


@net(
    image("a[1] b[1]"), locked(8, "a[0]", "not read by the rule for index"),
    exact(6, "b[0] h[1]"), result("h[0]"),
)  # fmt: skip
class PickedByChannels(nn.Module):
    """What is picked depends on channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 8), conv(3, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        places = (self.a(x).mean((0, 2, 3)) > 0).long()
        rows = self.b(x).mean(3).permute(2, 0, 1)
        rows = rows[places]  # line: PickedByChannels
        return self.h(rows)
