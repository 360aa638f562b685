"""Several processes: sums over all of them, one model and one plan for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from fxprune.errors import InputError

T = TypeVar("T")
Array = npt.NDArray[Any]


def process_count() -> int:
    """Processes that share the work: 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process speaks for all: writes files, shows progress."""
    return rank() == 0


def summed(arrays: Sequence[npt.NDArray[np.float64]]) -> list[npt.NDArray[np.float64]]:
    """Every array summed over all processes."""
    if process_count() == 1:
        return list(arrays)
    flat = torch.from_numpy(np.concatenate([a.reshape(-1) for a in arrays])).to(_device())
    dist.all_reduce(flat)
    values = flat.cpu().numpy()
    ends = np.cumsum([a.size for a in arrays])
    return [values[end - a.size : end].reshape(a.shape) for a, end in zip(arrays, ends, strict=True)]


def from_first(value: Any) -> Any:
    """What the first process has: sums of floats may differ in the last bit, and plans must not."""
    if process_count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """What every process has, in the order of their ranks."""
    if process_count() == 1:
        return [value]
    box = [None] * process_count()
    dist.all_gather_object(box, value)
    return box


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def average(tensors: Iterable[Tensor]) -> None:
    """Every tensor the mean over all processes, in place; the same in all of them, to the last bit."""
    if process_count() > 1:
        _at_once(tensors, lambda flat: (dist.all_reduce(flat), flat.div_(process_count())))


def share(tensors: Iterable[Tensor]) -> None:
    """Every tensor as the first process has it, in place."""
    if process_count() > 1:
        _at_once(tensors, lambda flat: dist.broadcast(flat.view(torch.uint8), src=0))


def in_step(items: Iterable[T], what: str = "data") -> Iterator[T]:
    """The items, as many in every process: one that has run out would leave the others waiting.

    Raises:
        InputError: some processes have run out, and others have not.
    """
    if process_count() == 1:
        yield from items
        return
    ahead, number = iter(items), 0
    while True:
        item = next(ahead, _END)
        (having,) = summed([np.array([float(item is not _END)])])
        if not having.any():
            return
        if item is _END or having < process_count():
            raise InputError(
                f"{what}= has {number} batches in one process and more in another: give every process equally many "
                "(torch.utils.data.DistributedSampler does)."
            )
        yield item  # type: ignore[misc]
        number += 1


_END = object()


def _at_once(tensors: Iterable[Tensor], collective: Callable[[Tensor], Any]) -> None:
    """One collective over all tensors of a kind, in place; their memory may be laid out in any way."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for same in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        collective(flat)
        for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _device() -> torch.device:
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
