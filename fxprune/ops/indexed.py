"""Channels pass along dims that are not indexed; what reads single channels locks them, but for what a top-k chose."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.labels.classes import Ids
from fxprune.labels.factors import Factor, Labels, along, full, settle_dim, vector
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation
from fxprune.ops.call import Call
from fxprune.ops.meta import is_within, on_meta, recorded_count, recorded_shape
from fxprune.ops.parts import repair_index_select
from fxprune.ops.refit import NO_WEIGHT, NOT_FOLLOWED, Followed
from fxprune.ops.repair import Repair, set_argument
from fxprune.ops.table import adder

_aten = torch.ops.aten
_FLAGS = (torch.bool, torch.uint8)


def _as_integers(indices: Sequence[Tensor | None], ndim: int, count: int) -> list[Tensor | None]:
    """One integer tensor, or None, for each of ``ndim`` dims. A mask stands for one along each of its dims.

    Args:
        indices: of an indexing op.
        ndim: of what is indexed.
        count: how many places a mask whose values are not known selects.
    """
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in _FLAGS:
            found.append(index)
        elif index.is_meta:
            found += [torch.empty(count, dtype=torch.int64, device="meta") for _ in range(index.ndim)]
        else:
            found += index.nonzero(as_tuple=True)
    return found + [None] * (ndim - len(found))


def _index(run: Propagation, call: Call) -> Labels:
    """Indexing by tensors. Known integers and masks move labels; of unknown ones any place may be meant."""
    source, out = call["self"], call.out
    run.unread(call.name, *(index for index in call["indices"] if index is not None))
    start = _first(call["indices"])
    indices = _as_integers(call["indices"], source.ndim, out.shape[start] if out.ndim else 1)
    known = all(i is None or not i.is_meta for i in indices)
    indexed = [d for d, index in enumerate(indices) if index is not None]
    labels = _without_chosen(run, source, call["indices"])
    result = []
    for factor in labels:
        if not known or out.numel() > 1 << 24:
            mixed = run.mix(factor, indexed, "indexed by values that are not known")
            if mixed is None:
                continue
            factor = mixed
        touched = [d for d in indexed if factor.ids.shape[d] > 1]
        if touched and set(factor.varying) <= set(indexed) and len(indexed) > 1:
            run.lock(factor.ids, "channels are indexed one by one")
        result.append(_indexed(factor, source, indices, indexed))
    return tuple(result)


def _without_chosen(run: Propagation, source: Tensor, indices: Sequence[Tensor | None]) -> Labels:
    """The factors that are left where an index says which channels were chosen along its dimension."""
    labels = run.labels(source)
    given = [(dim, run.chosen(index)) for dim, index in enumerate(indices) if index is not None]
    for dim, chosen in given:
        own = next((f for f in labels if f.varying == (dim,)), None)
        if chosen is not None and own is not None and len(given) == 1:
            (run.route if run.is_parameter(source) else run.join)(own.ids.reshape(-1), chosen)
            labels = tuple(f for f in labels if f is not own)
        elif chosen is not None:
            run.lock(chosen, "they choose among what cannot be cut")
    return labels


def _first(indices: Sequence[Tensor | None]) -> int:
    """The dim of the result along which the places lie that a mask selects."""
    given = [place for place, index in enumerate(indices) if index is not None]
    return given[0] if given == list(range(given[0], given[-1] + 1)) else 0


def _laid(indices: Sequence[Tensor | None], indexed: Sequence[int]) -> tuple[int, int, bool]:
    """The first of the dims that the indices become, how many these are, and whether they stay where they were."""
    width = len(torch.broadcast_shapes(*[i.shape for i in indices if i is not None]))
    adjacent = list(indexed) == list(range(indexed[0], indexed[0] + len(indexed)))
    return indexed[0] if adjacent else 0, width, adjacent


def _indexed(factor: Factor, source: Tensor, indices: list[Tensor | None], indexed: list[int]) -> Factor:
    """Apply the index to the ids; dims that are not indexed keep their size-1 shortcut."""
    start, width, adjacent = _laid(indices, indexed)
    order = [d for d in range(source.ndim) if d not in indexed]
    place = sum(d < indexed[0] for d in order) if adjacent else 0
    if all(factor.ids.shape[d] == 1 for d in indexed):
        left = [factor.ids.shape[d] for d in order]
        ids = factor.ids.reshape([*left[:place], *[1] * width, *left[place:]])
        dim = order.index(factor.dim)
        return Factor(ids, dim if dim < place else dim + width)
    places = tuple(slice(None) if i is None else i.numpy() for i in indices)
    ids = full(factor, source.shape, indexed)[places]
    if factor.dim in indexed:
        return Factor(ids, settle_dim(ids, start + width - 1))
    dim = order.index(factor.dim)
    return Factor(ids, settle_dim(ids, dim if dim < place else dim + width))


def _index_select(run: Propagation, call: Call) -> Labels:
    dim, index = call.dims()[0], call["index"]
    run.unread(call.name, index)
    result = []
    for factor in _without_chosen(run, call.input, [None] * dim + [index]):
        if index.is_meta:
            mixed = run.mix(factor, [dim], "indexed by values that are not known")
            if mixed is not None:
                result.append(mixed)
            continue
        result.append(along(factor, dim, lambda ids: ids.take(index.numpy().reshape(-1), dim)))
    return tuple(result)


def _index_put(run: Propagation, call: Call) -> Labels:
    """What is written carries the channels of what it is written to, along the dims that are not indexed."""
    target, values = call["self"], call["values"]
    rest = target.ndim - sum(_width(i) for i in call["indices"] if i is not None)
    count = values.shape[-rest - 1] if values.ndim > rest else 1
    indices = _as_integers(call["indices"], target.ndim, count)
    indexed = [d for d, i in enumerate(indices) if i is not None]
    across = tuple(f for f in run.labels(target) if f.varying and set(f.varying) <= set(indexed))
    # of the others any place may be written to
    labels = tuple(run.collapse(f, indexed) for f in run.labels(target) if f not in across)
    masked = _one_mask(call["indices"])
    if across and masked is not None and values.numel() == 1:  # as ``where(mask, value, target)``
        place, mask = masked
        after = target.ndim - place - mask.ndim
        laid = tuple(f.laid(f.ids.reshape(f.ids.shape + (1,) * after), f.dim) for f in run.labels(mask))
        operands = [(tuple(target.shape), (*labels, *across)), ((*mask.shape, *[1] * after), laid)]
        return join_positions(run, operands, tuple(target.shape))
    run.lock_all([f for i in call["indices"] if i is not None for f in run.labels(i)], "used as an index")
    places = tuple(slice(None) if i is None else torch.empty(i.shape, dtype=i.dtype, device="meta") for i in indices)
    shape = tuple(torch.empty(target.shape, device="meta")[places].shape)
    written = run.labels(values)
    if across:
        start, width, _ = _laid(indices, indexed)
        there = [d - len(shape) + values.ndim for d in range(start, start + width)]
        run.lock_all(across, "written by index")
        mixed = [run.mix(f, [d for d in there if d >= 0], "written by index") for f in written]
        written = tuple(f for f in mixed if f is not None)
    probe = tuple(_indexed(f, target, indices, indexed) for f in labels)
    join_positions(run, [(shape, probe), (tuple(values.shape), written)], shape)
    return (*labels, *across)


def _width(index: Tensor) -> int:
    return index.ndim if index.dtype in _FLAGS else 1


def _one_mask(indices: Sequence[Tensor | None]) -> tuple[int, Tensor] | None:
    """The mask and the dim that it begins at, if nothing else is an index."""
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    return given[0] if len(given) == 1 and given[0][1].dtype in _FLAGS else None


def _along_index(run: Propagation, call: Call) -> Labels:
    """Places along ``dim`` are given by an index; along the other dims all operands lie position by position."""
    x, index, dim = call["self"], call["index"], call["dim"] % max(call["self"].ndim, 1)
    chosen = run.chosen(index)
    routed = None if chosen is None else _at_chosen(run, call, chosen, dim)
    if routed is not None:
        return routed
    operands = [x]
    if call.name.startswith("index_"):
        run.lock_all(run.labels(index), "used as an index")
    else:
        operands.append(index)
    operands += [t for t in (call.get("src"), call.get("source")) if isinstance(t, Tensor) and t.ndim == x.ndim]
    shape = [1 if d == dim else size for d, size in enumerate(operands[min(1, len(operands) - 1)].shape)]
    free = []
    for tensor in operands:
        labels = []
        mixed = [run.mix(factor, [dim], f"{call.name} along channels") for factor in run.labels(tensor)]
        for factor in (f for f in mixed if f is not None):
            if any(tensor.shape[d] != shape[d] for d in factor.varying):
                run.lock(factor.ids, f"{call.name} of a part of the channels")
            else:
                labels.append(factor)
        sizes = tuple(1 if d == dim or size != shape[d] else size for d, size in enumerate(tensor.shape))
        free.append((sizes, tuple(labels)))
    return join_positions(run, free, tuple(shape))


def _at_chosen(run: Propagation, call: Call, chosen: Ids, dim: int) -> Labels | None:
    """One entry each at the chosen channels is read or written; None, and they are locked, if there is more to it."""
    x, source = call["self"], call.get("src")
    labels = (*run.labels(x), *run.labels(call["index"]), *run.labels(source))
    own = [f for f in run.labels(x) if f.varying == (dim,)]
    if call.name not in ("gather", "scatter") or len(labels) > len(own) or (call.name == "gather" and not own):
        run.lock(chosen, f"{call.name} reads which of them were chosen")
        return None
    for factor in own:
        run.join(factor.ids.reshape(-1), chosen)
    return () if call.name == "gather" else (Factor(vector(chosen, dim, x.ndim), dim),)


def _histogram(run: Propagation, call: Call) -> Labels:
    """How often each of some channels was chosen, if its values are places of such and every place is a bin."""
    x, chosen = call.input, run.chosen(call.input)
    run.lock_all((*run.labels(x), *run.labels(call.get("weights"))), f"{call.name} reads values")
    if chosen is None:
        return ()
    every = (call.get("bins"), call.get("min"), call.get("max")) == (len(chosen), 0, len(chosen) - 1)
    if every if call.name == "histc" else call.get("weights") is None and call.out.shape == (len(chosen),):
        return run.count_chosen(call.out, chosen)
    run.lock(chosen, f"{call.name} reads which of them were chosen")
    return ()


def _masked_scatter(run: Propagation, call: Call) -> Labels:
    """Rows of ``source`` take the places of the rows that ``mask`` names: ``[*, C]`` both, and the mask ``[*, 1]``."""
    x, mask, source = call["self"], call["mask"], call["source"]
    whole = mask.ndim == 0 or mask.shape[-1] == 1 or mask.stride(-1) == 0
    rows = whole and x.ndim and source.ndim and source.shape[-1] == x.shape[-1]
    operands = []
    for tensor in (x, mask, source):
        across, shape = [], (1,) * (x.ndim - 1) + tuple(tensor.shape[-1:])
        for factor in run.labels(tensor):
            if rows and factor.varying == (tensor.ndim - 1,):
                across.append(Factor(factor.ids.reshape(shape), x.ndim - 1))
            else:
                run.lock(factor.ids, "written by a mask")
        operands.append((shape if tensor is not mask or across else (1,) * x.ndim, tuple(across)))
    return join_positions(run, operands, (1,) * (x.ndim - 1) + tuple(x.shape[-1:])) if rows else ()


def _compared(run: Propagation, call: Call) -> Labels:
    """Every position of one operand is looked up in the whole of another."""
    looked_up = call.get("elements") if call.name == "isin" else call.get("self")
    table = call.get({"isin": "test_elements", "bucketize": "boundaries"}.get(call.name, "sorted_sequence"))
    run.unread(call.name, call.get("sorter"))
    if isinstance(table, Tensor):
        run.lock_all(run.labels(table), f"{call.name} reads values")
    if not isinstance(looked_up, Tensor):
        return ()
    if isinstance(table, Tensor) and call.name == "searchsorted" and table.ndim > 1:
        run.lock_all(run.labels(looked_up), f"{call.name} reads values")
        return ()
    return run.labels(looked_up)


def _counts(run: Propagation, call: Call) -> Labels:
    """``[n]`` counts -> the places ``[sum of counts]`` that are repeated so often."""
    run.lock_all(run.labels(call.input), "used as counts")
    return ()


# -- repairs -----------------------------------------------------------------------------------------------------------


def _repair_histc(repair: Repair, node: fx.Node) -> None:
    """A bin for every place: ``histc(x, n, 0, n - 1)``."""
    (bins,) = repair.promised(node)
    if bins != repair.dense(node).shape[0]:
        set_argument(node, 1, "bins", bins)
        set_argument(node, 3, "max", bins - 1)


def _repair_bincount(repair: Repair, node: fx.Node) -> None:
    if repair.promised(node) != repair.dense(node).shape:
        set_argument(node, 2, "minlength", repair.promised(node)[0])
        node.meta["shape"] = repair.promised(node)


# -- results without values -----------------------------------------------------------------------------------------


def _nonzero(node: fx.Node | None, x: Tensor) -> Tensor:
    return on_meta((recorded_count(node, x.numel()), x.ndim))


def _masked_select(node: fx.Node | None, x: Tensor, mask: Tensor) -> Tensor:
    size = torch.broadcast_shapes(x.shape, mask.shape).numel()
    return on_meta((recorded_count(node, size),), x.dtype)


def _unique(node: fx.Node | None, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = recorded_count(node, x.numel())
    return on_meta((count,), x.dtype), on_meta(x.shape), on_meta((count,))


def _bincount(node: fx.Node | None, x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    dtype = torch.int64 if weights is None else torch.float32 if weights.dtype == torch.float32 else torch.float64
    return on_meta((recorded_count(node, max(minlength, 1)),), dtype)


def _repeated(node: fx.Node | None, counts: Tensor, output_size: int | None = None) -> Tensor:
    """In ``x.repeat_interleave(counts, dim)`` the recorded size is that along ``dim``."""
    shape = recorded_shape(node)
    dim = None if node is None else node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
    place = dim if isinstance(dim, int) else 0
    known = int(shape[place]) if shape and -len(shape) <= place < len(shape) else counts.numel()
    return on_meta((known if output_size is None else output_size,))


def _index_places(node: fx.Node | None, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Masks among the indices select as many places each as the recorded result has."""
    shape = recorded_shape(node)
    given = [place for place, index in enumerate(indices) if index is not None]
    adjacent = given == list(range(given[0], given[-1] + 1))
    place = given[0] if adjacent else 0
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    count = int(shape[place]) if shape and len(shape) > place else masks[0].numel()
    whole: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            whole += [on_meta((count,)) for _ in range(index.ndim)]
        else:
            whole.append(None if index is None else index.to("meta"))
    result: Tensor = _aten.index.Tensor(x.to("meta"), whole)
    return result


