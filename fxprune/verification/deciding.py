"""Which functions of the model decide on what its layers computed, so that a graph of what they did is of no use."""

from __future__ import annotations

import copy
from collections.abc import Set
from typing import Any

import torch
from torch import fx

from fxprune.groups import ValueInterpreter, placeholder_values
from fxprune.recording import RecordedModule, evaluated, guards
from fxprune.recording.inputs import map_tensors
from fxprune.recording.leaf_functions import FUNCTIONS
from fxprune.recording.randomness import repeatable
from fxprune.rewriting import is_equal
from fxprune.verification.oracle import Inputs


def deciding(module: RecordedModule, leaves: Set[str], example: Inputs, other: Inputs) -> frozenset[str]:
    """The innermost functions, beside ``leaves``, that compare what layers computed, and what other inputs change.

    A size that comes after a choice, and that nobody knows without running, is compared as well, but does not change.
    """
    layers = _layers(module)
    asking = {
        guard.name: [name for name in guard.meta.get(FUNCTIONS, ()) if name not in leaves]
        for guard in guards.guards_of(module.graph)
        if _has_a_part(layers, guard)
    }
    if not any(asking.values()):
        return frozenset()
    one, two = _compared(module, example), _compared(module, other)
    changed = [name for name in one.keys() & two.keys() if not is_equal(one[name], two[name])]
    return frozenset(asking[name][0] for name in changed if asking.get(name))


def _layers(module: RecordedModule) -> set[fx.Node]:
    """The nodes that bring parameters in."""
    weights = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {
        node
        for node in module.graph.nodes
        if (node.op == "get_attr" and node.target in weights)
        or (node.op == "call_module" and any(True for _ in module.get_submodule(str(node.target)).parameters()))
    }


def _has_a_part(sources: Set[fx.Node], node: fx.Node) -> bool:
    """Whether what a node gives comes from one of these, among others."""
    pending, seen = [node], {node}
    while pending:
        each = pending.pop()
        if each in sources:
            return True
        pending += [n for n in each.all_input_nodes if n not in seen]
        seen.update(each.all_input_nodes)
    return False


def _compared(module: RecordedModule, inputs: Inputs) -> dict[str, Any]:
    """What guards compare, by name, whether they hold or not: up to where the graph cannot go on."""
    own = copy.deepcopy(module) if module.meta["writes"] else module  # the weights are the caller's
    run = _Unguarded(own)
    args, kwargs = map_tensors(lambda t: t.detach().clone(), (tuple(inputs[0]), dict(inputs[1])))
    with evaluated(own), repeatable(), torch.no_grad():
        try:
            run.run(*placeholder_values(own, args, kwargs))
        except Exception:  # another way would have been right
            return run.numbers
    return run.numbers


class _Unguarded(ValueInterpreter):
    """Guards keep what they were given, and let everything pass."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.numbers: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if not guards.is_guard(n):
            return super().run_node(n)
        if n.target is guards.holds:
            self.numbers[n.name] = self.fetch_args_kwargs_from_env(n)[0][0]
        return None
