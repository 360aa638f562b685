"""The graph being written: which node computed which tensor, and how calls, arguments and results become nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxprune.ops.table import find_call
from fxprune.recording import boundary, patches, trees
from fxprune.recording.calls import Call, Constant, SeededGenerator
from fxprune.recording.guards import OPPOSITE, holds
from fxprune.recording.leaf_functions import FUNCTIONS, LeafFunction, named
from fxprune.recording.liveness import eliminate_dead_nodes
from fxprune.recording.module import TRAINING_FLAG
from fxprune.recording.parts import Parts
from fxprune.recording.sources import caller_is_user_code, current_lines, current_source, running
from fxprune.recording.tensors import Tensors, are_same_view, storage_of
from fxprune.recording.traced import Lazy, TracedFlag, TracedFloat, TracedInt, plain
from fxprune.recording.upstream import upstream

_EXACT: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
CALL = "call"
"""In the ``meta`` of a node of several calls: which one it belongs to, counted from 1; before any of them 0."""

_LITERALS = (
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.layout,
    torch.memory_format,
    torch.device,
    torch._ops.OpOverload,
)


_BUILTINS: dict[type, type] = {patches.Int: int, patches.Float: float}
OnDecision = Callable[[Any, str, Any, bool], None]
OnComparison = Callable[[Any, str, Any, bool], bool]


class GraphWriter:
    """A graph in the making.

    ``path`` is the stack of the dotted names of the running modules, ``inputs_end`` the last node that takes the inputs
    apart. ``hashed``: has a size been looked up by its hash? ``call``: which this is of several calls.
    ``branches``: modules whose training flags Python code branched on. ``branched_at``: of a node the last before it.
    ``dtypes_at``: of a node the tensors that were asked last for their dtypes before it, by dtype.
    """

    def __init__(
        self, parts: Parts, own_hashes: bool = True, original: Callable[[Any], Any] = lambda value: value
    ) -> None:
        self.graph = Graph()
        self.own_hashes = own_hashes
        self.on_decision: OnDecision | None = None
        self.on_comparison: OnComparison | None = None
        self._original = original
        self._guarded: set[Any] = set()
        self._alive: set[Node] = set()
        self.hashed = False
        self.in_autograd_function = False
        """Its forward runs without gradients anyway, so that one written there means nothing."""
        self.path = [""]
        self.call: int | None = None
        self.branched_at: dict[Node, str] = {}
        self.branches: list[str] = []
        self.dtypes_at: dict[Node, dict[torch.dtype, Node]] = {}
        self._dtypes: dict[torch.dtype, Node] = {}
        self.inputs_end: Node | None = None
        self.notes: list[str] = []
        self.flags: list[str] = []
        self.constants: dict[str, Tensor] = {}
        self.tensors = Tensors(parts.tensors)
        self._kept: list[Any] = []
        self._without_grad: set[Node] = set()
        self._regions: list[tuple[Node, Node]] = []
        self._sizes: dict[tuple[Node, int], Lazy] = {}
        self._last_size: dict[Node, Node] = {}
        self._devices: dict[int, Node] = {}
        self._generators: dict[int, tuple[Node, Tensor | None]] = {}
        self._taken = {*parts.tensors, *parts.modules}

    def note(self, text: str, source: str | None = None) -> None:
        line = f"{current_source() if source is None else source}: {text}"
        if line not in self.notes:
            self.notes.append(line)

    def decided(self, value: Any, relation: str, other: Any, outcome: bool) -> None:
        """Python code took ``value`` out of the graph, where ``value relation other``."""
        if self.on_decision is not None:
            self.on_decision(value, relation, other, outcome)

    def compared(self, value: Any, relation: str, other: Any, outcome: bool) -> bool:
        """What Python code is told that compares, and may branch on it."""
        return outcome if self.on_comparison is None else self.on_comparison(value, relation, other, outcome)

    def effect(self, call: Call) -> None:
        """A call that is made for what it does to an object that came in."""
        self._alive.add(self.create(call))

    def guard(self, value: Any, relation: str, recorded: Any, outcome: bool = True, source: str = "") -> None:
        """Write down that the graph holds only where ``value relation recorded`` comes out as it did.

        ``source``: what asked, if that is not the line that is running.
        """
        relation = relation if outcome else OPPOSITE[relation]
        key = self._identity(value), relation, self._identity(recorded)
        if key in self._guarded or (key[0] == key[2] and relation in ("==", "<=", ">=")):
            return
        self._guarded.add(key)
        source = source or current_source()
        node = self.create(Call("call_function", holds, (value, relation, recorded, source), {}))
        self._note_functions(node)
        self._alive.add(node)

    def _note_functions(self, node: Node) -> None:
        node.meta[FUNCTIONS] = tuple(filter(None, map(named, running())))

    def _identity(self, value: Any) -> Any:
        if isinstance(value, (TracedInt, TracedFloat)):
            return self._number(value)
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, Node):
            return value
        return type(value), str(value) if isinstance(value, list) else value

    def depends_on_inputs(self, node: Node) -> bool:
        """Whether anything of an input, its sizes included, goes into what the node computes."""
        return any(each.op == "placeholder" for each in upstream([node]))

    def hash_of(self, lazy: Lazy, value: int) -> int:
        """The hash of a size: with ``own_hashes`` another one for every expression."""
        self.hashed = True
        return hash((id(lazy), value)) if self.own_hashes else hash(value)

    def finish(self) -> None:
        """Drop dead nodes; say which constants stayed."""
        known = self.tensors
        eliminate_dead_nodes(
            self.graph, known.storages, known.writes, frozenset(known.lasting), self._regions, self._alive, known.joined
        )
        used: dict[str, Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target in self.constants:
                tensor = self.constants[node.target]
                used[node.target] = tensor
                self.note(
                    f"a tensor of shape {list(tensor.shape)} that the run did not compute is kept as the buffer "
                    f"{node.target}",
                    node.meta["source"],
                )
        self.constants = used

    # --- calls and their results ------------------------------------------------------------------------------------

    def write(self, call: Call, result: Any, changed: list[Tensor]) -> Any:
        """Write down a call that returned ``result`` and wrote to the tensors ``changed``.

        Returns the result with tensors that can be told apart from all earlier ones: an op that hands back its very
        input gets an alias instead.
        """
        detached = self._detached(changed)
        node = self.create(call, detached)
        self.tensors.mark_writes(node, changed)
        if isinstance(call.target, LeafFunction):
            self._note_functions(node)
            self._alive.add(node)  # with other values it may write, or hand back what it is given
            self.tensors.join(trees.tensors(result), trees.tensors(call.args, call.kwargs))
        record = find_call(str(getattr(call.target, "__name__", call.target)))
        if record is not None and record.many:
            self.guard(self._count(node, len(result)), "==", len(result))
        return self._bind(result, node, {id(tensor) for tensor in changed}, set(detached))

    def _count(self, node: Node, count: int) -> TracedInt:
        """How many tensors a call gave, which Python code goes through one by one."""
        return TracedInt(count, Lazy(self, "call_function", len, (node,)))

    def region(self, enter: Node, leave: Node) -> None:
        """The nodes between the two belong in the context that they open and close."""
        self._regions.append((enter, leave))

    def _detached(self, changed: list[Tensor]) -> dict[int, Node]:
        """In a no_grad region an in-place write leaves the tensor's history alone: it goes to a detached alias."""
        if self._keeps_history():
            return {}
        result: dict[int, Node] = {}
        for tensor in changed:
            node = self.node_of(tensor)
            if tensor.is_floating_point() and node not in self._without_grad:
                result[id(tensor)] = self._detach(node)
        return result

    def _keeps_history(self) -> bool:
        return self.in_autograd_function or torch.is_grad_enabled()

    def _detach(self, node: Node) -> Node:
        detached = self.create(Call("call_method", "detach", (node,), {}))
        detached.meta.update({key: node.meta[key] for key in ("shape", "dtype") if key in node.meta})
        self.tensors.alias(detached, node)
        self._without_grad.add(detached)
        return detached

    def _bind(self, value: Any, node: Node, changed: set[int], untouched: set[int]) -> Any:
        if isinstance(value, Tensor):
            return self._bind_tensor(value, node, changed, untouched)
        if isinstance(value, (tuple, list)):
            items = [self._bind_part(item, node, key, changed, untouched) for key, item in enumerate(value)]
            if isinstance(value, list):
                value[:] = items
                return value
            return trees.map_sequence(value, items)
        if isinstance(value, dict):
            for key, item in list(value.items()):
                value[key] = self._bind_part(item, node, key, changed, untouched)
        return value

    def _bind_part(self, item: Any, node: Node, key: Any, changed: set[int], untouched: set[int]) -> Any:
        if not trees.has_tensors(item):
            return item
        part = self.create(Call("call_function", operator.getitem, (node, key), {}))
        return self._bind(item, part, changed, untouched)

    def _bind_tensor(self, value: Tensor, node: Node, changed: set[int], untouched: set[int]) -> Tensor:
        _note_tensor(node, value)
        if id(value) in untouched:
            return value
        if self.tensors.known(value) and id(value) not in changed:
            value = value.detach()
        if not self._keeps_history() and value.is_floating_point():
            if all(source in self._without_grad for source in node.all_input_nodes):
                self._without_grad.add(node)
            else:
                self.tensors.storages[node] = storage_of(value)
                node = self._detach(node)
        self.tensors.map(value, node)
        return value

    # --- nodes --------------------------------------------------------------------------------------------------------

    def create(self, call: Call, instead: dict[int, Node] | None = None) -> Node:
        args = self.argument(call.args, instead)
        kwargs = self.argument(call.kwargs, instead) if call.kwargs else {}
        node = self.graph.create_node(call.op, call.target)
        node.args = args  # passed above, every one is looked through for what never is among them
        if kwargs:
            node.kwargs = kwargs
        self.describe(node, None)
        if self.branches:
            self.branched_at[node] = self.branches[-1]
        if self._dtypes:
            self.dtypes_at[node] = self._dtypes
        return node

    def describe(self, node: Node, value: Tensor | None) -> None:
        node.meta["source"], stack = current_lines()
        if stack:
            node.meta["stack_trace"] = stack
        node.meta["module"] = self.path[-1]
        if self.call is not None:
            node.meta[CALL] = self.call
        node.meta["shape"] = None
        if value is not None:
            _note_tensor(node, value)

    def argument(self, value: Any, instead: dict[int, Node] | None = None) -> Any:
        """``value`` as a node argument: tensors and traced numbers as nodes, literals as they are."""
        if type(value) in trees.PLAIN:
            return value
        if instead and id(value) in instead:
            return instead[id(value)]
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, Node):
            return value
        if isinstance(value, (TracedInt, TracedFloat, TracedFlag)):
            return self._number(value)
        if isinstance(value, boundary.Rebuilt):
            if value.node is None:
                value.node = self.create(Call("call_function", value.target, value.args, value.kwargs))
            return value.node
        if isinstance(value, tuple) and hasattr(value, "_fields") and "_fields" not in vars(type(value)):
            return self.create(Call("call_function", type(value), tuple(value), {}))  # which may look at its parts
        if isinstance(value, (tuple, list)):
            return trees.map_sequence(value, [self.argument(item, instead) for item in value])
        if isinstance(value, dict):
            return {key: self.argument(item, instead) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self.argument(part) for part in (value.start, value.stop, value.step)))
        if isinstance(value, torch.device) and id(value) in self._devices:
            return self.create(Call("call_function", getattr, (self._devices[id(value)], "device"), {}))
        return self._literal(value)

    def _literal(self, value: Any) -> Any:
        if isinstance(value, np.generic):  # some are floats, and would be written as np.float64(0.7)
            return value.item()
        if isinstance(value, Enum) and isinstance(value, (int, float, str)):
            return value.value
        for kind in _EXACT:
            if isinstance(value, kind):
                return kind(value)
        if isinstance(value, _LITERALS):
            return value
        if isinstance(value, range):
            return tuple(value)
        if isinstance(value, type):
            value = _BUILTINS.get(value, value)
        if isinstance(value, torch.Generator):
            return self._generator(value)
        return self.create(Call("call_function", Constant(self._original(value)), (), {}))

    def _generator(self, value: torch.Generator) -> Node:
        """A generator; drawn from again, and not seeded in between, it is the same one that goes on."""
        known = self._generators.get(id(value))
        if known is not None and (known[1] is None or torch.equal(known[1], value.get_state())):
            return known[0]
        self.note("a generator begins at every call where it stood in the recorded run")
        node = self.create(Call("call_function", SeededGenerator(value), (), {}))
        self._kept.append(value)
        self._generators[id(value)] = node, value.get_state()
        return node

    def given_generator(self, value: torch.Generator, node: Node) -> None:
        """``node`` gives a generator that is among the inputs."""
        self._kept.append(value)
        self._generators[id(value)] = node, None

    def spelled(self) -> None:
        """A number becomes text, which no graph can follow."""
        if caller_is_user_code():
            self.note("a size becomes text; what is made of that stays as it was in the recorded run")

    def node_of(self, tensor: Tensor) -> Node:
        """The node that computed the tensor; a parameter, a buffer or a constant if none did."""
        node, name = self.tensors.find(tensor)
        if node is None:
            return self._constant(tensor) if name is None else self._attribute(name, tensor)
        return node

    def take_the_place(self, parameter: Tensor, value: Tensor) -> None:
        """``parameter.data = value``: from here on it is what the model computed, for this call.

        Its own memory, as ``layer.to(x.device)`` gives it where nothing has to move, leaves it what it is.
        """
        if are_same_view(parameter, value):
            return
        self.note("no gradient reaches a parameter whose data forward computes anew")
        node = self.create(Call("call_method", "detach", (value,), {}))
        _note_tensor(node, value)
        parameter.data = value
        self.tensors.replaced(parameter, node)

    def _attribute(self, name: str, tensor: Tensor) -> Node:
        node = self.graph.create_node("get_attr", name)
        self.describe(node, tensor)
        if not isinstance(tensor, nn.Parameter):
            self._without_grad.add(node)
        self.tensors.map(tensor, node, lasting=True)
        return node

    def _constant(self, tensor: Tensor) -> Node:
        index = len(self.constants)
        while f"_constant_{index}" in self._taken:
            index += 1
        name = f"_constant_{index}"
        self._taken.add(name)
        self.constants[name] = tensor
        return self._attribute(name, tensor)

    def _after_inputs(self, node: Node) -> Node:
        return self.inputs_end if node.op == "placeholder" and self.inputs_end is not None else node

    # --- numbers ------------------------------------------------------------------------------------------------------

    def size(self, tensor: Tensor, dim: int) -> TracedInt:
        key = (self.node_of(tensor), dim % tensor.ndim if tensor.ndim else dim)
        lazy = self._sizes.setdefault(key, Lazy(self, "call_method", "size", key))
        return TracedInt(int(tensor.shape[dim]), lazy)

    def stride(self, tensor: Tensor, dim: int) -> TracedInt:
        key = (self.node_of(tensor), dim % tensor.ndim)
        return TracedInt(int(tensor.stride(dim)), Lazy(self, "call_method", "stride", key))

    def device(self, tensor: Tensor, device: torch.device) -> torch.device:
        """The tensor's device; used in a factory call later, it is read from the tensor again."""
        self._devices[id(device)] = self.node_of(tensor)
        self._kept.append(device)
        return device

    def asked_dtype(self, tensor: Tensor) -> torch.dtype:
        """The tensor's dtype; what is made of it is in ``dtypes_at``."""
        if tensor.is_floating_point():
            self._dtypes = {**self._dtypes, tensor.dtype: self.node_of(tensor)}  # nodes hold what it was before
        return tensor.dtype

    def flag(self, path: str, value: bool, on_branch: Callable[[], None]) -> TracedFlag:
        target = f"{path}.{TRAINING_FLAG}" if path else TRAINING_FLAG

        def branch() -> None:
            self.branches.append(path)
            on_branch()

        return TracedFlag(value, Lazy(self, "call_module", target, ()), branch)

    def _number(self, value: Any) -> Any:
        lazy: Lazy = value.lazy
        if lazy.owner is not self:
            return plain(value)
        if lazy.node is None:
            lazy.node = self._lazy_node(lazy)
        return lazy.node

    def _lazy_node(self, lazy: Lazy) -> Node:
        if lazy.op == "call_module":
            path = str(lazy.target).removesuffix(TRAINING_FLAG).removesuffix(".")
            if path not in self.flags:
                self.flags.append(path)
        if lazy.op != "call_method":
            return self.create(Call(lazy.op, lazy.target, lazy.args, {}))
        tensor = lazy.args[0]  # its size is read where it is computed, so that its memory is freed as early as ever
        with self.graph.inserting_after(self._last_size.get(tensor, self._after_inputs(tensor))):
            node = self.create(Call("call_method", lazy.target, lazy.args, {}))
        self._last_size[tensor] = node
        return node


def _note_tensor(node: Node, value: Tensor) -> None:
    node.meta["shape"] = tuple(int(size) for size in value.shape)
    node.meta["dtype"] = value.dtype
