"""The recorded graph is called like the model: its signature, nested inputs and nested outputs.

Inputs are taken apart inside the graph with ``getitem`` and ``getattr`` nodes on the placeholders; outputs are put
together again by calling their class.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import keyword
import operator
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any
from unicodedata import normalize

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxprune.errors import ExampleInputsError, RecordError
from fxprune.recording.forms import Form, form_of
from fxprune.recording.structure import Part, map_tensors, parts

# What forward may return but no graph can: the work is done later, or elsewhere.
_ONCE = (Iterator, Set, types.FunctionType, types.MethodType, functools.partial, nn.Module)
_DEFAULTS = (bool, int, float, str, torch.dtype, torch.device, torch.memory_format)


SIGNATURE_OF_CALLS = "_fxprune_signature_of_calls"
"""Among the attributes of a model that stands for several calls (see ``together``): how it is called."""


def normalised(example_inputs: Any, example_kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, (Tensor, Mapping)) or dataclasses.is_dataclass(example_inputs):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, (tuple, list)):
        raise ExampleInputsError(
            "example_inputs must be a tensor or a tuple of the arguments of forward, "
            f"got {type(example_inputs).__name__}."
        )
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise ExampleInputsError(f"example_kwargs must be a dict or None, got {type(example_kwargs).__name__}.")
    return tuple(example_inputs), dict(example_kwargs or {})


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The example inputs by parameter name of ``forward``."""
    signature = signature_of(model)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"The example inputs do not fit {type(model).__name__}.forward{signature}: {error}. "
            f"Given: {describe(args, kwargs)}. Pass every argument without a default."
        ) from error


def signature_of(model: nn.Module) -> inspect.Signature:
    """How a model is called; several calls at once, by their names."""
    of_calls: inspect.Signature | None = model.__dict__.get(SIGNATURE_OF_CALLS)
    return of_calls or inspect.signature(model.forward)


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """``(Tensor[1, 3, 224, 224], 5, mask=Tensor[1, 4])``."""
    parts = [_describe(value) for value in args] + [f"{name}={_describe(value)}" for name, value in kwargs.items()]
    return f"({', '.join(parts)})"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = "" if value.dtype == torch.float32 else f" {str(value.dtype).removeprefix('torch.')}"
        return f"Tensor{list(value.shape)}{dtype}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_describe(item) for item in value) + ")"
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def tree_leaf(tree: Any, index: int) -> Any:
    """The leaf at ``index`` of a registered pytree."""
    return pytree.tree_leaves(tree)[index]


GETTERS: dict[str, Callable[..., Any]] = {"item": operator.getitem, "attribute": getattr, "leaf": tree_leaf}
"""How a graph gets a part of an input, by its kind (see ``fxprune.recording.structure.Part``)."""


def name_of(node: Node) -> str:
    """An input, or a part of one, as Python writes it: ``batch['masks'][0]``, ``cache.keys``."""
    if node.op == "placeholder":
        return str(node.target)
    parent, key = node.args
    assert isinstance(parent, Node)
    return f"{name_of(parent)}.{key}" if node.target is getattr else f"{name_of(parent)}[{key!r}]"


def with_fresh_tensors(value: Any) -> Any:
    """A copy of an input whose tensors can be written to and told apart, the same tensor passed twice included."""
    return map_tensors(lambda tensor: tensor.detach().clone(), value)


def placeholders(graph: Graph, bound: inspect.BoundArguments) -> list[tuple[Node, tuple[str, ...]]]:
    """One placeholder per parameter of ``forward``, with its default; returned with the way to its value in
    ``bound.arguments``, which is not there where none was given."""
    result: list[tuple[Node, tuple[str, ...]]] = []
    had_default = False
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            if bound.arguments.get(name):
                result.append((graph.create_node("placeholder", f"*{name}", name=name), (name,)))
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            for key in bound.arguments.get(name, {}):
                if not key.isidentifier() or keyword.iskeyword(key) or normalize("NFKC", key) != key:
                    raise ExampleInputsError(
                        f"{key!r} is no name that a graph can give to an input. Pass it in a dict."
                    )
                result.append((graph.create_node("placeholder", key, args=(None,), name=key), (name, key)))
            continue
        default = _default(parameter, had_default)
        had_default = had_default or bool(default)
        node = graph.create_node("placeholder", name, args=default, name=name)
        result.append((node, (name,)))
    return result


def form_at(bound: inspect.BoundArguments, placeholder: Node, way: Sequence[str]) -> Form:
    """The form of what a placeholder gets, of its default where nothing was given."""
    name, *keys = way
    owner: Mapping[str, Any] = bound.arguments[name] if keys else bound.arguments
    key = keys[0] if keys else name
    if key in owner:
        return form_of(owner[key])
    form = form_of(bound.signature.parameters[name].default, numbers=False)
    return ("absent", form) if placeholder.args == (None,) else form


