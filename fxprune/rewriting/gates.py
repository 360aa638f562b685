"""Gates in the graph: every path from where a channel is made to where it is read passes its gate exactly once.

A gate comes after the last node of its path that holds parameters of the channel itself, so that a gate at zero leaves
no shift behind. Where one result goes both through such a node and past it, the edge past it is gated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from fxprune.groups.channels import ChannelGraph, ChannelGroup
from fxprune.groups.flow import ADDED, Channels, Flow, flows, node_labels
from fxprune.labels.records import TensorLabels
from fxprune.methods.learner import Gates
from fxprune.recording.module import widest_dtype

_BANK = f"{ADDED}gates"
_NONE: Channels = frozenset()


class GateBank(nn.Module):
    """All gates of a network in one parameter ``values [gates]``."""

    def __init__(self, count: int, dtype: torch.dtype):
        super().__init__()
        self.values = nn.Parameter(torch.ones(count, dtype=dtype))


class Gate(nn.Module):
    """``x * gate`` for one tensor; ``index`` has the tensor's dims, size 1 where gates do not vary."""

    def __init__(self, bank: GateBank, index: Sequence[Tensor]):
        super().__init__()
        self._bank = [bank]  # not a child: its parameter has one name
        self._places = len(index)
        for place, ids in enumerate(index):
            self.register_buffer(f"index_{place}", ids, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        values = nn.functional.pad(self._bank[0].values, (0, 1), value=1.0)  # the last one: channels without a gate
        for place in range(self._places):
            x = x * values[getattr(self, f"index_{place}")].to(x.dtype)
        return x


def insert_gates(module: fx.GraphModule, graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> Gates:
    """Put gates for ``groups`` into ``module``, in place."""
    index, position = {}, torch.zeros(graph.channel_count, dtype=torch.int64)
    count = 0
    for group in groups:
        index[group.name] = torch.arange(count, count + group.channels.size).reshape(group.channels.shape)
        position[torch.from_numpy(group.channels)] = index[group.name]
        count += group.channels.size
    bank = GateBank(count, widest_dtype(module))
    module.add_submodule(_BANK, bank)
    steps = flows(module, graph)
    ahead = _holders_ahead(steps)
    gated = frozenset(c for group in groups for c in group.channels.reshape(-1).tolist())
    several = {node for node in steps if len(node_labels(graph, node)) > 1}  # their parts are gated instead
    waiting: dict[fx.Node, Channels] = {}
    sites = 0
    for node, step in steps.items():
        late = _NONE.union(*(waiting.get(source, _NONE) & step.passes for source in step.inputs))
        for source, channels in step.inputs.items():
            # What a later node holds on another path from here was not gated before; on this path it is now.
            here = channels & ahead.get(source, _NONE) & gated - step.holds
            here = (here & step.reads) | (here & step.passes - ahead[node])
            if here and source in several:
                late |= here & step.passes
            elif here:
                with module.graph.inserting_before(node):
                    gate = _gate(module, graph, bank, position, source, sites, here)
                node.replace_input_with(source, gate)
                sites += 1
        here = ((step.makes | step.holds) & gated - ahead[node]) | late
        if here and node in several:
            waiting[node] = here
        elif here:
            users = list(node.users)
            with module.graph.inserting_after(node):
                gate = _gate(module, graph, bank, position, node, sites, here)
            for user in users:
                user.replace_input_with(node, gate)
            sites += 1
    module.graph.lint()
    module.recompile()
    return Gates(bank.values, index)


def _holders_ahead(steps: Mapping[fx.Node, Flow]) -> dict[fx.Node, Channels]:
    """The channels that a later node passes on and holds parameters for."""
    ahead: dict[fx.Node, Channels] = {}
    for node in reversed([*steps]):
        users = [(u, steps[u]) for u in node.users if u in steps]
        held = [flow.inputs[node] & flow.passes & (flow.holds | ahead[user]) for user, flow in users]
        ahead[node] = _NONE.union(*held)
    return ahead


def _gate(
    module: fx.GraphModule,
    graph: ChannelGraph,
    bank: GateBank,
    position: Tensor,
    node: fx.Node,
    number: int,
    only: Channels,
) -> fx.Node:
    """A gate on the result of ``node``, of the channels ``only``, placed where the graph's insert point is."""
    known = node_labels(graph, node)
    assert len(known) == 1, f"{node.name} computes several tensors"
    name = f"{_BANK}_{number}"
    module.add_submodule(name, Gate(bank, list(_indices(known[0], position, len(bank.values), only))))
    return module.graph.call_module(name, (node,))


def _indices(known: TensorLabels, position: Tensor, none: int, only: Channels) -> list[Tensor]:
    allowed = torch.zeros(len(position), dtype=torch.bool)
    allowed[sorted(only)] = True
    position = torch.where(allowed, position, none)
    indices = [position[factor.tensor()] for factor in known.labels]
    return [ids for ids in indices if bool((ids != none).any())]
