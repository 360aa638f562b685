"""Parts of a dimension: the labels' same part, which numbers name."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.labels.factors import Factor, Labels, along, cut_sizes, narrow, without
from fxprune.labels.propagation import Propagation
from fxprune.labels.records import TensorLabels, channels_of
from fxprune.ops.call import Call
from fxprune.ops.refit import Followed
from fxprune.ops.repair import LEFT_ALONE, Repair, UnevenError, UnrepairableError, new_constant, set_argument
from fxprune.ops.table import adder, argument, base_name
from fxprune.recording.randomness import draws


def _select(run: Propagation, call: Call) -> Labels:
    dim, result = call.dims()[0], []
    for factor in run.labels(call.input):
        ids = factor.ids
        if ids.shape[dim] > 1:
            ids = narrow(ids, dim, call["index"] % ids.shape[dim], 1)
            if factor.varying == (dim,):
                run.lock(ids, "a single channel is picked")
                continue
        result.append(without(Factor(ids, factor.dim), [dim]))
    return tuple(result)


def _slice(run: Propagation, call: Call) -> Labels:
    dim = call.dims()[0]
    window = slice(call["start"], call["end"], call["step"])
    index = tuple(window if d == dim else slice(None) for d in range(call.input.ndim))
    return _picked(run, [along(f, dim, lambda ids: ids[index]) for f in run.labels(call.input)], call.out)


def _picked(run: Propagation, labels: Sequence[Factor], out: Tensor) -> Labels:
    """Part of a dimension. Where it is one channel, that one must stay: the dimension would be empty."""
    for factor in labels:
        if factor.ids.size == 1 and out.shape[factor.dim] == 1:
            run.lock(factor.ids, "a single channel is picked")
    return tuple(labels)


def _split(run: Propagation, call: Call) -> list[Labels]:
    dim, start, result = call.dims()[0], 0, []
    for out in call.outputs:
        size, first = out.shape[dim], start
        labels = [along(f, dim, lambda ids: narrow(ids, dim, first, size)) for f in run.labels(call.input)]  # noqa: B023
        result.append(_picked(run, labels, out))
        start += size
    sizes = [out.shape[dim] for out in call.outputs]
    for size in set(sizes):
        run.parts([labels for labels, own in zip(result, sizes, strict=True) if own == size], dim)
    return result


def _unbind(run: Propagation, call: Call) -> list[Labels]:
    dim = call.dims()[0]
    result = []
    for index in range(len(call.outputs)):
        labels = []
        for factor in run.labels(call.input):
            ids = factor.ids
            if ids.shape[dim] > 1:
                ids = narrow(ids, dim, index, 1)
                if factor.varying == (dim,):
                    run.lock(ids, "a single channel is picked")
                    continue
            labels.append(without(Factor(ids, factor.dim), [dim]))
        result.append(tuple(labels))
    return result


# -- repairs -----------------------------------------------------------------------------------------------------------


def _repair_split(repair: Repair, node: fx.Node) -> None:
    outputs = [o for o in repair.dense(node) if isinstance(o, TensorLabels)]
    dim = repair.value(argument(node, 2, "dim", 0))
    source: Any = node.args[0]
    sizes = [cut_sizes(o.shape, o.labels, repair.keep)[dim] for o in outputs]
    if sizes == [o.shape[dim] for o in outputs]:
        repair.freeze(node)
        return
    if base_name(node).endswith("chunk"):
        count = repair.value(argument(node, 1, "chunks"))
        if [t.shape[dim] for t in repair.value(source).chunk(count, dim)] == sizes:
            return
    if 0 in sizes:
        raise UnrepairableError(node, "a part of a split would be empty", channels_of(repair.dense(node)))
    if node.target in ("split", torch.split):  # as it is written, with other numbers
        said: Any = argument(node, 1, "split_size", node.kwargs.get("split_size_or_sections"))
        if isinstance(repair.value(said), int):
            even = all(size == sizes[0] for size in sizes[:-1]) and sizes[-1] <= sizes[0]
            said = repair.sizes(node, [said], sizes[:1])[0] if even else sizes
        else:
            said = repair.size_list(node, said, sizes)
        node.args, node.kwargs = (source, said, dim), {}
        return
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


def _is_chosen(repair: Repair, index: Any) -> bool:
    """Whether the run itself says which of the channels that are left it picks."""
    known = repair.dense(index)
    return isinstance(known, TensorLabels) and known.chosen


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
            elif isinstance(item, fx.Node) and _is_chosen(repair, item):
                pass  # of those that are left
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


def _repair_item(repair: Repair, node: fx.Node) -> None:
    known = repair.dense(node.args[0])
    if isinstance(known, TensorLabels):
        node.args = (node.args[0], _cut_item(repair, node, known, node.args[1]), *node.args[2:])


def _repair_narrow(repair: Repair, node: fx.Node) -> None:
    known, dim = repair.dense(node.args[0]), repair.value(argument(node, 1, "dim"))
    start, length = repair.dense(argument(node, 2, "start")), repair.dense(argument(node, 3, "length"))
    dim %= len(known.shape)
    if repair.is_cut(known, dim):
        window = _cut_slice(repair, node, known, dim, slice(start, start + length))
        stop = window.stop if window.stop is not None else repair.value(node.args[0]).shape[dim]
        set_argument(node, 2, "start", window.start or 0)
        set_argument(node, 3, "length", stop - (window.start or 0))
    else:
        repair.freeze(node)


def _repair_select(repair: Repair, node: fx.Node) -> None:
    known, dim = repair.dense(node.args[0]), repair.value(argument(node, 1, "dim"))
    dim %= len(known.shape)
    if repair.is_cut(known, dim):
        index = repair.dense(argument(node, 2, "index")) % known.shape[dim]
        set_argument(node, 2, "index", int(repair.mask(known, dim, node)[:index].sum()))
    else:
        set_argument(node, 2, "index", repair.frozen(node, argument(node, 2, "index")))


def repair_index_select(repair: Repair, node: fx.Node) -> None:
    known, dim = repair.dense(node.args[0]), repair.value(argument(node, 1, "dim"))
    dim %= len(known.shape)
    if not repair.is_cut(known, dim) or _is_chosen(repair, argument(node, 2, "index")):
        return
    set_argument(node, 2, "index", _cut_index(repair, node, known, dim, argument(node, 2, "index")))


def _constant(repair: Repair, index: Any) -> Tensor | None:
    """The values of a tensor that is held, or made of numbers alone."""
    if not isinstance(index, fx.Node):
        return None
    if index.op == "get_attr":
        held: Tensor = operator.attrgetter(str(index.target))(repair.module)
        return held
    function: Any = index.target
    if index.op != "call_function" or index.all_input_nodes or draws(function, index.args, index.kwargs):
        return None
    made = function(*index.args, **index.kwargs)
    return made if isinstance(made, Tensor) else None


def _cut_index(repair: Repair, node: fx.Node, known: TensorLabels, dim: int, index: Any) -> fx.Node:
    """A constant that picks the same channels from the cut dimension, in the place of one, of places or of flags."""
    dense_index = _constant(repair, index)
    if dense_index is None:
        raise UnrepairableError(node, "channels are picked by a computed index", channels_of(known))
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
        if index.op == "get_attr" and str(index.target) in repair.module._non_persistent_buffers_set:
            delattr(repair.module, str(index.target))
    return constant


# -- the ops -----------------------------------------------------------------------------------------------------------

_op = adder(__name__, mask="positions are left out: what a channel holds stays its own", refit=Followed.MOVED)

_op("select", label=_select, moves=True, parts=True, repair=_repair_select)
_op("select_copy", label=_select, moves=True, parts=True, repair=_repair_select)
_op("slice", "slice_copy", label=_slice, moves=True, parts=True, repair=LEFT_ALONE)
_op("split", label=_split, moves=True, parts=True, repair=_repair_split, many=True)
_op("split_with_sizes", "unsafe_split_with_sizes", label=_split, moves=True, parts=True, repair=_repair_split)
_op("unsafe_split", "chunk", "unsafe_chunk", "tensor_split", label=_split, moves=True, repair=_repair_split, many=True)
_op("unbind", label=_unbind, moves=True, many=True)

# Made of other ops; a recorded graph calls them.
_call = adder(__name__)
_call("hsplit", "vsplit", "dsplit", many=True, repair=LEFT_ALONE)
_call("narrow", repair=_repair_narrow)
_call("python::getitem", "python::setitem", repair=_repair_item)
