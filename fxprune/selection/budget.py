"""Select: scores and a budget give a plan.

Every group's slots are ranked; ``round_to`` packs them into units. Units are removed in ascending order of score
(``scope="global"``), or at the same pace in every group (``"uniform"``), up to the first prefix that meets the budget,
found by bisection. What the last step removed too much is put back, best first, while the budget still holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fxprune.arguments import check_ratio
from fxprune.errors import BudgetError, InputError, ModelError
from fxprune.groups.channels import ChannelGraph, ChannelGroup
from fxprune.groups.cost import Keep
from fxprune.labels.classes import Ids
from fxprune.methods.state import Scores
from fxprune.options import Scope as Scope  # noqa: PLC0414 - for those who read it here

_GONE = 1e200  # below all scores, and sums of it are numbers

Kind = Literal["flops", "params", "channels", "latency"]


@dataclass(frozen=True)
class Budget:
    """``ratio`` in (0, 1] of the dense model's MACs, parameters or latency, or of the prunable channels.

    ``whole``: what it is a ratio of, where that is another model's. ``cost``: of a choice of channels; MACs, parameters
    and channels are counted without.
    """

    kind: Kind
    ratio: float
    whole: int | None = None
    cost: Callable[[Keep], int] | None = None

    @classmethod
    def of(cls, **ratios: float | None) -> Budget:
        """The one budget that was given.

        Raises:
            InputError: none, several, or a number outside (0, 1].
        """
        given: dict[str, Any] = {kind: ratio for kind, ratio in ratios.items() if ratio is not None}
        names = ", ".join(f"{kind}=" for kind in ratios)
        if not given:
            raise InputError(f"No budget: pass one of {names} a ratio of the dense model in (0, 1], such as flops=0.5.")
        if len(given) > 1:
            both = " and ".join(f"{kind}={ratio}" for kind, ratio in given.items())
            raise InputError(f"More than one budget: {both}. Pass only one of {names}.")
        ((kind, ratio),) = given.items()
        return cls(kind, check_ratio(kind, ratio))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Selection:
    """What stays.

    ``keep``: per channel. ``locked``: why prunable groups are locked all the same, by name of the group. ``guarded``:
    groups that would have lost more by their scores, had not ``min_channels`` of a tensor been left. ``round_to``: of
    whose multiples the choice is.
    """

    keep: Keep
    locked: Mapping[str, str]
    guarded: tuple[str, ...] = ()
    round_to: int = 1


@dataclass(frozen=True)
class _Units:
    """Channels that are removed together, as parallel arrays ``[units]``.

    ``depth``: the share of the group's slots that go before, in [0, 1). ``channels[start : start + size]`` are a
    unit's. The one at which ``min_channels`` ends a group has none: it takes part in the ranking only.
    """

    group: Ids
    place: Ids
    score: npt.NDArray[np.float64]
    depth: npt.NDArray[np.float64]
    start: Ids
    size: Ids
    channels: Ids

    def __len__(self) -> int:
        return len(self.group)

    def ranked(self) -> _Units:
        """In ascending order of score; equal ones from the start of their group, then by group and place."""
        return self.take(np.lexsort((self.place, self.group, self.depth, self.score)))

    def take(self, index: Ids) -> _Units:
        return _Units(
            self.group[index], self.place[index], self.score[index], self.depth[index], self.start[index],
            self.size[index], self.channels,
        )  # fmt: skip

    def in_order(self) -> Ids:
        """The channels of the units, one unit after the other."""
        ends = np.cumsum(self.size)
        order: Ids = self.channels[np.repeat(self.start - (ends - self.size), self.size) + np.arange(self.size.sum())]
        return order


def select(
    graph: ChannelGraph,
    scores: Sequence[Scores | None],
    budget: Budget,
    *,
    scope: Scope = "global",
    exact: bool = False,
    round_to: int = 1,
    min_channels: int = 1,
    max_ratio: Mapping[str, float] | None = None,
    threshold: float | None = None,
    gone: Keep | None = None,
    settled: Keep | None = None,
) -> Selection:
    """Choose the channels that stay.

    Args:
        graph: of the model.
        scores: for every group of ``graph.groups`` an array ``[blocks, size]``, or None to leave the group alone.
        budget: to be met.
        scope: rank all channels together, prune every group by the same share, or rank groups of the same structure
            together and prune every structure by the same share (Fang et al. 2024).
        exact: leave approximate groups alone.
        round_to: kept channels of every group are a multiple of this (unless the group stays whole).
        min_channels: at least so many stay along every dimension of every tensor.
        max_ratio: name pattern of parameters or layers -> the largest share of the channels they make that may go.
        threshold: cut all scores up to this one, as far as the other arguments allow, instead of meeting the budget.
        gone: channels that go in any case.
        settled: channels of which no others go.

    Raises:
        InputError: a pattern that fits nothing.
        ModelError: nothing may be cut.
        BudgetError: no allowed choice meets the budget.
    """
    locked = _locked(graph, scores, exact, budget, settled)
    free = [i for i, g in enumerate(graph.groups) if g.locked is None and g.name not in locked]
    if not free:
        raise ModelError(_nothing_to_prune(graph, locked))
    ranked = {i: _Ranking(graph.groups[i], scores[i], gone) for i in free}
    limits = _limits(graph, max_ratio or {})

    def allowed(step: int, least: int, limits: Mapping[int, float]) -> _Units:
        return _units(graph, ranked, _protected(graph, ranked, least), step, scope, limits)

    units = allowed(round_to, min_channels, limits)
    if scope == "isomorphic":
        units = _within_structures(graph, units)
    prunable = int(sum(graph.groups[i].channels.size for i in free))
    free_channels = np.concatenate([graph.groups[i].channels.reshape(-1) for i in free])
    cost = _cost(graph, budget, free_channels)
    everything = graph.everything()
    whole = budget.whole or (prunable if budget.kind == "channels" else cost(everything))
    if gone is not None:
        everything &= ~gone
    limit = math.floor(budget.ratio * whole + 1e-9)
    units = units.ranked()
    going = units.in_order()
    ends = np.concatenate([[0], np.cumsum(units.size)])

    def keep_after(count: int) -> Keep:
        keep: Keep = everything.copy()
        keep[going[: ends[count]]] = False
        return graph.closed(keep)

    def guarded(count: int) -> tuple[str, ...]:
        return tuple(graph.groups[group].name for group in units.group[:count][units.size[:count] == 0])

    if threshold is not None:
        below = int(np.count_nonzero(units.score <= threshold))
        return Selection(keep_after(below), locked, guarded(below))
    if cost(keep_after(len(units))) > limit:
        floor = keep_after(len(units))
        relaxed = {
            f"round_to={round_to}": allowed(1, min_channels, limits),
            f"min_channels={min_channels}": allowed(round_to, 1, limits),
            "max_ratio=": allowed(round_to, min_channels, {}),
        }
        without = {asked: everything.copy() for asked in relaxed}
        for asked, more in relaxed.items():
            without[asked][more.in_order()] = False
        raise BudgetError(_unreachable(graph, budget, floor, cost, whole, locked, without), floor)
    low, high = 0, len(units)
    while low < high:
        middle = (low + high) // 2
        if cost(keep_after(middle)) <= limit:
            high = middle
        else:
            low = middle + 1
    put_back = graph.closed(_put_back(units.take(np.arange(low)), keep_after(low), cost, limit))
    return Selection(put_back & everything, locked, guarded(low))


def remaining(graph: ChannelGraph, budget: Budget, keep: Keep) -> float:
    """What a choice of channels leaves, as a ratio in the budget's own measure."""
    free = np.concatenate([np.empty(0, dtype=np.int64), *(g.channels.reshape(-1) for g in graph.prunable)])
    cost = _cost(graph, budget, free)
    return cost(keep) / max(budget.whole or cost(graph.everything()), 1)


