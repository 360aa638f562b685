"""Contractions: matrix products, convolutions, lookups.

Every op is written as an einsum. ``Operand.letters`` names the tensor's dimensions; a letter that is missing in the
output is contracted. Labels cut along a contracted letter are joined across operands; labels cut along a free letter
pass to the output; a letter that both operands and the output have is a batch letter, along which attention heads are
carried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor

from fxprune.labels.classes import Ids, same
from fxprune.labels.factors import Factor, Labels, expanded, settle_dim
from fxprune.labels.rules.pointwise import join_positions
from fxprune.labels.rules.table import Call, rule

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation


@dataclass(frozen=True)
class Operand:
    """A tensor of a contraction, one letter per dimension. ``parameter``: its name and order of dims, if it is one."""

    shape: tuple[int, ...]
    labels: Labels
    letters: str
    parameter: tuple[str, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class _Plan:
    """What follows from the letters alone. ``letters``: all of them, a dimension each while operands are combined.

    ``batch``: dims of batch letters. ``contracted``, ``kept``: dims missing in the output, and the output's in its
    order. ``free``: for every dim the others that are no batch dims. ``spread``: per operand the order of its dims, and
    the index that gives it one for each letter.
    """

    letters: str
    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    kept: tuple[int, ...]
    free: tuple[tuple[int, ...], ...]
    spread: tuple[tuple[tuple[int, ...], tuple[slice | None, ...]], ...]


@cache
def _plan(operands: tuple[str, ...], out: str) -> _Plan:
    letters = "".join(dict.fromkeys("".join(operands)))
    batch = tuple(d for d, c in enumerate(letters) if c in out and sum(c in own for own in operands) > 1)
    return _Plan(
        letters,
        batch,
        tuple(d for d, c in enumerate(letters) if c not in out),
        tuple(letters.index(c) for c in out),
        tuple(tuple(d for d in range(len(letters)) if d != dim and d not in batch) for dim in range(len(letters))),
        tuple(
            (
                tuple(own.index(c) for c in letters if c in own),
                tuple(slice(None) if c in own else None for c in letters),
            )
            for own in operands
        ),
    )


def contract(run: Propagation, operands: Sequence[Operand], out: str, *, counted: bool = True) -> Labels:
    """Join what is contracted, pass on what is free, and note the MACs.

    Args:
        run: the propagation.
        operands: one or two.
        out: the output's letters.
        counted: does ``torch.utils.flop_counter`` count this op?

    Returns:
        Labels of a tensor with the letters ``out``.
    """
    plan = _plan(tuple([o.letters for o in operands]), out)
    letters = plan.letters
    size = {c: n for o in operands for c, n in zip(o.letters, o.shape, strict=True)}
    spread = [
        [f.laid(f.ids.transpose(order)[index], letters.index(o.letters[f.dim])) for f in o.labels]
        for o, (order, index) in zip(operands, plan.spread, strict=True)
    ]
    _resolve_cuts(spread, plan)
    for dim in plan.contracted:
        if size[letters[dim]] > 1:
            _contract_dim(run, operands, spread, plan, dim)
        elif run.seeded:
            _contract_lone(run, spread, plan)
    for factors in spread:
        factors[:] = [f if f.dim in plan.contracted else run.collapse(f, plan.contracted) for f in factors]
    _separate_batches(run, spread, plan)
    if counted:
        _count(run, spread, letters, size)
    result = join_positions(
        run,
        [(_shape(o, letters), tuple([f for f in factors if f.dim not in plan.contracted]))
         for o, factors in zip(operands, spread, strict=True)],
        tuple(size.values()),
    )  # fmt: skip
    labels = []
    for factor in result:
        collapsed = run.collapse(factor, plan.contracted)
        ids = collapsed.ids.transpose(plan.kept + plan.contracted)
        ids = ids.reshape(ids.shape[: len(out)])
        dim = plan.kept.index(collapsed.dim) if collapsed.dim in plan.kept else 0
        labels.append(collapsed.laid(ids, settle_dim(ids, dim)))
    return tuple(labels)


def _shape(operand: Operand, letters: str) -> tuple[int, ...]:
    sizes = dict(zip(operand.letters, operand.shape, strict=True))
    return tuple([sizes.get(c, 1) for c in letters])


def _resolve_cuts(spread: list[list[Factor]], plan: _Plan) -> None:
    """Where the other operand's channels are cut along a contracted letter, that letter is cut here too."""
    if not any(f.carriers for factors in spread for f in factors):
        return
    cuts = [{f.dim for f in factors} for factors in spread]
    for mine, factors in enumerate(spread):
        theirs = set().union(*(c for other, c in enumerate(cuts) if other != mine))
        for place, factor in enumerate(factors):
            better = [
                d for d in factor.carriers
                if d in plan.contracted and d in theirs and d not in cuts[mine] and factor.dim not in plan.contracted
            ]  # fmt: skip
            if better:
                factors[place] = Factor(factor.ids, better[0])


