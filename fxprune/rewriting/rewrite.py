"""From the recorded graph and a plan to the smaller graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.groups import ValueInterpreter, placeholder_values
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.ops.meta import MetaKernels, OpMode, tensors_in
from fxprune.ops.repair import new_constant
from fxprune.recording import RecordedModule, clone_modules, put_in_eval_mode, replace_tensors
from fxprune.recording.guards import NUMBER, holds, is_guard
from fxprune.recording.inputs import map_leaves, tensors_of
from fxprune.recording.randomness import drawn, draws
from fxprune.rewriting.literals import REPAIRED, Literals
from fxprune.rewriting.slicing import CUTS_KEY, Cuts, Uncut, stand_ins


@dataclass(frozen=True)
class Draft:
    """A rewritten module that holds no weights yet: it can be checked before anything is copied."""

    module: RecordedModule
    uncut: Uncut

    def finished(self, consume: bool = False) -> RecordedModule:
        """With its weights. ``consume``: those of the dense module are emptied one by one as they are cut."""
        self.uncut.fill(self.module, consume)
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


@dataclass(frozen=True)
class MetaRun:
    """A run without data. ``numbers``: the values of nodes that hold no tensor. ``shapes``: of the outputs.

    ``failed``: the node that did not run, or None.
    """

    numbers: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    failed: fx.Node | None


class _OnMeta(OpMode):
    """Ops on meta tensors take the fast way."""

    def __init__(self) -> None:
        super().__init__()
        self._kernels = MetaKernels()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws(func, args, kwargs) and not any(t.is_meta for t in tensors_in((args, kwargs))):
            return drawn(func, args, kwargs, 0)  # real numbers, but nobody's generator moves
        return self._kernels(func, args, kwargs)


def run_on_meta(graph_module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> MetaRun:
    """Run a graph in eval mode on inputs of these shapes, parameters and all on the meta device."""
    shadow = clone_modules(graph_module)
    put_in_eval_mode(shadow)
    replace_tensors(shadow, lambda t: t if t.is_meta else torch.empty_like(t, device="meta"))
    numbers: dict[str, Any] = {}
    current: list[fx.Node] = []

    class Record(ValueInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            current[:] = [n]
            if is_guard(n):
                if n.target is holds:
                    numbers[n.name] = tuple(self.fetch_args_kwargs_from_env(n)[0][:3])
                return None
            value = n.meta[NUMBER] if NUMBER in n.meta else super().run_node(n)
            if not tensors_of(value):
                numbers[n.name] = value
            return value

    values = placeholder_values(graph_module, args, kwargs)
    values = [map_leaves(lambda v: v.to("meta") if isinstance(v, Tensor) else v, v) for v in values]
    try:
        with torch.no_grad(), _OnMeta():
            result = Record(shadow, graph=graph_module.graph).run(*values)
    except Exception:  # bound to its example's batch size, or an op without a meta kernel: the caller compares
        return MetaRun(numbers, (), current[0] if current else None)
    shapes = tuple(tuple(t.shape) for t in tensors_of(result))
    return MetaRun(numbers, shapes, None)
