"""Literals that a branch on ``self.training`` decides, as ``dropout_p=self.p if self.training else 0.0``.

Python takes the branch, so a run in eval mode shows one side of it. A second run, in which the modules say that they
train, shows the other: where both make the same calls and only literals differ, the graph chooses between these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from fxprune.recording.module import TRAINING_FLAG
from fxprune.recording.writer import GraphWriter

BRANCH = "a branch on self.training was recorded as it goes in eval mode"

_LITERALS = (bool, int, float, str, type(None))


def either(training: bool, then: Any, otherwise: Any) -> Any:
    """``then if training else otherwise``."""
    return then if training else otherwise


Run = Callable[[frozenset[str]], "GraphWriter | None"]
"""Records the model where these modules say that they train."""


def follow_training(writer: GraphWriter, run: Run) -> None:
    """Have the graph choose as its modules say, if literals are all that is otherwise where they say that they train.

    Then the notes of such branches go, and those of what only the second run did come in. A literal is taken to follow
    the flag that was last branched on before its node; where these are several, a run in which every other of them
    trains has to bear that out.
    """
    paths = list(dict.fromkeys(writer.branches))
    other = run(frozenset(paths))
    while other is not None and (more := [path for path in dict.fromkeys(other.branches) if path not in paths]):
        paths += more  # asked only where those before said yes
        other = run(frozenset(paths))
    found = _differing(writer, other)
    if found is None or other is None:
        return
    some = frozenset(paths[::2])
    if found and len(paths) > 1:
        wanted = {key: then for key, then in found.items() if writer.branched_at[key[0]] in some}
        if _differing(writer, run(some)) != wanted:
            return
    for (node, place), then in found.items():
        _choose(writer, node, place, then)
    told = _told(writer)
    writer.notes[:] = [*told, *(f"{note}, where self.training is true" for note in _told(other) if note not in told)]


def _told(writer: GraphWriter) -> list[str]:
    """What is noted of a run beside such branches: a number that is drawn, say, and decides what is called."""
    return [note for note in writer.notes if not note.endswith(BRANCH)]


Place = tuple[Any, ...]  # of a literal among (args, kwargs) of a node
Differing = dict[tuple[fx.Node, Place], Any]


def _differing(writer: GraphWriter, other: GraphWriter | None) -> Differing | None:
    """What literals are in the other run that a branch may have decided; None where anything else differs."""
    found = differing(writer, other)
    if found is None or not all(node in writer.branched_at for node, _ in found):
        return None
    literals = (leaf for key, then in found.items() for leaf in (literal(*key), then))
    return found if all(isinstance(leaf, _LITERALS) for leaf in literals) else None


def differing(writer: GraphWriter, other: GraphWriter | None) -> Differing | None:
    """What every literal that differs is in the other run; None where more than literals does."""
    if other is None or len(writer.graph.nodes) != len(other.graph.nodes):
        return None
    twins = dict(zip(writer.graph.nodes, other.graph.nodes, strict=True))
    found: Differing = {}
    for node, twin in twins.items():
        if node.op != twin.op or not _same_target(node.target, twin.target):
            return None
        for place, one, two in _leaves((node.args, node.kwargs), (twin.args, twin.kwargs)):
            if isinstance(one, fx.Node):
                if twins[one] is not two:
                    return None
            elif not _equal(one, two):
                if not place or isinstance(two, fx.Node):
                    return None
                found[node, place] = two
    return found


def _same_target(one: Any, two: Any) -> bool:
    """Objects that stand for a call, as that of a custom ``autograd.Function``, are made anew in every run."""
    if one == two:
        return True
    made = type(one) is type(two) and type(one).__module__.startswith("fxprune.")
    return made and getattr(one, "__name__", "") == getattr(two, "__name__", None)


def _equal(one: Any, two: Any) -> bool:
    return type(one) is type(two) and (one is two or bool(one == two))


def _leaves(one: Any, two: Any, place: Place = ()) -> Iterator[tuple[Place, Any, Any]]:
    """Pairs of what is no container, by place; containers of other forms are a pair that differs, at no place."""
    if not isinstance(one, (tuple, list, dict, slice)):
        yield place, one, two
        return
    first, second = (_items(each) for each in (one, two))
    if type(one) is not type(two) or first.keys() != second.keys():
        yield (), one, two
        return
    for key, item in first.items():
        yield from _leaves(item, second[key], (*place, key))


def literals(node: fx.Node) -> list[Any]:
    """All that a node is given but nodes."""
    leaves = (one for _, one, _ in _leaves((node.args, node.kwargs), (node.args, node.kwargs)))
    return [leaf for leaf in leaves if not isinstance(leaf, fx.Node)]


def _items(container: Any) -> dict[Any, Any]:
    if isinstance(container, slice):
        return {name: getattr(container, name) for name in ("start", "stop", "step")}
    if isinstance(container, dict):
        return dict(container)
    return dict(enumerate(container)) if isinstance(container, (tuple, list)) else {}


def _choose(writer: GraphWriter, node: fx.Node, place: Place, then: Any) -> None:
    path, graph = writer.branched_at[node], writer.graph
    if path not in writer.flags:
        writer.flags.append(path)

    def chosen(value: Any) -> list[fx.Node]:
        flag = graph.call_module(f"{path}.{TRAINING_FLAG}" if path else TRAINING_FLAG)
        return [flag, graph.call_function(either, (flag, then, value))]

    compute(node, place, chosen)


def compute(node: fx.Node, place: Place, nodes: Callable[[Any], list[fx.Node]]) -> None:
    """Have the last of these new nodes, which are made of the literal at that place, stand for it."""
    with node.graph.inserting_before(node):
        made = nodes(literal(node, place))
    for new in made:
        new.meta.update({**node.meta, "shape": None})
        new.meta.pop("mutates", None)
    node.args, node.kwargs = _with((node.args, node.kwargs), place, made[-1])


def literal(node: fx.Node, place: Place) -> Any:
    """What a node is given there."""
    found: Any = (node.args, node.kwargs)
    for key in place:
        found = _items(found)[key]
    return found


def _with(tree: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    items = _items(tree)
    items[place[0]] = _with(items[place[0]], place[1:], value)
    if isinstance(tree, slice):
        return slice(*items.values())
    return items if isinstance(tree, dict) else type(tree)(items.values())
