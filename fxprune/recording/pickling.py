"""A graph as plain data: a module is unpickled as it was, nothing is traced and no source code is read again."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

Line = tuple[str, str, Any, Any, Any, dict[str, Any]]


@dataclass(frozen=True)
class _Ref:
    """A node among the arguments of another."""

    name: str


@dataclass(frozen=True)
class _Op:
    """An op of the dispatcher, which pickle cannot name."""

    name: str
    overload: str

    def found(self) -> Any:
        namespace, _, name = self.name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), name)
        return getattr(packet, self.overload or "default")


@dataclass(frozen=True)
class _Format:
    """A memory format or a layout, which ``torch.save``, of protocol 2, cannot name."""

    name: str

    def found(self) -> Any:
        return getattr(torch, self.name)


def lines_of(graph: Graph) -> list[Line]:
    """(op, name, target, args, kwargs, meta) of every node."""
    return [
        (n.op, n.name, _packed(n.target), _mapped(n.args, _packed), _mapped(n.kwargs, _packed), dict(n.meta))
        for n in graph.nodes
    ]


def graph_of(lines: list[Line]) -> Graph:
    """The graph that ``lines_of`` was given."""
    graph = Graph()
    nodes: dict[str, Node] = {}

    def unpacked(value: Any) -> Any:
        if isinstance(value, _Ref):
            return nodes[value.name]
        return value.found() if isinstance(value, _Op | _Format) else value

    for op, name, target, args, kwargs, meta in lines:
        node = graph.create_node(op, unpacked(target), _mapped(args, unpacked), _mapped(kwargs, unpacked), name)
        node.meta.update(meta)
        nodes[name] = node
    return graph


def _packed(value: Any) -> Any:
    if isinstance(value, Node):
        return _Ref(value.name)
    if isinstance(value, torch._ops.OpOverload):
        overload = value._overloadname
        return _Op(value._schema.name, "" if overload == "default" else overload)
    if isinstance(value, torch.memory_format | torch.layout):
        return _Format(str(value).removeprefix("torch."))
    return value


def _mapped(value: Any, function: Any) -> Any:
    """Plain containers with ``function`` of what is in them."""
    if isinstance(value, tuple):
        items = [_mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_mapped(item, function) for item in value]
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(part, function) for part in operator.attrgetter("start", "stop", "step")(value)))
    return function(value)
