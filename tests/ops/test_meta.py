"""What ``MetaKernels`` says of an op is what PyTorch's own meta kernel says of it."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.ops.meta import MetaKernels

A = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


X = meta(2, 6, 5, 7)
LAYOUTS = [
    X,
    X.contiguous(memory_format=torch.channels_last),
    meta(2, 6, 10, 7)[:, :, ::2],
    meta(2, 5, 7, 6).permute(0, 3, 1, 2),
    meta(2, 6, 1, 1).expand(2, 6, 5, 7),
    meta(2, 6, 5, 7, dtype=torch.bfloat16),
]


def said(result: Any) -> list[Any]:
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [type(result), *((tuple(t.shape), t.stride(), t.dtype, t.is_meta) for t in tensors)]


@pytest.mark.parametrize("x", LAYOUTS, ids=lambda x: f"{list(x.stride())} {x.dtype}")
def test_the_same_is_said_the_first_time_and_again(x: Tensor) -> None:
    kernels, v, w = MetaKernels(), meta(6, dtype=x.dtype), meta(7, dtype=x.dtype)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (A.native_batch_norm.default, (x, v, v, v, v, False, 0.1, 1e-5)),
        (A.native_batch_norm.default, (x, None, None, v, v, False, 0.1, 1e-5)),
        (A.native_layer_norm.default, (x, [7], w, w, 1e-5)),
        (A.native_layer_norm.default, (x, [5, 7], None, None, 1e-5)),
        (A.native_group_norm.default, (x, v, v, 2, 6, 35, 3, 1e-5)),
        (A.hardswish.default, (x,)),
        (A.add.Tensor, (x, x)),
        (A.add.Tensor, (x, meta(6, 1, 1))),
        (A.gt.Scalar, (x, 0)),
        (A.mul.Tensor, (x, meta())),
        (A.convolution.default, (x, meta(4, 6, 3, 3, dtype=x.dtype), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
        (A.convolution.default, (x, meta(4, 3, 1, 3, dtype=x.dtype), v[:4], [2, 1], [0, 2], [1, 2], False, [0, 0], 2)),
        (A.convolution.default, (x[0], meta(4, 5, 3, dtype=x.dtype), None, [3], [1], [1], False, [0], 1)),
        (A.convolution.default, (x, meta(4, 3, 2, 3, dtype=x.dtype), v[:4], [2, 1], [0, 2], [3, 1], False, [0, 0], 2)),
        (A.convolution.default, (x, meta(6, 4, 3, 3, dtype=x.dtype), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1)),
        (A.mean.dim, (x, [2, 3], True)),
        (A.mean.dim, (x, [-1])),
        (A.mean.dim, (x, [0, -2])),
        (A.mean.dim, (x, [-1, 1])),
        (A.mean.dim, (x, [0])),
        (A.mean.dim, (x, None)),
        (A.mul.Tensor, (x, meta(2, 6, 1, 1, dtype=x.dtype))),
        (A.mul.Tensor, (meta(2, 6, 1, 1, dtype=x.dtype), x)),
        (A.add.Tensor, (x, meta(6, 1, 1, dtype=torch.float64))),
        (A.add.Tensor, (x, meta(2, 5, 7, 6, dtype=x.dtype).permute(0, 3, 1, 2)[:1])),
        (A.where.self, (meta(5, 7, dtype=torch.bool), x, meta(dtype=x.dtype))),
        (A.mul_.Tensor, (x, meta(6, 1, 1, dtype=x.dtype))),
        (A.addmm.default, (w, x[0, 0], meta(7, 7, dtype=x.dtype))),
        (A.addmm.default, (v[:1], x[0, 0], meta(7, 1, dtype=x.dtype))),
        (A.addmm.default, (w, x[0, 0, :1], meta(7, 7, dtype=x.dtype).t())),
        (A.addmm.default, (meta(5, 7, dtype=x.dtype), x[0, 0], meta(7, 7, dtype=x.dtype))),
        (A.view.default, (X, [2, 30, 7])),
        (A.split.Tensor, (x, 3, 1)),
    ]
    for func, args in calls:
        expected = said(func(*args))
        for _ in range(2):
            assert said(kernels(func, args, {})) == expected, func


def _arguments(op: Any, x: Tensor) -> tuple[Any, ...] | None:
    """What a pointwise op may be given, or None: tensors, and ones for numbers."""
    values: list[Any] = []
    for argument in op._schema.arguments:
        if argument.has_default_value() or argument.kwarg_only:
            break
        kind = str(argument.type)
        if kind not in ("Tensor", "number", "float", "int", "bool"):
            return None
        values.append(x if kind == "Tensor" else 1)
    return tuple(values)


@pytest.mark.parametrize("x", LAYOUTS[:5], ids=lambda x: f"{list(x.stride())}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_every_op_that_is_tagged_as_pointwise(x: Tensor, dtype: torch.dtype) -> None:
    """On meta, or, where that differs in its strides, on the processor."""
    kernels, known = MetaKernels(), 0
    x = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")
    packets = [getattr(A, name) for name in dir(A) if hasattr(getattr(A, name), "overloads")]
    for op in (getattr(packet, overload) for packet in packets for overload in packet.overloads()):
        args = _arguments(op, x)
        if torch.Tag.pointwise not in op.tags or op._schema.is_mutable or not args:
            continue
        try:
            expected = [said(op(*args))[1:]]
        except Exception:  # no kernel for this dtype, or other arguments
            continue
        real = torch.empty_strided(x.shape, x.stride(), dtype=dtype).fill_(1)
        with contextlib.suppress(Exception):
            expected.append([(*said(op(*(real if a is x else a for a in args)))[1][:3], True)])
        for _ in range(2):
            assert said(kernels(op, args, {}))[1:] in expected, op
        known += 1
    assert known > 100


def test_a_copy_is_laid_out_as_it_is_told() -> None:
    kernels, x = MetaKernels(), X.permute(0, 2, 3, 1)
    for layout in (torch.contiguous_format, torch.preserve_format):
        for _ in range(2):
            result = kernels(A.clone.default, (x,), {"memory_format": layout})
            assert result.stride() == A.clone.default(x, memory_format=layout).stride()


def test_what_is_known_of_one_shape_is_not_said_of_another() -> None:
    kernels = MetaKernels()
    for shape in ((2, 3), (3, 2), (4, 5)):
        assert kernels(A.gelu.default, (meta(*shape),), {}).shape == shape
        assert kernels(A.sum.dim_IntList, (meta(*shape), [1]), {}).shape == shape[:1]
    assert kernels(A.add.Tensor, (meta(2, 2), 1), {}).dtype == torch.float32
    assert kernels(A.add.Tensor, (meta(2, 2, dtype=torch.int64), 1), {}).dtype == torch.int64
    assert kernels(A.add.Tensor, (meta(2, 2, dtype=torch.int64), 1.0), {}).dtype == torch.float32


def test_in_place_ops_hand_back_their_operand_and_views_stay_views() -> None:
    kernels, x = MetaKernels(), meta(2, 4)
    assert kernels(A.hardswish_.default, (x,), {}) is x
    assert kernels(A.t.default, (x,), {})._base is x


def test_operands_that_do_not_fit_are_refused_as_by_pytorch() -> None:
    kernels = MetaKernels()
    with pytest.raises(RuntimeError):
        kernels(A.native_layer_norm.default, (X, [8], None, None, 1e-5), {})
    for weight in (meta(4, 5, 3, 3), meta(4, 6, 9, 3)):  # other channels, larger than the image
        with pytest.raises(RuntimeError):
            kernels(A.convolution.default, (X, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), {})
    with pytest.raises(IndexError):
        kernels(A.mean.dim, (X, [4]), {})
    for shape, stride in (((4, 5, 3, 3), [1, 1]), ((4, 6, 9, 3), [1, 1]), ((4, 6, 3), [1, 1]), ((4, 6, 6, 3), [1])):
        args = (X, meta(*shape), None, stride, [0, 0], [1, 1], False, [0, 0], 1)
        with pytest.raises((RuntimeError, IndexError)):
            kernels(A.convolution.default, args, {})
    for wrong in ((meta(7), meta(3, 5), meta(6, 7)), (meta(6), meta(3, 5), meta(5, 7)), (meta(7), meta(5), meta(5, 7))):
        with pytest.raises((RuntimeError, ValueError)):
            kernels(A.addmm.default, wrong, {})
    with pytest.raises(RuntimeError):
        kernels(A.mean.dim, (X, [1, -3]), {})
    with pytest.raises(IndexError):
        kernels(A.mean.dim, (X, [4]), {})
    kernels(A.mul.Tensor, (meta(2, 3), meta(1, 3)), {})
    with pytest.raises(RuntimeError):
        kernels(A.mul.Tensor, (meta(2, 3), meta(2, 2)), {})
    for wrong in (meta(2, 4), meta(1, 2, 3)):
        with pytest.raises(RuntimeError):
            kernels(A.add_.Tensor, (meta(2, 3), wrong), {})


def test_real_operands_are_computed() -> None:
    kernels = MetaKernels()
    for value in (1.0, 2.0):
        assert kernels(A.neg.default, (torch.tensor([value]),), {}).item() == -value
