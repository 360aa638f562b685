"""A private copy of a module tree: what runs is never the caller's model.

Whatever ``forward`` does to lists, counters, caches and attributes, it does to the copy. Its tensors are stand-ins: on
meta (a rehearsal), views of the caller's memory (a run that only reads its weights, as nearly all do), or copies.
Modules, containers, closures, bound methods and plain Python objects are copied where they lead to a module or hold
state; classes, functions, modules of Python and what belongs to torch or to Python itself stay what they are.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.recording.trees import PLAIN, map_sequence

StandIn = Callable[[Tensor], Tensor]
_MAPPINGS = (dict, OrderedDict, defaultdict)
_OF_PYTHON = frozenset(sys.stdlib_module_names)
_TENSORS = ("_parameters", "_buffers")


class Copier:
    """Copies values that lead to each other; every object once. ``stand_in``: what takes the place of a tensor."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []  # what was copied, so that no address is used twice
        self.modules: dict[int, nn.Module] = {}
        """Identity of a module of the caller's -> its copy."""
        self._originals: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        """The copy of ``value``; ``value`` itself where there is nothing to copy."""
        kind = type(value)
        if kind in PLAIN:
            return value
        made = self._made.get(id(value), self)
        if made is not self:
            return made
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if kind in _MAPPINGS:
            return self._mapping(value)
        if kind in (list, set, deque):
            return self._collection(value)
        if isinstance(value, tuple):
            return self._sequence(value)
        if kind is types.MethodType:
            owner = self(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is functools.partial:
            return self._partial(value)
        return self._object(value)

    def _note(self, value: Any, new: Any) -> Any:
        self._made[id(value)] = new
        self._kept.append((value, new))
        self._originals[id(new)] = value
        return new

    def _tensor(self, tensor: Tensor) -> Tensor:
        new: Tensor = self._note(tensor, self._stand_in(tensor))
        return new

    def original(self, value: Any) -> Any:
        """What of the caller's this is a copy of; itself where it is none."""
        return self._originals.get(id(value), value)

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            new: nn.Module = self._note(module, copy.copy(module))  # the same tensors, attributes of its own
        else:
            new = self._note(module, object.__new__(type(module)))
            attributes = new.__dict__
            for name, value in module.__dict__.items():
                kind = type(value)
                if kind in PLAIN:
                    attributes[name] = value
                elif kind in _MAPPINGS and not value:
                    attributes[name] = value.copy()
                elif name in _TENSORS:
                    attributes[name] = type(value)(
                        (key, None if tensor is None else self(tensor)) for key, tensor in value.items()
                    )
                else:
                    attributes[name] = self(value)
            if isinstance(module, nn.RNNBase):
                own = attributes["_flat_weights"]
                attributes["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in own]
            self._slots(module, new)
        self.modules[id(module)] = new
        return new

    def _mapping(self, value: Any) -> Any:
        new = self._note(value, value.copy())
        for key, item in value.items():
            if type(item) not in PLAIN:
                new[key] = self(item)
        return new

    def _collection(self, value: Any) -> Any:
        new = self._note(value, value.copy())
        if any(type(item) not in PLAIN for item in value):
            items = [self(item) for item in value]
            new.clear()
            (new.update if type(value) is set else new.extend)(items)
        return new

    def _sequence(self, value: Any) -> Any:
        items = [self(item) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return self._note(value, map_sequence(value, items))

    def _function(self, value: types.FunctionType) -> Any:
        """A function whose closure leads to something that was copied leads to the copy."""
        if not value.__closure__:
            return value
        self._note(value, value)
        try:
            contents = [cell.cell_contents for cell in value.__closure__]
        except ValueError:  # an empty cell
            return value
        copies = [self(item) for item in contents]
        if all(a is b for a, b in zip(copies, contents, strict=True)):
            return value
        cells = tuple(types.CellType(item) for item in copies)
        new = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        new.__kwdefaults__, new.__qualname__, new.__module__ = (
            value.__kwdefaults__,
            value.__qualname__,
            value.__module__,
        )
        new.__dict__.update(value.__dict__)
        return self._note(value, new)

    def _partial(self, value: functools.partial[Any]) -> Any:
        function, args, keywords = self(value.func), self(value.args), self(dict(value.keywords))
        return self._note(value, functools.partial(function, *args, **keywords))

    def _object(self, value: Any) -> Any:
        """An object of a class of the user's; anything else is handed on as it is."""
        cls = type(value)
        if isinstance(value, np.ndarray):
            return self._note(value, value.copy())
        if isinstance(value, (type, types.ModuleType, fx.Graph, BaseException)):
            return value
        package = (cls.__module__ or "").partition(".")[0]
        if package in _OF_PYTHON or package in ("torch", "numpy", "fxprune"):
            return value
        if issubclass(cls, (dict, list)):
            return self._subclassed(value)
        makes: Any = cls.__new__
        if makes is not object.__new__:
            return value
        new = self._note(value, object.__new__(cls))
        for name, item in getattr(value, "__dict__", {}).items():
            new.__dict__[name] = self(item)
        self._slots(value, new)
        return new

    def _subclassed(self, value: Any) -> Any:
        """A dict or list with a class of its own, attributes included."""
        cls: Any = type(value)
        base: Any = dict if isinstance(value, dict) else list
        try:
            new = _empty(cls, OrderedDict if issubclass(cls, OrderedDict) else base)
        except TypeError:
            return value
        self._note(value, new)
        for name, item in getattr(value, "__dict__", {}).items():
            new.__dict__[name] = self(item)
        if base is dict:
            set_item = OrderedDict.__setitem__ if isinstance(value, OrderedDict) else dict.__setitem__
            for key in dict.keys(value):
                set_item(new, key, self(dict.__getitem__(value, key)))
        else:
            list.extend(new, [self(item) for item in list.__iter__(value)])
        return new

    def _slots(self, value: Any, new: Any) -> None:
        for cls in type(value).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    object.__setattr__(new, name, self(getattr(value, name)))


def _empty(cls: Any, base: Any) -> Any:
    """An empty instance, without calling any ``__init__``."""
    return base.__new__(cls)


def forget(root: nn.Module) -> None:
    """Let go of everything that a copy holds: modules refer to each other in circles."""
    pending = [root]
    while pending:
        module = pending.pop()
        if isinstance(module, torch.jit.ScriptModule):
            continue
        children = module.__dict__.get("_modules")
        if children is None:
            continue
        pending += [child for child in children.values() if child is not None]
        module.__dict__.clear()
