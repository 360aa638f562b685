"""What the recording used of the parameters: what no op consumed is not a channel, since other inputs may need it.

Parameters, and what was only moved out of them, are *unread* until an op computes with them. What was never read stays,
and so does what is cut to a size that depends on an input's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, fx

from fxprune.labels.classes import Ids, Reason
from fxprune.labels.propagation import Propagation

UNUSED = "not used on the example inputs"


def read(run: Propagation, tensor: Tensor) -> None:
    """An op computes with a parameter or a part of one."""
    name = run.name_of(tensor)
    if name is not None:
        run.usage.names.add(name)
    else:
        run.usage.read += [factor.ids for factor in run.labels(tensor)]


def make(run: Propagation, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """An op computes ``outputs`` from ``tensors``: from parameters alone where these are."""
    known = [run.usage.sources(tensor) for tensor in tensors]
    for out in outputs:  # that of an op in place may have been one
        run.usage.made.pop(id(out), None)
        if all(names is not None for names in known):
            run.usage.made[id(out)] = out, frozenset().union(*(names for names in known if names is not None))


def move(run: Propagation, tensor: Tensor, outputs: Sequence[Tensor], fills: bool = False) -> None:
    """An op only moves ``outputs`` out of a parameter or a part of one, or, if it ``fills``, looks at the shape."""
    for out in outputs:
        run.usage.add(out, frozenset() if fills else run.usage.held.get(id(tensor), frozenset()))
    if outputs and outputs[0].numel() < tensor.numel():
        run.usage.parted.append((run.labels(tensor), run.reason(UNUSED)))


def part(run: Propagation, tensor: Tensor, outputs: Sequence[Tensor], dim: int) -> None:
    """The node under way takes ``outputs`` out of ``tensor`` along ``dim``.

    If it takes as much as an input is long, another input takes more or less: all of it must stay.
    """
    node = run.node
    if node is None or not outputs:
        return
    if outputs[0].ndim == tensor.ndim and outputs[0].shape[dim] == tensor.shape[dim]:
        return
    for factor in run.labels(tensor):
        if dim in factor.varying and any(_follows_input(run, n) for n in node.all_input_nodes):
            run.usage.bounded.append((factor.ids, run.reason("cut to a size that depends on an input's")))


def _follows_input(run: Propagation, node: fx.Node) -> bool:
    """Is it a number that depends on the size of an input, as far as that is no number of channels?"""
    known = run.usage.follows
    if node not in known:
        known[node] = _finds_input(run, node)
    return known[node]


def _finds_input(run: Propagation, node: fx.Node) -> bool:
    if run.known(node):
        return False
    tensors = [tensor for n in node.all_input_nodes for tensor in run.known(n)]
    if not tensors:
        return any(_follows_input(run, n) for n in node.all_input_nodes)
    named = node.args[1] if node.target == "size" and len(node.args) == 2 else None
    for tensor in tensors:
        for dim in [named % len(tensor.shape)] if isinstance(named, int) else range(len(tensor.shape)):
            labels = [f for f in tensor.labels if f.dim == dim]
            if not labels or _is_input(run, labels[0].ids):  # nothing of the model says how many there are
                return True
    return False


def _is_input(run: Propagation, ids: Ids) -> bool:
    find = run.classes.find
    return bool(np.isin(find(ids), find(run.usage.inputs)).any())


def lock_unused(run: Propagation) -> None:
    """At the end of the run: what must stay, stays."""
    classes, usage = run.classes, run.usage
    unread = np.ones(len(classes), dtype=bool)
    unread[classes.find(np.concatenate([usage.inputs, *(ids.reshape(-1) for ids in usage.read)]))] = False
    left = _atoms(run, whole=False)
    left = left[unread[classes.find(left)]]
    if len(left):  # of a network that uses all its parameters, all have been found by now
        unread[classes.find(_atoms(run, whole=True))] = False
        for labels, reason in usage.parted:
            for factor in labels:
                ids = factor.ids.reshape(-1)
                classes.lock(ids[unread[classes.find(ids)]], reason)
        classes.lock(left[unread[classes.find(left)]], Reason(UNUSED))
    for ids, reason in usage.bounded:
        classes.lock(ids, reason)


def _atoms(run: Propagation, whole: bool) -> Ids:
    """Of all parameters that were read as a whole, or of all others."""
    chosen = [o for o in run.owners if (o.name in run.usage.names) == whole]
    return np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(o.first, o.first + o.count) for o in chosen)])
