"""Numbers that remember the graph node they came from.

``x.shape`` yields ``TracedInt``s. Arithmetic on them is remembered as a ``Lazy`` expression, which becomes nodes only
when a recorded op takes the number as an argument. A comparison gives a plain truth value, and so does ``int()`` in
code that keeps no memory give a plain number: the owner is told of both (``decided``), since no graph can follow them.
Everything else sees a plain number. A module's ``training`` flag reads as a ``TracedFlag``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node


class Lazy:
    """A node that will be created when a recorded op needs it.

    ``op`` and ``target`` are those of ``fx.Node``; ``args`` may hold nodes and traced numbers. ``owner`` is the
    recording the number belongs to: in any other recording it is a plain number. ``of_numpy``: it stands for a number
    of NumPy's, whose methods (``astype``) it has.
    """

    def __init__(self, owner: Any, op: str, target: str | Callable[..., Any], args: tuple[Any, ...],
                 node: Node | None = None, of_numpy: bool = False) -> None:  # fmt: skip
        self.owner = owner
        self.op = op
        self.target = target
        self.args = args
        self.node = node
        self.of_numpy = of_numpy


def plain(value: Any) -> Any:
    """The number without its memory; any other value as it is."""
    if not isinstance(value, (TracedInt, TracedFloat, Constant, TracedFlag)):
        return value
    if isinstance(value, TracedFlag):
        return value.value
    if isinstance(value, TracedInt):
        return int.__pos__(value)
    return float.__pos__(value)


def traced(value: Any, lazy: Lazy) -> Any:
    """A number that remembers ``lazy``; any other value as it is."""
    if type(value) is int:
        return TracedInt(value, lazy)
    if type(value) is float:
        return TracedFloat(value, lazy)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, TracedFlag)


def _of_numpy(value: Any) -> Any:
    """A number of NumPy's, where Python computes alike, as one of Python's; any other value as it is."""
    if isinstance(value, np.ndarray) and not value.ndim:  # what NumPy makes of its numbers on the way to a ufunc
        value = value[()]
    if isinstance(value, Constant):
        return float.__pos__(value)
    return value.item() if isinstance(value, (np.integer, np.float64)) else value


def _is_of_numpy(value: Any) -> bool:
    return value.lazy.of_numpy if isinstance(value, (TracedInt, TracedFloat)) else isinstance(value, np.generic)


def _unary(function: Callable[..., Any], keeps: bool = False) -> Callable[..., Any]:
    """``keeps``: of a number of NumPy's it gives one of NumPy's."""

    def method(self: Any, *args: Any) -> Any:
        value = function(plain(self), *args)
        of_numpy = keeps and self.lazy.of_numpy
        return traced(value, Lazy(self.lazy.owner, "call_function", function, (self, *args), of_numpy=of_numpy))

    return method


def _binary(function: Callable[[Any, Any], Any], *, swap: bool = False) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        of_numpy, other = _is_of_numpy(self) or _is_of_numpy(other), _of_numpy(other)
        if not _is_number(other):
            if isinstance(other, (str, bytes, bytearray, list, tuple)):  # repeated so often
                self.lazy.owner.decided(self, "==", plain(self), True)
            return NotImplemented
        args = (other, self) if swap else (self, other)
        value = function(plain(args[0]), plain(args[1]))
        return traced(value, Lazy(self.lazy.owner, "call_function", function, args, of_numpy=of_numpy))

    return method


def _comparison(function: Callable[[Any, Any], Any], relation: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        other = _of_numpy(other)
        if not _is_number(other):
            return NotImplemented
        return self.lazy.owner.compared(self, relation, other, function(plain(self), plain(other)))

    return method


def _leaving(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A conversion to a plain number, which takes the value out of the graph."""

    def method(self: Any) -> Any:
        value = plain(self)
        self.lazy.owner.decided(self, "==", value, True)
        return convert(value)

    return method


