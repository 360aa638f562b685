"""Torch functions that become no node of their own: reads of sizes, and attention, which is written op by op."""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.recording.traced import Lazy, TracedFlag, TracedFloat
from fxprune.recording.writer import GraphWriter


def _sizes(writer: GraphWriter, tensor: Tensor) -> torch.Size:
    return torch.Size([writer.size(tensor, dim) for dim in range(tensor.ndim)])


def _size(writer: GraphWriter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return _sizes(writer, args[0]) if dim is None else writer.size(args[0], dim)


def _stride(writer: GraphWriter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if dim is not None:
        return writer.stride(args[0], dim)
    return tuple(writer.stride(args[0], each) for each in range(args[0].ndim))


def _count(writer: GraphWriter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    total: int = 1
    for size in _sizes(writer, args[0]):
        total = total * size
    return total


def _told_length(writer: GraphWriter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """``len(x)`` in code whose ``len`` is Python's own, which gives plain numbers."""
    length = len(args[0])
    writer.guard(writer.size(args[0], 0), "==", length)
    return length


# Reads of sizes: a method or function, or the name of a property.
SPECIAL: dict[Any, Callable[[GraphWriter, tuple[Any, ...], dict[str, Any]], Any]] = {
    "shape": lambda writer, args, kwargs: _sizes(writer, args[0]),
    Tensor.size: _size,
    Tensor.stride: _stride,
    Tensor.numel: _count,
    Tensor.nelement: _count,
    Tensor.__len__: _told_length,
    torch.numel: _count,
}


class _Rate(TracedFloat):
    """A dropout's probability, 0 in eval mode: what is done where it is above 0 is recorded all the same."""

    def __gt__(self, other: Any) -> bool:
        return True


def attention_body(writer: GraphWriter, *args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward`` op by op instead of as one node.

    In train mode its dropout must come back: the probability becomes ``p * training``, which is 0 while recording.
    """
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    training = bound.arguments["training"]
    if isinstance(training, TracedFlag) and bound.arguments["dropout_p"] > 0.0:
        lazy = Lazy(writer, "call_function", operator.mul, (training, bound.arguments["dropout_p"]))
        bound.arguments.update(training=True, dropout_p=_Rate(0.0, lazy))
    return _multi_head_attention(*bound.args, **bound.kwargs)


_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
