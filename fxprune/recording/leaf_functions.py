"""Leaf functions: Python functions of the model's that are one node each, as those marked by ``torch.fx.wrap`` are.

What a function does that branches on values or loops over what was found (non-maximum suppression, pasting a mask for
every box), no graph can follow. Where no weight, no layer and no other object goes into it, it need not: the graph
calls it. Which functions are, is decided after a first recording (see ``fxprune.verification.deciding``).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Proxy
from torch.utils._pytree import tree_leaves

from fxprune.errors import GuardError
from fxprune.recording import trees
from fxprune.recording.calls import TorchFunction
from fxprune.recording.patches import namespaces_of
from fxprune.recording.sources import defined_at, script_source
from fxprune.recording.traced import TracedFlag

FUNCTIONS = "functions"
"""In the ``meta`` of a guard: names of the functions that were running, innermost first."""

_PLAIN = (Tensor, TracedFlag, bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
Handler = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Of a name, the function and its arguments; gives ``NotImplemented`` where the call is not its business."""


class ValuesNeededError(NotImplementedError):
    """A leaf function is called with tensors that have no values."""


class LeafFunction(TorchFunction):
    """A function of the model's as a target. ``name``: see ``named``. ``form``: of what it gave when recorded."""

    def __init__(self, name: str, function: Callable[..., Any], form: Any) -> None:
        super().__init__(function)
        self.name, self.form = name, form
        self.__name__ = f"leaf_{getattr(function, '__name__', 'function')}"  # no name of torch's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ``ValuesNeededError`` where tensors have no values, ``GuardError`` for an answer of another form."""
        traced = next((value for value in tree_leaves((args, kwargs)) if isinstance(value, Proxy)), None)
        if traced is not None:  # somebody traces the graph, to quantise it, say
            return traced.tracer.create_proxy("call_function", self, args, kwargs)
        if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in trees.tensors(args, kwargs)):
            raise ValuesNeededError(f"{self.source} is called as it is, since what it does depends on values")
        result = self.function(*args, **kwargs)
        form = form_of(result)
        if form != self.form:
            raise GuardError(
                f"{self.source}: it gives other tensors than in the recorded run ({form}, not {self.form}). Call "
                "the network with inputs like the example's in this, or record it with an example of this kind.",
                self.source,
            )
        return result

    @property
    def source(self) -> str:
        """The line that defines it."""
        return defined_at(_written(self.function))

    def __reduce__(self) -> Any:
        return _leaf, (self.name, self.form)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def _leaf(name: str, form: Any) -> LeafFunction:
    module, _, own = name.partition(":")
    return LeafFunction(name, getattr(importlib.import_module(module), own), form)


def leaf_functions_of(graph: Graph) -> tuple[str, ...]:
    """The names of those that a graph calls, in order."""
    return tuple(sorted({node.target.name for node in graph.nodes if isinstance(node.target, LeafFunction)}))


def form_of(result: Any) -> Any:
    """The number of dimensions of a tensor; of a sequence those of its tensors."""
    if isinstance(result, Tensor):
        return result.ndim
    return tuple(map(form_of, result)) if isinstance(result, (tuple, list)) else None


def is_plain(values: Any) -> bool:
    """Tensors, numbers and words, in plain containers: no layer, and no other object that could hold weights."""
    if type(values) in (tuple, list, dict):
        return all(map(is_plain, values.values() if isinstance(values, dict) else values))
    return isinstance(values, _PLAIN)


def named(frame: FrameType) -> str | None:
    """``package.module:name`` of the function that a frame runs, if it can be found by that."""
    name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
    function = frame.f_globals.get(name)
    if not callable(function) or getattr(_written(function), "__code__", None) is not frame.f_code:
        return None
    return f"{module}:{name}"


def _written(function: Any) -> Any:
    """As it stands in the model's code, without what was made of it there."""
    return inspect.unwrap(script_source(function) or function)


@contextmanager
def intercepted_functions(names: Set[str], namespaces: list[dict[str, Any]], handler: Handler) -> Iterator[None]:
    """Calls of the functions of these names, and of what is a leaf in a graph that runs, go to ``handler``.

    ``namespaces``: where functions are found under any name, beside the Python modules of their own packages.
    """
    instead: dict[int, Callable[..., Any]] = {}
    for name in names:
        module, _, own = name.partition(":")
        function = getattr(sys.modules.get(module), own, None)
        if function is not None:
            instead[id(function)] = _handled(name, function, handler)
            namespaces = [*namespaces, *namespaces_of(frozenset([module.partition(".")[0]]))]
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    run = LeafFunction.__call__

    def call(self: LeafFunction, *args: Any, **kwargs: Any) -> Any:
        result = handler(self.name, self.function, args, kwargs)
        return run(self, *args, **kwargs) if result is NotImplemented else result

    try:
        LeafFunction.__call__ = call  # type: ignore[method-assign]
        for namespace in namespaces if instead else ():
            for key, value in list(namespace.items()):
                if id(value) in instead:
                    replaced.append((namespace, key, value))
                    namespace[key] = instead[id(value)]
        yield
    finally:
        LeafFunction.__call__ = run  # type: ignore[method-assign]
        for namespace, key, value in replaced:
            namespace[key] = value


def _handled(name: str, function: Callable[..., Any], handler: Handler) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = handler(name, function, args, kwargs)
        return function(*args, **kwargs) if result is NotImplemented else result

    return call
