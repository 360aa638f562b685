"""Which functions of the model decide on what its layers computed, so that a graph of what they did is of no use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxprune.errors import FxpruneError, ModelError
from fxprune.groups import ValueInterpreter, placeholder_values
from fxprune.groups.channels import ChannelGraph
from fxprune.recording import Options, RecordedModule, evaluated, guards
from fxprune.recording.inputs import describe_inputs, device_of, make_inputs, map_tensors
from fxprune.recording.leaf_functions import FUNCTIONS
from fxprune.recording.randomness import repeatable
from fxprune.rewriting import is_equal
from fxprune.verification.oracle import Inputs

_RECORDINGS = 8  # every one shows the next functions that decide


def with_leaf_functions(
    module: RecordedModule,
    options: Options,
    again: Callable[[Options], RecordedModule],
    analysed: Callable[[RecordedModule], ChannelGraph],
    example: Inputs,
) -> tuple[RecordedModule, Options]:
    """The recording, or one that calls such functions, where that locks no more channels; and how it was recorded.

    A function that cannot be called so, or that leaves the decision to what called it, is followed by its caller.

    Args:
        module: a recording of the model.
        options: that it was made with.
        again: makes another one.
        analysed: gives the channels of a recording.
        example: the inputs that it was recorded with.
    """
    found, other = (module, options), None
    for _ in range(_RECORDINGS):
        asking = _asking(module, options.leaf_functions)
        if not any(asking.values()):
            break
        other = other or make_inputs(
            describe_inputs(tuple(example[0]), dict(example[1])), device_of(module), seed=1, permute=False
        )
        changed = _changed(module, example, other)
        names = frozenset(own[0] for guard, own in asking.items() if own and guard in changed)
        if not names:
            break
        options = replace(options, leaf_functions=options.leaf_functions | names)
        try:
            module = again(options)
        except FxpruneError:
            break
        if _locks_more(module, found[0], analysed):
            break
        found = module, options
    return found


def _asking(module: RecordedModule, leaves: Set[str]) -> dict[str, list[str]]:
    """Of guards on what layers computed the functions that were running, innermost first, beside ``leaves``."""
    layers = _layers(module)
    return {
        guard.name: [name for name in guard.meta.get(FUNCTIONS, ()) if name not in leaves]
        for guard in guards.guards_of(module.graph)
        if _has_a_part(layers, guard)
    }


def _changed(module: RecordedModule, example: Inputs, other: Inputs) -> set[str]:
    """The guards that compare another number with the other inputs.

    A size that comes after a choice, and that nobody knows without running, is compared as well, but does not change.
    """
    one, two = _compared(module, example), _compared(module, other)
    return {name for name in one.keys() & two.keys() if not is_equal(one[name], two[name])}


def _locks_more(module: RecordedModule, before: RecordedModule, analysed: Callable[..., ChannelGraph]) -> bool:
    """Whether fewer channels can be cut than before."""
    try:
        free = _free(analysed(before))
    except ModelError:
        return False
    try:
        return _free(analysed(module)) < free
    except ModelError:
        return True


def _free(graph: ChannelGraph) -> int:
    return sum(group.channels.size for group in graph.prunable)


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
