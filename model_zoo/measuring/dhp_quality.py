"""Networks and methods that DHP is compared on and with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import NormalDist
from typing import Any

from torch import nn

from fxprune.methods import DHP, Scratch, Slimming
from model_zoo import data
from model_zoo.comparison import (
    SIDE,
    Case,
    Network,
    criterion,
    gated,
    learner,
    noisy,
    searcher,
    unchanged,
    uniform,
)
from model_zoo.papers import dncnn, mobilenet_v2, resnet, srresnet
from model_zoo.papers.initial import he
from model_zoo.recipes.common import AdamW, Images, Run, Sgd, rates
from model_zoo.recipes.dhp_restoration import Crops, Restoration, Whole, small
from model_zoo.recipes.dhp_restoration import noisy as spoiled

RATIOS = (0.5, 0.25)
MARGIN = 1.2
SLOWER = 0.1  # a search than the training: every weight is moved by all the parameters of its hypernetwork
PATCH, PATCHES = 64, 200  # pixels; pieces of photographs
CROPS = 960  # of an epoch
SCALE = 2


def glyphs(seed: int, count: int | None) -> tuple[Images, Images]:
    """Drawn images [3, 16, 16], 1000 to train on and 1000 to test on."""
    count = min(count or 1000, 1000)
    return data.glyphs(count, SIDE, seed=2 * seed), data.glyphs(count, SIDE, seed=2 * seed + 1)


def photographs(spoil: Any, channels: int, crop: int, seed: int, count: int | None) -> tuple[Images, Images]:
    """Pairs of spoiled and clean images: random crops, spoiled anew every time, and whole pieces, spoiled once."""
    parts: Any = data.patches(PATCH, min(count or PATCHES, PATCHES), seed)
    train, test = ([image for (image,) in part] for part in parts)
    if channels == 1:
        train, test = ([image.mean(0, keepdim=True) for image in part] for part in (train, test))
    return Crops(train, spoil, crop, min(count or CROPS, CROPS)), Whole(test, spoil)


SGD = Sgd(40, batch=64, lr=0.1, nesterov=True, weight_decay=5e-4, drops=None)
ADAM = AdamW(12, batch=16, lr=1e-3, weight_decay=0)
PENALTIES = {Run: 1e-3, Restoration: 1e-4}  # slimming's; L1 losses are smaller


def network(what: str, search: int, **parts: Any) -> Network:
    """With the search of dhp, and its epochs for the page."""
    train = parts["train"]
    made = Network(**parts, search=replace(train, epochs=search, lr=SLOWER * train.lr))
    epochs = (
        f"Epochs: {train.epochs} of training, {made.tune.epochs} of tuning; {search} at most for the search of dhp, "
        f"{made.gates} for the gates of scratch."
    )
    return made._replace(about=f"{what} {epochs}")


def classifier(what: str, make: Callable[[], nn.Module], images: Any) -> Network:
    tune = replace(SGD, epochs=8, lr=0.05)
    return network(what, 20, make=make, initial=he, images=images, train=SGD, tune=tune, gates=8)


def restoration(what: str, make: Callable[[], nn.Module], images: Any) -> Network:
    """First weights are PyTorch's own."""
    parts = {"make": make, "initial": lambda model: model, "images": images, "kind": Restoration}
    return network(what, 6, **parts, train=ADAM, tune=replace(ADAM, epochs=3), gates=3)


DIGITS = partial(noisy, 1.0)
NETWORKS = {
    "resnet_20": classifier(
        "ResNet-20 on digits of 16 x 16 pixels with noise.", partial(resnet, 20, in_channels=1), DIGITS
    ),
    "mobilenet_v2": classifier(
        "MobileNetV2 of half the width on the same digits; strides 1, 2, 2, 2, 1.",
        partial(mobilenet_v2, 10, 1, width=0.5, strides=(1, 2, 2, 2, 1), act=nn.ReLU, dropout=0.0),
        DIGITS,
    ),
    "dncnn": restoration(
        "DnCNN of half the width with 4 blocks in place of 15: gray pieces of two photographs with noise of deviation "
        "70 of 255; trained on crops of 24 x 24 pixels with an L1 loss, tested on 40 pieces of 64 x 64 of other parts.",
        partial(dncnn, 1, width=0.5, blocks=4),
        partial(photographs, spoiled, 1, 24),
    ),
    "srresnet": restoration(
        "SRResNet of half the width with 2 blocks in place of 16: pieces of two photographs enlarged by 2; trained on "
        "crops of 32 x 32 pixels with an L1 loss, tested on 40 pieces of 64 x 64 of other parts.",
        partial(srresnet, 3, width=0.5, blocks=2, scale=SCALE),
        partial(photographs, partial(small, scale=SCALE), 3, 32),
    ),
    "resnet_20_glyphs": classifier(
        "ResNet-20 on 1000 drawn images of 16 x 16 pixels, tested on 1000 others.",
        partial(resnet, 20, in_channels=3),
        glyphs,
    ),
}


def dhp(case: Case, ratio: float) -> DHP:
    """With the strength that is just enough; whether the budget is met is looked at often."""
    # MACs go with the square of the channels that stay; the sizes of normal latents are below x for 2 cdf(x) - 1.
    shrink = MARGIN * NormalDist().inv_cdf(1 - ratio**0.5 / 2)
    strength = shrink / (sum(rates(case.searching)) * len(case.batches()))
    return DHP(strength=strength, every=5, classifier="generated")


METHODS = {
    "dense": unchanged(),
    "uniform, new weights": uniform(),
    "l2": criterion("l2"),
    "slimming": learner("slimming", lambda case: Slimming(strength=PENALTIES[case.network.kind])),
    "scratch": gated("scratch", lambda _: Scratch()),
    "dhp": searcher("dhp", dhp),
}
