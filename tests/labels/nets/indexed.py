"""Reading and writing at places that the data decide."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from labels.nets import approximate, conv, exact, image, locked, net, result, rigid
from torch import Tensor, nn

COMBINED = "combined with something that cannot be cut"


class _Tokens(nn.Module):
    """``[B, 3, 8, 8] -> [B, 64, 8]``, something between, and a head over the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.a(x).flatten(2).transpose(1, 2)
        return self.h(self.b(self.inner(tokens, x[:, 0].flatten(1))).mean(-2))

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        """``x [B, N, C]``, ``key [B, N]``: numbers of the input."""
        raise NotImplementedError


ENDS = (image("a[1]"), exact(6, "b[0] h[1]"), result("h[0]"))
FREE = (*ENDS, exact(8, "a[0] b[1]"))


@net(*FREE)
class MaskWritten(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        x = x.clone()
        x[key > 0] = 0
        return x


@net(*ENDS, exact(8, "a[0] b[1] fill[0]"))
class MaskWrittenWithAVector(_Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.fill = nn.Parameter(torch.randn(8))

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        x = x.clone()
        x[key > 0] = self.fill
        return x


@net(*FREE)
class MaskOfChannelsWritten(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        x = x.clone()
        x[x < -0.5] = 0.25
        return x


@net(*FREE)
class MaskReadAndWritten(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        x = x.clone()
        x[key > 0] = x[key > 0].relu() * 2
        return x


@net(*FREE, counted=False)  # the next inputs have other rows
class MaskRead(_Tokens):
    """As many rows as the mask names: known from the recorded run."""

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x[key > 0] + x.mean((0, 1))


@net(*FREE, counted=False)  # the next inputs have other rows
class PlacesRead(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x[torch.nonzero(key > 0, as_tuple=True)]


@net(*FREE, counted=False)  # the next inputs have other rows
class PlacesReadOneByOne(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        rows = torch.nonzero(key[0] > 0).squeeze(1)
        return x[:, rows]


@net(*ENDS, locked(8, "a[0] b[1]", "written by index"))
class ChannelsWritten(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, torch.tensor([1, 3])] = 0  # line: ChannelsWritten
        return x


@net(*ENDS, locked(8, "a[0] b[1]", "masked_select reads values"))
class MaskedSelect(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x + torch.masked_select(x, x > 0).mean()  # line: MaskedSelect


@net(*FREE)
class IndexAdd(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        places = torch.arange(64) // 2
        return torch.zeros_like(x).index_add(1, places, x)


@net(*FREE)
class IndexAddToNewZeros(_Tokens):
    """Messages along the edges of a graph."""

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], 10, x.shape[2])
        return out.index_add_(1, torch.arange(64) % 10, x.relu())


@net(*ENDS, exact(8, "a[0] b[1] rows[1]"), locked(2, "rows[0]", ""))
class IndexCopy(_Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(2, 8))

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        source = self.rows.expand(x.shape[0], -1, -1)
        return x.index_copy(1, torch.tensor([0, 5]), source).index_fill(1, torch.tensor([3]), 0.5)


@net(*ENDS, locked(8, "a[0]", "index_add along channels"), rigid(8, "b[1]"))
class IndexAddAlongChannels(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x.index_add(2, torch.tensor([1, 1]), x[:, :, :2])  # line: IndexAddAlongChannels


class _TwoKinds(_Tokens):
    """Tokens of a layer, and behind them as many of one parameter: any place may hold either."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.randn(8))

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        both = torch.cat([x, self.extra.expand_as(x)], dim=1)
        return self.moved(both, torch.cat([key, -key], dim=1).argsort(1))

    def moved(self, x: Tensor, order: Tensor) -> Tensor:
        """``x [B, N, C]``, ``order [B, N]``: places along dim 1."""
        raise NotImplementedError


BOTH = (*ENDS, exact(8, "a[0] b[1] extra[0]"))


@net(*BOTH)
class GatheredOfTwoKinds(_TwoKinds):
    """A masked autoencoder's tokens, back in their order."""

    def moved(self, x: Tensor, order: Tensor) -> Tensor:
        return x.gather(1, order.unsqueeze(-1).repeat(1, 1, x.shape[2]))[:, :7]


@net(*BOTH)
class IndexedOfTwoKinds(_TwoKinds):
    def moved(self, x: Tensor, order: Tensor) -> Tensor:
        return x[torch.arange(len(x))[:, None], order][:, :7]


@net(*BOTH)
class SelectedOfTwoKinds(_TwoKinds):
    def moved(self, x: Tensor, order: Tensor) -> Tensor:
        return x.index_select(1, order[0, :7])


@net(*BOTH)
class WrittenOfTwoKinds(_TwoKinds):
    """And what is written is another layer's."""

    def moved(self, x: Tensor, order: Tensor) -> Tensor:
        x[torch.arange(len(x))[:, None], order[:, :3]] = x[:, 1:4].relu()
        return x[:, :7]


@net(*ENDS, exact(4, "a[0] b[1]"), locked(64, "places[0]", COMBINED))
class WrittenInEveryHead(_Tokens):
    """The values of some queries, as Informer's attention writes them, behind positions that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(64))

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        heads = (x * self.places[:, None]).unflatten(2, (2, 4)).transpose(1, 2)
        batch, head = torch.arange(len(x))[:, None, None], torch.arange(2)[None, :, None]
        best = key[:, None].topk(5).indices.expand(-1, 2, -1)
        values = heads.clone()
        values[batch, head, best] = heads[batch, head, best].relu()
        return values.transpose(1, 2).flatten(2)


@net(*BOTH)
class ScatteredOfTwoKinds(_TwoKinds):
    def moved(self, x: Tensor, order: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter_add(1, order.unsqueeze(-1).expand_as(x), x)[:, :7]


@net(*FREE)
class Gathered(_Tokens):
    """The tokens with the largest keys, of all channels."""

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        best = key.topk(10).indices
        return x.gather(1, best[:, :, None].expand(-1, -1, x.shape[-1]))


@net(*FREE)
class Scattered(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        places = (torch.arange(64) % 7)[None, :, None].expand(x.shape[0], -1, x.shape[2])
        sums = x.new_zeros(x.shape[0], 7, x.shape[2]).scatter_add(1, places, x)
        return sums + x.new_zeros(x.shape[0], 7, x.shape[2]).scatter_reduce(1, places, x, "amax", include_self=False)


@net(*ENDS, locked(8, "a[0] b[1]", COMBINED))
class GatheredChannelByChannel(_Tokens):
    """Every channel has an order of its own, computed elsewhere."""

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        order = key[:, :8, None].expand(-1, -1, 8).argsort(1) + torch.arange(8)
        return x.gather(1, order)  # line: GatheredChannelByChannel


@net(*ENDS, exact(8, "a[0] b[1] e[0]"))
class MaskedScatter(_Tokens):
    """As language models with pictures lay features over the places of their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Linear(1, 8)

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        features = self.e(key.reshape(-1, 1))
        return x.masked_scatter((key > 0).unsqueeze(-1).expand_as(x), features)


@net(*ENDS, exact(8, "a[0] b[1] e[0]"))
class MaskedScatterOfRows(MaskedScatter):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        features = self.e(key.reshape(-1, 1))
        return x.masked_scatter((key > 0).unsqueeze(-1), features)


@net(*ENDS, locked(8, "a[0]", "written by a mask"), rigid(8, "b[1]"), locked(8, "e[0]", "written by a mask"))
class MaskedScatterByChannels(MaskedScatter):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        features = self.e(key.reshape(-1, 1))
        return x.masked_scatter(x > 0, features)  # line: MaskedScatterByChannels


@net(*FREE)
class IsIn(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        steps = torch.bucketize(x.contiguous(), torch.linspace(-1, 1, 5))
        return x * torch.isin((x * 3).long(), torch.tensor([0, 1, 2])) + steps


@net(*FREE)
class RepeatedByCounts(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        counts = torch.arange(64) % 3
        return x.repeat_interleave(counts, dim=1)


@net(*FREE, counted=False)  # the next inputs have other rows
class RepeatedByUnknownCounts(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x.repeat_interleave((key[0] > 0).long() + 1, dim=1)


@net(*FREE)
class UniqueRows(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        kinds, which = torch.unique((key > 0).long(), return_inverse=True)
        places = which[:, :, None].expand(-1, -1, x.shape[2])
        return x.new_zeros(x.shape[0], 2, x.shape[2]).scatter_add(1, places, x) + kinds.sum()


@net(*ENDS, locked(8, "a[0] b[1]", "_unique2 reads values"))
class UniqueValues(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x + torch.unique(x.round()).sum()  # line: UniqueValues


@net(*ENDS, locked(8, "a[0]", "indexed by values that are not known"), rigid(8, "b[1]"))
class ChannelsByFloats(_Tokens):
    """An index that was computed in floating point is not known."""

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x[:, :, torch.linspace(0, 7, 8).long()]  # line: ChannelsByFloats


@net(*ENDS, exact(4, "a[0] b[1]"), exact(4, "a[0]"))
class ChannelsByFlags(_Tokens):
    """Flags that are known pick channels; those left out feed nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(4, 6)
        self.register_buffer("flags", torch.arange(8) % 2 == 0)

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x[:, :, self.flags]


@net(*ENDS, exact(4, "a[0] b[1]"), exact(4, "a[0]"))
class ChannelsByPlaces(_Tokens):
    """In another order, one of them counted from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(4, 6)
        self.register_buffer("places", torch.tensor([6, -7, 4, 3]))

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x[..., self.places]


class _FourChannels(_Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(4, 6)


@net(*ENDS, exact(4, "a[0] b[1]"), exact(4, "a[0]"))
class ChannelsByAList(_FourChannels):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x[..., [6, -7, 4, 3]]


@net(*ENDS, exact(4, "a[0] b[1]"), exact(4, "a[0]"))
class ChannelsByAListOfFlags(_FourChannels):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x.transpose(1, 2)[:, [True, False] * 4].transpose(1, 2)


@net(*ENDS, exact(4, "a[0] b[1]"), exact(4, "a[0]"))
class ChannelsByARange(_FourChannels):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x[:, :, range(0, 8, 2)]


@net(*ENDS, exact(4, "a[0] b[1]"), exact(4, "a[0]"))
class ChannelsByAnArray(_FourChannels):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x[:, :, np.array([6, 1, 4, 3])]


@net(*ENDS, exact(4, "a[0] b[1]"), exact(4, "a[0]"))
class ChannelsByPlacesThatAreMade(_FourChannels):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x[:, :, torch.arange(7, -1, -2)]


@net(*ENDS, exact(4, "a[0] b[1]"), exact(4, "a[0]"), left_alone="channels are picked by a computed index")
class ChannelsByPlacesOfASize(_FourChannels):
    """Which ones would depend on how many pixels there are."""

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return x[:, :, torch.arange(4) + x.shape[1] // 64]


@net(*ENDS, approximate(8, "a[0] b[1]", "mse_loss over channels"))
class Losses(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        y = x.sigmoid()
        p, q = y[:, ::2], y[:, 1::2]
        losses = [F.mse_loss(p, q), F.smooth_l1_loss(p, q), F.huber_loss(p, q, reduction="sum"), F.l1_loss(p, q)]
        losses += [F.binary_cross_entropy(p, q), F.soft_margin_loss(p, q)]
        losses += [F.binary_cross_entropy_with_logits(x[:, ::2], q, reduction="sum")]
        return x * torch.stack(losses).mean() + F.mse_loss(x, y, reduction="none")


@net(*FREE)
class TriangularSolve(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        matrix = key[:, :8, None] * key[:, None, :8] + 9 * torch.eye(8)
        y = torch.linalg.solve_triangular(matrix, x[:, :8], upper=True)
        return y + torch.linalg.solve(matrix, x[:, 8:16]) + torch.linalg.cholesky(matrix) @ x[:, :8]


@net(*ENDS, locked(8, "a[0]", "linalg_solve_triangular with a matrix of channels"), rigid(8, "b[1]"))
class TriangularSolveOfChannels(_Tokens):
    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(x[:, :8], x, upper=True, left=False)  # line: TriangularSolveOfChannels


@net(*FREE, locked(16, "window[0]", ""))
class ShortTime(_Tokens):
    """To the spectrum of every channel along the tokens, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        b, n, c = x.shape
        rows = x.transpose(1, 2).reshape(b * c, n)
        spectrum = torch.stft(rows, 16, 4, window=self.window, return_complex=True)
        rows = torch.istft(spectrum * 0.5, 16, 4, window=self.window, length=n)
        return rows.reshape(b, c, n).transpose(1, 2)


@net(*FREE)
class Folded(_Tokens):
    """Windows along the tokens are summed again where they overlap."""

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        windows = x.unfold(1, 16, 8)
        return torch.ops.aten.unfold_backward(windows, [x.shape[0], 64, x.shape[2]], 1, 16, 8)


@net(
    image("a[1]"), exact(16, "a[0] up[1]"), exact(32, "up[2] down[1]"), exact(16, "down[2] b[1]"),
    exact(6, "b[0] h[1]"), result("h[0]"), locked(4, "up[0]", "the data choose among these matrices"),
    locked(4, "down[0]", "the data choose among these matrices"), counted=False,
)  # fmt: skip
class Experts(_Tokens):
    """A mixture of four experts, each of whom gets a share of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), nn.Linear(16, 6)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 32)), nn.Parameter(torch.randn(4, 32, 16))

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[2])
        ends = torch.arange(1, 5, dtype=torch.int32) * rows.shape[0] // 4  # all rows: others would hold anything
        rows = torch._grouped_mm(torch._grouped_mm(rows, self.up, ends).relu(), self.down, ends)
        return rows.reshape(x.shape)


@net(
    image("a[1]"), exact(16, "a[0] up[2]"), exact(16, "up[1] b[1]"), exact(6, "b[0] h[1]"),
    result("h[0]"), locked(4, "up[0]", "the data choose among these matrices"), counted=False,
)  # fmt: skip
class ExpertsTransposed(_Tokens):
    """Weights as a linear layer has them, and in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), nn.Linear(16, 6)
        self.up = nn.Parameter(torch.randn(4, 16, 16))

    def inner(self, x: Tensor, key: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[2]).to(torch.bfloat16)
        ends = torch.arange(1, 5, dtype=torch.int32) * rows.shape[0] // 4  # all rows: others would hold anything
        rows = torch._grouped_mm(rows, self.up.to(torch.bfloat16).transpose(-2, -1), ends)
        return rows.float().reshape(x.shape)
