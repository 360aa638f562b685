"""Ops over the kept channels only: for each kind of op that mixes channels, what it gives without those that go.

Every function takes ``(func, mask, args, kwargs)``; ``mask`` says which positions of the op's operand stay, of size
1 where that does not vary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_REDUCTIONS = [
    "mean",
    "sum",
    "nansum",
    "amax",
    "amin",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "linalg_vector_norm",
    "norm",
    "logsumexp",
    "prod",
    "max",
    "min",
    "any",
    "all",
    "aminmax",
    "count_nonzero",
    "_is_all_true",
    "_is_any_true",
]
KINDS: dict[str, str] = {
    **dict.fromkeys(_REDUCTIONS, "reduction"),
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "linear"), "contraction"),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), "contraction"),
    **dict.fromkeys(("native_layer_norm", "_fused_layer_norm"), "layer_norm"),
    "_fused_rms_norm": "rms_norm",
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), "convolution"),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), "softmax"),
    "native_group_norm": "group_norm",
    "_weight_norm_interface": "weight_norm",
    "_grouped_mm": "contraction",
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist"), "distance"),
    **dict.fromkeys(("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy",
                     "binary_cross_entropy_with_logits"), "loss"),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "_batch_norm_with_update",
                     "_native_batch_norm_legit_no_training", "miopen_batch_norm"), "batch_norm"),
}  # fmt: skip


def mixes(name: str, args: Any, kwargs: Any) -> bool:
    if name in _REDUCTIONS:
        return sum(isinstance(a, Tensor) for a in (*args, *kwargs.values())) == 1
    if KINDS[name] == "batch_norm":
        return name != "_native_batch_norm_legit_no_training" and any(a is True for a in args[3:6])
    return True


def place_of(name: str) -> int:
    """Which argument of an op the mask is for."""
    return 1 if name in ("addmm", "baddbmm", "addmv") else 0


def fits(mask: Tensor, operand: Tensor) -> bool:
    return mask.ndim == operand.ndim and all(m in (1, s) for m, s in zip(mask.shape, operand.shape, strict=True))


def on_all(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask.to(tensor.device).expand(tensor.shape)


def _masked_reduction(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    name = func.overloadpacket.__name__
    on = on_all(mask, x)
    if name in _NEUTRAL:
        return func(x.masked_fill(~on, _NEUTRAL[name](x)), *rest, **kwargs)
    if name in ("linalg_vector_norm", "norm"):
        order = rest[0] if rest else kwargs.get("ord", kwargs.get("p"))
        smallest = isinstance(order, (int, float)) and order < 0  # of the norms with a negative order
        return func(x.masked_fill(~on, torch.inf if smallest else 0), *rest, **kwargs)
    if name == "aminmax":
        low, _ = func(x.masked_fill(~on, _largest(x)), *rest, **kwargs)
        return low, func(x.masked_fill(~on, _smallest(x)), *rest, **kwargs)[1]
    dims = rest[0] if rest and isinstance(rest[0], (list, tuple, int)) and not isinstance(rest[0], bool) else None
    dims = kwargs.get("dim") if dims is None else dims
    dims = dims if dims not in (None, [], ()) else list(range(x.ndim))
    keepdim = bool(kwargs.get("keepdim", rest[1] if name == "mean" and len(rest) > 1 else False))
    x = x if kwargs.get("dtype") is None else x.to(kwargs["dtype"])
    count = on.sum(dims, keepdim=True)
    mean = x.masked_fill(~on, 0).sum(dims, keepdim=True) / count
    if name == "mean":
        mean = mean.to(x.dtype)
        return mean if keepdim else mean.sum(dims)
    correction = kwargs.get("correction", 1)
    correction = 1 if correction is None else correction
    squares = (x - mean).masked_fill(~on, 0).abs().square()
    spread = squares.sum(dims, keepdim=True) / (count - correction).clamp(min=0)
    spread = spread.sqrt() if name.startswith("std") else spread
    both = (spread, mean) if keepdim else (spread.sum(dims), mean.sum(dims))
    return both if name.endswith("_mean") else both[0]


def _smallest(x: Tensor) -> Any:
    """The least value of its dtype."""
    if x.dtype == torch.bool:
        return False
    return -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min


def _largest(x: Tensor) -> Any:
    """The greatest value of its dtype."""
    if x.dtype == torch.bool:
        return True
    return torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).max


# What a position must hold to leave the result as it is without the position.
_NEUTRAL: dict[str, Callable[[Tensor], Any]] = {
    **dict.fromkeys(("amax", "max", "logsumexp"), _smallest),
    **dict.fromkeys(("amin", "min"), _largest),
    **dict.fromkeys(("prod", "all", "_is_all_true"), lambda x: 1),
    **dict.fromkeys(("sum", "nansum", "any", "count_nonzero", "_is_any_true"), lambda x: 0),
}


def _masked_contraction(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    place = place_of(func.overloadpacket.__name__)
    x = args[place]
    return func(*args[:place], x.masked_fill(~on_all(mask, x), 0), *args[place + 1 :], **kwargs)


def _masked_distance(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    """Zeros on both sides add nothing to a distance."""
    x1, x2, *rest = args
    return func(x1.masked_fill(~on_all(mask, x1), 0), x2.masked_fill(~on_all(mask, x2), 0), *rest, **kwargs)


def _normalised(
    x: Tensor, on: Tensor, dims: list[int], eps: float, centre: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) * rstd`` with both over the positions ``on``."""
    count = on.sum(dims, keepdim=True)
    mean = x.masked_fill(~on, 0).sum(dims, keepdim=True) / count if centre else x.new_zeros(())
    spread = ((x - mean).masked_fill(~on, 0) ** 2).sum(dims, keepdim=True) / count
    rstd = torch.rsqrt(spread + eps)
    return (x - mean) * rstd, mean, rstd


