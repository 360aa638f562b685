"""Repair literals: every argument that named an old size names the new one.

The labels promise the new shape of every node. An argument whose value agrees with the promise keeps its (possibly
dynamic) expression; another is replaced, by the repair that is registered with the op. Numbers that are no sizes, such
as ``(C // heads) ** -0.5``, keep their dense value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from fxprune.labels.factors import cut_sizes
from fxprune.labels.records import TensorLabels, channels_of, labels_in
from fxprune.ops.repair import Repair, UnrepairableError
from fxprune.ops.table import Fix, record_at
from fxprune.recording import named_modules
from fxprune.recording.guards import NUMBER, holds, is_guard, keeps
from fxprune.rewriting.slicing import adapt

REPAIRED = "repaired"
"""In a node's ``meta``: the pruned graph says something here that the model's own code does not."""

RESIZED = "resized"
"""In a node's ``meta``, if that is so and these are all: the numbers that were others, as pairs of before and after."""


class _Undefined:
    """A number that cannot be computed from the new sizes: it equals no size, and as a number the dense one is kept."""


UNDEFINED = _Undefined()


class Literals(Repair):
    """The walk over the new graph."""

    def run(self) -> None:
        """Visit every node in order.

        Raises:
            UnrepairableError: when a node's arguments cannot follow.
        """
        modules = dict(named_modules(self.module))
        for node in list(self.code.nodes):
            if node.op == "output":
                continue
            before = (node.op, node.target, node.args, node.kwargs)
            if node.op == "call_module":
                module = modules.pop(str(node.target), None)
                if module is not None:  # the first call
                    self._adapt(node, module)
            elif node.target is holds:
                self._follow(node)
            elif node.op in ("call_method", "call_function"):
                repair = _repair_of(node)
                if repair is not None and labels_in([self.dense(n) for n in (node, *node.all_input_nodes)]):
                    repair(self, node)
                self._freeze_numbers(node)
            now = (node.op, node.target, node.args, node.kwargs)
            if any(a is not b for a, b in zip(now, before, strict=True)):
                _note_changes(node, _spelling(*before), _spelling(*now))
            self.values[node] = self._value(node)
        for node in reversed([n for n, value in self.values.items() if value is UNDEFINED]):
            if node.users:
                raise UnrepairableError(node, "a number cannot be computed from the sizes that are left")
            self.code.erase_node(node)

    def _adapt(self, node: fx.Node, module: nn.Module) -> None:
        first = next(iter(labels_in([self.dense(a) for a in node.all_input_nodes])), None)
        if first is not None:
            try:
                adapt(module, first.shape, tuple(cut_sizes(first.shape, first.labels, self.keep)))
            except (IndexError, ValueError) as error:
                raise UnrepairableError(node, f"{type(module).__name__}: {error}", channels_of(first)) from error
        if isinstance(module, nn.Unflatten) and first is not None:
            out, dim = self.promised(node), module.dim
            if isinstance(dim, int):
                start = dim % len(first.shape)
                module.unflattened_size = tuple(out[start : start + len(module.unflattened_size)])

    def _follow(self, guard: fx.Node) -> None:
        """A size that is compared and was cut is what it is now for all inputs that the example stands for."""
        number, relation, recorded, source = guard.args
        was, now = self.dense(number), self.value(number)
        other, then = self.dense(recorded), self.value(recorded)
        if any(type(value) is not int for value in (was, now, other, then)) or (now == was and then == other):
            return
        known = not isinstance(recorded, fx.Node) or self.is_of_channels((number, recorded))
        if relation == "==" and other == was and known:
            guard.args = (number, relation, now, source)
        elif not keeps(now, str(relation), then):
            raise UnrepairableError(guard, f"forward compares a size with {other}")

    def _freeze_numbers(self, node: fx.Node) -> None:
        """Numbers used by a tensor op keep their dense value, unless they are sizes, which were repaired before."""
        only_tensors = all(isinstance(self.dense(a), TensorLabels) for a in node.all_input_nodes)
        if not only_tensors and _repair_of(node) is None and labels_in(self.dense(node)):
            self.freeze(node)

    def _value(self, node: fx.Node) -> Any:
        known = self.dense(node)
        if isinstance(known, TensorLabels):
            return self._meta(known)
        if labels_in(known):
            return tree_map(self._meta, known)
        if node.op not in ("call_method", "call_function") or is_guard(node):
            return known
        if NUMBER in node.meta:
            return node.meta[NUMBER]
        if all(map(self._is_unchanged, node.all_input_nodes)):
            return known
        args, kwargs = self.value(node.args), self.value(node.kwargs)
        if any(leaf is UNDEFINED for leaf in tree_flatten((args, kwargs))[0]):
            return UNDEFINED
        target: Any = node.target
        try:
            return (
                getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
            )
        except ArithmeticError:  # (C // heads) ** -0.5 with fewer channels than heads
            return UNDEFINED

    def _is_unchanged(self, node: fx.Node) -> bool:
        """Whether what a node gives is what it gave in the dense graph, and objects that came in are these objects."""
        if node.name not in self.nodes:
            return False
        was, now = self.dense(node), self.values[node]
        if isinstance(was, TensorLabels):
            return tuple(now.shape) == was.shape
        if labels_in(was):
            return False
        return was is now or (isinstance(was, (int, float)) and type(was) is type(now) and was == now)

    def _meta(self, known: Any) -> Any:
        if not isinstance(known, TensorLabels):
            return known
        return torch.empty(cut_sizes(known.shape, known.labels, self.keep), dtype=known.dtype, device="meta")


def _note_changes(node: fx.Node, before: list[Any], now: list[Any]) -> None:
    """Whether a node says something else than before, and the numbers in which that is all that changed."""
    if now != before:
        pairs = [(a, b) for a, b in zip(before, now, strict=False) if a is not b and a != b]
        pairs = [(a, b) for a, b in pairs if type(a) is not int or (a + 1, b + 1) not in pairs]  # a size's last place
        numbers = len(before) == len(now) and all(type(a) is type(b) is int for a, b in pairs)
        node.meta |= {REPAIRED: True, RESIZED: tuple(pairs) if numbers else ()}


def _spelling(op: str, target: Any, args: Any, kwargs: Any) -> list[Any]:
    """What is called and with what, whatever the types of the sequences in it."""
    return [op, target, *tree_flatten((tuple(args), dict(kwargs)))[0]]


def _repair_of(node: fx.Node) -> Fix | None:
    record = record_at(node)
    return record.repair if record is not None and callable(record.repair) else None