_NO_MACS = "as many are chosen as before, so no MACs go: params= counts them"


def _locked(
    graph: ChannelGraph, scores: Sequence[Scores | None], exact: bool, budget: Budget, settled: Keep | None = None
) -> dict[str, str]:
    locked = {}
    for group, score in zip(graph.groups, scores, strict=True):
        if group.locked is not None:
            continue
        if settled is not None and settled[group.channels].any():
            locked[group.name] = "its width was chosen before, for layers choose what they read of it"
        elif exact and not group.exact:
            locked[group.name] = f"not exact: {group.approximate}"
        elif budget.kind in ("flops", "latency") and int(group.channels[0, 0]) in graph.routed:
            locked[group.name] = _NO_MACS
        elif score is None:
            locked[group.name] = "the method gives these channels no score"
    return locked


class _Ranking:
    """A group's channels, every block in ascending order of score; slot j is the j-th of every block."""

    def __init__(self, group: ChannelGroup, scores: Scores | None, gone: Keep | None = None):
        assert scores is not None
        if not np.isfinite(scores).all():
            raise ModelError(f"The scores of {group.name} are not finite. Are there NaN or inf in the weights?")
        if gone is not None and gone[group.channels].any():
            scores = np.where(gone[group.channels], -_GONE, scores)
        order = np.argsort(scores, axis=1, kind="stable")
        self.channels = np.take_along_axis(group.channels, order, axis=1)  # [blocks, slots]
        self.scores = np.take_along_axis(scores, order, axis=1)  # [blocks, slots]


