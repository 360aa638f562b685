"""Several calls of one model as one: what shares the weights shares its channels, so they are recorded together.

``together`` makes a model of the same modules whose inputs are those of all calls, by name, and whose outputs too. So
whatever is done to a graph is done to all of them at once, and ``one_call`` takes one out again.
"""

from __future__ import annotations

import inspect
import keyword
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxprune.errors import ExampleInputsError, InputError, RecordError, suggestion
from fxprune.recording import boundary
from fxprune.recording.forms import Form
from fxprune.recording.guards import fits
from fxprune.recording.inputs import RECORD_KEY, Kwargs, normalise_inputs
from fxprune.recording.module import RecordedModule, clone_modules
from fxprune.recording.upstream import upstream
from fxprune.recording.writer import CALL

CALLS_KEY = "fxprune_calls"
"""In the ``meta`` of a graph of several calls: name -> its :class:`Parameters`."""


ONE_OF_KEY = "fxprune_one_of_calls"
"""In the ``meta`` of a graph that :func:`one_call` made: the name of the call."""


@dataclass(frozen=True)
class Parameters:
    """Of one call: how forward is called in it.

    ``placeholders``: (target, name, default) of every one that the graph of this call has, and the way to its value in
    the arguments of the call. ``forms``: of every one, see ``fxprune.recording.forms``.
    """

    placeholders: tuple[tuple[str, str, tuple[Any, ...], tuple[str, ...]], ...]
    forms: tuple[Form, ...]


def joined(model: Any, example_inputs: Any, example_kwargs: Any) -> tuple[Any, Any, Any]:
    """What was given, and where that is inputs of several calls by name the model and the inputs of :func:`together`.

    A dict of one item, or whose keys are parameters of forward, is none of calls.

    Raises:
        ExampleInputsError: a call has the name of an input, the model is a graph of several calls already, or see
            :func:`together`.
    """
    if not isinstance(example_inputs, Mapping) or len(example_inputs) < 2 or not isinstance(model, nn.Module):
        return model, example_inputs, example_kwargs
    if isinstance(model, fx.GraphModule) and CALLS_KEY in model.meta:
        raise ExampleInputsError(
            f"The model is a graph of the calls {', '.join(model.meta[CALLS_KEY])}. Pass the class with its layers, "
            "fxprune.into(model, graph), and the calls; example_kwargs= makes one graph of it, of which no call is "
            "taken out."
        )
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name in example_inputs]
    if len(named) == len(example_inputs):
        return model, example_inputs, example_kwargs
    if named:
        raise ExampleInputsError(
            f"example_inputs names several calls, and forward has an input {named[0]!r} too: give the call another "
            "name. Inputs by name of one call are example_kwargs=."
        )
    if example_kwargs:
        raise ExampleInputsError(
            "example_inputs names several calls, so example_kwargs= belongs to none of them: give the inputs of every "
            "call by name, example_inputs={'features': {'x': x, 'mode': 'features'}, ...}"
        )
    model, inputs = together(model, example_inputs)
    return model, (), inputs


def together(model: nn.Module, calls: Mapping[str, Any]) -> tuple[nn.Module, Kwargs]:
    """A model of the same modules and tensors that is called for all calls at once, and its keyword inputs.

    Args:
        model: is not changed.
        calls: name -> inputs: a tensor, a tuple of positional inputs, or a dict of inputs by name.

    Raises:
        ExampleInputsError: a name that is none, inputs that do not fit, or a model that is a graph, of one call.
    """
    if isinstance(model, fx.GraphModule):
        raise ExampleInputsError("example_inputs names several calls, and a graph has one: pass the model it is of.")
    inputs: Kwargs = {}
    for name, given in calls.items():
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name == "self":
            raise ExampleInputsError(f"example_inputs names a call {name!r}: pass a name such as 'features'.")
        args, kwargs = normalise_inputs(*((), given) if isinstance(given, Mapping) else (given, None))
        inputs[name] = dict(boundary.bind(model, args, kwargs).arguments)
    return called(model, inputs), inputs


