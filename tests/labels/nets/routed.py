"""What data choose: experts of a mixture, and the largest of some channels."""

from __future__ import annotations

import torch
from labels.nets import approximate, conv, exact, image, locked, net, result, rigid
from torch import Tensor, nn

CHOSEN = "topk over channels"


class _Mixture(nn.Module):
    """``[B, 3, 8, 8]``, of which two of four experts ``[16, 24]``, ``[24, 16]`` are asked at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 16), nn.Linear(16, 6), nn.Linear(6, 5)
        self.router = nn.Linear(16, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 24) / 4), nn.Parameter(torch.randn(4, 24, 16) / 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.a(x).flatten(2).transpose(1, 2)
        rows = tokens.reshape(-1, tokens.shape[-1])
        weights, places = self.route(rows)
        mixed = self.mix(rows, weights, places)
        return self.h(self.b(mixed.view(tokens.shape) + tokens).mean(-2))

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``rows [N, C]`` -> weights and places of experts ``[N, 2]``."""
        weights, places = self.router(rows).softmax(-1).topk(2, -1)
        return weights, places

    def mix(self, rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        """Sorted by experts, as libraries do."""
        flat = places.reshape(-1)
        order = flat.argsort()
        ends = self.counts(flat).cumsum(0, dtype=torch.int32)
        inner = torch._grouped_mm(rows[order // 2], self.up, ends).relu()
        outer = torch._grouped_mm(inner, self.down, ends) * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return outer[back].view(-1, 2, outer.shape[-1]).sum(1)

    def counts(self, flat: Tensor) -> Tensor:
        return torch.histc(flat.float(), 4, 0, 3)


INNER = (image("a[1]"), exact(24, "up[2] down[1]"), exact(6, "b[0] h[1]"), result("h[0]"))
STREAM = "a[0] router[1] up[1] down[2] b[1]"
EXPERTS = approximate(4, "router[0] up[0] down[0]", "softmax over channels")


@net(*INNER, exact(16, STREAM), EXPERTS, counted=False)
class ExpertsSorted(_Mixture):
    pass


@net(*INNER, exact(16, STREAM), EXPERTS, counted=False)
class ExpertsCounted(_Mixture):
    def counts(self, flat: Tensor) -> Tensor:
        return torch.bincount(flat.sort()[0], minlength=4).clone()


@net(*INNER, exact(16, STREAM), approximate(4, "router[0] up[0] down[0] bias[0] scale[0]", CHOSEN))
class ExpertsPicked(_Mixture):
    """Scores of which a bias chooses; the weights of the chosen ones are picked."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.scale = nn.Parameter(torch.randn(4) / 8), nn.Parameter(torch.rand(4))

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(rows).sigmoid()
        places = (scores + self.bias).topk(2, -1).indices
        return scores.gather(-1, places), places

    def mix(self, rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        inner = torch.einsum("nc,nkcd->nkd", rows, self.up[places]).relu()
        return (
            torch.einsum("nkd,nkdc->nkc", inner, self.down[places]) * (weights * self.scale[places])[..., None]
        ).sum(1)


@net(
    image("a[1]"), locked(24, "up[2]", "two kinds of channels meet in one dimension"), rigid(24, "down[1]"),
    exact(6, "b[0] h[1]"), result("h[0]"), exact(16, STREAM), EXPERTS,
)  # fmt: skip
class ExpertsSpread(_Mixture):
    """Every expert is asked; those that were not chosen count nothing."""

    def mix(self, rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        share = torch.zeros_like(self.router(rows)).scatter(-1, places, weights)
        inner = torch.einsum("nc,ecd->ned", rows, self.up).relu()
        return (torch.einsum("ned,edc->nec", inner, self.down) * share[..., None]).sum(1)


MATRICES = "the data choose among these matrices"
READ = "reads which of them were chosen"


@net(
    *INNER, exact(16, STREAM), locked(4, "router[0] up[0] down[0]", f"eq {READ}"), counted=False,
)  # fmt: skip
class ExpertsTold(_Mixture):
    """One of them is treated otherwise."""

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, places = super().route(rows)
        return torch.where(places == 3, weights * 2, weights), places


@net(
    *INNER, exact(16, STREAM), locked(4, "router[0]", f"cat {READ}"), locked(4, "up[0]", MATRICES),
    locked(4, "down[0]", MATRICES), counted=False,
)  # fmt: skip
class ExpertsBeside(_Mixture):
    """The first one is always asked."""

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, places = super().route(rows)
        return weights, torch.cat([places[:, :1], torch.zeros_like(places[:, :1])], 1)


@net(image("a[1]"), approximate(16, "a[0] b[1]", CHOSEN), exact(6, "b[0] h[1]"), result("h[0]"))
class Winners(nn.Module):
    """The four largest channels of every place stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = conv(3, 16), nn.Linear(16, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.a(x).flatten(2).transpose(1, 2)
        values, places = tokens.topk(4, -1)
        return self.h(self.b(torch.zeros_like(tokens).scatter(-1, places, values)).mean(-2))


@net(image("a[1]"), locked(16, "a[0]", "topk across channels"), rigid(4, "b[1]"), exact(6, "b[0] h[1]"), result("h[0]"))
class Smallest(Winners):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.a(x).flatten(2).transpose(1, 2)
        return self.h(self.b(tokens.topk(4, -1, largest=False)[0]).mean(-2))
