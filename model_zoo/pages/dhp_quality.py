"""Which methods DHP beats, and which beat it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from model_zoo.comparison import (
    at,
    by_seed,
)
from model_zoo.measuring.dhp_quality import METHODS, NETWORKS, RATIOS
from model_zoo.records import Record, mean_and_error


def against(network: str, records: Sequence[Record]) -> list[str]:
    """Of every ratio which methods DHP beats, and which beat it, seed by seed; how its searches ended."""
    kind, lines = NETWORKS[network].kind, []
    for ratio in RATIOS:
        of = at(records, ratio)
        ours = by_seed(kind, [r for r in of if r.figures["method"] == "dhp"])
        ahead: list[str] = []
        behind: list[str] = []
        for name in METHODS:
            theirs = by_seed(kind, [r for r in of if r.figures["method"] == name])
            pairs = [ours[seed] - found for seed, found in theirs.items() if seed in ours]
            if name != "dhp" and pairs:
                better = mean(pairs) > 0
                by = mean_and_error([value if better else -value for value in pairs])
                (ahead if better else behind).append(f"{name} by {by}")
        sides = [f"{side} {', '.join(names)}" for side, names in (("beats", ahead), ("loses to", behind)) if names]
        if sides:
            lines.append(f"- {ratio:.0%} of the MACs, seed by seed: dhp {'; it '.join(sides)}.")
    ends = [r.figures["search"] for r in records if "search" in r.figures]
    if ends:
        reached = sum(end.startswith("search stopped") for end in ends)
        lines.append(f"- {reached} of {len(ends)} searches of dhp ended because the budget was met.")
    return lines
