"""Values taken apart and put together again: containers, registered pytrees, dataclasses, and objects with tensors.

This is the one walk over what a network takes and returns. A tensor is a leaf, and so is what stands for one
(``StandIn``). Mappings, tuples, lists and dataclass instances always come apart. Any other object, a cache of keys
and values for instance, comes apart where one of its attributes holds a tensor, however deep, else where it is a
registered pytree; everything else is a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device,
                    torch.memory_format, torch.layout})  # fmt: skip
# Their attributes are their own business: weights, code, the nodes of a graph, what a number was computed from.
_WHOLE = (int, float, complex, str, bytes, torch.SymInt, torch.SymFloat, torch.SymBool, type, types.ModuleType,
          types.FunctionType, types.MethodType, nn.Module, torch.Generator, fx.Graph, fx.Node, fx.Proxy)  # fmt: skip


class StandIn:
    """Base class of what takes the place of a tensor in a description of inputs."""


@dataclass(frozen=True)
class Part:
    """One part of a value, and how to get it.

    Attributes:
        kind: "item" is ``parent[key]``, "attribute" is ``getattr(parent, key)``, "leaf" is the leaf number ``key`` of a
            registered pytree.
        key: an index or a key, the name of an attribute, a number.
        value: the part.
    """

    kind: Literal["item", "attribute", "leaf"]
    key: Any
    value: Any

    def holding(self, value: Any) -> Part:
        """The same place with another value."""
        return Part(self.kind, self.key, value)


def parts(value: Any) -> list[Part] | None:
    """The parts of one value, one level deep; None for a leaf.

    Of an object that is no dataclass these are the attributes that are tensors, plain values or structures; others,
    such as a configuration, stay with the object. Objects may hold each other in a circle: who follows the parts of
    parts has to remember where it was, as :func:`map_leaves`, :func:`leaves_of` and :func:`paths` do.
    """
    if type(value) in _PLAIN or isinstance(value, (Tensor, StandIn, *_WHOLE)):
        return None
    if isinstance(value, Mapping):
        return [Part("item", key, item) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return [Part("item", index, item) for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value):
        return [Part("attribute", name, item) for name, item in _attributes(value)]
    attributes = _attributes(value)
    if not _holds_tensor(item for _, item in attributes):
        if type(value) in pytree.SUPPORTED_NODES:
            return [Part("leaf", number, item) for number, item in enumerate(pytree.tree_leaves(value))]
        return None
    return [Part("attribute", name, item) for name, item in attributes if _is_structure(item) or _holds_tensor([item])]


def rebuilt(value: Any, new_parts: Sequence[Part]) -> Any:
    """A copy of ``value`` with ``new_parts`` in the place of its ``parts``, of the same number and order.

    Objects are copied with ``copy.copy``; no ``__init__`` runs. What is no part is shared with the original.
    """
    if isinstance(value, Mapping):
        items = {part.key: part.value for part in new_parts}
        if type(value) is dict:
            return items
        if not isinstance(value, MutableMapping):
            return type(value)(items)  # type: ignore[call-arg]
        mapping = copy.copy(value)
        for key, item in items.items():  # not update(), which some refuse
            mapping[key] = item
        return mapping
    if isinstance(value, (tuple, list)):
        return _rebuilt_sequence(value, [part.value for part in new_parts])
    if new_parts and new_parts[0].kind == "leaf":
        return pytree.tree_unflatten([part.value for part in new_parts], pytree.tree_structure(value))
    new = copy.copy(value)
    _set_attributes(new, new_parts)
    return new


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """A copy with ``function(leaf)`` in the place of every leaf. An object that occurs twice is copied once."""
    copies: dict[int, Any] = {}
    seen = []  # kept alive, so that their ids stay theirs

    def visit(value: Any) -> Any:
        if id(value) in copies:
            return copies[id(value)]
        found = parts(value)
        if found is None:
            return function(value)
        if not _is_object(found):
            return rebuilt(value, [part.holding(visit(part.value)) for part in found])
        new = copies[id(value)] = copy.copy(value)  # before its parts, which may hold the object itself
        seen.append(value)
        _set_attributes(new, [part.holding(visit(part.value)) for part in found])
        return new

    return visit(tree)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``map_leaves`` of the tensors; other leaves as they are."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def leaves_of(tree: Any) -> list[Any]:
    """All leaves, in order: those of an object once, a tensor or a container as often as it occurs."""
    return [leaf for _, leaf in paths(tree)]


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors among :func:`leaves_of`."""
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def paths(tree: Any) -> Iterator[tuple[tuple[Part, ...], Any]]:
    """The way to every one of :func:`leaves_of`, and the leaf; the way to ``tree`` itself is empty."""
    return _paths(tree, (), {})


