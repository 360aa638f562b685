"""A recorded graph over labelled meta tensors, for a first propagation or to replay what is known on another graph."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.groups.channels import ChannelGraph, Parameter
from fxprune.groups.cost import Keep
from fxprune.labels.factors import pruned
from fxprune.labels.parameters import label_parameter
from fxprune.labels.propagation import Propagation, set_labels
from fxprune.labels.run import Settings, Watch, propagate
from fxprune.recording import clone_modules, evaluated, named_tensors, put_in_eval_mode, replace_tensors
from fxprune.recording.shards import gathered, whole


def placeholder_values(graph_module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """One value per placeholder, as a call with ``args`` and ``kwargs`` binds them."""
    nodes = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    parameters: list[inspect.Parameter] = []
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    for node in nodes:
        name, default = str(node.target), node.args[0] if node.args else inspect.Parameter.empty
        stars = len(name) - len(name.lstrip("*"))
        own = (kind, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)[stars]
        parameters.append(inspect.Parameter(name.lstrip("*"), own, default=default))
        if own == inspect.Parameter.VAR_POSITIONAL:
            kind = inspect.Parameter.KEYWORD_ONLY
    bound = inspect.Signature(parameters).bind(*args, **kwargs)
    bound.apply_defaults()
    return [bound.arguments[parameter.name] for parameter in parameters]


class ValueInterpreter(fx.Interpreter):
    """An interpreter that is run on ``placeholder_values``: one value per placeholder, also for ``*args``.

    Parameters of which every process holds a share are gathered where they are used, in ``dtype`` if that is not None,
    and let go again.
    """

    dtype: torch.dtype | None = None

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self.args_iter)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return whole(super().get_attr(target, args, kwargs), self.dtype)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        with gathered(self.fetch_attr(target), self.dtype):
            return super().call_module(target, args, kwargs)


def labelled_shadow(graph_module: fx.GraphModule, run: Propagation) -> tuple[nn.Module, list[tuple[Tensor, Parameter]]]:
    """Its modules over labelled meta tensors; integers stay real. Also returns each tensor with its description."""
    shadow = clone_modules(graph_module)
    put_in_eval_mode(shadow)
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in named_tensors(shadow).items():
        names[id(tensor)].append(name)
    replaced: dict[int, Tensor] = {}
    holders: list[tuple[Tensor, Parameter]] = []

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            own = tuple(names[id(tensor)])
            if tensor.is_floating_point() or tensor.is_complex():
                stand = _without_data(tensor)
                if tensor.numel():
                    label_parameter(run, own[0], stand)
                else:
                    set_labels(stand, (), own[0])  # of no entries no channel can be one
                shape = tuple(tensor.shape)
                groups = run.facts.layouts.get(own[0], 1)
                holders.append((stand, Parameter(own, shape, (), isinstance(tensor, nn.Parameter), groups)))
            else:
                stand = _as_it_is(tensor)
                if own[0] in run.facts.indices:
                    label_parameter(run, own[0], stand)
                    holders.append((stand, Parameter(own, tuple(tensor.shape), (), False, 1)))
                else:
                    set_labels(stand, (), own[0])
            replaced[id(tensor)] = stand
        return replaced[id(tensor)]

    replace_tensors(shadow, stand_in)
    return shadow, holders


def _as_it_is(tensor: Tensor) -> Tensor:
    """A copy of an integer tensor with its values, on the CPU; on meta it has none. The run may write to it."""
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def replay(
    module: fx.GraphModule,
    graph: ChannelGraph,
    keep: Keep,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    watch: Watch | None = None,
    shadow: nn.Module | None = None,
    strict: bool = False,
) -> tuple[Propagation, str]:
    """Propagate the channel numbers of ``graph`` through ``module`` on other inputs or after a rewriting.

    ``watch``: called after every aten op, see ``Propagation``. ``shadow``: its modules, floats on meta already, which
    carry the labels from now on (of a draft, ``module`` itself); else a copy is made. ``strict``: a node that could be
    interpreted in the dense graph and now cannot ends the run.

    Returns:
        The run, whose atoms below ``graph.channel_count`` are channel numbers, and the error that ended it, or "".
    """
    shadow = _on_meta(module) if shadow is None else shadow
    may_fail = graph.uninterpreted if strict else None
    settings = Settings(watch=watch, may_fail=may_fail)
    run = Propagation(graph.attention, seeded=True, lone=_lone(graph, keep))
    run.fresh(graph.channel_count)
    run.lock(np.flatnonzero(graph.locked), "locked before")
    labelled: set[int] = set()
    for name, tensor in named_tensors(shadow).items():
        known = graph.by_name.get(name)
        if id(tensor) not in labelled and (known is not None or tensor.is_floating_point()):
            labelled.add(id(tensor))
            labels = () if known is None else pruned(known.labels, keep)
            set_labels(tensor, tuple(f for f in labels if f.ids.shape[f.dim] > 1), name)
    try:
        with evaluated(shadow):
            values = placeholder_values(module, args, kwargs)
            propagate(shadow, module.graph, values, run, "network input", settings)
    except Exception as error:
        return run, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return run, ""


def _lone(graph: ChannelGraph, keep: Keep) -> Keep | None:
    """Per channel: is it the only one that is left of its block?"""
    result = np.zeros(graph.channel_count, dtype=bool)
    for group in graph.groups:
        if group.blocks > 1 and group.size > 1 and np.count_nonzero(keep[group.channels[0]]) == 1:
            result[group.channels] = True
    return result if result.any() else None


def _on_meta(module: fx.GraphModule) -> nn.Module:
    """A copy of its modules over stand-ins, one for every tensor."""
    shadow = clone_modules(module)
    made: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            labelled = tensor.is_floating_point() or tensor.is_complex()
            made[id(tensor)] = _without_data(tensor) if labelled else _as_it_is(tensor)
        return made[id(tensor)]

    replace_tensors(shadow, stand_in)
    return shadow


def _without_data(tensor: Tensor) -> Tensor:
    """Its like without data. Torch takes other ways through its ops for tensors that need gradients."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
