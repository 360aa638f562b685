"""Networks for digits, and every method to prune them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import nn

from fxprune.methods import Scratch, Slimming
from model_zoo.comparison import (
    SIDE,
    Case,
    Method,
    Network,
    criterion,
    gated,
    learner,
    noisy,
    unchanged,
    uniform,
)
from model_zoo.papers import resnet
from model_zoo.papers.initial import he
from model_zoo.peers import torch_pruning
from model_zoo.recipes.common import AdamW, Sgd

RATIOS = (0.5, 0.25, 0.1)
TRAIN, TUNE, GATES = 40, 8, 8  # epochs


def vit() -> nn.Module:
    """x [N, 1, 16, 16] in 16 patches; 4 blocks of width 64."""
    made: nn.Module = VisionTransformer(
        img_size=SIDE, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    return made


# The noise is such that a dense network is right in about nine cases of ten.
SGD = Sgd(TRAIN, batch=64, lr=0.1, nesterov=True, weight_decay=5e-4, drops=None)
ADAMW = AdamW(TRAIN, batch=64, lr=3e-3, weight_decay=0.05)
NETWORKS = {
    "resnet_20": Network(
        partial(resnet, 20, in_channels=1), he, partial(noisy, 1.0), SGD, replace(SGD, epochs=TUNE, lr=0.05), GATES
    ),
    "vit": Network(
        vit, lambda m: m.apply(init_weights_vit_timm), partial(noisy, 0.3), ADAMW, replace(ADAMW, epochs=TUNE), GATES
    ),
}


def peer(importance: Any, isomorphic: bool = False) -> Method:
    def cut(case: Case, ratio: float) -> nn.Module:
        macs = int(ratio * case.macs)
        return torch_pruning(case.modules, case.run.example, macs, importance, case.batches(), isomorphic)

    return Method(cut, peer=True)


METHODS = {
    "dense": unchanged(),
    "uniform, new weights": uniform(),
    "random": criterion("random"),
    "l1": criterion("l1"),
    "l2": criterion("l2"),
    "bn_scale": criterion("bn_scale"),
    "fpgm": criterion("fpgm"),
    "lamp": criterion("lamp"),
    "taylor": criterion("taylor"),
    "fisher": criterion("fisher"),
    "activation": criterion("activation"),
    "wanda": criterion("wanda"),
    "l2, isomorphic": criterion("l2", scope="isomorphic"),
    "taylor, isomorphic": criterion("taylor", scope="isomorphic"),
    "slimming": learner("slimming", lambda _: Slimming(strength=1e-3)),
    "scratch": gated("scratch", lambda _: Scratch()),
    "Torch-Pruning group norm": peer("group_norm"),
    "Torch-Pruning Taylor": peer("taylor"),
    "Torch-Pruning group norm, isomorphic": peer("group_norm", isomorphic=True),
    "Torch-Pruning Taylor, isomorphic": peer("taylor", isomorphic=True),
}


BASELINES = ("dense", "uniform, new weights", "random")
