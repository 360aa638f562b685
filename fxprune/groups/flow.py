"""What every node of a recorded graph does with channels: it makes them, passes them on, or reads them up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import fx
from torch.utils._pytree import tree_leaves

from fxprune.groups.channels import ChannelGraph
from fxprune.labels.factors import Labels
from fxprune.labels.records import TensorLabels
from fxprune.ops.table import base_name
from fxprune.recording.upstream import upstream

Channels = frozenset[int]
_NONE: Channels = frozenset()
_PRODUCTS = {"mul", "mul_", "imul", "multiply", "multiply_"}
ADDED = "_fxprune_"  # how the names of all submodules begin that learners put into a graph


@dataclass(frozen=True)
class Flow:
    """One node that computes tensors from tensors.

    ``inputs``: the channels of every tensor it is given that is not made of parameters alone. ``out``: those of its
    result. ``reads``: those it contracts or reduces. ``makes``: those of the result that it does not pass on.
    ``holds``: those it passes on and has parameters for (a norm, a depthwise convolution, an added position embedding).
    """

    inputs: Mapping[fx.Node, Channels]
    out: Channels
    reads: Channels
    makes: Channels
    holds: Channels

    @property
    def passes(self) -> Channels:
        """Those of the inputs that are in the result."""
        return self.out - self.makes


def flows(module: fx.GraphModule, graph: ChannelGraph) -> dict[fx.Node, Flow]:
    """Every node through which channels run, in graph order; parameters and what is made of them alone left out."""
    result: dict[fx.Node, Flow] = {}
    constant = constants(module, graph)
    own = _own_labels(module, graph)
    contractions = {term.node for term in graph.terms}
    mixing = contractions | {statistic.node for statistic in graph.statistics}
    for node in module.graph.nodes:
        if node not in constant and node.op not in ("placeholder", "output"):
            flow = _flow(node, graph, constant, own, node.name in contractions, node.name in mixing)
            if flow.out or any(flow.inputs.values()):
                result[node] = flow
    return result


def constants(module: fx.GraphModule, graph: ChannelGraph) -> set[fx.Node]:
    """Parameters, buffers, and what is computed of them alone."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        tensors = [i for i in node.all_input_nodes if i in found or node_labels(graph, i)]
        if node.op == "get_attr" or (tensors and all(i in found for i in tensors)):
            found.add(node)
    return found


def node_labels(graph: ChannelGraph, node: fx.Node) -> list[TensorLabels]:
    """What is known of the tensors a node computes."""
    return [leaf for leaf in tree_leaves(graph.nodes.get(node.name)) if isinstance(leaf, TensorLabels)]


def channels_in(labels: Labels) -> Channels:
    """The channels of all factors."""
    return _NONE.union(*(np.unique(f.ids).tolist() for f in labels))


def _flow(
    node: fx.Node,
    graph: ChannelGraph,
    constant: set[fx.Node],
    own: Mapping[str, list[tuple[int, Labels]]],
    contracts: bool,
    mixes: bool,
) -> Flow:
    inputs = {
        i: channels_in(tuple(f for known in node_labels(graph, i) for f in known.labels))
        for i in node.all_input_nodes
        if i not in constant
    }
    known = node_labels(graph, node)
    if not known:  # a size, a number
        return Flow({}, _NONE, _NONE, _NONE, _NONE)
    out = channels_in(tuple(f for tensor in known for f in tensor.labels))
    given = _NONE.union(*inputs.values())
    held = list(own.get(str(node.target), ())) if node.op == "call_module" else []
    held += [(len(t.shape), t.labels) for i in node.all_input_nodes if i in constant for t in node_labels(graph, i)]
    reads = _NONE
    for ndim, labels in held:
        for factor in labels if contracts and ndim > 1 else ():
            channels = channels_in((factor,))
            if channels <= given and (len(labels) > 1 or not channels & out):
                reads |= channels
    if mixes:
        reads |= given - out
    passed = given - reads
    holds = _NONE.union(*(channels_in(labels) for _, labels in held)) & passed & out
    return Flow(inputs, out, reads, out - passed, holds)


def _own_labels(module: fx.GraphModule, graph: ChannelGraph) -> dict[str, list[tuple[int, Labels]]]:
    """(number of dims, labels) of the parameters and buffers of every module that is a node."""
    result: dict[str, list[tuple[int, Labels]]] = {}
    for target in {str(n.target) for n in module.graph.nodes if n.op == "call_module"}:
        owner = module.get_submodule(target)
        names = [name for name, _ in (*owner.named_parameters(), *owner.named_buffers())]
        held = [graph.by_name[f"{target}.{name}"] for name in names if f"{target}.{name}" in graph.by_name]
        result[target] = [(len(p.shape), p.labels) for p in held]
    return result


