"""Where the channels that went were linear in those that stay, the refit gives the dense network back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import LastStay, settled, with_twins

import fxprune
from fxprune.verification import relative_error


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(12), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + x)
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 1)
        self.c, self.head = nn.Conv2d(20, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        return self.head(torch.flatten(F.relu(self.c(x)), 1))


class Separable(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
            nn.Conv2d(12, 8, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3),
        )  # fmt: skip


class Products(nn.Module):
    """Parameters without a layer: matmul from both sides, einsum, a batch of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 16) / 3), nn.Parameter(torch.randn(16, 12) / 4)
        self.third, self.last = nn.Parameter(torch.randn(10, 12) / 3), nn.Parameter(torch.randn(5, 10) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x @ self.first)
        x = F.relu(torch.einsum("bnk,kd->bnd", x, self.second))
        x = F.relu(torch.einsum("bnk,dk->bnd", x, self.third))
        return (self.last @ x.transpose(1, 2)).transpose(1, 2)


class Heads(nn.Module):
    """A weight ``[heads, inputs, 3]`` that a product takes in another order, which copies it."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.weight, self.out = nn.Linear(6, 16), nn.Parameter(torch.randn(4, 16, 3) / 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.relu(self.make(x)) @ self.weight.transpose(0, 1).reshape(-1, 12)))


class Block(nn.Module):
    """A stream that is normed and added to, with an attention of two heads, of which there are several kinds.

    No weight reads a key, so what a half of them adds to the logits is nothing to begin with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(7, 12), nn.Linear(12, 5)
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attend(self.norm(x))
        return self.head(x + self.down(F.relu(self.up(x))))

    @torch.no_grad()
    def silence(self) -> None:
        for parameter in self.keys():
            parameter.unflatten(0, (2, 6))[:, :3] = 0


class Separate(Block):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(2, (2, 6)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(((q @ k.transpose(2, 3) / 6**0.5).softmax(3) @ v).transpose(1, 2).flatten(2))

    def keys(self) -> list[Tensor]:
        return [self.k.weight, self.k.bias]


class Packed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 6).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def keys(self) -> list[Tensor]:
        return [self.qkv.weight[12:24], self.qkv.bias[12:24]]


class Multihead(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]

    def keys(self) -> list[Tensor]:
        return [self.attention.in_proj_weight[12:24], self.attention.in_proj_bias[12:24]]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(20, 12), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(self.embed(x))))


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.b = nn.Linear(5, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.shared(F.relu(self.shared(F.relu(self.a(x)))))))


def convolutions(dims: int) -> nn.Module:
    conv, norm = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "BatchNorm"))
    return nn.Sequential(
        conv(3, 16, 3, padding=1, stride=2, bias=False), norm(16), nn.ReLU(), conv(16, 12, 3, dilation=2), nn.ReLU(),
        conv(12, 4, 3, padding="same", padding_mode="circular"),
    )  # fmt: skip


def transposed(dims: int) -> nn.Module:
    conv, norm = (getattr(nn, f"{kind}{dims}d") for kind in ("ConvTranspose", "BatchNorm"))
    return nn.Sequential(
        conv(3, 16, 3, stride=2, padding=1, output_padding=1, bias=False), norm(16), nn.ReLU(),
        conv(16, 12, 3, dilation=2), nn.ReLU(), conv(12, 4, 2, stride=2),
    )  # fmt: skip


def images(*size: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, *size)


