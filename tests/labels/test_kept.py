"""What pruned nets look like inside: attributes, scales, paddings and ties that must follow, or must not."""

from __future__ import annotations

import math
import operator

import pytest
import torch
from conftest import randomise
from labels.nets import CASES
from torch import fx, nn

import fxprune


def cut(name: str, seed: int = 0) -> fx.GraphModule:
    case = CASES[name]
    return fxprune.prune(
        randomise(case.build()).eval(), case.inputs(2), method="random", attention=case.attention, channels=0.5,
        seed=seed, scope="uniform", progress=False,
    )  # fmt: skip


def weight(model: nn.Module, name: str) -> list[int]:
    return list(model.get_parameter(f"{name}.weight").shape)


def test_a_depthwise_convolution_keeps_its_multiplier() -> None:
    model = cut("DepthwiseMultiplier")
    d = model.get_submodule("d")
    assert weight(model, "a")[0] == d.groups == d.in_channels == 4
    assert weight(model, "d") == [8, 1, 3, 3]
    assert d.out_channels == weight(model, "b")[1] == 8


def test_groups_keep_equal_counts_at_offsets_of_their_own() -> None:
    model = cut("Grouped")
    g = model.get_submodule("g")
    assert (g.groups, g.in_channels, g.out_channels) == (2, 4, 2)
    kept = model.meta["fxprune"].plan.kept
    inner = kept["g.weight"][1]
    assert [len(row) for row in inner] == [2, 2]
    assert kept["a.weight"][0] == [*inner[0], *(4 + i for i in inner[1])]
    offsets = [cut("Grouped", seed).meta["fxprune"].plan.kept["g.weight"][1] for seed in range(4)]
    assert any(first != second for first, second in offsets), "groups are tied to equal offsets"


def test_the_implicit_scale_of_attention_stays_that_of_the_dense_head() -> None:
    model = cut("SeparateQKV")
    assert weight(model, "q")[0] == 4
    calls = [n for n in model.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert [n.kwargs["scale"] for n in calls] == [pytest.approx(4**-0.5)]


def test_a_scale_computed_from_the_channels_stays_dense() -> None:
    model = cut("PackedQKV")
    assert weight(model, "qkv")[0] == 12
    scales = [n.args[1] for n in model.graph.nodes if n.target is operator.mul and isinstance(n.args[1], float)]
    assert scales == [pytest.approx(4**-0.5)]


def test_whole_heads_go() -> None:
    model = cut("SeparateQKV-heads")
    assert weight(model, "q")[0] == weight(model, "k")[0] == weight(model, "v")[0] == weight(model, "o")[1] == 4
    kept = model.meta["fxprune"].plan.kept
    assert kept["q.weight"][0] in ([0, 1, 2, 3], [4, 5, 6, 7])
    assert kept["q.weight"][0] == kept["k.weight"][0] == kept["v.weight"][0] == kept["o.weight"][1]


def test_a_head_of_the_table_goes_with_the_head() -> None:
    model = cut("RelativePositions-heads")
    kept = model.meta["fxprune"].plan.kept
    assert kept["table"] == {1: [kept["proj.weight"][1][0] // 4]}


@pytest.mark.parametrize("name", ["PixelShuffle", "PixelShuffleByHand", "PixelShuffleChannelsLast"])
def test_the_sub_pixels_of_a_channel_stay_together(name: str) -> None:
    model = cut(name)
    kept = model.meta["fxprune"].plan.kept
    assert len(kept["a.weight"][0]) == 4 * len(kept["b.weight"][1]) == 8
    outer = name == "PixelShuffleChannelsLast"
    wanted = [4 * k + c if outer else 4 * c + k for c in kept["b.weight"][1] for k in range(4)]
    assert kept["a.weight"][0] == sorted(wanted)


def test_the_padding_of_a_shortcut_shrinks_with_its_channels() -> None:
    for seed in range(3):
        model = cut("PaddedShortcut", seed)
        kept = model.meta["fxprune"].plan.kept
        outer = [c for c in kept["b.weight"][0] if c < 2 or c > 5]
        pads = next(n.args[1] for n in model.graph.nodes if "pad" in str(n.target))
        assert tuple(pads) == (0, 0, 0, 0, sum(c < 2 for c in outer), sum(c > 5 for c in outer))
        assert [c - 2 for c in kept["b.weight"][0] if 2 <= c <= 5] == kept["a.weight"][0]


def test_tied_weights_stay_one_parameter() -> None:
    model = cut("TiedWeight")
    assert model.get_parameter("emb.weight") is model.get_parameter("dec.weight")
    assert weight(model, "emb") == [10, 4]


def test_a_shuffle_becomes_a_gather() -> None:
    model = cut("ShuffledBranches")
    assert [n.target for n in model.graph.nodes].count(torch.index_select) == 1
    gather = next(n for n in model.graph.nodes if n.target is torch.index_select)
    index = model.get_buffer(str(gather.args[2].target))
    assert sorted(index.tolist()) == list(range(weight(model, "c")[1]))
    assert not any(name.startswith("_gather") for name in model.state_dict())


def test_weights_that_are_computed_stay_computed() -> None:
    model = cut("WeightNorm")
    kept = model.meta["fxprune"].plan.kept
    assert set(kept["w.parametrizations.weight.original0"]) == {0}
    assert kept["w.parametrizations.weight.original1"][1] == kept["a.weight"][0]


def test_every_flattened_position_of_a_channel_goes() -> None:
    kept = cut("FlattenLinear").meta["fxprune"].plan.kept
    assert kept["f.weight"][1] == [4 * c + k for c in kept["a.weight"][0] for k in range(4)]


def test_an_unknown_op_is_reported_with_its_line_and_the_rest_is_pruned() -> None:
    model = cut("UnknownOp")
    report = model.meta["fxprune"]
    assert weight(model, "a")[0] == 8
    assert weight(model, "b")[0] == 3
    assert any("no rule for aten.renorm" in note and "limits.py:" in note for note in report.notes)
    row = next(row for row in report.rows if row.name == "a")
    assert "no rule for aten.renorm" in str(row)
    assert math.prod(weight(model, "b")) == 3 * 8 * 9
