"""Network Slimming on ImageNet (Liu et al., ICCV 2017): VGG-A with batch norm, in its classifier too.

Settings are those of section 4 of the paper. Its own figures of this experiment came from a network with a mistake
around the activations of the linear layers, as the authors' code says; they are not what this one can be compared to.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fxprune.methods import Slimming
from model_zoo.papers import vgg_a_bn
from model_zoo.recipes.common import Sgd, parser, share, start
from model_zoo.recipes.slimming import slimming

METHOD = Slimming(strength=1e-5)
PERCENT = 0.5
TRAIN = Sgd(epochs=60, batch=256, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, drops=(1 / 3, 2 / 3))
TUNE = Sgd(epochs=5, batch=256, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4, drops=())


def main(argv: Sequence[str] | None = None) -> None:
    options = (known := arguments()).parse_args(argv)
    run = start("slimming_imagenet", known, options)
    make = partial(vgg_a_bn, **run.pick(dict[str, Any](), {"width": 0.0625}))
    slimming(run, make, replace(METHOD, percent=options.percent), TRAIN, TUNE)


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.set_defaults(dataset="imagenet")
    result.add_argument("--percent", type=share, default=PERCENT, help=f"channels that go (default: {PERCENT})")
    return result


if __name__ == "__main__":
    main()
