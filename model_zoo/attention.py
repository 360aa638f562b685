"""Attention blocks after pruning: the time of PyTorch itself, eager and compiled, beside the MACs that stay.

    python -m model_zoo.attention                     on the CPU, and on a GPU where there is one

A block as in ViT-B and a block as in Llama (grouped queries, rotary embedding, gated MLP), at three lengths. What is
cut decides which kernel ``scaled_dot_product_attention`` takes: heads whose queries and values differ in width leave
the fused one. Every time is the median of three medians, dense and pruned in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from model_zoo.records import RESULTS, header, markdown

OUT = RESULTS / "attention.json"
LENGTHS = (197, 384, 1024)
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


def measure(name: str, length: int, device: str, dtype: torch.dtype, batch: int, seconds: float) -> dict[str, Any]:
    """One block at one length: milliseconds of the dense and of every pruned block, eager and compiled."""
    torch.manual_seed(0)
    block = BLOCKS[name]().eval().to(device, dtype)
    x = torch.randn(batch, length, WIDTH, device=device, dtype=dtype)
    networks: dict[str, nn.Module] = {"dense": block}
    found: dict[str, Any] = {"block": name, "length": length, "device": device, "dtype": str(dtype), "batch": batch}
    ratios, widths, failed = (
        found.setdefault("macs", {}),
        found.setdefault("widths", {}),
        found.setdefault("failed", {}),
    )
    for kind, options in PRUNED.items():
        try:
            small = fxprune.prune(
                BLOCKS[name]().eval(), x.float().cpu(), flops=0.5, method="l2", progress=False, **options
            )
        except fxprune.errors.FxpruneError as error:
            failed[kind] = str(error)
            continue
        report = small.meta["fxprune"]
        ratios[kind] = report.macs_after / report.macs_before
        widths[kind] = {n: [*p.shape] for n, p in small.named_parameters() if n.split(".")[0] in ("qkv", "q", "k", "v")}
        networks[kind] = small.to(device, dtype)
    for how in ("eager", "compiled"):
        torch.compiler.reset()
        runs = {kind: network if how == "eager" else torch.compile(network) for kind, network in networks.items()}
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        with torch.no_grad():
            for _ in range(ROUNDS):
                for kind, run in runs.items():
                    times[kind].append(_milliseconds(lambda run=run: run(x), device, seconds))  # type: ignore[misc]
        found[how] = {kind: round(statistics.median(each), 4) for kind, each in times.items()}
    return found


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


def write(out: Path, command: str, entries: Sequence[dict[str, Any]]) -> None:
    """All that was found, as JSON and as a page beside it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    head = {**header(command), "device": device}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**head, "blocks": list(entries)}, indent=1) + "\n")
    rows = [["block", "length", "on", "cut", "MACs that stay", "eager: ms (of dense)", "compiled: ms (of dense)"]]
    rows.append(["---", "---:", "---", "---", "---:", "---:", "---:"])
    for entry in entries:
        where = f"{entry['device']}, {entry['dtype'].removeprefix('torch.')}, batch {entry['batch']}"
        start = [entry["block"], str(entry["length"]), where]
        rows.append([*start, "dense", "1", *(f"{entry[how]['dense']:.3f}" for how in ("eager", "compiled"))])
        for kind, ratio in entry["macs"].items():
            cells = [
                f"{entry[how][kind]:.3f} ({entry[how][kind] / entry[how]['dense']:.2f})"
                for how in ("eager", "compiled")
            ]
            rows.append([*start, kind, f"{ratio:.3f}", *cells])
        rows += [[*start, kind, f"**fails** {why}", "–", "–"] for kind, why in entry["failed"].items()]
    made = ", ".join(f"{key} {value}" for key, value in head.items() if key != "command")
    out.with_suffix(".md").write_text(f"# {command}\n\n{made}\n\n{markdown(rows)}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m model_zoo.attention", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="result file (default: model_zoo/results/attention.json)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens (197 384 1024)")
    parser.add_argument("--seconds", type=float, default=1.0, help="at least, for one median (1)")
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], help="default: those there are")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    devices = options.devices or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    entries: list[dict[str, Any]] = []
    for device in devices:
        dtype, batch = (torch.bfloat16, 16) if device == "cuda" else (torch.float32, 1)
        torch.set_num_threads(1)
        for name in BLOCKS:
            for length in options.lengths:
                entries.append(measure(name, length, device, dtype, batch, options.seconds))
                write(options.out, "python -m model_zoo.attention", entries)
                print(
                    {key: entries[-1][key] for key in ("block", "length", "device", "macs", "eager", "compiled")},
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
