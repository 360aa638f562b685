"""Network Slimming of a perceptron on MNIST (Liu et al., ICCV 2017, section 4.4): 784-500-300-10.

Settings are those of the paper, which cuts 80 % of every hidden layer, since one threshold for all could take a whole
one. It does not say which lambda it took here; this is that of its VGG.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from fxprune.methods import Slimming
from model_zoo.papers import mlp_784_500_300_10
from model_zoo.recipes.common import Sgd, parser, share, start
from model_zoo.recipes.slimming import slimming

METHOD = Slimming(strength=1e-4)
PERCENT = 0.8  # of every layer
TRAIN = Sgd(epochs=30, batch=256, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, drops=(1 / 3, 2 / 3))
TUNE = TRAIN


def main(argv: Sequence[str] | None = None) -> None:
    options = (known := arguments()).parse_args(argv)
    run = start("slimming_mnist", known, options)
    make = partial(mlp_784_500_300_10, **run.pick(dict[str, Any](), {"width": 0.2}))
    slimming(run, make, METHOD, TRAIN, TUNE, channels=1 - options.percent, scope="uniform")


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.set_defaults(dataset="mnist")
    result.add_argument("--percent", type=share, default=PERCENT, help=f"of every layer that goes (default: {PERCENT})")
    return result


if __name__ == "__main__":
    main()
