"""Weights generated from latent vectors: hypernetworks in the graph, in the place of parameters.

Every weight that a convolution or a matrix product contracts becomes a node that computes it from the latents of its
output and input channels, once per forward pass, however often it is used. Which channel each of its positions belongs
to is read from its labels, so that concatenations, grouped, depthwise and transposed convolutions, sub-pixel
convolutions and packed projections are no cases of their own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from fxprune.groups.channels import ChannelGraph, ChannelGroup, Parameter
from fxprune.groups.flow import ADDED, channels_in, constants, node_labels
from fxprune.methods.learner import Latents
from fxprune.recording.module import device_of, widest_dtype
from fxprune.recording.upstream import upstream

_BANK = f"{ADDED}hypernetworks"


def generate(fields: Sequence[Tensor], weight1: Tensor, weight2: Tensor, *biases: Tensor) -> Tensor:
    """``W2 ((z + B0) W1 + B1) + B2`` for every pair of channels by itself (DHP, eq. 2-4); ``z``: product of fields.

    Args:
        fields: latents by output channel, by input channel, ...; of shapes that broadcast to ``[*C]``.
        weight1: ``[*C, m]``, ``m`` the embedding.
        weight2: ``[*C, K, m]``, ``K`` the size of the kernel.
        biases: ``[*C]``, ``[*C, m]``, ``[*C, K]``.

    Returns:
        ``[*C, K]``.
    """
    bias0, bias1, bias2 = biases
    embedded = (math.prod(fields, start=bias0.new_ones(())) + bias0)[..., None] * weight1 + bias1
    return (weight2 @ embedded[..., None])[..., 0] + bias2


class Hypernetwork(nn.Module):
    """Generates one weight of ``shape`` from the latents ``[entries]`` of the whole network.

    Initialised by Hyperfan-in: with latents of variance 1 the weight has variance ``1 / fan_in``.

    Args:
        names: of the weight in the original state_dict; several where layers share it.
        like: a tensor with the weight's dtype and device.
        index: places in the latents, one tensor per field, each with the weight's number of dims.
        fan_in: products that are summed in one output of the layer.
        embedding: ``m``.
        generator: of the initialisation.
        recompute: whether the backward pass computes the intermediate tensors anew instead of keeping them.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        like: Tensor,
        index: Sequence[Tensor],
        fan_in: float,
        embedding: int,
        generator: torch.Generator,
        recompute: bool = True,
    ):
        super().__init__()
        self.names, self.recompute = names, recompute
        varying = {d for ids in index for d, size in enumerate(ids.shape) if size > 1}
        channels = [d for d in range(like.ndim) if d < 2 or d in varying]
        kernel = [d for d in range(like.ndim) if d not in channels]
        self._order = [*channels, *kernel]
        self._sizes = [like.shape[d] for d in self._order]
        self._fields = len(index)
        for place, ids in enumerate(index):
            field = ids.permute(self._order).flatten(len(channels)).squeeze(-1) if kernel else ids
            self.register_buffer(f"index_{place}", field.to(like.device), persistent=False)

        def uniform(variance: float, *shape: int) -> nn.Parameter:
            if like.is_complex():  # half of the variance in each part
                variance, shape = variance / 2, (*shape, 2)
            values = torch.rand(shape, generator=generator).mul_(2).sub_(1).mul_((3 * variance) ** 0.5)
            return nn.Parameter((torch.view_as_complex(values) if like.is_complex() else values).to(like))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(like.new_zeros(shape))

        outer, size = self._sizes[: len(channels)], math.prod(self._sizes[len(channels) :])
        self.weight1 = uniform(1.0, *outer, embedding)
        self.weight2 = uniform(1 / (embedding * fan_in), *outer, size, embedding)
        self.bias0, self.bias1, self.bias2 = zeros(*outer), zeros(*outer, embedding), zeros(*outer, size)

    def forward(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            if not (self.recompute and torch.is_grad_enabled()):
                return self._weight(latents)
            made: Tensor = checkpoint(self._weight, latents, use_reentrant=False, preserve_rng_state=False)
            return made

    def _weight(self, latents: Tensor) -> Tensor:
        fields = [latents[getattr(self, f"index_{place}")].to(self.bias0.dtype) for place in range(self._fields)]
        flat = generate(fields, self.weight1, self.weight2, self.bias0, self.bias1, self.bias2)
        back = [self._order.index(d) for d in range(len(self._order))]
        return flat.reshape(self._sizes).permute(back).contiguous()


class Hypernetworks(nn.Module):
    """All hypernetworks of a network, and the latents they share."""

    def __init__(self, latents: Tensor):
        super().__init__()
        self.latents = nn.Parameter(latents)

    def weights(self) -> dict[str, Tensor]:
        """Every generated weight, by all of its names in the original state_dict."""
        with torch.no_grad():
            made = [(part.names, part(self.latents)) for part in self.children() if isinstance(part, Hypernetwork)]
        return {name: weight for names, weight in made for name in names}


class Given(nn.Module):
    """A layer of the network, called with weights that it does not hold itself."""

    def __init__(self, layer: nn.Module, names: Sequence[str]):
        super().__init__()
        self._layer = [layer]  # not a child: it stays where it is, with its other parameters
        self._names = tuple(names)

    def forward(self, weights: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, weights, strict=True))
        return torch.func.functional_call(self._layer[0], given, args, kwargs)


