"""Convolutions over one and three dimensions, and recurrent layers between convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import network, pixels


class GatedConv(nn.Module):
    """Causal and dilated, gated linear unit, residual and skip."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.pad = 2 * dilation
        self.conv = nn.Conv1d(width, 2 * width, 3, dilation=dilation)
        self.residual, self.skip = nn.Conv1d(width, width, 1), nn.Conv1d(width, 20, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(F.pad(x, (self.pad, 0)))
        filtered, gate = y.chunk(2, dim=1)
        y = filtered.tanh() * gate.sigmoid()
        return x + self.residual(y), self.skip(y)


@network(
    lambda: torch.randn(2, 2, 24),
    "stem.weight[0] layers.0.conv.weight[0] layers.1.skip.weight[0] units.0.weight[0] depthwise.weight[0]",
)
class Waveform(nn.Module):
    """1-d: dilated gated convolutions with skips, a GLU, a depthwise layer, pooling over time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 16, 5, padding=2)
        self.layers = nn.ModuleList(GatedConv(16, d) for d in (1, 2))
        self.units = nn.Sequential(nn.Conv1d(36, 48, 1), nn.GLU(1))
        self.depthwise = nn.Conv1d(24, 24, 5, padding=2, groups=24)
        self.norm, self.head = nn.BatchNorm1d(24), nn.Linear(48, 6)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), None
        for layer in self.layers:
            x, skip = layer(x)
            total = skip if total is None else total + skip
        x = self.norm(self.depthwise(self.units(F.relu(torch.cat([total, x], 1)))))
        return self.head(torch.cat([x.mean(2), x.amax(2)], 1))


@network(
    lambda: torch.randn(2, 3, 4, 8, 8),
    "stem.0.weight[0] space.weight[0] time.weight[0] grouped.weight[0] up.weight[1] gate.1.weight[0]",
)
class Video(nn.Module):
    """3-d: factorised in space and time, a squeeze-excite gate, a grouped and a transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU())
        self.space, self.time = (
            nn.Conv3d(16, 24, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(24, 16, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Conv3d(16, 16, 1), nn.Sigmoid())
        self.grouped, self.pool = nn.Conv3d(16, 32, 3, padding=1, groups=4), nn.MaxPool3d(2)
        self.up, self.head = nn.ConvTranspose3d(32, 12, 2, stride=2), nn.Conv3d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.time(F.relu(self.space(x))))
        x = x * self.gate[2](self.gate[1](self.gate[0](x)))
        return self.head(F.relu(self.up(self.pool(F.relu(self.grouped(x))))))


@network(
    pixels(channels=1, size=16),
    "body.0.weight[0] body.3.weight[0] rnn.weight_ih_l0[1] rnn.weight_hh_l0[1] rnn.weight_hh_l1_reverse[1]",
)
class ConvLSTM(nn.Module):
    """Columns of an image through a bidirectional LSTM of two layers, a class per column."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d((4, 2)),
        )  # fmt: skip
        self.rnn = nn.LSTM(16 * 4, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = x.permute(0, 3, 1, 2).flatten(2)
        x, _ = self.rnn(x)
        return self.head(x).log_softmax(-1)


@network(
    lambda: torch.randn(2, 4, 24),
    "front.weight[0] rnn.weight_ih_l0[1] rnn.weight_hh_l0[1] after.weight[0]",
)
class ConvGRU(nn.Module):
    """Time first, a given initial state, all outputs and the last state used."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.rnn = nn.Conv1d(4, 16, 3, stride=2, padding=1), nn.GRU(16, 20)
        self.start = nn.Linear(4, 20)
        self.after, self.head = nn.Conv1d(20, 16, 3, padding=1), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        start = self.start(x.mean(2)).tanh()[None]
        outputs, last = self.rnn(F.relu(self.front(x)).permute(2, 0, 1), start)
        y = F.relu(self.after(outputs.permute(1, 2, 0))).mean(2)
        return self.head(torch.cat([y, last[-1]], 1))


@network(pixels(), "embed.weight[0] mix.0.weight[0] back.weight[0] channels.1.weight[0] first.weight[0]")
class TokenMixer(nn.Module):
    """Tokens mixed by convolutions of kernel size 1, to which the tokens are the channels, and channels by layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.norm, self.mix = nn.LayerNorm(32), nn.Sequential(nn.Conv1d(16, 24, 1), nn.GELU(), nn.Conv1d(24, 16, 1))
        self.channels = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.back, self.first = nn.ConvTranspose1d(24, 16, 1), nn.Conv1d(16, 24, 1, bias=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(F.pixel_unshuffle(x, 2).flatten(2).mT)
        x = x + self.mix(self.norm(x))
        x = x + self.channels(x)
        x = x + self.back(F.relu(self.first(x)))
        return self.head(x.mean(1))
