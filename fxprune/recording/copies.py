"""A private copy of a module tree: what runs is never the caller's model.

Whatever ``forward`` does to lists, counters, caches and attributes, it does to the copy. Its tensors are stand-ins: on
meta (a rehearsal), views of the caller's memory (a run that only reads its weights, as nearly all do), or copies.
Modules, containers, closures, bound methods and plain Python objects are copied where they lead to a module or hold
state; classes, functions, modules of Python and what belongs to torch or to Python itself stay what they are, but for
Python's own containers, namespaces, iterators and generators of random numbers.
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import sys
import types
import warnings
import weakref
from array import array
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from fxprune.recording.constants import remade, with_constants
from fxprune.recording.traced import constant
from fxprune.recording.trees import PLAIN, map_sequence

StandIn = Callable[[Tensor], Tensor]
_MAPPINGS = (dict, OrderedDict, defaultdict)
_OF_PYTHON = frozenset(sys.stdlib_module_names)
_TENSORS = ("_parameters", "_buffers")
_OTHERS = ("torch", "numpy", "fxprune")
# Objects of Python's and torch's own classes that hold what they are given.
_HOLDERS = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap, RemovableHandle)
_WHOLE = (np.ndarray, bytearray, array, random.Random, np.random.Generator, np.random.RandomState)


class Copier:
    """Copies values that lead to each other; every object once. ``stand_in``: what takes the place of a tensor."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []  # what was copied, so that no address is used twice
        self._cells: dict[int, types.CellType] = {}
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
        if kind in weakref.ProxyTypes:  # says of itself that it is what it stands for
            return self._proxy(value)
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
        if kind is types.BuiltinMethodType:
            return self._builtin_method(value)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is functools.partial:
            return self._partial(value)
        if kind is weakref.ref:
            target = value()
            return value if target is None else self._note(value, weakref.ref(self(target)))
        return self._object(value)

    def _note(self, value: Any, new: Any) -> Any:
        self._made[id(value)] = new
        self._kept.append((value, new))
        self._originals[id(new)] = value
        return new

    def _tensor(self, tensor: Tensor) -> Tensor:
        new: Tensor = self._note(tensor, self._stand_in(tensor))
        for name, value in new.__dict__.items():
            new.__dict__[name] = self(value)
        return new

    def original(self, value: Any) -> Any:
        """What of the caller's this is a copy of; itself where it is none."""
        return self._originals.get(id(value), value)

    def hold_constants(self) -> None:
        """Floats that the copies hold, and functions that they hold, become constants, but for those of torch."""
        for value, new in self._kept:
            if new is value or isinstance(new, Tensor) or (type(new).__module__ or "").partition(".")[0] == "torch":
                continue
            own = new if isinstance(new, (dict, list)) else getattr(new, "__dict__", {})
            for key, item in enumerate(own) if isinstance(own, list) else [*own.items()]:
                is_function = type(item) is types.FunctionType and not _is_of_others(item.__module__)
                held = with_constants(item) if is_function else constant(item)
                if held is not item:
                    own[key] = held

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            new: nn.Module = self._note(module, _scripted(module))
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
        if any(isinstance(key, nn.Module) for key in value):
            new.clear()
        for key, item in value.items():
            own_key = self(key) if isinstance(key, nn.Module) else key
            if type(item) not in PLAIN or own_key is not key:
                new[own_key] = self(item)
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

    def _builtin_method(self, value: Any) -> Any:
        """``items.append`` of a list that is copied is that of the copy."""
        owner = value.__self__
        if owner is None or isinstance(owner, (type, types.ModuleType)):
            return value
        new = self(owner)
        return value if new is owner else getattr(new, value.__name__)

    def _function(self, value: types.FunctionType) -> Any:
        """A function that leads to something that was copied, by its variables or defaults, leads to the copy.

        One of the user's with numbers among its variables has variables of its own as well: it may count.
        """
        if not value.__closure__ and not value.__defaults__ and not value.__kwdefaults__:
            return value
        cells = tuple(self._cells.setdefault(id(cell), types.CellType()) for cell in value.__closure__ or ())
        new = remade(value, cells, value.__defaults__, value.__kwdefaults__)
        self._note(value, new)  # it may lead to itself
        is_other = False
        for cell, own in zip(value.__closure__ or (), cells, strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # an empty cell
                continue
            own.cell_contents = self(content)
            is_other |= own.cell_contents is not content and content is not value
            is_other |= type(content) in PLAIN and not _is_of_others(value.__module__)
        new.__defaults__, defaults = self(value.__defaults__), value.__defaults__
        keywords = value.__kwdefaults__ or {}
        own_keywords = {name: self(item) for name, item in keywords.items()}
        is_other |= new.__defaults__ is not defaults
        is_other |= any(own_keywords[name] is not item for name, item in keywords.items())
        if not is_other:
            return self._note(value, value)
        new.__kwdefaults__ = own_keywords or None
        new.__dict__.update((name, self(item)) for name, item in value.__dict__.items())
        return new

    def _proxy(self, value: Any) -> Any:
        """A proxy stands for the copy of what it stood for."""
        try:
            target = value.__init__.__self__
        except ReferenceError:  # that is gone
            return value
        new = self(target)
        return value if new is target else self._note(value, weakref.proxy(new))

    def _partial(self, value: functools.partial[Any]) -> Any:
        function, args, keywords = self(value.func), self(value.args), self(dict(value.keywords))
        return self._note(value, functools.partial(function, *args, **keywords))

    def _object(self, value: Any) -> Any:
        """An object of a class of the user's, or what Python holds values in; anything else is handed on as it is."""
        cls = type(value)
        if isinstance(value, _WHOLE):
            return self._note(value, copy.deepcopy(value))
        if isinstance(value, (type, types.ModuleType, fx.Graph, BaseException)):
            return value
        package = (cls.__module__ or "").partition(".")[0]
        if package in _OTHERS and cls is not RemovableHandle:
            return value
        if issubclass(cls, (dict, list)):
            return self._subclassed(value)
        if package in _OF_PYTHON and not issubclass(cls, _HOLDERS):
            return self._note(value, _advanced_alone(value)) if isinstance(value, Iterator) else value
        makes: Any = cls.__new__
        if makes not in (object.__new__, types.SimpleNamespace.__new__):
            return value
        new = self._note(value, makes(cls))
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
            if "__slots__" not in cls.__dict__:
                continue
            for name, member in cls.__dict__.items():
                if isinstance(member, types.MemberDescriptorType) and hasattr(value, name):
                    object.__setattr__(new, name, self(getattr(value, name)))


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """``copy.deepcopy``, in which functions that modules hold lead to the layers of the copy.

    Python copies no function, so one that leads to a layer by its variables or defaults would run that of ``model``.
    Hooks are the caller's own.
    """
    memo = {} if memo is None else memo
    result: nn.Module = copy.deepcopy(model, memo)
    for module in result.modules():
        for name, value in vars(module).items():
            if isinstance(value, types.FunctionType):
                vars(module)[name] = _own(value, memo)
            elif type(value) is list:
                value[:] = [_own(item, memo) for item in value]
            elif type(value) in _MAPPINGS and not name.endswith("_hooks"):
                value.update((key, _own(item, memo)) for key, item in value.items())
    return result


def _own(value: Any, memo: dict[int, Any]) -> Any:
    """``value``, or what of the copy stands for it."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in memo:
        return types.MethodType(value.__func__, memo[id(value.__self__)])
    if isinstance(value, types.CellType):
        content = _content(value)
        own = _own(content, memo)
        return value if own is content else types.CellType(own)
    if not isinstance(value, types.FunctionType):
        return value
    memo[id(value)] = value  # it may lead to itself
    cells, defaults, keywords = value.__closure__ or (), value.__defaults__ or (), value.__kwdefaults__ or {}
    before = [*cells, *defaults, *keywords.values()]
    after = [_own(item, memo) for item in before]
    if any(one is not other for one, other in zip(before, after, strict=True)):
        own_keywords = dict(zip(keywords, after[len(cells) + len(defaults) :], strict=True))
        own_defaults = tuple(after[len(cells) : len(cells) + len(defaults)])
        memo[id(value)] = remade(value, tuple(after[: len(cells)]), own_defaults, own_keywords)
    return memo[id(value)]


def _content(cell: types.CellType) -> Any:
    """Of an empty cell the cell itself."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _scripted(module: Any) -> Any:
    """A scripted module over the same tensors, with attributes and flags of its own, also in the modules inside."""
    new = copy.copy(module)
    if not module._modules:
        return new
    for name, child in module._modules.items():
        new._c.setattr(name, _scripted(child)._c)
    return torch.jit._recursive.wrap_cpp_module(new._c)


def _is_of_others(module: str | None) -> bool:
    package = (module or "").partition(".")[0]
    return package in _OTHERS or package in _OF_PYTHON


def _advanced_alone(iterator: Any) -> Any:
    """A copy of an iterator; a generator, and what else has none, as it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.14 takes this away from itertools
            return copy.copy(iterator)
    except TypeError:
        return iterator


def _empty(cls: Any, base: Any) -> Any:
    """An empty instance, without calling any ``__init__``."""
    return base.__new__(cls)


def leads_to_module(value: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Whether this is a module, or a function over one: a method of it, a closure, one with arguments bound."""
    if isinstance(value, nn.Module):
        return True
    if isinstance(value, types.MethodType):
        below = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        below = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.FunctionType):
        cells, defaults, keywords = value.__closure__ or (), value.__defaults__ or (), value.__kwdefaults__ or {}
        below = [*map(_content, cells), *defaults, *keywords.values()]
    elif isinstance(value, (list, tuple, dict)):
        below = [*value.values()] if isinstance(value, dict) else [*value]
    else:
        return False
    seen = seen | {id(value)}
    return any(leads_to_module(item, seen) for item in below if id(item) not in seen)


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


def keep_to_this_process(copies: Iterable[nn.Module]) -> None:
    """What ``DistributedDataParallel`` does to have the same in all processes is no part of what a model computes.

    Its copies of the buffers, put together in one tensor, would be nodes that keep every batch norm as wide as it is,
    and processes that try a model unequally often would wait for each other.
    """
    for module in copies:
        if isinstance(module, DistributedDataParallel):
            module.__dict__.update(require_forward_param_sync=False, require_backward_grad_sync=False)
