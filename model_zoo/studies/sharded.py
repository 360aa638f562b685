"""Memory and seconds of pruning a decoder that two processes share (FSDP2 on gloo), beside one that is whole.

Layers of the sizes of a Llama of 7 B parameters (width 4096, 32 heads, gated MLPs of 11008) in bfloat16, fewer of them
and fewer tokens, so that it fits here; weights are random, positions are not encoded. It is cut to half of its
parameters by ``l2``; *compared*: with the comparison with the masked model, which is made in double here and for which
the whole network is too large. *Held*: what a process has of
the weights before. *Peak*: the most memory of a process beyond what it had before, the result included. *Gathered*: the
largest parameter, which is whole in every process for a moment. *Refitted*: of a quarter of the width (1024, 32 heads,
2752), the pruned network refitted on 16 sequences of 128 tokens, whose Gram matrices are in double in every process;
*outputs*: their relative squared error on held-out sequences, as cut and as refitted. The two processes share the
machine's cores, and other programs may run on it: the seconds say little.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

import fxprune
from model_zoo.measuring.meter import Meter
from model_zoo.recipes.common import positive
from model_zoo.records import Record, Results, table
from model_zoo.study import Add, Options, Study, each, rules

WIDTH, HEADS, HIDDEN = 4096, 32, 11008
SEQUENCES, TOKENS = 16, 128  # that a refit reads


class Case(NamedTuple):
    """``parts``: of the width, of which it has one. ``verify``: compared with the masked model."""

    processes: int
    verify: bool = False
    refit: bool = False
    parts: int = 1


CASES = {
    "whole": Case(1),
    "shared": Case(2),
    "shared, compared": Case(2, verify=True),
    "whole, refitted": Case(1, refit=True, parts=4),
    "shared, refitted": Case(2, refit=True, parts=4),
}


class Block(nn.Module):
    """Attention and a gated MLP, behind RMS norms."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Tokens ``[N, T]`` to logits ``[N, T, words]``."""

    def __init__(self, layers: int, words: int, parts: int) -> None:
        super().__init__()
        width = WIDTH // parts
        self.words = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width, HIDDEN // parts) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def made(layers: int, words: int, case: Case) -> Any:
    """The decoder with random weights, of which a process never holds more than its share."""
    with torch.device("meta"):
        model: Any = Decoder(layers, words, case.parts).to(torch.bfloat16).eval()
    if case.processes > 1:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (case.processes,))
        for unit in (*model.blocks, model):
            fully_shard(unit, mesh=mesh)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        own = parameter.to_local() if case.processes > 1 else parameter
        with torch.no_grad():
            own.normal_(0, 0.02) if own.ndim > 1 else own.uniform_(0.5, 1.5)
    return model


def _process(rank: int, case: Case, layers: int, words: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.processes)
    model = made(layers, words, case)
    held = sum((p.to_local() if case.processes > 1 else p).nbytes for p in model.parameters())
    ids = torch.arange(16).unsqueeze(0)
    data = torch.randint(words, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"data": data, "reconstruct": True} if case.refit else {}
    with Meter() as meter:
        small = fxprune.prune(model, ids, params=0.5, verify=case.verify, progress=False, **asked)
    report = small.meta["fxprune"]
    figures = {
        **meter.figures(),
        "held": held / 2**20,
        "gathered": max(p.numel() * p.itemsize for p in model.parameters()) / 2**20,
        "params": [report.params_before, report.params_after],
        "error": report.oracle_error if report.oracle_error_in_double is None else report.oracle_error_in_double,
        "outputs": [report.reconstruction.output_before, report.reconstruction.output_after] if case.refit else None,
        "stages": report.seconds,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def measured(name: str, options: Options) -> Record:
    case = CASES[name]
    with TemporaryDirectory() as folder:
        given = (case, options.layers, options.words, folder)
        start_processes(_process, given, nprocs=case.processes, start_method="spawn")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(case.processes)]
    figures = {"processes": found, "layers": options.layers, "words": options.words}
    return Record(name, figures, {"pruning": max(each["s"] for each in found)})


def page(results: Results) -> Sequence[str]:
    rows = []
    for record in results.lines:
        for rank, f in enumerate(record.figures["processes"]):
            before, after = (f"{count / 1e6:.0f} M" for count in f["params"])
            error = "-" if f["error"] is None else f"{f['error']:.1e}"
            outputs = " -> ".join(f"{of:.3f}" for of in f.get("outputs") or ()) or "-"
            cells = [*(f"{f[key]:.0f}" for key in ("held", "gathered", "mib", "s")), error, outputs]
            rows.append([record.name, str(rank), f"{before} -> {after}", *cells])
    amounts = [f"{what}, MiB" for what in ("held", "gathered", "peak")]
    return [table(["network", "process", "parameters", *amounts, "s", "oracle, in double", "outputs"], rows)]


def _options(add: Add) -> None:
    add("--layers", type=positive, default=2, help="of the decoder (default: 2; 7 B are 32)")
    add("--words", type=positive, default=2048, help="tokens that it knows (default: 2048; 7 B has 32000)")


STUDY = Study(
    "sharded", "memory of pruning a decoder that two processes share, beside a whole one; 10 minutes",
    lambda _: CASES, each(measured), page, options=_options, doc=__doc__, rules=rules(__doc__),
)  # fmt: skip
