"""What one aten op does to the labels: its record in the table of ops is asked, and held to an answer.

A rule must look at the labels of all its operands, or say that it does not (``run.unread``), and speak of all outputs.
An op without a rule locks what reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.labels import usage
from fxprune.labels.classes import Ids
from fxprune.labels.factors import Labels
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation
from fxprune.ops.call import Call
from fxprune.ops.meta import tensors_in
from fxprune.ops.refit import Followed
from fxprune.ops.table import Label, Op


def apply(run: Propagation, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Label the outputs of one aten op.

    Raises:
        AssertionError: its rule left out an operand with channels or an output.
    """
    call = Call(func, args, kwargs, tensors_in((out,)))
    run.followed.clear()
    _label(run, call)
    followed = set(run.followed)
    for tensor in call.tensors:
        if id(tensor) not in followed and (ids := run.chosen(tensor)) is not None:
            _follow_chosen(run, call, tensor, ids)
    if call.record is not None and call.record.refit is Followed.COPIED:
        run.copy_count(call.input, call.out)


def _follow_chosen(run: Propagation, call: Call, tensor: Tensor, ids: Ids) -> None:
    """What is moved holds the same places; what else reads which channels were chosen, without a word, locks them."""
    if call.record is not None and (call.record.fills or (call.record.moves and not call.outputs)):
        return  # it looks at the shape
    moved = call.get("tensors") or [call.input]
    same_values = call.func._overloadname != "dtype" and all(out.dtype != torch.bool for out in call.outputs)
    is_moved = call.record is not None and isinstance(call.record.refit, Followed) and same_values
    if is_moved and all(run.has_chosen(t, ids) for t in moved) and any(t is tensor for t in moved):
        for out in call.outputs:
            run.choose(out, ids)
    else:
        run.lock(ids, f"{call.name} reads which of them were chosen")


def _label(run: Propagation, call: Call) -> None:
    outputs, record = call.outputs, call.record
    for tensor in call.tensors:
        run.used(tensor)
        if id(tensor) in run.usage.unread:
            if record is not None and record.moves:
                usage.move(run, tensor, outputs, record.fills)
            else:
                usage.read(run, tensor)
    if record is None or not record.moves:
        for tensor in outputs:  # of an op in place
            run.usage.held.pop(id(tensor), None)
    usage.make(run, call.tensors, outputs)
    label: Label | None = None
    if record is not None:
        label = record.label
        if callable(record.mask):
            run.count(record.calls)
        if callable(record.cost):
            for constant, factors in record.cost(run, call):
                run.term(constant, factors)
    if label is None:
        if not call.signature.is_pointwise or (record is not None and record.reads_values):
            _lock(run, call, record)
            return
        label = pointwise
    run.asked.clear()
    result = label(run, call)
    per_output = result if isinstance(result, list) else [result] * len(outputs)
    _check(run, call, per_output)
    if record is not None and record.parts and call.tensors:
        usage.part(run, call.input, outputs, call.dims()[0])
    for tensor, labels in zip(outputs, per_output, strict=True):
        if "out" in call.arguments and run.labels(tensor):
            shape = tuple(tensor.shape)
            labels = join_positions(run, [(shape, run.labels(tensor)), (shape, labels)], shape)
        run.attach(tensor, labels)


def _check(run: Propagation, call: Call, per_output: Sequence[Labels]) -> None:
    """Were all operands that have channels looked at, and all outputs spoken of? What has no entries says nothing."""
    for tensor in call.tensors:
        if id(tensor) in run.asked or not tensor.numel():
            continue
        if not all(run.all_locked(factor) for factor in run.labels(tensor)):
            place = next(place for place, t in enumerate(call.tensors) if t is tensor)
            raise AssertionError(f"the rule for {call.name} does not look at operand {place}")
    if len(per_output) != len(call.outputs):
        raise AssertionError(f"the rule for {call.name} speaks of {len(per_output)} of {len(call.outputs)} outputs")
    for out, labels in zip(call.outputs, per_output, strict=True):
        for factor in labels:
            ids, shape = factor.ids, out.shape
            if ids.ndim != len(shape) or any(n not in (1, s) for n, s in zip(ids.shape, shape, strict=True)):
                raise AssertionError(f"the rule for {call.name} labels {list(shape)} as {list(ids.shape)}")


def pointwise(run: Propagation, call: Call) -> Labels:
    """The rule of every op that computes each position from the same position of its operands."""
    operands = [(tuple(t.shape), run.labels(t)) for t in call.tensors if t.ndim]
    if not call.outputs:
        return ()
    shape = tuple(call.outputs[0].shape)
    for flags in call.tensors:
        if flags.dtype == torch.bool and not run.labels(flags) and _meets_channels(run, flags, operands, len(shape)):
            run.request_index(flags if flags._base is None else flags._base)
    return join_positions(run, operands, shape)


def _meets_channels(
    run: Propagation, flags: Tensor, operands: Sequence[tuple[tuple[int, ...], Labels]], ndim: int
) -> bool:
    """Whether another operand has channels that may go where ``flags`` has several entries."""
    several = {ndim - flags.ndim + dim for dim, size in enumerate(flags.shape) if size > 1}
    return any(
        ndim - len(sizes) + factor.dim in several and not run.all_locked(factor)
        for sizes, factors in operands
        for factor in factors
    )


def _lock(run: Propagation, call: Call, record: Op | None) -> None:
    """What reaches the op stays. Its work is counted where it is known, else the parameters in it are told."""
    reads = record is not None and record.reads_values
    reason = f"{call.name} reads values" if reads else f"no rule for {call.func}"
    if any(run.labels(t) for t in call.tensors):
        for tensor in call.tensors:
            run.lock_all(run.labels(tensor), reason)
        if not reads:
            run.notes.append(f"{reason}: its channels are locked ({run.source})")
    if record is not None and record.cost is not None:
        return
    flops = _flops(call)
    if flops is None:
        run.uncounted(call.tensors, str(call.func))
    else:
        run.term(flops / 2, ())


def _flops(call: Call) -> float | None:
    """What PyTorch's own counter says of the op, if it knows it."""
    from torch.utils.flop_counter import flop_registry

    count = flop_registry.get(call.func.overloadpacket)
    out = call.outputs[0] if len(call.outputs) == 1 else tuple(call.outputs)
    return None if count is None else float(count(*call.given[0], **call.given[1], out_val=out))