def _contract_dim(
    run: Propagation, operands: Sequence[Operand], spread: list[list[Factor]], plan: _Plan, dim: int
) -> None:
    """Join the channels along the contracted ``dim``."""
    found, rigid = [], False
    for operand, factors in zip(operands, spread, strict=True):
        own = operand.letters.find(plan.letters[dim])
        if own < 0:
            continue
        if operand.parameter is not None:
            name, order = operand.parameter
            run.consumed.add((name, order[own]))
        mine = [i for i, f in enumerate(factors) if f.dim == dim and f.ids.shape[dim] > 1]
        rigid |= not mine
        for i in mine:
            factors[i] = run.collapse(factors[i], plan.free[dim])
            if factors[i].dim == dim:
                found.append(factors[i])
    for factor in found:
        run.join(found[0].ids, factor.ids)
        if rigid:
            run.lock(factor.ids, "contracted with something that cannot be cut")
    if run.attention == "heads":
        for factor in found:
            if factor.carriers and not run.all_locked(factor):
                run.collapse(factor, [dim])
                run.rows_joined = True


def _contract_lone(run: Propagation, spread: list[list[Factor]], plan: _Plan) -> None:
    """What is contracted is one channel of every block, and varies with the blocks alone, along a batch letter."""
    for dim in plan.batch:
        found = [f for factors in spread for f in factors if f.dim == dim]
        if len(found) == len(spread) > 1 and all(run.are_lone(f) for f in found):
            for factor in found:
                run.join(found[0].ids, factor.ids)
            for factors in spread:
                factors[:] = [f for f in factors if f.dim != dim]


def _separate_batches(run: Propagation, spread: list[list[Factor]], plan: _Plan) -> None:
    """A batch letter cut in one operand must not carry another operand's channels: join whole rows, or lock."""
    if not plan.batch:
        return
    for mine, factors in enumerate(spread):
        for factor in factors:
            if factor.dim not in plan.batch or run.all_locked(factor):
                continue
            for other, others in enumerate(spread):
                carried = [f for f in others if other != mine and factor.dim in f.carriers]
                for row in carried:
                    if run.attention == "heads":
                        run.join(factor.ids, row.ids)
                        run.rows_joined = True
                    else:
                        run.lock(factor.ids, "whole blocks of channels, where channels are pruned inside blocks")


def _count(run: Propagation, spread: list[list[Factor]], letters: str, size: dict[str, int]) -> None:
    cut: dict[int, Factor] = {}
    for factors in spread:
        for factor in factors:
            if factor.ids.shape[factor.dim] > 1:
                cut.setdefault(factor.dim, factor)
    constant = 1.0
    for place, c in enumerate(letters):
        constant *= 1 if place in cut else size[c]
    run.term(constant, tuple(cut.values()))


def _operand(run: Propagation, tensor: Tensor, letters: str) -> Operand:
    return Operand(tuple(tensor.shape), run.labels(tensor), letters, run.parameter_dims(tensor))


def _note(run: Propagation, first: Tensor, second: Tensor) -> None:
    """For the mask oracle: what the dropped channels hold must not enter a product of two activations.

    A parameter's slices are zero there already.
    """
    cut = () if run.is_parameter(second) else tuple(f for f in run.labels(first) if f.dim == first.ndim - 1)
    run.statistic("contraction", cut)


