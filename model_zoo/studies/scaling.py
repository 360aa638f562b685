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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fxprune.recording.inputs import resolve_inputs
from model_zoo.measuring.meter import machine_gib, peak_gib
from model_zoo.measuring.scaling import consume, imported, search, stages
from model_zoo.networks import families, load
from model_zoo.networks.growing import DECODERS, Decoder, residual
from model_zoo.pages.scaling import page, plot
from model_zoo.records import Record
from model_zoo.study import Options, Study, each, rules

GIB = "of weights, for consume (default: half of the machine's memory)"
LARGE = ("swin_large_patch4_window12_384", "vit_giant_patch14_224", "convnext_xxlarge")


def _depth(depth: str) -> dict[str, Any]:
    return stages(residual(int(depth), 16).eval(), (torch.randn(1, 3, 32, 32),))


def _width(name: str) -> dict[str, Any]:
    times, _, where = name.partition(" ")
    with torch.device(where or "cpu"):
        model, image = residual(18, 16 * int(times)).eval(), torch.full((1, 3, 32, 32), 0.5)
    return stages(model, (image,))


def _decoder(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model, tokens = Decoder(*DECODERS[name]).eval(), torch.zeros(1, 64, dtype=torch.int64)
    return stages(model, (tokens,))


def _named(spec: str, device: str = "cpu") -> dict[str, Any]:
    with torch.device(device):
        model = load(spec)
    return stages(model, *resolve_inputs(model))


KINDS: dict[str, tuple[Callable[[str], dict[str, Any]], Sequence[str]]] = {
    "depth": (_depth, "18 34 66 130 258 514 1002".split()),
    "width": (_width, ["1", "2", "4", "8", "16", "1 meta", "2 meta", "4 meta", "8 meta", "16 meta"]),
    "parameters": (_decoder, [*DECODERS]),
    "large": (lambda name: _named(f"timm:{name}", "meta"), LARGE),
    "families": (_named, families()),
    "search": (search, ["0.9", "0.7", "0.5", "0.3", "0.1"]),
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
    return Record(str(point), {"kind": point.kind, "point": point.name, **figures, "memory_gib": peak_gib()})


STUDY = Study(
    "scaling", "seconds and memory of the stages as networks grow; of a search, an import, consume=True", points,
    each(measured), page, plot, doc=__doc__, rules=rules(__doc__), apart=True, timeout=300,
    options=lambda add: add("--gib", type=float, default=machine_gib() / 2, help=GIB),
)  # fmt: skip
