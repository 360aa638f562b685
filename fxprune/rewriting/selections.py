"""Selections: a block reads some channels of a stream, and the stream stays whole (Liu et al. 2017, sec. 4.3).

In networks whose blocks begin with a norm (pre-activation, DenseNet), the scale of that norm says what a channel of the
stream is worth to its block, and nothing of what it is worth to others. A selection in front of the norm, at first of
all channels, gives the block channels of its own, which are cut like any others: with the norm, and the columns of the
layers that read it. What is left of the selection is an ``index_select``.

A *choice* is the same in front of a layer that reads a sum of branches, and there the stream is cut as well: a layer
reads some of the channels that the stream keeps (Wan et al. 2023).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import numpy as np
import torch
from torch import fx, nn

from fxprune.errors import ModelError
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.groups.flow import Channels, Flow, channels_in, flows, node_labels, producers, reading_parameters
from fxprune.labels.classes import Ids
from fxprune.ops import selection as _registers  # noqa: F401 - the op
from fxprune.ops.table import base_name
from fxprune.selection.plan import SELECTION

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
            "do, and channel by channel, as batch norms do and layer norms do not: there is nothing to select."
        )
    for node, size in found:
        path, _, last = str(node.target).rpartition(".")
        owner, tried = result.get_submodule(path), count(2)
        name = f"{last}{SELECTION}"
        while hasattr(owner, name):  # of a network that had been through this, and was cut
            name = f"{last}{SELECTION}_{next(tried)}"
        _select(result, node, name, size)
    result.graph.lint()
    result.recompile()
    return result


def _select(module: fx.GraphModule, node: fx.Node, name: str, size: int, whole: bool = True) -> None:
    """Let a layer read what it reads by an index, in place; the buffer ``name`` beside it holds all of ``size``."""
    path = str(node.target).rpartition(".")[0]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    module.get_submodule(path).register_buffer(name, torch.arange(size, device=device))
    with module.graph.inserting_before(node):
        index = module.graph.get_attr(f"{path}.{name}" if path else name)
        chosen = module.graph.call_function(_OP, (node.args[0], index, whole))
    for made in (index, chosen):
        made.meta["source"] = node.meta.get("source", "")
    node.args = (chosen, *node.args[1:])


CHOICE = "reads"
"""``CONV_reads`` beside a layer ``CONV`` holds which channels of a stream it reads."""


def readers_of_joins(module: fx.GraphModule, graph: ChannelGraph) -> list[str]:
    """The layers that read, by a weight of theirs and along dim 1, channels that several others make together.

    That is what a sum of branches gives. Each is called once, and reads all of the channels that it is given, which may
    be cut without another statistic. One that chooses since an earlier cut keeps its choice.
    """
    steps = flows(module, graph)
    made = producers(steps)
    free = {int(c) for group in graph.prunable if group.exact for c in group.channels.flat}
    calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    found = []
    for node, step in steps.items():
        if node.op != "call_module" or calls[str(node.target)] > 1 or len(step.inputs) != 1:
            continue
        if f"{node.target}_{CHOICE}" in buffers:
            continue
        ((source, channels),) = step.inputs.items()
        labels = [f for known in node_labels(graph, source) for f in known.labels if f.ids.size > 1]
        alone = len(labels) == 1 and labels[0].dim == 1 and len(channels) == labels[0].ids.size
        if alone and channels and channels == step.reads and not channels & step.out and channels <= free:
            own = [f for name in reading_parameters(module, graph, node) for f in graph.by_name[name].labels]
            by_columns = [
                f for f in own if f.dim == 1 and channels_in((f,)) == channels and f.ids.size == len(channels)
            ]
            if len(by_columns) == 1 and min(made.get(c, 0) for c in channels) > 1:
                found.append(str(node.target))
    return found


def with_choices(module: fx.GraphModule, readers: Sequence[str]) -> fx.GraphModule:
    """A copy in which these layers choose the channels that they read, at first all; the rest may be cut as before.

    Raises:
        ValueError: the model does not call one of them just once.
    """
    result = copy.deepcopy(module)
    for name in readers:
        calls = [n for n in result.graph.nodes if n.op == "call_module" and n.target == name]
        weight = getattr(result.get_submodule(name), "weight", None) if len(calls) == 1 else None
        if weight is None or weight.ndim < 2:
            raise ValueError(name)
        _select(result, calls[0], f"{name.rpartition('.')[2]}_{CHOICE}", weight.shape[1], whole=False)
    result.graph.lint()
    result.recompile()
    return result


def follows(module: fx.GraphModule, graph: ChannelGraph) -> Ids:
    """Of all choices every entry and the channel of the stream that it is about, ``[pairs, 2]``."""
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for node, index, stream in _choices(module.graph, graph):
        own = next(f for known in node_labels(graph, node) for f in known.labels if f.dim == 1)
        positions = module.get_buffer(str(index.target)).cpu().numpy()
        pairs.append(np.stack([own.ids.reshape(-1), stream[positions]], 1))
    return np.concatenate(pairs)


def renumber(module: nn.Module, code: fx.Graph, graph: ChannelGraph, keep: Keep) -> None:
    """Let the indices of choices, which were cut, say where the channels are that stay."""
    for _, index, stream in _choices(code, graph):
        buffer = module.get_buffer(str(index.target))
        places = torch.from_numpy(np.cumsum(keep[stream]) - 1).to(buffer.device, buffer.dtype)
        buffer.copy_(places[buffer])


def _choices(code: fx.Graph, graph: ChannelGraph) -> Iterator[tuple[fx.Node, fx.Node, Ids]]:
    """The nodes that choose of what may be cut, their indices, and the channels of the stream in order."""
    for node in code.nodes:
        if node.target is _OP and not node.args[2]:
            source, index = node.args[:2]
            assert isinstance(source, fx.Node) and isinstance(index, fx.Node)
            factors = [f for known in node_labels(graph, source) for f in known.labels if f.dim == 1]
            if factors:
                yield node, index, factors[0].ids.reshape(-1)


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
