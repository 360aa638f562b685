"""Network Slimming on CIFAR-10 and CIFAR-100 (Liu et al., ICCV 2017): VGG19, PreResNet-164, DenseNet-40.

Settings are those of section 4 of the paper; ``--percent`` defaults to the first of its table 1. With ``--passes`` more
than 1 each pass cuts half of all channels, and of no layer more than half.

As there, the blocks of PreResNet-164 and DenseNet-40 select what they read of a stream, which stays whole
(``fxprune.select_inputs``): plans and weights fit what that makes of a fresh network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from fxprune import Options
from fxprune.methods import Slimming
from model_zoo.papers import densenet_40_12, preresnet, vgg19_bn
from model_zoo.recipes.common import Sgd, parser, positive, share, start
from model_zoo.recipes.slimming import slimming


class Network(NamedTuple):
    """``method``: with the lambda of the paper. ``percents``: of its table 1, by data set. ``selects``: whether blocks
    select their inputs."""

    make: Callable[..., nn.Module]
    method: Slimming
    percents: dict[str, tuple[float, ...]]
    narrow: dict[str, Any]
    selects: bool = False


NETWORKS = {
    "vgg19_bn": Network(vgg19_bn, Slimming(1e-4), {"cifar10": (0.7,), "cifar100": (0.5,)}, {"width": 0.25}),
    "preresnet_164": Network(
        preresnet, Slimming(1e-5), {"cifar10": (0.4, 0.6), "cifar100": (0.4, 0.6)}, {"depth": 11}, selects=True
    ),
    "densenet_40_12": Network(
        partial(densenet_40_12, init_channels=16),
        Slimming(1e-5),
        {"cifar10": (0.4, 0.7), "cifar100": (0.4, 0.6)},
        {"depth": 10},
        selects=True,
    ),
}
TRAIN = Sgd(epochs=160, batch=64, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, drops=(0.5, 0.75))
TUNE = TRAIN
HALF = CAP = 0.5  # in every one of several passes: channels that go, and at most of one layer


def main(argv: Sequence[str] | None = None) -> None:
    options = (known := arguments()).parse_args(argv)
    network = NETWORKS[options.network]
    cut: dict[str, Any] = {}
    if options.passes > 1:
        cut = {"options": Options(max_ratio=CAP)}
        options.percent = options.percent or HALF
    options.percent = options.percent or network.percents[options.dataset][0]
    run = start("slimming_cifar", known, options)
    method = replace(network.method, percent=options.percent)
    make = partial(network.make, **run.pick({}, network.narrow))
    slimming(run, make, method, TRAIN, TUNE, options.passes, network.selects, **cut)


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--network", choices=NETWORKS, default="vgg19_bn")
    result.add_argument("--dataset", choices=("cifar10", "cifar100"), default="cifar10")
    result.add_argument("--percent", type=share, help="channels that go, as a share of all (default: the paper's)")
    result.add_argument("--passes", type=positive, default=1, help="train, cut and fine-tune so often (default: 1)")
    return result


if __name__ == "__main__":
    main()
