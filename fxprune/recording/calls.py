"""How one call seen by the function mode is written as a graph node that code generation can emit.

Python reaches tensors through methods, properties, reflected dunders and builtins. A node has only ``call_method`` and
``call_function``; the tables below say which, with the operands in the order the target wants.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor
from torch.fx.graph import _is_from_torch
from torch.fx.node import _get_qualified_name


class Call(NamedTuple):
    """``op`` and ``target`` of an ``fx.Node``, with arguments that are not converted to nodes yet."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_BINARY = "add sub mul truediv floordiv mod pow matmul lshift rshift and or xor"
_IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift"
_OTHERS = "neg pos abs invert eq ne lt le gt ge"
_OPERATORS: dict[str, tuple[Callable[..., Any], bool]] = {
    **{f"__{n}__": (getattr(operator, f"__{n}__"), False) for n in f"{_BINARY} {_IN_PLACE} {_OTHERS}".split()},
    **{f"__r{n}__": (getattr(operator, f"__{n}__"), True) for n in _BINARY.split()},
}
"""What Python looks up for an operator, the operator, and whether what it is looked up on stands on the right of it."""

SLOTS = [slot for slot in _OPERATORS if hasattr(Tensor, slot)]
"""Those of a tensor; torch tells its modes of the method that does the work instead, but for the following."""

_OPERATORS |= {f"__{n}__": (getattr(operator, f"__{n}__"), False) for n in ("getitem", "setitem", "delitem")}
_OPERATORS |= {"__div__": (operator.truediv, False), "__rdiv__": (operator.truediv, True)}
_OPERATORS |= {"__idiv__": (operator.itruediv, False)}


class Operator:
    """``1 + x`` as it is written. Torch tells its modes of the method that does the work: ``x.add(1)``."""

    def __init__(self, slot: str, method: Callable[..., Any]) -> None:
        self.slot, self.method = slot, method
        self.__name__ = _OPERATORS[slot][0].__name__

    def __call__(self, *args: Any) -> Any:
        return self.method(*args)


class TorchFunction:
    """A torch function whose qualified name does not lead back to it, as a target with a name of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchFunction:
        return self

    def __reduce__(self) -> Any:
        if isinstance(self.function, torch._ops.OpOverloadPacket):
            return _op_packet, (self.function._qualified_op_name,)
        return type(self), (self.function,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchFunction) and self.function == other.function

    def __hash__(self) -> int:
        return hash(self.function)


def _op_packet(name: str) -> TorchFunction:
    """The op ``aten::mul``, whichever overload the arguments ask for; pickle cannot name it."""
    namespace, _, op = name.partition("::")
    return TorchFunction(getattr(getattr(torch.ops, namespace), op))


class FunctionApply(TorchFunction):
    """``cls.apply`` of a ``torch.autograd.Function``, custom backward included."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls)  # not its apply: while a model is recorded, that leads to the recorder
        self.cls = cls
        self.__name__ = f"{cls.__name__}_apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.cls.apply(*args, **kwargs)  # type: ignore[attr-defined]


class Constant(TorchFunction):
    """A Python object that is neither a number nor a tensor, handed out as it is."""

    def __init__(self, value: Any) -> None:
        super().__init__(lambda: value)
        self.value = value
        self.__name__ = f"constant_{type(value).__name__}"

    def __reduce__(self) -> Any:
        return Constant, (self.value,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class SeededGenerator(TorchFunction):
    """A generator that stands, at every call, where the recorded one stood before it was first drawn from."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__(self.made)
        self.state, self.device = generator.get_state(), generator.device
        self.__name__ = "generator"

    def made(self) -> torch.Generator:
        generator = torch.Generator(self.device)
        generator.set_state(self.state)
        return generator

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def property_name(function: Any) -> str | None:
    """``"T"`` for the getter of ``Tensor.T``; None if ``function`` is no getter."""
    return _accessor_name(function, "__get__")


def setter_name(function: Any) -> str | None:
    """``"data"`` for the setter of ``Tensor.data``; None if ``function`` is no setter."""
    return _accessor_name(function, "__set__")


def _accessor_name(function: Any, kind: str) -> str | None:
    if getattr(function, "__name__", None) != kind:
        return None
    owner = getattr(function, "__self__", None)
    if isinstance(owner, property):
        return getattr(owner.fget, "__name__", None)
    return getattr(owner, "__name__", None)


def is_method(function: Any) -> bool:
    """Whether ``function`` is a method of ``Tensor``."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return False
    name = getattr(function, "__name__", "")
    found = getattr(Tensor, name, None)
    return (found is function or getattr(found, "__wrapped__", None) is function) and (
        getattr(function, "__objclass__", None) is not None
        or getattr(function, "__qualname__", "").startswith("Tensor.")
    )


@functools.lru_cache(maxsize=4096)
def _nameable(function: Any) -> bool:
    """Whether generated code that spells the function's qualified name gets this very function."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) or not _is_from_torch(function):
        return True
    try:
        found: Any = {"torch": torch}
        name = _get_qualified_name(function)
        found = torch
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    except (AttributeError, RuntimeError):
        return False
    return found is function


def written_as(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The node form of ``function(*args, **kwargs)``."""
    getter = property_name(function)
    if getter is not None:
        return Call("call_function", getattr, (args[0], getter), {})
    if isinstance(function, Operator):
        return _method_form(function.slot, args, kwargs)
    name = getattr(function, "__name__", "")
    if is_method(function):
        return _method_form(name, args, kwargs)
    if isinstance(function, torch._ops.OpOverloadPacket):
        return Call("call_function", TorchFunction(function), args, kwargs)
    return Call("call_function", function if _nameable(function) else TorchFunction(function), args, kwargs)


def _method_form(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    if name in _OPERATORS and not kwargs:
        target, is_reflected = _OPERATORS[name]
        return Call("call_function", target, args[::-1] if is_reflected else args, {})
    if not args:  # every argument by name, the tensor too
        kwargs = dict(kwargs)
        args = (kwargs.pop("self" if "self" in kwargs else "input"),)
    return Call("call_method", name, args, kwargs)
