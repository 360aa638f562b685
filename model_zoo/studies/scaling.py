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
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_zoo.networks import families
from model_zoo.records import Record, Results, bullets, table
from model_zoo.study import Add, Options, Study, each

STAGES = ("record", "label", "select", "rewrite")
DEPTHS = (18, 34, 66, 130, 258, 514, 1002)
WIDTHS = (1, 2, 4, 8, 16)
DECODERS = {  # width, layers, vocabulary
    "10M": (256, 8, 8000),
    "100M": (768, 10, 32000),
    "1B": (2048, 20, 32000),
    "3B": (2560, 36, 32000),
    "7B": (4096, 32, 32000),
}
LARGE = ("swin_large_patch4_window12_384", "vit_giant_patch14_224", "convnext_xxlarge")
SLOW = {"label": 2.0, "all": 5.0}  # seconds that no family's smallest should need
INTERPRETERS = 5
SEARCHED = (0.9, 0.7, 0.5, 0.3, 0.1)


# -- the networks -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        same = before == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def residual(depth: int, width: int = 64) -> nn.Module:
    """``depth`` layers: a stem, four stages of basic blocks, a classifier."""
    blocks, layers, before = (depth - 2) // 2, [], width
    for stage in range(4):
        for index in range(blocks // 4 + (stage < blocks % 4)):
            after = width * 2**stage
            layers.append(Block(before, after, 2 if stage and not index else 1))
            before = after
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class Layer(nn.Module):
    """Of a decoder: causal attention and a gated perceptron, each after an RMS norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        hidden = (8 * width // 3 + 255) // 256 * 256
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(batch, tokens, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).reshape(batch, tokens, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, width: int, layers: int, vocabulary: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Layer(width, max(width // 128, 2)) for _ in range(layers)])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def perceptron(gib: float, width: int = 4096) -> nn.Module:
    """So many GiB of weights."""
    layers = max(2, round(gib * 2**30 / (4 * width * width)))
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(width, 10))


# -- what is measured -------------------------------------------------------------------------------------------------


def stages(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Seconds of processor time of every stage, at half of the MACs."""
    from fxprune.groups import analyse_graph
    from fxprune.methods import ModelState, resolve, score_groups
    from fxprune.pipeline import Cut, Dense, Stages, choose, compress, recorded
    from fxprune.selection.budget import Budget

    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}

    def timed(stage: str, run: Callable[[], Any]) -> Any:
        begun = time.process_time()
        result = run()
        figures[stage] = time.process_time() - begun
        return result

    kwargs = kwargs or {}
    on_meta = any(p.is_meta for p in model.parameters())
    module, runs = timed("record", lambda: recorded(model, args, kwargs))
    graph = timed("label", lambda: analyse_graph(module, args, kwargs))
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    state = ModelState(graph, tensors, 0)
    method: Any = resolve("random" if on_meta else "l2")
    scores = timed("score", lambda: score_groups(method, state))
    options = Cut(Budget("flops", 0.5), verify=False)
    timed("select", lambda: choose(graph, scores, options))
    dense = Dense(module, runs, graph, args, kwargs, type(model).__name__, Stages(progress=False))
    both = timed("both", lambda: compress(dense, scores, options, "l2"))
    figures["rewrite"] = figures.pop("both") - figures["select"]
    figures["nodes"] = len(module.graph.nodes)
    figures["ratio"] = both.meta["fxprune"].macs_after / both.meta["fxprune"].macs_before
    return figures


def _depth(depth: str) -> dict[str, Any]:
    return stages(residual(int(depth), 16).eval(), (torch.randn(1, 3, 32, 32),))


def _width(name: str) -> dict[str, Any]:
    times, _, where = name.partition(" ")
    with torch.device(where or "cpu"):
        model, image = residual(18, 16 * int(times)).eval(), torch.empty(1, 3, 32, 32).fill_(0.5)
    return stages(model, (image,))


