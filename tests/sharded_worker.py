"""A decoder that two processes share is pruned, beside the same one whole in each of them.

``torchrun --nproc-per-node 2 tests/sharded_worker.py OUT`` writes ``OUT/RANK.json``: what came out, and refusals.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.multiprocessing.reductions import StorageWeakRef

import fxprune
from fxprune.errors import FxpruneError

WORDS, WIDTH, HEADS, HIDDEN = 51, 30, 3, 47  # of which two processes hold unequal shares
IDS = torch.randint(0, WORDS, (2, 7), generator=torch.Generator().manual_seed(1))
DATA = list(torch.randint(0, WORDS, (5, 6, 7), generator=torch.Generator().manual_seed(2)))


class Norm(nn.Module):
    """Root mean square, with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Attention and a gated MLP, each in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Norm(), Norm()])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*s) for s in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.view(batch, length, HEADS, -1).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, -1))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Tokens ``[N, T]`` to logits ``[N, T, WORDS]``."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = Norm(), nn.Linear(WIDTH, WORDS, bias=False)
        self.register_buffer("scale", torch.tensor(0.5))
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Reading(nn.Module):
    """Its forward asks for a value of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * float(self.first.weight.abs().max()))


def decoder(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return Decoder(**kwargs).eval()


def sharded(model: nn.Module) -> Any:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    result = copy.deepcopy(model)
    for block in getattr(result, "blocks", ()):
        fully_shard(block, mesh=mesh)
    return fully_shard(result, mesh=mesh)


def pruned(model: nn.Module, **kwargs: Any) -> Any:
    return fxprune.prune(model, IDS, progress=False, **{"params": 0.5, **kwargs})


@contextmanager
def gathering() -> Iterator[list[int]]:
    """Bytes of whole tensors that are there at once, whenever another one was gathered."""
    found, there, own = list[int](), list[tuple[StorageWeakRef, int]](), DTensor.full_tensor

    def full_tensor(self: DTensor, **kwargs: Any) -> Tensor:
        result = own(self, **kwargs)
        there[:] = [(ref, size) for ref, size in there if not ref.expired()]
        there.append((StorageWeakRef(result.untyped_storage()), result.untyped_storage().nbytes()))
        found.append(sum(size for _, size in there))
        return result

    DTensor.full_tensor = full_tensor  # type: ignore[method-assign]
    try:
        yield found
    finally:
        DTensor.full_tensor = own  # type: ignore[method-assign]


def put_together(small: Any) -> nn.Module:
    """As the messages say: by the same plan of a whole model, with the parameters of all."""
    whole: nn.Module = fxprune.apply(decoder(), small.meta["fxprune"].plan, IDS)
    whole.load_state_dict({name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in small.state_dict().items()})
    return whole


def _mostly(sizes: list[int]) -> int:
    """The largest but for one of ten: gloo's own thread may hold what was gathered for a moment longer."""
    return sorted(sizes)[len(sizes) * 9 // 10]


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def compared(tied: bool) -> dict[str, Any]:
    """A pruned network of shares beside one that never was shared: the same call of both."""
    model = decoder(tied=tied)
    shared, expected = sharded(model), pruned(model)
    before = shared(IDS).detach()
    with gathering() as sizes:
        small = pruned(shared)
    plan = small.meta["fxprune"].plan
    outputs = small(IDS)
    outputs.square().mean().backward()
    expected(IDS).square().mean().backward()
    own = dict(small.named_parameters())
    result = {
        "same plan": plan == expected.meta["fxprune"].plan,
        "oracle": small.meta["fxprune"].oracle_error,
        "names": list(own) == [name for name, _ in expected.named_parameters()],
        "weights": max(gap(p.full_tensor(), expected.get_parameter(n)) for n, p in own.items()),
        "gradients": max(gap(p.grad.full_tensor(), expected.get_parameter(n).grad) for n, p in own.items()),
        "outputs": gap(outputs, expected(IDS)),
        "applied": 0.0 if tied else gap(fxprune.apply(shared, plan, IDS)(IDS), expected(IDS)),
        "gathered": _mostly(sizes),
        "gatherings": len(sizes),
        "largest": max(p.numel() * 4 for p in model.parameters()),
        "of the whole": sum(p.numel() * 4 for p in model.parameters()),
        "own entries": sum(p.to_local().numel() for p in own.values()),
        "entries": sum(p.numel() for p in expected.parameters()),
        "notes": list(small.meta["fxprune"].notes),
        "together": 0.0 if tied else gap(put_together(small)(IDS), outputs),
        "again": 0.0 if tied else gap(pruned(small)(IDS), pruned(expected)(IDS)),
        "model as it was": isinstance(shared, FSDPModule) and gap(shared(IDS).detach(), before) == 0,
    }
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    return {**result, "trained": gap(small(IDS), expected(IDS))}


def halved() -> dict[str, Any]:
    """In bfloat16, which the oracle computes in double."""
    expected, small = pruned(decoder().bfloat16()), pruned(sharded(decoder().bfloat16()))
    report = small.meta["fxprune"]
    return {
        "same plan": report.plan == expected.meta["fxprune"].plan,
        "double": report.oracle_error_in_double,
        "error": report.oracle_error,
        "outputs": gap(small(IDS).float(), expected(IDS).float()),
        "dtype": str(small.get_parameter("head.weight").dtype),
    }


def reconstructed(rank: int) -> dict[str, Any]:
    """Refitted as shares, by ``prune`` and by ``reconstruct``, beside the same of a whole model."""
    model = decoder(tied=True)
    shared, expected = sharded(model), pruned(model, data=DATA, reconstruct=True)
    with gathering() as sizes:
        small = pruned(shared, data=DATA, reconstruct=True)
    cut = pruned(shared, verify=False)
    with gathering() as sizes_alone:
        alone = fxprune.reconstruct(cut, shared, DATA, memory=0)
    told, wanted = (each.meta["fxprune"].reconstruction for each in (small, expected))
    judging: Any = sys.modules["fxprune.reconstruction.refit"]  # reconstruction.refit is the function
    own_judge = judging._is_worse
    try:
        judging._is_worse = lambda error: rank == 1
        worse = fxprune.reconstruct(cut, shared, DATA)
    finally:
        judging._is_worse = own_judge
    in_two = {"data": DATA, "reconstruct": True, "verify": False, "options": fxprune.Options(steps=2)}
    steps = [pruned(each, **in_two) for each in (shared, model)]
    return {
        "weights": max(gap(p.full_tensor(), expected.get_parameter(n)) for n, p in small.named_parameters()),
        "outputs": gap(small(IDS), expected(IDS)),
        "alone": gap(alone(IDS), expected(IDS)),
        "in steps": gap(steps[0](IDS), steps[1](IDS)),
        "moved by": gap(cut(IDS), expected(IDS)),
        "put back": [gap(worse(IDS), cut(IDS)), *worse.meta["fxprune"].reconstruction.notes],
        "layers": [[layer.name, layer.kept, layer.why] for layer in told.layers],
        "expected layers": [[layer.name, layer.kept, layer.why] for layer in wanted.layers],
        "errors": [told.output_before, told.output_after],
        "expected errors": [wanted.output_before, wanted.output_after],
        "gathered": max(_mostly(sizes), _mostly(sizes_alone)),
        "trains": isinstance(alone, FSDPModule) and isinstance(small, FSDPModule),
        "data": message(lambda: fxprune.reconstruct(cut, shared, DATA[rank:])),
        "seed": message(lambda: fxprune.reconstruct(cut, shared, DATA, seed=rank)),
        "no data": message(lambda: fxprune.reconstruct(cut, shared)),
        "tune": message(lambda: fxprune.reconstruct(cut, shared, DATA, tune=1)),
        "one whole": message(lambda: fxprune.reconstruct(pruned(model, verify=False), shared, DATA)),
    }


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except FxpruneError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def refusals(rank: int) -> dict[str, str]:
    shared = sharded(decoder())
    plans = [pruned(decoder(), params=ratio).meta["fxprune"].plan for ratio in (0.5, 0.6)]
    broken = sharded(decoder())
    if rank == 1:
        with torch.no_grad():
            broken.head.weight.to_local()[0, 0] = torch.nan
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    small = pruned(shared, verify=False)
    odd = decoder()
    odd.head.weight = nn.Parameter(DTensor.from_local(odd.head.weight.detach(), mesh, [Partial()]))
    reading = sharded(Reading())
    return {
        "budgets": message(lambda: pruned(shared, params=0.5 + 0.1 * rank)),
        "inputs": message(lambda: fxprune.prune(shared, IDS[:, : 5 + rank], params=0.5, progress=False)),
        "plans": message(lambda: fxprune.apply(shared, plans[rank], IDS)),
        "noise": message(lambda: pruned(shared, reconstruct=True)),
        "tune": message(lambda: pruned(shared, reconstruct=True, data=IDS, options=fxprune.Options(tune=1))),
        "refit": message(lambda: pruned(shared, reconstruct=rank == 1, data=IDS)),
        "taylor": message(lambda: pruned(shared, method="taylor", data=[(IDS, IDS)])),
        "attach": message(lambda: fxprune.attach(shared, IDS, method="slimming", params=0.5)),
        "record": message(lambda: fxprune.record(shared, IDS)),
        "save": message(lambda: fxprune.save(small, "small.safetensors")),
        "save_pretrained": message(lambda: fxprune.save_pretrained(small, "small")),
        "export": message(lambda: fxprune.export(small, "small.onnx")),
        "into": message(lambda: fxprune.into(shared, small)),
        "broken": message(lambda: pruned(broken)),
        "placement": message(lambda: pruned(odd)),
        "reading": message(lambda: fxprune.prune(reading, torch.randn(2, 8), params=0.5, progress=False)),
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results: dict[str, Any] = {
        "apart": compared(False),
        "tied": compared(True),
        "half": halved(),
        "reconstructed": reconstructed(rank),
        "refusals": refusals(rank),
    }
    shared = sharded(decoder())
    dist.destroy_process_group()
    results["refusals"]["no group"] = message(lambda: pruned(shared))
    (out / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