def _paths(value: Any, path: tuple[Part, ...], seen: dict[int, Any]) -> Iterator[tuple[tuple[Part, ...], Any]]:
    if id(value) in seen:
        return
    found = parts(value)
    if found is None:
        yield path, value
        return
    if _is_object(found):
        seen[id(value)] = value  # kept alive, so that its id stays its own
    for part in found:
        yield from _paths(part.value, (*path, part), seen)


def path_text(tree: Any, path: Sequence[Part]) -> str:
    """A path as Python writes it after the name of ``tree``: ``['ids'][0]``, ``.layers[0].keys``."""
    text = ""
    for part in path:
        if part.kind == "attribute":
            text += f".{part.key}"
        elif part.kind == "leaf":
            text += _key_of_leaf(tree, part.key)
        elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
            names: tuple[str, ...] = tree._fields
            text += f".{names[part.key]}"
        else:
            text += f"[{part.key!r}]"
        tree = part.value
    return text


def _key_of_leaf(tree: Any, number: int) -> str:
    try:
        path, _ = pytree.tree_flatten_with_path(tree)[0][number]
    except ValueError:  # its registration names no keys
        return f"[{number}]"
    return pytree.keystr(path)


def _is_object(found: Sequence[Part]) -> bool:
    return bool(found) and found[0].kind == "attribute"


def _is_structure(value: Any) -> bool:
    """Whether a walk goes into it, or ends at it with something to tell."""
    if type(value) in _PLAIN or isinstance(value, (Tensor, StandIn, Mapping, tuple, list, int, float, str)):
        return True  # numbers of a class of their own too: they may know what they were computed from
    return not isinstance(value, type) and (dataclasses.is_dataclass(value) or type(value) in pytree.SUPPORTED_NODES)


def _holds_tensor(values: Iterable[Any]) -> bool:
    """Whether a tensor is in one of these, at any depth."""
    waiting = list(values)
    seen: dict[int, Any] = {}  # kept alive, so that their ids stay theirs
    while waiting:
        value = waiting.pop()
        if isinstance(value, (Tensor, StandIn)):
            return True
        if type(value) in _PLAIN or isinstance(value, _WHOLE) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (tuple, list)):
            waiting += value
        elif type(value) in pytree.SUPPORTED_NODES:
            waiting += pytree.tree_leaves(value)
        else:
            waiting += (item for _, item in _attributes(value))
    return False


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """What an instance holds: the fields of a dataclass first, then ``__dict__``, then slots."""
    found: dict[str, Any] = {}
    if dataclasses.is_dataclass(value):
        found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)
                 if hasattr(value, field.name)}  # fmt: skip
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        found |= {name: item for name, item in own.items() if name not in found}
    for cls in reversed(type(value).__mro__):
        for name in _slots(cls):
            if name not in found and hasattr(value, name):
                found[name] = getattr(value, name)
    return list(found.items())


def _slots(cls: type) -> list[str]:
    """The slots that a class itself adds, under the names that they are stored by."""
    return [name for name, member in vars(cls).items() if isinstance(member, types.MemberDescriptorType)
            and "__slots__" in vars(cls)]  # fmt: skip


def _set_attributes(new: Any, new_parts: Sequence[Part]) -> None:
    for part in new_parts:
        object.__setattr__(new, part.key, part.value)  # frozen dataclasses too


def _rebuilt_sequence(value: Any, items: list[Any]) -> Any:
    if type(value) is list:
        return items
    if isinstance(value, list):
        new = copy.copy(value)
        new[:] = items
        return new
    if hasattr(value, "_fields"):
        return type(value)._make(items)
    return type(value)(items)
