"""Pruning from Scratch without data on transformers: gates on every path, and what the report says of it."""

from __future__ import annotations

import pytest
import torch
from conftest import randomise
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

import fxprune
from fxprune.methods import Scratch

pytestmark = pytest.mark.usefixtures("one_thread")

NETS = {
    "vit": (
        lambda: VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=10),
        16,
    ),
    "swin": (
        lambda: SwinTransformer(
            img_size=16, patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4, num_classes=10
        ),
        16,
    ),
}


@pytest.mark.parametrize("attention", ["head_dim", "heads"])
@pytest.mark.parametrize("name", NETS)
def test_gates_are_learned_without_labels(name: str, attention: str) -> None:
    make, side = NETS[name]
    torch.manual_seed(0)
    model, x = randomise(make()).eval(), torch.randn(2, 3, side, side)
    small = fxprune.prune(
        model, x, method=Scratch(steps=3, batch=2, lr=0.1), flops=0.5, attention=attention, progress=False
    )
    report = small.meta["fxprune"]
    assert 0.4 < report.macs_after / report.macs_before <= 0.5
    assert report.oracle_error < 1e-5
    told = "learned without labels: on 3 batches of 2 Gaussian inputs, against the dense model's output"
    assert told in report.notes
    assert small(torch.randn(3, 3, side, side)).shape == (3, 10)
    inherited = fxprune.apply(model, report.plan, x)
    for key, parameter in small.named_parameters():
        if parameter.ndim > 1:
            assert not torch.equal(parameter, inherited.get_parameter(key)), "drawn anew"
    assert len({counts[0] / counts[1] for counts in report.plan.widths.values()}) > 1, "gates say how wide, not chance"


def test_the_gates_are_those_of_every_group_that_may_be_cut() -> None:
    make, side = NETS["vit"]
    training = fxprune.attach(make(), torch.randn(2, 3, side, side), method="scratch", flops=0.5, progress=False)
    (gates,) = (p for p in training.model.parameters() if p.requires_grad)
    assert len(gates) == sum(group.channels.size for group in training.graph.prunable)
