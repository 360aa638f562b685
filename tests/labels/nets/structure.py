"""How layers are put together: residual, concat, split, sharing, writing in place, functions, inputs and outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from labels.nets import approximate, conv, exact, image, locked, net, result, rigid, words
from torch import Tensor, nn


@net(exact(8, "a[0] b[0] b[1] n[0] h[1]"), image("a[1]"), result("h[0]"))
class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n, self.h = conv(3, 8), conv(8, 8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = x + self.n(self.b(x))
        return self.h(x.mean((2, 3)))


@net(exact(4, "a[0] c[1]"), exact(6, "b[0] c[1]"), exact(8, "c[0] h[1]"), image("a[1] b[1]"), result("h[0]"))
class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.h = conv(3, 4), conv(3, 6), conv(10, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(torch.cat([self.a(x), self.b(x)], 1))
        return self.h(x.mean((2, 3)))


@net(
    image("a[1] c[1]"), exact(8, "a[0] bi.weight[1]"), exact(8, "c[0] bi.weight[2]"),
    exact(6, "bi.weight[0] bi.bias[0] f[1]"), exact(6, "f[0] h[1]"), result("h[0]"), counted=False,
)  # fmt: skip
class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.bi = conv(3, 8), conv(3, 8), nn.Bilinear(8, 8, 6)
        self.f, self.h = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bi(self.a(x).mean((2, 3)), self.c(x).mean((2, 3)))
        return self.h(self.f(x).relu())


@net(
    exact(4, "a[0] b[1] c[1] d[1]"), exact(6, "b[0] c[1] d[1]"), exact(6, "c[0] d[1]"),
    image("a[1]"), result("d[0]"),
)  # fmt: skip
class Dense(nn.Module):
    """The pieces of a concatenation are concatenated again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 4), conv(4, 6), conv(10, 6), conv(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(x).relu()], 1)
        x = torch.cat([x, self.c(x).relu()], dim=1)
        return self.d(x)


@net(
    exact(2, "a[0] p[1]"), exact(4, "a[0] q[1]"), exact(6, "a[0] r[1]"), exact(4, "p[0] q[0] r[0] h[1]"),
    image("a[1]"), result("h[0]"),
)  # fmt: skip
class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.q, self.r, self.h = conv(3, 12), conv(2, 4), conv(4, 4), conv(6, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        p, q, r = self.a(x).split([2, 4, 6], 1)
        return self.h((self.p(p) + self.q(q) + self.r(r)).mean((2, 3)))


_HALVES = exact(4, "b[0] c[1]"), exact(6, "c[0] h[1]"), image("a[1]"), result("h[0]")


@net(
    exact(4, "a[0] b[1] c[1]", blocks=2), *_HALVES,
    uneven=(exact(4, "a[0] c[1]"), exact(4, "a[0] b[1]"), *_HALVES),
)  # fmt: skip
class Chunk(nn.Module):
    """One half passes by, as in CSP and GhostNet blocks; the code that parts them has one number for both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.h = conv(3, 8), conv(4, 4), conv(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.a(x).chunk(2, dim=1)
        return self.h(self.c(torch.cat([x, self.b(y)], 1)).mean((2, 3)))


@net(
    exact(3, "a[0] p[1]"), exact(2, "a[0] p[1] q[1]"), exact(3, "a[0] q[1]"), exact(4, "p[0] q[0] h[1]"),
    image("a[1]"), result("h[0]"),
)  # fmt: skip
class Slices(nn.Module):
    """Overlapping slices: the shared channels are a group of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.q, self.h = conv(3, 8), conv(5, 4), conv(5, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.h((self.p(x[:, :5]) + self.q(x[:, -5:])).mean((2, 3)))


@net(
    exact(4, "a[0] p[1]"), exact(4, "a[0] q[1]"), exact(4, "p[0] q[0] h[1]"), image("a[1]"), result("h[0]"),
    left_alone="not evenly spaced",
)  # fmt: skip
class StridedSlices(nn.Module):
    """Even and odd channels go different ways. What stays must still be a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.q, self.h = conv(3, 8), conv(4, 4), conv(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.h((self.p(x[:, ::2]) + self.q(x[:, 1::2])).mean((2, 3)))


@net(exact(4, "a[0] p[1]"), exact(2, "a[0] q[1]"), exact(4, "p[0] q[0] h[1]"), image("a[1]"), result("h[0]"))
class NarrowAndSelect(nn.Module):
    """``narrow`` along channels; ``select`` along positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.q, self.h = conv(3, 6), conv(4, 4), nn.Linear(2, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.h(self.p(x.narrow(1, 0, 4)).mean((2, 3)) + self.q(x.narrow(1, 4, 2)[:, :, 0, 1]))


@net(exact(8, "a[0] s1[1] s2[0] b[1]"), exact(2, "s1[0] s2[1]"), image("a[1]"), result("b[0]"))
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.s1, self.s2, self.b = conv(3, 8), conv(8, 2, 1), conv(2, 8, 1), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        s = self.s2(self.s1(F.adaptive_avg_pool2d(x, 1)).relu())
        return self.b(x * s.sigmoid())


@net(exact(8, "a[0] c[0] c[1] h[1]"), image("a[1]"), result("h[0]"))
class SharedModule(nn.Module):
    """Called twice: its outputs are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.h = conv(3, 8), conv(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.c(self.c(self.a(x)).relu()).mean((2, 3)))


@net(exact(8, "c[0] h[1]"), exact(4, "a[0] b[0] c[1]"), image("a[1] b[1]"), result("h[0]"))
class SharedOnTwoPaths(nn.Module):
    """Called on two branches: the branches must agree."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.h = conv(3, 4), conv(3, 4), conv(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h((self.c(self.a(x)) * self.c(self.b(x))).mean((2, 3)))


@net(
    exact(8, "emb[1] f[0] f[1]"), locked(10, "emb[0]", "vocabulary of an embedding"), inputs=words,
)  # fmt: skip
class TiedWeight(nn.Module):
    """A decoder with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.f, self.dec = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.dec.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        return self.dec(x + self.f(x).relu())


@net(exact(8, "a[0]"), image("a[1]"))
class TiedCode(nn.Module):
    """One weight alone makes channels and reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x.mean((2, 3))).relu(), self.a.weight.t())


@net(exact(8, "emb[1]"), locked(10, "emb[0]", "vocabulary of an embedding"), inputs=words)
class TiedRows(nn.Module):
    """The same of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.emb(x).mean(1), self.emb.weight)


@net(
    exact(8, "emb[1] f[1]"), locked(10, "emb[0]", "vocabulary of an embedding"), result("f[0]"), inputs=words,
)  # fmt: skip
class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.f = nn.Embedding(10, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.emb(x).tanh().mean(1))


@net(exact(4, "a[0] b[0] c[1]"), exact(4, "a[0] c[1]"), image("a[1] b[1]"), result("c[0]"))
class WriteSlice(nn.Module):
    """What is written takes the place of what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(3, 4), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, :4] = self.b(x)
        return self.c(y)


