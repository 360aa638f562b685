"""Guards: nodes that stand for what a recording fixed and cannot follow.

A branch on a size, a loop over it, a value that was read from a tensor: the graph has one outcome of them. ``holds`` is
that outcome as a node, which raises when a call would have had another. It is an ordinary function of the graph, so it
survives copying, saving, compiling and exporting.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from fxprune.errors import GuardError
from fxprune.recording.forms import Form, difference

NUMBER = "number"
"""In the ``meta`` of a node whose value is read from a tensor: what it was in the recorded run."""

SIZES = ("size", "stride", len)
"""Targets of nodes that give the size of a tensor."""

RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "is": operator.is_,
}
OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_FREE = (torch.SymInt, torch.SymFloat, torch.SymBool)
_SHOWN = 40  # characters of a value


@has_side_effect
def holds(value: Any, relation: str, recorded: Any, source: str) -> None:
    """Go on if ``value relation recorded``, as in the recorded run.

    Args:
        value: a number, or a tensor: of one entry, or compared as a whole.
        relation: one of ``== != < <= > >= is``.
        recorded: what it is compared with: a number, a string, None, or for a tensor also a nested list of numbers.
        source: the user's line that asked.

    Raises:
        GuardError: it does not hold. While a graph is compiled or exported, the check becomes part of the result.
    """
    if isinstance(value, fx.Proxy):  # somebody traces the graph, to quantise it, say: the guard is in theirs too
        value.tracer.create_proxy("call_function", holds, (value, relation, recorded, source), {})
        return
    if isinstance(value, Tensor) and recorded is not None:
        _holds_of_tensor(value, relation, recorded, source)
        return
    condition = _compared(value, relation, recorded)
    is_number = isinstance(recorded, (int, float, *_FREE))
    if is_number and torch.compiler.is_dynamo_compiling():
        _hold_compiled(condition, value, relation, recorded, source)
    elif isinstance(condition, _FREE) or (
        is_number and not isinstance(recorded, bool) and torch.compiler.is_compiling()
    ):
        torch._check(condition, lambda: _text(value, relation, recorded, source))
    elif not condition:
        raise GuardError(_text(value, relation, recorded, source), source)


def _hold_compiled(condition: Any, value: Any, relation: str, recorded: Any, source: str) -> None:
    """While Dynamo traces, which takes constants for messages: sizes decide now, values when what it makes runs."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    if guard_or_false(condition):
        return
    text = _text("a number", relation, "another", source)
    if not guard_or_true(condition):
        torch._dynamo.graph_break(msg=text)  # the error of fullgraph=True; without it the next line runs uncompiled
        raise GuardError(_text(value, relation, recorded, source), source)
    torch._check(condition, lambda: text)


def _compared(value: Any, relation: str, recorded: Any) -> Any:
    if isinstance(value, (bool, torch.SymBool)) and isinstance(recorded, bool) and relation in ("==", "!="):
        return value if (relation == "==") == recorded else torch.sym_not(value)  # sympy has no difference of booleans
    return RELATIONS[relation](value, recorded)


def keeps(value: Any, relation: str, recorded: Any) -> bool:
    """Whether :func:`holds` would go on for these numbers."""
    return bool(RELATIONS[relation](value, recorded))


def _holds_of_tensor(value: Tensor, relation: str, recorded: Any, source: str) -> None:
    if value.is_meta:
        return
    if isinstance(recorded, bool):
        value = value.bool()
    other = recorded if isinstance(recorded, (int, float)) else torch.as_tensor(recorded, device=value.device)
    if isinstance(other, Tensor) and other.shape != value.shape:
        condition = torch.zeros((), dtype=torch.bool, device=value.device)
    else:
        condition = RELATIONS[relation](value, other).all()
    if torch.compiler.is_compiling():
        torch._assert_async(condition, _text("the value", relation, recorded, source))
    elif not bool(condition):
        raise GuardError(_text(value.tolist(), relation, recorded, source), source)


def _text(value: Any, relation: str, recorded: Any, source: str) -> str:
    return (
        f"{source or 'the model'}: forward goes another way for these inputs than in the recorded run, where "
        f"{_shown(value)} {relation} {_shown(recorded)} would have held. Call the network with inputs like the "
        "example's in this, or record it with an example of this kind."
    )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


