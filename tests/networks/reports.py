"""What users of other pruning tools report as broken, one small network each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from networks import network, pixels


def conv(inputs: int, outputs: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


@network(pixels(), "stem.weight[0] squeeze.weight[0] depthwise.weight[0] expand.weight[0] second.weight[0]")
class ChannelShuffle(nn.Module):
    """Grouped 1x1 convolutions around a shuffle by view and transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 24)
        self.squeeze, self.depthwise = conv(24, 24, 1, groups=3), conv(24, 24, groups=24)
        self.expand, self.second = conv(24, 24, 1, groups=3), conv(24, 24, 1, groups=2)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24, 5)

    def shuffle(self, x: Tensor, groups: int) -> Tensor:
        n, c, h, w = x.data.size()
        x = x.view(n, groups, c // groups, h, w)
        return torch.transpose(x, 1, 2).contiguous().view(n, -1, h, w)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.expand(self.depthwise(self.shuffle(F.relu(self.squeeze(x)), 3)))
        x = F.relu(self.norm(x + y))
        return self.head(self.second(self.shuffle(x, 2)).mean((2, 3)))


@network(pixels(), "stem.weight[0] body.weight[0] wide.weight[0] before.weight[0] after.weight[0]")
class SuperResolution(nn.Module):
    """Space to depth on the way in, depth to space on the way out, both also in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv(12, 16), conv(16, 16)
        self.before, self.down, self.after = conv(16, 6), nn.PixelUnshuffle(2), conv(24, 16)
        self.wide, self.up, self.mix = conv(16, 64), nn.PixelShuffle(2), conv(16, 16)
        self.head = conv(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(F.pixel_unshuffle(x, 2))
        x = x + F.relu(self.body(x))
        y = self.up(self.wide(self.after(self.down(F.relu(self.before(x))))))
        return F.pixel_shuffle(self.head(x + F.relu(self.mix(y))), 2)


@network(pixels(), "embed.weight[0] qkv.weight[0] proj.weight[0] mlp.0.weight[0]", heads=True)
class Rearranged(nn.Module):
    """Patches, heads and their return by einops.rearrange."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.qkv, self.proj = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
        self.fold, self.head = nn.Linear(32, 4 * 6), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        from einops import rearrange

        h = x.shape[2] // 2
        x = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2))
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=4) for t in self.qkv(x).chunk(3, dim=-1))
        y = (torch.einsum("bhid,bhjd->bhij", q, k) * 8**-0.5).softmax(-1)
        x = x + self.proj(rearrange(torch.einsum("bhij,bhjd->bhid", y, v), "b h n d -> b n (h d)"))
        x = x + self.mlp(x)
        return self.head(rearrange(self.fold(x), "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=2, q=2))


class Tokens(nn.Module):
    """A patch embedding and a head around ``mix``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.proj = nn.Conv2d(3, 32, 2, stride=2), nn.LayerNorm(32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head((x + self.proj(self.mix(self.norm(x)))).mean(1))


@network(pixels(), "embed.weight[0] qkv.weight[0] proj.weight[1]", heads=True)
class IndexedQKV(Tokens):
    """qkv[0], qkv[1], qkv[2] instead of unpacking."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def mix(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(dim=-1)
        return (weights @ v).transpose(1, 2).reshape(n, t, c)


@network(pixels(), "embed.weight[0] q.weight[0] kv.weight[0] proj.weight[1]", heads=True)
class FusedAttention(Tokens):
    """SDPA four times: plain, causal, with a boolean mask, with a learned bias per head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(128, 32)
        self.bias = nn.Parameter(torch.zeros(4, 16, 16))
        self.register_buffer("allowed", torch.ones(16, 16).tril(2).bool())

    def mix(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 8).transpose(1, 2)
        k, v = (part.view(n, t, 4, 8).transpose(1, 2) for part in self.kv(x).split(32, dim=-1))
        options = ({}, {"is_causal": True}, {"attn_mask": self.allowed}, {"attn_mask": self.bias, "scale": 0.3})
        found = [F.scaled_dot_product_attention(q, k, v, **kwargs) for kwargs in options]
        return torch.cat([y.transpose(1, 2).flatten(2) for y in found], -1)


@network(pixels(), "one.weight[0] two.weight[0] left.weight[0] right.weight[0]")
class UnequalChunks(nn.Module):
    """Of three chunks one is used; of two both, by different layers, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 24), conv(8, 32)
        self.left, self.right, self.again = conv(16, 16), conv(16, 8, 1), conv(16, 24, 1)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, used, _ = self.one(x).chunk(3, dim=1)
        a, b = torch.chunk(F.relu(self.two(used)), 2, dim=1)
        return self.head(torch.cat([self.left(a), self.right(b), self.again(b).sigmoid()], 1).mean((2, 3)))


@network(pixels(), "stem.weight[0] wide.weight[0] narrow.weight[0] last.weight[0]")
class SlicedSkip(nn.Module):
    """A shortcut of the first channels only, and one into the first channels of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow, self.last = conv(3, 16), conv(16, 24), conv(24, 12), conv(24, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(F.relu(self.stem(x)))
        y = F.relu(self.narrow(x) + x[:, :12])
        x = torch.cat([x[:, :12] + y, x[:, 12:]], dim=1)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@network(pixels(), "stem.weight[0] norm.weight[0] norm.running_var[0] one.weight[0]")
class FrozenNorms(nn.Module):
    """Batch norms that are buffers only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 16, bias=False), FrozenBatchNorm2d(16)
        self.one, self.norm1, self.two, self.norm2 = (
            conv(16, 24),
            FrozenBatchNorm2d(24),
            conv(24, 16),
            FrozenBatchNorm2d(16),
        )
        self.head = nn.Linear(16, 5)
        for norm in (self.norm, self.norm1, self.norm2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.two(F.relu(self.norm1(self.one(x))))))
        return self.head(x.mean((2, 3)))


