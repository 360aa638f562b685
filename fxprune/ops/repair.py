"""What the repair of an op sees: what the node's arguments were, what they are now, and what its shape will be.

A repair replaces the arguments of a node that name old sizes. ``rewriting.literals`` walks the graph and calls it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from fxprune.labels.factors import cut_sizes
from fxprune.labels.records import TensorLabels, channels_of


class UnrepairableError(Exception):
    """A node whose arguments cannot follow the plan. ``channels``: those that must stay then."""

    def __init__(self, node: fx.Node, text: str, channels: Sequence[int] = ()):
        super().__init__(f"{text} ({node.meta.get('source', node.name)})")
        self.node = node
        self.text = text
        self.channels = channels


class UnevenError(UnrepairableError):
    """A slice that would have to pick unevenly spaced positions: those in ``taken``, of the cut dimension."""

    def __init__(self, node: fx.Node, text: str, channels: Sequence[int], taken: Any):
        super().__init__(node, text, channels)
        self.taken = taken


@dataclass
class Repair:
    """One node after the other of the new graph, ``code``, of what will be the new module.

    ``nodes``: what every node gave in the dense graph, ``keep``: the plan. ``values``: what every node gives on the
    example inputs, tensors as meta tensors. ``other_values``: integer values of the dense graph with another batch
    size, to know what depends on it. ``device``: of the dense module, for what needs values already.
    """

    module: nn.Module
    code: fx.Graph
    nodes: Mapping[str, Any]
    keep: npt.NDArray[np.bool_]
    other_values: Mapping[str, Any]
    device: torch.device
    values: dict[fx.Node, Any] = field(default_factory=dict)

    # -- what is known of a node --------------------------------------------------------------------------------

    def dense(self, node: Any) -> Any:
        """The node's dense value: ``TensorLabels`` for tensors. Anything but a node is its own value."""
        if isinstance(node, fx.Node):
            return self.nodes.get(node.name)
        if isinstance(node, (tuple, list)):
            return type(node)(self.dense(n) for n in node) if type(node) in (tuple, list) else node
        return node

    def value(self, argument: Any) -> Any:
        """What an argument evaluates to in the new graph."""
        return fx.map_arg(argument, lambda n: self.values[n])

    def promised(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a tensor node in the new graph."""
        known = self.dense(node)
        return tuple(cut_sizes(known.shape, known.labels, self.keep))

    def mask(self, known: TensorLabels, dim: int, node: fx.Node) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which positions along ``dim`` of a dense tensor stay, the same in every row."""
        factor = next((f for f in known.labels if f.dim == dim), None)
        if factor is None:
            return np.ones(known.shape[dim], dtype=bool)
        masks = self.keep[factor.rows()]
        if not (masks.cumsum(1) == masks[:1].cumsum(1)).all():
            first = masks[0]
            if not (masks.sum(1) == first.sum()).all():
                raise UnrepairableError(node, "blocks keep different counts", channels_of(known))
        mask: np.ndarray[Any, np.dtype[np.bool_]] = masks[0]
        return mask

    def is_cut(self, known: TensorLabels, dim: int) -> bool:
        return any(f.dim == dim and not self.keep[f.rows()].all() for f in known.labels)

    def depends_on_batch(self, argument: Any) -> bool:
        """Does a number follow the batch? Where the run with another one did not get, all but sizes of channels may."""
        if not isinstance(argument, fx.Node):
            return False
        if argument.name in self.other_values:
            return bool(self.other_values[argument.name] != self.dense(argument))
        return not self.is_of_channels(argument)

    def is_of_channels(self, values: Any) -> bool:
        """Whether nothing but sizes that were cut are in these numbers, so that no input makes others of them."""
        for node in (leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, fx.Node)):
            if node.target == "size" and len(node.args) == 2 and isinstance(node.args[1], int):
                known = self.dense(node.args[0])
                if not isinstance(known, TensorLabels) or not self.is_cut(known, node.args[1] % len(known.shape)):
                    return False
            elif isinstance(self.dense(node), TensorLabels) or not self.is_of_channels((node.args, node.kwargs)):
                return False
        return True

    # -- replacing arguments -------------------------------------------------------------------------------------

    def sizes(self, node: fx.Node, arguments: Sequence[Any], promised: Sequence[int]) -> list[Any]:
        """Size arguments that give ``promised``; -1 and expressions that already agree stay."""
        return [
            a if self.value(a) in (-1, p) else self.size(node, a, p) for a, p in zip(arguments, promised, strict=True)
        ]

    def size(self, node: fx.Node, argument: Any, promised: int) -> Any:
        """One size argument that must become ``promised`` at the example's batch size."""
        if not self.depends_on_batch(argument):
            return promised
        with self.code.inserting_before(node):
            now = self.value(argument)
            scaled = self.code.call_function(operator.mul, (argument, promised))
            result = self.code.call_function(operator.floordiv, (scaled, now))
        scaled.meta, result.meta = origin(node), origin(node)
        self.values[scaled], self.values[result] = now * promised, promised
        return result

    def size_list(self, node: fx.Node, argument: Any, promised: Sequence[int]) -> Any:
        """A whole shape argument: a sequence, or a node that gives one."""
        if isinstance(argument, (tuple, list)):
            return (
                type(argument)(self.sizes(node, argument, promised))
                if type(argument) in (tuple, list)
                else tuple(self.sizes(node, list(argument), promised))
            )
        now = self.value(argument)
        if tuple(now) == tuple(promised):
            return argument
        items: list[Any] = []
        for place, (have, want) in enumerate(zip(now, promised, strict=True)):
            if have != want:
                items.append(want)
                continue
            with self.code.inserting_before(node):
                item = self.code.call_function(operator.getitem, (argument, place))
            item.meta = origin(node)
            self.values[item] = have
            items.append(item)
        return tuple(items)

    def groups(self, x: Any, weight: Any, groups: Any, *, transposed: bool = False) -> Any:
        """The argument ``groups`` of a convolution: where whole groups went their number follows the weight."""
        dense_groups, known, source = self.dense(groups), self.dense(weight), self.dense(x)
        if dense_groups == 1 or not isinstance(known, TensorLabels):
            return groups
        per_in = source.shape[1] // dense_groups
        per_out = known.shape[1] if transposed else known.shape[0] // dense_groups
        new = dense_groups
        if 1 in (per_in, per_out):
            first = cut_sizes(known.shape, known.labels, self.keep)[0]
            new = first // (per_in if transposed else per_out)
        return groups if self.value(groups) == new else new

    def freeze(self, node: fx.Node) -> None:
        """Every argument ``frozen``."""
        node.args, node.kwargs = self.frozen(node, node.args), self.frozen(node, node.kwargs)

    def frozen(self, node: fx.Node, argument: Any) -> Any:
        """An argument of ``node`` in which numbers that would change are the dense ones."""

        def freeze(argument: fx.Node) -> Any:
            was, now = self.dense(argument), self.values[argument]
            if isinstance(was, (int, float)) and not isinstance(was, bool) and was != now:
                if self.depends_on_batch(argument):
                    raise UnrepairableError(node, "a number depends on channels and on the batch", channels_of(
                        [self.dense(n) for n in (node, *node.all_input_nodes)]))  # fmt: skip
                return was
            return argument

        return fx.map_arg(argument, freeze)


