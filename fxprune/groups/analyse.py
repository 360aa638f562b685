"""Label until no new fact appears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import fx

from fxprune.errors import ModelError
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.freeze import freeze
from fxprune.groups.order import settle_order
from fxprune.groups.shadow import labelled_shadow, placeholder_values
from fxprune.labels.blocks import BlockSets, alike
from fxprune.labels.classes import Ids, distinct_rows
from fxprune.labels.propagation import Propagation
from fxprune.labels.records import Attention, Facts, Family
from fxprune.labels.run import Settings, propagate
from fxprune.labels.usage import lock_unused
from fxprune.ops.meta import MetaKernels


def analyse_graph(
    graph_module: fx.GraphModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    attention: Attention = "head_dim",
    ignore: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> ChannelGraph:
    """Find the channels of a recorded model.

    Args:
        graph_module: from ``record``.
        args: example inputs; only shapes and dtypes matter.
        kwargs: example keyword inputs.
        attention: cut inside heads, those of one attention equally or not, or whole heads.
        ignore: names of modules and parameters whose output channels stay.
        keep: names of modules and parameters that stay in all dimensions.

    Raises:
        ModelError: whole heads are wanted, and those of an attention cannot be separated.
    """
    values = placeholder_values(graph_module, args, kwargs)
    facts, settings = Facts(), Settings(frozenset(ignore), frozenset(keep), kernels=MetaKernels())
    before: Ids | None = None  # the partition that was found last
    while True:
        run = Propagation(attention, facts)
        shadow, holders = labelled_shadow(graph_module, run)
        for a, b in facts.joins:
            run.join(a, b)
        owned = len(run.classes)
        propagate(shadow, graph_module.graph, values, run, "network input", settings)
        if run.new_layouts or run.new_indices or run.new_kernels:
            layouts = {**facts.layouts, **run.new_layouts}
            facts = Facts(layouts, [], facts.indices | run.new_indices, facts.kernels | run.new_kernels)
            before = None
            continue
        lock_unused(run)
        # order and blocks are settled when all rows are known: half of them joined would look like ragged blocks
        changed = run.rows_joined and _is_new(run, owned, before)
        if not changed:
            gathers = settle_order(run, graph_module)
            blocks = _settle_blocks(run, {name for gather in gathers for name in gather[1]})
            realigned = blocks.realigned or any(not g[1] for g in gathers)
            changed = realigned and _is_new(run, owned, before)
        if changed:
            before = run.classes.find(np.arange(owned))
            facts = replace(facts, joins=[(np.arange(owned), before)])
            continue
        _check_heads(run)
        return freeze(run, graph_module, holders, blocks, [g[0] for g in gathers if g[0] is not None])


def _is_new(run: Propagation, owned: int, before: Ids | None) -> bool:
    """Are the first ``owned`` atoms joined otherwise than ``before``, which None says they were not at all?"""
    atoms = np.arange(owned)
    return not np.array_equal(run.classes.find(atoms), atoms if before is None else before)


def _settle_blocks(run: Propagation, gathered: set[str]) -> BlockSets:
    families: dict[bytes, Family] = {}
    for family in [*run.families, *_alike(run)]:
        if family.movable and family.node in gathered:
            continue
        rows, _ = distinct_rows(run.classes.find(family.rows))
        if family.factor is not None:
            final = run.canonical(family.factor)
            rows = distinct_rows(final.rows())[0] if len(final.varying) > 1 else rows[:1]
        if len(rows) > 1 and not run.classes.locked(rows).all():
            families.setdefault(rows.tobytes() + str(rows.shape).encode(), replace(family, rows=rows))
    return BlockSets.of(run.classes, list(families.values()))


def _alike(run: Propagation) -> Iterator[Family]:
    """The families of dimensions that keep one size."""
    for pair in sorted(run.alikes, key=lambda pair: pair.optional):
        one, other = run.canonical(pair.one), run.canonical(pair.other)
        if (one.dim, other.dim) == (pair.one.dim, pair.other.dim) and one.varying and other.varying:
            rows = [distinct_rows(factor.rows())[0] for factor in (one, other)]
            yield from alike(rows[0], rows[1], pair.node, pair.reason, pair.optional)
        elif not pair.optional:  # of one of them whole rows go, or nothing
            for factor in (one, other):
                run.classes.lock(factor.ids, pair.reason)


def _check_heads(run: Propagation) -> None:
    for factor, reason in run.heads:
        final = run.canonical(factor)
        if final.dim == factor.dim and final.varying and not run.all_locked(final):
            raise ModelError(
                f"attention='heads': the heads at {reason.source or 'the model'} cannot be separated: channels of "
                "several of them are tied together. Pass attention='head_dim', or name the layers of this attention in "
                "ignore=."
            )
