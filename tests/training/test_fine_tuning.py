"""What people fine-tune with works on the result as on any module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Attentive, Small, image, make
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxprune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[Small, Attentive], ids=lambda kind: kind.__name__)
def small(request: pytest.FixtureRequest) -> Any:
    return fxprune.prune(make(request.param), image(), flops=0.5, progress=False).train()


def step(module: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    torch.manual_seed(0)
    loss = module(x).square().mean()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss.detach()


def grads(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_ema(small: Any) -> None:
    ema = ModelEmaV3(small, decay=0.9)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    step(small, image(4), torch.optim.SGD(small.parameters(), lr=0.1))
    ema.update(small)
    for name, p in ema.module.named_parameters():
        assert torch.allclose(p, 0.9 * before[name] + 0.1 * small.get_parameter(name), atol=1e-6)
    assert not torch.equal(ema.module.eval()(image()), small.eval()(image()))
    assert ema.module.meta["fxprune"] is small.meta["fxprune"]


def test_the_average_can_be_saved(small: Any, tmp_path: Path) -> None:
    ema = ModelEmaV3(small, decay=0.9)
    step(small, image(4), torch.optim.SGD(small.parameters(), lr=0.1))
    ema.update(small)
    fxprune.save(ema.module, tmp_path / "ema.safetensors")
    kind = Small if "stem.0.weight" in small.state_dict() else Attentive
    loaded = fxprune.load(tmp_path / "ema.safetensors", make(kind, 1))
    assert torch.equal(loaded.eval()(image()), ema.module.eval()(image()))


def test_autocast(small: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(small, image(4))
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in small.parameters())
    with torch.no_grad():
        exact = small.eval()(image())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = small(image())
    assert rounded.dtype == torch.bfloat16
    assert 0 < (exact - rounded.float()).abs().max() < 0.1 * exact.abs().max()


def test_compiled(small: Any) -> None:
    other = copy.deepcopy(small)
    for module in (small, other):
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0  # the two draw in another order
    compiled: Any = torch.compile(other, backend="aot_eager")
    for batch in (4, 6):
        for p in (*small.parameters(), *other.parameters()):
            p.grad = None
        assert torch.allclose(step(small, image(batch)), step(compiled, image(batch)), atol=1e-6)
        for a, b in zip(grads(small), grads(other), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_compiled_without_a_break(small: Any) -> None:
    """One graph: nothing of fxprune is left that dynamo would have to leave the graph for."""
    compiled: Any = torch.compile(small.eval(), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(image()), small(image()), atol=1e-6)


def test_channels_last() -> None:
    small = fxprune.prune(make(Small), image(), flops=0.5, progress=False).eval()
    other = copy.deepcopy(small).to(memory_format=torch.channels_last)
    x = image(4).contiguous(memory_format=torch.channels_last)
    assert torch.allclose(other(x), small(image(4)), atol=1e-5)
    step(other.train(), x)
    assert all(p.grad is not None for p in other.parameters())
    last = make(Small).to(memory_format=torch.channels_last)
    kept = fxprune.prune(last, x, flops=0.5, progress=False)
    assert kept.get_parameter("up.0.weight").is_contiguous(memory_format=torch.channels_last)


def test_gradient_checkpointing(small: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return result

    calls = []
    first = next(m for m in small.modules() if isinstance(m, nn.Conv2d))
    step(small, image(4))
    expected = grads(small)
    for p in small.parameters():
        p.grad = None
    first.register_forward_hook(lambda *_: calls.append(1))
    step(Wrapped(small), image(4))
    assert len(calls) == 2, "the forward was not computed again in the backward pass"
    for a, b in zip(grads(small), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_distilled_with_a_carried_optimizer() -> None:
    teacher = make(Small)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.005)
    x, target = torch.randn(32, 3, 8, 8), torch.randint(0, 10, (32,))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(teacher(x), target).backward()
        optimizer.step()
    small = fxprune.prune(teacher, image(), flops=0.5, progress=False)
    mine = fxprune.carry_over(optimizer, teacher, small)
    losses = []
    for _ in range(25):
        mine.zero_grad()
        output, wanted = small(x), teacher(x).detach()
        fxprune.distill_loss(output, wanted, target, temperature=2.0, alpha=0.8).backward()
        mine.step()
        losses.append(fxprune.distill_loss(output.detach(), wanted, alpha=1).item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_distributed_data_parallel(small: Any, tmp_path: Path) -> None:
    step(small, image(4))
    expected = grads(small)
    for p in small.parameters():
        p.grad = None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(small)
        step(parallel, image(4))
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads(small), expected, strict=True))
    assert list(parallel.module.state_dict()) == list(small.state_dict())