# -- for repairs ------------------------------------------------------------------------------------------------------


RESCALED = "rescaled"
"""In a node's ``meta``: it is told a factor that it took from a size before; of that one to what it would take now."""

LEFT_ALONE = "not followed: where it names a size that is cut, the channels are left alone"


def set_argument(node: fx.Node, place: int, name: str, value: Any) -> None:
    """Set an argument where it was given, by position or by name."""
    if name in node.kwargs:
        node.kwargs = {**node.kwargs, name: value}
    elif place < len(node.args):
        node.args = (*node.args[:place], value, *node.args[place + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: value}


def new_constant(module: nn.Module, name: str, value: torch.Tensor, before: fx.Node) -> fx.Node:
    """A ``get_attr`` node for a new non-persistent buffer of ``module``."""
    index = 0
    while hasattr(module, f"_{name}_{index}"):
        index += 1
    module.register_buffer(f"_{name}_{index}", value, persistent=False)
    with before.graph.inserting_before(before):
        result = before.graph.create_node("get_attr", f"_{name}_{index}")
    result.meta = origin(before)
    return result


def origin(node: fx.Node) -> dict[str, Any]:
    """Where a node comes from, for the ``meta`` of others that are put in for it."""
    return {key: value for key, value in node.meta.items() if key in ("source", "stack_trace", "module")}


def shape_after_self(repair: Repair, node: fx.Node) -> None:
    """``x.view(*sizes)`` or ``x.view(sizes)``."""
    promised = repair.promised(node)
    for name in ("size", "shape"):
        if name in node.kwargs:
            node.kwargs = {**node.kwargs, name: repair.size_list(node, node.kwargs[name], promised)}
            return
    first = node.args[1]
    if isinstance(first, torch.dtype):
        return
    if isinstance(first, (tuple, list)) or not isinstance(repair.value(first), int):
        node.args = (node.args[0], repair.size_list(node, first, promised), *node.args[2:])
    else:
        node.args = (node.args[0], *repair.sizes(node, node.args[1:], promised))
