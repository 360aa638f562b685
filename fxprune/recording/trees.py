"""Walking argument structures: tuples, lists, dicts, slices and what derives from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PLAIN = frozenset([int, float, bool, str, type(None)])  # most arguments


def map_sequence(old: Any, items: list[Any]) -> Any:
    """The items as a sequence of ``old``'s type."""
    if type(old) is tuple:
        return tuple(items)
    if isinstance(old, torch.Size):
        return tuple(items)
    if hasattr(old, "_fields"):
        return type(old)(*items)
    if isinstance(old, tuple):
        try:
            return type(old)(items)
        except TypeError:
            return tuple(items)
    return items


def map_tree(function: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to everything that is not a tuple, list, dict or slice."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return map_sequence(value, [map_tree(function, item) for item in value])
    if isinstance(value, dict):
        items = {key: map_tree(function, item) for key, item in value.items()}
        return items if type(value) is dict else _same_mapping(value, items)
    if isinstance(value, slice):
        return slice(*(map_tree(function, part) for part in (value.start, value.stop, value.step)))
    return function(value)


def _same_mapping(old: Any, items: dict[Any, Any]) -> Any:
    try:
        new = old.copy()
        new.update(items)
    except (TypeError, AttributeError):
        return items
    return new


def tensors(*values: Any) -> list[Tensor]:
    """The tensors in the values, in order."""
    found: list[Tensor] = []
    _collect(values, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            if isinstance(item, Tensor):
                found.append(item)
            elif type(item) not in PLAIN:
                _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or bool(tensors(value))


def is_only_tensors(value: Any) -> bool:
    """A tensor, or a non-empty tuple or list of such (None allowed beside them)."""
    if isinstance(value, Tensor):
        return True
    if not isinstance(value, (tuple, list)) or not has_tensors(value):
        return False
    return all(item is None or is_only_tensors(item) for item in value)