@net(exact(4, "a[0] c[1]"), exact(8, "b[0] c[1]"), image("a[1] b[1]"), result("c[0]"))
class FillZeros(nn.Module):
    """A buffer made by the model is filled piece by piece: a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(3, 8), conv(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], 12, x.shape[2], x.shape[3])
        y[:, :4] = self.a(x)
        y[:, 4:] = self.b(x)
        return self.c(y)


@net(image("a[1]"), exact(8, "a[0] flags[0] e[1] among[1]"), exact(6, "e[0] among[0] h[1]"), result("h[0]"))
class FlagsOfChannels(nn.Module):
    """Buffers of flags, one for each channel and for each weight, as of a masked autoregressive network."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.e, self.h = conv(3, 8), nn.Linear(8, 6), nn.Linear(6, 5)
        self.register_buffer("flags", torch.arange(8) % 3 > 0)
        self.register_buffer("among", torch.arange(48).view(6, 8) % 5 > 0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = torch.where(self.flags.view(8, 1, 1), y.relu(), y.tanh()).mean((2, 3))
        return self.h(F.linear(y, self.among * self.e.weight, self.e.bias))


@net(exact(8, "a[0] b[0] c[1]"), image("a[1] b[1]"), result("c[0]"))
class AddInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.add_(self.b(x))
        y += 1
        return self.c(y.relu_())


@net(exact(8, "a[0] b[0] c[1]"), image("a[1] b[1]"), result("c[0]"))
class WriteAnArgument(nn.Module):
    """``out=``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty_like(self.a(x))
        torch.mul(self.a(x), self.b(x), out=y)
        return self.c(y)


@net(exact(8, "a[0] b[1]"), image("a[1]"), result("b[0]"))
class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.3, training=self.training))


def _script(function: Callable[..., Tensor]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, scripted functions are still around
        return torch.jit.script(function)


@_script
def _scripted(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.sigmoid(1.7 * x) + y


@net(exact(8, "a[0] b[0] c[1]"), image("a[1] b[1]"), result("c[0]"))
class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(_scripted(self.a(x), self.b(x)))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        s = y.sigmoid()
        return grads[0] * s, grads[0] * x * s * (1 - s)


@net(exact(8, "a[0] b[0] c[1]"), image("a[1] b[1]"), result("c[0]"))
class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(_Gate.apply(self.a(x), self.b(x)))


@net(exact(8, "a[0] s[1] s[0] b[1]"), image("a[1]"), result("b[0]"))
class BranchOnShape(nn.Module):
    """The branch that was taken stays, also for fewer channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.b = conv(3, 8), conv(8, 8, 1), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.shape[1] == self.s.out_channels and x.shape[-1] > 4 and len(y.shape) == 4:
            y = y + self.s(y)
        assert int(y.size(1)) == 8
        return self.b(y)


def _mapping(batch: int) -> tuple[dict[str, Tensor]]:
    return ({"image": torch.randn(batch, 3, 8, 8), "more": torch.randn(batch, 4, 8, 8)},)


@net(
    exact(8, "a[0] b[0] c[1] d[1]"), image("a[1]"), image("b[1]", 4), result("c[0]"), result("d[0]", 2),
    inputs=_mapping,
)  # fmt: skip
class DictInAndOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), conv(4, 8), conv(8, 5), conv(8, 2)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        x = self.a(batch["image"]) + self.b(batch["more"])
        return {"one": self.c(x), "others": (self.d(x), None)}


