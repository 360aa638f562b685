"""Prove a rewritten graph: propagate channel numbers through it and compare every node with the promise.

The label rules run again, on the new graph, with the kept channels' numbers on its parameters. No rule may join two
different channels, and every node must carry, position by position, the channels that the dense graph's labels promise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from fxprune.analysis import replay
from fxprune.channels import ChannelGraph, channels_of
from fxprune.cost import Keep
from fxprune.labels.factors import compact, cut_sizes, pruned
from fxprune.labels.propagate import TensorLabels

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
    """The first mismatch of the rewritten ``module``, or None.

    Args:
        module: from ``rewrite``.
        graph: of the dense model.
        keep: the plan.
        args: the example inputs that ``graph`` was made with.
        kwargs: the same, keyword inputs.
    """
    run, failed = replay(module, graph, keep, args, kwargs)
    roots = run.classes.find(np.arange(len(run.classes)))
    merged = _merged(roots[: graph.channel_count], graph.locked)
    for node in module.graph.nodes:
        if node.name not in run.node_labels:
            if node.op == "output":
                continue
            inputs = [graph.nodes.get(n.name) for n in (node, *node.all_input_nodes)]
            return Mismatch(node.name, str(node.meta.get("source", "")), failed, tuple(channels_of(inputs)))
        text = _compare(graph, graph.nodes.get(node.name), run.node_labels[node.name], roots, merged, keep)
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


def _compare(graph: ChannelGraph, expected: Any, found: Any, roots: Any, merged: set[int], keep: Keep) -> str:
    """What differs between the promise and what the new graph carries, or ''.

    Dimensions whose channels all stay need no comparison beyond their size.
    """
    wanted = [t for t in tree_flatten(expected)[0] if isinstance(t, TensorLabels)]
    got = [t for t in tree_flatten(found)[0] if isinstance(t, TensorLabels)]
    if not wanted:
        return ""
    if len(wanted) != len(got):
        return f"{len(got)} tensors instead of {len(wanted)}"
    for want, have in zip(wanted, got, strict=True):
        shape = tuple(cut_sizes(want.shape, want.labels, keep))
        if shape != have.shape:
            return f"shape {list(have.shape)} instead of {list(shape)}"
        try:
            promised = pruned(want.labels, keep)
        except ValueError as error:
            return str(error)
        carried = {f.dim: f for f in have.labels}
        for factor in promised:
            if bool(np.isin(factor.ids.numpy(), list(merged)).any()):
                return _MEET
            if compact(factor.ids).numel() == 1 or graph.locked[factor.ids.numpy()].all():
                continue  # one channel, however many positions it fills, has no order
            if factor.dim not in carried:
                return f"no channels along dim {factor.dim}"
            ids = torch.from_numpy(roots[carried[factor.dim].ids.numpy()])
            try:
                a, b = torch.broadcast_tensors(ids, factor.ids)
            except RuntimeError:
                return f"other channels along dim {factor.dim}"
            owned = torch.from_numpy(graph.owned)[b]
            if not torch.equal(a[owned], torch.from_numpy(roots)[b[owned]]) or bool(
                (a[~owned] < graph.channel_count).any()
            ):
                return f"channels in another order along dim {factor.dim}"
    return ""
