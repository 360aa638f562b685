"""Global Sparse Momentum on ImageNet (Ding et al., NeurIPS 2019): ResNet-50 at 4x (or 5x).

The compressions are the paper's. The hyper-parameters are not verified: the authors' code has none for ResNet-50. The
base is trained as usual, and GSM has momentum and rate of ResNet-56 on CIFAR-10, for as many steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from model_zoo.papers import resnet_50
from model_zoo.recipes.common import Sgd, start, vector
from model_zoo.recipes.gsm import arguments, gsm

COMPRESSION = 4.0
BASE = Sgd(epochs=90, batch=256, lr=0.1, drops=(1 / 3, 2 / 3), spared=vector, warmup=5)
SPARSE = Sgd(epochs=94, batch=256, lr=5e-3, momentum=0.98, drops=(2 / 3, 5 / 6), warmup=5)  # 470 000 steps


def main(argv: Sequence[str] | None = None) -> None:
    options = (known := arguments(__doc__, "imagenet")).parse_args(argv)
    options.compression = options.compression or COMPRESSION
    run = start("gsm_imagenet", known, options)
    gsm(run, partial(resnet_50, **run.pick(dict[str, Any](), {"width": 0.0625})), BASE, SPARSE, options.compression)


if __name__ == "__main__":
    main()
