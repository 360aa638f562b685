"""Attention: heads are blocks that keep equal counts, or, with ``attention="heads"``, one channel each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from labels.nets import approximate, exact, image, locked, net, result, rigid
from timm.layers.non_local_attn import BatNonLocalAttn
from torch import Tensor, nn

COMBINED = "combined with something that cannot be cut"


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, heads * d] -> [B, heads, N, d]``."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    """``[B, heads, N, d] -> [B, N, heads * d]``."""
    return x.transpose(1, 2).flatten(2)


class _Net(nn.Module):
    """Patches, one block, mean over tokens, head. ``width`` channels run from the patches to the block."""

    def __init__(self, width: int = 8, out: int = 8):
        super().__init__()
        self.e, self.h = nn.Conv2d(3, width, 4, 4), nn.Linear(out, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x).flatten(2).transpose(1, 2)
        return self.h(self.block(x).mean(1))

    def block(self, x: Tensor) -> Tensor:
        raise NotImplementedError


ENDS = (image("e[1]"), result("h[0]"))
THROUGH_QKV = exact(8, "e[0] qkv[1]")
AFTER = exact(8, "proj[0] h[1]")


@net(
    *ENDS, THROUGH_QKV, AFTER, exact(4, "qkv[0] proj[1]", blocks=4),
    heads=(*ENDS, THROUGH_QKV, AFTER, exact(2, "qkv[0] proj[1]")),
)  # fmt: skip
class PackedQKV(_Net):
    """timm's attention. The view makes queries, keys and values equally wide: four blocks, queries and keys joined.

    The scale follows from the dense size of a head and stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.heads = 2

    def block(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        x = scores.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


SEPARATE = (exact(8, "e[0] q[1] k[1] v[1]"), exact(8, "o[0] h[1]"))


@net(
    *ENDS, *SEPARATE, exact(4, "q[0] k[0] v[0] o[1]", blocks=4),
    uneven=(*ENDS, *SEPARATE, exact(4, "q[0] k[0]", blocks=2), exact(4, "v[0] o[1]", blocks=2)),
    heads=(*ENDS, *SEPARATE, exact(2, "q[0] k[0] v[0] o[1]")),
)  # fmt: skip
class SeparateQKV(_Net):
    """Fused attention, whose kernels want one width, and whose implicit scale must stay that of the dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def block(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(layer(x), 2) for layer in (self.q, self.k, self.v))
        return self.o(_merged(F.scaled_dot_product_attention(q, k, v)))


@net(
    *ENDS, exact(8, "e[0] o[0] q[1] k[1] v[1] h[1]"), exact(3, "q[0] k[0]", blocks=2),
    exact(5, "v[0] o[1]", blocks=2), least=2,
)  # fmt: skip
class HeadsOfTwoSizes(_Net):
    """Values may be wider than queries; a residual around it. Every head keeps its own channels.

    ``einsum`` over a dimension of one is no product any more, nor counted as one: two stay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 10), nn.Linear(10, 8)

    def block(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(layer(x), 2) for layer in (self.q, self.k, self.v))
        attention = torch.einsum("bhnd,bhmd->bhnm", q, k * 0.5).softmax(-1)
        return x + self.o(_merged(torch.einsum("bhnm,bhmd->bhnd", attention, v)))


def _multi_head(m: str) -> tuple[tuple, tuple]:  # type: ignore[type-arg]
    inner = f"{m}.in_proj_weight[0] {m}.in_proj_bias[0]"
    return (
        (exact(4, f"{inner} {m}.out_proj.weight[1]", blocks=4),),
        (exact(2, f"{inner} {m}.out_proj.weight[1]"),),
    )


_MULTI_HEAD = (*ENDS, exact(8, "e[0] m.in_proj_weight[1]"), exact(8, "m.out_proj[0] h[1]"))


@net(*_MULTI_HEAD, *_multi_head("m")[0], heads=(*_MULTI_HEAD, *_multi_head("m")[1]))
class MultiheadAttention(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, batch_first=True)

    def block(self, x: Tensor) -> Tensor:
        return self.m(x, x, x, need_weights=False)[0]