@has_side_effect
def fits(values: tuple[Any, ...], names: tuple[str, ...], recorded: tuple[Form, ...], source: str) -> None:
    """Go on if the inputs have the form of the example's: see ``fxprune.recording.forms``.

    Args:
        values: of the parameters of forward.
        names: of these.
        recorded: their forms.
        source: where forward begins.

    Raises:
        GuardError: one has not, and which.
    """
    for value, name, form in zip(values, names, recorded, strict=True):
        found = difference(value, form)
        if found is not None:
            path, text = found
            where = f"{name}{path} of {source}" if source else f"{name}{path}"
            message = (
                f"{where}: it {text}. Call the network with inputs like the example's in this, or record it with an "
                "example of this kind."
            )
            if torch.compiler.is_dynamo_compiling():
                torch._dynamo.graph_break(msg=message)  # as in _hold_compiled
            raise GuardError(message, where)


def is_guard(node: fx.Node) -> bool:
    return node.target is holds or node.target is fits


def guards_of(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is holds]


@dataclass(frozen=True)
class Evidence:
    """Numbers of nodes by name, of runs in which some sizes of the inputs differ.

    ``needed``: runs that must have come to a guard to clear it. ``seen``: others, which can only speak against it.
    """

    needed: Sequence[Mapping[str, Any]]
    seen: Sequence[Mapping[str, Any]]

    def clears(self, names: Sequence[str], recorded: Mapping[str, Any]) -> bool:
        if any(name not in numbers for numbers in self.needed for name in names):
            return False
        runs = (*self.needed, *self.seen)
        return all(numbers[name] == recorded[name] for numbers in runs for name in names if name in numbers)


def settle(graph: fx.Graph, recorded: Mapping[str, Any], evidence: Iterable[Evidence]) -> None:
    """Drop the guards on sizes that no input decides: neither what they compare differs, nor what that comes from.

    A remainder or a comparison may well be the same at all sizes that are tried, and another at the next.

    Args:
        graph: with its guards; is changed.
        recorded: node name -> its number, on the example inputs; of a guard what it compares.
        evidence: the same on inputs of other sizes, for each that may vary; taken until it speaks against all guards.
    """
    names: dict[fx.Node, list[str]] = {}
    for guard in guards_of(graph):
        sources = _sources(guard)
        if sources is not None:
            names[guard] = [guard.name, *(node.name for node in sources)]
    cleared = [guard for guard in names if recorded.keys() >= set(names[guard])]
    for each in evidence:
        cleared = [guard for guard in cleared if each.clears(names[guard], recorded)]
        if not cleared:
            return
    for guard in cleared:
        erase(graph, guard)


def is_of_sizes(guard: fx.Node) -> bool:
    """Whether its number comes from sizes and counts of tensors alone, not from values or numbers among the inputs."""
    return _sources(guard) is not None


def _sources(guard: fx.Node) -> list[fx.Node] | None:
    """The sizes that its number is computed from, None where something else has a part in it."""
    pending, sources = [*guard.all_input_nodes], []
    if not pending or any(value.meta.get("shape") is not None for value in pending):
        return None
    while pending:
        node = pending.pop()
        if node.target in SIZES:
            sources.append(node)
        elif NUMBER in node.meta or not _is_number(node):
            return None
        else:
            pending += node.all_input_nodes
    return sources


def erase(graph: fx.Graph, guard: fx.Node) -> None:
    """Take a guard out of the graph, with the numbers that were computed for it alone."""
    pending = [guard]
    while pending:
        node = pending.pop()
        if node.users or node.op == "placeholder" or node.graph is not graph or node._erased:
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        pending += [each for each in inputs if _is_number(each)]


def _is_number(node: fx.Node) -> bool:
    """Whether the node computes with numbers, and nothing else."""
    if "mutates" in node.meta or node.meta.get("shape") is not None or node.op not in ("call_function", "call_method"):
        return False
    if node.target is operator.getitem:
        return False
    if node.target in ("size", "stride"):
        return True
    return getattr(node.target, "__module__", "") in ("_operator", "builtins", "math")
