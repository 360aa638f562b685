"""Calibration data: a tensor, a list of inputs, or a loader of inputs or of (inputs, target)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from fxprune.errors import FxpruneError, InputError
from fxprune.recording.inputs import map_leaves, map_tensors, tensors_of
from fxprune.training.batches import Inputs, does_not_run

PIECE = 32  # samples
_LEAST_PIECES = 10
HELD_OUT = 5  # every fifth piece


@dataclass(frozen=True)
class Piece:
    """Inputs of one call. ``samples``: how many. ``item``: of the data. ``held``: not to be fitted, but to judge by."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int
    item: int
    held: bool = False

    def copied(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs in memory of their own, which a network may write to."""
        args, kwargs = map_tensors(Tensor.clone, (self.args, self.kwargs))
        return args, kwargs


def pieces_of(
    data: Any, record: Mapping[str, Any] | None, samples: int | None, device: torch.device, batch: int | None = None
) -> list[Piece]:
    """The inputs in ``data``, on ``device``, a fifth of them held out.

    Args:
        data: a tensor ``[N, ...]``; or an iterable of inputs or of ``(inputs, target)``, where inputs are a tensor, a
            tuple of positional inputs or a dict of keyword inputs; or pieces.
        record: of the example inputs, to tell positional inputs from a pair with a target; without, two are a pair.
        samples: use so many at most.
        device: where the network is.
        batch: the only one that the network takes: a tensor is split into these, and no item is split. None: any.

    Raises:
        InputError: something else, NaN, or fewer than two samples.
    """
    if isinstance(data, Tensor):
        if not data.ndim or not len(data):
            raise InputError(f"data= is a tensor of shape {list(data.shape)}: pass [N, ...], N samples.")
        data = list(data[:samples].split(batch or max(1, min(PIECE, len(data[:samples]) // _LEAST_PIECES))))
    elif isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise InputError(
            f"data= is a {type(data).__name__}: pass a tensor, a list of inputs, or a loader of inputs or of "
            "(inputs, target)."
        )
    found: list[Piece] = []
    for number, item in enumerate(islice(data, samples)):
        piece = _piece(item, number, record, device)
        left = None if samples is None else samples - sum(p.samples for p in found)
        if left is not None and piece.samples > left and batch is None:
            piece = next(_slices(piece, left), piece)
        found.append(piece)
        if samples is not None and sum(p.samples for p in found) >= samples:
            break
    if len(found) < HELD_OUT and batch is None:
        found = [part for piece in found for part in _slices(piece, -(-piece.samples // HELD_OUT))]
    if len(found) < 2:
        have = "no inputs" if not found else "inputs of a single call"
        raise InputError(f"data= holds {have}. Reconstruction needs at least two: one to fit, one to judge by.")
    return held_out(found)


def inputs_of(data: Any) -> Any:
    """The data; of a list of pieces the inputs, as a training reads them."""
    if isinstance(data, list) and all(isinstance(item, Piece) for item in data):
        return [Inputs(piece.args, piece.kwargs) for piece in data]
    return data


def held_out(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces, every fifth of them to judge by; of fewer the last."""
    step = min(HELD_OUT, len(pieces))
    return [replace(piece, held=index % step == step - 1) for index, piece in enumerate(pieces)]


def checksum(pieces: Sequence[Piece]) -> str:
    """Of all inputs, for processes to compare."""
    found = 0
    for tensor in tensors_of([(piece.args, piece.kwargs) for piece in pieces]):
        found = crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), found)
    return f"{sum(piece.samples for piece in pieces)} samples (checksum {found})"


@contextmanager
def on_item(number: int) -> Iterator[None]:
    """What fails inside did so on this item of the data.

    Raises:
        InputError: it failed.
    """
    try:
        yield
    except FxpruneError:
        raise
    except Exception as error:
        raise InputError(does_not_run(error, number)) from error


def _piece(item: Any, number: int, record: Mapping[str, Any] | None, device: torch.device) -> Piece:
    if isinstance(item, Piece):
        return item
    inputs = _inputs_of(item, number, record)
    inputs = map_tensors(lambda tensor: tensor.to(device), inputs)
    tensors = tensors_of(inputs)
    if not tensors:
        raise InputError(
            f"Item {number} of data= is a {type(item).__name__} that holds no tensor. Pass tensors "
            "(torch.from_numpy makes one of an array)."
        )
    for tensor in tensors:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise InputError(f"Item {number} of data= holds NaN. Leave it out, or repair it, before calibrating on it.")
    count = len(tensors[0]) if tensors[0].ndim else 1
    if not count:
        raise InputError(f"Item {number} of data= holds no samples: its first tensor is {list(tensors[0].shape)}.")
    if isinstance(inputs, Mapping):
        return Piece((), dict(inputs), count, number)
    return Piece(tuple(inputs), {}, count, number)


def _inputs_of(item: Any, number: int, record: Mapping[str, Any] | None) -> Any:
    """Positional inputs as a tuple, a dict that the network takes itself among them; or keyword inputs as a dict."""
    example: tuple[Any, ...] = () if record is None else record["args"]
    if isinstance(item, (tuple, list)):
        wanted = (1 if len(item) == 2 else len(item)) if record is None else len(example)
        nested = len(item) == 2 and isinstance(item[0], (tuple, list, Mapping))
        takes_nested = bool(example) and isinstance(example[0], (tuple, list, Mapping))
        if len(item) == wanted and not (nested and not takes_nested):
            return tuple(item)
        if len(item) != 2:
            raise InputError(
                f"Item {number} of data= has {len(item)} parts; the network was recorded with {wanted} positional "
                "inputs. Pass inputs, or pairs (inputs, target)."
            )
        item = item[0]
    if isinstance(item, Mapping):
        takes_it = len(example) == 1 and isinstance(example[0], Mapping) and example[0].keys() == item.keys()
        return (item,) if takes_it else item
    return tuple(item) if isinstance(item, (tuple, list)) else (item,)


def _slices(piece: Piece, size: int) -> Iterator[Piece]:
    """The piece in parts of so many samples, if all its tensors have that many."""
    tensors = tensors_of((piece.args, piece.kwargs))
    if any(not t.ndim or len(t) != piece.samples for t in tensors) or size < 1:
        yield piece
        return
    for start in range(0, piece.samples, size):
        part = partial(_rows_of, start=start, end=start + size)
        args, kwargs = map_leaves(part, (piece.args, piece.kwargs))
        yield replace(piece, args=args, kwargs=kwargs, samples=min(size, piece.samples - start))


def _rows_of(leaf: Any, start: int, end: int) -> Any:
    return leaf[start:end] if isinstance(leaf, Tensor) else leaf
