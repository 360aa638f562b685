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

from fxprune.channels import ChannelGraph, replay
from fxprune.cost import Keep
from fxprune.labels.factors import cut_sizes, pruned
from fxprune.labels.propagate import TensorLabels


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
    *,
    same_batch: bool = True,
) -> Mismatch | None:
    """The first mismatch of the rewritten ``module``, or None.

    Args:
        module: from ``rewrite``.
        graph: of the dense model.
        keep: the plan.
        args: example inputs.
        kwargs: example keyword inputs.
        same_batch: are these the inputs that ``graph`` was made with? Otherwise only labels are compared, not shapes.
    """
    run, failed = replay(module, graph, keep, args, kwargs)
    roots = run.classes.find(np.arange(len(run.classes)))
    merged = _merged(roots[: graph.channel_count])
    for node in module.graph.nodes:
        if node.name not in run.node_labels:
            if node.op == "output":
                continue
            inputs = [graph.nodes.get(n.name) for n in (node, *node.all_input_nodes)]
            return Mismatch(node.name, str(node.meta.get("source", "")), failed, tuple(_channels(inputs)))
        text = _compare(graph, graph.nodes.get(node.name), run.node_labels[node.name], roots, merged, keep, same_batch)
        if text:
            inputs = [graph.nodes.get(n.name) for n in (node, *node.all_input_nodes)]
            return Mismatch(node.name, str(node.meta.get("source", "")), text, tuple(_channels(inputs)))
    if merged:
        return Mismatch("", "", "different channels meet", tuple(sorted(merged)))
    return None


def _merged(roots: Any) -> set[int]:
    """Channels that share a root with another one."""
    values, inverse, counts = np.unique(roots, return_inverse=True, return_counts=True)
    del values
    return {int(c) for c in np.flatnonzero(counts[inverse] > 1)}


def _channels(known: Any) -> list[int]:
    return sorted(
        {
            int(c)
            for t in tree_flatten(known)[0]
            if isinstance(t, TensorLabels)
            for f in t.labels
            for c in np.unique(f.ids.numpy())
        }
    )


def _compare(
    graph: ChannelGraph, expected: Any, found: Any, roots: Any, merged: set[int], keep: Keep, same_batch: bool
) -> str:
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
        if same_batch and shape != have.shape:
            return f"shape {list(have.shape)} instead of {list(shape)}"
        if len(shape) != len(have.shape):
            return f"{len(have.shape)} dimensions instead of {len(shape)}"
        try:
            promised = pruned(want.labels, keep)
        except ValueError as error:
            return str(error)
        carried = {f.dim: f for f in have.labels}
        for factor in promised:
            if bool(np.isin(factor.ids.numpy(), list(merged)).any()):
                return "different channels meet"
            if factor.ids.shape[factor.dim] == 1 or graph.locked[factor.ids.numpy()].all():
                continue
            if factor.dim not in carried:
                return f"no channels along dim {factor.dim}"
            ids = torch.from_numpy(roots[carried[factor.dim].ids.numpy()])
            try:
                a, b = torch.broadcast_tensors(ids, factor.ids)
            except RuntimeError:
                return f"other channels along dim {factor.dim}"
            owned = torch.from_numpy(graph.owned)[b]
            if not torch.equal(a[owned], b[owned]) or bool((a[~owned] < graph.channel_count).any()):
                return f"channels in another order along dim {factor.dim}"
    return ""