def _protected(graph: ChannelGraph, ranked: Mapping[int, _Ranking], min_channels: int) -> Keep:
    """The best ``min_channels`` along every dimension of every tensor, and as many as are chosen of some.

    Of equal ones those that are ranked last.
    """
    score = np.full(graph.channel_count, np.inf)
    slot = np.zeros(graph.channel_count, dtype=np.int64)
    for ranking in ranked.values():
        score[ranking.channels] = ranking.scores
        slot[ranking.channels] = np.arange(ranking.scores.shape[1])
    protected = np.zeros(graph.channel_count, dtype=bool)
    rows = [(extent, min_channels) for extent in graph.extents]
    for extent, least in [*rows, *((floor.channels, floor.least) for floor in graph.floors)]:
        values = score[extent]
        if np.count_nonzero(np.isinf(values)) < least:
            best = np.lexsort((-slot[extent], -values))[:least]
            protected[extent[best]] = True
    return protected


def _limits(graph: ChannelGraph, max_ratio: Mapping[str, float]) -> dict[int, float]:
    """Group -> the largest share of its slots that may go, the smallest of all patterns that fit.

    A pattern speaks of what layers make or pass on, not of what they read.
    """
    limits: dict[int, float] = {}
    for pattern, ratio in max_ratio.items():
        fits = False
        for index, group in enumerate(graph.groups):
            own = [m.name for m in group.members if not m.read]
            names = {*own, *(name.rpartition(".")[0] for name in own)}
            if any(fnmatchcase(name, pattern) for name in names):
                limits[index] = min(ratio, limits.get(index, 1.0))
                fits = True
        if not fits:
            raise InputError(
                f"max_ratio has the pattern {pattern!r}, which fits no layer that makes channels or passes them on."
            )
    return limits


def _within_structures(graph: ChannelGraph, units: _Units) -> _Units:
    """The units scored by the share of channels of the same structure that go before them."""
    known: dict[Any, int] = {}
    structure = np.array([known.setdefault(graph.structure(group), len(known)) for group in graph.groups])
    ranked = units.ranked()
    score = np.empty(len(ranked))
    for index in range(len(known)):
        same = np.flatnonzero(structure[ranked.group] == index)
        sizes = ranked.size[same].astype(np.float64)
        score[same] = (np.cumsum(sizes) - sizes / 2) / max(sizes.sum(), 1)
    return replace(ranked, score=score)


