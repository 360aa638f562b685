"""Global Sparse Momentum on MNIST (Ding et al., NeurIPS 2019): LeNet-300-100 at 60x, LeNet-5 at 125x (or 300x).

Settings are those of the authors' PyTorch code, a re-implementation of what the paper ran; its base doubles the rate of
biases, which is not done here. ``--ticket`` also trains the first weights with the zeros that were found, as in the
paper's lottery tickets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from model_zoo.papers import lenet_5, lenet_300_100
from model_zoo.recipes.common import Sgd, start, vector
from model_zoo.recipes.gsm import arguments, gsm


class Network(NamedTuple):
    """``compression``: of the paper."""

    make: Callable[..., nn.Module]
    compression: float


NETWORKS = {"lenet_300_100": Network(lenet_300_100, 60), "lenet_5": Network(lenet_5, 125)}
BASE = Sgd(epochs=200, batch=256, lr=0.03, weight_decay=5e-4, drops=(0.2, 0.4, 0.6, 0.8), spared=vector, warmup=5)
SPARSE = Sgd(
    epochs=280, batch=256, lr=0.01, momentum=0.99, nesterov=True, weight_decay=5e-4, drops=(4 / 7, 5 / 7, 6 / 7),
    warmup=5,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    options = (known := arguments(__doc__, "mnist", NETWORKS)).parse_args(argv)
    network = NETWORKS[options.network]
    options.compression = options.compression or network.compression
    run = start("gsm_mnist", known, options)
    gsm(run, partial(network.make, **run.pick({}, {"width": 0.4})), BASE, SPARSE, options.compression)


if __name__ == "__main__":
    main()
