"""Time and memory of the stages as a network grows: deeper, wider, with more parameters.

*depth*: residual networks of basic blocks, from ResNet-18 to 1000 layers, on images of 32 pixels, with weights.
*width*: a ResNet-18 with 1 to 16 times the channels, on the meta device and with weights. *parameters*: decoders from
10 M to 7 B parameters on meta (embedding, causal attention, gated perceptron, RMS norm; 64 tokens). *large*: three
large networks of timm on meta. *families*: the smallest architecture of every module of timm, with weights, on images
of the size that it is made for. *search*: plans for ResNet-152 at several budgets once scores are known. *consume*: a
perceptron of half the machine's memory, or of ``--gib``, with weights, ``consume=True``. *import*: what ``import
fxprune`` takes after torch, and with everything that ``fxprune.prune`` needs.

Every point is a process of its own; times are its processor time, single-threaded, and so do not depend on what else
runs. Memory is the most that the process held in all. Exponents are fitted by least squares to the logarithms of the
upper half of the points, where what does not grow counts for little.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from model_zoo.measuring.scaling import DECODERS, consume, decoder, depth, family, imported, large, search, width
from model_zoo.networks import families
from model_zoo.pages.scaling import page, plot
from model_zoo.records import Record
from model_zoo.study import Add, Options, Study, each, rules

DEPTHS = (18, 34, 66, 130, 258, 514, 1002)
WIDTHS = (1, 2, 4, 8, 16)
LARGE = ("swin_large_patch4_window12_384", "vit_giant_patch14_224", "convnext_xxlarge")
SEARCHED = (0.9, 0.7, 0.5, 0.3, 0.1)


KINDS: dict[str, tuple[Callable[[str], dict[str, Any]], Sequence[str]]] = {
    "depth": (depth, [str(depth) for depth in DEPTHS]),
    "width": (width, [f"{times}{where}" for where in ("", " meta") for times in WIDTHS]),
    "parameters": (decoder, [*DECODERS]),
    "large": (large, LARGE),
    "families": (family, families()),
    "search": (search, [str(ratio) for ratio in SEARCHED]),
    "consume": (consume, []),
    "import": (imported, ["fxprune", "fxprune.prune"]),
}


class Point(NamedTuple):
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def points(options: Options) -> list[Point]:
    given = {kind: [f"{options.gib:.1f}"] if kind == "consume" else names for kind, (_, names) in KINDS.items()}
    return [Point(kind, name) for kind, names in given.items() for name in names]


def measured(point: Point, options: Options) -> Record:
    torch.manual_seed(0)
    figures = KINDS[point.kind][0](point.name)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Record(str(point), {"kind": point.kind, "point": point.name, **figures, "memory_gib": memory})


def _options(add: Add) -> None:
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**31
    add("--gib", type=float, default=half, help="of weights, for consume (default: half of the machine's memory)")


STUDY = Study(
    "scaling", "seconds and memory of the stages as networks grow; of a search, an import, consume=True", points,
    each(measured), page, plot, _options, doc=__doc__, rules=rules(__doc__), apart=True, timeout=300,
)  # fmt: skip
