"""Lines of tables about a network, as plain data: what a report lists, a page shows and a plot draws."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One layer. ``before``, ``after``: shape of its weight. ``locked``: why its outputs stay, or ''.

    ``width``: its output channels, dense and pruned.
    """

    name: str
    kind: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    locked: str
    source: str
    width: tuple[int, int]


@dataclass(frozen=True)
class GroupRow:
    """Channels that live or die together. ``before``, ``after``: how many, all blocks together.

    ``exact``: cutting them changes no statistic. ``why``: what keeps them all, or '' where some may go.
    ``members``: every (parameter, dim, whether its layer reads them there rather than makes or passes them on).
    """

    name: str
    before: int
    after: int
    blocks: int
    exact: bool
    why: str
    members: tuple[tuple[str, int, bool], ...]


def row_of(parameter: str) -> str:
    """The name of a parameter's layer in a ``Row``."""
    return parameter.removesuffix(".weight")
