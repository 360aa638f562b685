"""The table of rules and what a rule sees of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from fxprune.labels.factors import Labels

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation


class Call:
    """One aten call. ``arguments``: by the schema's names, defaults filled in; ``outputs``: the tensors it made."""

    def __init__(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]):
        self.func = func
        name: str = func.overloadpacket.__name__
        self.name = name if name in RULES or not func._schema.is_mutable else name.rstrip("_")
        self.outputs = outputs
        self.arguments: dict[str, Any] = dict(kwargs)
        for position, argument in enumerate(func._schema.arguments):
            if position < len(args):
                self.arguments[argument.name] = args[position]
            elif argument.name not in self.arguments and argument.has_default_value():
                self.arguments[argument.name] = argument.default_value
        if not func._schema.is_mutable or self.arguments.get("out") is None:
            self.arguments.pop("out", None)
        operands = {k: v for k, v in self.arguments.items() if k != "out"}
        self.tensors = [t for t in tree_flatten(operands)[0] if isinstance(t, Tensor)]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

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


Rule = Callable[["Propagation", Call], "Labels | list[Labels]"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for aten ops by their names without overloads. In-place variants follow by themselves."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for aten.{name}")
            RULES[name] = function
        return function

    return register
