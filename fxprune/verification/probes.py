"""Probes: the recording against the model on what the example did not show.

A *probe* is a call on which both must agree: the example, the same model a second time, another batch size, another
size of every input dimension that the model takes, other values of masks and ids. A *candidate* is a way to record
(``recording.Options``): the first one as ever, others where it disagrees or refuses; the first that agrees on every
probe is taken, else the one that agrees on most. What is left becomes a *guard*: an input dimension that is fixed, with
the reason. A probe on which the model itself fails says nothing but that.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import FxpruneError, GuardError, VerificationError
from fxprune.recording import Options, RecordedModule, Twin, boundary, evaluated, guards
from fxprune.recording.inputs import (
    DIMS_KEY,
    input_names,
    is_batched,
    make_inputs,
    other_values,
    specs_of,
    with_sizes,
    with_values,
)
from fxprune.recording.randomness import repeatable
from fxprune.recording.structure import leaves_of, paths, tensors_of
from fxprune.verification.compare import TOLERANCE, compared, relative_error
from fxprune.verification.oracle import Inputs
from fxprune.verification.proof import InputDim, Proof
from fxprune.verification.sizes import TRIES, TRIES_ALONE, SizeRuns, dims_together, other_sizes

_PLACES_ALONE = 3  # as many dims of one size, such as those of a small image, are tried one by one as well


@dataclass(frozen=True)
class _Probe:
    """Inputs that the model takes, and what it returns. ``dims``: (tensor, dim) -> size, of those that differ."""

    text: str
    inputs: Inputs
    expected: Any
    dims: Mapping[tuple[int, int], int] = field(default_factory=dict)
    tensors: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Outcome:
    """Of one probe: ``error`` where the graph ran, ``guard`` where it refused, ``raised`` where it failed."""

    probe: _Probe
    error: float = 0.0
    guard: GuardError | None = None
    raised: str = ""

    @property
    def is_wrong(self) -> bool:
        return bool(self.raised) or self.error > TOLERANCE

    @property
    def text(self) -> str:
        return self.raised or f"relative error {self.error:.1e}"


@dataclass(frozen=True)
class _Judged:
    module: RecordedModule
    options: Options
    outcomes: tuple[_Outcome, ...]

    @property
    def score(self) -> tuple[int, int]:
        wrong = sum(outcome.is_wrong for outcome in self.outcomes)
        return wrong, sum(outcome.guard is not None for outcome in self.outcomes)


def prove(
    model: nn.Module,
    module: RecordedModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    record_again: Callable[[Options], RecordedModule],
    runs: SizeRuns,
) -> tuple[RecordedModule, Proof]:
    """The recording that agrees with the model, guarded where it cannot, and what was probed.

    Args:
        model: the caller's; copies of it are run.
        module: its recording, of the first candidate.
        args: the example inputs.
        kwargs: the same, keyword inputs.
        record_again: makes another candidate.
        runs: of ``module``.

    Raises:
        VerificationError: the recording does not compute what the model computes on the example itself, or the model
            is no function of its inputs: a second call answers otherwise.
    """
    prober = _Prober(model, module, (tuple(args), dict(kwargs)), runs)
    outcomes = [*prober.outcomes(module)]
    best = _Judged(module, Options(), tuple(outcomes))
    if any(outcome.is_wrong for outcome in outcomes):
        _check_function(model, module, prober, outcomes[0].probe)
        best = replace(best, outcomes=tuple(prober.afresh(module, o) if o.is_wrong else o for o in outcomes))
    if best.score > (0, 0):
        best = _best(best, prober, record_again)
    first = best.outcomes[0]
    if first.is_wrong or first.guard is not None:
        raise VerificationError(
            f"The recorded graph differs from the model on the example inputs: {first.guard or first.text}. "
            "Does forward depend on something that changes from call to call?"
        )
    fixed = _guarded(best, prober)
    proof = _proof(_under_guards(best), prober, fixed)
    best.module.meta[DIMS_KEY] = [asdict(dim) for dim in proof.inputs]
    return best.module, proof


class _Prober:
    """Makes probes; remembers which sizes the model does not take."""

    def __init__(self, model: nn.Module, module: RecordedModule, example: Inputs, runs: SizeRuns) -> None:
        self.model, self.example, self.record = model, example, runs.record
        self._options = {"writes": module.meta["writes"], "draws": module.meta["draws"]}
        self.twin = Twin(model, **self._options)
        self.bound = boundary.bind(model, tuple(example[0]), dict(example[1])).arguments
        positional = [*boundary.signature_of(model).parameters]
        self.specs, self.names = specs_of(self.record), input_names(self.record, positional)
        self._positional, self._runs = positional, runs
        self.device = next((t.device for t in tensors_of(example)), torch.device("cpu"))
        self.refused: dict[tuple[int, int], list[Mapping[tuple[int, int], int]]] = defaultdict(list)

    def outcomes(self, module: RecordedModule) -> Iterator[_Outcome]:
        """Probes, and how the first candidate fares on them; the example first."""
        yield _outcome(module, _Probe("the example", self.example, self.twin(*self.example)))
        count = 0
        for outcome in self._of_sizes(module):
            count += 1
            yield outcome
        for text, inputs, tensors in self._of_values():
            expected = self._expected(inputs)
            if expected is not None:
                count += 1
                yield _outcome(module, _Probe(text, inputs, expected[0], tensors=tensors))
        if not count:
            yield _outcome(module, _Probe("a second call", self.example, self.twin(*self.example)))

    def afresh(self, module: RecordedModule, outcome: _Outcome) -> _Outcome:
        """The same probe of the model as it was given: a call with other sizes may have left something in the twin."""
        try:
            expected = Twin(self.model, **self._options)(*outcome.probe.inputs)
        except Exception:  # it takes these only after other calls
            return outcome
        return _outcome(module, replace(outcome.probe, expected=expected))

    def _of_sizes(self, module: RecordedModule) -> Iterator[_Outcome]:
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
            outcome = None if probe is None else _outcome(module, probe)
            if outcome is not None and outcome.guard is None and not outcome.is_wrong:
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
                yield _outcome(module, probe)
        for unequal in self._unequal(module, groups):
            found = self._taken([unequal], [])
            if found is not None:
                yield _outcome(module, found)

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

    def _alone(self, group: Sequence[tuple[int, int]], likely: dict[tuple[int, int], int] | None) -> Iterator[_Probe]:
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

    def _taken(self, tries: Sequence[Mapping[tuple[int, int], int]], group: Sequence[tuple[int, int]]) -> _Probe | None:
        """A probe with the first of these sizes that the model takes."""
        for sizes in tries:
            for permute in (True, False) if any(spec.is_ids for spec in self.specs) else (True,):
                inputs = self._near(sizes, permute)
                expected = self._expected(inputs)
                if expected is not None:
                    return _Probe(self._text(sizes), inputs, expected[0], sizes)
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


def _outcome(module: RecordedModule, probe: _Probe) -> _Outcome:
    args, kwargs = boundary.map_tensors(lambda t: t.detach().clone(), (tuple(probe.inputs[0]), dict(probe.inputs[1])))
    try:
        own = copy.deepcopy(module) if module.meta["writes"] else module  # the weights are the caller's
        with evaluated(own), torch.no_grad(), repeatable() if module.meta["draws"] else nullcontext():
            found = own.forward(*args, **kwargs)  # torch.fx prints what fails in __call__
    except GuardError as error:
        return _Outcome(probe, guard=error)
    except Exception as error:
        return _Outcome(probe, raised=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    try:
        apart = relative_error(found, probe.expected)
    except VerificationError as error:
        return _Outcome(probe, raised=str(error))
    return _Outcome(probe, error=apart, raised=_other_value(found, probe.expected))


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


def _check_function(model: nn.Module, module: RecordedModule, prober: _Prober, probe: _Probe) -> None:
    """Whether the model answers a first call as it answers a later one.

    Raises:
        VerificationError: it does not, so no graph can be right.
    """
    fresh = Twin(model, writes=module.meta["writes"], draws=module.meta["draws"])
    first, second = fresh(*probe.inputs), fresh(*probe.inputs)
    if relative_error(second, first) <= TOLERANCE:
        return
    changed = [f"{type(model.get_submodule(path)).__name__}.{name}" for path, name in fresh.changed()]
    why = "something that it keeps changes from call to call"
    if any("random numbers from Python or NumPy" in note for note in module.meta["notes"]):
        why = "it draws random numbers from Python or NumPy"
    elif changed:
        why = f"calls change {', '.join(changed[:3])}"
    raise VerificationError(
        f"{type(model).__name__}.forward is no function of its inputs, so no graph can stand for it: a second call "
        f"gives another answer ({why}). Take that out of forward, or draw with torch."
    )


def _best(best: _Judged, prober: _Prober, again: Callable[[Options], RecordedModule]) -> _Judged:
    """The first candidate that agrees on all probes, else the one that agrees on most."""
    for change in (_cleared, _exported, _flipped, _unequal, _without_builtins):
        options = change(best, prober)
        if options is None or options == best.options:
            continue
        try:
            module = again(options)
        except FxpruneError:
            continue
        candidate = _Judged(module, options, tuple(_outcome(module, outcome.probe) for outcome in best.outcomes))
        if candidate.score < best.score:
            best = candidate
        if best.score == (0, 0):
            break
    return best


def _cleared(best: _Judged, prober: _Prober) -> Options | None:
    """What the model keeps for one size is as good as never set."""
    changed = frozenset(prober.twin.changed())
    return replace(best.options, cleared=changed) if changed else None


def _exported(best: _Judged, prober: _Prober) -> Options | None:
    return replace(best.options, exporting=True)


def _flipped(best: _Judged, prober: _Prober) -> Options | None:
    """Branches on values go the way that another probe takes."""
    lines = {outcome.guard.source for outcome in best.outcomes if outcome.guard and outcome.probe.tensors}
    return replace(best.options, flipped=best.options.flipped | lines) if lines else None


def _unequal(best: _Judged, prober: _Prober) -> Options | None:
    """Branches on sizes that are equal go the way of unequal ones, as another probe does."""
    lines = {outcome.guard.source for outcome in best.outcomes if outcome.guard and outcome.probe.dims}
    return replace(best.options, unequal=best.options.unequal | lines) if lines else None


def _without_builtins(best: _Judged, prober: _Prober) -> Options | None:
    return replace(best.options, traced_builtins=False)


def _guarded(best: _Judged, prober: _Prober) -> dict[tuple[int, int], str]:
    """Put a guard where a probe is wrong, or where the graph takes a size that the model does not; dim -> reason."""
    module, fixed = best.module, {}
    for outcome in best.outcomes[1:]:
        if not outcome.is_wrong:
            continue
        probe = outcome.probe
        for place, size in probe.dims.items():
            fixed[place] = f"at {size} the recorded graph and the model differ ({outcome.text})"
        for n in probe.tensors:
            _fix_values(module, prober, n, f"{prober.names[n]} is fixed at the example's values")
    taken = {place for outcome in best.outcomes for place in outcome.probe.dims}
    for place, sizes in prober.refused.items():
        if place not in taken:
            tried = ", ".join(map(str, dict.fromkeys(one[place] for one in sizes)))
            fixed[place] = f"the model takes no other size that was tried ({tried})"
    runs = SizeRuns(module, *prober.example)
    for place, why in fixed.items():
        refused = [] if place in taken else prober.refused[place]
        if not refused or any(runs(sizes).failed is None for sizes in refused):  # else an op refuses them by itself
            _fix_size(module, prober, place, why)
    if fixed or any(outcome.is_wrong for outcome in best.outcomes):
        module.recompile()
    return fixed


def _under_guards(best: _Judged) -> _Judged:
    """The same after guards were put: what agreed before may be refused now."""
    if not any(outcome.is_wrong for outcome in best.outcomes):
        return best
    outcomes = [o if o.is_wrong or o.guard else _outcome(best.module, o.probe) for o in best.outcomes]
    return replace(best, outcomes=tuple(outcomes))


def _fix_size(module: RecordedModule, prober: _Prober, place: tuple[int, int], why: str) -> None:
    n, dim = place
    size = prober.specs[n].shape[dim]
    node = _input_node(module, prober, n)
    source = f"dim {dim} of {prober.names[n]} is fixed at {size}: {why}"
    with module.graph.inserting_after(_after_inputs(node)):
        number = module.graph.call_method("size", (node, dim))
    with module.graph.inserting_after(number):
        guard = module.graph.call_function(guards.holds, (number, "==", size, source))
    for new in (number, guard):
        new.meta.update(node.meta, shape=None)


def _after_inputs(node: fx.Node) -> fx.Node:
    """The node itself, or for an input the last one that has to do with what was given at all."""
    if node.op != "placeholder":
        return node
    first: fx.Node = [n for n in node.graph.nodes if n.op == "placeholder" or n.target is guards.fits][-1]
    return first


def _fix_values(module: RecordedModule, prober: _Prober, n: int, source: str) -> None:
    node = _input_node(module, prober, n)
    values = tensors_of(prober.example)[n].tolist()
    with module.graph.inserting_after(_after_inputs(node)):
        guard = module.graph.call_function(guards.holds, (node, "==", values, source))
    guard.meta.update(node.meta, shape=None)


def _input_node(module: RecordedModule, prober: _Prober, n: int) -> fx.Node:
    """The node of the ``n``-th input tensor, made if nothing reads it."""
    tensor = tensors_of(prober.example)[n]
    path = next(path for path, leaf in paths(dict(prober.bound)) if leaf is tensor)
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    nodes = {str(node.target).lstrip("*"): node for node in inputs}
    first, *rest = path
    if first.key not in nodes:  # one of **kwargs
        first, *rest = rest
    node: fx.Node = nodes[first.key]
    for part in rest:
        getter = boundary.GETTERS[part.kind]
        known = [user for user in node.users if user.target is getter and user.args == (node, part.key)]
        if not known:
            with module.graph.inserting_after(_after_inputs(node)):
                known = [module.graph.call_function(getter, (node, part.key))]
            known[0].meta.update(node.meta)
        node = known[0]
    return node


def _proof(best: _Judged, prober: _Prober, fixed: Mapping[tuple[int, int], str]) -> Proof:
    agreed = [outcome for outcome in best.outcomes if outcome.guard is None and not outcome.is_wrong]
    taken = {place: size for outcome in agreed for place, size in outcome.probe.dims.items()}
    stopped = {place: outcome.guard for outcome in best.outcomes if outcome.guard for place in outcome.probe.dims}
    dims = []
    for n, spec in enumerate(prober.specs):
        for dim, size in enumerate(spec.shape):
            place = (n, dim)
            why = fixed.get(place) or (stopped[place].source if place in stopped and place not in taken else "")
            free = place in taken and not why
            why = why or (f"{taken[place]} was tried" if free else "no other size was tried")
            dims.append(InputDim(n, prober.names[n], dim, size, free, why))
    refused = tuple(f"{o.probe.text}: {o.guard.source}" for o in best.outcomes if o.guard is not None)
    return Proof(
        error=max(outcome.error for outcome in agreed),
        compared=compared(agreed[0].probe.expected),
        probes=tuple(outcome.probe.text for outcome in agreed),
        refused=refused,
        inputs=tuple(dims),
        farthest=_farthest(agreed, prober),
    )


def _farthest(agreed: Sequence[_Outcome], prober: _Prober) -> Inputs:
    """The probe with the most sizes that are not the example's; at last the example."""
    farthest = max((outcome.probe for outcome in agreed), key=lambda probe: len(probe.dims))
    return farthest.inputs if farthest.dims else prober.example
