"""A network in double precision, to tell rounding from a fault."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.ops.meta import OpMode
from fxprune.ops.table import record_of
from fxprune.recording import replace_tensors
from fxprune.recording.shards import copied_around_shares, is_sharded, is_share


def to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def double(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in double, but for what processes share, which is so when it is gathered."""
    if not is_sharded(module):
        return copy.deepcopy(module).double()
    result = copied_around_shares(module)
    replace_tensors(result, lambda tensor: tensor if is_share(tensor) else _in_double(tensor))
    return result


def _in_double(tensor: Tensor) -> Tensor:
    wide: Tensor = to_double(tensor.detach())
    return nn.Parameter(wide, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide


class InDouble(OpMode):
    """What the graph itself would compute in less is computed in double."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        for name in ("dtype", "out_dtype"):
            if kwargs.get(name) in _LESS:
                kwargs[name] = torch.float64
        record = record_of(func) if isinstance(func, torch._ops.OpOverload) else None
        if record is not None and record.double is not None and not args[0].is_meta:
            return record.double(*args, **kwargs)
        return func(*args, **kwargs)


_LESS = (torch.float16, torch.bfloat16, torch.float32)
