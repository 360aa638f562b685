"""``reconstruct(tune=N)``: what it trains, what it never does, and what it tells."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.io.artifact.header import Artifact, parsed
from fxprune.io.forms import anything, check
from fxprune.reconstruction import Reconstruction, Tuning
from fxprune.reconstruction.result import FORM

tuning = importlib.import_module("fxprune.reconstruction.tune")


class Net(nn.Module):
    """Nothing after the last norm can make up for its scales."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.b, self.act = nn.Conv2d(12, 6, 3, padding=1), nn.PReLU(6)
        self.nb = nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.nb(self.act(self.b(F.relu(self.na(self.a(x))))))


class Handwritten(nn.Module):
    """An RMS norm of plain ops, one weight for two norms, and a scale that is a part of a larger parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6, bias=False)
        self.gain, self.table = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.rand(2, 6))
        self.inner = nn.LayerNorm(6)
        self.outer = nn.LayerNorm(6)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.relu(self.up(self.inner(x))))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * self.gain
        return self.outer(x + y * self.table[0])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 12, bias=False), nn.Linear(12, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 3, 1), Net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.body(F.relu(self.stem(x)))}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def spoiled(net: Net, images: Tensor) -> nn.Module:
    small = halved(net, images[:1])
    with torch.no_grad():
        small.get_parameter("nb.weight").mul_(torch.linspace(0.4, 1.6, 6))
        small.get_parameter("nb.bias").add_(0.2)
    return small


def halved(model: nn.Module, inputs: Tensor) -> nn.Module:
    return fxprune.prune(model, inputs, flops=0.5, round_to=1, progress=False)


def told_of(fitted: nn.Module) -> Reconstruction:
    told: Reconstruction = fitted.meta["fxprune"].reconstruction
    return told


def changed(a: nn.Module, b: nn.Module) -> set[str]:
    after = b.state_dict()
    return {name for name, value in a.state_dict().items() if not torch.equal(value, after[name])}


def test_spoiled_scales_come_back(net: Net, spoiled: nn.Module, images: Tensor) -> None:
    given = copy.deepcopy(spoiled), copy.deepcopy(net)
    spoiled.get_parameter("nb.bias").requires_grad_(False)
    fitted = fxprune.reconstruct(spoiled, net, images)
    tuned = fxprune.reconstruct(spoiled, net, images, tune=400)
    told = told_of(tuned).tuning
    assert told is not None
    assert told_of(fitted).tuning is None
    assert told.before == pytest.approx(told_of(fitted).output_after, rel=1e-6)
    whole = told_of(fxprune.reconstruct(halved(net, images[:1]), net, images)).output_after
    assert told.after < whole < 0.5 * told.before
    assert told.after == told_of(tuned).output_after
    assert (told.steps, told.why) == (400, "")
    held = torch.cat(images.split(6)[4::5])
    with torch.no_grad():
        energy = net(held).double().square().sum()
        assert float((tuned(held) - net(held)).double().square().sum() / energy) == pytest.approx(told.after, rel=1e-4)
    assert changed(fitted, tuned) == {"na.weight", "na.bias", "b.bias", "nb.weight", "nb.bias"}
    assert told.parameters == 5
    assert [p.requires_grad for p in tuned.parameters()] == [p.requires_grad for p in spoiled.parameters()]
    assert not changed(given[0], spoiled)
    assert not changed(given[1], net)
    assert all(p.grad is None for m in (spoiled, net, tuned) for p in m.parameters())
    spoiled.requires_grad_(True)


def test_the_same_again_and_with_little_memory(net: Net, spoiled: nn.Module, images: Tensor) -> None:
    first = fxprune.reconstruct(spoiled, net, images, tune=12, seed=3)
    torch.rand(3)
    with torch.inference_mode():
        again = fxprune.reconstruct(spoiled, net, images.clone(), tune=12, seed=3, memory=0)
    assert not changed(first, again)
    assert changed(first, fxprune.reconstruct(spoiled, net, images, tune=12, seed=4))


@pytest.mark.parametrize("steps", [None, 0])
def test_no_steps(net: Net, spoiled: nn.Module, images: Tensor, steps: int | None) -> None:
    fitted = fxprune.reconstruct(spoiled, net, images, tune=steps)
    assert not changed(fitted, fxprune.reconstruct(spoiled, net, images))
    assert told_of(fitted).tuning is None


@pytest.mark.parametrize("rate", [float("inf"), 3.0])
def test_a_rate_that_ruins_keeps_what_was(
    net: Net, spoiled: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    monkeypatch.setattr(tuning, "_RATE", rate)
    tuned = fxprune.reconstruct(spoiled, net, images, tune=2)
    told = told_of(tuned).tuning
    assert told is not None
    assert not changed(tuned, fxprune.reconstruct(spoiled, net, images))
    assert told.after == told.before
    assert ("the loss became" in told.why, told.steps) == ((True, 1) if rate > 3 else (False, 2))
    assert told.why in str(told_of(tuned))


def test_what_was_best_on_the_way_stays(
    net: Net, spoiled: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out error falls for one look and grows without end afterwards."""
    found = []

    def held_error(aim: object, *args: object) -> float:
        error = original(aim, *args) if len(found) < 2 else 10.0 * len(found)
        found.append(error)
        return error

    original = tuning._Aim.held_error
    monkeypatch.setattr(tuning._Aim, "held_error", held_error)
    told = told_of(fxprune.reconstruct(spoiled, net, images, tune=40)).tuning
    assert told is not None
    assert (told.before, told.after) == (found[0], found[1])
    assert found[1] < found[0]
    assert len(found) == 11