def called(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A model of the same modules and tensors that is called for all calls of these names at once."""
    cls = _class_of(type(model))
    result = cls.__new__(cls)
    result.__dict__.update(model.__dict__)
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    result.__dict__[boundary.SIGNATURE_OF_CALLS] = inspect.Signature(parameters)
    return result


class _Unannounced:
    """A subclass that the base class is told nothing of: it may keep a register."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _class_of(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass for all calls at once. Inside each the model is of its own class, which its code may ask for."""

    def call(self: nn.Module, /, **calls: Mapping[str, Any]) -> dict[str, Any]:
        signature, kind = inspect.signature(self.forward), type(self)
        bound = {name: inspect.BoundArguments(signature, OrderedDict(given)) for name, given in calls.items()}
        self.__class__ = cls
        try:
            return {name: self(*own.args, **own.kwargs) for name, own in bound.items()}
        finally:
            self.__class__ = kind

    members = {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Unannounced, cls), members)


def is_together(model: nn.Module) -> bool:
    """Whether this is a model of :func:`together`."""
    return boundary.SIGNATURE_OF_CALLS in model.__dict__


def called_as(module: fx.GraphModule, model: nn.Module) -> nn.Module:
    """The model, for all calls at once where ``module`` is a graph of several.

    Raises:
        InputError: it is of one of several, of which the model knows nothing.
    """
    if ONE_OF_KEY in module.meta:
        raise InputError(
            f"This is the call {module.meta[ONE_OF_KEY]!r} alone, taken out of the graph of all calls: pass that one."
        )
    calls = module.meta.get(CALLS_KEY)
    return model if calls is None or is_together(model) else called(model, calls)


def alone(model: nn.Module) -> nn.Module:
    """A model of :func:`together` in its own class again, for any other call."""
    model.__class__ = type(model).__bases__[1]
    del model.__dict__[boundary.SIGNATURE_OF_CALLS]
    return model


def parameters_of(model: nn.Module, calls: Mapping[str, Mapping[str, Any]]) -> dict[str, Parameters]:
    """Of a model of :func:`together` and its inputs how forward is called in every call."""
    signature, found = inspect.signature(model.forward), {}
    for name, given in calls.items():
        bound = inspect.BoundArguments(signature, OrderedDict(given))
        placed, forms = [], []
        for node, way in boundary.placeholders(fx.Graph(), bound):
            placed.append((str(node.target), node.name, node.args, way))
            forms.append(boundary.form_at(bound, node, way))
        found[name] = Parameters(tuple(placed), tuple(forms))
    return found


