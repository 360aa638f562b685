"""Blocks: channels that must keep equal counts.

A family is a matrix of rows that must keep equal counts: the heads of an attention layer, the groups of a grouped
convolution. Channels that occur in the same rows form a block; the blocks of a family must tile its rows evenly. Blocks
of several families that are the same unite them; a family whose blocks are unions of another's follows from it. What
does not fit is *realigned*: position j of every row becomes one channel, and the propagation is run again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fxprune.labels.classes import Classes, Ids, distinct_rows
from fxprune.labels.records import Family


@dataclass
class BlockSets:
    """``sets``: lists of blocks of class roots; the blocks of one set keep equal counts. Disjoint."""

    sets: list[list[Ids]] = field(default_factory=list)
    realigned: bool = False

    @classmethod
    def of(cls, classes: Classes, families: Sequence[Family]) -> BlockSets:
        """Combine families; what cannot be combined is joined in ``classes``."""
        result = cls()
        block_of: dict[int, int] = {}
        blocks: list[Ids] = []
        parent: list[int] = []

        def root(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        candidates: list[tuple[list[Ids], Family]] = []
        for family in families:
            locked = classes.locked(family.rows)
            if locked.any():
                classes.lock(family.rows, family.reason)
                continue
            tiles = _tiles(family.rows)
            if tiles is None:
                result._realign(classes, family)
            else:
                candidates += [(tile, family) for tile in tiles]
        candidates.sort(key=lambda c: len(c[0][0]))
        for tile, family in candidates:
            known = [sorted({block_of.get(int(c), -1) for c in block}) for block in tile]
            if all(k == [-1] for k in known):
                fresh = []
                for block in tile:
                    fresh.append(len(blocks))
                    parent.append(len(blocks))
                    blocks.append(block)
                    block_of.update((int(c), fresh[-1]) for c in block)
                for i in fresh[1:]:
                    parent[root(i)] = root(fresh[0])
                continue
            whole = all(
                -1 not in k and sum(len(blocks[i]) for i in k) == len(b) for k, b in zip(known, tile, strict=True)
            )
            fresh_or_same = all(k == [-1] or (len(k) == 1 and k[0] >= 0 and len(blocks[k[0]]) == len(b))
                                for k, b in zip(known, tile, strict=True))  # fmt: skip
            if fresh_or_same:
                indices = []
                for k, block in zip(known, tile, strict=True):
                    if k == [-1]:
                        parent.append(len(blocks))
                        blocks.append(block)
                        block_of.update((int(c), len(blocks) - 1) for c in block)
                        indices.append(len(blocks) - 1)
                    else:
                        indices.append(k[0])
                for i in indices[1:]:
                    parent[root(i)] = root(indices[0])
            elif whole and len({len(blocks[i]) for k in known for i in k}) == 1:  # unions of equally many equal blocks
                first = known[0][0]
                for i in (i for k in known for i in k):
                    parent[root(i)] = root(first)
            else:
                result._realign(classes, family)
        grouped: dict[int, list[Ids]] = defaultdict(list)
        for index, block in enumerate(blocks):
            grouped[root(index)].append(block)
        for block_set in grouped.values():
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

    def translated(self, number: Ids, roots: Ids) -> list[list[Ids]]:
        """The sets in channel numbers, without classes that are no channels."""
        result = []
        for block_set in self.sets:
            blocks = [np.sort(number[roots[block]]) for block in block_set]
            if all((b >= 0).all() for b in blocks):
                result.append(blocks)
        return result


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
