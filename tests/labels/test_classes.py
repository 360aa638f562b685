"""The union-find over atoms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.labels.classes import Classes, Reason


def test_the_root_is_the_smallest_atom_whatever_the_order() -> None:
    for pairs in ([(5, 3), (3, 1), (0, 5)], [(0, 5), (3, 1), (5, 3)], [(1, 3), (5, 0), (3, 5)]):
        classes = Classes()
        classes.allocate(6)
        for a, b in pairs:
            classes.join(np.array(a), np.array(b))
        assert classes.find(np.arange(6)).tolist() == [0, 0, 2, 0, 4, 0]


def test_join_broadcasts_position_by_position() -> None:
    classes = Classes()
    a, b = classes.allocate(6).reshape(2, 3), classes.allocate(3)
    classes.join(a, b)
    assert classes.find(a).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert classes.find(b).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="broadcast"):
        classes.join(np.arange(2), np.arange(3))


def test_atoms_are_numbered_on_and_start_alone() -> None:
    classes = Classes()
    first, second = classes.allocate(3), classes.allocate(2000)
    assert first.tolist() == [0, 1, 2]
    assert second[0] == 3
    assert len(classes) == 2003
    assert np.array_equal(classes.find(second), second)


def test_a_lock_spreads_over_the_class_before_and_after_joins() -> None:
    classes = Classes()
    classes.allocate(6)
    classes.join(np.array(0), np.array(1))
    classes.lock(np.array([1]), Reason("softmax", "net.py:3 in forward"))
    assert classes.locked(np.arange(4)).tolist() == [True, True, False, False]
    classes.join(np.array([2, 4]), np.array([0, 5]))  # a locked class joined from the other side
    assert classes.locked(np.arange(6)).tolist() == [True, True, True, False, False, False]
    assert str(classes.locks[0][1]) == "softmax (net.py:3 in forward)"
    assert str(Reason("softmax")) == "softmax"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30), st.sets(st.integers(0, 19)))
def test_classes_are_the_connected_components(pairs: list[tuple[int, int]], locked: set[int]) -> None:
    classes = Classes()
    classes.allocate(20)
    half = len(pairs) // 2
    for part in (pairs[:half], pairs[half:]):  # many at once, with a lock in between
        if part:
            classes.join(np.array([a for a, _ in part]), np.array([b for _, b in part]))
        if part is not pairs[half:] and locked:
            classes.lock(np.array(sorted(locked)), Reason("because"))
    component = list(range(20))
    for _ in range(20):
        for a, b in pairs:
            component[a] = component[b] = min(component[a], component[b])
    assert classes.find(np.arange(20)).tolist() == component
    held = {component[i] for i in locked}
    assert classes.locked(np.arange(20)).tolist() == [c in held for c in component]


def test_only_a_join_that_changes_something_gives_another_state() -> None:
    classes = Classes()
    atoms = classes.allocate(6)
    before = classes.state
    classes.join(atoms[:3], atoms[:3].copy())
    classes.lock(atoms[:1], Reason("test"))
    classes.allocate(3)
    assert classes.state is before
    classes.join(atoms[[3, 3, 4]], atoms[[5, 1, 1]])  # one atom with several partners
    assert classes.state is not before
    assert classes.find(atoms).tolist() == [0, 1, 2, 1, 1, 1]
    after = classes.state
    classes.join(atoms[3:4], atoms[4:5])
    assert classes.state is after
