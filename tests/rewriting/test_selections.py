"""Blocks that select what they read of a stream: what is cut, what stays, and that nothing else is changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import Small, image, make
from torch import Tensor, nn

import fxprune
from fxprune.errors import ConversionError, ModelError, PlanError
from fxprune.methods import Slimming
from model_zoo.papers import densenet_40_12, preresnet

pytestmark = pytest.mark.usefixtures("one_thread")


class Pre(nn.Module):
    """Two pre-activation blocks on a stream, and the norm at its end: x [N, 3, H, W] -> [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.inner = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        self.first = nn.ModuleList(nn.Conv2d(8, 6, 3, padding=1) for _ in range(2))
        self.second = nn.ModuleList(nn.Conv2d(6, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, first, inner, second in zip(self.norms, self.first, self.inner, self.second, strict=False):
            x = x + second(inner(first(norm(x).relu())).relu())
        return self.head(self.norms[2](x).relu().mean((2, 3)))


SITES = {"norms.0_selection", "norms.1_selection", "norms.2_selection"}
NETS: dict[str, Any] = {
    "pre": Pre,
    "preresnet": lambda: preresnet(depth=20, width=0.25),
    "densenet": lambda: densenet_40_12(depth=10, width=0.5),
}


def chosen(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(NETS[name]()).eval()


def selections(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if "_selection" in name}


def run(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module.eval()(x)
    return result


@pytest.mark.parametrize("name", NETS)
def test_the_pruned_network_is_the_original_with_those_scales_and_shifts_at_zero(name: str) -> None:
    net, x = chosen(name), torch.randn(3, 3, 16, 16)
    whole = fxprune.select_inputs(net, x)
    assert torch.equal(run(whole, x), run(net, x))
    assert all(torch.equal(index, torch.arange(len(index))) for index in selections(whole).values())
    small = fxprune.prune(whole, x, method="bn_scale", channels=0.5, progress=False)
    kept, masked = small.meta["fxprune"].plan.kept, copy.deepcopy(net)
    cut = [
        n.removesuffix(".weight")
        for n, dims in kept.items()
        if n.endswith(".weight") and net.get_parameter(n).ndim == 1
    ]
    assert len(cut) > len(selections(whole)) / 2
    with torch.no_grad():
        for norm in cut:
            gone = torch.ones(len(masked.get_parameter(f"{norm}.weight")), dtype=torch.bool)
            gone[kept[f"{norm}.weight"][0]] = False
            masked.get_parameter(f"{norm}.weight")[gone] = 0
            masked.get_parameter(f"{norm}.bias")[gone] = 0
    expected = run(masked, x)
    torch.testing.assert_close(run(small, x), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert float(expected.std(0).max()) > 1e-3
    for site, index in selections(small).items():
        assert index.tolist() == kept[site][0] == kept[site.replace("_selection", ".weight")][0]


def test_streams_stay_whole_and_blocks_read_their_own_part() -> None:
    whole = fxprune.select_inputs(randomise(Pre()), torch.randn(2, 3, 8, 8))
    assert {n.replace("norms.", "norms.") for n in selections(whole)} == {f"norms.{i}_selection" for i in range(3)}
    graph = fxprune.analyze(whole, torch.randn(2, 3, 8, 8))
    (stream,) = (g for g in graph.groups if any(m.name == "stem.weight" and m.dim == 0 for m in g.members))
    assert str(stream.locked).startswith("a block selects from these channels, which stay as they are (")
    assert "in forward" in str(stream.locked), "the line of the norm"
    free = {tuple(sorted((m.name, m.dim) for m in g.members if "running" not in m.name)) for g in graph.prunable}
    assert (("first.0.weight", 1), ("norms.0.bias", 0), ("norms.0.weight", 0), ("norms.0_selection", 0)) in free
    assert len(graph.prunable) == 3 + 2


@pytest.mark.parametrize(
    ("net", "scales"), [("preresnet_29", 2032), ("densenet_10", 24 + 36 + 48 + 48 + 60 + 72 + 72 + 84 + 96)]
)
def test_slimming_ranks_all_scales_by_one_threshold(net: str, scales: int) -> None:
    """As the paper does: of PreResNet-29 it ranks 2032, of which 688 are inside the blocks."""
    model = preresnet(depth=29) if net == "preresnet_29" else densenet_40_12(depth=10)
    randomise(model)
    x = torch.zeros(1, 3, 16, 16)
    whole = fxprune.select_inputs(model, x)
    graph = fxprune.analyze(whole, x)
    assert sum(g.channels.size for g in graph.prunable) == scales
    options = fxprune.Options(min_channels=1)
    training = fxprune.attach(whole, x, method=Slimming(percent=0.4), progress=False, round_to=1, options=options)
    values = torch.cat(
        [
            p.detach().abs()
            for n, p in training.model.named_parameters()
            if p.ndim == 1 and f"{n[:-6]}running_mean" in training.model.state_dict() and n.endswith("weight")
        ]
    )
    threshold = values.sort().values[int(scales * 0.4)]
    kept = training.finish().meta["fxprune"].plan
    left = sum(len(dims[0]) for n, dims in kept.kept.items() if n.endswith("running_mean"))
    left += sum(len(b) for n, b in whole.named_buffers() if n.endswith("running_mean") and n not in kept.kept)
    assert left == int((values > threshold).sum()) == scales - int(scales * 0.4) - 1
    assert not any(n.startswith("stem") for n in kept.kept), "the stem is never cut"


def test_gradients_are_those_of_the_plain_network() -> None:
    net, x = randomise(Pre()).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    whole = fxprune.select_inputs(net, x).eval()
    for model in (net, whole):
        model.zero_grad()
        F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(whole.get_parameter(name).grad, parameter.grad, rtol=1e-12, atol=1e-14)


def test_plans_and_files_fit_what_is_made_of_a_fresh_network(tmp_path: Path) -> None:
    net, x = chosen("densenet"), torch.randn(2, 3, 16, 16)
    small = fxprune.prune(fxprune.select_inputs(net, x), x, method="bn_scale", channels=0.5, progress=False)
    plan = small.meta["fxprune"].plan
    plan.save(tmp_path / "plan.json")
    fresh = fxprune.select_inputs(chosen("densenet"), x)
    again = fxprune.apply(fresh, fxprune.PruningPlan.load(tmp_path / "plan.json"), x)
    assert torch.equal(run(again, x), run(small, x))
    with pytest.raises(PlanError):
        fxprune.apply(net, plan, x)
    fxprune.save(small, tmp_path / "small.safetensors")
    loaded = fxprune.load(tmp_path / "small.safetensors", fxprune.select_inputs(chosen("densenet"), x))
    assert torch.equal(run(loaded, x), run(small, x))
    fxprune.save(small, tmp_path / "small.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "small.pt2").module()(x), run(small, x))


def test_what_is_left_is_an_index_select_that_exporters_know(tmp_path: Path) -> None:
    net, x = chosen("pre"), torch.randn(2, 3, 16, 16)
    small = fxprune.prune(fxprune.select_inputs(net, x), x, method="bn_scale", channels=0.6, progress=False)
    targets = [node.target for node in small.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.index_select) == 3
    assert not any("select_channels" in str(target) for target in targets)
    assert fxprune.export(small, tmp_path / "small.onnx", x).max_rel_error < 1e-5
    assert [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node].count("Gather") == 3
    with pytest.raises(ConversionError, match=r"^Pre has no place for what blocks select of a stream \(norms\.0_sel"):
        fxprune.into(net, small)
    with pytest.raises(PlanError, match=r"which the model does not have\. It is of fxprune\.select_inputs\(model\)"):
        fxprune.apply(net, small.meta["fxprune"].plan, x)


def test_what_was_cut_can_select_again() -> None:
    net, x = chosen("pre"), torch.randn(2, 3, 16, 16)
    once = fxprune.prune(fxprune.select_inputs(net, x), x, method="bn_scale", channels=0.7, progress=False)
    twice = fxprune.select_inputs(once, x)
    assert {n for n in selections(twice) if n.endswith("_2")} == {f"norms.{i}_selection_2" for i in range(3)}
    small = fxprune.prune(twice, x, method="bn_scale", channels=0.6, progress=False)
    assert small.meta["fxprune"].oracle_error < 1e-5
    assert len(small.get_buffer("norms.0_selection")) == len(once.get_buffer("norms.0_selection"))
    assert len(small.get_buffer("norms.0_selection_2")) < len(once.get_buffer("norms.0_selection"))


class Elsewhere(nn.Module):
    """A stream whose norms are no beginning of a block: ``how`` says why."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.stem, self.conv = how, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.layer, self.head = nn.GroupNorm(1, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        match self.how:
            case "it goes back into the stream":
                x = x + self.norm(x)
            case "it is returned":
                return self.head(x.mean((2, 3))), self.norm(x)
            case "it takes a statistic over channels":
                x = x + self.conv(self.layer(x))
            case "it is called twice":
                x = x + self.conv(self.norm(self.norm(x)))
            case "nothing else reads the stream":
                x = self.conv(self.norm(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    "how",
    ["it goes back into the stream", "it is returned", "it takes a statistic over channels", "it is called twice",
     "nothing else reads the stream"],
)  # fmt: skip
def test_a_norm_that_begins_no_block_has_no_selection(how: str) -> None:
    with pytest.raises(ModelError, match="No norm of this model reads a stream for a block alone"):
        fxprune.select_inputs(randomise(Elsewhere(how)), torch.randn(2, 3, 8, 8))


def test_networks_with_norms_after_their_layers_have_none() -> None:
    with pytest.raises(ModelError, match="No norm of this model reads a stream"):
        fxprune.select_inputs(make(Small), image())
