"""The mask oracle: the pruned model must compute what the dense model computes with the same channels masked.

The dense graph runs with every slice that the plan names set to zero. Where an op computes a statistic over channels
(``ChannelGraph.statistics``), the statistic is taken over the kept channels only. The oracle reads the plan's indices
and the labels' masks; it shares no code with the rewriter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from fxprune.analysis import ValueInterpreter, placeholder_values, replay
from fxprune.channels import ChannelGraph
from fxprune.cost import Keep
from fxprune.errors import VerificationError
from fxprune.inputs import leaves_of, map_leaves, tensors_of
from fxprune.labels.factors import Labels
from fxprune.labels.propagate import Propagation, TensorLabels, describe
from fxprune.meta import OpMode, tensors_in
from fxprune.op_table import Op, record_of
from fxprune.plan import PruningPlan
from fxprune.randomness import drawn, draws
from fxprune.recording import named_tensors

TOLERANCE = 1e-5
"""Largest accepted relative error in float32: ``max |pruned - masked| / max |masked|`` over every output."""

DOUBLE_TOLERANCE = 1e-9
"""The same where a network amplifies rounding so much that float32 exceeds its tolerance, computed in double."""

Inputs = tuple[Sequence[Any], Mapping[str, Any]]


Compared = Literal["numbers", "flags", "nothing"]


class ReplayError(VerificationError):
    """The labels are not known for inputs of these sizes: an op in the graph cannot be interpreted for them."""


@dataclass(frozen=True)
class Agreement:
    """Relative errors of the pruned model against the masked one: as it is, and in double where that was needed.

    ``compared``: what the outputs hold. Of flags alone (booleans) every one was the same, and no number can be told.
    """

    error: float
    in_double: float | None = None
    compared: Compared = "numbers"


def relative_error(found: Any, expected: Any) -> float:
    """``max |found - expected| / max |expected|``, the largest over all output tensors; 1 where any flag differs.

    Raises:
        VerificationError: if the outputs differ in structure or shape.
    """
    a, b = leaves_of(found), leaves_of(expected)
    if len(a) != len(b):
        raise VerificationError(f"The outputs differ in structure: {len(a)} values instead of {len(b)}.")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not isinstance(y, Tensor):
            continue
        if not isinstance(x, Tensor) or x.shape != y.shape:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise VerificationError(f"The shape of an output differs: {shape} instead of {list(y.shape)}.")
        if y.numel() == 0:
            continue
        x, y = _dense(x.detach()), _dense(y.detach())
        if not torch.equal(x.isfinite(), y.isfinite()):
            return float("inf")
        finite = y.isfinite()
        kind = torch.complex128 if y.is_complex() else torch.float64
        x, y = x[finite].to(kind), y[finite].to(kind)
        if y.numel():
            scale = float(y.abs().max())
            worst = max(worst, float((x - y).abs().max()) / (scale if scale > 0 else 1.0))
    return worst


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def mask_oracle(
    dense: fx.GraphModule, pruned: fx.GraphModule, graph: ChannelGraph, plan: PruningPlan, keep: Keep, inputs: Inputs
) -> Agreement:
    """The relative error of ``pruned`` against the masked ``dense`` on ``inputs``.

    Above the tolerance both are computed in double: a network may amplify what float32 rounds.

    Raises:
        VerificationError: if it exceeds the tolerance, and is no rounding error.
    """
    error, compared = _compare(dense, pruned, graph, plan, keep, inputs)
    if error <= TOLERANCE:
        return Agreement(error, None, compared)
    with _InDouble():
        exact, _ = _compare(_double(dense), _double(pruned), graph, plan, keep, map_leaves(_to_double, inputs))
    if exact <= DOUBLE_TOLERANCE:
        return Agreement(error, exact, compared)
    raise VerificationError(
        f"The pruned model differs from its masked original: relative error {error:.1e} ({exact:.1e} in double). "
        "This is a fault of fxprune; please report it with the model. The model that was given is unchanged."
    )


def _compare(
    dense: fx.GraphModule, pruned: fx.GraphModule, graph: ChannelGraph, plan: PruningPlan, keep: Keep, inputs: Inputs
) -> tuple[float, Compared]:
    expected, noise = _masked_run(dense, graph, plan, keep, inputs)
    values = [t for t in tensors_of(expected) if t.numel()]
    floats = [_dense(t) for t in values if t.is_floating_point()]
    if floats and not any(bool(t.isfinite().any()) for t in floats):
        raise VerificationError(
            "The masked model's outputs are not finite on random inputs, so nothing can be proven. "
            "Check the weights, or pass verify=False."
        )
    small = _eval_copy(pruned)
    with torch.no_grad(), ExitStack() as stack:
        if noise:
            stack.enter_context(_PlainAttention())
            stack.enter_context(_Redrawing(noise))
        found = small(*_fresh(inputs[0]), **_fresh(inputs[1]))
    return relative_error(found, expected), compared(expected)


def compared(outputs: Any) -> Compared:
    """What these outputs hold that can be compared."""
    values = [t for t in tensors_of(outputs) if t.numel()]
    return "numbers" if any(t.dtype != torch.bool for t in values) else "flags" if values else "nothing"


def masked_output(dense: fx.GraphModule, graph: ChannelGraph, plan: PruningPlan, keep: Keep, inputs: Inputs) -> Any:
    """What the dense model computes in eval mode with the channels that go masked."""
    return _masked_run(dense, graph, plan, keep, inputs)[0]


def _masked_run(
    dense: fx.GraphModule, graph: ChannelGraph, plan: PruningPlan, keep: Keep, inputs: Inputs
) -> tuple[Any, list[_Draw]]:
    """The masked model's outputs, and every random op that ran."""
    masked = _eval_copy(dense)
    zero_slices(masked, plan)
    run, kept, noise = _replayed(dense, graph, keep, inputs)
    mode = _Masking(_masks(run, kept), noise)
    values = placeholder_values(masked, *_fresh(inputs))
    with torch.no_grad(), _PlainAttention(), mode:
        return _Interpreter(masked, mode, run, kept).run(*values), mode.drawn


