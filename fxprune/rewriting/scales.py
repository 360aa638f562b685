"""Attentions whose scale follows from the width of a head: in a class, where it cannot be told, the queries take it up.

Scaled dot product attention divides by the root of the width that its queries have. A pruned graph says the dense
network's scale; a class that leaves it out divides by another root, so its queries have to be larger or smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.groups.shadow import ValueInterpreter, placeholder_values
from fxprune.ops.repair import RESCALED
from fxprune.ops.table import argument
from fxprune.recording import clone_modules, put_in_eval_mode
from fxprune.recording.guards import SIZES
from fxprune.recording.upstream import upstream


def take_up_scales(result: nn.Module, pruned: fx.GraphModule, inputs: tuple[Any, Any]) -> dict[str, Tensor]:
    """Scale what makes the queries in ``result``, which has the weights of ``pruned``; nothing where no scale changed.

    Args:
        result: is changed.
        pruned: the graph that says the scales.
        inputs: that ``pruned`` takes.

    Returns:
        name of a parameter -> what it is now, in double: those that are less precise were rounded.
    """
    makers = {node: _makers(argument(node, 0, "query")) for node in pruned.graph.nodes if RESCALED in node.meta}
    if not makers:
        return {}
    run = _Queries(pruned, makers)
    with torch.inference_mode(False), torch.enable_grad():
        run.run(*placeholder_values(pruned, *inputs))
    exact: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, factor in run.factors.items():
            parameter = result.get_parameter(name)
            exact[name] = parameter.double() * factor.to(parameter.device)
            parameter.copy_(exact[name])
    return exact


class _Queries(ValueInterpreter):
    """Finds the outputs of layers that are parts of queries, by gradients; ``factors``: parameter -> of every entry."""

    def __init__(self, pruned: fx.GraphModule, makers: Mapping[fx.Node, set[str]]):
        shadow = clone_modules(pruned)
        put_in_eval_mode(shadow)
        self._makers = makers
        self._own: dict[str, nn.Parameter] = {}
        watched = set[str]().union(*makers.values())
        named = [*shadow.named_modules(remove_duplicate=False)]
        makes = {id(module) for name, module in named if name in watched}  # which may have other names too
        for module in {id(module): module for _, module in named}.values():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(parameter.detach(), requires_grad=id(module) in makes)
        for name, module in named:
            own = module._parameters.items() if name in watched else ()
            self._own.update((f"{name}.{key}", parameter) for key, parameter in own if parameter is not None)
        self.factors: dict[str, Tensor] = {}
        super().__init__(shadow, graph=pruned.graph)

    def run_node(self, n: fx.Node) -> Any:
        if n in self._makers:
            query = fx.map_arg(argument(n, 0, "query"), lambda node: self.env[node])
            own = {k: p for k, p in self._own.items() if k.rpartition(".")[0] in self._makers[n]}
            weights = torch.randn(query.shape, generator=torch.Generator().manual_seed(0)).to(query)
            given: Any = {"allow_unused": True, "retain_graph": True}
            told = own and query.requires_grad
            found = torch.autograd.grad(query, [*own.values()], weights, **given) if told else [None] * len(own)
            for (name, parameter), gradient in zip(own.items(), found, strict=True):
                if gradient is not None:
                    moves = gradient.flatten(1).abs().amax(1) > 0 if gradient.ndim > 1 else gradient != 0
                    moves = moves.reshape(-1, *[1] * (parameter.ndim - 1))
                    before = self.factors.get(name, torch.ones(moves.shape, dtype=torch.double))
                    self.factors[name] = torch.where(moves.cpu(), n.meta[RESCALED], before)  # of every call the same
        value = super().run_node(n)
        return value.detach() if n in self._makers else value


def _makers(value: fx.Node) -> set[str]:
    """The layers with parameters that are nearest before a node, on all ways to it."""
    found = upstream([value], lambda n: [] if _makes(n) else [i for i in n.all_input_nodes if i.target not in SIZES])
    return {str(node.target) for node in found if _makes(node)}


def _makes(node: fx.Node) -> bool:
    if node.op != "call_module" or (root := node.graph.owning_module) is None:
        return False
    return any(True for _ in root.get_submodule(str(node.target)).parameters())