@net(*_MULTI_HEAD, *_multi_head("m")[0], heads=(*_MULTI_HEAD, *_multi_head("m")[1]))
class MultiheadAttentionWithWeights(_Net):
    """The attention weights are computed too, and nobody uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, batch_first=True)

    def block(self, x: Tensor) -> Tensor:
        return self.m(x, x, x)[0]


_STREAM = "t.self_attn.in_proj_weight[1] t.self_attn.out_proj[0] t.linear1.weight[1] t.linear2[0] t.norm1[0] t.norm2[0]"


@net(
    *ENDS, approximate(8, f"e[0] {_STREAM} h[1]", "layer_norm over channels"),
    exact(16, "t.linear1[0] t.linear2[1]"), *_multi_head("t.self_attn")[0],
    heads=(
        *ENDS, approximate(8, f"e[0] {_STREAM} h[1]", "layer_norm over channels"),
        exact(16, "t.linear1[0] t.linear2[1]"), *_multi_head("t.self_attn")[1],
    ),
)  # fmt: skip
class EncoderLayer(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def block(self, x: Tensor) -> Tensor:
        return self.t(x)


_GROUPED = (exact(8, "e[0] q[1] k[1] v[1]"), exact(8, "o[0] h[1]"))
_GROUPED_IN = (exact(4, "q[0] k[0]", blocks=2), exact(4, "v[0] o[1]", blocks=2))
_GROUPED_WHOLE = (exact(2, "q[0] k[0] v[0] o[1]"),)


class _GroupedQuery(_Net):
    """Four heads of queries, two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)

    def block(self, x: Tensor) -> Tensor:
        q, k, v = _heads(self.q(x), 4), self.repeated(_heads(self.k(x), 2)), self.repeated(_heads(self.v(x), 2))
        return self.o(_merged(F.scaled_dot_product_attention(q, k, v)))

    def repeated(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@net(
    *ENDS, *_GROUPED, exact(4, "q[0] k[0] v[0] o[1]", blocks=4), uneven=(*ENDS, *_GROUPED, *_GROUPED_IN),
    heads=(*ENDS, *_GROUPED, *_GROUPED_WHOLE),
)  # fmt: skip
class GroupedQueryExpand(_GroupedQuery):
    """As in Llama: a head of keys with the two heads of queries that use it."""

    def repeated(self, x: Tensor) -> Tensor:
        b, heads, n, d = x.shape
        return x[:, :, None].expand(b, heads, 2, n, d).reshape(b, heads * 2, n, d)


@net(
    *ENDS, *_GROUPED, exact(4, "q[0] k[0] v[0] o[1]", blocks=4), uneven=(*ENDS, *_GROUPED, *_GROUPED_IN),
    heads=(*ENDS, *_GROUPED, *_GROUPED_WHOLE),
)  # fmt: skip
class GroupedQueryRepeat(_GroupedQuery):
    def repeated(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=1)


@net(*ENDS, exact(8, "e[0] q[1] k[1] v[1]"), exact(8, "o[0] h[1]"), exact(4, "q[0] k[0]"), exact(4, "v[0] o[1]"))
class MultiQuery(_Net):
    """One head of keys and values for all: a channel of it is one of every query head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 12), nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(12, 8)

    def block(self, x: Tensor) -> Tensor:
        q, k, v = _heads(self.q(x), 3), self.k(x)[:, None], self.v(x)[:, None]
        return self.o(_merged((q * 0.5 @ k.mT).softmax(-1) @ v))


class _Rotary(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8))
        self.register_buffer("frequencies", torch.tensor([1.0, 0.5, 0.2, 0.1]))

    def block(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(layer(x), 2) for layer in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        x = F.scaled_dot_product_attention(self.turned(q, angles), self.turned(k, angles), v)
        return self.o(_merged(x))

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        raise NotImplementedError


_TURNED = (*ENDS, *SEPARATE, exact(4, "q[0] k[0] frequencies[0] v[0] o[1]", blocks=5))
_TURNED_UNEVEN = (*ENDS, *SEPARATE, exact(4, "q[0] k[0] frequencies[0]"), exact(8, "v[0] o[1]", blocks=2))
_TURNED_WHOLE = (
    *ENDS, *SEPARATE, locked(1, "frequencies[0]", "one channel fills a whole dimension"),
    exact(2, "q[0] k[0] v[0] o[1]"),
)  # fmt: skip


@net(*_TURNED, uneven=_TURNED_UNEVEN, heads=_TURNED_WHOLE)
class RotaryHalves(_Rotary):
    """Position i and i + d/2 turn together, at one frequency for every head: one channel.

    For each of them two channels of every head's values: one of its first half, and one of the second.
    """

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        angles = torch.cat([angles, angles], -1)
        half = x.shape[-1] // 2
        rotated = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angles.cos() + rotated * angles.sin()


@net(*_TURNED, uneven=_TURNED_UNEVEN, heads=_TURNED_WHOLE)
class RotaryHalvesTakenBefore(_Rotary):
    """Of the halves one meets the angles when the other has met them already, and its heads are whole."""

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        angles = torch.cat([angles, angles], -1)
        one, two = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-two, one], -1) * angles.sin()


@net(*_TURNED, uneven=_TURNED_UNEVEN, heads=_TURNED_WHOLE)
class RotaryAfterNoPrefix(RotaryHalves):
    """The tokens before ``prefix`` do not turn; here there are none, and an empty tensor has channels too."""

    prefix = 0

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        before, after = x[:, :, : self.prefix], x[:, :, self.prefix :]
        return torch.cat([before.reshape(*before.shape), super().turned(after, angles)], 2)


@net(
    *ENDS, *SEPARATE, exact(2, "q[0] k[0] frequencies[0] v[0] o[1]", blocks=5),
    exact(4, "q[0] k[0] v[0] o[1]", blocks=4),
)  # fmt: skip
class RotaryInPart(RotaryHalves):
    """The first half of every head turns: of the values, pairs are tied to its pairs, and the rest to the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = self.frequencies[::2].clone()

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        return torch.cat([super().turned(x[..., :4], angles), x[..., 4:]], -1)


@net(*_TURNED, uneven=_TURNED_UNEVEN, heads=_TURNED_WHOLE)
class RotaryInterleaved(_Rotary):
    """Neighbours turn together."""

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        angles = angles.repeat_interleave(2, -1)
        rotated = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * angles.cos() + rotated * angles.sin()


@net(*_TURNED, uneven=_TURNED_UNEVEN, heads=_TURNED_WHOLE)
class RotaryByPairs(_Rotary):
    """Neighbours as a dimension of their own."""

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2)