def _default(parameter: inspect.Parameter, had_default: bool) -> tuple[Any, ...]:
    if parameter.default is parameter.empty:
        return (None,) if had_default else ()
    return (parameter.default,) if isinstance(parameter.default, _DEFAULTS) else (None,)


class Unflatten:
    """Puts an output of a registered pytree type together again."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self.spec = spec
        self.__name__ = "made_of_leaves"
        self.__module__ = __name__

    def __call__(self, *leaves: Any) -> Any:
        return pytree.tree_unflatten(leaves, self.spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Unflatten:
        return self


class InOrder:
    """Makes an object that is a dict too, with its items in the order that they had."""

    def __init__(self, cls: Callable[..., Any], keys: tuple[str, ...]) -> None:
        self.cls = cls
        self.keys = keys
        self.__name__ = f"{getattr(cls, '__name__', 'dict')}_in_order"
        self.__module__ = __name__

    def __call__(self, **fields: Any) -> Any:
        new = self.cls(**fields)
        for key in self.keys:
            new.move_to_end(key)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> InOrder:
        return self


class Remade:
    """Puts an object of the user's together again: a copy of the one that was recorded, with other attributes."""

    def __init__(self, template: Any, names: tuple[str, ...]) -> None:
        self.template = template
        self.names = names
        self.__name__ = f"remade_{type(template).__name__}"
        self.__module__ = __name__

    def __call__(self, *values: Any) -> Any:
        new = copy.copy(self.template)
        for name, value in zip(self.names, values, strict=True):
            object.__setattr__(new, name, value)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Remade:
        return self


class Rebuilt:
    """An output structure as the call that makes it: ``target(*args, **kwargs)``. ``node``: once it was written."""

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        self.target = target
        self.args = args
        self.kwargs = kwargs or {}
        self.node: Node | None = None


def _has_state(value: Any) -> bool:
    """Whether this is an object with attributes that somebody may set."""
    if isinstance(value, (Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, nn.Module, int, float)):
        return False
    return bool(getattr(value, "__dict__", None)) and not type(value).__module__.startswith("torch.")


class Apart:
    """Outputs with every structure that is no plain tuple, list or dict replaced by a ``Rebuilt``, innermost first.

    ``known``: identity of an object that came in -> its node. An object that occurs twice is one ``Rebuilt``.
    """

    def __init__(self, known: Mapping[int, Node]) -> None:
        self._known = known
        self._made: dict[int, Rebuilt | None] = {}
        self._kept: list[Any] = []

    def __call__(self, value: Any) -> Any:
        if id(value) in self._known:
            return self._known[id(value)]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [field for field in dataclasses.fields(value) if field.init]
            made = {field.name: self(getattr(value, field.name)) for field in fields}
            keys = [key for key in value if key in made] if isinstance(value, OrderedDict) else []
            in_order = keys == [name for name in made if name in keys]
            return Rebuilt(type(value) if in_order else InOrder(type(value), tuple(keys)), (), made)
        if isinstance(value, Mapping):
            items = {key: self(item) for key, item in value.items()}
            if type(value) is dict:
                return items
            if isinstance(value, OrderedDict):
                return Rebuilt(type(value), (list(items.items()),))
            if isinstance(value, defaultdict):
                return Rebuilt(type(value), (value.default_factory, items))
            return Rebuilt(type(value), (items,))
        if isinstance(value, range):
            return Rebuilt(range, (value.start, value.stop, value.step))
        if isinstance(value, _ONCE):
            raise RecordError(f"The output holds a {type(value).__name__}. Return what it leads to, in a list or dict.")
        if isinstance(value, torch.Size):
            return Rebuilt(torch.Size, (tuple(value),))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return Rebuilt(type(value), tuple(self(item) for item in value))
        if isinstance(value, (tuple, list)):
            items_list = [self(item) for item in value]
            return tuple(items_list) if isinstance(value, tuple) else items_list
        found = parts(value)
        if found is None:  # an object of the user's without tensors is the call's own all the same
            return self._object(value, []) if _has_state(value) else value
        if found and found[0].kind == "leaf":
            flat, spec = pytree.tree_flatten(value)
            return Rebuilt(Unflatten(spec), tuple(self(item) for item in flat))
        return self._object(value, found)

    def _object(self, value: Any, found: Sequence[Part]) -> Rebuilt:
        if id(value) in self._made:
            made = self._made[id(value)]
            if made is None:
                raise RecordError(f"The output holds a {type(value).__name__} that holds itself. Return its tensors.")
            return made
        self._made[id(value)] = None
        self._kept.append(value)
        template = copy.copy(value)
        for part in found:
            object.__setattr__(template, part.key, None)
        made = Rebuilt(Remade(template, tuple(part.key for part in found)), tuple(self(part.value) for part in found))
        self._made[id(value)] = made
        return made
