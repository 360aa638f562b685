"""What nodes of a graph are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch.fx import Node


def _inputs(node: Node) -> Iterable[Node]:
    return node.all_input_nodes


def upstream(nodes: Iterable[Node], before: Callable[[Node], Iterable[Node]] = _inputs) -> Iterator[Node]:
    """These, then those that they are computed from, every one once and the nearest first.

    ``before``: where to go on from a node, if not to all of its inputs.
    """
    level = list(dict.fromkeys(nodes))
    seen = set(level)
    while level:
        yield from level
        level = list(dict.fromkeys(n for node in level for n in before(node) if n not in seen))
        seen.update(level)