@rule("mm", "bmm", "mv", "dot", "vdot")
def _matmul(run: Propagation, call: Call) -> Labels:
    first, second = call.tensors
    _note(run, first, second)
    a, b, out = {
        "mm": ("ik", "kj", "ij"), "bmm": ("bik", "bkj", "bij"), "mv": ("ik", "k", "i"),
    }.get(call.name, ("k", "k", ""))  # fmt: skip
    return contract(run, [_operand(run, first, a), _operand(run, second, b)], out, counted=call.name in ("mm", "bmm"))


@rule("_cdist_forward", "_euclidean_dist")
def _distances(run: Propagation, call: Call) -> Labels:
    """``x1 [*, i, k]``, ``x2 [*, j, k]`` -> ``[*, i, j]``: over the channels that both keep."""
    first, second = call["x1"], call["x2"]
    cut = tuple(f for f in run.labels(first) if f.dim == first.ndim - 1)
    run.statistic("distance", cut)
    if first.shape[:-2] != second.shape[:-2]:
        run.lock_all((*run.labels(first), *run.labels(second)), "distances between batches of two sizes")
        return ()
    lead = "abcdefgh"[: first.ndim - 2]
    operands = [_operand(run, first, lead + "ik"), _operand(run, second, lead + "jk")]
    labels = contract(run, operands, lead + "ij", counted=False)
    for factor in cut:
        run.approximate(factor.ids, "a distance over channels")
    return labels


@rule("addmm", "baddbmm", "addmv")
def _add_matmul(run: Propagation, call: Call) -> Labels:
    bias, first, second = call.tensors
    _note(run, first, second)
    a, b, out = {
        "addmm": ("ik", "kj", "ij"), "baddbmm": ("bik", "bkj", "bij"), "addmv": ("ik", "k", "i"),
    }[call.name]  # fmt: skip
    labels = contract(run, [_operand(run, first, a), _operand(run, second, b)], out, counted=call.name != "addmv")
    shape = tuple(call.out.shape)
    return join_positions(run, [(shape, labels), (tuple(bias.shape), run.labels(bias))], shape)


@rule("linear")
def _linear(run: Propagation, call: Call) -> Labels:
    x, weight = call["input"], call["weight"]
    _note(run, x, weight)
    lead = "abcdefgh"[: x.ndim - 1]
    labels = contract(run, [_operand(run, x, lead + "i"), _operand(run, weight, "oi")], lead + "o")
    return _with_bias(run, call, labels, call.out.ndim - 1)


def _with_bias(run: Propagation, call: Call, labels: Labels, dim: int) -> Labels:
    bias = call.get("bias")
    if bias is None:
        return labels
    shape = tuple(call.out.shape)
    sizes = tuple(shape[dim] if d == dim else 1 for d in range(len(shape)))
    spread = tuple([f.laid(f.ids.reshape(sizes), dim) for f in run.labels(bias)])
    return join_positions(run, [(shape, labels), (sizes, spread)], shape)


@rule("convolution", "_convolution", "convolution_overrideable")
def _convolution(run: Propagation, call: Call) -> Labels:
    x, weight, groups, transposed = call["input"], call["weight"], call["groups"], call["transposed"]
    across = _sliding(run, call)
    run.statistic("convolution", across)
    if across:
        return across
    positions = tuple(x.shape if transposed else call.out.shape)
    labels = convolve(run, x, weight, groups, math.prod(positions[2:]), transposed=transposed)
    return _with_bias(run, call, labels, 1)


def convolve(
    run: Propagation, x: Tensor, weight: Tensor, groups: int, positions: int, *, transposed: bool = False
) -> Labels:
    """The labels of what a convolution makes, without its bias; the MACs are noted.

    Args:
        run: the propagation.
        x: ``[N, C_in, *]``.
        weight: ``[C_out, C_in / groups, *]``, transposed ``[C_in, C_out / groups, *]``.
        groups: of channels.
        positions: where the kernel is laid: the output's, transposed the input's.
        transposed: see ``weight``.

    Returns:
        Labels of a tensor ``[N, C_out, *]``.
    """
    shape, shape_in = tuple(weight.shape), tuple(x.shape)
    spatial = range(2, len(shape))
    inputs = [run.mix(f, spatial, "cut along a convolved dimension") for f in _cut_channels(run, x)]
    weights = []
    for factor in run.labels(weight):
        if factor.dim > 1 and min(factor.varying, default=2) > 1:
            run.fix(factor.ids, "kernel size")
        else:
            weights.append(run.collapse(factor, spatial))
    channels_in = Operand(shape_in[:2], tuple([_flat(f) for f in inputs if f is not None]), "bi")
    letters = "io" if transposed else "oi"
    kernel_only = Operand(shape[:2], tuple([_flat(f) for f in weights]), letters, run.parameter_dims(weight))
    with run.scaled(positions * math.prod(shape[2:])):
        if groups == 1:
            labels = contract(run, [channels_in, kernel_only], "bo")
        else:
            labels = _grouped(run, channels_in, kernel_only, groups, transposed)
    return tuple([f.laid(f.ids.reshape(f.ids.shape + (1,) * len(spatial)), f.dim) for f in labels])


