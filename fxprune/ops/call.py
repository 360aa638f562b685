"""What a rule sees of a call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from fxprune.ops.meta import tensors_in
from fxprune.ops.table import Op, find, is_pointwise, record_name


@dataclass(frozen=True)
class Signature:
    """What is said once of an op. ``name``: in words, bare of PyTorch's own. ``record``: the name of its record.

    ``defaults``: of the arguments that have one.
    """

    name: str
    record: str
    arguments: tuple[str, ...]
    defaults: dict[str, Any]
    is_mutable: bool
    is_pointwise: bool


@cache
def signature(func: Any) -> Signature:
    schema, record = func._schema, record_name(func)
    return Signature(
        record.removeprefix("aten::"),
        record,
        tuple(a.name for a in schema.arguments),
        {a.name: a.default_value for a in schema.arguments if a.has_default_value()},
        schema.is_mutable,
        is_pointwise(func),
    )


class Call:
    """One aten call. ``arguments``: those given, by the schema's names; ``outputs``: the tensors it made."""

    def __init__(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]):
        self.func = func
        self.given = args, kwargs
        self.signature = signature(func)
        self.name = self.signature.name
        self.outputs = outputs
        arguments: dict[str, Any] = dict(kwargs)
        arguments.update(zip(self.signature.arguments, args, strict=False))
        written = arguments.pop("out", None)
        self.tensors = tensors_in(arguments.values())
        if written is not None and self.signature.is_mutable:
            arguments["out"] = written
        self.arguments = arguments

    @property
    def record(self) -> Op | None:
        """What is known of the op."""
        return find(self.signature.record)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name] if name in self.arguments else self.signature.defaults[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments[name] if name in self.arguments else self.signature.defaults.get(name, default)

    @property
    def input(self) -> Tensor:
        """The first operand."""
        tensor: Tensor = self.tensors[0]
        return tensor

    @property
    def out(self) -> Tensor:
        return self.outputs[0]

    def dims(self, name: str = "dim") -> list[int]:
        """The argument as a list of non-negative dims of ``input``; all of them if it is None or empty."""
        value, ndim = self.get(name), self.input.ndim
        if value is None or value == []:
            return list(range(ndim))
        return [d % ndim for d in ([value] if isinstance(value, int) else value)]