def reading_parameters(module: fx.GraphModule, graph: ChannelGraph, node: fx.Node) -> Iterator[str]:
    """Names of the parameters of two or more dims that a node has of its own, or is given as they are."""
    return (name for name in _parameters_at(module, graph, node) if len(graph.by_name[name].shape) > 1)


def _parameters_at(module: fx.GraphModule, graph: ChannelGraph, node: fx.Node) -> Iterator[str]:
    """Names of the parameters that a node has of its own, or is given as they are."""
    names = [str(i.target) for i in node.all_input_nodes if i.op == "get_attr"]
    if node.op == "call_module":
        names += [f"{node.target}.{name}" for name, _ in module.get_submodule(str(node.target)).named_parameters()]
    return (name for name in names if name in graph.by_name)


def producers(flow: Mapping[fx.Node, Flow]) -> dict[int, int]:
    """How many nodes make each channel."""
    count: dict[int, int] = {}
    for step in flow.values():
        for channel in step.makes:
            count[channel] = count.get(channel, 0) + 1
    return count


def readers(
    module: fx.GraphModule, graph: ChannelGraph, flow: Mapping[fx.Node, Flow]
) -> dict[int, frozenset[tuple[str, int]]]:
    """For channels that nothing but weights of layers read: (name, dim) where they do.

    If all these are zero, the channel is of no effect. Left out is a channel that is taken up in any other way (a
    product of two activations, a sum over channels), that a weight reads which is computed from parameters, or that has
    a weight of which one cannot tell whether it reads it (a recurrent one). Where a layer both reads and makes a
    channel, all its places count as reading. Statistics over channels are not told here but by ``ChannelGroup.exact``.
    """
    contractions = {term.node for term in graph.terms}
    found: dict[int, set[tuple[str, int]]] = {}
    seen: set[tuple[str, int, int]] = set()
    other: set[int] = set()
    for node, step in flow.items():
        weights = {graph.by_name[name].name for name in reading_parameters(module, graph, node)}
        places = {(name, f.dim): channels_in((f,)) for name in weights for f in graph.by_name[name].labels}
        computed = [i for i in node.all_input_nodes if i not in step.inputs and i.op != "get_attr"]
        other |= channels_in(tuple(f for i in computed for known in node_labels(graph, i) for f in known.labels))
        taken_up = _taken_up(graph, step, node.name in contractions)
        for channel in step.out.union(*step.inputs.values()):
            here = {place for place, channels in places.items() if channel in channels}
            seen |= {(*place, channel) for place in here}
            if channel in step.reads and here:
                found.setdefault(channel, set()).update(here)
            elif (
                channel in step.reads
                or channel in taken_up
                or (channel in step.makes and len({name for name, _ in here}) < len(here))
            ):
                other.add(channel)
    for group in graph.groups:
        for member in group.members:
            if len(graph.by_name[member.name].shape) > 1:
                other.update(int(c) for c in group.channels.flat if (member.name, member.dim, int(c)) not in seen)
    return {channel: frozenset(places) for channel, places in found.items() if channel not in other}


def unscaled(module: fx.GraphModule, graph: ChannelGraph, flow: Mapping[fx.Node, Flow]) -> Channels:
    """Channels that something takes up on a path along which no scale of a norm layer has multiplied them.

    Such a scale says nothing of what a channel does there: of a pre-activation network that of a block's first norm
    reaches the block, and not a shortcut that reads the stream. What is multiplied by something scaled is scaled.
    """
    bare: dict[fx.Node, Channels] = {}
    constant = constants(module, graph)
    found = _NONE
    for node, step in flow.items():
        here = _NONE.union(*(bare.get(source, _NONE) & channels for source, channels in step.inputs.items()))
        found |= here - step.passes
        if node.op != "call_module" and base_name(node) in _PRODUCTS:
            here -= _NONE.union(*(channels - bare.get(source, _NONE) for source, channels in step.inputs.items()))
        bare[node] = ((here & step.passes) | step.makes) - _scaled_by(module, graph, node, constant)
    return found


def _scaled_by(module: fx.GraphModule, graph: ChannelGraph, node: fx.Node, constant: set[fx.Node]) -> Channels:
    """The channels that a node multiplies by the scale of a norm layer, which may be cast or laid out anew before."""
    found = upstream([node], lambda n: [i for i in n.all_input_nodes if i in constant])
    held = (graph.by_name[name] for made in found for name in _parameters_at(module, graph, made))
    return _NONE.union(*(channels_in(p.labels) for p in held if graph.norm_scales.intersection(p.names)))


def _taken_up(graph: ChannelGraph, step: Flow, contracts: bool) -> set[int]:
    """Channels of the inputs with which a node does more than pass them on, if it does not read them with a weight."""
    factors = [f for source in step.inputs for known in node_labels(graph, source) for f in known.labels]
    carriers = Counter(channel for factor in factors for channel in channels_in((factor,)))
    return {channel for channel, count in carriers.items() if channel not in step.out or (contracts and count > 1)}
