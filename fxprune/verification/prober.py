"""Probes, made of an example and tried on a model: other batch sizes, other sizes of every dim, other values."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fxprune.errors import GuardError, VerificationError
from fxprune.recording import RecordedModule, Twin, boundary, evaluated, guards
from fxprune.recording.inputs import (
    input_names,
    is_batched,
    make_inputs,
    other_values,
    specs_of,
    with_sizes,
    with_values,
)
from fxprune.recording.randomness import repeatable
from fxprune.recording.structure import leaves_of, map_tensors, tensors_of
from fxprune.verification.compare import TOLERANCE, relative_error
from fxprune.verification.oracle import Inputs
from fxprune.verification.sizes import TRIES, TRIES_ALONE, SizeRuns, dims_together, other_sizes

_PLACES_ALONE = 3  # as many dims of one size, such as those of a small image, are tried one by one as well


@dataclass(frozen=True)
class Probe:
    """Inputs that the model takes, and what it returns. ``dims``: (tensor, dim) -> size, of those that differ."""

    text: str
    inputs: Inputs
    expected: Any
    dims: Mapping[tuple[int, int], int] = field(default_factory=dict)
    tensors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Of one probe: ``error`` where the graph ran, ``guard`` where it refused, ``raised`` where it failed.

    ``elsewhere``: the graph ran, but its channels do not lie where they lie for the example.
    """

    probe: Probe
    error: float = 0.0
    guard: GuardError | None = None
    raised: str = ""
    elsewhere: bool = False

    @property
    def is_wrong(self) -> bool:
        return bool(self.raised) or self.error > TOLERANCE or self.elsewhere

    @property
    def is_right(self) -> bool:
        return self.guard is None and not self.is_wrong

    @property
    def text(self) -> str:
        """What is wrong."""
        if self.elsewhere:
            return "channels lie elsewhere"
        return f"the recorded graph and the model differ ({self.details})"

    @property
    def details(self) -> str:
        return self.raised or f"relative error {self.error:.1e}"


