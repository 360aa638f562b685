"""The recorded graph without some of its residual branches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.depth.branches import Branch, computed_for
from fxprune.ops.meta import OpMode
from fxprune.ops.table import record_of
from fxprune.recording import RecordedModule, clone_modules, evaluated, named_tensors
from fxprune.recording.guards import erase, is_guard
from fxprune.recording.inputs import map_tensors
from fxprune.recording.randomness import repeatable
from fxprune.verification import Inputs, relative_error

STANDS_KEY = "fxprune_stands_for"
"""In the ``meta`` of a graph without branches: node -> the node of the dense graph whose values it should have."""


def without(dense: fx.GraphModule, branches: Iterable[Branch]) -> RecordedModule:
    """A graph on the same tensors without these branches, and without the modules and parameters that only they had.

    Where an op such as ReLU, which done twice is done once, is left right behind another like it, one of them goes.
    """
    root, code = clone_modules(dense), copy.deepcopy(dense.graph)
    nodes = {node.name: node for node in code.nodes}
    stands: dict[str, str] = dict(dense.meta.get(STANDS_KEY, {}))
    gone: list[fx.Node] = []
    for branch in branches:
        total = nodes.get(branch.sum)
        if total is None or total._erased:
            continue  # it was in another one
        stream = total.args[1 - branch.place]
        assert isinstance(stream, fx.Node)
        gone += _erased(total, branch.place)
        total.replace_all_uses_with(stream)
        code.erase_node(total)
        _stand_for(stands, stream, total.name)
        _merge(root, stream, stands)
    _drop(root, code, gone)
    result = RecordedModule(root, code, type(dense).__name__, compiled=False)
    left = {node.name for node in code.nodes}
    result.meta = {**dense.meta, STANDS_KEY: {name: other for name, other in stands.items() if name in left}}
    return result


def compared_with_zeroed(
    dense: fx.GraphModule, shallow: fx.GraphModule, branches: Iterable[Branch], inputs: Inputs
) -> float:
    """The relative error of the graph without branches against the dense one whose branches are set to zero."""
    zeroed = copy.deepcopy(dense)
    nodes = {node.name: node for node in zeroed.graph.nodes}
    for branch in branches:
        total = nodes[branch.sum]
        with zeroed.graph.inserting_before(total):
            nothing = zeroed.graph.call_function(torch.zeros_like, (total.args[branch.place],))
        total.update_arg(branch.place, nothing)
    zeroed.recompile()
    return relative_error(answer(copy.deepcopy(shallow), inputs), answer(zeroed, inputs))


def answer(module: nn.Module, inputs: Inputs) -> Any:
    """What a network gives in eval mode; random ops draw the same in every call."""
    args, kwargs = map_tensors(Tensor.clone, (tuple(inputs[0]), dict(inputs[1])))
    with evaluated(module), repeatable():
        return module(*args, **kwargs)


def _erased(total: fx.Node, place: int) -> list[fx.Node]:
    """Take an operand out of the graph, with all that is computed for it alone."""
    operand = total.args[place]
    assert isinstance(operand, fx.Node)
    inside = computed_for(total, operand)
    total.update_arg(place, total.args[1 - place])
    for node in [n for n in reversed(total.graph.nodes) if n in inside]:
        for user in [u for u in node.users if u not in inside]:
            _erase_after(user)
        if not node._erased:  # a number that was computed for a guard alone went with it
            total.graph.erase_node(node)
    return [*inside]


def _erase_after(node: fx.Node) -> None:
    """Erase a node, and first what is computed from it: guards on sizes, in the end."""
    for user in [*node.users]:
        _erase_after(user)
    if is_guard(node):
        erase(node.graph, node)
    elif not node._erased:
        node.graph.erase_node(node)


def _stand_for(stands: dict[str, str], node: fx.Node, other: str) -> None:
    """From now on ``node`` has the values of ``other``, or of what that stood for itself."""
    stands[node.name] = stands.get(other, other)


def _merge(root: nn.Module, stream: fx.Node, stands: dict[str, str]) -> None:
    """Of two equal ops in a row that are no more than one of them, the first stays."""
    if len(stream.users) != 1 or len(stream.all_input_nodes) != 1:
        return
    (user,) = stream.users
    if user.all_input_nodes != [stream] or user.op == "output" or not _same_idempotent(root, stream, user):
        return
    (source,) = stream.all_input_nodes
    stands[source.name] = stands[stream.name]
    _stand_for(stands, stream, user.name)
    user.replace_all_uses_with(stream)
    stream.graph.erase_node(user)


def _same_idempotent(root: nn.Module, one: fx.Node, other: fx.Node) -> bool:
    first, second = (_ops(root, node) for node in (one, other))
    return len(first) == 1 and first == second


class _Watch(OpMode):
    """Notes ops, with all arguments that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        record = record_of(func)
        rest = [a for a in (*args, *sorted((kwargs or {}).items())) if not isinstance(a, Tensor)]
        self.ops.append((record.name, rest) if record is not None and record.idempotent else None)
        return func(*args, **(kwargs or {}))


def _ops(root: nn.Module, node: fx.Node) -> list[Any]:
    """The ops in a node of one tensor, if each of them is idempotent; else nothing."""
    watch, given = _Watch(), torch.empty(2, 2, 2, 2, device="meta")
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: given)
    try:
        with watch, torch.no_grad():
            if node.op == "call_module":
                root.get_submodule(str(node.target))(*args, **kwargs)
            elif node.op == "call_function":
                node.target(*args, **kwargs)  # type: ignore[operator]
            elif node.op == "call_method":
                getattr(given, str(node.target))(*args[1:], **kwargs)
    except Exception:  # of another number of dims: then it is none of those
        return []
    return watch.ops if all(watch.ops) else []


def _drop(root: nn.Module, code: fx.Graph, gone: Sequence[fx.Node]) -> None:
    """Take out of ``root`` the modules and tensors that only these nodes used."""
    left = {str(n.target) for n in code.nodes if n.op in ("call_module", "get_attr")}
    used = {id(t) for name, t in named_tensors(root).items() if any(_is_in(name, target) for target in left)}
    targets = {str(n.target) for n in gone if n.op in ("call_module", "get_attr")} - left
    for name, tensor in named_tensors(root).items():
        if id(tensor) not in used and any(_is_in(name, target) for target in targets):
            path, _, key = name.rpartition(".")
            owner = root.get_submodule(path)
            owner._parameters.pop(key, None)
            owner._buffers.pop(key, None)
            owner._non_persistent_buffers_set.discard(key)
    owners = {str(n.target).rpartition(".")[0] if n.op == "get_attr" else str(n.target) for n in gone} & {
        name for name, _ in root.named_modules(remove_duplicate=False)
    }
    for path in sorted(owners, key=len, reverse=True):
        _drop_empty(root, path, left)


def _is_in(name: str, target: str) -> bool:
    return name == target or name.startswith(f"{target}.")


def _drop_empty(root: nn.Module, path: str, left: set[str]) -> None:
    """Delete a module that holds nothing and that no node calls, and then the one around it if that is so as well."""
    modules = dict(root.named_modules(remove_duplicate=False))
    while path in modules:
        module, (parent, _, key) = modules[path], path.rpartition(".")
        if not path or module._parameters or module._buffers or module._modules or any(_is_in(t, path) for t in left):
            return
        modules[parent]._modules.pop(key, None)
        path = parent
