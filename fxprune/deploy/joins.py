"""Joins that are freed: layers choose what they read of a stream, where by the table of kernels that pays.

Where branches are added up, all that read the sum have to keep the same channels. A copy of some of them, a *choice*,
lets a layer drop channels that others need (Wan et al. 2023, UPSCALE). First the streams are cut, as without choices,
to one width after the other between that of the budget and the whole; at each the rest of the budget is met with every
layer free to choose, those of which the choice saves less than it takes are tied again, and what keeps most of the
scores is taken, if that is more than with the same streams and no choice, and more than without all this. Scores are
compared on one graph: there a plan without choices is one in which layers read all of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxprune.deploy.latency import Clock
from fxprune.errors import ModelError
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.labels.classes import Ids
from fxprune.methods.state import Scores
from fxprune.options import LatencyBudget
from fxprune.pipeline import Cut, Dense, choose, joined
from fxprune.rewriting.selections import CHOICE, readers_of_joins

_WIDER = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0)  # of the way from the budget to the whole: where streams are cut


@dataclass(frozen=True)
class Freed:
    """A model in which some layers choose, and what is settled of its channels.

    ``wide``: the graph in which all layers choose that can, ``scores``: of its channels.
    """

    dense: Dense
    cut: Cut
    wide: ChannelGraph
    scores: Sequence[Scores | None]

    def share(self, graph: ChannelGraph, keep: Keep) -> float:
        """The share of the scores that a choice of channels keeps, of ``graph``, in which some choose or none does."""
        return kept_share(self.wide, self.scores, keep[twins_of(self.wide, graph)])


def freed(
    dense: Dense,
    budget: LatencyBudget,
    options: Cut,
    scored: Callable[[Dense, Cut], Sequence[Scores | None]],
    plain: Keep | None = None,
) -> Freed | None:
    """The model with choices for the layers where they pay; None, where none does.

    Args:
        dense: without choices.
        budget: what is measured, and how.
        options: what may be cut.
        scored: the scores of a model with this cut.
        plain: the channels of a plan without choices that was measured to meet the budget; what is predicted for it is
            the budget then, and what it keeps of the scores is to be exceeded.

    Raises:
        ModelError: no layer reads the sum of branches.
        ExportError: see ``Clock``.
    """
    able = choosers(dense)
    wide = joined(dense, able)
    clock = Clock(wide, budget, options.round_to[0])
    twins = twins_of(wide.graph, dense.graph)
    if plain is not None:
        predicted = min(1.0, clock.cost(plain[twins]) / clock.cost(wide.graph.everything()))
        options = replace(options, budget=replace(options.budget, ratio=predicted))
    within = clock.within(options)
    tied = replace(within, budget=replace(within.budget, cost=lambda keep: clock.cost(keep[twins])))
    scores, tied_scores = scored(wide, within), scored(dense, tied)
    before = choose(dense.graph, tied_scores, tied)[0].keep if plain is None else plain
    best = kept_share(wide.graph, scores, before[twins])
    found: tuple[Sequence[str], Keep] | None = None
    ratio = options.budget.ratio
    for part in _WIDER:
        at = replace(tied, budget=replace(tied.budget, ratio=ratio + part * (1 - ratio)))
        streams, unreachable = choose(dense.graph, tied_scores, at)
        if unreachable is not None:
            continue

        def choosing(sites: Sequence[str], keep: Keep = streams.keep[twins]) -> tuple[Keep, float]:
            selection, unreachable = choose(wide.graph, scores, settled(within, wide.graph, sites, keep))
            share = kept_share(wide.graph, scores, selection.keep) if unreachable is None else 0.0
            return selection.keep, share

        sites, good = list[str](), able
        while sites != good:
            sites = good
            keep, share = choosing(sites)
            saved = savings(wide.graph, clock.cost, sites, keep)
            good = [site for site in sites if saved[site] > 0]
        if sites and share > max(best, choosing([])[1]):
            best, found = share, (sites, streams.keep)
    if found is None:
        return None
    chosen, streams_of = found
    final = joined(dense, chosen)
    cut = settled(options, final.graph, chosen, streams_of[twins_of(final.graph, dense.graph)])
    return Freed(final, cut, wide.graph, scores)


def choosers(dense: Dense) -> list[str]:
    """The layers that can choose.

    Raises:
        ModelError: there is none.
    """
    found = readers_of_joins(dense.module, dense.graph)
    if not found:
        raise ModelError(
            "joins=True: no layer reads, along dim 1 and with a weight of its own, channels that may be cut and that "
            "several layers add up. Leave joins= out."
        )
    return found


def settled(options: Cut, graph: ChannelGraph, sites: Sequence[str], keep: Keep) -> Cut:
    """The options with all streams, and what other layers than ``sites`` read of them, as ``keep`` has them."""
    reads, streams = graph.follows.T
    same = np.zeros(len(graph.groups), dtype=bool)
    same[graph.group_of[streams]] = same[graph.group_of[reads]] = True
    for site in sites:
        same[graph.group_of[_entries(graph, site)]] = False
    known = same[graph.group_of]
    gone = np.zeros(graph.channel_count, dtype=bool)
    gone[reads] = ~keep[streams]
    gone[known] = ~keep[known]
    return replace(options, gone=gone, settled=known)


def savings(graph: ChannelGraph, cost: Callable[[Keep], int], sites: Sequence[str], keep: Keep) -> dict[str, int]:
    """Layer -> predicted nanoseconds that its choice saves, less what it takes itself."""
    reads, streams = graph.follows.T
    of_stream = np.zeros(graph.channel_count, dtype=np.int64)
    of_stream[reads] = streams
    now, found = cost(keep), {}
    for site in sites:
        all_of_it, entries = keep.copy(), _entries(graph, site)
        all_of_it[entries] = keep[of_stream[entries]]
        found[site] = cost(all_of_it) - now
    return found


def kept_share(graph: ChannelGraph, scores: Sequence[Scores | None], keep: Keep) -> float:
    """The share of all scores that stays."""
    pairs = [(s, keep[g.channels]) for g, s in zip(graph.groups, scores, strict=True) if s is not None]
    return float(sum(s[stays].sum() for s, stays in pairs)) / max(float(sum(s.sum() for s, _ in pairs)), 1e-300)


def twins_of(joined: ChannelGraph, tied: ChannelGraph) -> Ids:
    """For every channel of a graph with choices that of a graph with fewer of them, or with none."""
    twins = np.zeros(joined.channel_count, dtype=np.int64)
    for parameter in joined.parameters:
        known = tied.by_name.get(parameter.name)
        for factor in parameter.labels if known is not None else ():
            other = next((f for f in known.labels if f.dim == factor.dim), None) if known is not None else None
            if other is not None:
                twins[factor.ids.reshape(-1)] = np.broadcast_to(other.ids, factor.ids.shape).reshape(-1)
    return twins


def told(graph: ChannelGraph, cost: Callable[[Keep], int], sites: Sequence[str], keep: Keep) -> str:
    """Which layers choose, how much, and what that is predicted to save."""
    saved, reads = savings(graph, cost, sites, keep), dict(graph.follows.tolist())
    parts = []
    for site in sites:
        entries = _entries(graph, site)
        stream = [reads[int(entry)] for entry in entries]
        parts.append(f"{site} {keep[entries].sum()} of {keep[stream].sum()} ({saved[site] / 1e6:.3f} ms)")
    return f"layers choose what they read of a stream, which is predicted to save: {', '.join(parts)}"


def _entries(graph: ChannelGraph, site: str) -> Ids:
    return graph.by_name[f"{site}_{CHOICE}"].labels[0].ids.reshape(-1)
