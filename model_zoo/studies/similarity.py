"""How alike the structures are that Pruning from Scratch finds: from random weights, and from weights in training.

The paper (Wang et al., AAAI 2020, figure 2) says that structures from random weights are diverse and differ from those
of pretrained weights, which become homogeneous after about ten epochs of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from model_zoo.data import load
from model_zoo.measuring.similarity import (
    PAPER,
    SMALL,
    Sizes,
    Split,
    Structure,
    cifar10,
    drawn,
    network,
    pruned,
    training,
)
from model_zoo.pages.similarity import page, plot
from model_zoo.recipes.common import positive
from model_zoo.records import Record
from model_zoo.study import Add, Measure, Options, Study


def _study(
    name: str,
    about: str,
    sizes: Callable[[Options], Sizes],
    images: Callable[[Options], Split],
    options: Callable[[Add], Any],
    **more: Any,
) -> Study:
    def worker(options: Options) -> Measure:
        chosen, (train, held) = sizes(options), images(options)
        device = train[0][0].device

        def measured(structure: Structure) -> Record:
            model = network(chosen, structure.seed).to(device)
            if structure.epoch:
                kept = options.out.with_suffix(f".{structure.seed}.pt")
                model.load_state_dict(training(chosen, structure.seed, model, train, kept)[structure.epoch])
            return pruned(chosen, str(structure), model, structure.seed, train, held)

        return measured

    return Study(
        name, about, lambda options: sizes(options).structures(), worker, page, plot, options, doc=__doc__, anew=_anew,
        head=lambda options: {"sizes": asdict(sizes(options))},
        **more,
    )  # fmt: skip


def _anew(options: Options) -> None:
    for kept in options.out.parent.glob(f"{options.out.stem}.*.pt"):
        kept.unlink()


def _small(add: Add) -> None:
    add("--smoke", action="store_true", help="the same code in seconds, on tiny sizes")


def _drawn(options: Options) -> Sizes:
    return SMALL if options.smoke else Sizes()


def _cifar10(options: Options) -> Sizes:
    if options.smoke:
        return replace(SMALL, dataset=PAPER.dataset, side=PAPER.side)
    epochs = (*(epoch for epoch in PAPER.epochs if epoch < options.epochs), options.epochs)
    return replace(PAPER, width=options.width, images=options.images, epochs=epochs)


def _cifar10_options(add: Add) -> None:
    _small(add)
    add("--data", type=Path, metavar="DIR", help="CIFAR-10")
    add("--width", type=float, default=PAPER.width, help="of the network (default: 1)")
    add("--images", type=positive, default=PAPER.images, help="to train on (default: all)")
    add("--epochs", type=positive, default=PAPER.epochs[-1], help="of training (default: 160)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def _check(options: Options) -> str:
    if options.data is None:
        return "pass --data DIR, where CIFAR-10 is"
    if options.epochs < 2:
        return f"--epochs {options.epochs}: structures along a training take at least 2"
    try:
        load("cifar10", options.data)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


DRAWN = _study(
    "similarity",
    "how alike structures from random and from trained weights are: Pruning from Scratch, figure 2; 20 minutes", _drawn,
    lambda options: drawn(_drawn(options)), _small,
)  # fmt: skip
CIFAR10 = _study(
    "similarity_cifar10", "the same on CIFAR-10; days on a processor at the paper's sizes, which options make smaller",
    _cifar10, lambda options: cifar10(_cifar10(options), options.data, options.device), _cifar10_options,
    needs=("--data DIR: CIFAR-10",), check=_check,
)  # fmt: skip