@net(image("a[0] a[1] b[1]"), exact(8, "b[0] h[1]"), result("h[0]"))
class SumWithInput(nn.Module):
    """A network input cannot be cut, nor what is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 3), conv(3, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.b(self.a(x) + x).mean((2, 3)))


@net(result("a[0] b[1]", 8), result("b[0]"), image("a[1]"), frozen=True)
class FeatureOutput(nn.Module):
    """A feature map that is also returned keeps its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.a(x)
        return [x, self.b(x)]


@net(exact(8, "a[0] p[0] b[1]"), image("a[1]"), result("b[0]"))
class PReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.one, self.b = conv(3, 8), nn.PReLU(8), nn.PReLU(), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.one(self.p(self.a(x))))


@net(exact(8, "a[0] gamma[0] b[1]"), image("a[1]"), result("b[0]"))
class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 5)
        self.gamma, self.temperature = nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.gamma * self.temperature)


@net(exact(6, "a[0] b[1]"), exact(6, "b[0] c[1]"), image("a[1]"), result("c[0]"))
class GatedUnits(nn.Module):
    """The two halves of a gate live and die together: ``glu`` itself, and written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 12), conv(6, 12), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.a(x), dim=1)
        value, gate = self.b(x).chunk(2, 1)
        return self.c(value * F.silu(gate))


@net(approximate(8, "a[0] b[1]", "mean over channels"), rigid(2, "s[1]"), image("a[1]"), result("b[0]"))
class SpatialAttention(nn.Module):
    """Mean and largest value over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.b = conv(3, 8), conv(2, 1), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        s = self.s(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))
        return self.b(x * s.sigmoid())


@net(approximate(8, "a[0] b[1]", "max over channels"), image("a[1]"), result("b[0]"))
class LargestValue(nn.Module):
    """``max`` also returns which channel it was, which nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.b = conv(3, 8), conv(1, 1), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * self.s(x.max(1, keepdim=True)[0]).sigmoid())


@net(
    locked(8, "a[0] b[1]", "the index of the largest channel"), exact(6, "b[0] c[1]"), image("a[1]"), result("c[0]"),
)  # fmt: skip
class LargestChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 6), conv(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(F.relu(self.b(x * (1 + x.max(1, keepdim=True).indices))))


@net(
    exact(6, "t1[0] t2[1]"), rigid(4, "t1[1]"), locked(4, "t2[0]", "combined with something that cannot be cut"),
    exact(8, "a[0] h[1]"), image("a[1]"), result("h[0]"),
)  # fmt: skip
class TokenMixing(nn.Module):
    """A linear layer over tokens, which stay; its hidden units are channels like others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t1, self.t2 = nn.Conv2d(3, 8, 4, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.h = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2)
        x = x + self.t2(F.gelu(self.t1(x)))
        return self.h(x.mean(-1))


@net(exact(8, "a[0] w[0]"), exact(6, "w[1] h[1]"), image("a[1]"), result("h[0]"))
class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = conv(3, 8), nn.Linear(6, 5)
        self.w = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.einsum("bchw,cd->bdhw", self.a(x), self.w).amax((2, 3)))
