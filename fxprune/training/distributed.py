"""Several processes: sums over all of them, and one plan for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

Array = npt.NDArray[Any]


def process_count() -> int:
    """Processes that share the work: 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process speaks for all: writes files, shows progress."""
    return process_count() == 1 or dist.get_rank() == 0


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


def _device() -> torch.device:
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