def _leaving_by(name: str) -> Callable[..., Any]:
    """A method of the plain number, which takes the value out of the graph."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = _leaving(plain)(self)
        return getattr(value, name)(*args, **kwargs)

    return method


_COMPARISONS = {"__eq__": "==", "__ne__": "!=", "__lt__": "<", "__le__": "<=", "__gt__": ">", "__ge__": ">="}
_UNARY: dict[str, Callable[..., Any]] = {
    "__neg__": operator.neg,
    "__abs__": abs,
    "__ceil__": math.ceil,
    "__floor__": math.floor,
    "__trunc__": math.trunc,
    "__round__": round,
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "pow": operator.pow,
}


# Of whole numbers only.
_BITS: dict[str, Callable[[Any, Any], Any]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}
_UFUNCS: dict[Any, Callable[[Any, Any], Any]] = {
    np.add: operator.add,
    np.subtract: operator.sub,
    np.multiply: operator.mul,
    np.divide: operator.truediv,
    np.floor_divide: operator.floordiv,
    np.remainder: operator.mod,
    np.power: operator.pow,
}


_ROUNDING: dict[Any, Callable[[Any], Any]] = {
    np.ceil: math.ceil,
    np.floor: math.floor,
    np.trunc: math.trunc,
    np.rint: round,
}


# Which may differ in the last digit, for some numbers.
_FUNCTIONS: dict[Any, Callable[[Any], Any]] = {
    np.sqrt: math.sqrt,
    np.exp: math.exp,
    np.log: math.log,
    np.log2: math.log2,
    np.log10: math.log10,
}


def _ufunc(self: Any, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
    """NumPy computes with the number: as Python does, or the value leaves."""
    if method == "__call__" and not kwargs:
        number = _of_numpy(inputs[0])
        if ufunc in _UFUNCS and _is_number(number) and inputs[1] is self:
            return as_numpys(_binary(_UFUNCS[ufunc], swap=True)(self, number))
        if ufunc in _ROUNDING and math.isfinite(plain(self)):
            rounded = self if isinstance(self, TracedInt) else _unary(_ROUNDING[ufunc])(self)
            return as_numpys(rounded if isinstance(ufunc(plain(self)), np.integer) else traced_float(rounded))
        if ufunc in _FUNCTIONS and plain(self) > 0 and _FUNCTIONS[ufunc](plain(self)) == ufunc(plain(self)):
            return as_numpys(traced_call(_FUNCTIONS[ufunc])(self))
    for value in inputs:
        if isinstance(value, (TracedInt, TracedFloat)):
            value.lazy.owner.decided(value, "==", plain(value), True)
    return getattr(ufunc, method)(*map(plain, inputs), **kwargs)


def as_numpys(number: Any) -> Any:
    """A number as one of NumPy's, if it is traced."""
    if isinstance(number, (TracedInt, TracedFloat)):
        of = number.lazy
        return type(number)(plain(number), Lazy(of.owner, of.op, of.target, of.args, of.node, of_numpy=True))
    return number


def _as_type(self: Any, dtype: Any, *args: Any, **kwargs: Any) -> Any:
    """``astype`` of a number of NumPy's; to another type than Python's own numbers are of, the value leaves."""
    to = {np.dtype(np.int64): traced_int, np.dtype(np.float64): traced_float}.get(np.dtype(dtype))
    if to is not None and not (args or kwargs):
        return as_numpys(to(self))
    return _left(self).astype(dtype, *args, **kwargs)


def _left(number: Any) -> Any:
    """The value as a number of NumPy's, which takes it out of the graph."""
    return _kind(number)(_leaving(plain)(number))


def _kind(number: Any) -> type[np.generic]:
    return np.int64 if isinstance(number, int) else np.float64


def _attribute_of_numpy(self: Any, name: str) -> Any:
    """What Python's numbers do not have and NumPy's do, which takes the value out of the graph."""
    if not (self.lazy.of_numpy and hasattr(_kind(self), name)):
        raise AttributeError(f"{type(plain(self)).__name__!r} object has no attribute {name!r}")
    if name == "astype":
        return functools.partial(_as_type, self)
    return getattr(_left(self), name)


