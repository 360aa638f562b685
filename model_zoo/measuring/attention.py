"""Blocks as ViT-B and Llama have them, and PyTorch's own time of them, dense and pruned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from model_zoo.records import Record
from model_zoo.study import Options

WIDTH, HEADS, KEY_HEADS = 768, 12, 4
PRUNED: dict[str, dict[str, Any]] = {
    "head_dim": {"attention": "head_dim"},
    "head_dim, multiples of 8": {"attention": "head_dim", "round_to": 8},
    "heads": {"attention": "heads"},
}


ROUNDS = 3


class ViTBlock(nn.Module):
    """Layer norm, packed QKV, MLP of four times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LlamaBlock(nn.Module):
    """RMS norm, grouped queries with a rotary embedding, causal attention, gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        width = WIDTH // HEADS
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, KEY_HEADS * width, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.frequencies: Tensor
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, width, 2) / width), persistent=False)

    def _turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * self.frequencies
        cos, sin = (torch.cat([part, part], -1).to(x.dtype) for part in (angles.cos(), angles.sin()))
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat([-two, one], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        y = self.norm1(x)
        q, k, v = (
            layer(y).view(n, length, heads, width // HEADS).transpose(1, 2)
            for layer, heads in ((self.q, HEADS), (self.k, KEY_HEADS), (self.v, KEY_HEADS))
        )
        y = F.scaled_dot_product_attention(self._turned(q), self._turned(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, length, width))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


BLOCKS: dict[str, type[nn.Module]] = {"ViT-B-like": ViTBlock, "Llama-like": LlamaBlock}


class Case(NamedTuple):
    """One block at one length."""

    block: str
    length: int
    device: str

    def __str__(self) -> str:
        return f"{self.block}, {self.length}, {self.device}"


def measure(case: Case, options: Options) -> Record:
    """Milliseconds of the dense and of every pruned block, eager and compiled."""
    name, length, device = case
    dtype, batch = (torch.bfloat16, 16) if device == "cuda" else (torch.float32, 1)
    torch.manual_seed(0)
    block = BLOCKS[name]().eval().to(device, dtype)
    x = torch.randn(batch, length, WIDTH, device=device, dtype=dtype)
    networks: dict[str, nn.Module] = {"dense": block}
    found: dict[str, Any] = {
        **case._asdict(),
        "dtype": str(dtype),
        "batch": batch,
        "macs": {},
        "widths": {},
        "failed": {},
    }
    for kind, given in PRUNED.items():
        try:
            small = fxprune.prune(
                BLOCKS[name]().eval(), x.float().cpu(), flops=0.5, method="l2", progress=False, **given
            )
        except fxprune.errors.FxpruneError as error:
            found["failed"][kind] = str(error)
            continue
        report = small.meta["fxprune"]
        found["macs"][kind] = report.macs_after / report.macs_before
        cut = [(n, [*p.shape]) for n, p in small.named_parameters() if n.split(".")[0] in ("qkv", "q", "k", "v")]
        found["widths"][kind] = dict(cut)
        networks[kind] = small.to(device, dtype)
    for how in ("eager", "compiled"):
        torch.compiler.reset()
        runs = {kind: network if how == "eager" else torch.compile(network) for kind, network in networks.items()}
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        with torch.no_grad():
            for _ in range(ROUNDS):
                for kind, run in runs.items():
                    times[kind].append(_milliseconds(lambda run=run: run(x), device, options.seconds))  # type: ignore[misc]
        found[how] = {kind: round(statistics.median(each), 4) for kind, each in times.items()}
    return Record(str(case), found)


def _milliseconds(work: Callable[[], Any], device: str, seconds: float) -> float:
    """Median of one call, after two that do not count."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1000

    once(), once()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 5 or time.perf_counter() < end:
        found.append(once())
    return statistics.median(found)
