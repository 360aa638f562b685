"""The mask oracle: the pruned model must compute what the dense model computes with the same channels masked.

The dense graph runs with every slice that the plan names set to zero. Where an op computes a statistic over channels
(``ChannelGraph.statistics``), the statistic is taken over the kept channels only. The oracle reads the plan's indices
and the labels' masks; it shares no code with the rewriter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from fxprune.errors import VerificationError
from fxprune.groups import ValueInterpreter, placeholder_values, replay
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.labels.factors import Labels
from fxprune.labels.propagation import Propagation, describe
from fxprune.labels.records import TensorLabels
from fxprune.ops.meta import OpMode, tensors_in
from fxprune.ops.table import record_of
from fxprune.recording import named_tensors
from fxprune.recording.inputs import map_leaves, map_tensors, tensors_of
from fxprune.recording.randomness import drawn, draws
from fxprune.recording.shards import copied_around_shares, from_all, is_sharded, opened
from fxprune.selection.plan import PruningPlan
from fxprune.verification.answers import is_constant
from fxprune.verification.compare import (
    DOUBLE_TOLERANCE,
    TOLERANCE,
    Agreement,
    compared,
    relative_error,
    strided,
)
from fxprune.verification.double import InDouble, double, to_double
from fxprune.verification.masks import fits, on_all
from fxprune.verification.noise import Draw, Redrawing, Shapes

Inputs = tuple[Sequence[Any], Mapping[str, Any]]
_RUNS = 4  # of the masked model; how many there are of something may depend on how many there were of another


class _Compared(NamedTuple):
    """What the masked network answers, what the pruned one does, a copy of which in eval mode is ``small``."""

    error: float
    expected: Any
    found: Any
    small: fx.GraphModule


class ReplayError(VerificationError):
    """The labels are not known for inputs of these sizes: an op in the graph cannot be interpreted for them."""


def mask_oracle(
    dense: fx.GraphModule, pruned: fx.GraphModule, graph: ChannelGraph, plan: PruningPlan, keep: Keep, inputs: Inputs
) -> Agreement:
    """The relative error of ``pruned`` against the masked ``dense`` on ``inputs``.

    Above the tolerance both are computed in double: a network may amplify what float32 rounds.

    Raises:
        VerificationError: if it exceeds the tolerance, and is no rounding error.
    """
    both = _compare(dense, pruned, graph, plan, keep, inputs)
    exact = None
    if both.error > TOLERANCE:
        with InDouble():
            wide = double(dense), double(pruned)
            exact = _compare(*wide, graph, plan, keep, map_leaves(to_double, inputs), torch.float64).error
    if exact is None or exact <= DOUBLE_TOLERANCE:
        constant = not is_sharded(pruned) and is_constant(dense, both.small, *inputs, both.found)
        return Agreement(both.error, exact, compared(both.expected), constant)
    raise VerificationError(
        f"The pruned model differs from its masked original: relative error {both.error:.1e} ({exact:.1e} in double). "
        "This is a fault of fxprune; please report it with the model. The model that was given is unchanged."
    )


def _compare(
    dense: fx.GraphModule, pruned: fx.GraphModule, graph: ChannelGraph, plan: PruningPlan, keep: Keep, inputs: Inputs,
    dtype: torch.dtype | None = None,
) -> _Compared:  # fmt: skip
    """``dtype``: that in which shares are gathered."""
    expected, noise = _masked_run(dense, graph, plan, keep, inputs, dtype)
    values = [t for t in tensors_of(expected) if t.numel()]
    floats = [strided(t) for t in values if t.is_floating_point()]
    if floats and not any(bool(t.isfinite().any()) for t in floats):
        raise VerificationError(
            "The masked model's outputs are not finite on random inputs, so nothing can be proven. "
            "Check the weights, and that the example inputs show what the network takes (positive numbers only, say); "
            "or pass verify=False."
        )
    small = copied_around_shares(pruned).eval()  # not before: the masked network is gone
    with torch.no_grad(), ExitStack() as stack:
        if noise:
            stack.enter_context(_PlainAttention())
            stack.enter_context(Redrawing(noise))
        if is_sharded(small):
            interpreter = ValueInterpreter(small)
            interpreter.dtype = dtype
            found = interpreter.run(*placeholder_values(small, *_fresh(inputs)))
        else:
            found = small(*_fresh(inputs[0]), **_fresh(inputs[1]))
    error = relative_error(found, expected)
    if is_sharded(small):  # and on which side of the tolerance it is, they must agree
        error = max(from_all(error))
    return _Compared(error, expected, found, small)


def masked_output(dense: fx.GraphModule, graph: ChannelGraph, plan: PruningPlan, keep: Keep, inputs: Inputs) -> Any:
    """What the dense model computes in eval mode with the channels that go masked."""
    return _masked_run(dense, graph, plan, keep, inputs)[0]


def _masked_run(
    dense: fx.GraphModule, graph: ChannelGraph, plan: PruningPlan, keep: Keep, inputs: Inputs,
    dtype: torch.dtype | None = None,
) -> tuple[Any, list[Draw]]:  # fmt: skip
    """The masked model's outputs, and every random op that ran.

    Where values decide how many there are of something, labels and masks are first as long as the recorded run was, and
    then as this one turns out to be.
    """
    sized, sizes = dense, dict[str, tuple[int, ...]]()
    for _ in range(_RUNS):
        run, kept, noise = _replayed(sized, graph, keep, inputs)
        masked, masks = _eval_copy(dense), _masks(run, kept)
        zero_slices(masked, plan)
        mode = _Masking(masks, noise)
        values = placeholder_values(masked, *_fresh(inputs))
        with torch.no_grad(), _PlainAttention(), mode:
            interpreter = _Interpreter(masked, mode, run, kept)
            interpreter.dtype = dtype
            result = interpreter.run(*values)
        if not interpreter.apart or not (masks or any(noise)):
            break
        sizes |= interpreter.apart
        for node in masked.graph.nodes:
            node.meta["shape"] = sizes.get(node.name, node.meta.get("shape"))
        sized = masked
    return result, mode.drawn


_Masks = dict[tuple[str, str, int], Tensor]


def _replayed(
    dense: fx.GraphModule, graph: ChannelGraph, keep: Keep, inputs: Inputs
) -> tuple[Propagation, Keep, list[Shapes]]:
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
                _multiply(tensor, stays.reshape(shape))


def _multiply(tensor: Tensor, by: Tensor) -> None:
    """In place; of its own, so that nothing whole is left of a share."""
    with opened(tensor) as values:
        values.mul_(by.to(values))


def _eval_copy(module: fx.GraphModule) -> fx.GraphModule:
    return copy.deepcopy(module).eval()


def _fresh(tree: Any) -> Any:
    return map_tensors(Tensor.clone, tree)


class _Interpreter(ValueInterpreter):
    """Runs the masked graph. What is not finite in a masked channel (0 / 0) is set to 0, or it would spread."""

    def __init__(self, module: fx.GraphModule, mode: _Masking, run: Propagation, kept: Keep):
        super().__init__(module)
        self._mode, self._run, self._kept = mode, run, kept
        self.apart: dict[str, tuple[int, ...]] = {}  # node -> its shape, where the labels have another

    def run_node(self, n: fx.Node) -> Any:
        self._mode.enter(n.name)
        result = super().run_node(n)
        labels = self._run.node_labels.get(n.name)
        if isinstance(result, Tensor) and isinstance(labels, TensorLabels) and result.shape != labels.shape:
            self.apart[n.name] = tuple(result.shape)
        values, form = tree_flatten(result)
        known = tree_flatten(labels)[0]
        for place, (value, label) in enumerate(zip(values, known, strict=False)):
            dense = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
            if dense and isinstance(label, TensorLabels):
                cleaned = self._cleaned(value, label)
                if cleaned is not value:
                    values[place] = cleaned
                    result = tree_unflatten(values, form)  # else the object itself, which others may hold
        return result

    def _cleaned(self, value: Tensor, label: TensorLabels) -> Tensor:
        """In place, since others may hold the same memory; but where one entry stands at several positions."""
        if not label.labels or bool(value.isfinite().all()):
            return value
        mask = _mask(self._run, self._kept, label.labels)
        if not fits(mask, value):
            return value
        gone = ~on_all(mask, value) & ~value.isfinite()
        shared = any(size > 1 and step == 0 for size, step in zip(value.shape, value.stride(), strict=True))
        return value.masked_fill(gone, 0) if shared else value.masked_fill_(gone, 0)


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
    if query.ndim == key.ndim == value.ndim == 3:  # torch computes it of four dims, and so the labels saw it
        whole = _attention(query[None], key[None], value[None], attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return whole.squeeze(0)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        nothing = torch.zeros((), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, nothing, nothing - torch.inf)
    out, _ = torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )
    return out


class _Masking(OpMode):
    """Takes statistics over kept channels where the analysis noted that an op mixes channels that are cut.

    ``drawn``: every random op that ran.
    """

    supports_higher_order_operators = True

    def __init__(self, masks: _Masks, noise: Sequence[Shapes]):
        super().__init__()
        self._masks = masks
        self._noise = noise
        self.drawn: list[Draw] = []
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
            self.drawn.append(Draw.of(func, args, kwargs, place, masks))
            return drawn(func, args, kwargs, place)
        record = record_of(func)
        if record is None or not callable(record.mask):
            return func(*args, **kwargs)
        index = self._counts.get(record.calls, 0)
        self._counts[record.calls] = index + 1
        mask = self._masks.get((self._node, record.calls, index))
        if mask is None or not fits(mask, args[record.operand]):  # without its mask it can only fail the comparison
            return func(*args, **kwargs)
        return record.mask(func, on_all(mask, args[record.operand]), args, kwargs)
