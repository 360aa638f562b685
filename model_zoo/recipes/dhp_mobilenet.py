"""DHP on Tiny ImageNet (Li et al., ECCV 2020): MobileNetV1 and MobileNetV2, also of twice the width.

Settings are those of the released scripts: a search of at most 100 epochs, 220 epochs for what it leaves; the
classifier is an ordinary layer, and the channels that it reads may go. Of these the scripts keep a share at least,
which is not done here. ``--data``: folders ``train/CLASS/*`` and ``test/CLASS/*`` of images of 64 x 64 pixels, 200
classes (the download's own ``val`` has its classes in a text file). Trained on the images as they are, and mirrored.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from fxprune.methods import DHP
from model_zoo.papers import mobilenet_v1, mobilenet_v2
from model_zoo.recipes.common import Sgd, parser, share, start
from model_zoo.recipes.dhp import dhp


class Network(NamedTuple):
    """``threshold``: of latents that count, at widths 1 and 2."""

    make: Callable[..., nn.Module]
    strength: float
    threshold: dict[int, float]


NETWORKS = {
    "mobilenet_v1": Network(partial(mobilenet_v1, dropout=0.2), 5e-5, {1: 2e-3, 2: 2e-3}),
    "mobilenet_v2": Network(
        partial(mobilenet_v2, act=nn.ReLU, strides=(2, 1, 2, 2, 2)), 1e-4, {1: 1e-3, 2: 5e-3}
    ),
}  # fmt: skip
RATIOS = {1: 0.5, 2: 0.24}  # by width; also 0.3 and 0.1 in the paper
BATCH, LIMIT = 64, 0.02
SEARCH = Sgd(epochs=100, batch=BATCH, lr=0.1, weight_decay=1e-4, drops=(0.5, 0.7))
CONVERGE = Sgd(epochs=220, batch=BATCH, lr=0.1, weight_decay=1e-4, drops=(200 / 220, 205 / 220, 210 / 220, 215 / 220))


def main(argv: Sequence[str] | None = None) -> None:
    options = (known := arguments()).parse_args(argv)
    network = NETWORKS[options.network]
    options.ratio = options.ratio or RATIOS[options.width]
    run = start("dhp_mobilenet", known, options)
    method = DHP(network.strength, network.threshold[options.width], limit=LIMIT, classifier="cut")
    make = partial(network.make, width=options.width * run.pick(1, 0.25))
    dhp(run, make, method, options.ratio, SEARCH, CONVERGE)


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.set_defaults(dataset="tiny_imagenet")
    result.add_argument("--network", choices=NETWORKS, default="mobilenet_v1")
    result.add_argument("--width", type=int, choices=RATIOS, default=1, help="times that of the network (default: 1)")
    result.add_argument("--ratio", type=share, help="MACs that stay (default: 0.5; 0.24 of twice the width)")
    return result


if __name__ == "__main__":
    main()
