"""What may differ where the model is on a GPU: devices, random states, learners, files, other batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Attentive, Small, Unchanged, image, make, outputs
from torch import Tensor, nn

import fxprune
from fxprune.methods import DHP, GSM, Scratch, Slimming
from fxprune.verification import DOUBLE_TOLERANCE
from model_zoo.checks.outputs import ORACLE_TOLERANCE

pytestmark = pytest.mark.gpu

WEIGHTS_ONLY, OVER_DATA = "l1 l2 bn_scale fpgm lamp random".split(), "taylor fisher activation wanda".split()
LEARNERS: dict[str, Any] = {
    "scratch": Scratch(sparsity=0.9, lr=0.05),
    "slimming": Slimming(strength=1e-2),
    "gsm": GSM(structured=True),
    "dhp": DHP(),
}


def data() -> list[tuple[Tensor, Tensor]]:
    """On the CPU, as loaders give it."""
    return [(image(8), torch.randint(0, 4, (8,))) for _ in range(3)]


def check(pruned: Any, most: float = 0.5) -> None:
    report = pruned.meta["fxprune"]
    assert report.oracle_error <= ORACLE_TOLERANCE or report.oracle_error_in_double <= DOUBLE_TOLERANCE  # TF32
    assert report.macs_after <= most * report.macs_before
    assert {tensor.device.type for tensor in pruned.state_dict().values()} == {"cuda"}
    for batch in (1, 5):
        assert all(tensor.is_cuda for tensor in outputs(pruned, image(batch).cuda()))


@pytest.mark.parametrize("kind", [Small, Attentive])
@pytest.mark.parametrize("method", [*WEIGHTS_ONLY, *OVER_DATA])
def test_every_criterion(kind: type[nn.Module], method: str) -> None:
    model = make(kind).cuda()
    if kind is Attentive and method == "bn_scale":
        pytest.skip("it has no batch norm")
    given: dict[str, Any] = {"data": data(), "loss_fn": F.cross_entropy} if method in ("taylor", "fisher") else {}
    given = given or ({"data": data()} if method in OVER_DATA else {})
    with Unchanged(model):
        check(fxprune.prune(model, image().cuda(), flops=0.5, method=method, progress=False, **given))


@pytest.mark.parametrize("method", LEARNERS)
def test_every_learner(method: str) -> None:
    model = make().cuda()
    with Unchanged(model):
        pruned = fxprune.prune(
            model,
            image().cuda(),
            flops=0.5,
            method=LEARNERS[method],
            data=data(),
            loss_fn=F.cross_entropy,
            epochs=2,
            progress=False,
        )
    check(pruned)


def test_random_states_of_the_device_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 4)).cuda().eval()
    x = torch.randn(2, 8, device="cuda")
    before = torch.cuda.get_rng_state()
    fxprune.prune(model, x, flops=0.5, progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = make().cuda().to(dtype)
    pruned = fxprune.prune(model, image().cuda().to(dtype), flops=0.5, progress=False)
    assert {tensor.dtype for tensor in outputs(pruned, image(3).cuda().to(dtype))} == {dtype}


def test_from_a_file_to_either_device(tmp_path: Path) -> None:
    pruned = fxprune.prune(make().cuda(), image().cuda(), flops=0.5, progress=False)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    x = image(3)
    here, there = (fxprune.load(tmp_path / "net.safetensors", make().to(device)) for device in ("cpu", "cuda"))
    assert torch.allclose(outputs(here, x)[0], outputs(there, x.cuda())[0].cpu(), atol=1e-3)


def test_a_program_takes_any_batch(tmp_path: Path) -> None:
    pruned = fxprune.prune(make().cuda(), image().cuda(), flops=0.5, progress=False)
    fxprune.save(pruned, tmp_path / "net.pt2")
    x = image(7).cuda()
    assert torch.allclose(outputs(fxprune.load(tmp_path / "net.pt2"), x)[0], outputs(pruned, x)[0], atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own
def test_compiled() -> None:
    pruned = fxprune.prune(make().cuda(), image().cuda(), flops=0.5, progress=False)
    x = image(4).cuda()
    with torch.no_grad():
        compiled = torch.compile(pruned)(x)
        assert torch.allclose(compiled, pruned(x), atol=1e-3)


def test_a_bench_in_pytorch_is_of_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path))
    model = make().cuda()
    pruned = fxprune.prune(model, image().cuda(), flops=0.5, progress=False)
    found = fxprune.bench(model, pruned, image(4).cuda(), provider="eager", runs=3)
    assert (found.provider, found.device) == ("eager:cuda", torch.cuda.get_device_name())