# What is told of a number, or made of it, by methods and attributes of its class.
_METHODS = "bit_length bit_count as_integer_ratio to_bytes is_integer hex conjugate".split()
_ATTRIBUTES = "numerator denominator real imag".split()


def _with_arithmetic(cls: type) -> None:
    for name, function in _UNARY.items():
        setattr(cls, name, _unary(function, keeps=name in ("__neg__", "__abs__")))
    for name, binary in _BINARY.items():
        setattr(cls, f"__{name}__", _binary(binary))
        setattr(cls, f"__r{name}__", _binary(binary, swap=True))
    for name, relation in _COMPARISONS.items():
        setattr(cls, name, _comparison(getattr(operator, name), relation))
    cls.__array_ufunc__ = _ufunc  # type: ignore[attr-defined]
    cls.__getattr__ = _attribute_of_numpy  # type: ignore[attr-defined]
    cls.__bool__ = lambda self: self != 0  # type: ignore[attr-defined]
    cls.__int__ = _leaving(int)  # type: ignore[attr-defined]
    cls.__float__ = _leaving(float)  # type: ignore[attr-defined]
    for name in _METHODS:
        if hasattr(cls, name):
            setattr(cls, name, _leaving_by(name))
    for name in _ATTRIBUTES:
        if hasattr(cls, name):
            setattr(cls, name, property(_leaving(operator.attrgetter(name))))


def _with_bits(cls: type) -> None:
    setattr(cls, "__invert__", _unary(operator.invert))  # noqa: B010
    for name, bits in _BITS.items():
        setattr(cls, f"__{name}__", _binary(bits))
        setattr(cls, f"__r{name}__", _binary(bits, swap=True))


class TracedInt(int):
    """An ``int`` computed from sizes, with the expression that computes it."""

    lazy: Lazy

    def __new__(cls, value: int, lazy: Lazy) -> TracedInt:
        self = super().__new__(cls, value)
        self.lazy = lazy
        return self

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __pos__(self) -> TracedInt:
        return self

    def __hash__(self) -> int:
        """Different for every expression, or a memoising function answers with sizes of an earlier call."""
        return int(self.lazy.owner.hash_of(self.lazy, plain(self)))

    def __copy__(self) -> TracedInt:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedInt:
        return self

    def __reduce__(self) -> Any:
        return int, (plain(self),)


class TracedFloat(float):
    """A ``float`` computed from sizes, with the expression that computes it."""

    lazy: Lazy

    def __new__(cls, value: float, lazy: Lazy) -> TracedFloat:
        self = super().__new__(cls, value)
        self.lazy = lazy
        return self

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __pos__(self) -> TracedFloat:
        return self

    def __hash__(self) -> int:
        return hash(plain(self))

    def __copy__(self) -> TracedFloat:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedFloat:
        return self

    def __reduce__(self) -> Any:
        return float, (plain(self),)


def _spelling(method: Callable[..., str]) -> Callable[..., str]:
    def call(self: Any, *args: Any) -> str:
        self.lazy.owner.spelled()
        return method(plain(self), *args)

    return call


_with_arithmetic(TracedInt)
_with_bits(TracedInt)
_with_arithmetic(TracedFloat)
for _cls, _base in ((TracedInt, int), (TracedFloat, float)):
    _cls.__str__ = _spelling(_base.__str__)  # type: ignore[method-assign]
    _cls.__format__ = _spelling(_base.__format__)  # type: ignore[method-assign]


class Constant(float):
    """A float of the model's code or objects, which lets traced numbers answer.

    ``0.5 * size`` is answered by the float, in C, to which a ``TracedInt`` is any ``int``; ``size * 0.5`` is not. What
    it computes with other numbers is a ``Constant`` again.
    """

    __hash__ = float.__hash__

    def __copy__(self) -> Constant:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Constant:
        return self

    def __reduce__(self) -> Any:
        return float, (float.__pos__(self),)


def constant(value: Any) -> Any:
    """A ``Constant`` of a plain float, a tuple with those of its floats; any other value as it is."""
    if type(value) is tuple and any(type(part) is float for part in value):
        return tuple(map(constant, value))
    return Constant(value) if type(value) is float else value


