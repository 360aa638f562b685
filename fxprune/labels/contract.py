"""The verb of products: what is contracted is joined, what is free passes, and the MACs are noted.

Every product is written as an einsum. ``Operand.letters`` names the tensor's dimensions; a letter that is missing in
the output is contracted. Labels cut along a contracted letter are joined across operands; labels cut along a free
letter pass to the output; a letter that both operands and the output have is a batch letter, along which attention
heads are carried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from fxprune.labels.factors import Factor, Labels, settle_dim
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation


@dataclass(frozen=True)
class Operand:
    """A tensor of a contraction, one letter per dimension.

    ``parameter``: its name and order of dims, if it is one. ``sources``: the parameters that it is computed from alone.
    """

    shape: tuple[int, ...]
    labels: Labels
    letters: str
    parameter: tuple[str, tuple[int, ...]] | None = None
    sources: frozenset[str] | None = None


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
    for each in operands:
        if each.parameter is not None:
            name, order = each.parameter
            run.produced |= {(name, order[place]) for place, letter in enumerate(each.letters) if letter in out}
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
        elif operand.sources:
            run.consume(operand.sources, [f for f in factors if f.dim == dim])
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


def operand(run: Propagation, tensor: Tensor, letters: str) -> Operand:
    """The tensor as it is."""
    return Operand(
        tuple(tensor.shape), run.labels(tensor), letters, run.parameter_dims(tensor), run.usage.sources(tensor)
    )
