"""Whole numbers that a module keeps: attributes of its own and of its class, and entries of what configures it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from enum import Enum
from types import ModuleType
from typing import Any

from torch import Tensor, nn

_DEEPEST = 3  # of ``model.config.attention.head_dim``: objects in objects
_MOST = 256  # entries of a dict: more are a vocabulary, or the like
_NOT_A_CONFIG = (nn.Module, Tensor, ModuleType, type, Enum)


def whole_numbers(module: nn.Module, inside: bool) -> dict[str, int]:
    """Name -> number; of an entry of another object ``config.head_dim``, also of a dict. ``inside``: these too."""
    return dict(_numbers(_values(module), _DEEPEST if inside else 0))


def set_numbers(module: nn.Module, numbers: Mapping[str, int], copies: dict[Any, Any]) -> None:
    """Set them on this instance alone: what configures it, and others, it gets a copy of.

    ``copies``: of one object with the same numbers there is one copy.

    Raises:
        Exception: whatever the module's own ``__setattr__`` raises.
    """
    for name, value in _changed(_values(module), numbers, copies).items():
        setattr(module, name, value)


def _numbers(values: Mapping[str, Any], depth: int) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if type(value) is int:
            yield key, value
        elif depth and _configures(value):
            yield from ((f"{key}.{name}", number) for name, number in _numbers(_values(value), depth - 1))


def _configures(value: Any) -> bool:
    """A dict with names, a named tuple, a dataclass or another plain object."""
    if isinstance(value, dict):
        return len(value) <= _MOST and all(isinstance(key, str) and "." not in key for key in value)
    if isinstance(value, _NOT_A_CONFIG) or callable(value):
        return False
    return _is_named_tuple(value) or hasattr(value, "__dict__") or bool(_slots(value))


def _is_named_tuple(value: Any) -> bool:
    """Asked of its class: a config may answer to any name."""
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


def _slots(holder: Any) -> list[str]:
    given = [vars(c).get("__slots__", ()) for c in type(holder).__mro__]
    names = [name for names in given for name in ((names,) if isinstance(names, str) else names)]
    return [name for name in names if not name.startswith("__")]


def _values(holder: Any) -> dict[str, Any]:
    """By name, those of its class too, which an instance can have otherwise."""
    if isinstance(holder, dict):
        return holder
    if _is_named_tuple(holder):
        return dict(holder._asdict())
    slots = {name: getattr(holder, name) for name in _slots(holder) if hasattr(holder, name)}
    classes = [c for c in type(holder).__mro__ if c.__module__.partition(".")[0] not in ("torch", "builtins")]
    of_classes = {key: value for c in reversed(classes) for key, value in vars(c).items()}
    return of_classes | slots | dict(getattr(holder, "__dict__", {}))


def _changed(values: Mapping[str, Any], numbers: Mapping[str, int], copies: dict[Any, Any]) -> dict[str, Any]:
    """The values that differ then."""
    inside: dict[str, dict[str, int]] = defaultdict(dict)
    found: dict[str, Any] = {}
    for name, number in numbers.items():
        key, _, rest = name.partition(".")
        if rest:
            inside[key][rest] = number
        else:
            found[key] = number
    return found | {key: _copied(values[key], own, copies) for key, own in inside.items()}


def _copied(holder: Any, numbers: Mapping[str, int], copies: dict[Any, Any]) -> Any:
    key = id(holder), frozenset(numbers.items())
    if key not in copies:
        values = _changed(_values(holder), numbers, copies)
        if _is_named_tuple(holder):
            new = holder._replace(**values)
        else:
            new = copy.copy(holder)
            if new is holder:
                raise TypeError(f"{type(holder).__name__} gives itself for a copy")
            for name, value in values.items():
                if isinstance(new, dict):
                    new[name] = value
                else:
                    object.__setattr__(new, name, value)  # a dataclass may be frozen
        copies[key] = new, holder  # which lives, so that nothing else has its id
    return copies[key][0]
