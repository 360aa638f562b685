"""Plans of every method that reads data, by one process, or by two under torchrun, each with its share of every batch.

``torchrun --nproc-per-node 2 tests/training/distributed_worker.py OUT`` writes ``OUT/RANK.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxprune
from fxprune import methods, optim
from fxprune.errors import FxpruneError

BATCH, STEPS = 8, 4


class Normed(nn.Module):
    """A residual network without statistics over the batch: 3 -> 12 -> 16 -> 12 channels, 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(16, 12, 1), nn.GroupNorm(3, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.down(self.up(x))).mean((2, 3)))


def batches(rank: int = 0, processes: int = 1) -> list[tuple[Tensor, Tensor]]:
    """This process's shares of the same batches."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(BATCH * STEPS, 3, 6, 6, generator=generator).split(BATCH)
    y = torch.randint(0, 5, (BATCH * STEPS,), generator=generator).split(BATCH)
    return [(a[rank::processes], b[rank::processes]) for a, b in zip(x, y, strict=True)]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Normed().eval()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)


EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
CRITERIA: dict[str, Any] = {
    "taylor": "taylor",
    "fisher": "fisher",
    "activation": "activation",
    "zeros": methods.Activation(kind="apoz"),
    "wanda": "wanda",
}
LEARNERS: dict[str, Any] = {
    "slimming": methods.Slimming(strength=1e-2),
    "slimming to a percentile": methods.Slimming(strength=1e-2, percent=0.4),
    "scratch": methods.Scratch(lr=0.05),
}


def plans(rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """What every method keeps, and what else must be the same in every process."""
    data = batches(rank, processes)
    quiet: Any = {"flops": 0.5, "progress": False, "verify": False}
    found: dict[str, Any] = {}
    for name, method in CRITERIA.items():
        found[name] = kept(fxprune.prune(network(), EXAMPLE, method=method, data=data, **quiet))
    found["taylor in steps"] = kept(
        fxprune.prune(network(), EXAMPLE, method="taylor", data=data, options=fxprune.Options(steps=3), **quiet)
    )
    for name, method in LEARNERS.items():
        options = quiet | {"flops": None if getattr(method, "decides", False) else 0.5}
        # Only the first process has these weights; the others take them over.
        small = fxprune.prune(
            network(rank), EXAMPLE, method=method, data=data, epochs=3,
            options=fxprune.Options(loop=fxprune.Loop(optimizer=sgd, clip=1.0)), **options,
        )  # fmt: skip
        found[name] = kept(small)
        found[f"{name}, sum of weights"] = sum(p.detach().double().sum() for p in small.parameters()).item()
    found["scratch without labels"] = kept(
        fxprune.prune(network(), EXAMPLE, method=methods.Scratch(steps=6, lr=0.1), **quiet)
    )
    small = own_loop(network(), EXAMPLE, data, processes, sgd, method=LEARNERS["slimming"], **quiet)
    found["a loop of one's own"] = kept(small)
    return found | sparse(data, processes)


def sparse(data: list[tuple[Tensor, Tensor]], processes: int) -> dict[str, Any]:
    """Sparse momentum: which weights are active in every step, which are left, which channels are.

    In double precision, so that the order in which gradients are summed decides nothing.
    """
    model, example, data = network().double(), EXAMPLE.double(), [(x.double(), y) for x, y in data]
    noted, own = Noted(), Noted()
    options: Any = {"method": methods.GSM(compression=8), "progress": False, "verify": False}
    loop = fxprune.Loop(optimizer=noted.optimizer, clip=1.0)
    built_in: Any = {"data": data, "epochs": 3, "options": fxprune.Options(loop=loop)}
    whole = fxprune.prune(model, example, **options, **built_in)
    theirs = own_loop(model, example, data, processes, own.optimizer, **options)
    channels = methods.GSM(structured=True, lr=0.05, momentum=0.9, weight_decay=1e-2)
    built_in["options"] = fxprune.Options(loop=fxprune.Loop(clip=1.0))
    structured = fxprune.prune(model, example, **options | {"method": channels, "flops": 0.5}, **built_in)
    return {
        "gsm": [noted.active, left(whole), kept(whole)],
        "gsm, a loop of one's own": [own.active, left(theirs), kept(theirs)],
        "gsm of channels": kept(structured),
    }


class Noted:
    """An optimizer's ranking, written down: for every step the numbers of the active weights, tensor by tensor."""

    def __init__(self) -> None:
        self.active: list[list[list[int]]] = []

    def optimizer(self, parameters: Any) -> optim.GSM:
        active = self.active

        class GSM(optim.GSM):
            def gradients(self) -> dict[Tensor, Tensor]:
                found = super().gradients()
                active.append([g.flatten().nonzero().flatten().tolist() for g in found.values() if g.ndim > 1])
                return found

        return GSM(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2, compression=8)


