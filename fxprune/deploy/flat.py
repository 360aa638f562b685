"""A network as a function from tensors to a tuple of tensors.

The ONNX graph's inputs and outputs are then exactly the tensors in the model's, in the order of
``fxprune.recording.structure``, whatever the nesting, in objects too, and however the user ordered the keyword
arguments; what is no tensor (a number, a None) is not in the file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode

from fxprune.recording.inputs import TensorSpec, device_of, map_leaves, tensors_of


class Flat(nn.Module):
    """``module`` as a function from tensors to a tuple of tensors; what is no tensor is built in.

    Attributes:
        record: the example inputs of ``module``, see ``fxprune.recording.inputs.describe_inputs``.
    """

    def __init__(self, module: nn.Module, record: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.record = record

    @property
    def name(self) -> str:
        """The class of the module, for messages."""
        return type(self.module).__name__

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return device_of(self.module)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with _InOtherOps():
            return tuple(tensors_of(self.call(tensors)))

    def call(self, tensors: Sequence[Tensor]) -> Any:
        """What ``module`` returns for these tensors."""
        remaining = iter(tensors)
        filled = map_leaves(lambda leaf: next(remaining) if isinstance(leaf, TensorSpec) else leaf, dict(self.record))
        return self.module(*filled["args"], **filled["kwargs"])


_REVERSED = (Tensor.__rsub__, torch.rsub)  # torch.onnx cannot promote what ``1.0 - mask`` reads
_LARGEST = {F.adaptive_max_pool1d: 1, F.adaptive_max_pool2d: 2, F.adaptive_max_pool3d: 3}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_GROUPED_PRODUCTS = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


class _InOtherOps(TorchFunctionMode):
    """What torch.onnx does not know as it was called, by means of what it does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = None
        if func is F.scaled_dot_product_attention:
            made = _folded_attention(*args, **(kwargs or {}))
        elif func is torch._grouped_mm or str(func) in _GROUPED_PRODUCTS:
            made = _grouped_product(*args, **(kwargs or {}))
        elif func is torch.linalg.solve_triangular:
            made = _solved(*args, **(kwargs or {}))
        elif func in (torch._is_all_true, Tensor._is_all_true):
            made = args[0].all()
        elif func in (torch.as_strided, Tensor.as_strided):
            args = (_as_it_lies(args[0]), *args[1:])
        elif func in (torch.squeeze, Tensor.squeeze) and len(args) + len(kwargs or {}) == 2:
            made = _squeezed(*args, **(kwargs or {}))
        elif func in _LARGEST:
            made = _largest_of_parts(_LARGEST[func], *args, **(kwargs or {}))
        elif func is torch.cdist:
            made = _distances(*args, **(kwargs or {}))
        elif func is F.rrelu:
            made = _leaky(*args, **(kwargs or {}))
        elif func in _REVERSED and isinstance(args[1], float) and args[0].dtype in _INTEGERS:
            args = (args[0].to(torch.get_default_dtype()), *args[1:])
        return func(*args, **(kwargs or {})) if made is None else made


