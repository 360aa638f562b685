"""What is given and returned: inputs taken apart into nodes, and what forward did to these and to buffers, put back."""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.recording import boundary, structure
from fxprune.recording.calls import Call
from fxprune.recording.guards import fits
from fxprune.recording.parts import Parts
from fxprune.recording.tensors import are_same_view
from fxprune.recording.traced import Lazy, traced
from fxprune.recording.writer import GraphWriter


class Placing:
    """The first and the last nodes of a graph. ``begin``: the line where forward begins, which is their source."""

    def __init__(self, writer: GraphWriter, parts: Parts, begin: str) -> None:
        self._writer, self._begin = writer, begin
        self._objects: dict[int, tuple[Any, Node]] = {}  # that came in, by identity
        self._as_given: dict[int, dict[Any, Any]] = {}
        self._buffers = [
            (module, name, f"{path}.{name}" if path else name, buffer)
            for path, module in parts.modules.items()
            if not isinstance(module, torch.jit.ScriptModule)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def place_inputs(self, bound: inspect.BoundArguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = OrderedDict(boundary.with_fresh_tensors(dict(bound.arguments)))
        found = boundary.placeholders(self._writer.graph, bound)
        self._guard_forms(found, bound)
        for placeholder, (name, *keys) in found:
            owner, key = (arguments[name], keys[0]) if keys else (arguments, name)
            if key in owner:
                owner[key] = self._placed(placeholder, owner[key])
            else:  # forward has its own default
                self._writer.describe(placeholder, None)
        for node in self._writer.graph.nodes:
            node.meta["source"] = self._begin
            self._writer.inputs_end = node
        bound = inspect.BoundArguments(bound.signature, arguments)
        return bound.args, bound.kwargs

    def _guard_forms(self, found: Sequence[tuple[Node, tuple[str, ...]]], bound: inspect.BoundArguments) -> None:
        if found:
            nodes = tuple(node for node, _ in found)
            forms = tuple(boundary.form_at(bound, node, way) for node, way in found)
            names = tuple(str(node.target) for node in nodes)
            self._writer.effect(Call("call_function", fits, (nodes, names, forms, self._begin), {}))

    def _placed(self, node: Node, value: Any) -> Any:
        """``node`` gives ``value``, an input or a part of one; returns it with numbers that know their node.

        ``value`` is a copy; what can be written to is changed in place, so that objects stay the objects they are.
        """
        writer = self._writer
        writer.describe(node, value if isinstance(value, Tensor) else None)
        if isinstance(value, Tensor):
            writer.tensors.map(value, node, lasting=True)
            return value
        if id(value) in self._objects:
            return value
        found = structure.parts(value)
        if found is None:
            return self._placed_leaf(node, value)
        if not isinstance(value, tuple) and not (found and found[0].kind == "leaf"):
            self._objects[id(value)] = (value, node)
        new = [
            part.holding(
                self._placed(
                    writer.create(Call("call_function", boundary.GETTERS[part.kind], (node, part.key), {})), part.value
                )
            )
            for part in found
        ]
        changed = [part for part, old in zip(new, found, strict=True) if part.value is not old.value]
        if changed and id(value) not in self._objects:
            return structure.rebuilt(value, new)
        for part in changed:
            _set(value, part.key, part.value)
        self._as_given[id(value)] = _contents(value)
        return value

    def _placed_leaf(self, node: Node, value: Any) -> Any:
        """A plain value among the inputs: a number becomes one that knows its node, another value stays as it is."""
        if isinstance(value, torch.Generator):
            self._writer.given_generator(value, node)
        return traced(value, Lazy(self._writer, "placeholder", "", (), node))

    def _write_back_buffers(self) -> None:
        """``self.steps = self.steps + 1`` replaces a buffer object; the graph writes the new value into the buffer.

        Not what ``self.mask = self.mask.to(x.device)`` leaves where it was: autograd would not forgive the write.
        """
        for module, name, path, before in self._buffers:
            after = module._buffers.get(name)
            if after is None or after is before or not self._writer.tensors.computed(after):
                continue
            if are_same_view(before, after):
                continue
            if after.shape == before.shape:
                call = Call("call_method", "copy_", (self._writer.node_of(before), self._writer.node_of(after)), {})
                self._writer.tensors.mark_writes(self._writer.create(call), [before])
            else:
                self._writer.note(f"the buffer {path} is replaced by one of another shape, which is not recorded")

    def place_output(self, output: Any) -> None:
        self._write_back_buffers()
        known = {key: node for key, (_, node) in self._objects.items()}
        apart = boundary.Apart(known)
        for key, (value, node) in self._objects.items():
            self._write_back(node, value, self._as_given.get(key, {}), apart)
        node = self._writer.graph.output(self._writer.argument(apart(output)))
        self._writer.describe(node, output if isinstance(output, Tensor) else None)
        node.meta["source"] = self._begin

    def _write_back(self, node: Node, value: Any, before: dict[Any, Any], apart: boundary.Apart) -> None:
        """What forward did to an object that came in, the graph does to the one it gets."""
        after, effect = _contents(value), self._writer.effect
        if isinstance(value, list):
            if len(after) != len(before) or any(after[i] is not before[i] for i in after):
                effect(Call("call_function", operator.setitem, (node, slice(None), [apart(v) for v in value]), {}))
            return
        is_mapping = isinstance(value, Mapping)
        put, drop = (operator.setitem, operator.delitem) if is_mapping else (setattr, delattr)
        for name, item in after.items():
            if name not in before or item is not before[name]:
                effect(Call("call_function", put, (node, name, apart(item)), {}))
        for name in before.keys() - after.keys():
            effect(Call("call_function", drop, (node, name), {}))


def _contents(value: Any) -> dict[Any, Any]:
    """What an object that may be written to holds now."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list):
        return dict(enumerate(value))
    return {part.key: part.value for part in structure.parts(value) or []}


def _set(value: Any, key: Any, item: Any) -> None:
    if isinstance(value, (Mapping, list)):
        value[key] = item  # type: ignore[index]
    else:
        object.__setattr__(value, key, item)