def _sliding(run: Propagation, call: Call) -> Labels:
    """The factors of an input that a kernel with one input and one output slides across, position by position.

    That is how efficient channel attention uses a 1-d convolution: what lies between two channels that stay goes, and
    they become neighbours.
    """
    x, weight, out = call["input"], call["weight"], call.out
    across = tuple([f for f in run.labels(x) if f.dim > 1 and f.varying == (f.dim,)])
    if not across:
        return ()
    same = all(s == 1 for s in call["stride"]) and all(out.shape[f.dim] == x.shape[f.dim] for f in across)
    if not same or weight.shape[:2] != (1, 1) or call["transposed"]:
        return ()
    for factor in run.labels(weight):
        run.fix(factor.ids, "kernel size")
    for factor in across:
        run.approximate(factor.ids, "convolution across channels")
    cut = {factor.dim for factor in across}
    run.term(float(weight.numel() * math.prod(n for d, n in enumerate(out.shape) if d not in cut)), across)
    return across


def _cut_channels(run: Propagation, x: Tensor) -> Labels:
    """A convolution's input is cut along dim 1 if it varies there, whatever a view before it suggested."""
    labels = run.labels(x)
    if any(f.dim == 1 for f in labels):
        return labels
    return tuple(Factor(f.ids, 1) if f.ids.shape[1] > 1 and f.dim > 1 else f for f in labels)


def _flat(factor: Factor) -> Factor:
    """Without the trailing dimensions, along which it does not vary."""
    return factor.laid(factor.ids.reshape(factor.ids.shape[:2]), min(factor.dim, 1))


def _grouped(run: Propagation, x: Operand, weight: Operand, groups: int, transposed: bool) -> Labels:
    """A grouped convolution: ``groups`` contractions side by side, ``weight [O, I/g]``, transposed ``[I, O/g]``.

    Groups keep equal counts of inputs and of outputs. With one input or one output per group, whole groups live or
    die (depthwise convolution, with its multiplier).
    """
    first, second = weight.shape[0] // groups, weight.shape[1]
    per_in, per_out = (first, second) if transposed else (second, first)
    inputs = next((f for f in x.labels if f.dim == 1), None)
    outer = next((f for f in weight.labels if f.dim == 0), None)
    inner = next((f for f in weight.labels if f.dim == 1), None)
    in_ids = None if inputs is None else run.collapse(inputs, [0]).ids.reshape(-1)
    dim0 = None if outer is None else run.collapse(outer, [1]).ids.reshape(-1)
    if in_ids is None or dim0 is None or len(in_ids) != x.shape[1] or len(dim0) != weight.shape[0]:
        run.lock_all((*x.labels, *weight.labels), "grouped convolution with something that cannot be cut")
        run.term(float(x.shape[0]) * weight.shape[0] * weight.shape[1], ())
        return () if transposed or dim0 is None or len(dim0) == 1 else (Factor(dim0.reshape(1, -1), 1),)
    ins, rows = in_ids.reshape(groups, per_in), dim0.reshape(groups, first)
    whole = per_in == 1 or per_out == 1
    if whole and run.seeded:
        if transposed:
            whole = inner is None or inner.ids.shape[0] == 1
        else:
            whole = same(expanded(ins[:, :1], rows.shape), rows)
    if whole:
        outs = _whole_groups(run, ins, rows, inner, per_out, transposed)
        constant, factors = float(x.shape[0]) * second, [Factor(dim0.reshape(-1, 1), 0)]
    else:
        if weight.parameter is not None:
            name, order = weight.parameter
            run.consumed.add((name, order[0 if transposed else 1]))
        local = _local(run, inner, groups, first, second)
        run.join(ins, rows if transposed else local)
        outs = local if transposed else rows
        run.family(ins, "groups of a convolution")
        run.family(outs, "groups of a convolution")
        constant, factors = float(x.shape[0]), [Factor(dim0.reshape(-1, 1), 0), Factor(local, 1)]
    run.term(constant, tuple(run.canonical(f) for f in factors))
    return (run.canonical(Factor(outs.reshape(1, -1), 1)),)


