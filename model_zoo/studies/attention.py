"""Attention blocks after pruning: the time of PyTorch itself, eager and compiled, beside the MACs that stay.

On the CPU, and on a GPU where there is one. A block as in ViT-B and a block as in Llama (grouped queries, rotary
embedding, gated MLP), at three lengths. What is cut decides which kernel ``scaled_dot_product_attention`` takes: heads
whose queries and values differ in width leave the fused one. Every time is the median of three medians, dense and
pruned in turn.
"""

from __future__ import annotations

import torch

from model_zoo.measuring.attention import BLOCKS, Case, measure
from model_zoo.pages.attention import page
from model_zoo.records import Layout
from model_zoo.study import Add, Options, Study, each

LENGTHS = (197, 384, 1024)
WIDTH, HEADS, KEY_HEADS = 768, 12, 4


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
