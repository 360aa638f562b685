"""Weights of others: taken by the names or the order of their tensors, and what does not fit is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_zoo.papers import resnet
from model_zoo.weights import take_weights

State = dict[str, Tensor]


def theirs(seed: int = 1) -> State:
    """Of another implementation: other names, and no counts of updates."""
    torch.manual_seed(seed)
    state = resnet(8, "pad").state_dict()
    return {f"module.{i}.{n}": torch.rand(v.shape) for i, (n, v) in enumerate(state.items()) if v.ndim}


@pytest.mark.parametrize("wrapped", [True, False])
def test_tensors_are_taken_in_their_order(tmp_path: Path, wrapped: bool) -> None:
    state = theirs()
    torch.save({"state_dict": state, "best": 1.0} if wrapped else state, tmp_path / "resnet8-a.th")
    model = resnet(8, "pad")
    assert take_weights(model, tmp_path, "resnet8-*") == tmp_path / "resnet8-a.th"
    ours = [value for value in model.state_dict().values() if value.ndim]
    assert all(torch.equal(a, b) for a, b in zip(ours, state.values(), strict=True))


@pytest.mark.parametrize("beginning", ["", "module."])
def test_tensors_of_the_same_names_are_taken_by_these_in_whatever_order_they_are(
    tmp_path: Path, beginning: str
) -> None:
    """Sorted, bias comes before weight: of a norm all shapes agree."""
    torch.manual_seed(1)
    state = {n: torch.rand(v.shape) for n, v in sorted(resnet(8, "pad").state_dict().items()) if v.ndim}
    torch.save({beginning + name: value for name, value in state.items()}, tmp_path / "a.th")
    model = resnet(8, "pad")
    take_weights(model, tmp_path / "a.th", "")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if value.ndim)


def spoiled(change: Callable[[State], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        change(state := theirs())
        torch.save(state, folder / "a.th")
        return folder / "a.th"

    return write


def several(folder: Path) -> Path:
    for name in "ab":
        (folder / f"resnet8-{name}.th").touch()
    return folder


def damaged(folder: Path) -> Path:
    (folder / "a.th").write_bytes(b"nothing")
    return folder / "a.th"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "no.th", "there is no file {d}/no.th"),
        (lambda d: d, "there is no resnet8-* in {d}"),
        (several, "{d} has several resnet8-*: resnet8-a.th, resnet8-b.th. Pass one of them"),
        (damaged, "{d}/a.th cannot be read as a checkpoint of torch"),
        (spoiled(lambda s: s.update(x=3)), "{d}/a.th holds no state_dict: a dict of tensors by name"),
        (
            spoiled(lambda s: s.update({[*s][5]: torch.zeros(16, 16, 1, 1)})),
            "{d}/a.th does not fit: its tensor 6, module.6.stages.0.0.conv1.weight, is [16, 16, 1, 1], and the "
            "network's, stages.0.0.conv1.weight, is [16, 16, 3, 3]",
        ),
        (spoiled(lambda s: s.popitem()), "{d}/a.th has 36 tensors, fewer than the network's 37: head.bias is left"),
        (
            spoiled(lambda s: s.update(more=torch.zeros(1))),
            "{d}/a.th has 38 tensors, more than the network's 37: more is left",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    model = resnet(8, "pad")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((FileNotFoundError, ValueError), match="^" + re.escape(message.format(d=tmp_path)) + "$"):
        take_weights(model, make(tmp_path), "resnet8-*")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