def _packed(run: Propagation, call: Call) -> list[Labels]:
    """Steps of all samples one behind the other, as many of each as it has: features pass."""
    result = []
    for factor in run.labels(call["input"]):
        if {0, 1}.isdisjoint(factor.varying):
            result.append(factor.laid(factor.ids[0], factor.dim - 1))
        else:
            run.lock(factor.ids, "packed by lengths that are not known")
    return [tuple(result), ()]


def _packed_steps(node: fx.Node | None, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """As many steps as were recorded, of inputs of other sizes all; how many samples have each, C code reads.

    Which steps the lengths leave out does not matter here.
    """
    users = () if node is None else node.users
    shapes = {user.args[1]: recorded_shape(user) or () for user in users if user.target is operator.getitem}
    batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    count = batch * steps
    if shapes.get(0) and shapes.get(1):
        (recorded, *_), (last,) = shapes[0], shapes[1]
        if last <= steps and batch + last - 1 <= recorded <= batch * last:
            count, steps = recorded, last
    left, sizes = count - steps, [1] * steps
    for step in range(steps):
        sizes[step] += min(batch - 1, left)
        left -= sizes[step] - 1
    return x.new_empty((count, *x.shape[2:])), torch.tensor(sizes)


def _equal(node: fx.Node | None, a: Tensor, b: Tensor) -> bool | None:
    """``istft`` looks whether its window leaves a gap, and refuses if it does: the recorded one did not."""
    return False if node is not None and "istft" in str(node.target) else None


# -- what the recorder may not take on trust --------------------------------------------------------------------------


def _index_is_refused(x: Tensor, indices: list[Tensor | None]) -> bool:
    """``x[indices[0], indices[1], ...]``"""
    return not all(i is None or is_within(i, size, -size) for i, size in zip(indices, x.shape, strict=False))


# -- the ops -----------------------------------------------------------------------------------------------------------

_op = adder(__name__, mask="whole rows are picked or written: what a channel holds stays its own", refit=NOT_FOLLOWED)

_op("index", label=_index, moves=True, takes="anything", refuses=_index_is_refused, without_values=_index_places,
    refit=Followed.MOVED)  # fmt: skip
_op("_unsafe_index", label=_index, moves=True, refit=Followed.MOVED)
_op("index_select", label=_index_select, moves=True, repair=repair_index_select, refit=Followed.MOVED)
_op("index_put", "_unsafe_index_put", "_index_put_impl", label=_index_put)
_op("gather", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_reduce", "index_fill",
    label=_along_index)  # fmt: skip
_op("masked_scatter", label=_masked_scatter)
_op("isin", "bucketize", "searchsorted", label=_compared)
_op("repeat_interleave", label=_counts, without_values=_repeated, repair="an index and a count give its size")

_op("_pack_padded_sequence", label=_packed, moves=True, without_values=_packed_steps, mask="it moves steps",
    repair="lengths are no sizes")  # fmt: skip

_read = adder(__name__, reads_values=True, mask="its channels stay", cost="it compares and counts", refit=NO_WEIGHT)

_read(
    "one_hot", "_local_scalar_dense", "_assert_async", "multi_margin_loss", "multilabel_margin_loss_forward",
    "_linalg_check_errors",
)  # fmt: skip
_read("nll_loss_forward", "nll_loss2d_forward", repair="the number of a class")
_read("is_same_size", "sym_size", moves=True)
_read("equal", without_values=_equal)
_read("nonzero", without_values=_nonzero)
_read("masked_select", without_values=_masked_select)
_read("_unique2", "unique_consecutive", without_values=_unique)
_read("histc", label=_histogram, repair=_repair_histc)
_read("bincount", label=_histogram, without_values=_bincount, repair=_repair_bincount)