def _units(
    graph: ChannelGraph,
    ranked: Mapping[int, _Ranking],
    protected: Keep,
    round_to: int,
    scope: Scope,
    limits: Mapping[int, float],
) -> _Units:
    """What may be removed: units of equal size along the ranking of every group, up to the first protected channel.

    Where that channel ends a group, a unit without channels stands for what cannot go.
    """
    parts: list[tuple[Any, ...]] = []
    base = 0
    for index, ranking in ranked.items():
        blocks, slots = ranking.channels.shape
        routed = int(ranking.channels[0, 0]) in graph.routed
        step = 1 if routed else round_to // math.gcd(round_to, blocks)
        edges = np.arange(slots % step, slots + 1, step)
        edges = edges if edges[0] == 0 else np.concatenate([[0], edges])
        most = min(limits.get(index, 1.0) * slots + 1e-9, slots - graph.groups[index].least)
        count = int(np.count_nonzero(edges[1:] <= most))
        stays = np.flatnonzero(protected[ranking.channels].any(0))
        ends = len(stays) > 0 and count > 0 and edges[count] > stays[0]
        if ends:
            count = int(np.searchsorted(edges, stays[0], side="right"))
        a, b = edges[:count], edges[1 : count + 1]
        if scope == "uniform":
            score = (a + b) / (2 * slots)
        else:
            sums = np.add.reduceat(ranking.scores.mean(0)[: b[-1]], a) if count else np.empty(0)
            score = sums / (b - a)
        size = (b - a) * blocks
        if ends:
            size[-1] = 0
        parts.append((np.full(count, index), np.arange(count), score, a / slots, base + a * blocks, size))
        base += blocks * slots
    group, place, scores, depth, start, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
    slot_by_slot = [ranking.channels.T.reshape(-1) for ranking in ranked.values()]
    return _Units(group, place, scores, depth, start, sizes, np.concatenate(slot_by_slot))


def _cost(graph: ChannelGraph, budget: Budget, free: Ids) -> Callable[[Keep], int]:
    if budget.cost is not None:
        return budget.cost
    if budget.kind == "channels":
        return lambda keep: int(keep[free].sum())
    return graph.cost.macs if budget.kind == "flops" else graph.cost.params


def _put_back(removed: _Units, keep: Keep, cost: Callable[[Keep], int], limit: int) -> Keep:
    """Put back the last removed units of groups while the budget holds, best first.

    As many together as fit; the group of the first one that does not fit is left as it is, and the others go on.
    """
    taken = removed.take(np.flatnonzero(removed.size))
    left = taken.take(np.lexsort((-taken.place, taken.group, -taken.score)))

    def with_first(count: int) -> Keep:
        trial: Keep = keep.copy()
        trial[left.take(np.arange(count)).in_order()] = True
        return trial

    while len(left) and limit - cost(keep) > limit // 2000:
        good, bad = 0, 1  # so many fit, so many do not
        while bad <= len(left) and cost(with_first(bad)) <= limit:
            good, bad = bad, 2 * bad
        bad = min(bad, len(left) + 1)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if cost(with_first(middle)) <= limit else (good, middle)
        keep = with_first(good)
        rest = np.arange(good + 1, len(left))
        full = left.group[good] if good < len(left) else -1
        left = left.take(rest[left.group[rest] != full])
    return keep


def _nothing_to_prune(graph: ChannelGraph, locked: Mapping[str, str]) -> str:
    reasons = [f"{g.name}: {g.locked}" for g in graph.groups if g.locked] + [f"{n}: {why}" for n, why in locked.items()]
    if not reasons:
        return "The model has no prunable channels: it has no convolution or linear layer."
    shown = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
    return f"The model has no prunable channels. What holds them: {shown}."


def _unreachable(
    graph: ChannelGraph, budget: Budget, floor: Keep, cost: Callable[[Keep], int], whole: int,
    locked: Mapping[str, str], without_asked: Mapping[str, Keep],
) -> str:  # fmt: skip
    """``without_asked``: what was asked for -> the floor if it were not."""
    least = cost(floor)
    reachable = math.ceil(least / whole * 10000) / 10000
    held = [(least - cost(keep), asked) for asked, keep in without_asked.items()]
    for group in graph.groups:
        why = str(group.locked) if group.locked else locked.get(group.name)
        if why is None or budget.kind == "channels":
            continue
        without = floor.copy()
        without[group.channels] = False
        held.append((least - cost(without), f"{group.name} ({why})"))
    for few in graph.floors:
        left = few.channels[floor[few.channels]]
        if len(left) == few.least and budget.kind != "channels":
            without = floor.copy()
            without[left] = False
            name = graph.groups[graph.group_of[left[0]]].name
            held.append((least - cost(without), f"{name} ({few.reason})"))
    held.sort(key=lambda h: (-h[0], h[1]))
    names = "; ".join(text for saved, text in held[:4] if saved > 0) or "at least one channel of every layer must stay"
    return (
        f"{budget.kind}={budget.ratio:g} cannot be reached: the smallest reachable ratio is {reachable:.4f}. "
        f"It is held up by: {names}."
    )
