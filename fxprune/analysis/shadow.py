"""A recorded graph over labelled meta tensors, for a first propagation or to replay what is known on another graph."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.channels import ChannelGraph, Parameter
from fxprune.cost import Keep
from fxprune.labels.factors import pruned
from fxprune.labels.propagate import Propagation, Watch, label_parameter, propagate, set_labels
from fxprune.recording import clone_modules, replace_tensors


def placeholder_values(graph_module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """One value per placeholder, as a call with ``args`` and ``kwargs`` binds them."""
    bound = inspect.signature(graph_module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    nodes = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    return [bound.arguments[str(n.target).lstrip("*")] for n in nodes]


def labelled_shadow(graph_module: fx.GraphModule, run: Propagation) -> tuple[nn.Module, list[tuple[Tensor, Parameter]]]:
    """Its modules over labelled meta tensors; integers stay real. Also returns each tensor with its description."""
    shadow = clone_modules(graph_module)
    shadow.eval()
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in (*graph_module.named_parameters(remove_duplicate=False),
                         *graph_module.named_buffers(remove_duplicate=False)):  # fmt: skip
        names[id(tensor)].append(name)
    replaced: dict[int, Tensor] = {}
    holders: list[tuple[Tensor, Parameter]] = []

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            own = tuple(names[id(tensor)])
            if tensor.is_floating_point() or tensor.is_complex():
                stand = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad
                )  # torch takes other ways through its ops for tensors that need gradients
                label_parameter(run, own[0], stand)
                shape = tuple(tensor.shape)
                groups = run.facts.layouts.get(own[0], 1)
                holders.append((stand, Parameter(own, shape, (), isinstance(tensor, nn.Parameter), groups)))
            else:
                stand = _as_it_is(tensor)
            replaced[id(tensor)] = stand
        return replaced[id(tensor)]

    replace_tensors(shadow, stand_in)
    return shadow, holders


def _as_it_is(tensor: Tensor) -> Tensor:
    """An integer tensor with its values, on the CPU; on meta it has none."""
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu()


def replay(
    module: fx.GraphModule,
    graph: ChannelGraph,
    keep: Keep,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    watch: Watch | None = None,
) -> tuple[Propagation, str]:
    """Propagate the channel numbers of ``graph`` through ``module`` on other inputs or after a rewriting.

    ``watch``: called after every aten op, see ``Propagation``.

    Returns:
        The run, whose atoms below ``graph.channel_count`` are channel numbers, and the error that ended it, or "".
    """
    run = Propagation(graph.attention, seeded=True, watch=watch)
    run.fresh(graph.channel_count)
    run.lock(np.flatnonzero(graph.locked), "locked before")
    shadow = clone_modules(module)
    shadow.eval()
    names: dict[int, str] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), name)
    replaced: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            known = graph.by_name.get(names[id(tensor)])
            if known is None and not tensor.is_floating_point():
                replaced[id(tensor)] = _as_it_is(tensor)
            else:
                stand = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad
                )  # torch takes other ways through its ops for tensors that need gradients
                labels = () if known is None else pruned(known.labels, keep)
                set_labels(stand, names[id(tensor)], tuple(f for f in labels if f.ids.shape[f.dim] > 1))
                replaced[id(tensor)] = stand
        return replaced[id(tensor)]

    replace_tensors(shadow, stand_in)
    try:
        propagate(shadow, module.graph, placeholder_values(module, args, kwargs), run, "network input")
    except Exception as error:
        return run, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return run, ""
