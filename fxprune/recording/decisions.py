"""What Python code of the model takes out of the graph: numbers that it reads, compares and counts by."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.errors import RecordError
from fxprune.recording import patches
from fxprune.recording.calls import Call
from fxprune.recording.guards import NUMBER
from fxprune.recording.modes import Unrecorded
from fxprune.recording.options import Options
from fxprune.recording.sources import current_source
from fxprune.recording.traced import Lazy, TracedFloat, TracedInt, constant, plain, traced, traced_call
from fxprune.recording.writer import GraphWriter

LAYOUT = "how a tensor lies in memory"
# What holds where equal numbers count as unequal in a comparison, and the answer is the other one.
_OR_EQUAL = {"<": "<=", "<=": ">=", ">": ">=", ">=": "<="}


class Decisions:
    """A number that can be followed goes on as a node; any other binds the graph to it, by a guard."""

    def __init__(self, writer: GraphWriter, unrecorded: Unrecorded, options: Options) -> None:
        self._writer, self._unrecorded, self._options = writer, unrecorded, options
        self._told_unequal: set[tuple[str, str]] = set()
        writer.on_decision, writer.on_comparison = self.decided, self.compared

    def read(self, call: Call, result: Any) -> Any:
        """A value was read from a tensor. It goes on as a node where it is a number, else the graph is bound to it."""
        if isinstance(result, str):  # what a message says of a tensor, as a rule; what else it may be, probes tell
            return result
        name = str(getattr(call.target, "__name__", call.target))
        operand = call.args[0]
        is_truth = name in ("__bool__", "is_nonzero") and isinstance(operand, Tensor)
        node = self._writer.node_of(operand) if is_truth else self._writer.create(call)
        if not self._writer.depends_on_inputs(node):
            self._writer.note("a value read from a tensor is kept as a constant")
            return constant(result)
        if isinstance(result, bool):
            line = current_source()
            if line in self._options.flipped:
                return not result
        if not is_truth:
            node.meta[NUMBER] = result
        if name == "item" and type(result) in (int, float):
            return traced(result, Lazy(self._writer, "call_method", "item", (operand,), node))
        if name == "tolist" and isinstance(result, list) and _is_of_numbers(result):
            self._writer.guard(self._writer.size(operand, 0), "==", len(result))
            entries = (
                Lazy(self._writer, "call_function", operator.getitem, (node, place)) for place in range(len(result))
            )
            return [traced(item, lazy) for item, lazy in zip(result, entries, strict=True)]
        if isinstance(result, np.ndarray):
            node, result_known = self._writer.node_of(operand), result.tolist()
        else:
            result_known = result
        if not _is_plain(result_known):
            raise RecordError(
                f"{current_source()}: {name} takes values out of a tensor that depends on the inputs, as a "
                f"{type(result).__name__}, which no graph can follow. Express what follows with torch functions."
            )
        self._writer.guard(node, "==", result_known)
        return result

    def decided(self, value: Any, relation: str, other: Any, outcome: bool) -> None:
        """The model took a number that it got from sizes or values out of the graph, or branched on it."""
        if not self._unrecorded.now():
            with self._unrecorded:
                if _is_of_strides(value) or _is_of_strides(other):
                    self._writer.note(f"forward asks {LAYOUT}; recorded as it is for the example")
                else:
                    self._writer.guard(value, relation, other, outcome)

    def compared(self, value: Any, relation: str, other: Any, outcome: bool) -> bool:
        """The model compares such a number; of equal ones it may be told that they are not, see ``Options``."""
        if self._options.unequal and plain(value) == plain(other) and not self._unrecorded.now():
            place = current_source(), self._writer.path[-1]
            if place[0] in self._options.unequal and place not in self._told_unequal:
                self._told_unequal.add(place)  # once, or a loop may never end
                if relation in _OR_EQUAL:
                    self.decided(value, _OR_EQUAL[relation], other, True)
                return not outcome
        self.decided(value, relation, other, outcome)
        return outcome

    def builtins(self) -> dict[str, Any]:
        return {"int": patches.Int, "float": patches.Float, "len": self._length, "range": self._range,
                "max": traced_call(max), "min": traced_call(min)}  # fmt: skip

    def _range(self, *bounds: Any) -> range:
        if not self._unrecorded.is_here():
            return range(*bounds)
        traced = [bound for bound in bounds if isinstance(bound, TracedInt)]
        if traced and not self._unrecorded.now():
            self._writer.note(f"a loop over range{bounds}, which depends on the inputs, is unrolled")
            for bound in traced:
                self.decided(bound, "==", plain(bound), True)
        return range(*map(plain, bounds))

    def _length(self, value: Any) -> int:
        """``len(value)`` that keeps the memory of a tensor's first size."""
        if not isinstance(value, Tensor) or self._unrecorded.now():
            return len(value)
        with self._unrecorded:
            return self._writer.size(value, 0) if value.ndim else len(value)


def _is_of_strides(value: Any) -> bool:
    if not isinstance(value, (TracedInt, TracedFloat)):
        return False
    return value.lazy.target == "stride" or any(map(_is_of_strides, value.lazy.args))


def _is_of_numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) for value in values)


def _is_plain(value: Any) -> bool:
    """A number or a nested list of numbers."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float))