def _letting(name: str) -> Callable[..., Any]:
    own = getattr(float, name)

    def method(self: Any, *others: Any) -> Any:
        if any(isinstance(other, (TracedInt, TracedFloat)) for other in others):
            return NotImplemented
        return constant(own(self, *others))

    return method


_OF_FLOATS = (*_COMPARISONS, *(f"__{prefix}{name}__" for name in _BINARY for prefix in ("", "r")))
for _name in (*_OF_FLOATS, "__neg__", "__abs__"):
    setattr(Constant, _name, _letting(_name))


class TracedFlag:
    """A module's ``training`` flag: reads as the recorded value, written down as the module's flag of the day.

    ``on_branch`` is called when Python code branches on the flag, computes with it or looks something up by it, which
    no graph can follow.
    """

    lazy: Lazy
    value: bool
    on_branch: Callable[[], None]

    def __init__(self, value: bool, lazy: Lazy, on_branch: Callable[[], None]) -> None:
        self.lazy = lazy
        self.value = value
        self.on_branch = on_branch

    def __bool__(self) -> bool:
        self.on_branch()
        return self.value

    def __repr__(self) -> str:
        return repr(self.value)

    def __deepcopy__(self, memo: dict[int, Any]) -> bool:
        return self.value

    def __reduce__(self) -> Any:
        return bool, (self.value,)


def _with_answers(cls: Any) -> None:
    """What is made of a flag by operators and conversions is made of the plain one, and told."""

    def answer(function: Callable[..., Any], swap: bool = False) -> Callable[..., Any]:
        def method(self: TracedFlag, *others: Any) -> Any:
            self.on_branch()
            values = (self.value, *map(plain, others))
            return function(*(reversed(values) if swap else values))

        return method

    unary: dict[str, Any] = {"int": int, "float": float, "index": int, "hash": hash, "neg": operator.neg}
    comparisons: dict[str, Any] = {name.strip("_"): getattr(operator, name) for name in _COMPARISONS}
    for name, function in (unary | comparisons | _BINARY | _BITS).items():
        setattr(cls, f"__{name}__", answer(function))
    for name, function in (_BINARY | _BITS).items():
        setattr(cls, f"__r{name}__", answer(function, swap=True))


_with_answers(TracedFlag)


def traced_int(value: Any = 0, *args: Any, **kwargs: Any) -> int:
    """``int(value)`` that keeps the memory of a traced number."""
    if args or kwargs:
        return int(value, *args, **kwargs)
    if isinstance(value, TracedInt):
        return value
    if isinstance(value, torch.Tensor):
        return traced_int(value.item()) if value.numel() == 1 else int(value)
    if isinstance(value, TracedFloat):
        if value.lazy.target is float and isinstance(value.lazy.args[0], TracedInt):
            return value.lazy.args[0]  # which lost nothing on the way
        return TracedInt(int(plain(value)), Lazy(value.lazy.owner, "call_function", int, (value,)))
    return int(value)


def traced_float(value: Any = 0.0) -> float:
    """``float(value)`` that keeps the memory of a traced number."""
    if isinstance(value, torch.Tensor):
        return traced_float(value.item()) if value.numel() == 1 else float(value)
    if isinstance(value, TracedFloat):
        return value
    if isinstance(value, TracedInt):
        return TracedFloat(float(plain(value)), Lazy(value.lazy.owner, "call_function", float, (value,)))
    return Constant(value)


def traced_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of numbers that keeps the memory of traced ones: ``max``, ``math.sqrt``."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        numbers = args[0] if len(args) == 1 and type(args[0]) in (tuple, list, torch.Size) else args
        owner = next((n.lazy.owner for n in numbers if isinstance(n, (TracedInt, TracedFloat))), None)
        if owner is None or kwargs or not all(map(_is_number, numbers)):
            return constant(function(*args, **kwargs))
        value = function(*map(plain, numbers)) if numbers is args else function(tuple(map(plain, numbers)))
        given = tuple(numbers) if numbers is args else (tuple(numbers),)
        return traced(value, Lazy(owner, "call_function", function, given))

    return call
