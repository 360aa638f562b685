"""Contractions with a parameter as plain matrix products, one small function per aten op.

Whatever the op, it is ``outputs[row] = inputs[row] @ matrix + vector`` for ``groups`` matrices side by side: of a
convolution a row is one position of the kernel and ``inputs`` what lies under it there. So whoever has rows of both
sides can solve for the matrix, and needs to know no op.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.ops.table import op_name

Rows = Callable[[Tensor], Tensor]
Take = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """One call of a contraction with a weight.

    ``weight``, ``bias``: as the op was given them; ``rows``: how many there are. ``inputs(index)``: what the weight
    meets in these rows, ``[groups, R, K]``. ``outputs(out, index)``: of a tensor like the op's result, the same rows,
    ``[groups, R, O]``. ``matrix(t)``: of a tensor like the weight, as ``[groups, K, O]``; ``vector(t)``: of one like
    the bias, as ``[groups, O]``. Entries are only moved, so both are of use for numbers of entries too.
    """

    weight: Tensor
    bias: Tensor | None
    rows: int
    inputs: Rows
    outputs: Take
    matrix: Rows
    vector: Rows


Arguments = Mapping[str, Any]
Reader = Callable[[Arguments, Tensor, bool], "Product | None"]
_READERS: dict[str, tuple[tuple[str, str], Reader]] = {}
NORMS = frozenset(
    "native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm batch_norm "
    "_batch_norm_with_update".split()
)
"""Norms with statistics that were measured: ``input``, ``weight``, ``running_mean``, ``running_var``, ``eps``."""


def _reads(first: str, second: str, *names: str) -> Callable[[Reader], Reader]:
    """A reader of these ops, which multiply these two arguments. It is told whether the weight is the second."""

    def register(reader: Reader) -> Reader:
        for name in names:
            if name in _READERS:
                raise ValueError(f"two readers for aten.{name}")
            _READERS[name] = (first, second), reader
        return reader

    return register


def operands(func: Any) -> tuple[str, str] | None:
    """The arguments that an aten op multiplies and contracts, or None."""
    known = _READERS.get(op_name(func)) if func.namespace == "aten" else None
    return None if known is None else known[0]


def arguments_of(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an aten call by the names of its schema, with defaults."""
    schema = func._schema.arguments
    known = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**known, **{a.name: v for a, v in zip(schema, args, strict=False)}, **kwargs}


def product_of(func: Any, arguments: Arguments, out: Tensor, weight: str) -> Product | None:
    """The call as a product with its argument ``weight``; None where it cannot be read as one."""
    (_, second), reader = _READERS[op_name(func)]
    return reader(arguments, out, weight == second)


def _one(x: Tensor) -> Tensor:
    return x.unsqueeze(0)


def _plain_sum(a: Mapping[str, Any]) -> bool:
    return bool(a.get("alpha", 1) == 1 and a.get("beta", 1) == 1)


def _columns(t: Tensor) -> Tensor:
    """A vector as one column."""
    return t if t.ndim > 1 else t.unsqueeze(1)


@_reads("self", "mat2", "mm")
@_reads("mat1", "mat2", "addmm")
@_reads("self", "vec", "mv")
@_reads("mat", "vec", "addmv")
def _matrices(a: Arguments, out: Tensor, weight_is_second: bool) -> Product | None:
    """``x [R, K] @ w [K, O]``, or ``w [O, K] @ x [K, R]``; a vector in the place of the second is one column."""
    first = next(a[name] for name in ("mat1", "mat", "self") if name in a)
    second = a["mat2"] if "mat2" in a else a["vec"]
    bias = a["self"] if a["self"] is not first else None
    if not _plain_sum(a):
        return None
    if weight_is_second:
        return Product(
            second, bias, len(first), lambda i: _one(first[i]), lambda y, i: _one(_columns(y)[i]),
            lambda w: _one(_columns(w)), lambda b: _columns(b.expand(out.shape))[-1:],
        )  # fmt: skip
    x = _columns(second).transpose(0, 1)
    return Product(
        first, bias, len(x), lambda i: _one(x[i]), lambda y, i: _one(_columns(y).transpose(0, 1)[i]),
        lambda w: _one(w.transpose(0, 1)), lambda b: _one(_columns(b.expand(out.shape))[:, -1]),
    )  # fmt: skip


@_reads("self", "mat2", "bmm")
@_reads("batch1", "batch2", "baddbmm")
def _batched(a: Arguments, out: Tensor, weight_is_second: bool) -> Product | None:
    """``x [g, R, K] @ w [g, K, O]`` and ``w [g, O, K] @ x [g, K, R]``."""
    first, second = (a["batch1"], a["batch2"]) if "batch1" in a else (a["self"], a["mat2"])
    if not _plain_sum(a):
        return None
    x, w = (first, second) if weight_is_second else (second.transpose(1, 2), first)

    def turn(t: Tensor) -> Tensor:
        return t if weight_is_second else t.transpose(1, 2)

    return Product(
        w, a["self"] if "batch1" in a else None, x.shape[1], lambda i: x[:, i], lambda y, i: turn(y)[:, i], turn,
        lambda b: turn(b.expand(out.shape))[:, -1],
    )  # fmt: skip