def test_norms_of_plain_ops_and_tied_scales() -> None:
    torch.manual_seed(0)
    model, data = Handwritten().eval(), torch.randn(80, 4, 6)
    small = halved(model, data[:1])
    with torch.no_grad():
        small.get_parameter("gain").mul_(0.5)
    tuned = fxprune.reconstruct(small, model, data, tune=200)
    told = told_of(tuned).tuning
    assert told is not None
    assert told.after < 0.6 * told.before
    assert changed(fxprune.reconstruct(small, model, data), tuned) == {
        "up.bias", "gain", "inner.weight", "outer.weight", "inner.bias", "outer.bias",
    }  # fmt: skip
    assert told.parameters == 5
    assert tuned.get_parameter("inner.weight") is tuned.get_parameter("outer.weight")


def test_half_precision_is_trained_in_single() -> None:
    torch.manual_seed(0)
    model, data = Handwritten().eval().bfloat16(), torch.randn(80, 4, 6).bfloat16()
    small = halved(model, data[:1])
    with torch.no_grad():
        small.get_parameter("gain").mul_(0.5)
    tuned = fxprune.reconstruct(small, model, data, tune=200)
    told = told_of(tuned).tuning
    assert told is not None
    assert told.after < 0.7 * told.before
    assert {p.dtype for p in tuned.parameters()} == {torch.bfloat16}


def test_nothing_to_tune() -> None:
    torch.manual_seed(0)
    model, data = Plain().eval(), torch.randn(60, 5)
    small = halved(model, data[:1])
    tuned = fxprune.reconstruct(small, model, data, tune=5)
    assert not changed(tuned, fxprune.reconstruct(small, model, data))
    told = told_of(tuned).tuning
    assert told is not None
    assert (told.steps, told.parameters, told.before) == (0, 0, told.after)
    assert told.summary == "nothing tuned: no parameter of one dimension scales or shifts channels"
    assert told.summary in told_of(tuned).summary