_Masks = dict[tuple[str, str, int], Tensor]


_Shapes = dict[tuple[int, ...], Tensor]


def _replayed(
    dense: fx.GraphModule, graph: ChannelGraph, keep: Keep, inputs: Inputs
) -> tuple[Propagation, Keep, list[_Shapes]]:
    """The labels for these inputs' shapes, which of their atoms stay, and the masks of every random op by shape."""
    random: list[list[TensorLabels]] = []

    def watch(run: Propagation, func: Any, given: Any, named: Any, out: Any) -> None:
        if draws(func, given, named):
            random.append([describe(run, t) for t in tensors_in((*given, *named.values(), out))])

    run, failed = replay(dense, graph, graph.everything(), *inputs, watch=watch)
    if failed:
        raise ReplayError(f"The labels cannot be replayed on the verification inputs: {failed}.")
    kept = np.ones(len(run.classes), dtype=np.bool_)
    kept[: graph.channel_count] = keep
    masks = [{known.shape: _mask(run, kept, known.labels) for known in tensors} for tensors in random]
    return run, kept, masks


def _mask(run: Propagation, kept: Keep, labels: Labels) -> Tensor:
    """Which positions of a tensor with these labels are kept, of size 1 where that does not vary."""
    mask = torch.ones((), dtype=torch.bool)
    for factor in labels:
        mask = mask & torch.from_numpy(np.ascontiguousarray(kept[run.classes.find(factor.ids)]))
    return mask


def _masks(run: Propagation, kept: Keep) -> _Masks:
    """(node, op, index) -> which positions of the op's input are kept, where any is not."""
    masks = {(s.node, s.op, s.index): _mask(run, kept, s.labels) for s in run.statistics}
    return {key: mask for key, mask in masks.items() if not bool(mask.all())}


