"""Calls that the example did not show, and whether a pruned network answers them as its model does.

A network comes as a ``Subject``, which makes inputs of any batch and size. With nothing cut, or with a model that has
the pruned weights itself, every call must give its result (free) or an error of fxprune's that names a source line
(guarded). A call is a small function that gets the ``Case`` and compares both in full, tensors and numbers inside
objects included.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import fxprune
from fxprune.errors import FxpruneError
from model_zoo.checks.answers import LINE, TOLERANCE, Cell, Objects, answer, compare, run, values_in
from model_zoo.checks.case import registered
from model_zoo.checks.parting import parting
from model_zoo.networks.subject import Inputs, NoCacheError, Subject
from model_zoo.records import raised

MOVED = 1e-4  # another call changes the model's result by more, or shows nothing


@dataclass
class Case:
    """A subject, the graph that is to answer as its model does, and the model's results on the example."""

    subject: Subject
    pruned: nn.Module
    expected: Any

    def inputs(self, batch: int, size: Any, seed: int = 1) -> Callable[[], Inputs]:
        return lambda: self.subject.make(batch, size, seed)


Call = Callable[[Case], Cell | None]
CALLS: dict[str, Call] = {}


def call(name: str) -> Callable[[Call], Call]:
    """Register a call; they run in this order. None: the network has no such call."""
    return registered(CALLS, "calls", name)


def _made(case: Case, make: Callable[[], Inputs]) -> Cell:
    """The answer to a call on inputs that are not the example's."""
    subject = case.subject
    cell = answer(subject.model, case.pruned, make)
    if cell.state == "raw" or (cell.plain or 0.0) >= TOLERANCE:
        cell.parts = parting(subject.model, subject.example(), make())
    elif cell.state == "free":
        error = compare(run(copy.deepcopy(subject.model), make()), case.expected).error
        cell.blind = error is not None and error < MOVED
    return cell


call("second")(lambda case: answer(case.subject.model, case.pruned, case.subject.example, times=2))
call("batch")(lambda case: _made(case, case.inputs(case.subject.batch + 1, case.subject.size)))


@call("size")
def _size(case: Case) -> Cell | None:
    cell = None
    for size in case.subject.others:
        cell = _made(case, case.inputs(case.subject.batch, size))
        if cell.state != "model refuses":
            break
    return cell


call("values")(lambda case: _made(case, case.inputs(case.subject.batch, case.subject.size)))


def _padded(case: Case, at: Callable[[int], slice]) -> Cell | None:
    """Row i of every mask is padded by a few positions more than row i + 1."""

    def make() -> Inputs:
        args, kwargs = case.subject.example()
        for name in masks:
            for i, row in enumerate(kwargs[name]):
                row[at(max(1, row.shape[0] // 3 - 2 * i))] = 0
        return args, kwargs

    _, kwargs = case.subject.example()
    masks = [name for name, value in kwargs.items() if name.endswith("attention_mask") and value.ndim == 2]
    return _made(case, make) if masks else None


call("left-padded")(lambda case: _padded(case, lambda count: slice(None, count)))
call("right-padded")(lambda case: _padded(case, lambda count: slice(-count, None)))


@call("caches out")
def _out(case: Case) -> Cell | None:
    """Of another call the objects in the outputs alone."""
    if not any(inside and isinstance(value, Tensor) for value, inside in values_in(case.expected).values()):
        return None
    objects = Objects(case.subject.model), Objects(case.pruned)
    return answer(*objects, case.inputs(case.subject.batch, case.subject.size, seed=2))


def _step(case: Case, sizes: Sequence[Any]) -> Cell | None:
    """A step after a call, recorded with the cache of one call and called with that of another of the first size."""
    subject = case.subject
    if subject.step is None:
        return None

    def make(size: Any, seed: int) -> Inputs:
        assert subject.step is not None
        before = subject.make(subject.batch, size, seed)
        return subject.step(before, run(copy.deepcopy(subject.model), before), seed + 10)

    try:
        args, kwargs = make(subject.size, 0)
        run(copy.deepcopy(subject.model), make(subject.size, 0))
    except NoCacheError:
        return None
    except Exception as error:
        return Cell("model refuses", message=raised(error))
    try:
        pruned = untouched(subject.model, (args, kwargs))
    except FxpruneError as error:
        return Cell("refused", message=raised(error), line=next(iter(LINE.findall(str(error))), ""))
    cell = answer(subject.model, pruned, lambda: make(sizes[0], 1))
    if cell.state in ("wrong", "raw"):
        cell.parts = parting(subject.model, make(subject.size, 0), make(sizes[0], 1))
    return cell


call("caches in")(lambda case: _step(case, [case.subject.size]))
call("longer caches in")(lambda case: _step(case, case.subject.others))


def untouched(model: nn.Module, inputs: Inputs) -> nn.Module:
    """``model`` pruned with nothing cut."""
    pruned: nn.Module = fxprune.prune(
        copy.deepcopy(model), inputs[0], example_kwargs=inputs[1], channels=1.0, round_to=1, progress=False
    )
    return pruned.eval()


def measure(subject: Subject, pruned: nn.Module | None = None) -> tuple[dict[str, Cell], str]:
    """All calls of a network, or why it cannot be recorded.

    ``pruned``: what is to answer as its model does; else the model with nothing cut. Steps are recorded in any case.
    """
    model = subject.model
    try:
        expected = run(copy.deepcopy(model), subject.example())
        pruned = pruned or untouched(model, subject.example())
    except FxpruneError as error:
        return {}, raised(error)
    cells = {}
    for name, function in CALLS.items():
        start = time.perf_counter()
        cell = function(Case(subject, pruned, expected))
        if cell is not None:
            cell.seconds = round(time.perf_counter() - start, 2)
            cells[name] = cell
    return cells, ""
