"""The recorded graph is called like the model: its signature, nested inputs and nested outputs.

Inputs are taken apart inside the graph with ``getitem`` and ``getattr`` nodes on the placeholders; outputs are put
together again by calling their class.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxprune.errors import ExampleInputsError

_DEFAULTS = (bool, int, float, str, torch.dtype, torch.device, torch.memory_format)


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
    signature = inspect.signature(model.forward)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ExampleInputsError(
            f"The example inputs do not fit {type(model).__name__}.forward{signature}: {error}. "
            f"Given: {describe(args, kwargs)}. Pass every argument without a default."
        ) from error


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


class Part:
    """How to get a part of an input: ``operator.getitem(parent, key)`` or ``getattr(parent, key)``."""

    def __init__(self, target: Callable[..., Any], key: Any, value: Any) -> None:
        self.target = target
        self.key = key
        self.value = value


def tree_leaf(tree: Any, index: int) -> Any:
    """The leaf at ``index`` of a registered pytree."""
    return pytree.tree_leaves(tree)[index]


def parts(value: Any) -> list[Part] | None:
    """The parts of one structure; None if ``value`` is a leaf."""
    if isinstance(value, Mapping):
        return [Part(operator.getitem, key, item) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return [Part(operator.getitem, index, item) for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [Part(getattr, field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if type(value) in pytree.SUPPORTED_NODES:
        return [Part(tree_leaf, index, item) for index, item in enumerate(pytree.tree_leaves(value))]
    return None


def with_fresh_tensors(value: Any) -> Any:
    """A copy of an input whose tensors can be written to and told apart, the same tensor passed twice included."""
    return map_tensors(lambda tensor: tensor.detach().clone(), value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A copy of an input with ``function(tensor)`` in the place of every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    found = parts(value)
    if found is None:
        return value
    return _with_items(value, found, [map_tensors(function, part.value) for part in found])


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an input."""
    if isinstance(value, Tensor):
        yield value
    for part in parts(value) or []:
        yield from tensors(part.value)


def _with_items(value: Any, found: list[Part], items: list[Any]) -> Any:
    if isinstance(value, Mapping):
        if type(value) is dict:
            return dict(zip(value, items, strict=True))
        new: Any = copy.copy(value)
        for key, item in zip(list(value), items, strict=True):
            new[key] = item
        return new
    if hasattr(value, "_fields"):
        return type(value)(*items)
    if isinstance(value, (tuple, list)):
        return type(value)(items)
    if dataclasses.is_dataclass(value):
        new = copy.copy(value)
        for part, item in zip(found, items, strict=True):
            object.__setattr__(new, part.key, item)
        return new
    return pytree.tree_unflatten(items, pytree.tree_structure(value))


def placeholders(graph: Graph, bound: inspect.BoundArguments) -> list[tuple[Node, Any]]:
    """One placeholder per parameter of ``forward``, with its default; returned with the example value where one was
    given."""
    result: list[tuple[Node, Any]] = []
    had_default = False
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            if bound.arguments.get(name):
                result.append((graph.create_node("placeholder", f"*{name}", name=name), bound.arguments[name]))
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            for key, value in bound.arguments.get(name, {}).items():
                result.append((graph.create_node("placeholder", key, args=(None,), name=key), value))
            continue
        default = _default(parameter, had_default)
        had_default = had_default or bool(default)
        node = graph.create_node("placeholder", name, args=default, name=name)
        result.append((node, bound.arguments.get(name)))
    return result


def _default(parameter: inspect.Parameter, had_default: bool) -> tuple[Any, ...]:
    if parameter.default is parameter.empty:
        return (None,) if had_default else ()
    return (parameter.default,) if isinstance(parameter.default, _DEFAULTS) else (None,)


class Unflatten:
    """Puts an output of a registered pytree type together again."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self.spec = spec
        self.__name__ = "unflatten"
        self.__module__ = __name__

    def __call__(self, *leaves: Any) -> Any:
        return pytree.tree_unflatten(leaves, self.spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Unflatten:
        return self


class Rebuilt:
    """An output structure as the call that makes it: ``target(*args, **kwargs)``."""

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        self.target = target
        self.args = args
        self.kwargs = kwargs or {}


def taken_apart(value: Any) -> Any:
    """Outputs with every structure that is no plain tuple, list or dict replaced by a ``Rebuilt``, innermost first."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.init]
        return Rebuilt(type(value), (), {field.name: taken_apart(getattr(value, field.name)) for field in fields})
    if isinstance(value, Mapping):
        items = {key: taken_apart(item) for key, item in value.items()}
        if type(value) is dict:
            return items
        if isinstance(value, OrderedDict):
            return Rebuilt(type(value), (list(items.items()),))
        return Rebuilt(type(value), (items,))
    if isinstance(value, torch.Size):
        return Rebuilt(torch.Size, (tuple(value),))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return Rebuilt(type(value), tuple(taken_apart(item) for item in value))
    if isinstance(value, (tuple, list)):
        items_list = [taken_apart(item) for item in value]
        return tuple(items_list) if isinstance(value, tuple) else items_list
    if type(value) in pytree.SUPPORTED_NODES:
        flat, spec = pytree.tree_flatten(value)
        return Rebuilt(Unflatten(spec), tuple(taken_apart(item) for item in flat))
    return value


def leaf_paths(value: Any) -> Iterator[list[Part]]:
    """The path to every tensor in an input."""
    if isinstance(value, Tensor):
        yield []
    for part in parts(value) or []:
        for path in leaf_paths(part.value):
            yield [part, *path]
