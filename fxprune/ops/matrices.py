"""The dims of a matrix or a transform stay, the others pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from fxprune.labels.factors import Factor, Labels
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation
from fxprune.ops.call import Call
from fxprune.ops.refit import NOT_FOLLOWED, Followed
from fxprune.ops.repair import LEFT_ALONE, Repair, set_argument
from fxprune.ops.table import adder, argument


def _free_of(run: Propagation, tensor: Tensor, dims: Sequence[int], text: str) -> Labels:
    """The labels of a tensor whose ``dims`` are mixed in a way that holds them all."""
    return tuple(f for f in (run.mix(f, dims, text, ordered=True) for f in run.labels(tensor)) if f is not None)


def _decomposed(run: Propagation, call: Call) -> list[Labels]:
    """``[*, m, n]`` -> anything of ``[*]``."""
    lead = call.input.ndim - 2
    labels = _free_of(run, call.input, [lead, lead + 1], f"{call.name} of a matrix of channels")
    result = []
    for out in call.outputs:
        shape = [(*f.ids.shape[:lead], *[1] * (out.ndim - lead)) for f in labels]
        result.append(tuple(Factor(f.ids.reshape(s), f.dim) for f, s in zip(labels, shape, strict=True)))
    return result


def _solved(run: Propagation, call: Call) -> list[Labels]:
    """``A [*, n, n]``, ``B [*, n, k]`` -> ``[*, n, k]``, from the right ``B [*, k, n]``: the k columns pass."""
    known, matrix = call.tensors
    text, others = f"{call.name} with a matrix of channels", [()] * (len(call.outputs) - 1)
    if matrix.ndim < max(known.ndim, 2):
        run.lock_all((*run.labels(known), *run.labels(matrix)), text)
        return [(), *others]
    row = matrix.ndim - (2 if call.get("left", True) else 1)
    batch = _free_of(run, known, [known.ndim - 2, known.ndim - 1], text)
    columns = _free_of(run, matrix, [row], text)
    shape = tuple(call.out.shape)
    operands = [(tuple(matrix.shape), columns), ((*known.shape[:-2], 1, 1), batch)]
    return [join_positions(run, operands, shape), *others]


def _transformed(run: Propagation, call: Call) -> Labels:
    return _free_of(run, call.input, call.dims(), "a Fourier transform over channels")


def _folded(run: Propagation, call: Call) -> Labels:
    """``[*, windows, *, size]`` -> windows that overlap are summed along ``dim``; the last dim goes."""
    x, out = call.input, call.out
    labels = _free_of(run, x, [call["dim"] % out.ndim, x.ndim - 1], "windows are summed")
    return tuple(Factor(f.ids.reshape(f.ids.shape[:-1]), f.dim) for f in labels)


def _strided(run: Propagation, call: Call) -> Labels:
    """Windows over the last dims of a contiguous tensor (``torch.stft``): the dims before them pass."""
    x, sizes, strides = call.input, list(call["size"]), list(call["stride"])
    result, lead = [], 0
    inner = x.numel()
    for size, stride in zip(x.shape, x.stride(), strict=True):  # the leading dims that are taken as they are
        inner = stride
        reach = sum((n - 1) * s for n, s in zip(sizes[lead + 1 :], strides[lead + 1 :], strict=True))
        if lead >= len(sizes) or (sizes[lead], strides[lead]) != (size, stride) or reach >= inner:
            break
        lead += 1
    plain = x.is_contiguous() and call.get("storage_offset") in (None, x.storage_offset())
    for factor in run.labels(x):
        if plain and all(d < lead for d in factor.varying):
            ids = factor.ids.reshape(*factor.ids.shape[:lead], *[1] * (len(sizes) - lead))
            result.append(Factor(ids, factor.dim))
        else:
            run.lock(factor.ids, "as_strided works by position")
    return tuple(result)


# -- repairs -----------------------------------------------------------------------------------------------------------


def _unfold_backward(repair: Repair, node: fx.Node) -> None:
    set_argument(
        node, 1, "input_sizes", repair.size_list(node, argument(node, 1, "input_sizes"), repair.promised(node))
    )


# -- what the recorder may not take on trust --------------------------------------------------------------------------


def _strides_are_refused(x: Tensor, size: list[int], stride: list[int], offset: int | None = None) -> bool:
    last = sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    start = x.storage_offset() if offset is None else offset
    return bool((start + last + 1) * x.element_size() > x.untyped_storage().nbytes())


# -- the ops -----------------------------------------------------------------------------------------------------------

_UNCOUNTED = "PyTorch's counter leaves it out, too"
_op = adder(__name__, mask="the channels of a matrix or a transform stay; the others are apart from each other",
            refit=NOT_FOLLOWED)  # fmt: skip

_op(
    "linalg_inv_ex", "linalg_cholesky_ex", "cholesky", "cholesky_inverse", "linalg_qr", "_linalg_svd", "_linalg_eigh",
    "linalg_eig", "_linalg_eigvals", "_linalg_det", "_linalg_slogdet", "linalg_lu", "linalg_lu_factor_ex",
    "linalg_matrix_exp", "linalg_pinv",
    label=_decomposed, cost=_UNCOUNTED,
)  # fmt: skip
_op("linalg_solve_triangular", "_linalg_solve_ex", label=_solved, cost=_UNCOUNTED)
_op("_fft_r2c", "_fft_c2c", "_fft_c2r", label=_transformed, cost=_UNCOUNTED, repair="a transform's dims stay")
_op("unfold_backward", label=_folded, repair=_unfold_backward)
_op(
    "as_strided", label=_strided, moves=True, takes="anything", refuses=_strides_are_refused,
    repair=LEFT_ALONE, refit=Followed.MOVED,
)  # fmt: skip
