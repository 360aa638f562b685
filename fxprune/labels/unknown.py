"""Ops whose results have as many entries as the values decide: without values the recorded run says how many.

``nonzero``, a mask as an index, ``unique``, ``repeat_interleave``: PyTorch cannot tell their shapes on meta tensors.
The node that was recorded knows its own shape, or those of the nodes that take its results apart. Only the one size
that is not known is read there; all others follow from the operands, so it is right in a pruned graph too. Where nobody
knows, it is the largest that is possible.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten


def result_without_values(node: fx.Node | None, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What ``func(*args, **kwargs)`` is on meta tensors, or None if it is no op of this kind."""
    made = _MADE.get(func)
    return None if made is None else made(node, *args, **kwargs)


def _meta(shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _shape(node: fx.Node | None) -> Sequence[int] | None:
    return None if node is None else node.meta.get("shape")


def _count(node: fx.Node | None, most: int) -> int:
    """The first size of what the node gives, or of a part of it, or of what it picks as an index."""
    if node is None:
        return most
    shapes = [_shape(node), *(_shape(user) for user in node.users if user.target in (operator.getitem, getattr))]
    return next((int(shape[0]) for shape in shapes if shape), most)


def _nonzero(node: fx.Node | None, x: Tensor) -> Tensor:
    return _meta((_count(node, x.numel()), x.ndim))


def _masked_select(node: fx.Node | None, x: Tensor, mask: Tensor) -> Tensor:
    size = torch.broadcast_shapes(x.shape, mask.shape).numel()
    return _meta((_count(node, size),), x.dtype)


def _unique(node: fx.Node | None, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = _count(node, x.numel())
    return _meta((count,), x.dtype), _meta(x.shape), _meta((count,))


def _unique_dim(node: fx.Node | None, x: Tensor, dim: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape, size = _shape(node), x.shape[dim]
    count = int(shape[dim]) if shape and len(shape) == x.ndim else size
    found = [count if d == dim % x.ndim else n for d, n in enumerate(x.shape)]
    return _meta(found, x.dtype), _meta((size,)), _meta((count,))


def _bincount(node: fx.Node | None, x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    dtype = torch.int64 if weights is None else torch.float32 if weights.dtype == torch.float32 else torch.float64
    return _meta((_count(node, max(minlength, 1)),), dtype)


def _repeat(node: fx.Node | None, counts: Tensor, output_size: int | None = None) -> Tensor:
    """In ``x.repeat_interleave(counts, dim)`` the recorded size is that along ``dim``."""
    shape = _shape(node)
    dim = None if node is None else node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
    place = dim if isinstance(dim, int) else 0
    known = int(shape[place]) if shape and -len(shape) <= place < len(shape) else counts.numel()
    return _meta((known if output_size is None else output_size,))


def _index(node: fx.Node | None, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Masks among the indices select as many places each as the recorded result has."""
    shape = _shape(node)
    given = [place for place, index in enumerate(indices) if index is not None]
    adjacent = given == list(range(given[0], given[-1] + 1))
    place = given[0] if adjacent else 0
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    count = int(shape[place]) if shape and len(shape) > place else masks[0].numel()
    whole: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            whole += [_meta((count,)) for _ in range(index.ndim)]
        else:
            whole.append(None if index is None else index.to("meta"))
    result: Tensor = _aten.index.Tensor(x.to("meta"), whole)
    return result


def _equal(node: fx.Node | None, a: Tensor, b: Tensor) -> bool | None:
    """``istft`` looks whether its window leaves a gap, and refuses if it does: the recorded one did not."""
    return False if node is not None and "istft" in str(node.target) else None


_MADE: dict[Any, Callable[..., Any]] = {
    _aten.nonzero.default: _nonzero,
    _aten.masked_select.default: _masked_select,
    _aten._unique2.default: _unique,
    _aten.unique_consecutive.default: _unique,
    _aten.unique_dim.default: _unique_dim,
    _aten.bincount.default: _bincount,
    _aten.repeat_interleave.Tensor: _repeat,
    _aten.index.Tensor: _index,
    _aten.equal.default: _equal,
}
