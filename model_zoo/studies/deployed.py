"""A detector and a decoder of half a billion parameters, as they run: milliseconds at half of the MACs.

Weights are random. YOLO11n takes 640 x 640 pixels, on onnxruntime and in PyTorch, dense as it was recorded. The decoder
has the sizes of Qwen2.5-0.5B (24 layers, 896 channels, 14 heads of which 2 of keys and values, 151,936 words), pruned
by ``l2`` at 128 tokens with ``for_class=True``; its own class then runs a prompt, and one token with the cache of the
prompt, in float32. Every time is the median of rounds in which dense and pruned run in turn, on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

import fxprune
from fxprune.deploy.runtime import CPU
from model_zoo.measuring.meter import in_turn, timer
from model_zoo.networks.after import made
from model_zoo.records import Record, Results, table
from model_zoo.study import Add, Measure, Options, Study, rules

PIXELS, LENGTHS = 640, (128, 2048)
SIZES = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
ROUNDS = 3


class Case(NamedTuple):
    """``kind``: where a detector runs, and of a decoder what."""

    network: str
    kind: str
    size: int

    def __str__(self) -> str:
        return f"{self.network}, {self.kind}, {self.size}"


def cases(options: Options) -> list[Case]:
    detector = [Case("yolo11n", provider, PIXELS) for provider in (CPU, "eager")]
    return [*detector, *(Case("decoder", kind, n) for n in options.lengths for kind in ("prompt", "one token"))]


def worker(options: Options) -> Measure:
    pair = lru_cache(maxsize=1)(decoders)

    @torch.no_grad()
    def measured(case: Case) -> Record:
        if case.network == "decoder":
            dense, pruned, ratio = pair()
            timers = {"dense": _once(dense, case), "pruned": _once(pruned, case)}
            _ = [once() for once in timers.values()]
            times = in_turn(timers, ROUNDS)
            figures: dict[str, Any] = {"dense_ms": times["dense"], "pruned_ms": times["pruned"], "macs_ratio": ratio}
        else:
            figures = detector(case.kind)
        return Record(str(case), {**case._asdict(), **figures, "ratio": figures["pruned_ms"] / figures["dense_ms"]})

    return measured


def detector(provider: str) -> dict[str, Any]:
    model, _ = made("ultralytics:yolo11n")
    x = torch.rand(1, 3, PIXELS, PIXELS)
    small = fxprune.prune(model, x, flops=0.5, progress=False)
    report = small.meta["fxprune"]
    latency = fxprune.bench(fxprune.record(model, x), small, x, provider=provider, threads=1)
    return {"dense_ms": latency.dense_ms, "pruned_ms": latency.pruned_ms, "macs_ratio": _left(report)}


def decoders() -> tuple[nn.Module, nn.Module, float]:
    """Dense, pruned in its own class, and the MACs that stay."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval().requires_grad_(False)
    ids = torch.randint(0, SIZES["vocab_size"], (1, LENGTHS[0]))
    how: dict[str, Any] = {"example_kwargs": {"input_ids": ids, "use_cache": False}, "for_class": True}
    small = fxprune.prune(model, (), flops=0.5, progress=False, **how)
    return model, fxprune.into(model, small), _left(small.meta["fxprune"])


def _left(report: fxprune.Report) -> float:
    return float(report.macs_after / report.macs_before)


def _once(model: Any, case: Case) -> Callable[[], float]:
    """What runs it once, and returns the milliseconds."""
    ids = torch.randint(0, SIZES["vocab_size"], (1, case.size), generator=torch.Generator().manual_seed(0))
    if case.kind == "prompt":
        return timer(lambda: model(ids, use_cache=False))
    cache = model(ids, use_cache=True).past_key_values

    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return timer(step)


def page(results: Results) -> list[str]:
    rows = [
        [f["network"], f["kind"], str(f["size"]), f"{f['macs_ratio']:.3f}",
         f"{f['dense_ms']:.1f} → {f['pruned_ms']:.1f}", f"{f['ratio']:.3f}"]
        for f in (record.figures for record in results.lines)
    ]  # fmt: skip
    columns = {"network": "---", "runs": "---", "pixels or tokens": "---:"}
    columns |= dict.fromkeys(("MACs that stay", "ms, dense → pruned", "of dense"), "---:")
    return [table(columns, rows)]


def _options(add: Add) -> None:
    add("--lengths", type=int, nargs="+", default=[*LENGTHS], help="tokens of the prompt (128 2048)")


STUDY = Study(
    "deployed", "a detector and a decoder of half a billion parameters at half of their MACs, as they run",
    cases, worker, page, options=_options, needs=("transformers", "ultralytics"), doc=__doc__, rules=rules(__doc__),
    told=lambda r: f"{r.name}: {r.figures['dense_ms']:.1f} -> {r.figures['pruned_ms']:.1f} ms",
)  # fmt: skip