def _decoder(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model, tokens = Decoder(*DECODERS[name]).eval(), torch.zeros(1, 64, dtype=torch.int64)
    return stages(model, (tokens,))


def _large(name: str) -> dict[str, Any]:
    import timm

    from fxprune.recording.inputs import resolve_inputs

    with torch.device("meta"):
        model = timm.create_model(name).eval()
    return stages(model, resolve_inputs(model, None, None)[0])


def _family(spec: str) -> dict[str, Any]:
    from fxprune.recording.inputs import resolve_inputs
    from model_zoo.networks import load

    model = load(spec).eval()
    return stages(model, *resolve_inputs(model, None, None))


def _search(ratio: str) -> dict[str, Any]:
    """Seconds of a search on ResNet-152; the first builds the cost model, the least of five others is given."""
    import timm

    import fxprune
    from fxprune.methods import ModelState, resolve, score_groups
    from fxprune.selection.budget import Budget, select

    model = timm.create_model("resnet152").eval()
    graph = fxprune.analyze(model)
    l2: Any = resolve("l2")
    scores = score_groups(l2, ModelState(graph, dict([*model.named_parameters(), *model.named_buffers()]), 0))
    taken = []
    for _ in range(6):
        begun = time.process_time()
        select(graph, scores, Budget("flops", float(ratio)))
        taken.append(time.process_time() - begun)
    return {"first": taken[0], "select": min(taken[1:])}


def _consume(gib: str) -> dict[str, Any]:
    """The machine's memory, what the dense weights take, and the most that the process held while they were pruned."""
    import fxprune

    model = perceptron(float(gib)).eval()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(p.nbytes for p in model.parameters())
    begun = time.process_time()
    pruned = fxprune.prune(
        model, torch.zeros(1, 4096), params=0.5, round_to=1, verify=False, progress=False,
        options=fxprune.Options(consume=True),
    )  # fmt: skip
    left = sum(p.nbytes for p in pruned.parameters())
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "s": time.process_time() - begun, "weights_gib": weights / 2**30, "pruned_gib": left / 2**30,
        "before_gib": held / 2**20, "machine_gib": machine / 2**30,
    }  # fmt: skip


