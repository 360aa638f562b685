"""What an op is for the refit of weights: one of these, or a reason why none, is in ``Op.refit``.

A contraction with a weight, whatever the op, is ``outputs[row] = inputs[row] @ matrix + vector`` for ``groups``
matrices side by side: of a convolution a row is one position of the kernel, and ``inputs`` what lies under it there. So
whoever has rows of both sides can solve for the matrix, and needs to know no op.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

Rows = Callable[[Tensor], Tensor]
Take = Callable[[Tensor, Tensor], Tensor]
Arguments = Mapping[str, Any]


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


@dataclass(frozen=True)
class Contraction:
    """An op that multiplies the two arguments ``operands`` and sums, whichever of them is the weight.

    ``read``: ``(arguments, out, weight) -> product``: a call with all its arguments by name, what it gave, and the name
    of the argument that is the weight; None where the call is no plain product with it.
    """

    operands: tuple[str, str]
    read: Callable[[Arguments, Tensor, str], Product | None]


@dataclass(frozen=True)
class Statistics:
    """A norm of ``[N, C, *]`` with statistics that were measured: the names of its arguments."""

    input: str = "input"
    mean: str = "running_mean"
    var: str = "running_var"
    scale: str = "weight"
    shift: str = "bias"
    eps: str = "eps"
    training: str = "training"

    @property
    def vectors(self) -> tuple[str, ...]:
        """The arguments that scale or shift channels."""
        return self.scale, self.shift


@dataclass(frozen=True)
class Affine:
    """Scales or shifts channels by its arguments ``vectors``, and there is nothing to solve for: a norm whose
    statistics are those of its input, a multiplication."""

    vectors: tuple[str, ...] = ("weight", "bias")


@dataclass(frozen=True)
class Addition:
    """Adds two tensors position by position: what one of them lacks, a weight that makes the other can make up for."""

    vectors: tuple[str, ...] = ("self", "other")


class Followed(Enum):
    """How entries of parameters are followed through an op, of which all operands hold some.

    ``COPIED``: the result holds those of the first operand, position by position. ``MOVED``: run on the numbers of the
    entries, the op tells where they are.
    """

    COPIED = "copied"
    MOVED = "moved"


Refit = Contraction | Statistics | Affine | Addition | Followed | str

EVERY_POSITION = "every position by itself: there is nothing to solve for"
NOT_FOLLOWED = "a weight that comes out of it is left alone"
NO_WEIGHT = "it takes no weight"


def product(first: str, second: str, axes: str, bias: str = "", ones: Sequence[str] = ()) -> Contraction:
    """The product of the arguments ``first`` and ``second``, with the axes as in ``torch.einsum``.

    Args:
        first: the name of one operand.
        second: of the other.
        axes: such as ``"...k,ok->...o"``; dots stand for any leading dims of one operand and the result.
        bias: the name of what is added, of a shape that expands to the result's.
        ones: the names of factors, with any but 1 it is no plain product.
    """
    given, _, out_axes = axes.partition("->")
    first_axes, second_axes = given.split(",")

    def read(a: Arguments, out: Tensor, weight: str) -> Product | None:
        if any(a.get(name, 1) != 1 for name in ones):
            return None
        names = {first: first_axes, second: second_axes}
        (other,) = names.keys() - {weight}
        w, x, of_w, of_x = a[weight], a[other], names[weight], names[other]
        of_w, of_x, result = (_spelt(s, t.ndim) for s, t in ((of_w, w), (of_x, x), (out_axes, out)))
        shared = [axis for axis in of_w if axis in of_x]
        blocks, inner = [[axis for axis in shared if (axis in result) == kept] for kept in (True, False)]
        rows, outputs = [[axis for axis in result if axis in own and axis not in shared] for own in (of_x, of_w)]
        left = [axis for axis in result if axis not in rows]
        last = tuple(-1 if axis in rows else slice(None) for axis in result)
        return Product(
            w, a[bias] if bias else None, math.prod(x.shape[of_x.index(axis)] for axis in rows),
            lambda index: _laid(x, of_x, blocks, rows, inner)[:, index],
            lambda y, index: _laid(y, result, blocks, rows, outputs)[:, index],
            lambda t: _laid(t, of_w, blocks, inner, outputs),
            lambda b: _laid(b.expand(out.shape)[last], left, blocks, outputs),
        )  # fmt: skip

    return Contraction((first, second), read)


def _spelt(axes: str, ndim: int) -> str:
    return axes.replace("...", "ABCDEFGHIJKLMNOP"[: ndim - len(axes) + 3])


def _laid(t: Tensor, axes: Sequence[str], *parts: Sequence[str]) -> Tensor:
    """The tensor with one dimension for all axes of each part."""
    order = [[axes.index(axis) for axis in part] for part in parts]
    return t.permute([d for dims in order for d in dims]).reshape([math.prod(t.shape[d] for d in ds) for ds in order])


def sliding(x: str, weight: str, bias: str = "") -> Contraction:
    """A convolution, of the arguments of these names, with ``stride``, ``padding``, ``dilation``, ``groups`` and
    ``transposed``: ``x [N, C_in, *]``, weight ``[C_out, C_in / g, *]`` or transposed ``[C_in, C_out / g, *]``."""

    def read(a: Arguments, out: Tensor, name: str) -> Product | None:
        return None if name != weight else _convolution(a[x], a[weight], a[bias] if bias else None, a, out)

    return Contraction((x, weight), read)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, a: Arguments, out: Tensor) -> Product | None:
    """A row is a position of the output."""
    groups, transposed = int(a["groups"]), bool(a["transposed"])
    if x.ndim != weight.ndim:
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
        weight, bias, len(x) * math.prod(out.shape[2:]), inputs, outputs, matrix, lambda b: b.reshape(groups, -1)
    )


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
