"""The stages of Pruning from Scratch: gates over random weights, new weights for the widths they give, training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

import fxprune
from fxprune.methods import Scratch
from model_zoo.papers.initial import he
from model_zoo.recipes.common import Run, Sgd

EXPAND = 1.25  # 80 channels for 64 in VGG, 40 for 32 in MobileNets


class Network(NamedTuple):
    """A network of the paper, and where it has gates.

    ``gamma``: first scale of its norms. ``inner_only``: no gates on the residual stream. ``ignore``: other layers
    without gates. ``narrow``: what makes it small for a smoke run; has a ``width``.
    """

    make: Callable[..., nn.Module]
    gamma: float
    inner_only: bool
    ignore: tuple[str, ...]
    narrow: dict[str, Any]


class Search(NamedTuple):
    """Where the gates are learned: batches, the images to choose the best gates by, how many rounds."""

    data: Any
    validation: Any
    epochs: int


def search(run: Run, network: Network, method: Scratch, ratio: float, found: Search) -> nn.Module:
    """The network with ``ratio`` of the MACs, counted without the expansion; its weights are new."""
    model, method = expanded(run, network, method)
    with run.timed("gates"):
        pruned: nn.Module = fxprune.prune(
            model, run.example, method=method, flops=ratio, round_to=1, data=found.data, epochs=found.epochs,
            ignore=network.ignore, seed=run.options.seed,
            options=fxprune.Options(loop=run.loop("gates", validation=found.validation)),
        )  # fmt: skip
    return pruned


def expanded(run: Run, network: Network, method: Scratch) -> tuple[nn.Module, Scratch]:
    """The network as the paper prints it, and the method that searches in a wider one."""
    options = run.pick({"width": 1.0}, network.narrow)

    def make(width: float) -> nn.Module:
        return run.network(network.make, gamma=network.gamma, **options | {"width": width * options["width"]})

    return make(1.0), replace(method, inner_only=network.inner_only, factory=make, expand=EXPAND)


def scratch(
    run: Run, network: Network, method: Scratch, ratio: float, found: Search, settings: Sgd, epochs: int
) -> None:
    """All stages.

    Args:
        run: of the recipe.
        network: to be pruned.
        method: how gates are learned.
        ratio: MACs that stay.
        found: where gates are learned.
        settings: how the dense network is trained.
        epochs: of the pruned one, which is trained alike.
    """
    dense = run.network(network.make, gamma=network.gamma, **run.pick({}, network.narrow))
    pruned: Any = search(run, network, method, ratio, found)
    plan = pruned.meta["fxprune"].plan
    run.reseed()
    he(pruned, network.gamma)
    longer = run.shortened(replace(settings, epochs=epochs))
    trained = run.train("train", pruned, longer)
    run.keep(plan, trained)
    run.result(run.baseline(dense, run.shortened(settings)), run.figures(trained), epochs=longer.epochs)
