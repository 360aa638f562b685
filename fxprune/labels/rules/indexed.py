"""Ops that read or write at places given by an index tensor or a mask: channels pass along the dims not indexed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.labels.factors import Factor, Labels, along, full, settle_dim
from fxprune.labels.rules.pointwise import join_positions
from fxprune.labels.rules.table import Call, rule

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation

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


@rule("index", "_unsafe_index")
def _index(run: Propagation, call: Call) -> Labels:
    """Indexing by tensors. Known integers and masks move labels; unknown ones lock the dimension they index."""
    source, out = call["self"], call.out
    start = _first(call["indices"])
    indices = _as_integers(call["indices"], source.ndim, out.shape[start] if out.ndim else 1)
    known = all(i is None or not i.is_meta for i in indices)
    indexed = [d for d, index in enumerate(indices) if index is not None]
    result = []
    for factor in run.labels(source):
        touched = [d for d in indexed if factor.ids.shape[d] > 1]
        if touched and (not known or out.numel() > 1 << 24):
            run.lock(factor.ids, "indexed by values that are not known")
            continue
        if touched and set(factor.varying) <= set(indexed) and len(indexed) > 1:
            run.lock(factor.ids, "channels are indexed one by one")
        result.append(_indexed(factor, source, indices, indexed))
    return tuple(result)


def _first(indices: Sequence[Tensor | None]) -> int:
    """The dim of the result along which the places lie that a mask selects."""
    given = [place for place, index in enumerate(indices) if index is not None]
    return given[0] if given == list(range(given[0], given[-1] + 1)) else 0


def _indexed(factor: Factor, source: Tensor, indices: list[Tensor | None], indexed: list[int]) -> Factor:
    """Apply the index to the ids; dims that are not indexed keep their size-1 shortcut."""
    width = len(torch.broadcast_shapes(*[i.shape for i in indices if i is not None]))
    adjacent = indexed == list(range(indexed[0], indexed[0] + len(indexed)))
    start = indexed[0] if adjacent else 0
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


@rule("index_select")
def _index_select(run: Propagation, call: Call) -> Labels:
    dim, index = call.dims()[0], call["index"]
    result = []
    for factor in run.labels(call.input):
        if factor.ids.shape[dim] > 1 and index.is_meta:
            run.lock(factor.ids, "indexed by values that are not known")
            continue
        result.append(along(factor, dim, lambda ids: ids.take(index.numpy().reshape(-1), dim)))
    return tuple(result)


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def _index_put(run: Propagation, call: Call) -> Labels:
    """What is written carries the channels of what it is written to, along the dims that are not indexed."""
    target, values = call["self"], call["values"]
    labels = run.labels(target)
    rest = target.ndim - sum(_width(i) for i in call["indices"] if i is not None)
    count = values.shape[-rest - 1] if values.ndim > rest else 1
    indices = _as_integers(call["indices"], target.ndim, count)
    indexed = [d for d, i in enumerate(indices) if i is not None]
    if any(f.ids.shape[d] > 1 for f in labels for d in indexed):
        masked = _one_mask(call["indices"])
        if masked is None or values.numel() > 1:
            run.lock_all((*labels, *run.labels(values)), "written by index")
            return labels
        place, mask = masked  # as ``where(mask, value, target)``
        after = target.ndim - place - mask.ndim
        laid = tuple(f.laid(f.ids.reshape(f.ids.shape + (1,) * after), f.dim) for f in run.labels(mask))
        operands = [(tuple(target.shape), labels), ((*mask.shape, *[1] * after), laid)]
        return join_positions(run, operands, tuple(target.shape))
    run.lock_all([f for i in call["indices"] if i is not None for f in run.labels(i)], "used as an index")
    places = tuple(slice(None) if i is None else torch.empty(i.shape, dtype=i.dtype, device="meta") for i in indices)
    shape = tuple(torch.empty(target.shape, device="meta")[places].shape)
    probe = tuple(_indexed(f, target, indices, indexed) for f in labels)
    join_positions(run, [(shape, probe), (tuple(values.shape), run.labels(values))], shape)
    return labels


def _width(index: Tensor) -> int:
    return index.ndim if index.dtype in _FLAGS else 1


def _one_mask(indices: Sequence[Tensor | None]) -> tuple[int, Tensor] | None:
    """The mask and the dim that it begins at, if nothing else is an index."""
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    return given[0] if len(given) == 1 and given[0][1].dtype in _FLAGS else None


@rule("gather", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_reduce", "index_fill")
def _along_index(run: Propagation, call: Call) -> Labels:
    """Places along ``dim`` are given by an index; along the other dims all operands lie position by position."""
    x, index, dim = call["self"], call["index"], call["dim"] % max(call["self"].ndim, 1)
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
        for factor in run.labels(tensor):
            if factor.ids.shape[dim] > 1:
                run.lock(factor.ids, f"{call.name} along channels")
            elif any(tensor.shape[d] != shape[d] for d in factor.varying):
                run.lock(factor.ids, f"{call.name} of a part of the channels")
            else:
                labels.append(factor)
        sizes = tuple(1 if d == dim or size != shape[d] else size for d, size in enumerate(tensor.shape))
        free.append((sizes, tuple(labels)))
    return join_positions(run, free, tuple(shape))


@rule("masked_scatter")
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


@rule("isin", "bucketize", "searchsorted")
def _compared(run: Propagation, call: Call) -> Labels:
    """Every position of one operand is looked up in the whole of another."""
    looked_up = call.get("elements") if call.name == "isin" else call.get("self")
    table = call.get({"isin": "test_elements", "bucketize": "boundaries"}.get(call.name, "sorted_sequence"))
    if isinstance(table, Tensor):
        run.lock_all(run.labels(table), f"{call.name} reads values")
    if not isinstance(looked_up, Tensor):
        return ()
    if isinstance(table, Tensor) and call.name == "searchsorted" and table.ndim > 1:
        run.lock_all(run.labels(looked_up), f"{call.name} reads values")
        return ()
    return run.labels(looked_up)


@rule(
    "one_hot", "nonzero", "_local_scalar_dense", "equal", "is_same_size", "_assert_async", "sym_size", "_unique2",
    "unique_consecutive", "masked_select", "bincount", "histc", "nll_loss_forward", "nll_loss2d_forward",
    "multi_margin_loss", "multilabel_margin_loss_forward", "_linalg_check_errors",
)  # fmt: skip
def _no_labels(run: Propagation, call: Call) -> list[Any]:
    run.lock_all([f for t in call.tensors for f in run.labels(t)], f"{call.name} reads values")
    return [()] * len(call.outputs)


@rule("repeat_interleave")
def _counts(run: Propagation, call: Call) -> Labels:
    """``[n]`` counts -> the places ``[sum of counts]`` that are repeated so often."""
    run.lock_all(run.labels(call.input), "used as counts")
    return ()