def zero_slices(module: nn.Module, plan: PruningPlan) -> None:
    """Set every slice that ``plan`` drops to zero, in place."""
    tensors = named_tensors(module)
    with torch.no_grad():
        for name, dims in plan.kept.items():
            tensor = tensors[name]
            for dim, kept in dims.items():
                if kept and isinstance(kept[0], list):
                    stays = torch.zeros(len(kept), tensor.shape[dim])
                    for row, indices in enumerate(kept):
                        stays[row, indices] = 1
                    stays = stays.repeat_interleave(tensor.shape[0] // len(kept), 0)
                    shape = [
                        tensor.shape[0] if d == 0 else tensor.shape[d] if d == dim else 1 for d in range(tensor.ndim)
                    ]
                else:
                    stays = torch.zeros(tensor.shape[dim])
                    stays[kept] = 1
                    shape = [-1 if d == dim else 1 for d in range(tensor.ndim)]
                tensor.mul_(stays.reshape(shape).to(tensor))


def _eval_copy(module: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(module).eval()


def _fresh(tree: Any) -> Any:
    return map_leaves(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


def _to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _double(module: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(module).double()


class _Interpreter(ValueInterpreter):
    """Runs the masked graph. What is not finite in a masked channel (0 / 0) is set to 0, or it would spread."""

    def __init__(self, module: fx.GraphModule, mode: _Masking, run: Propagation, kept: Keep):
        super().__init__(module)
        self._mode, self._run, self._kept = mode, run, kept

    def run_node(self, n: fx.Node) -> Any:
        self._mode.enter(n.name)
        result = super().run_node(n)
        known = self._run.node_labels.get(n.name)
        for value, label in zip(tree_flatten(result)[0], tree_flatten(known)[0], strict=False):
            dense = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
            if dense and isinstance(label, TensorLabels):
                self._clean(value, label)
        return result

    def _clean(self, value: Tensor, label: TensorLabels) -> None:
        if not label.labels or bool(value.isfinite().all()):
            return
        mask = _mask(self._run, self._kept, label.labels)
        if _fits(mask, value):
            value.masked_fill_(~_on(mask, value) & ~value.isfinite(), 0)


class _PlainAttention(TorchFunctionMode):
    """Attention as the ops that it is made of, as the labels saw it: a fused kernel would hide the products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return _attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        nothing = torch.zeros((), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, nothing, nothing - torch.inf)
    out, _ = torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )
    return out


@dataclass(frozen=True)
class _Draw:
    """A random op of the masked model, with what it was given. ``masks``: shape -> which positions stay."""

    func: Any
    args: Any
    kwargs: Any
    seed: int
    masks: _Shapes

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, seed: int, masks: _Shapes) -> _Draw:
        """A call that is about to be made: it may write to its operands."""
        args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), (tuple(args), dict(kwargs)))
        return cls(func, args, kwargs, seed, {shape: mask for shape, mask in masks.items() if not bool(mask.all())})

    def again(self, given: Sequence[Tensor]) -> Any:
        """The same numbers, from operands of which the kept positions are those of the cut tensors ``given``."""
        left = iter(given)
        args, kwargs = tree_map_only(Tensor, lambda t: self._whole(t, next(left)), (self.args, self.kwargs))
        return drawn(self.func, args, kwargs, self.seed)

    def _whole(self, dense: Tensor, cut: Tensor) -> Tensor:
        dense = dense.clone()
        dense[self._stays(dense)] = cut.to(dense.dtype).reshape(-1)
        return dense

    def cut(self, dense: Tensor) -> Tensor:
        """The kept positions, in a row."""
        return dense[self._stays(dense)]

    def _stays(self, dense: Tensor) -> Tensor:
        mask = self.masks.get(tuple(dense.shape), torch.ones((), dtype=torch.bool))
        return _on(mask, dense)


class _Redrawing(OpMode):
    """The pruned model's random numbers: those of the masked model, without the positions that went.

    The numbers are drawn again for whole tensors, whose kept positions hold what the pruned model computed.
    """

    supports_higher_order_operators = True

    def __init__(self, noise: Sequence[_Draw]):
        super().__init__()
        self._noise = list(noise)
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not draws(func, args, kwargs):
            return func(*args, **kwargs)
        place, self._count = self._count, self._count + 1
        if place >= len(self._noise) or self._noise[place].func is not func:  # the comparison will tell
            return drawn(func, args, kwargs, place)
        draw = self._noise[place]
        given = [t.detach().clone() for t in tensors_in((*args, *kwargs.values()))]
        result = drawn(func, args, kwargs, draw.seed)
        try:
            whole = draw.again(given)
            pairs = [*zip(tensors_in((result,)), map(draw.cut, tensors_in((whole,))), strict=True)]
            pairs = [(own, cut.reshape(own.shape)) for own, cut in pairs]
        except (RuntimeError, IndexError, StopIteration):  # other sizes than the labels promise: likewise
            return result
        for own, cut in pairs:
            own.copy_(cut)
        return result


class _InDouble(OpMode):
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


class _Masking(OpMode):
    """Takes statistics over kept channels where the analysis noted that an op mixes channels that are cut.

    ``drawn``: every random op that ran.
    """

    supports_higher_order_operators = True

    def __init__(self, masks: _Masks, noise: Sequence[_Shapes]):
        super().__init__()
        self._masks = masks
        self._noise = noise
        self.drawn: list[_Draw] = []
        self._node = ""
        self._counts: dict[str, int] = {}

    def enter(self, node: str) -> None:
        self._node, self._counts = node, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if draws(func, args, kwargs):
            place = len(self.drawn)
            masks = self._noise[place] if place < len(self._noise) else {}
            self.drawn.append(_Draw.of(func, args, kwargs, place, masks))
            return drawn(func, args, kwargs, place)
        record = record_of(func)
        if record is not None:
            return self._registered(record, func, args, kwargs)
        name = func.overloadpacket.__name__
        kind = _KINDS.get(name) if func.namespace == "aten" else None
        if kind is None or not _mixes(name, args, kwargs):
            return func(*args, **kwargs)
        op = name if kind == "reduction" else kind
        index = self._counts.get(op, 0)
        self._counts[op] = index + 1
        mask = self._masks.get((self._node, op, index))
        operand = args[_place(name)]
        if mask is None or not _fits(mask, operand):  # without its mask an op can only fail the comparison
            return func(*args, **kwargs)
        return _MASKED[kind](func, mask, args, kwargs)

    def _registered(self, record: Op, func: Any, args: Any, kwargs: Any) -> Any:
        index = self._counts.get(record.name, 0)
        self._counts[record.name] = index + 1
        mask = self._masks.get((self._node, record.name, index))
        if mask is None or record.mask is None or not _fits(mask, args[0]):
            return func(*args, **kwargs)
        return record.mask(func, _on(mask, args[0]), args, kwargs)


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
_KINDS: dict[str, str] = {
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


def _mixes(name: str, args: Any, kwargs: Any) -> bool:
    if name in _REDUCTIONS:
        return sum(isinstance(a, Tensor) for a in (*args, *kwargs.values())) == 1
    if _KINDS[name] == "batch_norm":
        return name != "_native_batch_norm_legit_no_training" and any(a is True for a in args[3:6])
    return True


def _place(name: str) -> int:
    """Which argument of an op the mask is for."""
    return 1 if name in ("addmm", "baddbmm", "addmv") else 0


def _fits(mask: Tensor, operand: Tensor) -> bool:
    return mask.ndim == operand.ndim and all(m in (1, s) for m, s in zip(mask.shape, operand.shape, strict=True))


def _on(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask.to(tensor.device).expand(tensor.shape)


def _masked_reduction(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    name = func.overloadpacket.__name__
    on = _on(mask, x)
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
    place = _place(func.overloadpacket.__name__)
    x = args[place]
    return func(*args[:place], x.masked_fill(~_on(mask, x), 0), *args[place + 1 :], **kwargs)


def _masked_distance(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    """Zeros on both sides add nothing to a distance."""
    x1, x2, *rest = args
    return func(x1.masked_fill(~_on(mask, x1), 0), x2.masked_fill(~_on(mask, x2), 0), *rest, **kwargs)


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
    out, mean, rstd = _normalised(x, _on(mask, x), dims, eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, rstd


def _masked_rms_norm(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    x, shape, weight, eps = args
    dims = list(range(x.ndim - len(shape), x.ndim))
    out, _, rstd = _normalised(x, _on(mask, x), dims, torch.finfo(x.dtype).eps if eps is None else eps, centre=False)
    return out if weight is None else out * weight, rstd


def _masked_group_norm(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    x, weight, bias, _, _, _, groups, eps = args
    split = (x.shape[0], groups, -1)
    out, mean, rstd = _normalised(x.reshape(split), _on(mask, x).reshape(split), [2], eps)
    shape = [1, -1] + [1] * (x.ndim - 2)
    out = out.reshape(x.shape)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape), mean, rstd


def _masked_batch_norm(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    x, weight, bias = args[:3]
    eps = args[-1] if isinstance(args[-1], float) else args[-2]
    dims = [d for d in range(x.ndim) if d != 1]
    out, mean, rstd = _normalised(x, _on(mask, x), dims, eps)
    shape = [1, -1] + [1] * (x.ndim - 2)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape), mean.flatten(), rstd.flatten()


def _masked_weight_norm(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    v, g, *rest = args
    dim = rest[0] if rest else kwargs.get("dim", 0)
    v = v.masked_fill(~_on(mask, v), 0)
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
    return func(x.masked_fill(~_on(mask, x), -torch.inf), *rest, **kwargs)


def _masked_loss(func: Any, mask: Tensor, args: Any, kwargs: Any) -> Any:
    """The mean or the sum of the kept positions."""
    names = [a.name for a in func._schema.arguments]
    given = {**{a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}, **kwargs}
    given.update(zip(names, args, strict=False))
    loss = func(**{**given, "reduction": 0})
    on = _on(mask, loss)
    total = loss.masked_fill(~on, 0).sum()
    return total if given["reduction"] == 2 else total / on.sum()


_MASKED = {
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
