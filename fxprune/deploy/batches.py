"""The batch of what torch.export captures: free, up to a largest one, or the example's alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fxprune.errors import GuardError, first_line
from fxprune.recording.inputs import batch_size, fixed_batch

BATCHES = (1, 3, 5)
"""What a file is checked with."""

_T = TypeVar("_T")
_EXPORT_BATCH = 2  # torch.export takes a size of 1 for a constant
_LARGEST_ON_CUDA = 65535  # up to which a batch norm chooses cuDNN, and torch.export holds a program to the choice


def at_free_batch(
    module: nn.Module, record: Mapping[str, Any], call: Callable[[int | None], _T]
) -> tuple[_T, str | None]:
    """What to capture ``module`` with: a batch that leaves it free, or the example's where it runs at no other.

    Args:
        module: recorded or not.
        record: of its inputs.
        call: runs it on inputs of a batch, None for the example's. Raises GuardError where a recording lacks that.

    Returns:
        What ``call`` gives, and why the batch is fixed; None where it is free.
    """
    why = fixed_batch(module, record)
    if why is None:
        try:
            if batch_size(record) == _EXPORT_BATCH:  # which no recording of it refuses
                call(_EXPORT_BATCH + 1)
            return call(_EXPORT_BATCH), None
        except GuardError as error:
            why = first_line(error)
    return call(None), why


def up_to_the_largest(device: torch.device, capture: Callable[[Any], _T]) -> tuple[_T, int | None]:
    """What ``capture`` gives for a free batch, and the largest one, where the network does something else beyond.

    An einsum of three or more is captured from left to right, as torch computes it without the package opt_einsum: that
    chooses an order by the sizes, and holds the batch to the one that it saw.

    Args:
        device: on which it is captured.
        capture: is given the dim of the batch, a ``torch.export.Dim``. What it raises is raised, unless torch.export
            names a largest batch in it.
    """
    most = _LARGEST_ON_CUDA if device.type == "cuda" else None
    with torch.backends.opt_einsum.flags(enabled=False):
        try:
            return capture(torch.export.Dim("batch", min=1, max=most)), None
        except Exception as error:
            limit = re.search(r"batch = Dim\('batch', max=(\d+)\)", str(error))
            if limit is None or int(limit[1]) < max(BATCHES):
                raise
            most = int(limit[1])
        return capture(torch.export.Dim("batch", min=1, max=most)), most
