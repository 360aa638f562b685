"""Ways that a network is trained: with each library, beside a plain loop over the same batches.

The loss is the mean square of the first output, relative to what it is: it needs no labels, and has a gradient for
whatever the network makes. Networks stay in eval mode, so that norms see no batch.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from model_zoo.measuring.integrations import Batches, Ran, Way, first, weights

STEPS, RATE, DECAY, PROCESSES = 3, 0.01, 0.9, 2
RANK = 4  # of adapters
TRAINERS: dict[str, Way] = {}
Plain = Callable[[nn.Module, Batches], nn.Module]


def _trainer(name: str, plain: Plain, extra: str = "", *modules: str) -> Callable[[Callable[..., nn.Module]], Any]:
    """Enter what trains a network and gives it back; ``plain`` does the same without the library."""

    def enter(run: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def way(net: nn.Module, batches: Batches, folder: Path) -> Ran:
            trained = run(net, batches, folder)
            return Ran(trained, weights(trained), Counter())

        assert name not in TRAINERS
        TRAINERS[name] = Way(way, False, False, extra, modules, plain)
        return run

    return enter


def _ready(net: nn.Module) -> nn.Module:
    """A copy that has gradients."""
    own = copy.deepcopy(net)
    for parameter in own.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return own


def _loss(outputs: Any) -> Tensor:
    squares = first(outputs).square().mean()
    return squares / squares.detach()


def _optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=RATE)


def _steps(net: nn.Module, batches: Batches, after: Callable[[], Any] = lambda: None, at_once: int = 1) -> nn.Module:
    """``at_once``: batches in one step."""
    optimizer = _optimizer(net)
    for step in range(STEPS):
        for x in batches[step * at_once : (step + 1) * at_once]:
            (_loss(net(*x)) / at_once).backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
    return net


def plain(net: nn.Module, batches: Batches, at_once: int = 1) -> nn.Module:
    """A copy, trained."""
    return _steps(_ready(net), batches, at_once=at_once).requires_grad_(False)


def _loader(batches: Batches) -> Any:
    """As libraries take them."""
    inputs: Any = [x for (x,) in batches[:STEPS]]
    return torch.utils.data.DataLoader(inputs, batch_size=None)


# -- libraries ---------------------------------------------------------------------------------------------------------


@_trainer("Lightning", plain, "lightning", "lightning")
def _lightning(net: nn.Module, batches: Batches, folder: Path) -> nn.Module:
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return _loss(self.net(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _optimizer(self.net)

    task = Task(_ready(net)).eval()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **quiet
    )
    trainer.fit(task, _loader(batches))
    return task.net.requires_grad_(False)


@_trainer("accelerate", plain, "accelerate", "accelerate")
def _accelerate(net: nn.Module, batches: Batches, folder: Path) -> nn.Module:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    own = _ready(net)
    loader: Any = _loader(batches)
    prepared, optimizer, loader = accelerator.prepare(own, _optimizer(own), loader)
    for x in loader:
        accelerator.backward(_loss(prepared(x)))
        optimizer.step()
        optimizer.zero_grad()
    trained: nn.Module = accelerator.unwrap_model(prepared)
    return trained.requires_grad_(False)


def _averaged(net: nn.Module, batches: Batches) -> nn.Module:
    """By hand."""
    own = _ready(net)
    average: list[Tensor] = []

    def after() -> None:
        now = [p.detach().clone() for p in own.parameters()]
        average[:] = [DECAY * a + (1 - DECAY) * b for a, b in zip(average, now, strict=True)] if average else now

    _steps(own, batches, after).requires_grad_(False)
    for parameter, value in zip(own.parameters(), average, strict=True):
        parameter.copy_(value)
    return own


@_trainer("EMA", _averaged)
def _ema(net: nn.Module, batches: Batches, folder: Path) -> nn.Module:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    own = _ready(net)
    averaged = AveragedModel(own, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    _steps(own, batches, lambda: averaged.update_parameters(own))
    return averaged.module.requires_grad_(False)


def _adapted(net: nn.Module, batches: Batches) -> Any:
    """With adapters on every matrix and every convolution without groups, trained."""
    import peft

    own = copy.deepcopy(net)
    names = [
        name for name, layer in own.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]  # fmt: skip
    torch.manual_seed(0)
    adapted = peft.get_peft_model(own, peft.LoraConfig(r=RANK, target_modules=names)).eval()
    return _steps(adapted, batches)


@_trainer("PEFT, LoRA", _adapted, "peft", "peft")
def _peft(net: nn.Module, batches: Batches, folder: Path) -> nn.Module:
    merged: nn.Module = _adapted(net, batches).merge_and_unload()
    return merged.requires_grad_(False)


# -- two processes -----------------------------------------------------------------------------------------------------


def _replicated(net: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


def _sharded(net: nn.Module) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (PROCESSES,)))


def _process(rank: int, wrap: Callable[[nn.Module], nn.Module], folder: Path) -> None:
    torch.set_num_threads(1)
    net, batches = torch.load(folder / "given.pt", weights_only=False)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=PROCESSES)
    own = _ready(net)
    _steps(wrap(own), [*itertools.islice(batches, rank, None, PROCESSES)])
    state = own.state_dict()
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    if rank == 0:
        torch.save(whole, folder / "trained.pt")
    dist.barrier()
    dist.destroy_process_group()


def _together(wrap: Callable[[nn.Module], nn.Module], net: nn.Module, batches: Batches, folder: Path) -> nn.Module:
    """In new processes, which read the network from a file: threads of runtimes do not survive a fork."""
    torch.save((net, [*batches]), folder / "given.pt")
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    start_processes(_process, (wrap, folder), nprocs=PROCESSES, start_method="forkserver")
    own = copy.deepcopy(net)
    own.load_state_dict(torch.load(folder / "trained.pt", weights_only=True))
    return own


_both = functools.partial(plain, at_once=PROCESSES)
_trainer("DDP, two processes", _both)(functools.partial(_together, _replicated))
_trainer("FSDP2, two processes", _both)(functools.partial(_together, _sharded))