def insert_hypernetworks(
    module: fx.GraphModule,
    graph: ChannelGraph,
    embedding: int,
    seed: int,
    ordinary: Collection[str] = (),
    shared: Sequence[Sequence[ChannelGroup]] = (),
    recompute: bool = True,
) -> Latents:
    """Put hypernetworks in the place of the kernels of ``module``, in place.

    The latents are drawn from a normal distribution: first those of all channels by number, then those of dims that no
    channel runs through (the one input of every filter of a depthwise convolution).

    Args:
        module: the network.
        graph: its channels.
        embedding: see ``Hypernetwork``.
        seed: of latents and hypernetworks.
        ordinary: names of weights that are not generated.
        shared: groups of equal shapes that have the latents of the first of them, position by position.
        recompute: see ``Hypernetwork``.
    """
    found, plain = kernels(module, graph)
    found = [(parameter, fan_in) for parameter, fan_in in found if parameter.name not in ordinary]
    latent = torch.arange(graph.channel_count)
    for first, *others in shared:
        for other in others:
            latent[torch.from_numpy(other.channels)] = torch.from_numpy(first.channels)
    generator = torch.Generator().manual_seed(seed)
    index, entries = [], graph.channel_count
    for parameter, _ in found:
        free = [_range(entries, parameter, d) for d in _free_dims(parameter)]
        entries += sum(ids.numel() for ids in free)
        index.append([*(latent[factor.tensor()] for factor in parameter.labels), *free])
    device = device_of(module)
    bank = Hypernetworks(torch.randn(entries, generator=generator).to(device, widest_dtype(module)))
    for number, (parameter, fan_in) in enumerate(found):
        like = module.get_parameter(parameter.name).detach()
        part = Hypernetwork(parameter.names, like, index[number], fan_in, embedding, generator, recompute)
        bank.add_module(f"weight_{number}", part)
    _rewire(module, bank)
    generated = channels_in(tuple(factor for parameter, _ in found for factor in parameter.labels))
    through = [group for group in graph.groups if generated.issuperset(group.channels.reshape(-1).tolist())]
    return Latents(bank.latents, {group.name: latent[torch.from_numpy(group.channels)] for group in through}, plain)


def _free_dims(parameter: Parameter) -> list[int]:
    """Of outputs and inputs, those that no channel runs through."""
    return [d for d in (0, 1) if all(factor.dim != d for factor in parameter.labels)]


def _range(start: int, parameter: Parameter, dim: int) -> Tensor:
    """Entries of their own for every position along a dim."""
    size = parameter.shape[dim]
    return torch.arange(start, start + size).reshape([size if d == dim else 1 for d in range(len(parameter.shape))])