class Prober:
    """Makes probes; remembers which sizes the model does not take."""

    def __init__(self, model: nn.Module, module: RecordedModule, example: Inputs, runs: SizeRuns) -> None:
        self.model, self.example, self.record = model, example, runs.record
        self.recorded = module
        self.twin = Twin.of(model, module)
        self.bound = boundary.bind(model, tuple(example[0]), dict(example[1])).arguments
        positional = [*boundary.signature_of(model).parameters]
        self.specs, self.names = specs_of(self.record), input_names(self.record, positional)
        self._positional, self._runs = positional, runs
        self.device = next((t.device for t in tensors_of(example)), torch.device("cpu"))
        self.refused: dict[tuple[int, int], list[Mapping[tuple[int, int], int]]] = defaultdict(list)

    def outcomes(self, module: RecordedModule) -> Iterator[Outcome]:
        """Probes, and how the first candidate fares on them; the example first."""
        yield outcome_of(module, Probe("the example", self.example, self.twin(*self.example)))
        count = 0
        for outcome in self._of_sizes(module):
            count += 1
            yield outcome
        for text, inputs, tensors in self._of_values():
            expected = self._expected(inputs)
            if expected is not None:
                count += 1
                yield outcome_of(module, Probe(text, inputs, expected[0], tensors=tensors))
        if not count:
            yield outcome_of(module, Probe("a second call", self.example, self.twin(*self.example)))

    def afresh(self, module: RecordedModule, outcome: Outcome) -> Outcome:
        """The same probe of the model as it was given: a call with other sizes may have left something in the twin."""
        try:
            expected = Twin.of(self.model, self.recorded)(*outcome.probe.inputs)
        except Exception:  # it takes these only after other calls
            return outcome
        return outcome_of(module, replace(outcome.probe, expected=expected))

    def _of_sizes(self, module: RecordedModule) -> Iterator[Outcome]:
        """All sizes at once that the recording takes, and where that fails or says nothing, one kind after the other.

        Sizes that it does not take are shown to the model alone, which may.
        """
        likely: dict[int, dict[tuple[int, int], int]] = {}
        groups = dims_together(self.record)
        for index, group in enumerate(groups):
            tries = [*other_sizes(self.record, group)][:TRIES]
            taken = next((sizes for sizes in tries if self._runs(sizes).failed is None), None)
            if taken is not None:
                likely[index] = taken
        together: dict[tuple[int, int], int] = {}
        for sizes in likely.values():
            together.update(sizes)
        if len(likely) > 1:
            probe = self._taken([together], [*together])
            outcome = None if probe is None else outcome_of(module, probe)
            if outcome is not None and outcome.is_right:
                yield outcome
            else:
                together = {}
        elif likely:
            together = {}
        self.refused.clear()
        for index, group in enumerate(groups):
            if group[0] in together:
                continue
            for probe in self._alone(group, likely.get(index)):
                yield outcome_of(module, probe)
        for unequal in self._unequal(module, groups):
            found = self._taken([unequal], [])
            if found is not None:
                yield outcome_of(module, found)

    def apart(self, sizes: Mapping[tuple[int, int], int]) -> list[Probe]:
        """A probe for every kind of dim of which there are other sizes, as far as the model takes those alone."""
        groups = [[place for place in group if place in sizes] for group in dims_together(self.record)]
        found = [self._taken([{place: sizes[place] for place in group}], []) for group in groups if group]
        return [probe for probe in found if probe is not None]

    def _unequal(
        self, module: RecordedModule, groups: Sequence[Sequence[tuple[int, int]]]
    ) -> Iterator[Mapping[tuple[int, int], int]]:
        """Of every kind of dim the first sizes for which numbers are not equal that the graph compares, and were."""
        example = self._runs({}).numbers
        known = [guard.name for guard in guards.guards_of(module.graph) if guards.is_of_sizes(guard)]
        known = [name for name in known if name in example and example[name][0] == example[name][2]]
        for group in groups if known else ():
            for sizes in [*other_sizes(self.record, group)][:TRIES]:
                numbers = self._runs(sizes).numbers
                if any(name in numbers and not guards.keeps(*numbers[name]) for name in known):
                    yield sizes
                    break

    def _alone(self, group: Sequence[tuple[int, int]], likely: dict[tuple[int, int], int] | None) -> Iterator[Probe]:
        """Probes with other sizes of these dims, together or, where the model takes them so only, one by one."""
        tries = [*other_sizes(self.record, group)][:TRIES]
        first = [] if likely is None else [likely]
        found = self._taken([*first, *tries] if likely is not None else tries[:TRIES_ALONE], group)
        if found is not None:
            yield found
        elif 1 < len(group) <= _PLACES_ALONE:
            for place in group:
                alone = self._taken([*other_sizes(self.record, [place])][:TRIES_ALONE], [place])
                if alone is not None:
                    yield alone

    def _taken(self, tries: Sequence[Mapping[tuple[int, int], int]], group: Sequence[tuple[int, int]]) -> Probe | None:
        """A probe with the first of these sizes that the model takes."""
        for sizes in tries:
            for permute in (True, False) if any(spec.is_ids for spec in self.specs) else (True,):
                inputs = self._near(sizes, permute)
                expected = self._expected(inputs)
                if expected is not None:
                    return Probe(self._text(sizes), inputs, expected[0], sizes)
            for place in group:
                if place in sizes:
                    self.refused[place].append(sizes)
        return None

    def _near(self, sizes: Mapping[tuple[int, int], int], permute: bool) -> Inputs:
        return make_inputs(with_sizes(self.record, sizes), self.device, permute=permute)

    def _expected(self, inputs: Inputs) -> tuple[Any] | None:
        try:
            return (self.twin(*inputs),)
        except Exception:  # says nothing, but that the model does not take these
            return None

    def _of_values(self) -> Iterator[tuple[str, Inputs, tuple[int, ...]]]:
        for text, record in other_values(self.record, self._positional):
            new = specs_of(record)
            tensors = tuple(n for n, (a, b) in enumerate(zip(new, self.specs, strict=True)) if a is not b and a != b)
            yield text, with_values(record, tuple(self.example[0]), dict(self.example[1])), tensors

    def _text(self, sizes: Mapping[tuple[int, int], int]) -> str:
        batch = [size for place, size in sizes.items() if self._is_batch(place)][:1]
        by_tensor: dict[int, list[str]] = defaultdict(list)
        for (n, dim), size in sizes.items():
            if not self._is_batch((n, dim)):
                by_tensor[n].append(f"{size} along dim {dim}")
        texts = [f"batch {size}" for size in batch]
        return ", ".join([*texts, *(f"{self.names[n]} of {' and '.join(each)}" for n, each in by_tensor.items())])

    def _is_batch(self, place: tuple[int, int]) -> bool:
        return place[1] == 0 and is_batched(self.specs[place[0]], self.record)


def outcome_of(module: RecordedModule, probe: Probe) -> Outcome:
    """How a recording fares on a probe."""
    args, kwargs = map_tensors(lambda t: t.detach().clone(), (tuple(probe.inputs[0]), dict(probe.inputs[1])))
    try:
        own = copy.deepcopy(module) if module.meta["writes"] else module  # the weights are the caller's
        with evaluated(own), repeatable() if module.meta["draws"] else nullcontext():
            found = own.forward(*args, **kwargs)  # torch.fx prints what fails in __call__
    except GuardError as error:
        return Outcome(probe, guard=error)
    except Exception as error:
        return Outcome(probe, raised=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    try:
        apart = relative_error(found, probe.expected)
    except VerificationError as error:
        return Outcome(probe, raised=str(error))
    return Outcome(probe, error=apart, raised=_other_value(found, probe.expected))


def _other_value(found: Any, expected: Any) -> str:
    """Of the numbers and words that come out, what is not as expected."""
    for one, other in zip(leaves_of(found), leaves_of(expected), strict=True):
        numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
        if numbers and math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            continue
        both_nan = numbers and one != one and other != other  # noqa: PLR0124
        if (numbers or isinstance(other, (str, type(None)))) and one != other and not both_nan:
            return f"{one!r} comes out instead of {other!r}"
    return ""