@_reads("input", "weight", "linear")
def _linear(a: Arguments, out: Tensor, weight_is_second: bool) -> Product | None:
    """``x [*, K] @ w [O, K]``."""
    x: Tensor = a["input"]
    weight: Tensor = a["weight"]
    if not weight_is_second:
        return None
    flat = x.reshape(-1, x.shape[-1])
    return Product(
        weight, a["bias"], len(flat), lambda i: _one(flat[i]), lambda y, i: _one(y.reshape(-1, y.shape[-1])[i]),
        lambda w: _one(w.transpose(0, 1)), _one,
    )  # fmt: skip


@_reads("input", "weight", "convolution", "_convolution", "convolution_overrideable")
def _convolution(a: Arguments, out: Tensor, weight_is_second: bool) -> Product | None:
    """``x [N, C_in, *]``, ``w [C_out, C_in / g, *]`` or transposed ``[C_in, C_out / g, *]``; a row is an output."""
    x: Tensor = a["input"]
    weight: Tensor = a["weight"]
    groups, transposed = int(a["groups"]), bool(a["transposed"])
    if not weight_is_second or x.ndim != weight.ndim:
        return None
    kernel, per_in = tuple(weight.shape[2:]), x.shape[1] // groups
    window = _Window(tuple(x.shape), tuple(out.shape), kernel, a, transposed)

    def inputs(index: Tensor) -> Tensor:
        found = window.under(x, index)  # [R, k, C_in]
        return found.view(*found.shape[:2], groups, per_in).permute(2, 0, 3, 1).flatten(2)

    def outputs(y: Tensor, index: Tensor) -> Tensor:
        return window.at(y, index).view(len(index), groups, -1).transpose(0, 1)

    def matrix(w: Tensor) -> Tensor:
        if transposed:  # [C_in, O, k] -> [g, C_in / g * k, O]
            return w.reshape(groups, per_in, w.shape[1], -1).transpose(2, 3).flatten(1, 2)
        return w.reshape(groups, -1, per_in, math.prod(kernel)).permute(0, 2, 3, 1).flatten(1, 2)

    return Product(
        weight, a["bias"], len(x) * math.prod(out.shape[2:]), inputs, outputs, matrix,
        lambda b: b.reshape(groups, -1),
    )  # fmt: skip


class _Window:
    """What lies under the kernel of a convolution, of any number of dimensions, at some of its outputs."""

    def __init__(self, shape: tuple[int, ...], out: tuple[int, ...], kernel: tuple[int, ...], a: Any, transposed: bool):
        self._shape, self._out = shape, out
        axes = []
        for d, size in enumerate(kernel):
            stride, padding, dilation = (_of_dim(a[name], d) for name in ("stride", "padding", "dilation"))
            at = torch.arange(out[2 + d])[:, None]
            step = torch.arange(size)[None] * dilation
            if transposed:
                place = at + padding - step
                good = (place % stride == 0) & (place >= 0) & (place < stride * shape[2 + d])
                place = torch.div(place, stride, rounding_mode="floor")
            else:
                place = at * stride - padding + step
                good = (place >= 0) & (place < shape[2 + d])
            axes.append((place, good))
        self._axes = axes  # per dim: [outputs, kernel]

    def under(self, x: Tensor, index: Tensor) -> Tensor:
        """``[R, k, C]`` of the rows ``index``, zeros where the kernel hangs over."""
        count = math.prod(self._out[2:])
        sample, position = index.cpu() // count, index.cpu() % count
        place, good = sample[:, None], torch.ones(len(index), 1, dtype=torch.bool)
        coordinates = _unravel(position, self._out[2:])
        for at, size, (places, inside) in zip(coordinates, self._shape[2:], self._axes, strict=True):
            place = (place[:, :, None] * size + places[at][:, None, :]).flatten(1)
            good = (good[:, :, None] & inside[at][:, None, :]).flatten(1)
        last = x.movedim(1, -1).reshape(-1, x.shape[1])
        found = last[torch.where(good, place, 0).reshape(-1).to(x.device)].view(len(index), -1, x.shape[1])
        return found if bool(good.all()) else found * good[:, :, None].to(found)

    def at(self, y: Tensor, index: Tensor) -> Tensor:
        """``[R, C]`` of a tensor like the output."""
        count = math.prod(self._out[2:])
        if len(index) == len(y) * count:  # all of them, in order
            return y.movedim(1, -1).reshape(-1, y.shape[1])
        return y.reshape(*y.shape[:2], count)[index // count, :, index % count]


def _of_dim(value: Any, dim: int) -> int:
    return int(value) if isinstance(value, int) else int(value[dim if len(value) > 1 else 0])


def _unravel(index: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    strides = list(itertools.accumulate(reversed(sizes), lambda a, b: a * b, initial=1))
    return [(index // stride) % size for size, stride in zip(sizes, reversed(strides[:-1]), strict=True)]