def one_call(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """The graph of one of several calls, called as the model is in it, over the same modules and tensors.

    Args:
        module: recorded, pruned or loaded, of several calls: ``example_inputs={"features": ..., "logits": ...}``.
        name: of the call.

    Raises:
        InputError: there is no such call, or ``module`` is no graph.
        RecordError: what it computes depends on the inputs of another one.

    Examples:
        >>> calls = {"whole": x, "doubled": (2 * x,)}
        >>> small = fxprune.prune(model, calls, flops=0.5, progress=False)
        >>> fxprune.one_call(small, "whole")(x).shape
        torch.Size([2, 10])
    """
    if not isinstance(module, fx.GraphModule):
        raise InputError(f"module is {type(module).__name__}; pass a graph of several calls, of record or prune.")
    calls: Mapping[str, Parameters] = module.meta.get(CALLS_KEY, {})
    if name not in calls:
        known = f" It has {', '.join(calls)}.{suggestion(name, list(calls))}" if calls else " It is a graph of one."
        raise InputError(f"The graph has no call {name!r}.{known}")
    graph = _graph_of(module, name, calls[name])
    result = RecordedModule(clone_modules(module), graph, type(module).__name__)
    result.meta.update((key, value) for key, value in module.meta.items() if key != CALLS_KEY)
    result.meta[ONE_OF_KEY] = name
    if RECORD_KEY in module.meta:
        given = module.meta[RECORD_KEY]["kwargs"][name]
        args, kwargs = _spread(given, calls[name])
        result.meta[RECORD_KEY] = {"args": args, "kwargs": kwargs}
    return result


def _spread(given: Mapping[str, Any], parameters: Parameters) -> tuple[tuple[Any, ...], Kwargs]:
    """The arguments of a call as the graph of it takes them: in order up to the first that was left out."""
    args: list[Any] = []
    kwargs: Kwargs = {}
    complete = True
    for target, _, _, (first, *rest) in parameters.placeholders:
        owner: Any = given.get(first, {}) if rest else given
        key = rest[0] if rest else first
        complete = complete and key in owner and not rest
        if key in owner:
            if target.startswith("*"):
                args += owner[key]
            elif complete:
                args.append(owner[key])
            else:
                kwargs[key] = owner[key]
    return tuple(args), kwargs


def _graph_of(module: fx.GraphModule, name: str, parameters: Parameters) -> fx.Graph:
    nodes = list(module.graph.nodes)
    given = next(node for node in nodes if node.op == "placeholder" and node.target == name)
    output = nodes[-1]
    number = 1 + list(module.meta[CALLS_KEY]).index(name)
    own = [node for node in nodes[:-1] if node.meta.get(CALL) == number]
    effects = [node for node in own if not node.users or "mutates" in node.meta]

    def found(node: fx.Node) -> fx.Node:
        """What this call finds there: of a buffer that another call writes to, what it holds by then."""
        while node.meta.get(CALL) not in (0, number) and "mutates" in node.meta and _is_state(node):
            (node, *_) = node.all_input_nodes
        return node

    wanted = {given, *_before([_item(output.args[0], name), *effects], found)}
    foreign = next((n for n in nodes if n in wanted and n.op == "placeholder" and n is not given), None)
    if foreign is not None:
        line = next((str(n.meta.get("source", "")) for n in own if foreign in _before(n, found)), "")
        raise RecordError(
            f"What the call {name!r} computes comes from the inputs of {foreign.target!r} too: the model keeps "
            f"something from one call for the next, from {line} on. Record the calls one by one, or drop what it keeps."
        )
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    values: dict[tuple[str, ...], fx.Node] = {}
    for target, called, default, way in parameters.placeholders:
        values[way] = graph.create_node("placeholder", target, args=default, name=called)
    named = tuple(values.values())
    begin = str(given.meta.get("source", ""))
    for node in named:
        node.meta["source"] = begin
    graph.call_function(fits, (named, tuple(t for t, *_ in parameters.placeholders), parameters.forms, begin))
    ways: dict[fx.Node, tuple[str, ...]] = {given: ()}
    for node in nodes:
        if node not in wanted or node is given:
            continue
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source in ways:
            way = (*ways[source], str(node.args[1]))
            if way in values:
                copies[node] = values[way]
            else:
                ways[node] = way
            continue
        copies[node] = graph.node_copy(node, lambda each: copies[found(each)])
    result = fx.node.map_arg(_item(output.args[0], name), lambda each: copies[found(each)])
    graph.output(result).meta.update(output.meta)
    return graph


def _item(outputs: Any, name: str) -> Any:
    """The output of one call: what the whole graph returns is a dict of them."""
    return outputs[name]


def _is_state(node: fx.Node) -> bool:
    """Whether it writes to a parameter or a buffer, and is that."""
    while "mutates" in node.meta and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr"


def _before(values: Any, found: Callable[[fx.Node], fx.Node]) -> set[fx.Node]:
    """All nodes that these come from, themselves included. ``found``: what stands for a node."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(values, lambda node: nodes.append(found(node)))
    return set(upstream(nodes, lambda node: map(found, node.all_input_nodes)))
