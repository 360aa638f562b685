"""Dead code elimination that knows about in-place writes.

``Graph.eliminate_dead_code`` sees data dependencies only, so it drops ``x[..., 0] = y``: nothing takes its result.
Here a node that writes in place is alive as long as the storage it writes to is: that of an alive node, of a
parameter, a buffer or an input.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch.fx import Graph, Node

IDLE = "idle"
"""Key in ``Node.meta``: a layer reads the node's tensor, and nothing came of that, so the graph does not have it."""


def eliminate_dead_nodes(
    graph: Graph,
    storages: Mapping[Node, frozenset[int]],
    writes: Mapping[Node, frozenset[int]],
    lasting: frozenset[int],
    regions: Sequence[tuple[Node, Node]] = (),
    wanted: Collection[Node] = (),
    joined: Mapping[int, frozenset[int]] | None = None,
) -> None:
    """Erase what neither the output nor anything outlasting the call depends on.

    ``storages``: the storages of a node's results. ``writes``: those it writes to. ``lasting``: those that outlive
    the call. ``regions``: pairs of nodes that open and close a context; they stay if a node between them does.
    ``wanted``: nodes that stay for what they do: guards. ``joined``: storages that may be others, too.
    """
    alive: set[Node] = set()
    reachable = set(lasting)
    pending = [node for node in graph.nodes if node.op in ("output", "placeholder") or node in wanted]
    while pending:
        _visit(pending, alive, reachable, storages)
        _join(reachable, joined or {})
        pending = [node for node, written in writes.items() if node not in alive and written & reachable]
    position = {node: index for index, node in enumerate(graph.nodes)}
    kept = sorted(position[node] for node in alive)
    for enter, leave in regions:
        if any(position[enter] < index < position[leave] for index in kept):
            alive |= {enter, leave}
    _mark_idle_reads(graph, alive)
    for node in reversed(list(graph.nodes)):
        if node not in alive:
            graph.erase_node(node)


def _join(reachable: set[int], joined: Mapping[int, frozenset[int]]) -> None:
    pending = [storage for storage in reachable if storage in joined]
    while pending:
        new = joined[pending.pop()] - reachable
        reachable |= new
        pending += new


def _mark_idle_reads(graph: Graph, alive: set[Node]) -> None:
    """Tell of every node that stays whether a layer among those that go reads it, with others that go in between."""
    seen: set[Node] = set()
    for start in graph.nodes:
        pending = [start] if start.op in ("call_module", "get_attr") else []
        while pending:
            node = pending.pop()
            if node in alive or node in seen:
                continue
            seen.add(node)
            for each in node.all_input_nodes:
                if each in alive:
                    each.meta[IDLE] = True
            pending += [*node.all_input_nodes, *node.users]


def _visit(pending: list[Node], alive: set[Node], reachable: set[int], storages: Mapping[Node, frozenset[int]]) -> None:
    while pending:
        node = pending.pop()
        if node in alive:
            continue
        alive.add(node)
        reachable |= storages.get(node, frozenset())
        pending.extend(node.all_input_nodes)
