"""The stages of DHP: the search with hypernetworks, the cut, the converging stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import fxprune
from fxprune.methods import DHP
from model_zoo.recipes.common import Run, Settings


def dhp(
    run: Run, make: Callable[..., nn.Module], method: DHP, ratio: float, search: Settings, converging: Settings
) -> None:
    """All stages.

    Args:
        run: of the recipe.
        make: makes the dense network.
        method: strength, threshold and limit.
        ratio: MACs that stay.
        search: how the hypernetworks are trained, for so many epochs at most.
        converging: how what is left is trained on, and the dense network, too.
    """
    search, converging = run.shortened(search), run.shortened(converging)
    loop = run.loop("search", optimizer=search.optimizer, schedule=search.schedule)
    with run.timed("search"):
        pruned: Any = fxprune.prune(
            run.network(make), run.example, method=method, flops=ratio, round_to=1, data=run.batches(search.batch)[0],
            loss_fn=run.loss, epochs=search.epochs, seed=run.options.seed,
            options=fxprune.Options(loop=loop),
        )  # fmt: skip
    dense = run.baseline(run.network(make), converging)  # now that the ratio can be met
    report = pruned.meta["fxprune"]
    cut = {f"cut_{run.metric}": run.quality(pruned), "search": next(n for n in report.notes if n.startswith("search"))}
    converged = run.train("converging", pruned, converging)
    run.keep(report.plan, converged)
    run.result(dense, run.figures(converged), **cut)
