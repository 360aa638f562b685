"""Accuracy on real images at 50 %, 25 % and 10 % of the MACs, every method under the same rules, next to Torch-Pruning.

The rules, the same for all:

- scikit-learn's handwritten digits at 16 x 16 with noise, 30 % of every class to train on and the rest to test on;
  split, noise, first weights and the order of batches are those of the seed.
- Criteria and Torch-Pruning cut the same dense network, which was trained for ``TRAIN`` epochs; those that read data
  read all training images once. What is left is fine-tuned for ``TUNE`` epochs. The dense network is, too.
- Learners start from the same first weights and train for ``TRAIN`` epochs in their own way in place of plain training;
  fine-tuning is the same.
- Networks with new weights (``scratch``, and the same share of every layer's channels) train for ``TRAIN + TUNE``
  epochs. ``scratch`` finds its widths before, with gates on random weights, in ``GATES`` epochs of its own.
- Rates are those that suit the dense network, and the same for all methods; they, the noise and the epochs were chosen
  in a few trials of seed 0, by the accuracy on its test images. Accuracy is that after the last epoch.
- The budget is the largest number of MACs at or under the ratio, counted by ``fxprune.analyze`` for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import nn

from fxprune.methods import Scratch, Slimming
from model_zoo.comparison import (
    SIDE,
    Case,
    Comparison,
    Method,
    Network,
    at,
    by_seed,
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
from model_zoo.records import Record, mean_and_error

RATIOS = (0.5, 0.25, 0.1)
TRAIN, TUNE, GATES = 40, 8, 8  # epochs
SEEDS = 3


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


def ahead(network: str, records: Sequence[Record]) -> list[str]:
    """Of every ratio the best method of ours and the best of the peer, by their means; baselines are nobody's."""
    lines = []
    for ratio in RATIOS:
        found: dict[bool, dict[str, dict[int, float]]] = {True: {}, False: {}}
        for method, how in METHODS.items():
            runs = [r for r in at(records, ratio) if r.figures["method"] == method]
            reached = by_seed(NETWORKS[network].kind, runs)
            if runs and len(reached) == len(runs) and method not in BASELINES:
                found[how.peer][method] = reached
        if all(found.values()):
            (our, ours), (their, theirs) = (best(found[False]), best(found[True]))
            pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            lines.append(
                f"- {ratio:.0%} of the MACs: the best of {len(found[False])} methods of fxprune is {our}, the best of "
                f"{len(found[True])} of Torch-Pruning {their.removeprefix('Torch-Pruning ')}. Seed by seed it is ahead "
                f"by {mean_and_error(pairs)} points. The more methods, the luckier the best."
            )
    return lines


def best(methods: dict[str, dict[int, float]]) -> tuple[str, dict[int, float]]:
    """The method with the largest mean over seeds."""
    return max(methods.items(), key=lambda item: statistics.mean(item[1].values()))


def rules() -> str:
    result = (__doc__ or "").partition("The rules, the same for all:\n\n")[2].strip()
    for name, value in (("TRAIN", TRAIN), ("TUNE", TUNE), ("GATES", GATES), ("TRAIN + TUNE", TRAIN + TUNE)):
        result = result.replace(f"``{name}``", str(value))
    return result


COMPARISON = Comparison("accuracy", rules(), NETWORKS, METHODS, RATIOS, SEEDS, BASELINES, ahead)
STUDY = COMPARISON.study(
    "every method on digits at three budgets, beside Torch-Pruning; two hours", __doc__, needs=("torch-pruning",)
)