class Parametrised(nn.Module):
    """Convolutions, a linear and a transposed layer, each with ``wrap`` around it."""

    def __init__(self, wrap: object) -> None:
        super().__init__()
        assert callable(wrap)
        self.one, self.two = wrap(conv(3, 16)), wrap(conv(16, 24))
        self.up, self.hidden, self.head = (
            wrap(nn.ConvTranspose2d(24, 16, 2, stride=2)),
            wrap(nn.Linear(16, 32)),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.leaky_relu(self.two(F.leaky_relu(self.one(x), 0.1)), 0.1))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


@network(
    pixels(),
    "one.parametrizations.weight.original1[0] two.parametrizations.weight.original1[0] "
    "up.parametrizations.weight.original1[0] hidden.parametrizations.weight.original1[0]",
)
class WeightNorm(Parametrised):
    def __init__(self) -> None:
        super().__init__(parametrizations.weight_norm)


@network(
    pixels(),
    "one.parametrizations.weight.original[0] two.parametrizations.weight.original[0] "
    "up.parametrizations.weight.original[1] hidden.parametrizations.weight.original[0]",
    warm=5,
)
class SpectralNorm(Parametrised):
    def __init__(self) -> None:
        super().__init__(parametrizations.spectral_norm)


@network(pixels(), "stem.weight[0] one.weight[0] aside.weight[0]")
class Detached(nn.Module):
    """One output cut off from the gradient, one branch that only gets detached values, and one thing under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.aside = conv(3, 16), conv(16, 24), nn.Linear(24, 16)
        self.head, self.score = nn.Linear(24, 5), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.one(F.relu(self.stem(x)))).mean((2, 3))
        with torch.no_grad():
            scale = x.abs().mean(1, keepdim=True)
        score = self.score(F.relu(self.aside(x.detach())))
        return {"logits": self.head(x) / scale, "score": score, "copy": score.detach(), "scale": scale.detach()}


@network(pixels(), "body.0.weight[0] body.2.weight[0] depth.weight[1]")
class SingleChannel(nn.Module):
    """Maps of one channel: an output, a gate and a squeezed vector."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU())
        self.gate, self.after, self.depth, self.value = conv(16, 1), conv(16, 16), conv(16, 1), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        x = F.relu(self.after(x * self.gate(x).sigmoid()))
        return self.depth(x), self.value(x.mean((2, 3))).squeeze(1)


