"""Families of rows that keep equal counts become sets of blocks."""

from __future__ import annotations

import numpy as np

from fxprune.labels.blocks import BlockSets
from fxprune.labels.classes import Classes, Reason
from fxprune.labels.records import Family

WHY = Reason("heads", "net.py:1 in forward")


def settled(atoms: int, *families: list[list[int]], locked: tuple[int, ...] = ()) -> tuple[BlockSets, Classes]:
    classes = Classes()
    classes.allocate(atoms)
    if locked:
        classes.lock(np.array(locked), Reason("output"))
    return BlockSets.of(classes, [Family(np.array(rows), "node", WHY) for rows in families]), classes


def sets_of(result: BlockSets) -> list[list[list[int]]]:
    return sorted(sorted(block.tolist() for block in blocks) for blocks in result.sets)


def test_rows_are_blocks() -> None:
    result, _ = settled(6, [[0, 1, 2], [3, 4, 5]])
    assert sets_of(result) == [[[0, 1, 2], [3, 4, 5]]]
    assert not result.realigned


def test_what_every_row_holds_is_free() -> None:
    result, _ = settled(5, [[0, 1, 2], [0, 3, 4]])
    assert sets_of(result) == [[[1, 2], [3, 4]]]


def test_a_block_that_two_families_share_unites_them() -> None:
    """Queries and keys of a head are one block; keys of another family bring its blocks along."""
    result, _ = settled(12, [[0, 1], [2, 3]], [[2, 3], [4, 5]], [[6, 7, 8], [9, 10, 11]])
    assert sets_of(result) == [[[0, 1], [2, 3], [4, 5]], [[6, 7, 8], [9, 10, 11]]]


def test_unions_of_blocks_follow_from_the_blocks() -> None:
    result, _ = settled(8, [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]])
    assert sets_of(result) == [[[0, 1], [2, 3], [4, 5], [6, 7]]]
    assert not result.realigned


def test_unions_unite_the_sets_that_they_are_made_of() -> None:
    """Two heads each of queries and of values; queries and values fill two equal rows: all four heads are equal."""
    result, _ = settled(8, [[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert sets_of(result) == [[[0, 1], [2, 3], [4, 5], [6, 7]]]
    assert not result.realigned


def test_what_does_not_fit_is_aligned() -> None:
    """Blocks across blocks: position j of every row becomes one channel."""
    result, classes = settled(4, [[0, 1], [2, 3]], [[0, 2], [1, 3]])
    assert result.realigned
    assert classes.find(np.arange(4)).tolist() == [0, 0, 2, 2]


def test_channels_that_every_two_rows_share_are_blocks_of_one() -> None:
    result, _ = settled(3, [[0, 1], [0, 2], [1, 2]])
    assert sets_of(result) == [[[0], [1], [2]]]


def test_rows_of_different_structure_are_aligned() -> None:
    result, classes = settled(3, [[0, 0], [1, 2]])
    assert result.realigned
    assert classes.find(np.arange(3)).tolist() == [0, 0, 0]


def test_a_family_with_a_locked_channel_stays_whole() -> None:
    result, classes = settled(4, [[0, 1], [2, 3]], locked=(3,))
    assert result.sets == []
    assert classes.locked(np.arange(4)).all()
    assert classes.locks[-1][1] == WHY


def test_translation_into_channel_numbers() -> None:
    result, _ = settled(6, [[0, 1, 2], [3, 4, 5]])
    number = np.array([7, 5, 6, 2, 1, 0])
    assert sorted(block.tolist() for block in result.translated(number)[0]) == [[0, 1, 2], [5, 6, 7]]
    number[4] = -1  # a size that no parameter owns is no channel
    assert result.translated(number) == []
