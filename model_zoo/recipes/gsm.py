"""The stages of Global Sparse Momentum: a dense network, sparse momentum and the cut, and a lottery ticket."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune import optim
from fxprune.methods import GSM, Hooks, Site
from fxprune.training import fit, seeded
from model_zoo.recipes.common import Plain, Run, Sgd, parser, scheduled, share


@dataclass(frozen=True, eq=False)
class Held(Plain):
    """A plain training in which what ``masks`` leave out is zero and stays so, by name of the parameter."""

    masks: Mapping[str, Tensor]

    def attach(self, site: Site) -> Hooks:
        optim.hold_zero([site.parameters[name] for name in self.masks], self.masks.values())
        return super().attach(site)


def arguments(doc: str | None, dataset: str, networks: Iterable[str] = ()) -> argparse.ArgumentParser:
    """The options of all recipes, and those of GSM; with several networks ``--network``, the first one the default.

    ``compression`` is None unless it is given: the recipe then takes the paper's. ``freeze`` is not the paper's.
    """
    result = parser(doc)
    result.set_defaults(dataset=dataset)
    if names := [*networks]:
        result.add_argument("--network", choices=names, default=names[0])
    result.add_argument("--compression", type=factor, help="one of this many weights stays (default: the paper's)")
    result.add_argument(
        "--freeze", type=share, help="of the epochs, after which the active set is held (default: never)"
    )
    result.add_argument("--ticket", action="store_true", help="also train the first weights with the zeros of GSM")
    return result


def factor(text: str) -> float:
    """An argument of at least 1."""
    value = float(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1: one of so many weights stays")
    return value


def gsm(run: Run, make: Callable[..., nn.Module], base: Sgd, sparse: Sgd, compression: float) -> None:
    """All stages: the base, GSM from its weights, the cut; and with ``--ticket`` its zeros on the first weights.

    Args:
        run: of the recipe.
        make: makes the dense network.
        base: how the dense network is trained, and the ticket.
        sparse: how GSM goes on.
        compression: of the weights of two or more dims.
    """
    base, sparse = run.shortened(base), run.shortened(sparse)
    model = run.network(make)
    optim.active_count(sum(p.numel() for p in model.parameters() if optim.is_kernel(p)), compression)  # leaves some
    trained = model if run.takes_weights(model) else run.train("base", model, base)
    training = fxprune.attach(
        trained, run.example, method=GSM(compression, freeze=run.options.freeze), seed=run.options.seed
    )

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return optim.GSM(
            parameters, sparse.lr, sparse.momentum, sparse.weight_decay, compression, nesterov=sparse.nesterov
        )

    batches = run.batches(sparse.batch)[0]
    loop = run.loop("gsm", optimizer=optimizer, **scheduled(sparse, batches))
    with run.timed("gsm"), seeded(run.options.seed):
        fit(training, batches, None, sparse.epochs, loop)
    figures: dict[str, Any] = {"gsm_accuracy": run.accuracy(training.model)}
    figures["support"] = optim.support(training.model.parameters())
    names, parameters = zip(*copy.deepcopy(training.model).named_parameters(), strict=True)
    masks = dict(zip(names, optim.magnitude_cut(parameters, compression), strict=True))
    pruned = training.finish()
    report = pruned.meta["fxprune"]
    run.keep(report.plan, pruned)
    if run.options.ticket:
        ticket = run.train("ticket", run.network(make), base, Held(masks))
        figures["ticket_accuracy"] = run.accuracy(ticket)
        run.keep(ticket.meta["fxprune"].plan, ticket, "ticket")
    kept = sum(int(mask.sum()) for name, mask in masks.items() if optim.is_kernel(model.get_parameter(name)))
    run.result(run.figures(trained), run.figures(pruned) | {"zeros": report.zeros}, weights_kept=kept, **figures)
