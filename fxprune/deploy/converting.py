"""Which of the user's lines a converter refuses: of the node that it ran, or of the ops that its message names.

LiteRT and torch's own passes write a node's ``stack_trace`` out themselves; others name the op alone.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import torch
from torch import fx

from fxprune.errors import ExportError, InputError
from fxprune.io.text import some
from fxprune.recording.sources import line_of, node_run

_LINES = 3  # of the user's, at most


@contextlib.contextmanager
def converting(program: torch.export.ExportedProgram | fx.GraphModule) -> Iterator[None]:
    """Where a converter or quantiser fails inside, name the user's lines of the ops that it fails at.

    Args:
        program: what is converted: of ``torch.export.export``, or its ``module()``.

    Raises:
        InputError: it is none.
        ExportError: instead of an exception that names ops of the program, or comes of one; others pass as they are.

    Examples:
        >>> exported = torch.export.export(model, (x,))
        >>> with fxprune.converting(exported):
        ...     raise RuntimeError("no rule for aten.linear.default")
        Traceback (most recent call last):
            ...
        fxprune.errors.ExportError: aten.linear.default comes from 7 (torch.nn.modules.linear.Linear).
        RuntimeError: no rule for aten.linear.default
    """
    if not isinstance(program, (torch.export.ExportedProgram, fx.GraphModule)):
        raise InputError(f"program is {type(program).__name__}; pass what torch.export.export returned.")
    try:
        yield
    except Exception as error:
        named = lines_named(error, program)
        if not named:
            raise
        raise ExportError(f"{named}.\n{type(error).__name__}: {error}") from error


def lines_named(error: BaseException, program: torch.export.ExportedProgram | fx.GraphModule) -> str:
    """``aten.relu.default comes from net.py:9 in forward``; "" if the error tells of no op of the program."""
    errors = list(_chain(error))
    text = "\n".join(map(str, errors))
    found = _written_out(text, program.graph) or _run(errors) or _named(text, program.graph)
    if not found and isinstance(program, torch.export.ExportedProgram):
        # Converters take the program apart first, into ops that it does not have itself.
        with contextlib.suppress(Exception):
            found = _named(text, program.run_decompositions().graph)
    lines: dict[str, dict[str, None]] = {}
    for node in found:
        if line := line_of(node) or _layer_of(node):
            lines.setdefault(_op(node) or node.name, {})[line] = None
    return "; ".join(f"{op} comes from {some(list(each), _LINES)}" for op, each in lines.items())


def _layer_of(node: fx.Node) -> str:
    """``features.1 (torch.nn.modules.activation.ReLU)``: of a network of torch's containers, which has no line."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return "{} ({})".format(*stack[-1]) if stack and stack[-1][0] else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _written_out(text: str, graph: fx.Graph) -> list[fx.Node]:
    """The nodes that a text has as torch writes them: ``%relu : [num_users=1] = call_function...``."""
    names = {*re.findall(r"%(\w+) : \[", text)}
    return [node for node in graph.nodes if node.name in names]


def _run(errors: Iterable[BaseException]) -> list[fx.Node]:
    """The node that ran where the first of the errors was raised that was raised in one."""
    nodes = (node_run(error) for error in errors)
    return [node for node in nodes if node is not None][-1:]


def _named(text: str, graph: fx.Graph) -> list[fx.Node]:
    """The nodes of ops that a text names."""
    named = {op for op in {_op(node) for node in graph.nodes} if op and _names(text, op)}
    return [node for node in graph.nodes if _op(node) in named]


def _op(node: fx.Node) -> str:
    """``aten.add.Tensor``; "" for what is no operator of torch."""
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


def _names(text: str, op: str) -> bool:
    """Whether a text names an op: with its overload (``aten.add.Tensor``), or without one (``aten::add``)."""
    namespace, name, overload = op.split(".")
    bare = rf"(?<!\w){re.escape(namespace)}(?:\.|::){re.escape(name)}"
    return re.search(rf"{bare}(?:\.{re.escape(overload)}\b|(?!\w|\.\w))", text) is not None