def _import(name: str) -> dict[str, Any]:
    """Seconds of a new interpreter, the median of several."""
    code = (
        f"import time, torch; begun = time.process_time(); import fxprune; {name}; print(time.process_time() - begun)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(INTERPRETERS)]
    return {"import": float(np.median([float(run.stdout) for run in runs]))}


KINDS: dict[str, tuple[Callable[[str], dict[str, Any]], Sequence[str]]] = {
    "depth": (_depth, [str(depth) for depth in DEPTHS]),
    "width": (_width, [f"{times}{where}" for where in ("", " meta") for times in WIDTHS]),
    "parameters": (_decoder, [*DECODERS]),
    "large": (_large, LARGE),
    "families": (_family, families()),
    "search": (_search, [str(ratio) for ratio in SEARCHED]),
    "consume": (_consume, []),
    "import": (_import, ["fxprune", "fxprune.prune"]),
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


# -- the page ---------------------------------------------------------------------------------------------------------


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the power of the size that the values follow, in the upper half of the sizes."""
    half = len(sizes) // 2
    logs = np.log([sizes[half:], values[half:]])
    return float(np.polyfit(logs[0], logs[1], 1)[0])


def _series(records: Sequence[Record], kind: str, where: str = "") -> tuple[list[float], list[Record]]:
    """Sizes and records of the points of a curve, in ascending order."""
    found = []
    for record in records:
        f = record.figures
        if "record" in f and f["kind"] == kind and f["point"].endswith(where) and (where or " " not in f["point"]):
            size = f["parameters"] if kind == "parameters" else float(f["point"].split()[0])
            found.append((float(size), record))
    found.sort(key=lambda pair: pair[0])
    return [size for size, _ in found], [record for _, record in found]


CURVES = (  # kind, which points, what grows
    ("depth", "", "layers"),
    ("width", "", "times the channels"),
    ("width", " meta", "times the channels, on meta"),
    ("parameters", "", "parameters, on meta"),
)


def page(results: Results) -> Sequence[str]:
    records = results.lines
    figures = [record.figures for record in records]
    times = []
    for name, f in ((r.name, r.figures) for r in records if "record" in r.figures and r.figures["kind"] != "families"):
        seconds = [f[stage] for stage in STAGES]
        times.append([name, *(f"{s:.2f}" for s in seconds), f"{sum(seconds):.2f}", f"{f['memory_gib']:.2f}"])
    growth = []
    for kind, where, label in CURVES:
        sizes, curve = _series(records, kind, where)
        if len(sizes) > 2:
            columns = [[p.figures[stage] for p in curve] for stage in STAGES]
            columns.append([sum(p.figures[stage] for stage in STAGES) for p in curve])
            growth.append([label, *(f"{exponent(sizes, column):.2f}" for column in columns)])
    parts = [
        (__doc__ or "").split("\n\n", 1)[1].strip(),
        "## Seconds of processor time",
        table(["", *STAGES, "all four", "GiB"], times),
        "## Growth",
        table(["exponent in", *STAGES, "all four"], growth),
        results.image("the curves"),
    ]
    if of_families := [f for f in figures if "record" in f and f["kind"] == "families"]:
        parts += ["## The smallest architecture of every family", _of_families(of_families)]
    searches = [f for f in figures if "first" in f]
    if found := [f"{1000 * f['select']:.0f} ms at {f['point']} (the first {1000 * f['first']:.0f})" for f in searches]:
        parts += ["## Search on ResNet-152, once scores are known", "; ".join(found) + "."]
    for f in (f for f in figures if "weights_gib" in f):
        parts += [
            "## consume=True",
            f"{f['weights_gib']:.1f} GiB of weights were cut to {f['pruned_gib']:.1f} GiB; the process held "
            f"{f['before_gib']:.1f} GiB before and {f['memory_gib']:.1f} GiB at most, of {f['machine_gib']:.1f} that "
            "the machine has.",
        ]
    if imported := [f"`{f['point']}` {f['import']:.2f} s" for f in figures if "import" in f]:
        parts += ["## Import, beyond torch", "; ".join(imported) + "."]
    failing = {r.name: r.figures.get("fails") or "; ".join(r.failures.values()) for r in records}
    if any(failing.values()):
        parts += ["## Fails", bullets(f"{name}: {why}" for name, why in failing.items() if why)]
    return parts


def _of_families(figures: Sequence[dict[str, Any]]) -> str:
    lines = [f"{len(figures)} architectures; *all* is from recording to the rewritten module, scores included."]
    for what, limit in SLOW.items():
        of = ("label",) if what == "label" else (*STAGES, "score")
        taken = {f["point"]: sum(f[stage] for stage in of) for f in figures}
        over = sorted((name for name in taken if taken[name] > limit), key=lambda name: -taken[name])
        lines.append(
            f"- {what}: {np.median([*taken.values()]):.2f} s at the median, {max(taken.values()):.2f} s at most; "
            f"more than {limit:g} s: " + (", ".join(f"{name} ({taken[name]:.1f})" for name in over) or "none") + "."
        )
    return "\n".join(lines)


def plot(results: Results) -> None:
    """A log-log plot per curve."""
    from matplotlib.figure import Figure

    curves = [(label, *_series(results.lines, kind, where)) for kind, where, label in CURVES]
    curves = [curve for curve in curves if len(curve[1]) > 2]
    if not curves:
        return
    figure = Figure(figsize=(4 * len(curves), 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (label, sizes, curve) in zip(panels, curves, strict=True):
        for stage in STAGES:
            values = [p.figures[stage] for p in curve]
            axis.plot(sizes, values, "o-", label=f"{stage} ^{exponent(sizes, values):.2f}")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(results.plot, dpi=120)


def _options(add: Add) -> None:
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**31
    add("--gib", type=float, default=half, help="of weights, for consume (default: half of the machine's memory)")


STUDY = Study(
    "scaling", "seconds and memory of the stages as networks grow; of a search, an import, consume=True", points,
    each(measured), page, plot, _options, doc=__doc__, apart=True, timeout=300,
)  # fmt: skip
