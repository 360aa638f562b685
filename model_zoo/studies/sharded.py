"""Memory and seconds of pruning a decoder that two processes share (FSDP2 on gloo), beside one that is whole.

Layers of the sizes of a Llama of 7 B parameters (width 4096, 32 heads, gated MLPs of 11008) in bfloat16, fewer of them
and fewer tokens, so that it fits here; weights are random, positions are not encoded. It is cut to half of its
parameters by ``l2``; *compared*: with the comparison with the masked model, which is made in double here and for which
the whole network is too large. *Held*: what a process has of
the weights before. *Peak*: the most memory of a process beyond what it had before, the result included. *Gathered*: the
largest parameter, which is whole in every process for a moment. The two processes share the machine's cores, and other
programs may run on it: the seconds say little. What a refit takes is not here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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

WIDTH, HEADS, HIDDEN, PROCESSES = 4096, 32, 11008, 2
CASES = {"whole": (1, False), "shared": (2, False), "shared, compared": (2, True)}


class Block(nn.Module):
    """Attention and a gated MLP, behind RMS norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Tokens ``[N, T]`` to logits ``[N, T, words]``."""

    def __init__(self, layers: int, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, words, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def made(layers: int, words: int, processes: int) -> Any:
    """The decoder with random weights, of which a process never holds more than its share."""
    with torch.device("meta"):
        model: Any = Decoder(layers, words).to(torch.bfloat16).eval()
    if processes > 1:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (processes,))
        for unit in (*model.blocks, model):
            fully_shard(unit, mesh=mesh)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        own = parameter.to_local() if processes > 1 else parameter
        with torch.no_grad():
            own.normal_(0, 0.02) if own.ndim > 1 else own.uniform_(0.5, 1.5)
    return model


def _process(rank: int, processes: int, verify: bool, layers: int, words: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    model = made(layers, words, processes)
    held = sum((p.to_local() if processes > 1 else p).nbytes for p in model.parameters())
    ids = torch.arange(16).unsqueeze(0)
    with Meter() as meter:
        small = fxprune.prune(model, ids, params=0.5, verify=verify, progress=False)
    report = small.meta["fxprune"]
    figures = {
        **meter.figures(),
        "held": held / 2**20,
        "gathered": max(p.numel() * p.itemsize for p in model.parameters()) / 2**20,
        "params": [report.params_before, report.params_after],
        "error": report.oracle_error if report.oracle_error_in_double is None else report.oracle_error_in_double,
        "stages": report.seconds,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def measured(case: str, options: Options) -> Record:
    processes, verify = CASES[case]
    with TemporaryDirectory() as folder:
        given = (processes, verify, options.layers, options.words, folder)
        start_processes(_process, given, nprocs=processes, start_method="spawn")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]
    figures = {"processes": found, "layers": options.layers, "words": options.words}
    return Record(case, figures, {"pruning": max(each["s"] for each in found)})


def page(results: Results) -> Sequence[str]:
    rows = []
    for record in results.lines:
        for rank, f in enumerate(record.figures["processes"]):
            before, after = (f"{count / 1e6:.0f} M" for count in f["params"])
            error = "-" if f["error"] is None else f"{f['error']:.1e}"
            cells = [*(f"{f[key]:.0f}" for key in ("held", "gathered", "mib", "s")), error]
            rows.append([record.name, str(rank), f"{before} -> {after}", *cells])
    columns = ["network", "process", "parameters", "held, MiB", "gathered, MiB", "peak, MiB", "s", "oracle, in double"]
    return [table(columns, rows)]


def _options(add: Add) -> None:
    add("--layers", type=positive, default=2, help="of the decoder (default: 2; 7 B are 32)")
    add("--words", type=positive, default=2048, help="tokens that it knows (default: 2048; 7 B has 32000)")


STUDY = Study(
    "sharded", "memory of pruning a decoder that two processes share, beside a whole one; 10 minutes",
    lambda _: CASES, each(measured), page, options=_options, doc=__doc__, rules=rules(__doc__),
)  # fmt: skip
