"""Movements that lay the channels of several blocks into each other's gaps (a channel shuffle).

Cutting before such a movement and cutting after it give a different order. Where the graph shows the whole movement,
from plain labels to plain labels, it becomes one gather and constrains nothing; elsewhere the rows are joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.groups.channels import Gather
from fxprune.labels.factors import Factor, narrow
from fxprune.labels.propagation import Propagation
from fxprune.labels.records import Interleaved, TensorLabels
from fxprune.ops.table import is_movement


def _ragged(run: Propagation, factor: Factor) -> Factor | None:
    """The factor as it stands at the end of the run, if it still varies along several dims and may be cut."""
    final = run.canonical(factor)
    if len(final.varying) < 2 or run.all_locked(final):
        return None
    return final


def settle_order(run: Propagation, graph_module: fx.GraphModule) -> list[tuple[Gather | None, set[str]]]:
    """For each interleaving view: a gather and the nodes it replaces, or (None, empty) and the rows aligned."""
    found: list[tuple[Gather | None, set[str]]] = []
    nodes = {n.name: n for n in graph_module.graph.nodes}
    done: set[str] = set()
    for event in run.interleaved:
        final = _ragged(run, event.before)
        if final is None or final.dim == final.varying[-1]:
            continue
        region = None if event.inside else _region(run, nodes, event)
        if region is None:
            first = final.ids
            for d in final.carriers:
                first = narrow(first, d, 0, 1)
                run.join(final.ids, first)
            found.append((None, set()))
        elif region[0].output not in done:
            done.add(region[0].output)
            found.append(region)
    return found


def _region(run: Propagation, nodes: Mapping[str, fx.Node], event: Interleaved) -> tuple[Gather, set[str]] | None:
    """The chain of movement nodes around an interleaving view, from plain labels to plain labels."""

    def plain(node: fx.Node) -> bool:
        value = run.node_labels.get(node.name)
        return isinstance(value, TensorLabels) and all(
            len(run.canonical(f).varying) < 2 or run.all_locked(f) for f in value.labels
        )

    last = nodes[event.node]
    chain = [last]
    while not plain(chain[0].all_input_nodes[0]):
        before = chain[0].all_input_nodes[0]
        if not is_movement(before) or len(before.users) > 1:
            return None
        chain.insert(0, before)
    while not plain(chain[-1]):
        users = list(chain[-1].users)
        if len(users) != 1 or not is_movement(users[0]):
            return None
        chain.append(users[0])
    start = chain[0].all_input_nodes[0]
    before, after = run.node_labels[start.name], run.node_labels[chain[-1].name]
    if before.shape != after.shape or before.dtype != after.dtype:
        return None
    for factor in before.labels:
        final = run.canonical(factor)
        permutation = _permutation(run, chain, start, before.shape, final.dim)
        if permutation is not None and len(final.varying) == 1:
            gather = Gather(start.name, chain[-1].name, final.dim, permutation)
            return gather, {n.name for n in chain}
    return None


def _permutation(
    run: Propagation, chain: list[fx.Node], start: fx.Node, shape: tuple[int, ...], dim: int
) -> tuple[int, ...] | None:
    """The permutation of ``dim`` that the chain of nodes performs, if that is all it does."""
    positions = torch.arange(int(np.prod(shape))).reshape(shape)
    env: dict[fx.Node, Any] = {start: positions}

    def value(n: fx.Node) -> Any:
        return env[n] if n in env else run.node_labels[n.name]

    result = positions
    for node in chain:
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            target: Any = node.target
            result = target(*args, **kwargs)
        env[node] = result
    first = tuple(slice(None) if d == dim else 0 for d in range(len(shape)))
    stride = positions.stride(dim)
    order = (result[first] // stride) % shape[dim]
    if not torch.equal(result, positions.index_select(dim, order)):
        return None
    return tuple(int(i) for i in order)