def left(small: nn.Module) -> list[list[int]]:
    """The places of weights that are not zero."""
    return [p.flatten().nonzero().flatten().tolist() for p in small.parameters() if p.ndim > 1]


def own_loop(
    original: nn.Module, example: Tensor, data: list[tuple[Tensor, Tensor]], processes: int, make: Any, **options: Any
) -> nn.Module:
    learner = fxprune.attach(original, example, **options)
    model = DistributedDataParallel(learner.model) if processes > 1 else learner.model
    optimizer = make(learner.model.parameters())
    for _ in range(2):
        for x, y in data:
            loss = learner.loss(F.cross_entropy(model(x), y))
            optimizer.zero_grad()
            loss.backward()
            learner.after_backward()
            optimizer.step()
            learner.after_step()
    return learner.finish()


def kept(small: nn.Module) -> dict[str, Any]:
    return {name: dims[0] for name, dims in small.meta["fxprune"].plan.kept.items() if 0 in dims}  # type: ignore[index]


# -- what only several processes have ----------------------------------------------------------------------------------


class BatchNormed(nn.Module):
    """Every process has its own statistics of its share."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.dropout(self.norm(self.one(x)).relu().mean((2, 3))))


def interrupted(folder: Path) -> dict[str, Any]:
    """Final weights without an interruption, and with one in the second epoch; of the data set each has its part."""
    path = folder / "run.pt"
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    found = {}
    for name, stop in (("whole", None), ("cut", 6), ("resumed", None)):
        torch.manual_seed(3)
        model, data = BatchNormed(), TensorDataset(x, y)
        # The sampler takes turns by epoch; its loader draws in the global order of each process.
        loader = Counted(DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=True)), stop)
        try:
            loop = fxprune.Loop(checkpoint=path, resume=path if name == "resumed" else None)
            small = fxprune.prune(
                model, EXAMPLE, method="slimming", channels=0.5, data=loader, epochs=3, progress=False,
                options=fxprune.Options(loop=loop), verify=False,
            )  # fmt: skip
        except KeyboardInterrupt:
            continue
        found[name] = [v.double().sum().item() for v in small.state_dict().values()] + loader.seen
    return found


class Counted:
    """A loader that stops the whole training after so many batches; notes what it gave first in its last epoch."""

    def __init__(self, loader: DataLoader[Any], stop: int | None):
        self.loader, self.sampler, self._left = loader, loader.sampler, stop
        self.seen: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        self.seen = []
        for x, y in self.loader:
            if self._left is not None:
                if self._left == 0:
                    raise KeyboardInterrupt
                self._left -= 1
            self.seen.append(x.sum().item())
            yield x, y


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except FxpruneError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def uneven(rank: int) -> dict[str, str]:
    """Shares of different length, for a training and for a criterion that sums over processes batch by batch."""
    data = batches(rank, 2)[: STEPS - rank]
    quiet: Any = {"flops": 0.5, "progress": False, "data": data}
    return {
        "slimming": message(lambda: fxprune.prune(network(), EXAMPLE, method="slimming", epochs=1, **quiet)),
        "taylor": message(lambda: fxprune.prune(network(), EXAMPLE, method="taylor", **quiet)),
        "fisher": message(lambda: fxprune.prune(network(), EXAMPLE, method="fisher", **quiet)),
    }


def apart(rank: int) -> dict[str, str]:
    """What takes no sums over processes, each with its share of the data, or with all of them."""
    asked: dict[str, dict[str, Any]] = {
        "obs": {"method": "obs"},
        "refit": {"reconstruct": True},
        "steps": {"reconstruct": True, "options": fxprune.Options(steps=2)},
        "depth": {"reconstruct": True, "depth": True, "flops": 0.14},
    }

    def said(options: dict[str, Any], data: Any) -> str:
        given: dict[str, Any] = {"flops": 0.5, "progress": False, "data": data} | options
        return message(lambda: fxprune.prune(network(), EXAMPLE, **given))

    shares = {f"{name} of shares": said(options, batches(rank, 2)) for name, options in asked.items()}
    return shares | {f"{name} of all": said(options, batches()) for name, options in asked.items()}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    results = {"plans": plans(rank, processes), "interrupted": interrupted(out), "uneven": uneven(rank)}
    results["apart"] = apart(rank)
    (out / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