def _grouped_product(
    rows: Tensor, matrices: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor | None:
    """The experts of a mixture, ``[m, k] x [g, k, n] -> [m, n]``: all products of a row, and the one that it is for.

    ``offs [g]``: where the rows of each matrix end; what rows after the last end become is not defined.

    Returns:
        None: for other sizes, with a bias, or in another dtype.
    """
    if offs is None or rows.ndim != 2 or matrices.ndim != 3 or bias is not None or out_dtype not in (None, rows.dtype):
        return None
    place = torch.arange(rows.shape[0], device=rows.device)
    chosen = (place[:, None] >= offs[None, :-1]).sum(1)
    products = torch.matmul(rows, matrices)
    return products.gather(0, chosen[None, :, None].expand(1, -1, products.shape[-1]))[0]


def _squeezed(tensor: Tensor, dim: Any) -> Tensor | None:
    """The tensor itself where these dims have other sizes than 1, which torch leaves and ONNX does not take."""
    sizes = [tensor.shape[d] for d in (dim if isinstance(dim, (tuple, list)) else (dim,)) if isinstance(d, int)]
    return tensor.view_as(tensor) if sizes and all(isinstance(n, int) and n != 1 for n in sizes) else None


def _largest_of_parts(count: int, tensor: Tensor, output_size: Any, return_indices: bool = False) -> Tensor | None:
    """Adaptive max pooling over the last ``count`` dims, one after the other: of ``n`` entries part ``i`` of ``k`` has
    those from ``floor(i n / k)`` up to ``ceil((i + 1) n / k)``.

    Returns:
        None: with the places, or of a size that is left open, unless there is one part.
    """
    sizes = [output_size] * count if isinstance(output_size, int) else list(output_size)
    for dim, parts in zip(range(-count, 0), sizes, strict=True):
        n = tensor.shape[dim]
        if return_indices or (parts not in (1, None) and not isinstance(n, int)):
            return None
        if parts == 1:
            tensor = tensor.amax(dim, keepdim=True)
        elif parts not in (n, None):
            spans = [(i * n // parts, -(-(i + 1) * n // parts)) for i in range(parts)]
            tensor = torch.cat([tensor.narrow(dim, a, b - a).amax(dim, keepdim=True) for a, b in spans], dim)
    return tensor


def _distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """``cdist`` of ``x1 [*, i, k]`` and ``x2 [*, j, k]`` from every difference, as it is for few rows."""
    distances: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)
    return distances


def _leaky(
    tensor: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor | None:
    """``rrelu`` where nothing trains: its slope is the mean. None where it draws one."""
    return None if training else F.leaky_relu(tensor, (lower + upper) / 2, inplace)


def _as_it_lies(tensor: Tensor) -> Tensor:
    """The tensor with its dims in the order of memory: strides go by that, and torch.onnx takes any for contiguous.

    Returns:
        The tensor itself, where there is no such order: it has gaps, or an entry twice.
    """
    order: list[int] = []
    remaining = list(range(tensor.ndim))
    step: Any = 1
    while remaining:
        single = [dim for dim in remaining if statically_known_true(tensor.shape[dim] == 1)]
        next_in = [dim for dim in reversed(remaining) if statically_known_true(tensor.stride(dim) == step)]
        if not (single or next_in):
            return tensor
        dim = (single or next_in)[0]
        order.insert(0, dim)
        remaining.remove(dim)
        step = step * tensor.shape[dim]
    return tensor.permute(order)


def _solved(
    matrix: Tensor, right: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False, out: Any = None
) -> Tensor | None:
    """``X`` of ``matrix X = right``, or of ``X matrix = right``, with ``matrix [..., n, n]`` triangular.

    Returns:
        None: of an ``n`` that is left open, or where the result is to be written.
    """
    if not isinstance(matrix.shape[-1], int) or matrix.shape[-1] == 0 or out is not None:
        return None
    inverse = _inverse(matrix.mT, unitriangular).mT if upper else _inverse(matrix, unitriangular)
    return inverse @ right if left else right @ inverse


def _inverse(matrix: Tensor, unit: bool) -> Tensor:
    """Of a lower triangular matrix ``[..., n, n]``; ``unit``: the diagonal is taken for ones.

    Blocks along the diagonal are joined in pairs, ``[[A, 0], [C, B]]`` to ``[[A', 0], [-B' C A', B']]``, which is as
    exact as substitution row by row, in ``log n`` steps. (A series of powers is none: powers of a matrix grow.)
    """
    n = matrix.shape[-1]
    whole = 1 << (n - 1).bit_length()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    ones = torch.ones_like(diagonal)
    blocks = F.pad(ones if unit else ones / diagonal, (0, whole - n), value=1.0)[..., None, None]
    matrix = F.pad(matrix, (0, whole - n, 0, whole - n))
    size = 1
    while size < whole:
        pairs = whole // (2 * size)
        below = matrix.unflatten(-1, (pairs, 2, size)).unflatten(-4, (pairs, 2, size))[..., 1, :, :, 0, :]
        below = below.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        first, second = blocks.unflatten(-3, (pairs, 2)).unbind(-3)
        corner = -(second @ below @ first)
        upper = torch.cat([first, torch.zeros_like(first)], -1)
        blocks = torch.cat([upper, torch.cat([corner, second], -1)], -2)
        size *= 2
    return blocks[..., 0, :n, :n]


def _folded_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any,
                      **options: Any) -> Tensor:  # fmt: skip
    if query.ndim in (2, 4):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **options)
    batch = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in (query, key, value)))

    def folded(tensor: Tensor) -> Tensor:
        return tensor.expand(*batch, *tensor.shape[-3:]).reshape(-1, *tensor.shape[-3:])

    mask = folded(attn_mask) if attn_mask is not None and attn_mask.ndim > 3 else attn_mask
    result = F.scaled_dot_product_attention(folded(query), folded(key), folded(value), mask, *rest, **options)
    return result.reshape(*batch, *result.shape[-3:])
