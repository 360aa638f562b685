"""A recorded graph, run node by node, stopping wherever somebody wants to look, and going on from there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, fx

from fxprune.groups import ValueInterpreter, placeholder_values
from fxprune.recording.guards import is_guard
from fxprune.recording.inputs import map_tensors, tensors_of
from fxprune.recording.shards import gathered, is_sharded
from fxprune.recording.upstream import upstream

Env = dict[fx.Node, Any]


class Lane:
    """The nodes of a graph in the order in which they run; a *position* is a place between two of them.

    What is computed of parameters alone is no part of this order: it is computed once, and again after ``forget``,
    since parameters change. Where parameters are shares of several processes, it is computed for every node anew.
    """

    def __init__(self, module: fx.GraphModule):
        self.module = module
        self._interpreter = ValueInterpreter(module)
        self._interpreter.extra_traceback = False
        self._gathers = is_sharded(module)
        self._constant: dict[fx.Node, int] = {}
        for node in module.graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (node.op != "output" and inputs and all(i in self._constant for i in inputs)):
                self._constant[node] = len(self._constant)
        running = [n for n in module.graph.nodes if n not in self._constant]
        self.nodes: list[fx.Node] = [n for n in running if n.op not in ("placeholder", "output")]
        self.position = {node: place for place, node in enumerate(self.nodes)}
        self.named = {node.name: node for node in self.nodes}
        (self._output,) = (n for n in running if n.op == "output")
        self._values: Env = {}
        self._over: dict[int, list[fx.Node]] = {}
        for node in running:
            users = [self.position.get(user, len(self.nodes)) for user in node.users]
            self._over.setdefault(max(users, default=self.position.get(node, 0)), []).append(node)

    def begin(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Env:
        """The values before the first node. Tensors are copies, which the graph may write to."""
        nodes = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        args, kwargs = map_tensors(Tensor.clone, (tuple(args), dict(kwargs)))
        return dict(zip(nodes, placeholder_values(self.module, args, kwargs), strict=True))

    def advance(
        self, env: Env, start: int, stop: int, mode: Any = None, after: Callable[[fx.Node, Env], None] | None = None
    ) -> None:
        """Run the nodes from ``start`` to before ``stop``; values that no later node needs leave ``env``.

        ``mode``: around every node, but not around what is computed of parameters alone. ``after``: called after every
        node, while its inputs are still there.
        """
        for place in range(start, stop):
            node = self.nodes[place]
            env[node] = self.value(node, env, mode)
            if after is not None:
                after(node, env)
            for done in self._over.get(place, ()):
                env.pop(done, None)

    def value(self, node: fx.Node, env: Env, mode: Any = None) -> Any:
        """What the node computes of the values in ``env``."""
        self.prepare(node)
        interpreter, borrowed = self._interpreter, []
        for source in node.all_input_nodes:
            if source in self._constant:
                env[source] = self._values[source]
                borrowed.append(source)
        interpreter.env = env
        try:
            return self._run(node, mode)
        finally:
            interpreter.env = {}
            for source in borrowed:
                del env[source]
            if self._gathers:
                self.forget()

    def _run(self, node: fx.Node, mode: Any) -> Any:
        """``mode`` does not see how parameters are gathered."""
        layer = self._interpreter.fetch_attr(str(node.target)) if node.op == "call_module" else None
        mode = None if node.op == "get_attr" else mode
        with nullcontext() if layer is None else gathered(layer), nullcontext() if mode is None else mode:
            return self._interpreter.run_node(node)

    def prepare(self, node: fx.Node, mode: Any = None) -> None:
        """Compute what depends on parameters alone, unless that is known; of shares only what ``node`` needs."""
        if not self._values and self._constant:
            self._interpreter.env = self._values
            for constant in self._needed(node) if self._gathers else self._constant:
                self._values[constant] = self._run(constant, mode)
            self._interpreter.env = {}

    def _needed(self, node: fx.Node) -> list[fx.Node]:
        _, *found = upstream([node], lambda n: [i for i in n.all_input_nodes if i in self._constant])
        return sorted(found, key=self._constant.__getitem__)

    def output(self, env: Env) -> Any:
        """What the graph returns, after its last node."""
        self.prepare(self._output)
        return fx.map_arg(self._output.args[0], lambda n: env[n] if n in env else self._values[n])

    def forget(self) -> None:
        """Parameters have changed."""
        self._values.clear()

    def path(self, node: fx.Node) -> Iterable[fx.Node]:
        """The nodes after this one, as long as each is all that the one before is used for."""
        while len(node.users) == 1:
            (node,) = node.users
            if node.op == "output" or is_guard(node):
                return
            yield node


def size_of(env: Env) -> int:
    """Bytes of all tensors, memory that several share once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(list(env.values()))}
    return sum(storages.values())


def copied(env: Env, deeply: bool) -> Env:
    """The same values. ``deeply``: in memory of their own, shared among each other as before."""
    if not deeply:
        return dict(env)
    memo: dict[int, Any] = {}
    return {node: copy.deepcopy(value, memo) for node, value in env.items()}
