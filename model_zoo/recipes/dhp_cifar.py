"""DHP on CIFAR-10 (Li et al., ECCV 2020): ResNet-20, -56, -110 and -164 (the deep ones of bottlenecks), DenseNet-40.

Settings are those of the released scripts: SGD with momentum at a batch of 64, a search of at most 100 epochs, then 300
epochs for what it leaves. ``--ratio`` defaults to the first of the scripts'; another one takes the settings of the
first. Of DenseNet-40 no settings are published: it has those of ResNet-20. Unlike there, MACs are those of convolutions
and linear layers, and the result is at or under the ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from fxprune.methods import DHP
from model_zoo.papers import densenet_40_12, resnet, resnet_bottleneck
from model_zoo.recipes.common import Sgd, parser, share, start
from model_zoo.recipes.dhp import dhp


class Setting(NamedTuple):
    """``limit``: of the stop rule. ``drops``: of the learning rate in the search, as shares of 100 epochs."""

    limit: float = 0.02
    drops: tuple[float, ...] = (0.5,)


class Network(NamedTuple):
    """``strength``: lambda. ``ratios``: MACs that stay, and what the script for it sets."""

    make: Callable[..., nn.Module]
    strength: float
    ratios: dict[float, Setting]
    narrow: dict[str, Any]


NETWORKS = {
    "resnet_20": Network(partial(resnet, depth=20), 2e-4, {0.5: Setting()}, {"depth": 8, "width": 0.5}),
    "resnet_56": Network(
        partial(resnet, depth=56),
        3e-4,
        {0.5: Setting(0.01, (0.2, 0.5)), 0.38: Setting(0.02, (0.25, 0.5))},
        {"depth": 14, "width": 0.5},
    ),
    "resnet_110": Network(
        partial(resnet_bottleneck, depth=110), 1e-4, {0.5: Setting()}, {"depth": 11, "width": 0.5}
    ),
    "resnet_164": Network(
        partial(resnet_bottleneck, depth=164), 1e-4, {0.5: Setting()}, {"depth": 11, "width": 0.5}
    ),
    "densenet_40_12": Network(
        partial(densenet_40_12, init_channels=16), 2e-4, {0.38: Setting(), 0.28: Setting()}, {"depth": 10}
    ),
}  # fmt: skip
THRESHOLD = 5e-3
SEARCH_EPOCHS, BATCH = 100, 64
CONVERGE = Sgd(epochs=300, batch=BATCH, lr=0.1, momentum=0.9, weight_decay=1e-4, drops=(0.5, 0.75))


def main(argv: Sequence[str] | None = None) -> None:
    options = (known := arguments()).parse_args(argv)
    network = NETWORKS[options.network]
    options.ratio = options.ratio or next(iter(network.ratios))
    setting = network.ratios.get(options.ratio, next(iter(network.ratios.values())))
    run = start("dhp_cifar", known, options)
    method = DHP(strength=network.strength, threshold=THRESHOLD, limit=setting.limit)
    search = Sgd(SEARCH_EPOCHS, BATCH, lr=0.1, momentum=0.9, weight_decay=1e-4, drops=setting.drops)
    dhp(run, partial(network.make, **run.pick({}, network.narrow)), method, options.ratio, search, CONVERGE)


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.set_defaults(dataset="cifar10")
    result.add_argument("--network", choices=NETWORKS, default="resnet_20")
    result.add_argument("--ratio", type=share, help="MACs that stay (default: the first of the scripts')")
    return result


if __name__ == "__main__":
    main()
