"""Aten ops on meta tensors, without doing over what was done before.

PyTorch computes the shapes of many ops by running a decomposition in Python: half a millisecond for a ``batch_norm``,
more for ``hardswish``. Here the kernel of such an op runs once for given shapes, strides, dtypes and other arguments;
after that what it said is made again. A pointwise op says the same of operands of any one shape. What networks
are made of is written out, because a pruned one has hardly two layers of the same width. Whatever does not fit exactly
is left to PyTorch's kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten

# Pointwise, but without PyTorch's tag.
POINTWISE = frozenset(
    [
        "hardswish",
        "hardsigmoid",
        "masked_fill",
        "where",
        "native_dropout",
        "_to_copy",
        "_prelu_kernel",
        "log_sigmoid_forward",
        "bernoulli",
        "poisson",
        "binomial",
        "_standard_gamma",
        "_conj",
        "complex",
        "real",
        "imag",
        "lift_fresh",
        "lift",
        "rrelu_with_noise",
        "copy",
        "polar",
        "clamp",
        "isclose",
        "nan_to_num",
    ]
)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments or results of an aten op, which nest in lists and tuples only."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


class OpMode(TorchDispatchMode):
    """A mode that sees aten ops. Nothing is compiled inside, so there is no compiler to hide from at every op.

    PyTorch's own way to hide imports the whole compiler, which takes a second.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class MetaKernels:
    """Runs aten ops on meta tensors. One for a whole analysis; it remembers shapes and holds no tensor."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[bool, bool, tuple[Any, ...]] | None] = {}
        self._kinds: dict[Any, tuple[bool, bool]] = {}  # makes new tensors?, pointwise?

    def __call__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` returns."""
        direct = _DIRECT.get(func)
        if direct is not None:
            result = direct(*args, **kwargs)
            if result is not None:
                return result
        kinds = self._kinds.get(func)
        if kinds is None:
            kinds = self._kinds[func] = _makes_new_tensors(func), is_pointwise(func)
        pure, pointwise = kinds
        if not pure:
            return args[0] if pointwise and _in_place(func, args, kwargs) else _run(func, args, kwargs)
        tensors: list[Tensor] = []
        try:
            arguments = _key(args, tensors), _key(kwargs, tensors) if kwargs else ()
            like = _common(tensors) if pointwise else None
            sizes = None if like is not None else tuple([(t.shape, t.stride()) for t in tensors])
            key = func, arguments, sizes
            known = self._known.get(key, _UNKNOWN)
        except (TypeError, _NotMetaError):  # an argument that has no hash, or a real tensor
            return func(*args, **kwargs)
        if known is _UNKNOWN:
            dtype = None if like is None else _dtype_of(func, args, kwargs, like)
            if dtype is None:
                result = _run(func, args, kwargs)
                self._known[key] = _described(result, like)
                return result
            known = self._known[key] = False, False, ((None, None, dtype),)
        if known is None:
            return _run(func, args, kwargs)
        several, is_list, outputs = known
        made = [_made(description, like) for description in outputs]
        if not several:
            return made[0]
        return made if is_list else tuple(made)


_UNKNOWN: Any = object()


class _NotMetaError(Exception):
    """A real tensor: its values may matter."""


def _makes_new_tensors(func: Any) -> bool:
    """An op whose results depend on shapes alone, and are neither views of its operands nor these themselves."""
    schema = func._schema
    if any(a.alias_info is not None for a in (*schema.arguments, *schema.returns)):
        return False
    tags = func.tags
    return torch.Tag.data_dependent_output not in tags and torch.Tag.dynamic_output_shape not in tags


@lru_cache(maxsize=4096)
def op_name(func: Any) -> str:
    """The op's bare name, the same where it writes in place."""
    name = str(func.overloadpacket.__name__)
    return name.rstrip("_") if func._schema.is_mutable else name


def is_pointwise(func: Any) -> bool:
    """Whether the op computes every position from the same position of its operands, also where it writes in place."""
    return torch.Tag.pointwise in func.tags or (func.namespace == "aten" and op_name(func) in POINTWISE)


def channels_last_of(tensor: Tensor) -> torch.memory_format | None:
    """The memory format of a tensor that lies with its channels last, and not also with them first."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    found = layout is not None and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous()
    return layout if found else None


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """PyTorch's kernel; of a pointwise op that has none on meta what is clear without (``binomial``)."""
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        tensors = tensors_in((*args, *kwargs.values()))
        returns = [str(value.type) for value in func._schema.returns]
        if not is_pointwise(func) or func._schema.is_mutable or returns != ["Tensor"] or not tensors:
            raise
        shape = torch.broadcast_shapes(*[t.shape for t in tensors])
        return torch.empty(shape, dtype=tensors[0].dtype, device="meta")


