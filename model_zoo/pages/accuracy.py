"""Which method is ahead, seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from model_zoo.comparison import (
    at,
    by_seed,
)
from model_zoo.measuring.accuracy import BASELINES, METHODS, NETWORKS, RATIOS
from model_zoo.records import Record, mean_and_error


def ahead(network: str, records: Sequence[Record]) -> list[str]:
    """Of every ratio the best method of ours and the best of the peer, by their means; baselines are nobody's."""
    lines = []
    for ratio in RATIOS:
        found: dict[bool, dict[str, dict[int, float]]] = {True: {}, False: {}}
        for method, how in METHODS.items():
            runs = [r for r in at(records, ratio) if r.figures["method"] == method]
            reached = by_seed(NETWORKS[network].kind, runs)
            if runs and len(reached) == len(runs) and method not in BASELINES:
                found[how.peer][method] = reached
        if all(found.values()):
            (our, ours), (their, theirs) = (best(found[False]), best(found[True]))
            pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            lines.append(
                f"- {ratio:.0%} of the MACs: the best of {len(found[False])} methods of fxprune is {our}, the best of "
                f"{len(found[True])} of Torch-Pruning {their.removeprefix('Torch-Pruning ')}. Seed by seed it is ahead "
                f"by {mean_and_error(pairs)} points. The more methods, the luckier the best."
            )
    return lines


def best(methods: dict[str, dict[int, float]]) -> tuple[str, dict[int, float]]:
    """The method with the largest mean over seeds."""
    return max(methods.items(), key=lambda item: statistics.mean(item[1].values()))
