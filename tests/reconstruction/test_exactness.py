"""Where the channels that went were linear in those that stay, the refit gives the dense network back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.verification import relative_error


class LastStay:
    """Scores rise along every group: of n channels the first go."""

    def __init__(self, only: str = ""):
        self._only = only

    def score(self, group, state):
        if self._only and not any(self._only in member.name for member in group.members):
            return None
        return np.broadcast_to(np.arange(1.0, group.size + 1), group.channels.shape).copy()


def with_twins(model: nn.Module, example: Tensor) -> nn.Module:
    """The model with every channel of the first half of a group computed like one of the second half."""
    graph = fxprune.analyze(model, example)
    twin = np.arange(graph.channel_count)
    for group in graph.prunable:
        half = group.size // 2
        twin[group.channels[:, :half]] = group.channels[:, half : 2 * half]
    read = {(m.name, m.dim) for group in graph.groups for m in group.members if m.read}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for parameter in graph.parameters:
            for factor in parameter.labels:
                if (parameter.name, factor.dim) in read:
                    continue
                last = np.moveaxis(factor.ids, factor.dim, -1)
                order = [[list(row).index(c) for c in twin[row]] for row in last.reshape(-1, last.shape[-1])]
                index = torch.tensor(order).view(last.shape).movedim(-1, factor.dim)
                tensor = tensors[parameter.name]
                tensor.copy_(tensor.take_along_dim(index, factor.dim))
    return model


def settled(model: nn.Module) -> nn.Module:
    """Norms whose statistics and scales differ from channel to channel."""
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


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


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 6).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(x)))


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
    "embedding": (Tokens, lambda count: torch.randint(0, 20, (count, 9))),
    "called twice": (Twice, images(5)),
}  # fmt: skip


def reconstructed(model: nn.Module, make: Callable[[int], Tensor], method: object, **options: object) -> tuple:
    torch.manual_seed(0)
    example, data = make(2), make(400)
    settled(with_twins(settled(model), example))
    with_twins(model, example)
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
