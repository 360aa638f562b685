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
    rule = RULES.get(call.name)
    if rule is None and call.signature.is_pointwise:
        rule = _pointwise
    if rule is None:
        if any(run.labels(t) for t in call.tensors):
            for tensor in call.tensors:
                run.lock_all(run.labels(tensor), f"no rule for {func}")
            run.notes.append(f"no rule for {func}: its channels are locked ({run.source})")
        return
    result = rule(run, call)
    per_output = result if isinstance(result, list) else [result] * len(outputs)
    for tensor, labels in zip(outputs, per_output, strict=False):
        if "out" in call.arguments and run.labels(tensor):
            shape = tuple(tensor.shape)
            labels = join_positions(run, [(shape, run.labels(tensor)), (shape, labels)], shape)
        run.attach(tensor, labels)


def _pointwise(run: Propagation, call: Call) -> Labels:
    operands = [(tuple(t.shape), run.labels(t)) for t in call.tensors if t.ndim]
    return join_positions(run, operands, tuple(call.outputs[0].shape)) if call.outputs else ()
