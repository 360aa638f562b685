"""From the recorded graph and a plan to the smaller graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.ops.repair import new_constant
from fxprune.recording import RecordedModule, clone_modules
from fxprune.rewriting.literals import REPAIRED, Literals
from fxprune.rewriting.selections import as_index_select, renumber
from fxprune.rewriting.slicing import CUTS_KEY, Cuts, Uncut, stand_ins


@dataclass(frozen=True)
class Draft:
    """A rewritten module that holds no weights yet: it can be checked before anything is copied."""

    module: RecordedModule
    uncut: Uncut

    def finished(self, consume: bool = False) -> RecordedModule:
        """With its weights. ``consume``: those of the dense module are emptied one by one as they are cut."""
        self.uncut.fill(self.module, consume)
        as_index_select(self.module)
        return self.module


def draft(graph_module: fx.GraphModule, graph: ChannelGraph, keep: Keep, numbers: Mapping[str, Any]) -> Draft:
    """A new module without the channels that go; the given one is not changed and shares nothing with it.

    Its weights are not cut yet: float parameters and buffers are on meta. Nodes that say something else than the
    model's code are marked in their ``meta`` as ``REPAIRED``. The module's own ``meta`` holds the ``Cuts``, for tensors
    that must follow the parameters.

    Args:
        graph_module: as recorded.
        graph: of ``graph_module``.
        keep: per channel.
        numbers: of the dense graph's run with another batch size (see ``MetaRun``), to tell sizes that depend on it.

    Raises:
        UnrepairableError: a node's arguments cannot follow the plan.
    """
    root, code = clone_modules(graph_module), copy.deepcopy(graph_module.graph)
    cuts = Cuts.of(graph, keep)
    uncut = stand_ins(root, cuts)
    renumber(root, code, graph, keep)
    device = next((p.device for p in graph_module.parameters() if not p.is_meta), torch.device("cpu"))
    _gather(root, code, graph, keep, device)
    Literals(root, code, graph.nodes, keep, numbers, device).run()
    result = RecordedModule(root, code, type(graph_module).__name__)
    result.meta = {**graph_module.meta, CUTS_KEY: cuts}
    return Draft(result, uncut)


def _gather(module: nn.Module, code: fx.Graph, graph: ChannelGraph, keep: Keep, device: torch.device) -> None:
    """Replace movements that interleave blocks by one ``index_select`` each, where channels of them go.

    The index is the dense permutation; like every constant index it is cut by its repair. It lies on ``device``, since
    it needs values.
    """
    nodes = {n.name: n for n in code.nodes}
    for gather in graph.gathers:
        rows = {f.dim: f.rows()[0] for f in graph.nodes[gather.input].labels}[gather.dim]
        if keep[rows].all():
            continue
        node = nodes[gather.output]
        chain = node.all_input_nodes
        index = new_constant(module, "gather", torch.tensor(gather.permutation, device=device), node)
        node.op, node.target = "call_function", torch.index_select
        node.args, node.kwargs = (nodes[gather.input], gather.dim, index), {}
        node.meta[REPAIRED] = True
        while chain and not chain[0].users and chain[0].op != "placeholder":
            following = chain[0].all_input_nodes
            code.erase_node(chain[0])
            chain = following
