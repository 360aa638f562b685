"""Complex numbers by their real and imaginary parts, where torch.onnx has no operator for them.

ONNX has none at all: torch.onnx writes a complex tensor as a real one of pairs, and knows how for products, sums and
Fourier transforms, and not for much that only moves entries. Of an operator that is linear in its tensors, both parts
are what it makes of both parts; a product of two is three more steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_any, tree_map_only

aten: Any = torch.ops.aten

# Linear in all of their tensors at once, booleans left out.
_LINEAR = (
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
    aten.select.int, aten.repeat.default, aten.constant_pad_nd.default, aten.slice_scatter.default,
    aten.select_scatter.default, aten.where.self, aten.copy.default, aten.cumsum.default, aten.diagonal.default,
    aten.unfold.default, aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.zeros_like.default,
)  # fmt: skip
# The same, but for integers, which are places.
_INDEXED = (
    aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.index_put.default, aten.scatter.src,
)  # fmt: skip
_PRODUCTS = (aten.mul.Tensor, aten.bmm.default, aten.mm.default)  # linear in each of two factors
_MADE = (aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.new_zeros.default)


def by_parts(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program, in which those operators work on parts; itself where nothing is complex."""
    nodes = [node for node in program.graph.nodes if _is_complex((node.meta.get("val"), _values(node)))]
    if not nodes:
        return program
    usual: dict[Any, Any] = torch.export.default_decompositions()
    rules: dict[Any, Callable[..., Any]] = {node.target: usual[node.target] for node in nodes if node.target in usual}
    rules |= {op: partial(_linear, op) for op in (*_LINEAR, *_INDEXED)}
    rules |= {op: partial(_product, op) for op in _PRODUCTS}
    rules |= {op: partial(_made, op) for op in _MADE}
    rules |= {aten.einsum.default: _einsum, aten.div.Tensor: _quotient, aten.pow.Tensor_Scalar: _power}
    rules |= {aten.exp.default: _exp, aten.log.default: _log, aten._to_copy.default: _to}
    result: torch.export.ExportedProgram = program.run_decompositions(rules)
    return result


def _values(node: fx.Node) -> Any:
    return tree_map_only(fx.Node, lambda arg: arg.meta.get("val"), (node.args, node.kwargs))


def _is_complex(values: Any) -> bool:
    return tree_any(lambda v: isinstance(v, complex) or (isinstance(v, Tensor) and v.is_complex()), values)


def _part(index: int, values: Any, kept: tuple[torch.dtype, ...] = (torch.bool,)) -> Any:
    """The real (0) or imaginary (1) parts of all numbers in a structure; tensors of some dtypes as they are."""

    def part(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return torch.view_as_real(tensor).select(-1, index)
        return torch.zeros_like(tensor) if index and tensor.dtype not in kept else tensor

    values = tree_map_only(complex, lambda number: (number.real, number.imag)[index], values)
    return tree_map_only(Tensor, part, values)


def _linear(op: Any, *args: Any, **kwargs: Any) -> Any:
    if not _is_complex((args, kwargs)):
        return NotImplemented
    kept = (torch.bool, torch.int64, torch.int32) if op in _INDEXED else (torch.bool,)
    real, imaginary = (op(*_part(index, args, kept), **_part(index, kwargs, kept)) for index in (0, 1))
    if isinstance(real, Tensor):
        return torch.complex(real, imaginary)
    return [torch.complex(*pair) for pair in zip(real, imaginary, strict=True)]


def _product(op: Any, left: Any, right: Any) -> Any:
    """``(a + ib) (c + id) = ac - bd + i (ad + bc)``."""
    both = [_is_complex(left), _is_complex(right)]
    if not any(both):
        return NotImplemented
    if both == [True, False]:
        return torch.complex(op(_part(0, left), right), op(_part(1, left), right))
    if both == [False, True]:
        return torch.complex(op(left, _part(0, right)), op(left, _part(1, right)))
    (a, b), (c, d) = ([_part(index, factor) for index in (0, 1)] for factor in (left, right))
    return torch.complex(op(a, c) - op(b, d), op(a, d) + op(b, c))


def _einsum(equation: str, factors: Sequence[Tensor], **kwargs: Any) -> Any:
    def times(left: Any, right: Any) -> Tensor:
        return torch.einsum(equation, left, right)

    if len(factors) == 2:
        return _product(times, *factors)
    return _linear(partial(aten.einsum.default, equation), factors) if len(factors) == 1 else NotImplemented


def _quotient(left: Any, right: Any) -> Any:
    """By a real divisor."""
    if _is_complex(right) or not _is_complex(left):
        return NotImplemented
    return torch.complex(*(_part(index, left) / right for index in (0, 1)))


def _power(base: Tensor, exponent: Any) -> Any:
    """By a whole number of at least one."""
    if not base.is_complex() or _is_complex(exponent) or int(exponent) != exponent or exponent < 1:
        return NotImplemented
    result = base
    for _ in range(int(exponent) - 1):
        result = result * base
    return result


def _log(values: Tensor) -> Any:
    """``log z = log |z| + i arg z``."""
    return torch.complex(values.abs().log(), values.angle()) if values.is_complex() else NotImplemented


def _exp(exponent: Tensor) -> Any:
    """``exp(a + ib) = exp(a) (cos b + i sin b)``."""
    return torch.polar(_part(0, exponent).exp(), _part(1, exponent)) if exponent.is_complex() else NotImplemented


def _made(op: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    """A new tensor of one number."""
    dtype = dtype or next((arg.dtype for arg in args if isinstance(arg, Tensor)), None)
    if dtype is None and _is_complex(args):
        dtype = torch.get_default_dtype().to_complex()
    if dtype is None or not dtype.is_complex:
        return NotImplemented
    real = op(*_part(0, args), dtype=dtype.to_real(), **kwargs)
    if not _is_complex(args):
        return torch.complex(real, torch.zeros_like(real))
    return torch.complex(real, op(*_part(1, args), dtype=dtype.to_real(), **kwargs))


def _to(values: Tensor, *, dtype: Any = None, **kwargs: Any) -> Any:
    """Another dtype: of a complex one the real part, if it is real."""
    wanted = dtype or values.dtype
    if not values.is_complex() and not wanted.is_complex:
        return NotImplemented
    parts = [aten._to_copy.default(_part(index, values), dtype=wanted.to_real(), **kwargs) for index in (0, 1)]
    return torch.complex(*parts) if wanted.is_complex else parts[0]
