"""Global Sparse Momentum on CIFAR-10 (Ding et al., NeurIPS 2019): ResNet-56 and DenseNet-40 of growth 12.

Settings of ResNet-56 are those of the authors' PyTorch code, a re-implementation of what the paper ran. It has none for
DenseNet-40: those of ResNet-56 are taken, which is not verified. The rate of biases is that of the weights, where the
base of the authors' code doubles it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from model_zoo.papers import densenet_40_12, resnet
from model_zoo.recipes.common import Sgd, start, vector
from model_zoo.recipes.gsm import arguments, gsm


class Network(NamedTuple):
    """``compressions``: of the paper's table, the first one the default. ``narrow``: for a smoke run."""

    make: Callable[..., nn.Module]
    compressions: tuple[float, ...]
    narrow: dict[str, Any]


NETWORKS = {
    "resnet_56": Network(partial(resnet, 56), (10, 20 / 3), {"width": 0.25}),
    "densenet_40_12": Network(partial(densenet_40_12, init_channels=16), (20 / 3, 8, 10), {"depth": 10}),
}
BASE = Sgd(epochs=500, batch=64, lr=0.1, drops=(0.2, 0.4, 0.6, 0.8), spared=vector, warmup=5)
SPARSE = Sgd(epochs=600, batch=64, lr=5e-3, momentum=0.98, drops=(2 / 3, 5 / 6), warmup=5)


def main(argv: Sequence[str] | None = None) -> None:
    options = (known := arguments(__doc__, "cifar10", NETWORKS)).parse_args(argv)
    network = NETWORKS[options.network]
    options.compression = options.compression or network.compressions[0]
    run = start("gsm_cifar", known, options)
    gsm(run, partial(network.make, **run.pick({}, network.narrow)), BASE, SPARSE, options.compression)


if __name__ == "__main__":
    main()
