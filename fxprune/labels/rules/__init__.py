"""What every kind of aten op does to labels: one table, one file per kind of op.

A rule gets the running ``Propagation`` and the ``Call`` and returns the labels of the outputs (one ``Labels`` for all,
or a list with one per output tensor). Adding an op touches one file here. An op without a rule locks what reaches it.
"""

from __future__ import annotations

from typing import Any

from fxprune.labels.factors import Labels
from fxprune.labels.propagate import Propagation
from fxprune.labels.rules import contraction, creation, movement, normalisation, reduction, spatial
from fxprune.labels.rules.pointwise import join_positions
from fxprune.labels.rules.table import RULES, Call
from fxprune.meta import tensors_in

__all__ = ["RULES", "apply_rule", "contraction", "creation", "movement", "normalisation", "reduction", "spatial"]


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
    rule = RULES.get(call.name)
    if rule is None and call.signature.is_pointwise:
        rule = _pointwise
    if rule is None:
        if any(run.labels(t) for t in call.tensors):
            for tensor in call.tensors:
                run.lock_all(run.labels(tensor), f"no rule for {func}")
            run.notes.append(f"no rule for {func}: its channels are locked ({run.source})")
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
