"""Does an answer depend on what goes in?

Of a network that is cut too far it may not: over one channel a layer norm gives its bias, and a softmax ones, whatever
they read. Such a network is equal to its masked original all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.recording.inputs import batch_size, describe_inputs, device_of, make_inputs, map_tensors, tensors_of
from fxprune.verification.compare import strided

_OTHER_SEED = 1


def is_constant(
    dense: nn.Module, pruned: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], found: Any
) -> bool:
    """Whether ``pruned`` answers inputs like these with the same numbers, and ``dense`` does not.

    Args:
        dense: is left as it was.
        pruned: in eval mode.
        args: inputs of both.
        kwargs: by name.
        found: what ``pruned`` answers to these inputs.

    Returns:
        False where other inputs like these are refused, too.
    """
    record = describe_inputs(tuple(args), dict(kwargs))
    numbers = _numbers(found)
    if not numbers or any(_rows_differ(tensor, batch_size(record)) for tensor in numbers):
        return False

    def same(module: nn.Module, first: Sequence[Tensor]) -> bool:
        other, others = make_inputs(record, device_of(pruned), seed=_OTHER_SEED)
        return all(torch.equal(*pair) for pair in zip(first, _numbers(module(*other, **others)), strict=True))

    try:
        with torch.no_grad():
            if not same(pruned, numbers):
                return False
            whole = copy.deepcopy(dense).eval()
            args, kwargs = map_tensors(Tensor.clone, (args, kwargs))
            return not same(whole, _numbers(whole(*args, **kwargs)))
    except Exception:  # of whatever kind the network's own are
        return False


def _numbers(outputs: Any) -> list[Tensor]:
    return [strided(tensor) for tensor in tensors_of(outputs) if tensor.numel()]


def _rows_differ(tensor: Tensor, batch: int | None) -> bool:
    """Whether these are different answers to the samples of a batch. One dim alone may be another's."""
    return tensor.ndim > 1 and 1 < len(tensor) == batch and not bool((tensor == tensor[:1]).all())
