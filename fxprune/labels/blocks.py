"""Blocks: channels that must keep equal counts.

A family is a matrix of rows that must keep equal counts: the heads of an attention layer, the groups of a grouped
convolution. Channels that occur in the same rows form a block; the blocks of a family must tile its rows evenly. Blocks
of several families that are the same unite them; a family whose blocks are unions of another's follows from it. What
does not fit is *realigned*: position j of every row becomes one channel, and the propagation is run again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from fxprune.labels.classes import Classes, Ids, Reason, distinct_rows, same
from fxprune.labels.records import Family


@dataclass
class BlockSets:
    """``sets``: lists of blocks of class roots; the blocks of one set keep equal counts. Disjoint."""

    sets: list[list[Ids]] = field(default_factory=list)
    realigned: bool = False

    @classmethod
    def of(cls, classes: Classes, families: Sequence[Family]) -> BlockSets:
        """Combine families; what cannot be combined is joined in ``classes``."""
        result, blocks = cls(), _Blocks()
        candidates: list[tuple[list[Ids], Family]] = []
        for family in families:
            if family.optional:
                continue
            if classes.locked(family.rows).any():
                classes.lock(family.rows, family.reason)
                continue
            tiles = _tiles(family.rows)
            if tiles is None:
                result._realign(classes, family)
            else:
                candidates += [(tile, family) for tile in tiles]
        candidates.sort(key=lambda c: len(c[0][0]))
        for tile, family in candidates:
            if not blocks.take(tile):
                result._realign(classes, family)
        for family in families:
            if family.optional and not classes.locked(family.rows).any():
                for tile in _tiles(family.rows) or ():
                    blocks.take(tile)
        for block_set in blocks.sets():
            if len({len(b) for b in block_set}) == 1:
                result.sets.append(block_set)
            else:
                for block in block_set:
                    classes.lock(block, families[0].reason)
                result.realigned = True
        return result

    def _realign(self, classes: Classes, family: Family) -> None:
        classes.join(family.rows, family.rows[:1])
        self.realigned = True

    def translated(self, of_atom: Ids) -> list[list[Ids]]:
        """The sets in channel numbers, without classes that are no channels. ``of_atom``: the number, or -1."""
        result = []
        for block_set in self.sets:
            blocks = [np.sort(of_atom[block]) for block in block_set]
            if all((b >= 0).all() for b in blocks):
                result.append(blocks)
        return result


class _Blocks:
    """Blocks of class roots, disjoint, and which of them keep equal counts."""

    def __init__(self) -> None:
        self._blocks: list[Ids] = []
        self._block_of: dict[int, int] = {}  # class root -> its block
        self._alike = Classes()  # of blocks

    def take(self, tile: list[Ids]) -> bool:
        """The blocks of a tile keep equal counts; False where they do not fit those that are there."""
        known = [sorted({self._block_of.get(int(c), -1) for c in block}) for block in tile]
        sizes = [[len(self._blocks[i]) if i >= 0 else -1 for i in k] for k in known]
        if all(k == [-1] or size == [len(block)] for k, size, block in zip(known, sizes, tile, strict=True)):
            self._unite([self._add(block) if k == [-1] else k[0] for k, block in zip(known, tile, strict=True)])
            return True
        unions = all(-1 not in k and sum(size) == len(b) for k, size, b in zip(known, sizes, tile, strict=True))
        if not unions:
            return False
        if len({each for size in sizes for each in size}) == 1:  # of equally many equal blocks
            self._unite([i for k in known for i in k])
            return True
        alike = [np.sort(self._alike.find(np.array(k))).tolist() for k in known]
        return all(k == alike[0] for k in alike)  # of blocks that keep equal counts, row by row

    def _add(self, block: Ids) -> int:
        index = len(self._blocks)
        self._blocks.append(block)
        self._block_of.update((int(c), index) for c in block)
        self._alike.allocate(1)
        return index

    def _unite(self, indices: list[int]) -> None:
        self._alike.join(np.array(indices), np.array(indices[:1]))

    def sets(self) -> list[list[Ids]]:
        """The blocks, those together that keep equal counts."""
        grouped: dict[int, list[Ids]] = defaultdict(list)
        for root, block in zip(self._alike.find(np.arange(len(self._blocks))), self._blocks, strict=True):
            grouped[int(root)].append(block)
        return list(grouped.values())


def alike(one: Ids, other: Ids, node: str, reason: Reason, optional: bool = False) -> Iterator[Family]:
    """What keeps the rows of two dimensions equally long, ``[rows, n]`` each.

    Where a channel of one takes several positions of its row, as the pairs that a rotary embedding turns, the positions
    of the other are dealt out: of the first ones of all pairs as many stay as of the second ones.
    """
    lead, follow = (one, other) if _copies(one[0])[0].max() >= _copies(other[0])[0].max() else (other, one)
    structures = [_copies(row) for row in lead]
    often, which = structures[0]
    uniform = all(same(often, o) and same(which, w) for o, w in structures)
    if often.max() == 1 or not uniform or any(_copies(row)[0].max() > 1 for row in follow):
        yield Family(np.concatenate([one, other]), node, reason, optional=optional)
        return
    for copies in np.unique(often):
        places = [np.flatnonzero((often == copies) & (which == turn)) for turn in range(copies)]
        rows = np.concatenate([lead[:, places[0]], *(follow[:, p] for p in places)])
        yield Family(rows, node, reason, optional=optional)


def _copies(row: Ids) -> tuple[Ids, Ids]:
    """For every position: how many have its channel, and how many of these come before it."""
    _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    turn = np.empty(len(row), dtype=np.int64)
    turn[order] = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return counts[inverse], turn


def _tiles(rows: Ids) -> list[list[Ids]] | None:
    """Blocks of classes that occur in the same rows, as sets that tile the rows evenly; None if they do not.

    Classes that occur equally often in every row are free and left out.
    """
    classes, inverse = np.unique(rows, return_inverse=True)
    counts = np.zeros((len(classes), rows.shape[0]), dtype=np.int64)
    np.add.at(counts, (inverse.reshape(rows.shape), np.arange(rows.shape[0])[:, None]), 1)
    patterns, pattern_of = distinct_rows(counts)
    by_kind: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, pattern in enumerate(patterns):
        if (pattern == pattern[0]).all():
            continue
        by_kind[(int((pattern_of == index).sum()), int(pattern.max()))].append(index)
    tiles = []
    for indices in by_kind.values():
        total = patterns[indices].sum(0)
        if not (total == total[0]).all():
            return None
        tiles.append([classes[pattern_of == i] for i in indices])
    return tiles