def _whole_groups(run: Propagation, ins: Ids, rows: Ids, inner: Factor | None, per_out: int, transposed: bool) -> Ids:
    """Join every group's inputs and outputs to one channel; the weight's dim 1 stays. Returns output ids."""
    if inner is not None and inner.ids.shape[1] > 1:
        run.lock(inner.ids, "inside the groups of a convolution")
    head = ins[:, :1]
    run.join(ins, head)
    run.join(rows, head)
    return expanded(head, (len(head), per_out)) if transposed else rows


def _local(run: Propagation, inner: Factor | None, groups: int, first: int, second: int) -> Ids:
    """The ids of the weight's dim 1, local to each group, as ``[groups, second]``."""
    if inner is None:
        ids = run.fresh(groups * second).reshape(groups, second)
        run.lock(ids, "a weight that cannot be cut")
        return ids
    if inner.ids.shape[0] == 1:  # not labelled per group yet: asked for, and until then equal offsets
        run.request_layout(inner.ids, groups)
        return expanded(inner.ids.reshape(1, second), (groups, second))
    rows = inner.ids.reshape(groups, first, second)
    run.join(rows, rows[:, :1])
    return rows[:, 0]


@rule("embedding")
def _embedding(run: Propagation, call: Call) -> Labels:
    """Rows are looked up by value: the vocabulary stays."""
    weight, extra = call["weight"], call["indices"].ndim
    result = []
    for factor in run.labels(weight):
        if factor.dim == 0 or factor.ids.shape[0] > 1:
            run.lock(factor.ids, "vocabulary of an embedding")
        else:
            result.append(Factor(factor.ids.reshape([1] * extra + [-1]), extra))
    return tuple(result)


@rule("_grouped_mm")
def _grouped_mm(run: Propagation, call: Call) -> Labels:
    return grouped_product(run, call["self"], call["mat2"], call.out)


def grouped_product(run: Propagation, x: Tensor, experts: Tensor, out: Tensor) -> Labels:
    """The experts of a mixture, ``[m, k] x [g, k, n] -> [m, n]``: every row is multiplied with one of ``g`` matrices.

    Which one, ``offs`` decides: the matrices stay. ``[g, m, k] x [g, k, n]`` is a ``bmm``.
    """
    if experts.ndim != 3:
        run.lock_all((*run.labels(x), *run.labels(experts)), "a product whose blocks the data decide")
        run.term(float(x.shape[-1] * out.numel()) / (out.shape[0] if out.ndim == 3 else 1), ())
        return ()
    _note(run, x, experts)
    dims = _dims_of(run, experts)
    if x.ndim == 3:
        return contract(
            run, [_operand(run, x, "gmk"), Operand(tuple(experts.shape), run.labels(experts), "gkn", dims)], "gmn"
        )
    matrices = []
    for factor in run.labels(experts):
        if factor.dim == 0:
            run.lock(factor.ids, "the data choose among these matrices")
        else:
            one = run.collapse(factor, [0])
            matrices.append(one.laid(one.ids.reshape(one.ids.shape[1:]), one.dim - 1))
    shared = None if dims is None else (dims[0], dims[1][1:])
    matrix = Operand(tuple(experts.shape[1:]), tuple(matrices), "kn", shared)
    return contract(run, [_operand(run, x, "mk"), matrix], "mn")


def _dims_of(run: Propagation, weight: Tensor) -> tuple[str, tuple[int, ...]] | None:
    """See ``parameter_dims``; of ``[g, n, k]`` with its last two dims exchanged too."""
    known = run.parameter_dims(weight)
    return known if known is None or weight._base is None or known[1][0] == 0 else (known[0], (0, 2, 1))
