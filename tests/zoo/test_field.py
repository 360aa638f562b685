"""Pruned networks in their model's place: every check sees its fault, and the command. All networks are made up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from model_zoo.checks import places
from model_zoo.networks.subject import Subject
from model_zoo.pages import field as page
from model_zoo.records import Record, read
from model_zoo.runner import main

pytestmark = pytest.mark.usefixtures("one_thread")


def images(batch: int, size: Any, seed: int) -> Any:
    return (torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)),), {}


def convolutions(dropout: float = 0.0) -> Subject:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(8, 4, 3))
    return Subject(body.eval(), images, 1, (8, 8))


class Attention(nn.Module):
    """Two heads; queries and values of one width, which a graph of ``fault`` no longer has."""

    def __init__(self, fault: bool = False) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        value = x[..., :-1] if self.fault else x
        return nn.functional.scaled_dot_product_attention(x, x, value)


# -- the budget -------------------------------------------------------------------------------------------------------


def test_a_budget_that_cannot_be_reached_becomes_the_smallest_that_can() -> None:
    subject = convolutions()
    assert places.pruned_to(subject, 0.6, "l2")[1] == 0.6
    graph, ratio = places.pruned_to(subject, 0.01, "l2")
    assert 0.01 < ratio < 0.6
    report = graph.meta["fxprune"]
    assert report.macs_after / report.macs_before <= ratio


# -- gradients --------------------------------------------------------------------------------------------------------


def placed(subject: Subject) -> tuple[nn.Module, Any]:
    graph, _ = places.pruned_to(subject, 0.6, "l2")
    return fxprune.into(subject.model, graph), graph


def test_gradients_of_class_and_graph_are_equal_with_dropout_too() -> None:
    subject = convolutions(dropout=0.5)
    assert places.train_step(*placed(subject), subject.example()) == ""


def test_other_gradients_are_named() -> None:
    subject = convolutions()
    instance, graph = placed(subject)
    with torch.no_grad():
        instance.get_parameter("0.weight").mul_(1.1)
    assert places.train_step(instance, graph, subject.example()).startswith("3 of 4 gradients differ: 0.bias, 3.weight")
    instance.get_parameter("3.bias").requires_grad_(False)
    assert places.train_step(instance, graph, subject.example()) == "1 gradients on one side only: 3.bias (graph)"


def test_a_network_that_takes_no_single_image_in_train_mode_is_given_two() -> None:
    subject = convolutions()
    subject.model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)).eval())
    (images,), why = places.to_train_on(subject)[0][0], places.to_train_on(subject)[1]
    assert (len(images), why) == (2, "")


def test_a_network_that_wants_to_know_what_is_to_be_found_is_not_asked() -> None:
    class Detector(nn.Linear):
        def forward(self, x: Tensor, targets: Any = None) -> Tensor:
            assert targets is not None or not self.training, "targets are missing"
            return super().forward(x)

    subject = Subject(Detector(3, 2).eval(), lambda batch, size, seed: ((torch.ones(batch, 3),), {}), 2, None)
    assert "targets are missing" in places.to_train_on(subject)[1]


def test_what_differs_in_train_mode_alone_is_told_with_its_line() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return self.two(2.0 * y if self.training else y)  # another call, which no graph follows

    torch.manual_seed(0)
    subject = Subject(Branch().eval(), lambda batch, size, seed: ((torch.ones(batch, 3),), {}), 2, None)
    why = places.train_step(*placed(subject), subject.example())
    assert "of 4 gradients differ" in why
    assert "equal in eval mode" in why
    assert "test_field.py:" in why


# -- attention --------------------------------------------------------------------------------------------------------


def test_attention_keeps_heads_of_one_width() -> None:
    subject = Subject(Attention().eval(), lambda batch, size, seed: ((torch.randn(batch, 2, 5, 4),), {}), 2, None)
    assert places.fused_attention(subject, Attention()) == ""  # type: ignore[arg-type]
    assert places.fused_attention(subject, Attention(fault=True)) == "1 of 1 calls, 0: 4 and 3"  # type: ignore[arg-type]
    assert places.fused_attention(subject, nn.Identity()) == "0 calls instead of 1"  # type: ignore[arg-type]
    assert places.fused_attention(convolutions(), nn.Identity()) is None  # type: ignore[arg-type]


# -- what a class does by itself --------------------------------------------------------------------------------------


class Config:
    is_encoder_decoder = False


class Speaker(nn.Module):
    """Has the methods of a network of transformers. ``forgets``: the cache changes what it says, and saving it too."""

    def __init__(self, forgets: bool = False) -> None:
        super().__init__()
        self.layer, self.config, self.forgets = nn.Linear(3, 3), Config(), forgets

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y

    def can_generate(self) -> bool:
        return True

    def generate(self, use_cache: bool, max_new_tokens: int, **_: Any) -> Tensor:
        return torch.full((1, max_new_tokens), int(use_cache and self.forgets))

    def save_pretrained(self, folder: str) -> None:
        torch.save({} if self.forgets else self.state_dict(), Path(folder) / "weights.pt")

    @classmethod
    def from_pretrained(cls, folder: str) -> Speaker:
        loaded = cls()
        loaded.load_state_dict(torch.load(Path(folder) / "weights.pt"), strict=False)
        return loaded


@pytest.mark.parametrize("check", [*places.OWN])
def test_generation_and_saving(check: str) -> None:
    own, inputs = places.OWN[check], ((torch.randn(2, 3),), {})
    assert own(copy.deepcopy(Speaker()), inputs) == ""
    assert (own(Speaker(forgets=True), inputs) or "").startswith(("with the cache [[1, 1, 1, 1, 1]]", "off by "))
    assert own(nn.Linear(3, 3), inputs) is None


# -- the command ------------------------------------------------------------------------------------------------------

NETWORKS = """
import torch
from torch import nn
from model_zoo.networks.subject import Subject

