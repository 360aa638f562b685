"""Labels move like the tensors that they label."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.labels.factors import (
    Factor,
    aligned,
    compact,
    cut_sizes,
    expanded,
    moved,
    narrow,
    pruned,
    vector,
    view_blocks,
    viewed,
)
from fxprune.labels.propagation import Propagation, set_labels
from fxprune.labels.run import Labelling

SIZES = st.lists(st.sampled_from([1, 2, 2, 3, 4]), min_size=1, max_size=5)


@st.composite
def regrouped(draw: st.DrawFn, shape: list[int]) -> list[int]:
    """Another shape with as many elements: dims are split into primes and merged again at random."""
    primes = [p for size in shape for p in ([2, 2] if size == 4 else [size] if size > 1 else [])]
    result: list[int] = []
    for p in primes:
        if result and draw(st.booleans()):
            result[-1] *= p
        else:
            result.append(p)
        if draw(st.integers(0, 4)) == 0:
            result.append(1)
    return result or [1]


@st.composite
def factors(draw: st.DrawFn) -> tuple[list[int], Factor]:
    """A shape and a factor that varies along some of its dims."""
    shape = draw(SIZES)
    ids = np.arange(math.prod(shape)).reshape(shape)
    for d in range(len(shape)):
        if draw(st.booleans()):
            ids = narrow(ids, d, 0, 1)
    varying = [d for d, size in enumerate(ids.shape) if size > 1]
    assume(varying)
    return shape, Factor(ids, draw(st.sampled_from(varying)))


@settings(deadline=None)
@given(st.data())
def test_view_blocks_split_a_view_into_independent_parts(data: st.DataObject) -> None:
    old = data.draw(SIZES)
    new = data.draw(regrouped(old))
    blocks = view_blocks(old, new)
    assert [d for a, _ in blocks for d in a] == [d for d, size in enumerate(old) if size > 1]
    assert [d for _, b in blocks for d in b] == [d for d, size in enumerate(new) if size > 1]
    for a, b in blocks:
        assert math.prod(old[d] for d in a) == math.prod(new[d] for d in b)
        sums = [{math.prod(s[d] for d in part[:i]) for i in range(1, len(part))} for s, part in ((old, a), (new, b))]
        assert not sums[0] & sums[1], "not the finest split"


@settings(deadline=None)
@given(st.data())
def test_a_view_of_labels_is_the_view_of_the_full_ids(data: st.DataObject) -> None:
    shape, factor = data.draw(factors())
    new = data.draw(regrouped(shape))
    after, _ = viewed(factor, shape, new)
    assert np.array_equal(expanded(after.ids, new), expanded(factor.ids, shape).reshape(new))
    assert after.ids.shape[after.dim] > 1
    assert compact(after.ids) is after.ids


@settings(deadline=None)
@given(st.data())
def test_a_view_that_interleaves_is_told(data: st.DataObject) -> None:
    """Cutting before the view and after it are the same, unless the view says that they are not."""
    shape, factor = data.draw(factors())
    new = data.draw(regrouped(shape))
    after, interleaved = viewed(factor, shape, new)
    rows = factor.rows()
    keep = np.zeros(math.prod(shape), dtype=bool)
    count = data.draw(st.integers(1, rows.shape[1]))
    for row in rows:
        keep[data.draw(st.permutations(row.tolist()))[:count]] = True
    cut = pruned((factor,), keep)[0]
    try:
        later = pruned((after,), keep)[0]
    except ValueError:
        return  # the rows after the view keep different counts: a family of blocks will say so
    full = expanded(cut.ids, [cut.ids.shape[d] if d == factor.dim else n for d, n in enumerate(shape)])
    wanted = expanded(later.ids, [later.ids.shape[d] if d == after.dim else n for d, n in enumerate(new)])
    if not interleaved and full.size == wanted.size:
        assert np.array_equal(full.reshape(wanted.shape), wanted)


def test_a_view_cuts_where_the_channels_went() -> None:
    """Not along what carries them, although that lies further in."""
    factor = Factor(np.array([0, 1, 8, 9]).reshape(2, 1, 1, 1, 2), 0)
    after, interleaved = viewed(factor, [2, 4, 1, 1, 2], [4, 1, 2, 1, 2, 1])
    assert (after.dim, interleaved) == (0, False)
    assert np.array_equal(after.ids.reshape(4, 2), [[0, 1], [0, 1], [8, 9], [8, 9]])


def test_channels_of_two_rows_side_by_side_are_interleaved() -> None:
    ids = np.arange(6).reshape(1, 3, 2)
    assert viewed(Factor(ids, 2), [5, 3, 2], [5, 6])[1] is False
    after, interleaved = viewed(Factor(ids, 1), [5, 3, 2], [5, 6])
    assert interleaved
    assert after.dim == 1
    assert viewed(Factor(narrow(ids, 2, 0, 1), 1), [5, 3, 2], [5, 6])[1] is False  # every channel twice, in place


def test_a_split_dim_is_cut_along_its_innermost_part() -> None:
    after, _ = viewed(Factor(vector(np.arange(8), 1, 3), 1), [5, 8, 7], [5, 2, 4, 7])
    assert after.dim == 2
    assert after.carriers == (1,)
    assert after.rows().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_cut_sizes_and_pruned() -> None:
    rows = Factor(np.arange(6).reshape(1, 2, 1, 3), 3)
    keep = np.array([True, False, True, False, True, True])
    assert cut_sizes([5, 2, 7, 3], (rows,), keep) == [5, 2, 7, 2]
    assert pruned((rows,), keep)[0].ids.reshape(2, 2).tolist() == [[0, 2], [4, 5]]
    keep[4] = False
    with pytest.raises(ValueError, match="rows keep different counts"):
        pruned((rows,), keep)


@settings(deadline=None)
@given(factors(), st.randoms(use_true_random=False))
def test_permuted_labels(labelled: tuple[list[int], Factor], random: Any) -> None:
    shape, factor = labelled
    order = list(range(len(shape)))
    random.shuffle(order)
    after = moved(factor, order)
    assert np.array_equal(after.ids, factor.ids.transpose(order))
    assert order[after.dim] == factor.dim
    assert aligned(after, len(shape) + 2).dim == after.dim + 2


# -- the rules of movement ops --------------------------------------------------------------------------------------


@st.composite
def movement(draw: st.DrawFn, x: Tensor) -> tuple[str, list[Any]]:
    """One op and its arguments that fit ``x``."""
    dim = draw(st.integers(0, x.ndim - 1))
    size = x.shape[dim]
    kind = draw(st.sampled_from("view permute flip narrow repeat twice unsqueeze stack index transpose chunk".split()))
    if kind == "view":
        return "reshape", [draw(regrouped([p for s in x.shape for p in _primes(s)]))]
    if kind == "permute":
        return kind, [draw(st.permutations(range(x.ndim)))]
    if kind == "transpose":
        return kind, [dim, draw(st.integers(0, x.ndim - 1))]
    if kind == "flip":
        return kind, [[dim]]
    if kind == "narrow":
        start = draw(st.integers(0, size - 1))
        return kind, [dim, start, draw(st.integers(1, size - start))]
    if kind == "repeat":
        return kind, [[draw(st.integers(1, 2)) if n > 1 else 1 for n in x.shape]]
    if kind == "index":
        return "index_select", [dim, torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)))]
    return kind, [dim]


def _primes(size: int) -> list[int]:
    return next(([p, *_primes(size // p)] for p in (2, 3, 5, 7) if size % p == 0), [] if size == 1 else [size])


def apply(x: Tensor, op: str, args: list[Any]) -> Tensor:
    if op == "twice":
        return torch.cat([x, x.flip(args[0])], args[0])
    if op == "stack":
        return torch.stack([x, x], args[0])
    if op == "chunk":
        return x.chunk(2, args[0])[-1]
    return getattr(x, op)(*args)  # type: ignore[no-any-return]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_rules_move_labels_as_the_ops_move_ids(data: st.DataObject) -> None:
    shape, factor = data.draw(factors())
    run = Propagation()
    run.fresh(math.prod(shape))
    x = torch.empty(shape, device="meta")
    set_labels(x, (factor,), "x")
    ids = torch.tensor(expanded(factor.ids, shape))
    for _ in range(data.draw(st.integers(1, 5))):
        op, args = data.draw(movement(ids))
        assume(ids.numel() < 2000)
        ids = apply(ids, op, args)
        with Labelling(run):
            x = apply(x, op, args)
        assert x.shape == ids.shape
        labels = run.labels(x)
        if not labels:
            assert len(ids.unique()) == 1 or run.classes.locked(ids.numpy()).all(), f"{op}{args} loses its labels"
            return
        assert len(labels) == 1
        assert np.array_equal(expanded(labels[0].ids, ids.shape), ids), f"{op}{args}"
        assert labels[0].dim in labels[0].varying
