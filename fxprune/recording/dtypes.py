"""Dtypes that a model reads from its tensors, as in ``y.to(x.dtype)`` and ``torch.finfo(x.dtype).min``.

A dtype is one object wherever it comes from, so a run does not show which were read and which are written in the code.
A second run does, on floats of another width: where both make the same calls, dtypes that differ follow the tensor that
was asked last.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from fxprune.recording.either import Place, compute, differing, literal, literals
from fxprune.recording.writer import GraphWriter

OTHER = {
    torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32,
    torch.float64: torch.float32,
}  # fmt: skip
NOTE = "forward reads the dtype of floats, and the graph has it as it was recorded: cast the model before it is pruned"

_LIMITS = ("min", "max", "eps", "tiny", "smallest_normal", "resolution")


Way = tuple[fx.Node | str, str]
"""A tensor, or the name of a parameter, and which limit of the floats that it has; "" is their dtype itself."""

Ways = dict[tuple[fx.Node, Place], Way | None]
"""Of every literal that floats of another width change; None where it is not known what follows them."""


def ways_of(writer: GraphWriter, other: GraphWriter | None) -> Ways | None:
    """Where the literals come from that ``other``, recorded on floats of another width, has otherwise.

    Returns:
        None where it makes other calls.
    """
    found = differing(writer, other)
    if found is None or other is None:
        return None
    nodes, twins = [*writer.graph.nodes], [*other.graph.nodes]
    twin_of, own = dict(zip(nodes, twins, strict=True)), dict(zip(twins, nodes, strict=True))
    asked = {node: other.dtypes_at.get(twin_of[node], {}) for node, _ in found}
    return {key: _way(literal(*key), then, asked[key[0]], own) for key, then in found.items()}


def follow_dtypes(writer: GraphWriter, ways: Ways) -> None:
    """Have the graph read what follows the floats' width."""
    for (node, place), way in ways.items():
        if way is not None:
            compute(node, place, partial(_read, writer.graph, *way))


def names_asked(writer: GraphWriter) -> bool:
    """Whether any node has a dtype, or a limit of it, that a tensor was asked for before."""
    return any(
        value is dtype or (type(value) is float and any(_limit(dtype, name) == value for name in _LIMITS))
        for node in writer.graph.nodes
        for dtype in writer.dtypes_at.get(node, ())
        for value in literals(node)
    )


def _way(value: Any, then: Any, asked: dict[torch.dtype, fx.Node], own: dict[fx.Node, fx.Node]) -> Way | None:
    """Where the literal comes from that is ``value`` here and ``then`` in the other run, whose tensors were asked."""
    for before, after in OTHER.items():
        tensor = asked.get(after)
        if tensor is None or not (tensor in own or tensor.op == "get_attr"):
            continue
        limits = (name for name in _LIMITS if (_limit(before, name), _limit(after, name)) == (value, then))
        limit = "" if (value, then) == (before, after) else next(limits, None)
        if limit is not None:
            return own.get(tensor, str(tensor.target)), limit
    return None


def _read(graph: fx.Graph, tensor: fx.Node | str, limit: str, _: Any) -> list[fx.Node]:
    made = [graph.get_attr(tensor)] if isinstance(tensor, str) else []
    made.append(graph.call_function(getattr, (made[0] if made else tensor, "dtype")))
    if limit:
        made.append(graph.call_function(torch.finfo, (made[-1],)))
        made.append(graph.call_function(getattr, (made[-1], limit)))
    return made


def _limit(dtype: torch.dtype, name: str) -> float:
    return float(getattr(torch.finfo(dtype), name))