def kernels(module: fx.GraphModule, graph: ChannelGraph) -> tuple[list[tuple[Parameter, float]], tuple[str, ...]]:
    """The weights that can be generated, each with its fan-in, and the names of the others that layers contract.

    A kernel has two or more dims, and some node contracts it and no other: it holds it, is given it, or is given what
    is computed of it without a position more (a part, a transpose, the standardised weight). The fan-in is the number
    of MACs per output of that node.
    """
    macs: dict[str, float] = {}
    for term in graph.terms:
        count = term.constant * math.prod(factor.ids.shape[factor.dim] for factor in term.factors)
        macs[term.node] = macs.get(term.node, 0.0) + count
    constant = constants(module, graph)
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    found: dict[str, tuple[Parameter, float]] = {}
    seen: dict[str, None] = {}
    for node in module.graph.nodes:
        known = node_labels(graph, node)
        if node.name not in macs or node in constant:
            continue
        names = {p.name: p for p in _contracted(module, graph, constant, node) if p.name in trained}
        seen |= dict.fromkeys(names)
        if len(names) == 1 and len(known) == 1:
            for name, parameter in names.items():
                found.setdefault(name, (parameter, macs[node.name] / max(math.prod(known[0].shape), 1)))
    return [*found.values()], tuple(name for name in seen if name not in found)


def classifiers(module: fx.GraphModule, graph: ChannelGraph) -> tuple[str, ...]:
    """The weights ``[classes, channels]`` of linear layers whose outputs the network returns and no layer reads."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    returned = channels_in(
        tuple(
            factor for node in output.all_input_nodes for known in node_labels(graph, node) for factor in known.labels
        )
    )
    last = [g for g in graph.groups if returned.issuperset(g.channels.reshape(-1).tolist())]
    makers = [m.name for g in last if not any(m.read for m in g.members) for m in g.members if m.dim == 0]
    return tuple(name for name in dict.fromkeys(makers) if len(graph.by_name[name].shape) == 2)


def _contracted(
    module: fx.GraphModule, graph: ChannelGraph, constant: set[fx.Node], node: fx.Node
) -> Iterator[Parameter]:
    """The parameters that a contraction holds or is given, see ``kernels``."""
    if node.op == "call_module":
        names = [f"{node.target}.{name}" for name, _ in module.get_submodule(str(node.target)).named_parameters()]
        held = [graph.by_name[name] for name in names if name in graph.by_name]
        yield from (p for p in held if p.labels and len(p.shape) > 1)
    for operand in node.all_input_nodes:
        for known in node_labels(graph, operand) if operand in constant else ():
            for source in _sources(operand):
                parameter = graph.by_name.get(str(source.target))
                if parameter is None or len(parameter.shape) < 2 or not parameter.labels:
                    continue
                smaller = math.prod(known.shape) <= math.prod(parameter.shape) and len(known.shape) > 1
                if smaller and channels_in(known.labels) <= channels_in(parameter.labels):
                    yield parameter


def _sources(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers that a constant is computed of."""
    return [n for n in upstream([node]) if n.op == "get_attr"]


def _rewire(module: fx.GraphModule, bank: Hypernetworks) -> None:
    """Every use of a generated weight is a use of the node that generates it, once; the parameters are gone."""
    module.add_submodule(_BANK, bank)
    parts = {name: key for key, part in bank.named_children() if isinstance(part, Hypernetwork) for name in part.names}
    made: dict[str, fx.Node] = {}

    def made_before(node: fx.Node, name: str) -> fx.Node:
        with module.graph.inserting_before(node):
            if not made:
                made[""] = module.graph.get_attr(f"{_BANK}.latents")
            if parts[name] not in made:
                made[parts[name]] = module.graph.call_module(f"{_BANK}.{parts[name]}", (made[""],))
        return made[parts[name]]

    layers: dict[str, str] = {}
    for node in [*module.graph.nodes]:
        if node.op == "get_attr" and str(node.target) in parts:
            node.replace_all_uses_with(made_before(node, str(node.target)))
            module.graph.erase_node(node)
        elif node.op == "call_module":
            path = str(node.target)
            layer = module.get_submodule(path)
            names = [n for n, _ in layer.named_parameters(remove_duplicate=False) if f"{path}.{n}" in parts]
            if not names:
                continue
            if path not in layers:
                layers[path] = f"layer_{len(layers)}"
                bank.add_module(layers[path], Given(layer, names))
            node.args = ([made_before(node, f"{path}.{n}") for n in names], *node.args)
            node.target = f"{_BANK}.{layers[path]}"
    for name in parts:
        path, _, last = name.rpartition(".")
        module.get_submodule(path)._parameters.pop(last, None)
    module.graph.lint()
    module.recompile()