CASES = {
    "conv1d": (lambda: convolutions(1), images(3, 40)),
    "conv2d": (lambda: convolutions(2), images(3, 14, 14)),
    "conv3d": (lambda: convolutions(3), images(3, 12, 12, 12)),
    "transposed1d": (lambda: transposed(1), images(3, 9)),
    "transposed2d": (lambda: transposed(2), images(3, 6, 6)),
    "transposed3d": (lambda: transposed(3), images(3, 2, 2, 2)),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=2), nn.ReLU(),
                              nn.Conv2d(24, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        images(4, 9, 9),
    ),
    "grouped transposed": (
        lambda: nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 24, 3, groups=2, stride=2),
                              nn.ReLU(), nn.Conv2d(24, 4, 1)),
        images(4, 5, 5),
    ),
    "depthwise": (Separable, images(3, 8, 8)),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)),
               images(6)),
    "norm after linear": (lambda: nn.Sequential(nn.Linear(6, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
                                                nn.Linear(32, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(),
                                                nn.Linear(16, 4)), images(6)),
    "residual": (Residual, images(3, 8, 8)),
    "concat": (Concat, images(3, 8, 8)),
    "products": (Products, images(7, 6)),
    "copied heads": (Heads, images(6)),
    "embedding": (Tokens, lambda count: torch.randint(0, 20, (count, 9))),
    "called twice": (Twice, images(5)),
    "attention": (Separate, images(5, 7)),
    "packed attention": (Packed, images(5, 7)),
    "multihead attention": (Multihead, images(5, 7)),
}  # fmt: skip


def reconstructed(model: nn.Module, make: Callable[[int], Tensor], method: object, **options: object) -> tuple:
    torch.manual_seed(0)
    example, data = make(2), make(400)
    settled(with_twins(settled(model), example))
    with_twins(model, example)
    if isinstance(model, Block):
        model.silence()
    small = fxprune.prune(model, example, method=method, channels=0.5, scope="uniform", round_to=1, progress=False)
    return small, fxprune.reconstruct(small, model, data, **options), make(8)


@pytest.mark.parametrize("name", CASES)
def test_what_was_linear_in_what_stays_is_restored(name: str) -> None:
    make_model, make = CASES[name]
    torch.manual_seed(1)
    model = make_model()
    small, fitted, x = reconstructed(model, make, LastStay())
    told = fitted.meta["fxprune"].reconstruction
    with torch.no_grad():
        dense = model(x)
        assert relative_error(small(x), dense) > 0.05, "cutting alone must not do"
        assert relative_error(fitted(x), dense) < 1e-5, str(told)
    assert told.output_after < 1e-9 < told.output_before
    assert list(fitted.state_dict()) == list(small.state_dict())
    assert [n for n, _ in fitted.named_parameters()] == [n for n, _ in small.named_parameters()]


class Linears(nn.Module):
    """Outputs of ``a`` are read as they are, so what is linear in them is so in what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Chosen:
    """The channels of ``a`` that go."""

    def __init__(self, *gone: int):
        self._gone = gone

    def score(self, group, state):
        scores = np.ones(group.channels.shape)
        (factor,) = (f for f in state.graph.by_name["a.weight"].labels if f.dim == 0)
        scores[np.isin(group.channels, factor.rows()[0][[*self._gone]])] = 0
        return scores


def cut(model: nn.Module, x: Tensor, *gone: int) -> nn.Module:
    share = 1 - len(gone) / 12
    return fxprune.prune(model, x[:2], method=Chosen(*gone), channels=share, round_to=1, progress=False)


def test_linear_dependence_is_made_up_for() -> None:
    """Three channels that are sums of the nine others, and a constant: the bias takes that."""
    torch.manual_seed(0)
    model, x = Linears().eval(), torch.randn(80, 3, 9, 9)
    mix = torch.randn(3, 9)
    with torch.no_grad():
        model.a.weight[:3] = torch.einsum("ij,jklm->iklm", mix, model.a.weight[3:])
        model.a.bias[:3] = mix @ model.a.bias[3:] + 1
        small = cut(model, x, 0, 1, 2)
        fitted = fxprune.reconstruct(small, model, x)
        assert relative_error(small(x), model(x)) > 0.05
        assert relative_error(fitted(x), model(x)) < 1e-5
        assert small.a.weight.shape[0] == 9


def test_where_zero_channels_went_every_weight_stays() -> None:
    torch.manual_seed(0)
    model, x = Linears().eval(), torch.randn(40, 3, 9, 9)
    with torch.no_grad():
        for gone in (1, 5, 6):
            model.a.weight[gone], model.a.bias[gone] = 0, 0
        small = cut(model, x, 1, 5, 6)
        fitted = fxprune.reconstruct(small, model, x)
        assert relative_error(fitted(x), model(x)) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), fitted.parameters(), strict=True))


def test_channels_that_stay_at_zero_do_no_harm() -> None:
    """Their rows of the Gram matrix are zero."""
    torch.manual_seed(0)
    model, x = Linears().eval(), torch.randn(80, 3, 9, 9)
    with torch.no_grad():
        for dead in (7, 11):
            model.a.weight[dead], model.a.bias[dead] = 0, 0
        model.a.weight[0], model.a.bias[0] = model.a.weight[1], model.a.bias[1]
        fitted = fxprune.reconstruct(cut(model, x, 0), model, x)
        assert relative_error(fitted(x), model(x)) < 1e-5


def test_weights_that_were_spoiled_come_back() -> None:
    torch.manual_seed(0)
    model, x = Linears().eval(), torch.randn(80, 3, 9, 9)
    with torch.no_grad():
        model.a.weight[0], model.a.bias[0] = 0, 0
        small = cut(model, x, 0)
        small.b.weight.add_(torch.randn_like(small.b.weight))
        small.b.bias.add_(1)
        fitted = fxprune.reconstruct(small, model, x)
        assert relative_error(small(x), model(x)) > 0.5
        assert relative_error(fitted(x), model(x)) < 1e-5