def _in_place(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the op writes its first operand over, which the others fit: on meta there is nothing to do."""
    first, *others = func._schema.arguments
    if not func._schema.name.endswith("_") or first.alias_info is None or any(a.alias_info for a in others):
        return False
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    x = tensors[0]
    return all(t.is_meta and t.dtype == x.dtype and _fits_into(t, x) for t in tensors) and x.is_floating_point()


def _dtype_of(func: Any, args: Any, kwargs: Any, like: Tensor) -> torch.dtype | None:
    """The dtype of what a pointwise op makes, if that is one tensor, laid out like ``like``; else None.

    The real kernel is asked, with two positions along every dimension: the meta kernel takes a hundred times as long,
    and imports the compiler.
    """
    if torch.Tag.pointwise not in func.tags or torch.Tag.nondeterministic_seeded in func.tags:
        return None
    small = _small(like, like)
    args, kwargs = tree_map_only(Tensor, lambda t: _small(t, like), (tuple(args), dict(kwargs)))
    try:
        result = func(*args, **kwargs)
    except Exception:  # a dtype that the processor cannot, or a call that the meta kernel shall explain
        return None
    same = isinstance(result, Tensor) and result.shape == small.shape and result.stride() == small.stride()
    return result.dtype if same else None


def _small(tensor: Tensor, like: Tensor) -> Tensor:
    """Ones in its place, two where it has several along a dimension, in the order of ``like`` if of that shape."""
    dims = list(range(tensor.ndim))
    order = sorted(dims, key=lambda d: -like.stride()[d]) if tensor.shape == like.shape else dims
    return torch.empty_permuted([min(size, 2) for size in tensor.shape], order, dtype=tensor.dtype).fill_(1)


def _key(value: Any, tensors: list[Tensor]) -> Any:
    """An argument without its tensors' sizes; the tensors are collected."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _NotMetaError
        tensors.append(value)
        return value.dtype, value.ndim
    if isinstance(value, (tuple, list)):
        return tuple([_key(item, tensors) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _key(item, tensors)) for name, item in value.items()])
    return type(value), value  # 1, 1.0 and True are equal


def _common(tensors: Sequence[Tensor]) -> Tensor | None:
    """The first operand, if what a pointwise op makes of them is certain to have its shape and strides.

    All that are no scalars have these too, and leave no gaps in memory; or all are contiguous, and broadcast to it.
    """
    whole = [t for t in tensors if t.ndim]
    if not whole:
        return None
    first, *others = whole
    shape, stride = first.shape, first.stride()
    if all(t.shape == shape and t.stride() == stride for t in others):
        return first if _is_dense(first) else None
    return first if all(t.is_contiguous() and _fits_into(t, first) for t in whole) else None


def _fits_into(tensor: Tensor, x: Tensor) -> bool:
    """Does it broadcast to the shape of ``x``?"""
    if tensor.shape == x.shape:
        return True
    sizes = zip(reversed(tensor.shape), reversed(x.shape), strict=False)
    return tensor.ndim <= x.ndim and all(n in (1, wanted) for n, wanted in sizes)


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _described(result: Any, like: Tensor | None) -> tuple[bool, bool, tuple[Any, ...]] | None:
    """(several tensors?, in a list?, each one's dtype, or shape, strides and dtype), or None: the kernel must run."""
    several = isinstance(result, (tuple, list))
    outputs: list[Any] = []
    for tensor in result if several else [result]:
        if not isinstance(tensor, Tensor) or not tensor.is_meta or tensor.storage_offset():
            return None
        shape, stride = tuple(tensor.shape), tensor.stride()
        if like is None:
            outputs.append((shape, stride, tensor.dtype))
        elif shape == tuple(like.shape) and stride == like.stride():
            outputs.append((None, None, tensor.dtype))
        else:
            return None
    return several, isinstance(result, list), tuple(outputs)


def _made(description: Any, like: Tensor | None) -> Tensor:
    shape, stride, dtype = description
    if like is not None:
        shape, stride = like.shape, like.stride()
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


# -- written out ------------------------------------------------------------------------------------------------------

_FLOATS = (torch.float32, torch.float64)  # of others the statistics have another dtype


