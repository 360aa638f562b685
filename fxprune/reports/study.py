"""What plans say about a model and a method, side by side.

Examples:
    >>> plans = {
    ...     method: fxprune.prune(model, example_inputs, method=method, flops=0.5, progress=False).meta["fxprune"].plan
    ...     for method in ("l1", "l2")
    ... }
    >>> found = fxprune.study.similarity(plans)
    >>> found.correlation.shape
    (2, 2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fxprune.errors import InputError, PlanError
from fxprune.io.files import check_writable
from fxprune.io.text import table
from fxprune.reports.plots import new_figure, save_figure
from fxprune.selection.plan import PruningPlan

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Similarity:
    """How alike the structures of plans are.

    ``names``: of the plans. ``layers``: in graph order; layers that share their channels (a residual stream) have one
    width and count once, under the name of the first. ``kept [plans, layers]``: kept / original channels, in (0, 1].
    ``correlation [plans, plans]``: Pearson's coefficient of the rows of ``kept``, in [-1, 1].
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    kept: Floats
    correlation: Floats

    @classmethod
    def of(cls, names: Sequence[str], layers: Sequence[str], kept: Floats) -> Similarity:
        """From the kept ratios ``[plans, layers]``.

        Raises:
            InputError: fewer than two plans, or one that keeps the same share of every layer.
        """
        if len(names) < 2:
            raise InputError(f"{len(names)} plans cannot be compared: pass at least two, made for the same model.")
        for name, row in zip(names, kept, strict=True):
            if np.ptp(row) == 0:
                raise InputError(
                    f"The plan {name!r} keeps {row[0]:.0%} of every layer, so its correlation with others is "
                    "undefined. Leave it out."
                )
        return cls(tuple(names), tuple(layers), kept, np.asarray(np.corrcoef(kept), dtype=np.float64))

    def __str__(self) -> str:
        head = ("plan", *(str(number) for number in range(1, len(self.names) + 1)), "mean kept", "least", "most")
        rows = [
            (
                f"{number} {name}",
                *(f"{r:.2f}" for r in self.correlation[number - 1]),
                *(f"{share:.0%}" for share in (kept.mean(), kept.min(), kept.max())),
            )
            for number, (name, kept) in enumerate(zip(self.names, self.kept, strict=True), start=1)
        ]
        return "\n".join([f"correlation of the kept ratios of {len(self.layers)} layers", "", *table([head, *rows])])

    def plot(self, path: str | Path | None = None) -> Any:
        """A heat map of ``correlation``, like figure 2 of Pruning from Scratch (Wang et al., AAAI 2020).

        Args:
            path: where to write it; the ending chooses the format.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            InputError: matplotlib is missing, or the path cannot be written.
        """
        if path is not None:
            check_writable(path)
        side = 2.5 + 0.45 * len(self.names)
        figure = new_figure((side + 0.8, side))
        axes = figure.add_subplot()
        image = axes.imshow(self.correlation, cmap="viridis", vmax=1.0)
        places = range(len(self.names))
        axes.set_xticks(places, self.names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(places, self.names)
        for row in places:
            for column in places:
                value = self.correlation[row, column]
                dark = value < (self.correlation.min() + 1) / 2
                color = "white" if dark else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7)
        figure.colorbar(image, label="correlation of kept ratios")
        if path is not None:
            save_figure(figure, path)
        return figure


def similarity(plans: Mapping[str, PruningPlan] | Sequence[PruningPlan]) -> Similarity:
    """The structure-similarity study of Pruning from Scratch (Wang et al., AAAI 2020, figure 2).

    Every plan is a vector of the kept share of every layer; two structures are as alike as their vectors correlate.
    A layer that one of the plans was not allowed to cut (``ignore=``) counts as whole in that plan.

    Args:
        plans: of one model, by name; unnamed ones are called ``plan 1``, ``plan 2``, ...

    Raises:
        InputError: fewer than two plans, something else than plans, or a plan that keeps the same share of every layer
            (such as one that cuts nothing), whose correlation is undefined.
        PlanError: the plans are of different models, or were made with other attention modes.
    """
    if isinstance(plans, (str, bytes, PruningPlan)) or not isinstance(plans, (Mapping, Sequence)):
        raise InputError(f"plans is a {type(plans).__name__}: pass plans by name, or a list of them.")
    named = dict(plans) if isinstance(plans, Mapping) else {f"plan {n}": plan for n, plan in enumerate(plans, start=1)}
    for name, plan in named.items():
        if not isinstance(plan, PruningPlan):
            raise InputError(f"{name!r} is a {type(plan).__name__}, no PruningPlan: pass report.plan.")
        plan.check()
    sizes: dict[str, int] = {}
    first = next(iter(named), "")
    for name, plan in named.items():
        _check_same_model(first, named[first], name, plan)
        for layer, (_, before) in plan.widths.items():
            if sizes.setdefault(layer, before) != before:
                raise PlanError(
                    f"{layer} has {sizes[layer]} channels that may be cut in one plan and {before} in {name!r}: the "
                    "plans must be made with the same ignore= and example inputs."
                )
    ratios = {name: {layer: after / before for layer, (after, before) in p.widths.items()} for name, p in named.items()}
    kept = np.array([[row.get(layer, 1.0) for layer in sizes] for row in ratios.values()])
    return Similarity.of([*named], [*sizes], kept)


def _check_same_model(first: str, reference: PruningPlan, name: str, plan: PruningPlan) -> None:
    if plan.fingerprint != reference.fingerprint:
        raise PlanError(
            f"{first!r} and {name!r} are plans of different models: parameter names or shapes differ. Compare plans "
            "of one architecture."
        )
    if plan.attention != reference.attention:
        raise PlanError(
            f"{first!r} was made with attention={reference.attention!r}, {name!r} with {plan.attention!r}. Make all "
            "plans with the same."
        )
    if not plan.widths:
        raise PlanError(f"{name!r} does not say how wide its layers were: make it with prune or PruningPlan.of.")
