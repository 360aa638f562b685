"""Prove a rewritten graph: propagate channel numbers through it and compare every node with the promise.

The label rules run again, on the new graph, with the kept channels' numbers on its parameters. No rule may join two
different channels, and every node must carry, position by position, the channels that the dense graph's labels promise.
A node that fails now is a fault of the plan, unless it failed in the dense graph too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from fxprune.groups import replay
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.labels.classes import Ids
from fxprune.labels.factors import Factor, Labels, compact, cut_sizes, pruned
from fxprune.labels.records import TensorLabels, channels_of, labels_in

_MEET = "different channels meet"


@dataclass(frozen=True)
class Mismatch:
    """A node of the new graph that does not carry what was promised, and the channels that must stay for that."""

    node: str
    source: str
    text: str
    channels: tuple[int, ...]


def check_rewrite(
    module: fx.GraphModule,
    graph: ChannelGraph,
    keep: Keep,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Mismatch | None:
    """The first mismatch of a rewritten module, or None.

    Args:
        module: of a ``Draft``; its tensors carry labels afterwards.
        graph: of the dense model.
        keep: the plan.
        args: the example inputs that ``graph`` was made with.
        kwargs: the same, keyword inputs.
    """
    run, failed = replay(module, graph, keep, args, kwargs, shadow=module, strict=True)
    roots = run.classes.find(np.arange(len(run.classes)))
    merged = _merged(roots[: graph.channel_count], graph.locked)
    comparison = _Comparison(graph, keep, roots, merged)
    for node in module.graph.nodes:
        if node.name not in run.node_labels:
            if node.op == "output":
                continue
            inputs = [graph.nodes.get(n.name) for n in (node, *node.all_input_nodes)]
            return Mismatch(node.name, str(node.meta.get("source", "")), failed, tuple(channels_of(inputs)))
        text = comparison.difference(graph.nodes.get(node.name), run.node_labels[node.name], node.op == "output")
        if text:
            inputs = [graph.nodes.get(n.name) for n in (node, *node.all_input_nodes)]
            channels = sorted(merged) if text == _MEET else channels_of(inputs)
            return Mismatch(node.name, str(node.meta.get("source", "")), text, tuple(channels))
    if merged:
        return Mismatch("", "", _MEET, tuple(sorted(merged)))
    return None


def _merged(roots: Any, locked: Any) -> set[int]:
    """Channels that share a root with another one, unless all of that root stay anyway."""
    values, inverse, counts = np.unique(roots, return_inverse=True, return_counts=True)
    free = np.zeros(len(values), dtype=bool)
    free[inverse[~locked]] = True
    return {int(c) for c in np.flatnonzero((counts > 1)[inverse] & free[inverse])}


class _Comparison:
    """The promise against what the new graph carries. Tensors share their factors: each pair is compared once."""

    def __init__(self, graph: ChannelGraph, keep: Keep, roots: Ids, merged: set[int]):
        self._graph, self._keep, self._roots = graph, keep, roots
        self._merged = np.array(sorted(merged), dtype=np.int64)
        # a channel that is left alone along a dimension has no label there, nor beside others after that
        left = np.bincount(graph.group_of[keep], minlength=len(graph.groups))
        self._sole = left[graph.group_of] == 1
        if any(group.blocks == count > 1 for group, count in zip(graph.groups, left, strict=True)):
            for row in (f.rows()[0] for p in graph.parameters for f in p.labels if not f.carriers):
                self._sole[row] |= np.count_nonzero(keep[row]) == 1
        self._promises: dict[tuple[int, ...], tuple[dict[int, int], Labels, str]] = {}
        self._texts: dict[tuple[int, int], str] = {}

    def difference(self, expected: Any, found: Any, returned: bool) -> str:
        """What differs, or ''. Dimensions whose channels all stay need no comparison beyond their size.

        No entries are no channels: a tensor without any, unless it is ``returned``, may have another size elsewhere.
        """
        wanted, got = labels_in(expected), labels_in(found)
        if not wanted:
            return ""
        if len(wanted) != len(got):
            return f"{len(got)} tensors instead of {len(wanted)}"
        for want, have in zip(wanted, got, strict=True):
            sizes, promised, text = self._promised(want)
            shape = tuple(sizes.get(d, size) for d, size in enumerate(want.shape))
            if not returned and 0 in shape and 0 in have.shape:
                continue
            if shape != have.shape:
                return f"shape {list(have.shape)} instead of {list(shape)}"
            if text:
                return text
            carried = {f.dim: f for f in have.labels}
            for factor in promised:
                if factor.dim not in carried:
                    if self._sole[factor.ids].all():
                        continue
                    return f"no channels along dim {factor.dim}"
                pair = (id(factor), id(carried[factor.dim]))
                if pair not in self._texts:
                    self._texts[pair] = self._order(factor, carried[factor.dim])
                if self._texts[pair]:
                    return self._texts[pair]
        return ""

    def _promised(self, want: TensorLabels) -> tuple[dict[int, int], Labels, str]:
        """Of a dense tensor: the new sizes of dims, the factors whose order counts, and what is wrong with them."""
        key = tuple(map(id, want.labels))  # the graph keeps them alive
        if key not in self._promises:
            sizes = cut_sizes(want.shape, want.labels, self._keep)
            try:
                left, text = pruned(want.labels, self._keep), ""
            except ValueError as error:
                left, text = (), str(error)
            if any(np.isin(f.ids, self._merged).any() for f in left if len(self._merged)):
                text = _MEET
            # blocks of one channel each: they lie along the dimension of the blocks, as far as a tensor shows
            shown = [f.settled() if f.ids.shape[f.dim] == 1 else f for f in left]
            counted = tuple(f for f in shown if not self._has_no_order(f))
            self._promises[key] = ({f.dim: sizes[f.dim] for f in want.labels}, counted, text)
        return self._promises[key]

    def _has_no_order(self, factor: Factor) -> bool:
        """All its channels stay, or it is one channel, however many positions that fills."""
        return compact(factor.ids).size == 1 or bool(self._graph.locked[factor.ids].all())

    def _order(self, promised: Factor, carried: Factor) -> str:
        ids = self._roots[carried.ids]
        try:
            a, b = np.broadcast_arrays(ids, promised.ids)
        except ValueError:
            return f"other channels along dim {promised.dim}"
        known = ~self._sole[b] | (a < self._graph.channel_count)
        a, b = a[known], b[known]
        owned = self._graph.owned[b]
        if not np.array_equal(a[owned], self._roots[b[owned]]) or bool((a[~owned] < self._graph.channel_count).any()):
            return f"channels in another order along dim {promised.dim}"
        return ""