def _fits(tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> bool:
    return tensor is None or (tuple(tensor.shape) == shape and tensor.is_meta and tensor.dtype == x.dtype)


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _empty(shape: tuple[int, ...], x: Tensor) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _plain(x: Tensor) -> bool:
    return x.is_meta and x.dtype in _FLOATS and x.numel() > 0


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, ...] | None:
    """``x [N, C, *]`` -> the same, and two times ``[C]``."""
    if not _plain(x) or x.ndim < 2 or not _is_dense(x):
        return None
    shape = (x.shape[1],)
    if not all(_fits(t, shape, x) for t in (weight, bias, mean, var)):
        return None
    return _like(x), _empty(shape, x), _empty(shape, x)


def _layer_norm(x: Tensor, normalized: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...] | None:
    """``x [*, normalized]`` -> the same, contiguous, and two times ``[*, 1 ...]``."""
    count, shape = len(normalized), tuple(normalized)
    if not _plain(x) or not count or tuple(x.shape[x.ndim - count :]) != shape:
        return None
    if not all(_fits(t, shape, x) for t in (weight, bias)):
        return None
    outer = (*x.shape[: x.ndim - count], *[1] * count)
    return _empty(tuple(x.shape), x), _empty(outer, x), _empty(outer, x)


def _group_norm(
    x: Tensor, weight: Any, bias: Any, batch: int, channels: int, positions: int, groups: int, eps: float
) -> tuple[Tensor, ...] | None:
    """``x [N, C, *]`` -> the same, contiguous, and two times ``[N, groups]``."""
    if not _plain(x) or x.ndim < 2 or tuple(x.shape[:2]) != (batch, channels) or channels % groups:
        return None
    if x.numel() != batch * channels * positions or not all(_fits(t, (channels,), x) for t in (weight, bias)):
        return None
    return _empty(tuple(x.shape), x), _empty((batch, groups), x), _empty((batch, groups), x)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor | None:
    """``x [N, C_in, *]``, ``weight [C_out, C_in / groups, *]`` -> ``[N, C_out, *]``, contiguous."""
    count = x.ndim - 2
    if transposed or not _plain(x) or not weight.is_meta or weight.dtype != x.dtype or weight.ndim != x.ndim:
        return None
    out, per_group, *kernel = weight.shape
    if x.shape[1] != per_group * groups or out % groups or not _fits(bias, (out,), x):
        return None
    if not len(stride) == len(padding) == len(dilation) == count or min(*stride, *dilation) < 1 or min(padding) < 0:
        return None
    sizes = [
        (size + 2 * pad - step * (length - 1) - 1) // every + 1
        for size, pad, step, length, every in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    return _empty((x.shape[0], out, *sizes), x) if min(sizes) > 0 else None


def _mean(x: Tensor, dims: Any, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    """``x``, contiguous, without the dims, or with ones in their place."""
    if dtype is not None or not dims or not _plain(x) or not x.is_contiguous():
        return None
    if not all(-x.ndim <= dim < x.ndim for dim in dims) or len({dim % x.ndim for dim in dims}) < len(dims):
        return None
    gone = {dim % x.ndim for dim in dims}
    shape = [1 if dim in gone else size for dim, size in enumerate(x.shape) if keepdim or dim not in gone]
    return _empty(tuple(shape), x)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **factors: Any) -> Tensor | None:
    """``bias [n]``, ``a [m, k]``, ``b [k, n]`` -> ``[m, n]``."""
    if a.ndim != 2 or not _plain(a) or not _fits(b, (a.shape[1], b.shape[-1]), a) or not _fits(bias, (b.shape[-1],), a):
        return None
    return _empty((a.shape[0], b.shape[1]), a)


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor | None:
    """``[m, k] x [g, k, n]``, ``[g, m, k] x [g, k, n]``, ``[g, m, k] x [k, n]`` or ``[m, k] x [k, n]`` with g offsets.

    Which widths and dtypes a device can is a question to the device.
    """
    if not a.is_meta or a.shape[-1] != b.shape[-2] or a.dtype != b.dtype or bias is not None:
        return None
    lead = list(a.shape[:1]) if a.ndim == b.ndim == 3 else []
    if a.ndim == b.ndim == 2:
        lead = [] if offs is None else [offs.shape[0]]
    return torch.empty((*lead, a.shape[-2], b.shape[-1]), dtype=out_dtype or a.dtype, device="meta")


_DIRECT: dict[Any, Callable[..., Tensor | tuple[Tensor, ...] | None]] = {
    _aten.convolution.default: _convolution,
    _aten.addmm.default: _addmm,
    _aten._grouped_mm.default: _grouped_mm,
    _aten.mean.dim: _mean,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_group_norm.default: _group_norm,
}
