"""Every network of ``networks``, pruned to half its MACs and checked in full; then what cannot be one of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import Unchanged, same
from networks import NETWORKS, Network
from torch import Tensor, nn

import fxprune
from fxprune.recording.inputs import describe_inputs, make_inputs, tensors_of
from fxprune.verification import DOUBLE_TOLERANCE
from model_zoo import checks
from model_zoo.checks import counts
from model_zoo.checks.outputs import ORACLE_TOLERANCE
from model_zoo.networks import random_weights

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.aligned]

CHECKS = [name for name in checks.CHECKS if name not in ("modes", "onnx", "whole")]  # these load a network by its name
ALL = [
    pytest.param(name, attention, id=name if attention == "head_dim" else f"{name}-heads")
    for name, network in NETWORKS.items()
    for attention in ("head_dim", "heads")
    if network.heads or attention == "head_dim"
]
SLACK = {"head_dim": 0.05, "heads": 0.25}  # one channel of these networks is up to 2 % of the MACs, one head up to 20 %


def build(network: Network) -> nn.Module:
    torch.manual_seed(0)
    model, (args, kwargs) = network.build().eval(), network.inputs()
    random_weights.randomise(model, describe_inputs(args, kwargs))
    for _ in range(network.warm):
        model.train()(*args, **kwargs)
    return model.eval()


def make_case(name: str, attention: Any, **options: Any) -> checks.Case:
    network = NETWORKS[name]
    model, (args, kwargs) = build(network), network.inputs()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pruned = fxprune.prune(
        model, args, example_kwargs=kwargs, attention=attention, flops=network.flops, progress=False, **options
    )
    dense = fxprune.record(model, args, kwargs)
    return checks.Case(name, network.flops, model, state, dense, pruned, describe_inputs(args, kwargs), {})


def is_free(graph: fxprune.ChannelGraph, word: str) -> bool:
    """Whether ``parameter[dim]`` has channels that may go."""
    name, dim = word.removesuffix("]").split("[")
    (parameter,) = (p for p in graph.parameters if p.name == name)
    return any(f.dim == int(dim) and not graph.locked[f.ids.reshape(-1)].all() for f in parameter.labels)


@pytest.mark.parametrize(("name", "attention"), ALL)
def test_half_the_macs(name: str, attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "Rearranged":
        pytest.importorskip("einops")
    monkeypatch.setattr(counts, "BUDGET_SLACK", SLACK[attention])
    network = NETWORKS[name]
    case = make_case(name, attention)
    reasons = {check: checks.CHECKS[check](case) for check in CHECKS}
    assert {check: reason for check, reason in reasons.items() if reason} == {}
    assert [note for note in case.report.notes if note.startswith(("locked", "no rule"))] == []
    ratio = case.report.macs_after / case.report.macs_before
    assert (1 - SLACK[attention]) * network.flops <= ratio <= network.flops
    args, kwargs = make_inputs(case.inputs, batch=3)
    again = fxprune.apply(copy.deepcopy(case.model), case.report.plan, *network.inputs())
    assert again.meta["fxprune"].plan == case.report.plan
    assert same(tensors_of(again(*args, **kwargs)), tensors_of(case.pruned(*args, **kwargs)))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_must_be_prunable_is(name: str) -> None:
    if name == "Rearranged":
        pytest.importorskip("einops")
    network = NETWORKS[name]
    args, kwargs = network.inputs()
    graph = fxprune.analyze(build(network), args, example_kwargs=kwargs)
    graph.check()
    assert [word for word in network.free if not is_free(graph, word)] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_on_meta_the_same_plan_as_with_weights(name: str) -> None:
    """A method that reads no weights needs none."""
    if name == "Rearranged":
        pytest.importorskip("einops")
    network = NETWORKS[name]
    args, kwargs = network.inputs()
    options: dict[str, Any] = {"method": "random", "flops": network.flops, "verify": False, "progress": False}
    real = fxprune.prune(build(network), args, example_kwargs=kwargs, **options)
    with torch.device("meta"):
        model = network.build().eval()
    args, kwargs = make_inputs(describe_inputs(args, kwargs), "meta")
    pruned = fxprune.prune(model, args, example_kwargs=kwargs, **options)
    assert all(tensor.is_meta for tensor in pruned.state_dict().values())
    assert pruned.meta["fxprune"].plan == real.meta["fxprune"].plan
    shapes = {key: tensor.shape for key, tensor in real.state_dict().items()}
    assert {key: tensor.shape for key, tensor in pruned.state_dict().items()} == shapes


# -- a part of a model that cannot be recorded as a whole


class Features(nn.Module):
    """Two maps by name, as a feature pyramid gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.Conv2d(24, 32, 3, 2, 1)
        self.lateral, self.top = nn.Conv2d(24, 16, 1), nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = F.relu(self.norm(self.one(x)))
        top = self.top(F.relu(self.two(low)))
        return {"low": self.lateral(low) + F.interpolate(top, scale_factor=2.0), "top": top}


class Proposals(nn.Module):
    """Images of any size, as many boxes as score high enough: control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Features()
        self.score, self.box = nn.Conv2d(16, 1, 1), nn.Linear(16, 4)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        maps = self.backbone(torch.stack([image / image.std() for image in images]))
        results = []
        for features, score in zip(maps["low"], self.score(maps["low"]).sigmoid(), strict=True):
            chosen = (score[0] > score.mean()).nonzero()
            if len(chosen) > 4:
                chosen = chosen[:4]
            picked = features[:, chosen[:, 0], chosen[:, 1]].T
            results.append({"boxes": self.box(picked), "scores": score[0, chosen[:, 0], chosen[:, 1]]})
        return results


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_backbone_of_a_detector(device: str) -> None:
    model = randomise(Proposals()).eval().to(device)
    images = [torch.randn(3, 16, 16, device=device) for _ in range(2)]
    with Unchanged(model):
        pruned = fxprune.prune_submodule(model, "backbone", (images,), flops=0.5, progress=False)
    assert type(pruned) is Proposals
    report = pruned.backbone.meta["fxprune"]
    assert report.oracle_error <= ORACLE_TOLERANCE or report.oracle_error_in_double <= DOUBLE_TOLERANCE
    assert 0.45 <= report.macs_after / report.macs_before <= 0.5
    assert [*pruned.state_dict()] == [*model.state_dict()]
    assert pruned.backbone.get_parameter("one.weight").shape[0] < 24
    assert pruned.backbone.get_parameter("top.weight").shape[0] == 16
    x = torch.randn(3, 3, 24, 24, device=device)
    (found, expected) = (part(x) for part in (pruned.backbone, model.backbone))
    assert {key: y.shape for key, y in found.items()} == {key: y.shape for key, y in expected.items()}
    found = pruned.train()([torch.randn(3, 24, 24, device=device) for _ in range(3)])
    assert len(found) == 3
    sum(y.square().sum() for result in found for y in result.values()).backward()
    assert [name for name, p in pruned.named_parameters() if p.grad is None or not p.grad.any()] == []
