"""Aten ops on meta tensors, without doing over what was done before.

PyTorch computes the shapes of many ops by running a decomposition in Python: half a millisecond for a ``batch_norm``,
more for ``hardswish``. Here the kernel of such an op runs once for given shapes, strides, dtypes and other arguments;
after that what it said is made again. A pointwise op says the same of operands of any one shape. Of what networks
are made of the table of ops says it (``Op.meta``), because a pruned one has hardly two layers of the same width.
Whatever does not fit exactly is left to PyTorch's kernel.

Ops whose results have as many entries as the values decide (``nonzero``, a mask as an index) have no kernel on meta:
the node that was recorded knows its own shape, or those of the nodes that take its results apart. Only the one size
that is not known is read there; all others follow from the operands, so it is right in a pruned graph too. Where nobody
knows, it is the largest that is possible.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fxprune.ops.table import is_pointwise, record_of


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments or results of an aten op, which nest in lists and tuples only."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def without_real(args: Any, kwargs: Any) -> Any:
    """The arguments of an op of which some are on meta, all of them there: its kernels take no others beside these."""
    return tree_map_only(Tensor, _to_meta, (args, kwargs))


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


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
        # makes new tensors?, pointwise?, what the table says
        self._kinds: dict[Any, tuple[bool, bool, Callable[..., Any] | None]] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` returns."""
        kinds = self._kinds.get(func)
        if kinds is None:
            record, pure = record_of(func), _makes_new_tensors(func)
            written = record.meta.get(func._overloadname) if record is not None and pure else None
            kinds = self._kinds[func] = pure, is_pointwise(func), written
        pure, pointwise, written = kinds
        if written is not None:
            result = written(*args, **kwargs)
            if result is not None:
                return result
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
        return first if is_dense(first) else None
    return first if all(t.is_contiguous() and _fits_into(t, first) for t in whole) else None


def _fits_into(tensor: Tensor, x: Tensor) -> bool:
    """Does it broadcast to the shape of ``x``?"""
    if tensor.shape == x.shape:
        return True
    sizes = zip(reversed(tensor.shape), reversed(x.shape), strict=False)
    return tensor.ndim <= x.ndim and all(n in (1, wanted) for n, wanted in sizes)


def is_dense(tensor: Tensor) -> bool:
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


# -- for the records of ops -------------------------------------------------------------------------------------------

_FLOATS = (torch.float32, torch.float64)  # of others the statistics have another dtype


def fits(tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> bool:
    return tensor is None or (tuple(tensor.shape) == shape and tensor.is_meta and tensor.dtype == x.dtype)


def like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def empty(shape: tuple[int, ...], x: Tensor) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device="meta")


def is_plain(x: Tensor) -> bool:
    return x.is_meta and x.dtype in _FLOATS and x.numel() > 0


def is_within(index: Tensor, size: int, lowest: int = 0) -> bool:
    """Whether the index is known, and every position of it is there."""
    known = not index.is_meta and index.dtype in (torch.int64, torch.int32)
    return known and bool((index >= lowest).all()) and bool((index < size).all())


def on_meta(shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor without values."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def recorded_shape(node: fx.Node | None) -> Sequence[int] | None:
    """Of what a node gave in the recorded run."""
    return None if node is None else node.meta.get("shape")


def recorded_count(node: fx.Node | None, most: int) -> int:
    """The first size of what the node gave, or of a part of it, or of what it picks as an index; else ``most``."""
    if node is None:
        return most
    users = (user for user in node.users if user.target in (operator.getitem, getattr))
    shapes = [recorded_shape(node), *map(recorded_shape, users)]
    return next((int(shape[0]) for shape in shapes if shape), most)
