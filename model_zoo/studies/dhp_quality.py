"""DHP beside slimming, scratch and l2 at equal MACs and epochs: accuracy of classifiers, PSNR of restoration networks.

The rules, the same for all:

- Every network trains for as many epochs in all: those of its *training* and of its *tuning*. Below its heading is how
  many. Split, noise, first weights and the order of batches are those of the seed.
- ``l2`` cuts the dense network after the training; the tuning follows. The dense network is tuned, too.
- ``slimming`` trains with its penalty in place of the training; the tuning is the same.
- ``dhp`` starts from random latents and hypernetworks. Its search has the optimizer and the schedule of the training at
  a tenth of the rate, and ends when the budget is met or its epochs are over; what is left trains on, from the weights
  that the search found and with the rates of the training, for all epochs that were not meant for the search. The
  strength is computed: a whole search shrinks every latent (by strength times rate, summed over all steps) by
  ``MARGIN`` times what a share of ``1 - sqrt(ratio)`` of them is below at first. The published strengths are for many
  times as many steps. Rate and margin were chosen in trials of another seed: there hypernetworks diverge with the whole
  rate, and with a third of it the loss on training images hardly falls. The accuracy of these trials was seen, too.
- ``scratch`` finds widths with gates on random weights, in epochs of its own. It, and the same share of every layer's
  channels, train with new weights for all epochs.
- Rates are those that suit the dense network, and the same for all methods. Those of ResNet-20, and noise and epochs on
  digits, are those of the study ``accuracy``, chosen there by test images of seed 0; the others were not tried out.
  What counts is the network after its last epoch.
- The budget is the largest number of MACs at or under the ratio, counted by ``fxprune.analyze`` for all.
- Networks and data are small, so that all of it is affordable on one core. The paper's figures are for larger networks
  and for ten times as many epochs; nothing here confirms or contradicts them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import NormalDist, mean
from typing import Any

from torch import nn

from fxprune.methods import DHP, Scratch, Slimming
from model_zoo import data
from model_zoo.comparison import (
    SIDE,
    Case,
    Comparison,
    Network,
    at,
    by_seed,
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
from model_zoo.records import Record, mean_and_error

RATIOS = (0.5, 0.25)
SEEDS = 3
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
    return DHP(strength=shrink / (sum(rates(case.searching)) * len(case.batches())), every=5)


METHODS = {
    "dense": unchanged(),
    "uniform, new weights": uniform(),
    "l2": criterion("l2"),
    "slimming": learner("slimming", lambda case: Slimming(strength=PENALTIES[case.network.kind])),
    "scratch": gated("scratch", lambda _: Scratch()),
    "dhp": searcher("dhp", dhp),
}
BASELINES = ("dense", "uniform, new weights")


def against(network: str, records: Sequence[Record]) -> list[str]:
    """Of every ratio which methods DHP beats, and which beat it, seed by seed; how its searches ended."""
    kind, lines = NETWORKS[network].kind, []
    for ratio in RATIOS:
        of = at(records, ratio)
        ours = by_seed(kind, [r for r in of if r.figures["method"] == "dhp"])
        ahead: list[str] = []
        behind: list[str] = []
        for name in METHODS:
            theirs = by_seed(kind, [r for r in of if r.figures["method"] == name])
            pairs = [ours[seed] - found for seed, found in theirs.items() if seed in ours]
            if name != "dhp" and pairs:
                better = mean(pairs) > 0
                by = mean_and_error([value if better else -value for value in pairs])
                (ahead if better else behind).append(f"{name} by {by}")
        sides = [f"{side} {', '.join(names)}" for side, names in (("beats", ahead), ("loses to", behind)) if names]
        if sides:
            lines.append(f"- {ratio:.0%} of the MACs, seed by seed: dhp {'; it '.join(sides)}.")
    ends = [r.figures["search"] for r in records if "search" in r.figures]
    if ends:
        reached = sum(end.startswith("search stopped") for end in ends)
        lines.append(f"- {reached} of {len(ends)} searches of dhp ended because the budget was met.")
    return lines


RULES = (__doc__ or "").partition("The rules, the same for all:\n\n")[2].strip().replace("``MARGIN``", str(MARGIN))
COMPARISON = Comparison("dhp_quality", RULES, NETWORKS, METHODS, RATIOS, SEEDS, BASELINES, against)
STUDY = COMPARISON.study("DHP beside slimming, scratch and l2, classifiers and restoration networks; an hour", __doc__)
