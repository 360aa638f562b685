"""Attention blocks after pruning: the time of PyTorch itself, eager and compiled, beside the MACs that stay.

On the CPU, and on a GPU where there is one. A block as in ViT-B and a block as in Llama (grouped queries, rotary
embedding, gated MLP), at three lengths. What is cut decides which kernel ``scaled_dot_product_attention`` takes: heads
whose queries and values differ in width leave the fused one. Every time is the median of three medians, dense and
pruned in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import fxprune
from model_zoo.measuring.meter import in_turn, milliseconds
from model_zoo.networks.attention_blocks import BLOCKS, WIDTH
from model_zoo.pages.attention import page
from model_zoo.records import Layout, Record
from model_zoo.study import Add, Options, Study, each

LENGTHS = (197, 384, 1024)
PRUNED: dict[str, dict[str, Any]] = {
    "head_dim": {"attention": "head_dim"},
    "head_dim, multiples of 8": {"attention": "head_dim", "round_to": 8},
    "heads": {"attention": "heads"},
}
RUN: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "eager": lambda network: network,
    "compiled": torch.compile,
}
ROUNDS = 3


class Case(NamedTuple):
    """One block at one length."""

    block: str
    length: int
    device: str

    def __str__(self) -> str:
        return f"{self.block}, {self.length}, {self.device}"


def measure(case: Case, options: Options) -> Record:
    """Milliseconds of the dense and of every pruned block, eager and compiled."""
    dtype, batch = (torch.bfloat16, 16) if case.device == "cuda" else (torch.float32, 1)
    torch.manual_seed(0)
    networks = {"dense": BLOCKS[case.block]().eval().to(case.device, dtype)}
    x = torch.randn(batch, case.length, WIDTH, device=case.device, dtype=dtype)
    empty: dict[str, Any] = {"macs": {}, "widths": {}, "failed": {}}
    found = {**case._asdict(), "dtype": str(dtype), "batch": batch, **empty}
    for kind, given in PRUNED.items():
        model, half = BLOCKS[case.block]().eval(), {"flops": 0.5, "method": "l2", "progress": False, **given}
        try:
            small = fxprune.prune(model, x.float().cpu(), **half)
        except fxprune.errors.FxpruneError as error:
            found["failed"][kind] = str(error)
            continue
        report = small.meta["fxprune"]
        found["macs"][kind] = report.macs_after / report.macs_before
        cut = [(n, [*p.shape]) for n, p in small.named_parameters() if n.split(".")[0] in ("qkv", "q", "k", "v")]
        found["widths"][kind] = dict(cut)
        networks[kind] = small.to(case.device, dtype)
    for how, prepared in RUN.items():
        torch.compiler.reset()
        runs = {kind: partial(prepared(network), x) for kind, network in networks.items()}
        timers = {kind: partial(milliseconds, run, options.seconds, case.device) for kind, run in runs.items()}
        with torch.no_grad():
            found[how] = in_turn(timers, ROUNDS)
    return Record(str(case), found)


def _options(add: Add) -> None:
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    add("--lengths", type=int, nargs="+", default=[*LENGTHS], help="tokens (197 384 1024)")
    add("--seconds", type=float, default=1.0, help="at least, for one median (1)")
    add("--devices", nargs="+", choices=["cpu", "cuda"], default=there, help="default: those there are")


def _cases(options: Options) -> list[Case]:
    return [Case(name, length, device) for device in options.devices for name in BLOCKS for length in options.lengths]


STUDY = Study(
    "attention", "attention blocks: PyTorch's own time after each way of cutting heads", _cases, each(measure), page,
    options=_options, doc=__doc__,
    head=lambda _: {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"},
    file="attention.json", layout=Layout("blocks", ("block", "length", "device")),
)  # fmt: skip
