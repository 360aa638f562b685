"""Selections: a block reads some channels of a stream, and the stream stays whole (Liu et al. 2017, sec. 4.3).

In networks whose blocks begin with a norm (pre-activation, DenseNet), the scale of that norm says what a channel of the
stream is worth to its block, and nothing of what it is worth to others. A selection in front of the norm, at first of
all channels, gives the block channels of its own, which are cut like any others: with the norm, and the columns of the
layers that read it. What is left of the selection is an ``index_select``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import count

import torch
from torch import fx

from fxprune.errors import ModelError
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.flow import Channels, Flow, channels_in, flows, node_labels
from fxprune.ops import selection as _registers  # noqa: F401 - the op
from fxprune.ops.table import base_name

_OP = torch.ops.fxprune.select_channels.default


def with_selections(module: fx.GraphModule, graph: ChannelGraph) -> fx.GraphModule:
    """A copy with a selection in front of every norm that reads a stream for layers alone.

    Such a norm takes no statistic over channels; what it gives is read by layers and goes nowhere else; and its
    channels are normed or read elsewhere, too. The buffer ``NORM_selection`` beside the norm holds the channels.

    Raises:
        ModelError: there is none.
    """
    result = copy.deepcopy(module)
    nodes = {node.name: node for node in result.graph.nodes}
    found = [(nodes[node.name], size) for node, size in _sites(module, graph)]
    if not found:
        raise ModelError(
            "No norm of this model reads a stream for a block alone, as those of pre-activation networks and DenseNets "
            "do: a selection of inputs would change nothing."
        )
    device = next((p.device for p in result.parameters()), torch.device("cpu"))
    for node, size in found:
        path, _, last = str(node.target).rpartition(".")
        owner, tried = result.get_submodule(path), count(2)
        name = f"{last}_selection"
        while hasattr(owner, name):  # of a network that had been through this, and was cut
            name = f"{last}_selection_{next(tried)}"
        owner.register_buffer(name, torch.arange(size, device=device))
        source = node.args[0]
        assert isinstance(source, fx.Node)
        with result.graph.inserting_before(node):
            index = result.graph.get_attr(f"{path}.{name}" if path else name)
            chosen = result.graph.call_function(_OP, (source, index))
        for made in (index, chosen):
            made.meta["source"] = node.meta.get("source", "")
        node.args = (chosen, *node.args[1:])
    result.graph.lint()
    result.recompile()
    return result


def as_index_select(module: fx.GraphModule) -> None:
    """What is left of selections, as PyTorch's own op, in place: any exporter knows it."""
    found = [n for n in module.graph.nodes if n.op == "call_function" and base_name(n).endswith("select_channels")]
    for node in found:
        node.target, node.args = torch.index_select, (node.args[0], 1, node.args[1])
    if found:
        module.recompile()


def _sites(module: fx.GraphModule, graph: ChannelGraph) -> Iterator[tuple[fx.Node, int]]:
    """The norms, and how many channels each reads."""
    steps = flows(module, graph)
    exact = {int(c) for group in graph.groups if group.exact for c in group.channels.flat}
    calls = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    for node, step in steps.items():
        if node.op != "call_module" or calls.count(str(node.target)) > 1:
            continue
        scale = graph.by_name.get(f"{node.target}.weight")
        if scale is None or not graph.norm_scales.intersection(scale.names):
            continue
        channels = channels_in(scale.labels)
        dims = {f.dim for i in step.inputs for known in node_labels(graph, i) for f in known.labels}
        if not channels or dims != {1} or not channels <= exact or not channels <= step.passes:
            continue
        region = _region(steps, node, channels)
        others = (other for other in steps if region is not None and other not in region)
        if any((steps[other].reads | steps[other].holds) & channels for other in others):
            yield node, scale.shape[0]


def _region(steps: Mapping[fx.Node, Flow], norm: fx.Node, channels: Channels) -> set[fx.Node] | None:
    """The norm and all that its output reaches up to the layers that read it; None if it goes anywhere else."""
    region, waiting = {norm}, [norm]
    while waiting:
        here = waiting.pop()
        for user in here.users:
            if user.op == "output":
                return None
            step = steps.get(user)
            if step is None or user in region or not step.inputs.get(here, frozenset()) & channels:
                continue
            given = [source for source, own in step.inputs.items() if own & channels]
            if given != [here] or not channels <= step.reads | step.passes or channels & step.reads & step.passes:
                return None
            region.add(user)
            if channels & step.passes:
                waiting.append(user)
    return region