def _masked_layer_norm(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    x, shape, weight, bias, eps = args
    dims = list(range(x.ndim - len(shape), x.ndim))
    out, mean, rstd = _normalised(x, on_all(mask, x), dims, eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, rstd


def _masked_rms_norm(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    x, shape, weight, eps = args
    dims = list(range(x.ndim - len(shape), x.ndim))
    out, _, rstd = _normalised(x, on_all(mask, x), dims, torch.finfo(x.dtype).eps if eps is None else eps, centre=False)
    return out if weight is None else out * weight, rstd


def _masked_group_norm(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    x, weight, bias, _, _, _, groups, eps = args
    split = (x.shape[0], groups, -1)
    out, mean, rstd = _normalised(x.reshape(split), on_all(mask, x).reshape(split), [2], eps)
    shape = [1, -1] + [1] * (x.ndim - 2)
    out = out.reshape(x.shape)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape), mean, rstd


def _masked_batch_norm(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    x, weight, bias = args[:3]
    eps = args[-1] if isinstance(args[-1], float) else args[-2]
    dims = [d for d in range(x.ndim) if d != 1]
    out, mean, rstd = _normalised(x, on_all(mask, x), dims, eps)
    shape = [1, -1] + [1] * (x.ndim - 2)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape), mean.flatten(), rstd.flatten()


def _masked_weight_norm(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    v, g, *rest = args
    dim = rest[0] if rest else kwargs.get("dim", 0)
    v = v.masked_fill(~on_all(mask, v), 0)
    return func(v, g, dim)


def _masked_convolution(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    """Across channels: those that stay are neighbours."""
    x, *rest = args
    dims = [d for d, size in enumerate(mask.shape) if size > 1]
    kept = [mask.amax([e for e in range(mask.ndim) if e != d]).nonzero().reshape(-1).to(x.device) for d in dims]
    shape = list(x.shape)
    for d, stays in zip(dims, kept, strict=True):
        x = x.index_select(d, stays)
    result = func(x, *rest, **kwargs)
    for d, stays in reversed([*zip(dims, kept, strict=True)]):
        whole = [shape[d] if e == d else n for e, n in enumerate(result.shape)]
        result = result.new_zeros(whole).index_copy(d, stays, result)
    return result


def _masked_softmax(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    return func(x.masked_fill(~on_all(mask, x), -torch.inf), *rest, **kwargs)


def _masked_loss(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    """The mean or the sum of the kept positions."""
    names = [a.name for a in func._schema.arguments]
    given = {**{a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}, **kwargs}
    given.update(zip(names, args, strict=False))
    loss = func(**{**given, "reduction": 0})
    on = on_all(mask, loss)
    total = loss.masked_fill(~on, 0).sum()
    return total if given["reduction"] == 2 else total / on.sum()


MASKED = {
    "loss": _masked_loss,
    "reduction": _masked_reduction,
    "contraction": _masked_contraction,
    "distance": _masked_distance,
    "layer_norm": _masked_layer_norm,
    "rms_norm": _masked_rms_norm,
    "group_norm": _masked_group_norm,
    "batch_norm": _masked_batch_norm,
    "weight_norm": _masked_weight_norm,
    "softmax": _masked_softmax,
    "convolution": _masked_convolution,
}
