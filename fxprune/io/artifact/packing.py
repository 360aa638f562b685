"""Tensors of which half or more are exact zeros, written as what is not zero, and where; nothing is lost.

The places are the gaps between one value and the next, in the code of Golomb and Rice: the ``low`` last bits of a gap
as they are, the rest of it as so many zeros and a one. ``low`` is the number that takes the fewest bytes; 0 makes a bit
mask. Of places at random that is within a few per cent of their entropy; of a 2:4 pattern, whose places are worth 0.65
bits an entry, it is the mask with 1: the whole is 2 % above the entropy in float32, 4 % in halves. A negative zero is a
value.

A tensor is packed where that takes at most 5/8 of its bytes. Only what training or a cut has driven to zero is so
empty; all other tensors stay what any reader of safetensors takes them for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

VALUES, PLACES = ":values", ":places"
"""What the names of the two tensors end in that stand for one."""

_HEADER = 300  # bytes that two more names take, about
MOST_LOW = 40
_MOST = 5 / 8  # of the bytes; of a 2:4 pattern it takes 17/32 in float32, 9/16 in halves

Integers = npt.NDArray[np.int64]


class Packed(NamedTuple):
    """``values [n]``: what is not zero, bit by bit, in its order. ``places``: uint8, the ones and then the low bits."""

    values: Tensor
    places: Tensor
    low: int


def pack(tensor: Tensor) -> Packed | None:
    """A contiguous tensor on the CPU packed; None where that takes more than 5/8 of its bytes."""
    most = _MOST * tensor.nbytes - _HEADER
    if most < 0:
        return None
    data = _as_bytes(tensor)
    found = np.flatnonzero(data.any(1))
    if found.size * tensor.element_size() > most:
        return None
    low, places = _encoded(found)
    result = Packed(tensor.reshape(-1)[torch.from_numpy(found)], torch.from_numpy(places), low)
    return result if result.values.nbytes + places.nbytes <= most else None


def unpack(packed: Packed, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The tensor.

    Raises:
        ValueError: this is not what ``pack`` makes of a tensor of this shape and dtype.
    """
    values, places, low = packed
    if (values.dtype, places.dtype, values.ndim, places.ndim) != (dtype, torch.uint8, 1, 1):
        raise ValueError("its parts are of another kind")
    result = torch.zeros(math.prod(shape), dtype=dtype)
    found = _decoded(places.numpy(), len(values), low)
    if found.size and not (found[0] >= 0 and (np.diff(found) > 0).all() and found[-1] < result.numel()):
        raise ValueError("its places are not within it")
    _as_bytes(result)[found] = _as_bytes(values)
    return result.reshape(shape)


def stored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is written in place of these tensors, and of every packed one its shape, dtype and ``low``."""
    result, notes = dict(tensors), dict[str, Any]()
    for name, tensor in tensors.items():
        names = (name + VALUES, name + PLACES)
        if tensors.keys() & names or (packed := pack(tensor)) is None:
            continue
        del result[name]
        result |= zip(names, packed[:2], strict=True)
        notes[name] = {
            "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "low": packed.low,
        }  # fmt: skip
    return result, notes


def unpacked(name: str, note: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor of this name, from what was written in its place.

    Raises:
        ValueError: it was not written by ``stored``.
    """
    if missing := {name + VALUES, name + PLACES} - tensors.keys():
        raise ValueError(f"there is no {min(missing)}")
    packed = Packed(tensors[name + VALUES], tensors[name + PLACES], note["low"])
    return unpack(packed, note["shape"], getattr(torch, note["dtype"]))


def _as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """A view ``[entries, bytes of one]``."""
    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    view: npt.NDArray[np.uint8] = flat.reshape(-1, tensor.element_size())
    return view


def _encoded(places: Integers) -> tuple[int, npt.NDArray[np.uint8]]:
    gaps = np.diff(places, prepend=-1) - 1
    low = min(range(MOST_LOW + 1), key=lambda bits: gaps.size * (1 + bits) + int((gaps >> bits).sum()))
    ends = np.cumsum((gaps >> low) + 1) - 1
    ones = np.zeros(int(ends[-1]) + 1 if gaps.size else 0, np.uint8)
    ones[ends] = 1
    lows = ((gaps[:, None] >> np.arange(low)) & 1).astype(np.uint8)
    return low, np.concatenate([np.packbits(ones), np.packbits(lows.reshape(-1))])


def _decoded(data: npt.NDArray[np.uint8], count: int, low: int) -> Integers:
    rest = -(-count * low // 8)
    ends = np.flatnonzero(np.unpackbits(data[: data.size - rest]))
    if data.size < rest or ends.size != count:
        raise ValueError(f"{count} values have as many places, and there are {ends.size}")
    lows = np.unpackbits(data[data.size - rest :])[: count * low].reshape(count, low).astype(np.int64)
    gaps = ((np.diff(ends, prepend=-1) - 1) << low) + (lows << np.arange(low)).sum(1)
    result: Integers = np.cumsum(gaps + 1) - 1
    return result