def image(batch, size, seed):
    return (torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)),), {}

def convolutions():
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), *pool)
    return Subject(model.eval(), image, 2, (8, 8), [(12, 10)])

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.two(self.one(x).view(-1, 8, 6, 6))

def named():
    return Subject(Named().eval(), image, 2, (8, 8), [])

def missing():
    raise LookupError("no such network")
"""


def test_the_command_writes_checks_and_a_page(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETWORKS)
    names = [f"{tmp_path}/nets.py:{name}" for name in ("convolutions", "named", "missing")]
    out = tmp_path / "field.jsonl"
    assert main(["run", "field", *names, "--out", str(out)]) == 1
    fine, named, missing = (read(out)[1][name] for name in names)
    back = ("class back", "class back, for_class")
    asked = ("load", "prune", *back, "calls", "second", "batch", "size", "values", "train step")
    assert fine.checks == dict.fromkeys(asked, "")
    assert {*named.checks} == {"load", "prune", *back}
    assert "What holds them: one: no attribute of the class can say this size" in named.failures[back[1]]
    assert "nets.py:20 in forward" in named.failures["class back"]
    assert missing.failures["load"].startswith("LookupError: no such network (")
    text = out.with_suffix(".md").read_text()
    assert "1 of 3 networks fall short nowhere." in text
    assert "- class back: 1 of 2\n- class back, for_class: 1 of 2\n- calls: 1 of 1" in text
    assert f"| {names[1]} | class back | ConversionError: Named cannot hold" in text


def test_the_page_tells_guards_other_budgets_and_what_is_not_asked() -> None:
    guarded = {"cells": {"batch": {"state": "guarded"}}, "smallest": 0.7251}
    records = [
        Record("a:x", guarded, checks={"batch": ""}),
        Record("a:y", {"not asked": {"save": "a | b"}}, checks={"batch": "off by 0.5"}),
    ]
    assert page.counted(records) == "- batch: 1 of 2, 1 of them guarded"
    assert page.other_budgets(records) == "Pruned to the smallest ratio that can be reached: a:x 0.73."
    assert page.not_asked(records).endswith("| a:y | save | a \\| b |")
    assert page.short(records[:1]) == ""