@net(
    *ENDS, *SEPARATE, locked(16, "q[0] k[0]", COMBINED), locked(16, "v[0] o[1]", "heads of one width"),
    uneven=(*ENDS, *SEPARATE, locked(16, "q[0] k[0]", COMBINED), exact(8, "v[0] o[1]", blocks=2)),
    heads=(*ENDS, *SEPARATE, exact(2, "q[0] k[0] v[0] o[1]")),
)  # fmt: skip
class RotaryByPosition(_Rotary):
    """Frequencies computed from positions in the head: nothing can be cut that they meet, but whole heads."""

    def __init__(self) -> None:
        super().__init__()
        del self.frequencies
        self.frequencies = None

    def block(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(layer(x), 2) for layer in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1])[:, None] * 10.0 ** (-torch.arange(8) / 8)
        q, k = q * angles.cos() + q * angles.sin(), k * angles.cos() + k * angles.sin()
        return self.o(_merged(F.scaled_dot_product_attention(q, k, v)))


@net(*ENDS, exact(8, "e[0] cls[2] f[1]"), exact(8, "f[0] h[1]"))
class ClassToken(_Net):
    """The token's channels are the patches'."""

    def __init__(self) -> None:
        super().__init__()
        self.cls, self.f = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 8)

    def block(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        return self.f(x).relu()[:, :1]


@net(*ENDS, exact(8, "e[0] pos[2] f[1]"), locked(4, "pos[1]", COMBINED), exact(8, "f[0] h[1]"))
class PositionEmbedding(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.pos, self.f = nn.Parameter(torch.randn(1, 4, 8)), nn.Linear(8, 8)

    def block(self, x: Tensor) -> Tensor:
        return self.f(x + self.pos).relu()


@net(*ENDS, exact(8, "e[0] cls[2] pos[2] f[1]"), locked(5, "pos[1]", COMBINED), exact(8, "f[0] h[1]"))
class PositionsAfterClassToken(_Net):
    """Token and patches are channels of two layers until the positions join them: the number of tokens stays."""

    def __init__(self) -> None:
        super().__init__()
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.f = nn.Linear(8, 8)

    def block(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        return self.f(x).relu()


_TABLE = (*ENDS, THROUGH_QKV, AFTER)


@net(
    *_TABLE, exact(4, "qkv[0] proj[1]", blocks=4), locked(1, "table[0]", COMBINED), locked(2, "table[1]", COMBINED),
    heads=(*_TABLE, exact(2, "qkv[0] proj[1] table[1]"), locked(1, "table[0]", "one channel fills a whole dimension")),
)  # fmt: skip
class RelativePositions(_Net):
    """Swin's table: one entry per offset and head. A head takes its column along."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(9, 2))
        grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        offsets = grid[:, :, None] - grid[:, None] + 1
        self.register_buffer("index", offsets[0] * 3 + offsets[1])

    def block(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        scores = q * 0.5 @ k.transpose(-2, -1) + bias.unsqueeze(0)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


@net(
    *ENDS, THROUGH_QKV, AFTER, locked(2, "scale[0]", COMBINED), exact(4, "qkv[0] proj[1]", blocks=4),
    uneven=(
        *ENDS, THROUGH_QKV, AFTER, locked(2, "scale[0]", COMBINED), exact(4, "qkv[0]", blocks=2),
        exact(4, "qkv[0] proj[1]", blocks=2),
    ),
    heads=(*ENDS, THROUGH_QKV, AFTER, exact(2, "qkv[0] proj[1] scale[0]")),
)  # fmt: skip
class ScalePerHead(_Net):
    """A learned temperature for every head. The three equal parts of one layer keep one size."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(2, 1, 1))

    def block(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(part, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(_merged((q @ k.mT * self.scale).softmax(-1) @ v))


INSIDE = "whole blocks of channels, where channels are pruned inside blocks"


@net(
    *ENDS, *SEPARATE, locked(2, "gain[0]", INSIDE), exact(4, "q[0] k[0] v[0] o[1]", blocks=4),
    heads=(*ENDS, *SEPARATE, exact(2, "q[0] k[0] v[0] o[1] gain[0]")),
)  # fmt: skip
class GainPerHead(_Net):
    """A learned factor for the values of every head: it goes with whole heads, and with nothing less."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.gain = nn.Parameter(torch.ones(2, 1, 1))

    def block(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(layer(x), 2) for layer in (self.q, self.k, self.v))
        return self.o(_merged(F.scaled_dot_product_attention(q, k, v * self.gain)))


@net(*ENDS, *SEPARATE, exact(4, "q[0] k[0]", blocks=2), exact(4, "v[0] o[1]", blocks=2))
class LinearAttention(_Net):
    """Keys times values first. A channel that went is not zero after ``elu + 1``: it is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def block(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(layer(x), 2) for layer in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = k.transpose(-2, -1) @ v
        total = torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
        return self.o(_merged(q @ context / total[..., None]))


def _two_streams(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.randn(batch, 7, 6)


@net(
    *ENDS, exact(8, "e[0] q[1]"), rigid(6, "c[1]"), exact(8, "c[0] k[1] v[1]"), exact(8, "o[0] h[1]"),
    exact(4, "q[0] k[0] v[0] o[1]", blocks=4), inputs=_two_streams,
)  # fmt: skip
class CrossAttention(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(6, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.e(x).flatten(2).transpose(1, 2)
        context = self.c(context)
        q, k, v = _heads(self.q(x), 2), _heads(self.k(context), 2), _heads(self.v(context), 2)
        return self.h(self.o(_merged(F.scaled_dot_product_attention(q, k, v))).mean(1))


@net(*ENDS, exact(8, "e[0] q[1] k[1] v[1]"), exact(6, "q[0] k[0]"), exact(8, "v[0] h[1]"))
class OneHead(_Net):
    """Without heads there are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 8)

    def block(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 6**-0.5).softmax(-1), v)


@net(
    *ENDS, *SEPARATE, approximate(4, "q[0] k[0] qn[0] kn[0] v[0] o[1]", "layer_norm over channels", blocks=3),
    uneven=(
        *ENDS, *SEPARATE, approximate(4, "q[0] k[0] qn[0] kn[0]", "layer_norm over channels"),
        exact(4, "v[0] o[1]", blocks=2),
    ),
    heads=(
        *ENDS, *SEPARATE, exact(2, "q[0] k[0] v[0] o[1]"), locked(1, "qn[0]", COMBINED), locked(1, "kn[0]", COMBINED),
    ),
)  # fmt: skip
class NormalisedQueries(_Net):
    """One norm for all heads: position j of every head is one channel. Whole heads leave the norm as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.qn, self.kn = nn.LayerNorm(4), nn.LayerNorm(4)

    def block(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(layer(x), 2) for layer in (self.q, self.k, self.v))
        return self.o(_merged(F.scaled_dot_product_attention(self.qn(q), self.kn(k), v)))


@net(
    image("stem[1]"), result("h[0]"),
    exact(16, "stem[0] a.conv1.conv[1] a.conv2.conv[0] a.conv2.bn[0] h[1]"),
    locked(
        2, "a.conv1.conv[0] a.conv1.bn[0] a.ba.conv1.conv[1] a.ba.conv_p[0] a.ba.conv_q[0] a.ba.conv2.conv[1]",
        "whole blocks of channels, where channels are pruned inside blocks",
    ),
    exact(2, "a.ba.conv1.conv[0] a.ba.conv1.bn[0] a.ba.conv_p[1] a.ba.conv_q[1]"),
    exact(8, "a.ba.conv2.conv[0] a.ba.conv2.bn[0] a.conv2.conv[1]"),
)  # fmt: skip
class CopiesOfMatrices(nn.Module):
    """One matrix per group of channels, copied for each of them: whole groups stay, and what is around them is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.h = (
            nn.Conv2d(3, 16, 1),
            BatNonLocalAttn(16, block_size=4, rd_channels=8),
            nn.Conv2d(16, 5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.a(self.stem(x))).mean((2, 3))
