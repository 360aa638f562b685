"""Which functions of the model decide on what its layers computed, so that a graph of what they did is of no use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxprune.errors import FxpruneError, ModelError
from fxprune.groups import ValueInterpreter, placeholder_values
from fxprune.groups.channels import ChannelGraph
from fxprune.recording import Options, RecordedModule, evaluated, guards
from fxprune.recording.inputs import describe_inputs, device_of, make_inputs, map_tensors
from fxprune.recording.leaf_functions import FUNCTIONS, LeafFunction, form_of
from fxprune.recording.randomness import repeatable
from fxprune.recording.upstream import upstream
from fxprune.rewriting import is_equal
from fxprune.verification.oracle import Inputs
from fxprune.verification.sizes import SizeRuns

_RECORDINGS = 8  # every one shows the next functions that decide
_OTHERS = 8  # one alone is often decided on like the example: of two ways, every second time


def with_leaf_functions(
    module: RecordedModule,
    options: Options,
    again: Callable[[Options], RecordedModule],
    analysed: Callable[[RecordedModule], ChannelGraph],
    runs: SizeRuns,
    example: Inputs,
) -> tuple[RecordedModule, Options]:
    """The recording, or one that calls such functions, where that locks no more channels; and how it was recorded.

    A function that cannot be called so, or that leaves the decision to what called it, is followed by its caller.

    Args:
        module: a recording of the model.
        options: that it was made with.
        again: makes another one.
        analysed: gives the channels of a recording.
        runs: of ``module``.
        example: the inputs that it was recorded with.
    """
    found, others = (module, options), list[Inputs]()
    for _ in range(_RECORDINGS):
        asking = _asking(module, options.leaf_functions, runs)
        if not asking:
            break
        others = others or _others(module, example)
        names = _deciding(module, asking, example, others)
        if not names:
            break
        options = replace(options, leaf_functions=options.leaf_functions | names)
        try:
            module = again(options)
        except FxpruneError:
            break
        if _locks_more(module, found[0], analysed):
            break
        runs = SizeRuns(module, *example)
        found = module, options
    return found


def _others(module: RecordedModule, example: Inputs) -> list[Inputs]:
    """Inputs of the example's sizes."""
    record, device = describe_inputs(tuple(example[0]), dict(example[1])), device_of(module)
    return [make_inputs(record, device, seed=seed, permute=False) for seed in range(1, 1 + _OTHERS)]


def _asking(module: RecordedModule, leaves: Set[str], runs: SizeRuns) -> dict[str, list[str]]:
    """Of guards on what layers computed the functions that were running, innermost first, beside ``leaves``.

    A leaf asks as well: those that called it, as it may give another number of tensors. Sizes that are known without
    values are none of these.
    """
    deciding = [n for n in module.graph.nodes if guards.is_guard(n) or isinstance(n.target, LeafFunction)]
    asking = {node: [name for name in node.meta.get(FUNCTIONS, ()) if name not in leaves] for node in deciding}
    if not any(asking.values()):
        return {}
    layers, numbers = _layers(module), runs({}).numbers
    known = {node for node in deciding if node.name in numbers and guards.is_of_sizes(node)}
    unknown = {node: names for node, names in asking.items() if names and node not in known}
    return {node.name: names for node, names in unknown.items() if not layers.isdisjoint(upstream([node]))}


def _deciding(
    module: RecordedModule, asking: dict[str, list[str]], example: Inputs, others: list[Inputs]
) -> frozenset[str]:
    """The innermost functions of guards that compare another number with other inputs, and of leaves that give others.

    A size that comes after a choice, and that nobody knows without running, is compared as well, but does not change.
    """
    one = _compared(module, example)
    for other in others:
        two = _compared(module, other)
        changed = {name for name in one.keys() & two.keys() if not is_equal(one[name], two[name])}
        names = frozenset(own[0] for name, own in asking.items() if name in changed)
        if names:
            return names
    return frozenset()


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


def _compared(module: RecordedModule, inputs: Inputs) -> dict[str, Any]:
    """What guards compare, by name, and the form of what leaves give, whether they hold or not.

    That is up to where the graph cannot go on.
    """
    own = copy.deepcopy(module) if module.meta["writes"] else module  # the weights are the caller's
    run = _Unguarded(own)
    args, kwargs = map_tensors(lambda t: t.detach().clone(), (tuple(inputs[0]), dict(inputs[1])))
    with evaluated(own), repeatable(), torch.no_grad(), suppress(Exception):  # another way would have been right
        run.run(*placeholder_values(own, args, kwargs))
    return run.numbers


class _Unguarded(ValueInterpreter):
    """Guards keep what they were given, leaves the form of what they give, and let everything pass."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.numbers: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if isinstance(n.target, LeafFunction):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            result = n.target.function(*args, **kwargs)
            self.numbers[n.name] = form_of(result)
            return result
        if not guards.is_guard(n):
            return super().run_node(n)
        if n.target is guards.holds:
            self.numbers[n.name] = self.fetch_args_kwargs_from_env(n)[0][0]
        return None
