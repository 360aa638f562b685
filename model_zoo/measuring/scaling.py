"""Networks that grow, and what the stages of pruning take on them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECODERS = {  # width, layers, vocabulary
    "10M": (256, 8, 8000),
    "100M": (768, 10, 32000),
    "1B": (2048, 20, 32000),
    "3B": (2560, 36, 32000),
    "7B": (4096, 32, 32000),
}


INTERPRETERS = 5


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


def depth(depth: str) -> dict[str, Any]:
    return stages(residual(int(depth), 16).eval(), (torch.randn(1, 3, 32, 32),))


def width(name: str) -> dict[str, Any]:
    times, _, where = name.partition(" ")
    with torch.device(where or "cpu"):
        model, image = residual(18, 16 * int(times)).eval(), torch.empty(1, 3, 32, 32).fill_(0.5)
    return stages(model, (image,))


def decoder(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model, tokens = Decoder(*DECODERS[name]).eval(), torch.zeros(1, 64, dtype=torch.int64)
    return stages(model, (tokens,))


def large(name: str) -> dict[str, Any]:
    import timm

    from fxprune.recording.inputs import resolve_inputs

    with torch.device("meta"):
        model = timm.create_model(name).eval()
    return stages(model, resolve_inputs(model, None, None)[0])


def family(spec: str) -> dict[str, Any]:
    from fxprune.recording.inputs import resolve_inputs
    from model_zoo.networks import load

    model = load(spec).eval()
    return stages(model, *resolve_inputs(model, None, None))


def search(ratio: str) -> dict[str, Any]:
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


def consume(gib: str) -> dict[str, Any]:
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


def imported(name: str) -> dict[str, Any]:
    """Seconds of a new interpreter, the median of several."""
    code = (
        f"import time, torch; begun = time.process_time(); import fxprune; {name}; print(time.process_time() - begun)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(INTERPRETERS)]
    return {"import": float(np.median([float(run.stdout) for run in runs]))}
