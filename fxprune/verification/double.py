"""A network in double precision, to tell rounding from a fault."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.ops.meta import OpMode
from fxprune.ops.table import record_of


def to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def double(module: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(module).double()


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
