"""Repair literals: every argument that named an old size names the new one.

The labels promise the new shape of every node. An argument whose value agrees with the promise keeps its (possibly
dynamic) expression; another is replaced. Numbers that are no sizes, such as ``(C // heads) ** -0.5``, keep their
dense value. One small function per kind of op, in one table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from fxprune.groups.channels import ChannelGraph, channels_of
from fxprune.groups.cost import Keep
from fxprune.labels.factors import cut_sizes
from fxprune.labels.propagate import TensorLabels, labels_in
from fxprune.ops.table import find, full_name
from fxprune.recording import named_modules
from fxprune.recording.guards import NUMBER, is_guard
from fxprune.rewriting.slicing import adapt

REPAIRED = "repaired"
"""In a node's ``meta``: the pruned graph says something here that the model's own code does not."""


class _Undefined:
    """A number that cannot be computed from the new sizes: it equals no size, and as a number the dense one is kept."""


UNDEFINED = _Undefined()


class UnrepairableError(Exception):
    """A node whose arguments cannot follow the plan. ``channels``: those that must stay then."""

    def __init__(self, node: fx.Node, text: str, channels: Sequence[int] = ()):
        super().__init__(f"{text} ({node.meta.get('source', node.name)})")
        self.node = node
        self.text = text
        self.channels = channels


class UnevenError(UnrepairableError):
    """A slice that would have to pick unevenly spaced positions: those in ``taken``, of the cut dimension."""

    def __init__(self, node: fx.Node, text: str, channels: Sequence[int], taken: Any):
        super().__init__(node, text, channels)
        self.taken = taken


@dataclass
class Repair:
    """The walk over the new graph, ``code``, of what will be the new module.

    ``values``: what every node gives on the example inputs, tensors as meta tensors. ``other_values``: integer values
    of the dense graph with another batch size, to know what depends on it. ``device``: of the dense module, for what
    needs values already.
    """

    module: nn.Module
    code: fx.Graph
    graph: ChannelGraph
    keep: Keep
    other_values: Mapping[str, Any]
    device: torch.device
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Visit every node in order.

        Raises:
            UnrepairableError: when a node's arguments cannot follow.
        """
        modules = dict(named_modules(self.module))
        for node in list(self.code.nodes):
            if node.op == "output":
                continue
            before = (node.op, node.target, node.args, node.kwargs)
            if node.op == "call_module":
                module = modules.pop(str(node.target), None)
                if module is not None:  # the first call
                    self._adapt(node, module)
            elif node.op in ("call_method", "call_function"):
                repair = _repair_of(node)
                if repair is not None and labels_in([self.dense(n) for n in (node, *node.all_input_nodes)]):
                    repair(self, node)
                self._freeze_numbers(node)
            if _changed(node, before):
                node.meta[REPAIRED] = True
            self.values[node] = self._value(node)
        for node in reversed([n for n, value in self.values.items() if value is UNDEFINED]):
            if node.users:
                raise UnrepairableError(node, "a number cannot be computed from the sizes that are left")
            self.code.erase_node(node)

    # -- what is known of a node --------------------------------------------------------------------------------

    def dense(self, node: Any) -> Any:
        """The node's dense value: ``TensorLabels`` for tensors. Anything but a node is its own value."""
        if isinstance(node, fx.Node):
            return self.graph.nodes.get(node.name)
        if isinstance(node, (tuple, list)):
            return type(node)(self.dense(n) for n in node) if type(node) in (tuple, list) else node
        return node

    def value(self, argument: Any) -> Any:
        """What an argument evaluates to in the new graph."""
        return fx.map_arg(argument, lambda n: self.values[n])

    def promised(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a tensor node in the new graph."""
        known = self.dense(node)
        return tuple(cut_sizes(known.shape, known.labels, self.keep))

    def mask(self, known: TensorLabels, dim: int, node: fx.Node) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which positions along ``dim`` of a dense tensor stay, the same in every row."""
        factor = next((f for f in known.labels if f.dim == dim), None)
        if factor is None:
            return np.ones(known.shape[dim], dtype=bool)
        masks = self.keep[factor.rows()]
        if not (masks.cumsum(1) == masks[:1].cumsum(1)).all():
            first = masks[0]
            if not (masks.sum(1) == first.sum()).all():
                raise UnrepairableError(node, "blocks keep different counts", channels_of(known))
        mask: np.ndarray[Any, np.dtype[np.bool_]] = masks[0]
        return mask

    def is_cut(self, known: TensorLabels, dim: int) -> bool:
        return any(f.dim == dim and not self.keep[f.rows()].all() for f in known.labels)

    def depends_on_batch(self, argument: Any) -> bool:
        return (
            isinstance(argument, fx.Node)
            and argument.name in self.other_values
            and self.other_values[argument.name] != self.dense(argument)
        )

    # -- replacing arguments -------------------------------------------------------------------------------------

    def sizes(self, node: fx.Node, arguments: Sequence[Any], promised: Sequence[int]) -> list[Any]:
        """Size arguments that give ``promised``; -1 and expressions that already agree stay."""
        return [
            a if self.value(a) in (-1, p) else self.size(node, a, p) for a, p in zip(arguments, promised, strict=True)
        ]

    def size(self, node: fx.Node, argument: Any, promised: int) -> Any:
        """One size argument that must become ``promised`` at the example's batch size."""
        if not self.depends_on_batch(argument):
            return promised
        with self.code.inserting_before(node):
            now = self.value(argument)
            scaled = self.code.call_function(operator.mul, (argument, promised))
            result = self.code.call_function(operator.floordiv, (scaled, now))
        self.values[scaled], self.values[result] = now * promised, promised
        return result

    def size_list(self, node: fx.Node, argument: Any, promised: Sequence[int]) -> Any:
        """A whole shape argument: a sequence, or a node that gives one."""
        if isinstance(argument, (tuple, list)):
            return (
                type(argument)(self.sizes(node, argument, promised))
                if type(argument) in (tuple, list)
                else tuple(self.sizes(node, list(argument), promised))
            )
        now = self.value(argument)
        if tuple(now) == tuple(promised):
            return argument
        items: list[Any] = []
        for place, (have, want) in enumerate(zip(now, promised, strict=True)):
            if have != want:
                items.append(want)
                continue
            with self.code.inserting_before(node):
                item = self.code.call_function(operator.getitem, (argument, place))
            self.values[item] = have
            items.append(item)
        return tuple(items)

    def groups(self, x: Any, weight: Any, groups: Any, *, transposed: bool = False) -> Any:
        """The argument ``groups`` of a convolution: where whole groups went their number follows the weight."""
        dense_groups, known, source = self.dense(groups), self.dense(weight), self.dense(x)
        if dense_groups == 1 or not isinstance(known, TensorLabels):
            return groups
        per_in = source.shape[1] // dense_groups
        per_out = known.shape[1] if transposed else known.shape[0] // dense_groups
        new = dense_groups
        if 1 in (per_in, per_out):
            first = cut_sizes(known.shape, known.labels, self.keep)[0]
            new = first // (per_in if transposed else per_out)
        return groups if self.value(groups) == new else new

    def _adapt(self, node: fx.Node, module: nn.Module) -> None:
        first = next((self.dense(a) for a in node.all_input_nodes if isinstance(self.dense(a), TensorLabels)), None)
        if isinstance(first, TensorLabels):
            try:
                adapt(module, first.shape, tuple(cut_sizes(first.shape, first.labels, self.keep)))
            except (IndexError, ValueError) as error:
                raise UnrepairableError(node, f"{type(module).__name__}: {error}", channels_of(first)) from error
        if isinstance(module, nn.Unflatten) and isinstance(first, TensorLabels):
            out, dim = self.promised(node), module.dim
            if isinstance(dim, int):
                start = dim % len(first.shape)
                module.unflattened_size = tuple(out[start : start + len(module.unflattened_size)])

    def _freeze_numbers(self, node: fx.Node) -> None:
        """Numbers used by a tensor op keep their dense value, unless they are sizes, which were repaired before."""
        only_tensors = all(isinstance(self.dense(a), TensorLabels) for a in node.all_input_nodes)
        if not only_tensors and _repair_of(node) is None and labels_in(self.dense(node)):
            self.freeze(node)

    def freeze(self, node: fx.Node) -> None:
        """Every argument ``frozen``."""
        node.args, node.kwargs = self.frozen(node, node.args), self.frozen(node, node.kwargs)

    def frozen(self, node: fx.Node, argument: Any) -> Any:
        """An argument of ``node`` in which numbers that would change are the dense ones."""

        def freeze(argument: fx.Node) -> Any:
            was, now = self.dense(argument), self.values[argument]
            if isinstance(was, (int, float)) and not isinstance(was, bool) and was != now:
                if self.depends_on_batch(argument):
                    raise UnrepairableError(node, "a number depends on channels and on the batch", channels_of(
                        [self.dense(n) for n in (node, *node.all_input_nodes)]))  # fmt: skip
                return was
            return argument

        return fx.map_arg(argument, freeze)

    def _value(self, node: fx.Node) -> Any:
        known = self.dense(node)
        if isinstance(known, TensorLabels):
            return self._meta(known)
        if labels_in(known):
            return tree_map(self._meta, known)
        if node.op not in ("call_method", "call_function") or is_guard(node):
            return known
        if NUMBER in node.meta:
            return node.meta[NUMBER]
        if all(map(self._is_unchanged, node.all_input_nodes)):
            return known
        args, kwargs = self.value(node.args), self.value(node.kwargs)
        if any(leaf is UNDEFINED for leaf in tree_flatten((args, kwargs))[0]):
            return UNDEFINED
        target: Any = node.target
        try:
            return (
                getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
            )
        except ArithmeticError:  # (C // heads) ** -0.5 with fewer channels than heads
            return UNDEFINED

    def _is_unchanged(self, node: fx.Node) -> bool:
        """Whether what a node gives is what it gave in the dense graph, and objects that came in are these objects."""
        if node.name not in self.graph.nodes:
            return False
        was, now = self.dense(node), self.values[node]
        if isinstance(was, TensorLabels):
            return tuple(now.shape) == was.shape
        if labels_in(was):
            return False
        return was is now or (isinstance(was, (int, float)) and type(was) is type(now) and was == now)

    def _meta(self, known: Any) -> Any:
        if not isinstance(known, TensorLabels):
            return known
        return torch.empty(cut_sizes(known.shape, known.labels, self.keep), dtype=known.dtype, device="meta")


def new_constant(module: nn.Module, name: str, value: torch.Tensor, before: fx.Node) -> fx.Node:
    """A ``get_attr`` node for a new non-persistent buffer of ``module``."""
    index = 0
    while hasattr(module, f"_{name}_{index}"):
        index += 1
    module.register_buffer(f"_{name}_{index}", value, persistent=False)
    with before.graph.inserting_before(before):
        result = before.graph.create_node("get_attr", f"_{name}_{index}")
    result.meta = {k: v for k, v in before.meta.items() if k in ("source", "module")}
    return result


def _changed(node: fx.Node, before: tuple[str, Any, Any, Any]) -> bool:
    """Whether a node calls something else than before, or with something else."""
    now = (node.op, node.target, node.args, node.kwargs)
    return any(a is not b for a, b in zip(now, before, strict=True)) and _spelling(*now) != _spelling(*before)


def _spelling(op: str, target: Any, args: Any, kwargs: Any) -> list[Any]:
    """What is called and with what, whatever the types of the sequences in it."""
    return [op, target, *tree_flatten((tuple(args), dict(kwargs)))[0]]


def base_name(node: fx.Node) -> str:
    """The op's bare name: ``view`` for the method, the function and ``aten.view.default`` alike."""
    target: Any = node.target
    name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    return name.split(".")[0]


Fix = Callable[[Repair, fx.Node], None]
REPAIRS: dict[str, Fix] = {}


def _repair_of(node: fx.Node) -> Fix | None:
    """By its bare name, or of an op that is not PyTorch's own by its full one."""
    name = full_name(node.target)
    if not name or name.startswith("aten::"):
        return REPAIRS.get(base_name(node))
    known = find(name)
    return None if known is None else known.repair


def repairs(*names: str) -> Callable[[Fix], Fix]:
    """Register the repair of nodes with these bare names."""

    def register(function: Fix) -> Fix:
        for name in names:
            if name in REPAIRS:
                raise ValueError(f"two repairs for {name}")
            REPAIRS[name] = function
        return function

    return register


def _set(node: fx.Node, place: int, name: str, value: Any) -> None:
    """Set an argument where it was given, by position or by name."""
    if name in node.kwargs:
        node.kwargs = {**node.kwargs, name: value}
    elif place < len(node.args):
        node.args = (*node.args[:place], value, *node.args[place + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: value}


def _get(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.kwargs.get(name, node.args[place] if place < len(node.args) else default)


@repairs("view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty", "new_full", "_unsafe_view")
def _shape_after_self(repair: Repair, node: fx.Node) -> None:
    """``x.view(*sizes)`` or ``x.view(sizes)``."""
    promised = repair.promised(node)
    for name in ("size", "shape"):
        if name in node.kwargs:
            node.kwargs = {**node.kwargs, name: repair.size_list(node, node.kwargs[name], promised)}
            return
    first = node.args[1]
    if isinstance(first, torch.dtype):
        return
    if isinstance(first, (tuple, list)) or not isinstance(repair.value(first), int):
        node.args = (node.args[0], repair.size_list(node, first, promised), *node.args[2:])
    else:
        sizes = node.args[1:]
        if base_name(node) == "expand" and any(repair.value(s) == -1 for s in sizes):
            promised = tuple(promised)
        node.args = (node.args[0], *repair.sizes(node, sizes, promised))


@repairs("zeros", "ones", "empty", "rand", "randn", "full")
def _factory(repair: Repair, node: fx.Node) -> None:
    promised = repair.promised(node)
    if "size" in node.kwargs:
        node.kwargs = {**node.kwargs, "size": repair.size_list(node, node.kwargs["size"], promised)}
    elif isinstance(node.args[0], (tuple, list)) or not isinstance(repair.value(node.args[0]), int):
        node.args = (repair.size_list(node, node.args[0], promised), *node.args[1:])
    else:
        node.args = tuple(repair.sizes(node, node.args, promised))


@repairs("randint", "normal")
def _drawn(repair: Repair, node: fx.Node) -> None:
    """Numbers come before the size, one or two; those of ``normal`` may be tensors, and then there is none."""
    for place, argument in [*enumerate(node.args), *node.kwargs.items()]:
        if place == "size" or (isinstance(place, int) and isinstance(repair.value(argument), (tuple, list))):
            sizes = repair.size_list(node, argument, repair.promised(node))
            _set(node, *((place, "") if isinstance(place, int) else (len(node.args), place)), sizes)


@repairs("unflatten")
def _unflatten(repair: Repair, node: fx.Node) -> None:
    dim = repair.value(_get(node, 1, "dim"))
    sizes = _get(node, 2, "sizes")
    promised = repair.promised(node)
    start = dim % len(repair.dense(node.args[0]).shape)
    count = len(promised) - len(repair.dense(node.args[0]).shape) + 1
    _set(node, 2, "sizes", repair.size_list(node, sizes, promised[start : start + count]))


@repairs("repeat", "tile")
def _repeat(repair: Repair, node: fx.Node) -> None:
    promised = repair.promised(node)
    source = repair.value(node.args[0]).shape
    source = (1,) * (len(promised) - len(source)) + tuple(source)
    times = [p // s for p, s in zip(promised, source, strict=True)]
    first = node.args[1]
    if isinstance(first, (tuple, list)):
        node.args = (node.args[0], repair.size_list(node, list(first), times[-len(first) :]))
    else:
        node.args = (node.args[0], *repair.sizes(node, node.args[1:], times[-(len(node.args) - 1) :]))


@repairs("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(repair: Repair, node: fx.Node) -> None:
    outputs = [o for o in repair.dense(node) if isinstance(o, TensorLabels)]
    dim = repair.value(_get(node, 2, "dim", 0))
    source: Any = node.args[0]
    sizes = [cut_sizes(o.shape, o.labels, repair.keep)[dim] for o in outputs]
    if sizes == [o.shape[dim] for o in outputs]:
        repair.freeze(node)
        return
    if base_name(node).endswith("chunk"):
        count = repair.value(_get(node, 1, "chunks"))
        if [t.shape[dim] for t in repair.value(source).chunk(count, dim)] == sizes:
            return
    if 0 in sizes:
        raise UnrepairableError(node, "a part of a split would be empty", channels_of(repair.dense(node)))
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (source, sizes, dim), {}


def _cut_slice(repair: Repair, node: fx.Node, known: TensorLabels, dim: int, window: slice) -> slice:
    """The slice that takes the same channels from the cut dimension. What it took is known by its dense bounds."""
    start, stop, step = (repair.dense(v) for v in (window.start, window.stop, window.step))
    mask = repair.mask(known, dim, node)
    chosen = np.arange(len(mask))[slice(start, stop, step)]
    rank = mask.cumsum() - 1
    taken = rank[chosen[mask[chosen]]]
    if len(taken) == 0:
        raise UnrepairableError(node, "a slice would be empty", channels_of(known))
    left = int(mask.sum())
    step = step or 1
    begin, end = int(taken[0]), int(taken[-1]) + 1
    if not np.array_equal(np.arange(left)[begin:end:step], taken):
        raise UnevenError(node, "the channels that stay of a slice are not evenly spaced", channels_of(known), taken)
    ends_with_dense = stop is None or (stop >= len(mask) or (stop < 0 and end == left))
    new_start = window.start if begin == (repair.value(window.start) or 0) and (begin or start is None) else begin
    if ends_with_dense and end > left - step:
        return slice(new_start, None, window.step)
    return slice(new_start, window.stop if repair.value(window.stop) == end else end, window.step)


def _cut_item(repair: Repair, node: fx.Node, known: TensorLabels, index: Any) -> Any:
    """The index expression of ``x[index]`` for the cut tensor."""
    items = list(index) if isinstance(index, tuple) else [index]
    used = sum(_dims_used(repair, item) for item in items)
    result: list[Any] = []
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += len(known.shape) - used
            result.append(item)
            continue
        if dim < len(known.shape) and repair.is_cut(known, dim):
            if isinstance(item, slice) and item != slice(None):
                item = _cut_slice_or_places(repair, node, known, dim, items, item)
            elif isinstance(repair.value(item), int) and not isinstance(item, bool):
                position = repair.dense(item) % known.shape[dim]
                item = int(repair.mask(known, dim, node)[:position].sum())
            elif isinstance(item, fx.Node) and isinstance(repair.dense(item), TensorLabels):
                if base_name(node) == "setitem" and repair.dense(item).dtype == torch.bool:
                    result.append(item)  # a mask of the same channels
                    dim += _dims_used(repair, item)
                    continue
                if len(repair.dense(item).shape) != 1:
                    raise UnrepairableError(node, "channels are picked by an index tensor", channels_of(known))
                item = _cut_index(repair, node, known, dim, item)
        else:
            item = repair.frozen(node, item)
        dim += _dims_used(repair, item)
        result.append(item)
    return tuple(result) if isinstance(index, tuple) else result[0]


def _cut_slice_or_places(
    repair: Repair, node: fx.Node, known: TensorLabels, dim: int, items: Sequence[Any], item: slice
) -> Any:
    """The slice, or where it cannot be one the places themselves, if that gives the same: nothing is written to a view
    of the tensor, and nothing else picks places in the same expression."""
    try:
        return _cut_slice(repair, node, known, dim, item)
    except UnevenError as error:
        slices = all(other is None or other is Ellipsis or isinstance(other, slice) for other in items)
        if base_name(node) != "getitem" or not slices or any(n.meta.get("mutates") for n in repair.code.nodes):
            raise
        places = torch.tensor(error.taken, device=repair.device)
        constant = new_constant(repair.module, "gather", places, node)
        repair.values[constant] = places
        return constant


def _dims_used(repair: Repair, item: Any) -> int:
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    known = repair.dense(item)
    if isinstance(known, TensorLabels) and known.dtype in (torch.bool, torch.uint8):
        return len(known.shape)
    return 1


@repairs("getitem", "setitem")
def _item(repair: Repair, node: fx.Node) -> None:
    known = repair.dense(node.args[0])
    if isinstance(known, TensorLabels):
        node.args = (node.args[0], _cut_item(repair, node, known, node.args[1]), *node.args[2:])


@repairs("narrow")
def _narrow(repair: Repair, node: fx.Node) -> None:
    known, dim = repair.dense(node.args[0]), repair.value(_get(node, 1, "dim"))
    start, length = repair.dense(_get(node, 2, "start")), repair.dense(_get(node, 3, "length"))
    dim %= len(known.shape)
    if repair.is_cut(known, dim):
        window = _cut_slice(repair, node, known, dim, slice(start, start + length))
        stop = window.stop if window.stop is not None else repair.value(node.args[0]).shape[dim]
        _set(node, 2, "start", window.start or 0)
        _set(node, 3, "length", stop - (window.start or 0))
    else:
        repair.freeze(node)


@repairs("select")
def _select(repair: Repair, node: fx.Node) -> None:
    known, dim = repair.dense(node.args[0]), repair.value(_get(node, 1, "dim"))
    dim %= len(known.shape)
    if repair.is_cut(known, dim):
        index = repair.dense(_get(node, 2, "index")) % known.shape[dim]
        _set(node, 2, "index", int(repair.mask(known, dim, node)[:index].sum()))
    else:
        _set(node, 2, "index", repair.frozen(node, _get(node, 2, "index")))


@repairs("index_select")
def _index_select(repair: Repair, node: fx.Node) -> None:
    known, dim = repair.dense(node.args[0]), repair.value(_get(node, 1, "dim"))
    dim %= len(known.shape)
    if not repair.is_cut(known, dim):
        return
    _set(node, 2, "index", _cut_index(repair, node, known, dim, _get(node, 2, "index")))


def _cut_index(repair: Repair, node: fx.Node, known: TensorLabels, dim: int, index: Any) -> fx.Node:
    """A constant that picks the same channels from the cut dimension, in the place of one, of places or of flags."""
    if not isinstance(index, fx.Node) or index.op != "get_attr":
        raise UnrepairableError(node, "channels are picked by a computed index", channels_of(known))
    dense_index = operator.attrgetter(str(index.target))(repair.module)
    if dense_index.is_meta:
        raise UnrepairableError(node, "channels are picked by an index without values", channels_of(known))
    mask = repair.mask(known, dim, node)
    positions = dense_index.cpu().numpy()
    positions = np.flatnonzero(positions) if positions.dtype in (np.bool_, np.uint8) else positions % len(mask)
    new = (mask.cumsum() - 1)[positions[mask[positions]]]
    cut = torch.from_numpy(new).to(dense_index.device)
    constant = new_constant(repair.module, "gather", cut, node)
    repair.values[constant] = cut
    if set(index.users) <= {node}:
        node.replace_input_with(index, constant)
        repair.code.erase_node(index)
        if str(index.target) in repair.module._non_persistent_buffers_set:
            delattr(repair.module, str(index.target))
    return constant


@repairs("pad")
def _pad(repair: Repair, node: fx.Node) -> None:
    known, out = repair.dense(node.args[0]), repair.dense(node)
    pads = [repair.dense(pad) for pad in repair.dense(_get(node, 1, "pad"))]
    given = repair.frozen(node, _get(node, 1, "pad"))
    changed = list(given) if isinstance(given, (tuple, list)) else list(pads)
    for k in range(len(pads) // 2):
        dim = len(known.shape) - 1 - k
        if not (repair.is_cut(out, dim) or repair.is_cut(known, dim)) or pads[2 * k] < 0 or pads[2 * k + 1] < 0:
            continue
        mask = repair.mask(out, dim, node)
        changed[2 * k] = int(mask[: pads[2 * k]].sum())
        changed[2 * k + 1] = int(mask[len(mask) - pads[2 * k + 1] :].sum()) if pads[2 * k + 1] else 0
    _set(node, 1, "pad", tuple(changed))


@repairs("layer_norm", "rms_norm")
def _layer_norm(repair: Repair, node: fx.Node) -> None:
    shape = _get(node, 1, "normalized_shape")
    after = repair.value(node.args[0]).shape
    count = len(repair.value(shape))
    _set(node, 1, "normalized_shape", repair.size_list(node, shape, after[len(after) - count :]))


@repairs("group_norm")
def _group_norm(repair: Repair, node: fx.Node) -> None:
    known = repair.dense(node.args[0])
    groups = _get(node, 1, "num_groups")
    if repair.is_cut(known, 1) and repair.dense(groups) == known.shape[1]:
        _set(node, 1, "num_groups", repair.value(node.args[0]).shape[1])
    else:
        _set(node, 1, "num_groups", repair.frozen(node, groups))


@repairs("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def _functional_convolution(repair: Repair, node: fx.Node) -> None:
    """Whole groups that went: ``groups`` follows the weight."""
    name = base_name(node)
    place = {"convolution": 8}.get(name, 7 if "transpose" in name else 6)
    if "transpose" in name:
        place = 6
    groups: Any = _get(node, place, "groups", 1)
    transposed = "transpose" in name or (name == "convolution" and repair.value(_get(node, 6, "transposed", False)))
    new = repair.groups(_get(node, 0, "input"), _get(node, 1, "weight"), groups, transposed=bool(transposed))
    if new is not groups:
        _set(node, place, "groups", new)


@repairs("scaled_dot_product_attention")
def _attention(repair: Repair, node: fx.Node) -> None:
    """The implicit scale is that of the dense head dimension."""
    query = repair.dense(node.args[0] if node.args else node.kwargs["query"])
    dim = len(query.shape) - 1
    scale = node.kwargs.get("scale")
    if scale is None and repair.is_cut(query, dim):
        node.kwargs = {**node.kwargs, "scale": float(query.shape[dim]) ** -0.5}
    elif isinstance(scale, fx.Node) and repair.value(scale) != repair.dense(scale):
        node.kwargs = {**node.kwargs, "scale": repair.dense(scale)}


@repairs("unfold_backward")
def _unfold_backward(repair: Repair, node: fx.Node) -> None:
    _set(node, 1, "input_sizes", repair.size_list(node, _get(node, 1, "input_sizes"), repair.promised(node)))


@repairs("_grouped_mm", "grouped_mm")
def _grouped_product(repair: Repair, node: fx.Node) -> None:
    """Rows must be multiples of 16 bytes: what is left of them is filled up with zeros, which are cut off again."""
    a, b = _get(node, 0, "self"), _get(node, 1, "mat2")
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        raise UnrepairableError(node, "the operands are given by name", channels_of(repair.dense(node)))
    x, weight = repair.value(a), repair.value(b)
    step = 16 // x.dtype.itemsize
    inner, outer = -weight.shape[-2] % step, -weight.shape[-1] % step
    known = repair.dense(b)
    if not (inner or outer) or not any(repair.is_cut(known, weight.ndim - place) for place in (1, 2)):
        return
    with repair.code.inserting_before(node):
        wide = repair.code.call_function(nn.functional.pad, (a, (0, inner)))
        filled = repair.code.call_function(nn.functional.pad, (b, (0, outer, 0, inner)))
        product = repair.code.call_function(cast(Any, node.target), (wide, filled, *node.args[2:]), dict(node.kwargs))
    promised = repair.promised(node)
    for made in (wide, filled, product):
        made.meta = {key: value for key, value in node.meta.items() if key in ("source", "module")}
    repair.values[wide] = nn.functional.pad(x, (0, inner))
    repair.values[filled] = nn.functional.pad(weight, (0, outer, 0, inner))
    repair.values[product] = torch.empty((*promised[:-1], promised[-1] + outer), dtype=x.dtype, device="meta")
    node.target, node.args, node.kwargs = torch.narrow, (product, -1, 0, promised[-1]), {}
