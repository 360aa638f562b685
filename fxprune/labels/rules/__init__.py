"""What every kind of aten op does to labels: one table, one file per kind of op.

A rule gets the running ``Propagation`` and the ``Call`` and returns the labels of the outputs (one ``Labels`` for all,
or a list with one per output tensor). Adding an op touches one file here. An op without a rule locks what reaches it.
"""

from __future__ import annotations

from typing import Any

from fxprune.labels.factors import Labels
from fxprune.labels.propagate import Propagation
from fxprune.labels.rules import (
    contraction,
    creation,
    indexed,
    losses,
    matrices,
    movement,
    normalisation,
    reduction,
    spatial,
)
from fxprune.labels.rules.pointwise import join_positions
from fxprune.labels.rules.table import RULES, Call, Rule
from fxprune.ops.meta import tensors_in
from fxprune.ops.table import Op, find

__all__ = [
    "RULES", "apply_rule", "contraction", "creation", "indexed", "losses", "matrices", "movement", "normalisation",
    "reduction", "spatial",
]  # fmt: skip


def apply_rule(run: Propagation, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Label the outputs of one aten op."""
    outputs = tensors_in((out,))
    call = Call(func, args, kwargs, outputs)
    for tensor in call.tensors:
        run.used(tensor)
        if id(tensor) in run.usage.unread:
            if call.signature.moves:
                run.usage.move(tensor, outputs)
            else:
                run.usage.read(tensor)
    record = find(call.name) if "::" in call.name else None
    rule: Rule | None = RULES.get(call.name) if record is None else record.label
    if rule is None and call.signature.is_pointwise:
        rule = _pointwise
    if record is not None and record.cost is not None:
        for constant, factors in record.cost(run, call):
            run.term(constant, factors)
    if rule is None:
        _locked(run, call, record)
        return
    run.asked.clear()
    result = rule(run, call)
    _lock_ignored(run, call)
    if call.signature.parts and call.tensors:
        run.usage.part(call.input, outputs, call.dims()[0])
    per_output = result if isinstance(result, list) else [result] * len(outputs)
    if len(per_output) != len(outputs):
        for tensor in call.tensors:
            run.lock_all(run.labels(tensor), f"the rule for {call.name} speaks of {len(per_output)} of its outputs")
    for tensor, labels in zip(outputs, per_output, strict=False):
        if "out" in call.arguments and run.labels(tensor):
            shape = tuple(tensor.shape)
            labels = join_positions(run, [(shape, run.labels(tensor)), (shape, labels)], shape)
        run.attach(tensor, labels)


def _lock_ignored(run: Propagation, call: Call) -> None:
    """A rule speaks of the operands whose labels it looked at; those of the others must stay as they are.

    What has no entries has nothing to say.
    """
    for tensor in call.tensors:
        if id(tensor) not in run.asked and tensor.numel():
            for factor in run.labels(tensor):
                if not run.all_locked(factor):
                    run.lock(factor.ids, f"not read by the rule for {call.name}")


def _pointwise(run: Propagation, call: Call) -> Labels:
    operands = [(tuple(t.shape), run.labels(t)) for t in call.tensors if t.ndim]
    return join_positions(run, operands, tuple(call.outputs[0].shape)) if call.outputs else ()


def _locked(run: Propagation, call: Call, record: Op | None) -> None:
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