@network(pixels(), "stem.weight[0] one.weight[0]")
class UnusedParameters(nn.Module):
    """A layer, a norm, a parameter and a buffer that forward never touches."""

    def __init__(self) -> None:
        super().__init__()
        self.unused_first = nn.Linear(7, 7)
        self.stem, self.one = conv(3, 32), conv(32, 48)
        self.aux = nn.Sequential(conv(48, 8), nn.BatchNorm2d(8), nn.Linear(8, 5))
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.register_buffer("history", torch.zeros(16))
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.one(F.relu(self.stem(x)))).mean((2, 3)))


def bags() -> dict[str, Tensor]:
    """Three ids of an item for each of two users, the first and the last of the table among them."""
    return {"items": torch.tensor([[0, 7, 3], [39, 7, 1]]), "features": torch.randn(2, 6)}


@network(bags, "history.weight[1] rated.weight[1] recent.weight[1] hidden.weight[0] deep.weight[0]")
class Bags(nn.Module):
    """Rows of tables that are summed, weighed, averaged or compared, each bag in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.rated = nn.EmbeddingBag(40, 24, mode="mean"), nn.EmbeddingBag(40, 16, mode="sum")
        self.recent = nn.EmbeddingBag(40, 24, mode="max", padding_idx=0)
        self.recent.weight.requires_grad_(False)
        self.hidden, self.deep, self.head = nn.Linear(24 + 16 + 6, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, items: Tensor, features: Tensor) -> Tensor:
        taste = self.history(items) + self.recent(items)
        rated = self.rated(items, per_sample_weights=features[:, :3])
        x = F.relu(self.hidden(torch.cat([taste, rated, features], 1)))
        return self.head(F.relu(self.deep(x)))


@network(pixels(), "stem.weight[0] turned[0] hidden.weight[0]")
class Rotated(nn.Module):
    """Maps, and a kernel, that are rotated by quarters; channels too, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.turned, self.hidden = conv(3, 24), nn.Parameter(torch.randn(32, 24, 3, 3)), nn.Linear(32, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).rot90(1, (2, 3))
        x = x + F.relu(x).rot90(3, (1, -1)).rot90(5, (1, -1)) + x.rot90(2, (2, 1)).flip(1)
        x = F.conv2d(x, self.turned.rot90(-1, (2, 3)), padding=1)
        return self.head(F.relu(self.hidden(x.relu().movedim(1, 3).mean((1, 2)))))


@network(pixels(), "lift[0] norm.weight[0] group[0] hidden.weight[0]")
class Equivariant(nn.Module):
    """The same kernels turned and mirrored, side by side (group convolutions)."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.group = nn.Parameter(torch.randn(16, 3, 3, 3)), nn.Parameter(torch.randn(24, 16, 4, 3, 3))
        self.norm, self.hidden, self.head = nn.BatchNorm3d(16), nn.Linear(24, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.stack([self.lift.rot90(turns, (2, 3)) for turns in range(4)], 1).flatten(0, 1)
        x = F.conv2d(x, weight, padding=1).unflatten(1, (-1, 4))
        x = F.relu(self.norm(x)).flatten(1, 2)
        mirrored = [self.group, self.group.flip(3).roll(1, 2)]
        x = F.conv2d(x, torch.stack(mirrored, 1).flatten(2, 3).flatten(0, 1), padding=1)
        x = x.unflatten(1, (-1, 2)).amax(2)
        return self.head(F.relu(self.hidden(F.relu(x).mean((2, 3)))))
