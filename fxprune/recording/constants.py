"""Floats that stand in the code of a model, which let sizes answer while it is recorded: see ``Constant``."""

from __future__ import annotations

import operator
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fxprune.recording.traced import constant


@contextmanager
def constants_in(namespaces: list[dict[str, Any]]) -> Iterator[None]:
    """Floats in code, in defaults and among the variables of these Python modules are ``Constant``s inside."""
    held = [_held_in(namespace) for namespace in namespaces]
    functions = [(f, f.__code__, f.__defaults__, f.__kwdefaults__) for each in held for f in each.functions]
    attributes = [(cls, name, vars(cls)[name]) for each in held for cls, name in each.attributes if name in vars(cls)]
    variables = [(own, name, own[name]) for own, each in zip(namespaces, held, strict=True) for name in each.variables]
    try:
        for function, code, defaults, keywords in functions:
            function.__code__ = _with_constants(_Same(code))
            if defaults:
                function.__defaults__ = constant(defaults)
            if keywords:
                function.__kwdefaults__ = {name: constant(value) for name, value in keywords.items()}
        for cls, name, value in attributes:
            type.__setattr__(cls, name, constant(value))
        for namespace, name, value in variables:
            namespace[name] = constant(value)
        yield
    finally:
        for function, code, defaults, keywords in functions:
            function.__code__ = code
            if defaults:
                function.__defaults__ = defaults
            if keywords:
                function.__kwdefaults__ = keywords
        for cls, name, value in attributes:
            type.__setattr__(cls, name, value)
        for namespace, name, value in variables:
            namespace[name] = value


@dataclass(frozen=True)
class _Held:
    """Where a Python module has floats. ``values``: identities of all of its variables, when it was looked through."""

    values: tuple[int, ...]
    functions: list[types.FunctionType]
    attributes: list[tuple[type, str]]
    variables: list[str]


_known: dict[str, _Held] = {}


def _held_in(namespace: dict[str, Any]) -> _Held:
    """Looked for when the variables are others than before."""
    name, values = namespace.get("__name__", ""), tuple(map(id, namespace.values()))
    if name not in _known or _known[name].values != values:
        own = [value for value in namespace.values() if getattr(value, "__module__", None) == name]
        classes = [value for value in own if isinstance(value, type)]
        members = [(cls, key, value) for cls in classes for key, value in vars(cls).items()]
        _known[name] = _Held(
            values,
            [*_functions((*own, *(value for _, _, value in members)))],
            [(cls, key) for cls, key, value in members if constant(value) is not value],
            [key for key, value in namespace.items() if constant(value) is not value],
        )
    return _known[name]


def _functions(values: Iterable[Any]) -> Iterator[types.FunctionType]:
    """Those among these, or inside of them, that hold floats, each once."""
    seen = set[int]()
    for value in values:
        parts: tuple[Any, ...] = (value.fget, value.fset) if isinstance(value, property) else (value,)
        for part in parts:
            function = getattr(part, "__func__", part) if isinstance(part, (staticmethod, classmethod)) else part
            while isinstance(getattr(function, "__wrapped__", None), types.FunctionType):
                function = function.__wrapped__
            if isinstance(function, types.FunctionType) and id(function) not in seen and _holds_floats(function):
                seen.add(id(function))
                yield function


def _holds_floats(function: types.FunctionType) -> bool:
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    code = function.__code__
    return any(constant(value) is not value for value in defaults) or _with_constants(_Same(code)) is not code


def with_constants(function: types.FunctionType) -> types.FunctionType:
    """A copy of a function whose code or defaults hold floats; itself where they hold none."""
    if not _holds_floats(function):
        return function
    keywords = {name: constant(value) for name, value in (function.__kwdefaults__ or {}).items()}
    code, defaults = _with_constants(_Same(function.__code__)), constant(function.__defaults__)
    return remade(function, function.__closure__, defaults, keywords, code)


def remade(
    function: types.FunctionType,
    cells: tuple[types.CellType, ...] | None,
    defaults: tuple[Any, ...] | None,
    keywords: dict[str, Any] | None,
    code: types.CodeType | None = None,
) -> types.FunctionType:
    """Another function like this one, with these variables of its own and defaults."""
    new = types.FunctionType(
        code or function.__code__, function.__globals__, function.__name__, defaults or None, cells
    )
    new.__kwdefaults__ = keywords or None
    new.__qualname__, new.__module__, new.__doc__ = function.__qualname__, function.__module__, function.__doc__
    new.__dict__.update(function.__dict__)
    return new


class _Same:
    """Code by its identity: equal code of another place is other code."""

    def __init__(self, code: types.CodeType) -> None:
        self.code = code

    def __hash__(self) -> int:
        return id(self.code)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.code is other.code


@lru_cache(maxsize=1 << 16)
def _with_constants(same: _Same) -> types.CodeType:
    """The code with its floats, and those of the code inside of it, as constants; itself where it has none."""
    consts = same.code.co_consts
    held = tuple(_with_constants(_Same(v)) if isinstance(v, types.CodeType) else constant(v) for v in consts)
    return same.code if all(map(operator.is_, held, consts)) else same.code.replace(co_consts=held)