def test_a_part_of_a_model(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Whole().eval()
    small = fxprune.prune_submodule(model, "body", images[:1], flops=0.5, round_to=1, progress=False)
    with torch.no_grad():
        small.get_parameter("body.nb.weight").mul_(0.5)
    fitted, tuned = (fxprune.reconstruct(small, model, images, tune=steps) for steps in (0, 200))
    with torch.no_grad():
        wanted = model(images)["out"]
        errors = [float((m(images)["out"] - wanted).square().sum()) for m in (fitted, tuned)]
    assert errors[1] < 0.7 * errors[0]
    assert changed(fitted, tuned) == {"body.na.weight", "body.na.bias", "body.b.bias", "body.nb.weight", "body.nb.bias"}


def test_as_an_option_of_prune(net: Net, images: Tensor) -> None:
    given: Any = {"data": images, "reconstruct": True, "options": fxprune.Options(tune=30)}
    at_once = fxprune.prune(net, images[:1], flops=0.5, round_to=1, progress=False, **given)
    afterwards = fxprune.reconstruct(halved(net, images[:1]), net, images, tune=30)
    assert not changed(at_once, afterwards)
    torch.manual_seed(0)
    model = Whole().eval()
    part = fxprune.prune_submodule(model, "body", images[:1], flops=0.5, round_to=1, progress=False, **given)
    told = told_of(part.get_submodule("body")).tuning
    assert told is not None
    assert told.steps == 30
    for more, text in (
        ({}, r"tune=30 follows a refit: pass reconstruct=True"),
        ({"reconstruct": True}, r"tune=30 trains on data, of which there are none: pass data="),
    ):
        with pytest.raises(InputError, match=text):
            fxprune.prune(net, images[:1], flops=0.5, progress=False, options=given["options"], **more)
    with pytest.raises(InputError, match="tune=30 follows a refit: pass reconstruct=True"):
        fxprune.prune_submodule(model, "body", images[:1], flops=0.5, progress=False, options=given["options"])
    with pytest.raises(InputError, match=r"tune=30 follows a refit: call fxprune.reconstruct"):
        fxprune.attach(net, images[:1], method="slimming", flops=0.5, options=given["options"], progress=False)


def test_what_was_told_is_saved(net: Net, spoiled: nn.Module, images: Tensor, tmp_path: Path) -> None:
    tuned = fxprune.reconstruct(spoiled, net, images, tune=5)
    fxprune.save(tuned, tmp_path / "tuned.safetensors")
    loaded = fxprune.load(tmp_path / "tuned.safetensors", copy.deepcopy(net))
    assert not changed(tuned, loaded)
    told = told_of(tuned)
    assert told_of(loaded) == told
    data = json.loads(json.dumps(told.data()))
    check(data, FORM)
    assert Reconstruction.of_data(data) == told
    assert "5 scales, shifts and biases tuned for 5 steps; relative squared error" in str(tuned.meta["fxprune"])


def test_a_file_from_before_tuning(net: Net, spoiled: nn.Module, images: Tensor, tmp_path: Path) -> None:
    from safetensors import safe_open

    fxprune.save(fxprune.reconstruct(spoiled, net, images), tmp_path / "fitted.safetensors")
    with safe_open(tmp_path / "fitted.safetensors", "pt") as file:
        (text,) = (value for value in file.metadata().values() if "reconstruction" in value)
    data = json.loads(text)
    assert data["reconstruction"].pop("tuning") is None
    more = dict.fromkeys(data.keys() - {f.name for f in fields(Artifact)} - {"format"}, anything)
    told = parsed(json.dumps(data), tmp_path, **more).reconstruction
    assert told is not None
    assert Reconstruction.of_data(told).tuning is None


def test_text_where_nothing_was_refitted() -> None:
    told = Reconstruction((), 1.0, 0.5, 2, 1, 0.0, "no weight can be solved for", tuning=Tuning(3, 2, 1.0, 0.5, 0.1))
    assert told.summary == (
        "not applicable: no weight can be solved for; 2 scales, shifts and biases tuned for 3 steps; relative squared "
        "error of the outputs 1 -> 0.5; 0.1 s"
    )


@pytest.mark.parametrize("steps", [True, -1, "x", 1.5])
def test_steps_that_cannot_be_used(net: Net, spoiled: nn.Module, images: Tensor, steps: object) -> None:
    with pytest.raises(InputError, match=f"tune={steps!r} must be a whole number of at least 0"):
        fxprune.reconstruct(spoiled, net, images, tune=steps)
