"""One tensor among example inputs as plain data: what it takes to make another one like it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxprune.recording import near
from fxprune.recording.structure import StandIn

# As many integers as a few thousand sentences have, and a square mask of a few thousand tokens, if it has few runs.
_MOST_VALUES = 2**16
_LARGEST_MASK = 2**24
_MOST_COLUMNS = 256  # of a table, or of a series of them


@dataclass(frozen=True)
class TensorSpec(StandIn):
    """What it takes to make a tensor like one that was seen: its shape and dtype, and for integers, booleans and masks
    (see ``fxprune.recording.near``) its values.

    Values matter because integers are indices as a rule (tokens, positions, classes): an embedding refuses those
    outside its table. Floats are standard normal, unless the example says that the network may not take those: where
    none is negative (powers, whose logarithm is taken, lengths, times) they are drawn from their range, and so are
    whole numbers in a column of a table (a category). On meta there are no values, and integers count as zeros.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        low, high: the range of an integer tensor, or of a float tensor without negative numbers; else both 0. That of
            floats that are all the same begins at the half. Only ones, or only zeros, say nothing.
        values: of integers, booleans and masks, in order; None for other tensors, and for those too large to keep:
            such integers are drawn from their range.
        counts: how often each of ``values`` comes in a row, for large masks; None for once.
        columns: (index in the last dim, least, greatest) of what holds whole numbers only there, for floats.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    low: float = 0
    high: float = 0
    values: tuple[float, ...] | None = field(default=None, repr=False)
    counts: tuple[int, ...] | None = field(default=None, repr=False)
    columns: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, tensor: Tensor, may_be_constant: bool = False) -> TensorSpec:
        """Of this tensor. ``may_be_constant``: only ones, or only zeros, are a mask too."""
        low: float = 0
        high: float = 0
        columns: tuple[tuple[int, int, int], ...] = ()
        shape = tuple(int(size) for size in tensor.shape)
        if tensor.is_meta:
            return cls(shape, tensor.dtype)
        tensor = tensor.detach()
        if _is_integer(tensor.dtype) and tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
        values, counts = _values_to_keep(tensor, may_be_constant)
        if values is None and tensor.dtype.is_floating_point and tensor.numel() and not near.is_constant(tensor):
            (low, high), columns = near.positive_range(tensor), near.whole_columns(tensor, _MOST_COLUMNS)
        return cls(shape, tensor.dtype, low, high, values, counts, columns)

    @property
    def is_mask(self) -> bool:
        """Whether the values are kept and are those of a mask."""
        return self.values is not None and (self.dtype.is_floating_point or near.is_mask(self._distinct()))

    @property
    def is_ids(self) -> bool:
        """Whether the values are kept and are integers, but no mask."""
        return self.values is not None and not self.is_mask

    def example(self) -> Tensor:
        """The values that were kept, on the CPU, as booleans, int64 or float64."""
        assert self.values is not None
        values = torch.tensor(self.values, dtype=_wide(self.dtype))
        if self.counts is not None:
            values = values.repeat_interleave(torch.tensor(self.counts))
        return values.reshape(self.shape)

    def with_values(self, values: Tensor) -> TensorSpec:
        """The same with other values, of any shape."""
        fresh = dataclasses.replace(self, shape=tuple(values.shape), values=None, counts=None)
        if values.numel() <= _MOST_VALUES:
            return dataclasses.replace(fresh, values=tuple(values.reshape(-1).tolist()))
        runs, counts = values.reshape(-1).unique_consecutive(return_counts=True)
        return dataclasses.replace(fresh, values=tuple(runs.tolist()), counts=tuple(counts.tolist()))

    def with_shape(self, shape: Sequence[int], batched: bool = True) -> TensorSpec:
        """The same at another size of any dim; for the values see ``fxprune.recording.near.fitted``."""
        if self.values is None or 0 in self.shape:
            return dataclasses.replace(self, shape=tuple(shape), values=None, counts=None)
        return self.with_values(near.fitted(self.example(), shape, self.is_mask, batched))

    def make(
        self,
        generator: torch.Generator,
        device: torch.device | str,
        batch: int | None = None,
        permute: bool = True,
    ) -> Tensor:
        """A tensor of this shape and dtype.

        Floats are standard normal or from their range, see above. Masks are the example's. Integers are the example's,
        permuted along the last dim within each row; where they were not kept, random within their range, and booleans
        coin flips.

        Args:
            generator: of the random numbers.
            device: where the tensor goes.
            batch: in the place of dim 0; the example's rows are taken in turn.
            permute: False leaves the integers in the example's order.
        """
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        if self.values is not None and 0 not in self.shape:
            values = near.fitted(self.example(), shape, self.is_mask, batched=True)
            if permute and self.is_ids:
                values = near.permuted(values, generator)
        elif self.dtype == torch.bool:
            values = torch.randint(0, 2, shape, generator=generator).bool()
        elif _is_integer(self.dtype):
            values = torch.randint(int(self.low), int(self.high) + 1, shape, generator=generator, dtype=torch.int64)
        elif self.dtype.is_complex:
            values = torch.randn(shape, generator=generator, dtype=torch.complex64)
        else:
            values = self._floats(shape, generator)
        return values.to(device=device, dtype=self.dtype)

    def _floats(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        if self.low < self.high:
            values = self.low + (self.high - self.low) * torch.rand(shape, generator=generator)
        else:
            values = torch.randn(shape, generator=generator)
        for column, low, high in self.columns:
            part = values[..., column : column + 1]  # of fewer columns, some are not there
            part.copy_(torch.randint(low, high + 1, part.shape, generator=generator))
        return values

    def _distinct(self) -> Tensor:
        return torch.tensor(sorted(set(self.values or ())), dtype=_wide(self.dtype))


def _values_to_keep(tensor: Tensor, may_be_constant: bool) -> tuple[tuple[float, ...] | None, tuple[int, ...] | None]:
    """``values`` and ``counts`` of a ``TensorSpec``."""
    if tensor.dtype.is_complex or tensor.numel() > _LARGEST_MASK:
        return None, None
    kept = tensor.numel() <= _MOST_VALUES
    integer = not tensor.dtype.is_floating_point
    constant = may_be_constant and tensor.ndim > 0 and near.is_constant(tensor)
    if not (integer and kept) and not constant and not near.is_mask(tensor):
        return None, None
    spec = TensorSpec((), tensor.dtype).with_values(tensor)
    return (spec.values, spec.counts) if len(spec.values or ()) <= _MOST_VALUES else (None, None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.bool:
        return dtype
    return torch.float64 if dtype.is_floating_point else torch.int64


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def to_json(record: Any) -> Any:
    """A record as what JSON can hold: every structure as an object with its kind as the key.

    Raises:
        TypeError: it holds something else than tensors, numbers, strings, None, tuples, lists and dicts.
    """
    if isinstance(record, TensorSpec):
        name = str(record.dtype).removeprefix("torch.")
        content: list[Any] = [list(record.shape), name, record.low, record.high]
        if record.values is not None:
            # JSON has no infinity.
            content.append([str(value) if math.isinf(value) else value for value in record.values])
            content += [list(record.counts)] if record.counts is not None else []
        elif record.columns:
            content += [None, None, [list(column) for column in record.columns]]
        return {"tensor": content}
    if type(record) in (tuple, list):
        return {type(record).__name__: [to_json(item) for item in record]}
    if type(record) is dict and all(isinstance(key, str) for key in record):
        return {"dict": {key: to_json(item) for key, item in record.items()}}
    if record is None or type(record) in (bool, int, float, str):
        return record
    raise TypeError(f"a {type(record).__name__} among the example inputs")


def from_json(value: Any) -> Any:
    """The record that ``to_json`` was given.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        shape, name, low, high, *kept = content  # older files keep no values
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name!r} is no dtype")
        return _checked(TensorSpec(tuple(shape), dtype, low, high, *_kept_from_json(*kept)))
    if kind == "dict":
        return {key: from_json(item) for key, item in content.items()}
    items = [from_json(item) for item in content]
    return tuple(items) if kind == "tuple" else items


def _kept_from_json(
    values: Sequence[float | str] | None = None,
    counts: Sequence[int] | None = None,
    columns: Sequence[Sequence[int]] = (),
) -> tuple[tuple[float, ...] | None, tuple[int, ...] | None, tuple[tuple[int, int, int], ...]]:
    return (
        None if values is None else tuple(float(value) if isinstance(value, str) else value for value in values),
        None if counts is None else tuple(counts),
        tuple((int(column), int(low), int(high)) for column, low, high in columns),
    )


def _checked(spec: TensorSpec) -> TensorSpec:
    if spec.values is not None:
        length = len(spec.values) if spec.counts is None else sum(spec.counts)
        numbers = all(isinstance(value, (bool, int, float)) for value in (*spec.values, *(spec.counts or ())))
        if not numbers or length != math.prod(spec.shape) or len(spec.counts or spec.values) != len(spec.values):
            raise ValueError(f"the values of a tensor {list(spec.shape)} are not its own")
    places = [column for column, *_ in spec.columns]
    if places != sorted(set(places)) or any(low > high for _, low, high in spec.columns):
        raise ValueError(f"the columns of a tensor {list(spec.shape)} are not its own")
    if places and places[-1] >= (spec.shape[-1] if spec.shape else 0):
        raise ValueError(f"a tensor {list(spec.shape)} has no column {places[-1]}")
    return spec
