"""Outputs: those of the masked dense model, of the shapes they had, at another batch size too."""

from __future__ import annotations

from typing import Any

import torch

from fxprune.recording.inputs import is_batched, make_inputs, map_leaves, specs_of, tensors_of
from fxprune.verification import DOUBLE_TOLERANCE, relative_error
from model_zoo.checks.case import DIFFERENT, SAME, Case, check, shapes_of

ORACLE_TOLERANCE = 1e-5
OTHER_BATCH = 3


@check("oracle")
def _oracle(case: Case) -> str:
    """The masked dense model computes the same, and what it computes depends on the input."""
    error, double = case.report.oracle_error, case.report.oracle_error_in_double
    case.figures |= {"oracle": error, "oracle_in_double": double}
    if error is None or not (error <= ORACLE_TOLERANCE or (double is not None and double <= DOUBLE_TOLERANCE)):
        return f"relative error {error}, in double {double}"
    varies = relative_error(case.run(case.pruned, seed=1), case.run(case.pruned, seed=2))
    case.figures["varies"] = varies
    return "" if varies > DIFFERENT else f"two random inputs give outputs {varies:.1e} apart: the check is empty"


@check("shapes")
def _shapes(case: Case) -> str:
    """Every output has the shape it had."""
    expected, found = (shapes_of(case.run(module)) for module in (case.model, case.pruned))
    case.figures["outputs"] = found
    return "" if found == expected else f"{found} instead of {expected}"


@check("batch")
def _batch(case: Case) -> str:
    """Another batch size works, and every row is what it is by itself."""
    expected, found = (shapes_of(case.run(module, OTHER_BATCH)) for module in (case.model, case.pruned))
    if found != expected:
        return f"batch {OTHER_BATCH}: {found} instead of {expected}"
    rows = [tensors_of(case.pruned(*args, **kwargs)) for args, kwargs in _rows(case.inputs)]
    together = [torch.cat(row) for row in zip(*rows, strict=True)]
    error = relative_error(tensors_of(case.run(case.pruned, OTHER_BATCH)), together)
    return "" if error <= SAME else f"batch {OTHER_BATCH} differs from its rows by {error:.1e}"


def _rows(record: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The inputs of a batch of ``OTHER_BATCH``, one sample at a time."""
    made = make_inputs(record, batch=OTHER_BATCH)
    batched = {id(t) for t, spec in zip(tensors_of(made), specs_of(record), strict=True) if is_batched(spec, record)}

    def sample(i: int) -> Any:
        return map_leaves(lambda value: value[i : i + 1] if id(value) in batched else value, made)

    return [sample(i) for i in range(OTHER_BATCH)]
