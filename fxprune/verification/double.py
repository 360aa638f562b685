"""A network in double precision, to tell rounding from a fault."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.ops.meta import OpMode


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
        if func is torch.ops.aten._grouped_mm.default and not args[0].is_meta:
            return _grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)


_LESS = (torch.float16, torch.bfloat16, torch.float32)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """As PyTorch's, which has no kernel for double."""
    if offs is None:
        return a @ b
    ends = offs.tolist()
    spans = [*zip([0, *ends[:-1]], ends, strict=True)]
    if a.ndim == 2 and b.ndim == 3:
        parts = [a[i:j] @ matrix for (i, j), matrix in zip(spans, b, strict=True)]
        return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[-1])])
    if a.ndim == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in spans])
    return torch.cat([matrix @ b[:, i:j] for (i, j), matrix in zip(spans, a, strict=True)], 1)
