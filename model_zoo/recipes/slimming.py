"""The stages of Network Slimming: training with the penalty, the cut, fine-tuning; in several passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx, nn

import fxprune
from fxprune.methods import Slimming
from fxprune.training import fit, seeded
from model_zoo.recipes.common import Run, Sgd

GAMMA = 0.5  # first scale of all norms


def slim(
    run: Run, stage: str, model: nn.Module, method: Slimming, settings: Sgd, selects: bool = False, **cut: Any
) -> tuple[fx.GraphModule, float]:
    """The network cut after a training with the penalty, and its accuracy before the cut."""
    model = fxprune.select_inputs(model, run.example) if selects else model
    training = fxprune.attach(model, run.example, method=method, round_to=1, seed=run.options.seed, **cut)
    loop = run.loop(stage, optimizer=settings.optimizer, schedule=settings.schedule)
    with run.timed(stage), seeded(run.options.seed):
        fit(training, run.batches(settings.batch)[0], None, settings.epochs, loop)
    accuracy = run.accuracy(training.model)
    return training.finish(), accuracy


def slimming(
    run: Run, make: Callable[..., nn.Module], method: Slimming, settings: Sgd, tuning: Sgd, passes: int = 1,
    selects: bool = False, **cut: Any,
) -> None:  # fmt: skip
    """All stages, with a result for every pass.

    Args:
        run: of the recipe.
        make: makes the dense network.
        method: penalty and percentage.
        settings: how the network is trained, with the penalty and, for the baseline, without.
        tuning: how what is left is fine-tuned.
        passes: each starts from what the one before has left, with its weights.
        selects: whether blocks select what they read of a stream, see ``fxprune.select_inputs``.
        cut: other arguments of ``fxprune.attach``.
    """
    settings, tuning = run.shortened(settings), run.shortened(tuning)
    model = run.network(make, gamma=GAMMA)
    method = replace(method, gamma=None if run.takes_weights(model) else GAMMA)
    network, dense = model, None
    for number in range(1, passes + 1):
        pruned, sparse = slim(run, f"pass{number}-sparse", model, method, settings, selects, **cut)
        dense = dense or run.baseline(network, settings)  # once it is known that the budget can be met
        tuned = run.train(f"pass{number}-tuned", pruned, tuning)
        run.keep(pruned.meta["fxprune"].plan, tuned, f"pass{number}")
        steps = {"pass": number, "sparse_accuracy": sparse, "cut_accuracy": run.accuracy(pruned)}
        run.result(dense, run.figures(tuned), **steps)
        model, method = tuned, replace(method, gamma=None)
