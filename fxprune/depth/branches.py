"""Residual branches: what is added to a stream that is there without it.

A branch is an operand of a sum that is used for nothing else. Without it the result is the other operand, the stream.
That must have the sum's shape and type, and must be what the branch is computed from, or made of all that the branch is
made of: so nothing of the inputs is lost with a branch but what it adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Products
from fxprune.groups.flow import constants
from fxprune.labels.classes import Reason
from fxprune.labels.records import TensorLabels
from fxprune.ops.table import base_name
from fxprune.recording.guards import is_guard, is_of_sizes
from fxprune.recording.upstream import upstream

_SUMS = {"add", "add_", "iadd"}
_DIFFERENCES = {"sub", "sub_", "isub", "subtract", "subtract_"}


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    ``name``: of the part of the model that its weights are in. ``sum``: the node that adds it, ``place``: as which
    operand. ``macs``: of all that is computed for it alone. ``source``: the line of the sum.
    """

    name: str
    sum: str
    place: int
    macs: int
    source: str


def branches_of(
    module: fx.GraphModule, graph: ChannelGraph, same_shape: Callable[[fx.Node, fx.Node], bool]
) -> tuple[tuple[Branch, ...], Mapping[str, Reason]]:
    """The branches of a recorded model in graph order; and of what is added, but has to stay, why: by name.

    Args:
        module: as recorded.
        graph: its channels.
        same_shape: whether two nodes give tensors of one shape on inputs of another size, too.
    """
    fixed, contractions = constants(module, graph), {term.node for term in graph.terms}
    found: list[tuple[str, Branch]] = []
    refused: dict[str, Reason] = {}
    for node in module.graph.nodes:
        source = str(node.meta.get("source", ""))
        here: list[tuple[str, Branch]] = []
        for place in _operands(node):
            operand, stream = node.args[place], node.args[1 - place]
            inside = computed_for(node, operand) if operand not in fixed else set()
            weights = _weights(inside, fixed, contractions)
            if not weights:
                continue
            name = _prefix(weights)
            why = _obstacle(node, place, inside, fixed, graph) if isinstance(stream, fx.Node) else "added to a number"
            if not why and not same_shape(node, stream):
                why = "what it is added to is of the sum's shape on the example inputs only"
            if why:
                refused.setdefault(name, Reason(why, source))
            else:
                here.append((name, Branch(name, node.name, place, _macs(inside, graph), source)))
        found += sorted(here, key=lambda each: -each[1].macs)[:1]  # of a projection and what it is added to
    counts, taken = Counter(name for name, _ in found), Counter[str]()
    result = []
    for name, branch in found:
        taken[name] += 1
        numbered = f"{name}#{taken[name]}" if counts[name] > 1 else name
        result.append(Branch(numbered, branch.sum, branch.place, branch.macs, branch.source))
    names = {name for name, _ in found}
    return tuple(result), {name: why for name, why in refused.items() if name not in names}


def computed_for(user: fx.Node, operand: fx.Node) -> set[fx.Node]:
    """The nodes of which nothing but ``operand`` of ``user`` is computed; guards on their sizes count for nothing."""
    loose = _loose(user.graph)
    stays: set[fx.Node] = set()
    while True:
        inside: set[fx.Node] = set()
        for node in reversed(user.graph.nodes):
            if node in stays or node.op in ("placeholder", "output"):
                continue
            users = [u for u in node.users if u not in loose]
            if users == [user] if node is operand else users and inside.issuperset(users):
                inside.add(node)
        # what writes to a tensor that stays has to stay itself
        writers = {n for n in inside if "mutates" in n.meta and not inside.issuperset(_written(n))}
        if not writers:
            return inside
        stays |= writers


def _loose(graph: fx.Graph) -> set[fx.Node]:
    """Guards on sizes, and what is computed for them alone."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if (is_guard(node) and is_of_sizes(node)) or (node.users and found.issuperset(node.users)):
            found.add(node)
    return found


def _written(node: fx.Node) -> Sequence[fx.Node]:
    return [a for a in node.args[:1] if isinstance(a, fx.Node)]


def _operands(node: fx.Node) -> Sequence[int]:
    """Which operands may be branches."""
    if node.op not in ("call_function", "call_method") or len(node.args) != 2:
        return ()
    name = base_name(node)
    scaled = node.kwargs.get("alpha", 1) != 1  # the second operand is
    if set(node.kwargs) - {"alpha"}:
        return ()
    places = (0, 1) if name in _SUMS and not scaled else (1,) if name in _SUMS | _DIFFERENCES else ()
    return [place for place in places if isinstance(node.args[place], fx.Node) and node.args[0] is not node.args[1]]


def _obstacle(node: fx.Node, place: int, inside: set[fx.Node], fixed: Collection[fx.Node], graph: ChannelGraph) -> str:
    """Why an operand has to stay, or ""."""
    stream = node.args[1 - place]
    assert isinstance(stream, fx.Node)
    known, result = graph.nodes.get(stream.name), graph.nodes.get(node.name)
    if not isinstance(known, TensorLabels) or not isinstance(result, TensorLabels):
        return "what it is added to is not known"
    if (known.shape, known.dtype) != (result.shape, result.dtype):
        return f"what it is added to has the shape {list(known.shape)}, and the sum {list(result.shape)}"
    read = {i for n in inside for i in n.all_input_nodes if i not in inside and i not in fixed}
    data = {i for i in read if isinstance(graph.nodes.get(i.name), TensorLabels)}
    if stream in data:
        return ""
    if not data:
        return "it is computed from no input"
    return "" if data.issubset(upstream([stream])) else "it brings what the other operand does not hold"


def _weights(inside: Collection[fx.Node], fixed: Collection[fx.Node], contractions: Collection[str]) -> list[str]:
    """The modules of the weights that are contracted with inside."""
    found: list[str] = []
    for node in inside:
        if node.name in contractions and node.op == "call_module":
            found.append(str(node.target))
        elif node.name in contractions:
            tensors = upstream(i for i in node.all_input_nodes if i in fixed)
            found += [str(n.target).rpartition(".")[0] for n in tensors if n.op == "get_attr"]
    return [path for path in found if path]


def _prefix(paths: Sequence[str]) -> str:
    """The longest path that all of these are in."""
    parts = [path.split(".") for path in paths]
    common = 0
    while all(len(p) > common for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return ".".join(parts[0][:common]) or min(paths)


def _macs(inside: Collection[fx.Node], graph: ChannelGraph) -> int:
    names = {node.name for node in inside}
    return Products([(t.constant, t.factors) for t in graph.terms if t.node in names])(graph.everything())
