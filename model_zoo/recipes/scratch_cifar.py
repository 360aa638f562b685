"""Pruning from Scratch on CIFAR-10 (Wang et al., AAAI 2020): VGG16, ResNet-20, ResNet-56.

Settings are those of the released code: 10 epochs for the gates, then 160 epochs for the pruned network, as many more
as it is cheaper (Scratch-B). Accuracy is that after the last epoch. Unlike there, the residual stream of the pruned
ResNets is found at the expanded width and has gates in no layer, and every layer keeps at least one channel.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from fxprune.methods import Scratch
from fxprune.methods.scratch import scratch_b_epochs
from model_zoo.papers import resnet, vgg16_bn
from model_zoo.recipes.common import Run, Sgd, parser, share, split, start
from model_zoo.recipes.scratch import Network, Search, scratch

NETWORKS = {
    "vgg16_bn": Network(vgg16_bn, 0.5, False, (), {"width": 0.25}),
    "resnet_20": Network(partial(resnet, depth=20), 1.0, True, (), {"width": 0.5, "depth": 8}),
    "resnet_56": Network(partial(resnet, depth=56), 1.0, True, (), {"width": 0.5, "depth": 14}),
}
GATES = Scratch(strength=0.5, sparsity=0.2, lr=0.01)
GATE_EPOCHS, GATE_BATCH = 10, 128
VALIDATION = 5000  # the last training images
TRAIN = Sgd(epochs=160, batch=128, lr=0.1, momentum=0.9, weight_decay=1e-4, drops=(0.5, 0.75))


def main(argv: Sequence[str] | None = None) -> None:
    options = (known := arguments()).parse_args(argv)
    run = start("scratch_cifar", known, options, VALIDATION)
    epochs = scratch_b_epochs(TRAIN.epochs, options.ratio) if options.scratch_b else TRAIN.epochs
    scratch(run, NETWORKS[options.network], GATES, options.ratio, gates(run), TRAIN, epochs)


def gates(run: Run) -> Search:
    count = len(run.images)
    train, held = split(run.images, range(count - run.pick(VALIDATION, 64), count), run.test)
    return Search(*run.batches(GATE_BATCH, train, held), run.pick(GATE_EPOCHS, 1))


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.set_defaults(dataset="cifar10")
    result.add_argument("--network", choices=NETWORKS, default="vgg16_bn")
    result.add_argument("--ratio", type=share, default=0.5, help="MACs that stay (default: 0.5)")
    result.add_argument("--scratch-b", action=argparse.BooleanOptionalAction, default=True, help="train for longer")
    return result


if __name__ == "__main__":
    main()
