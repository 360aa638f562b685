"""Probes: the recording against the model on what the example did not show.

A *probe* is a call on which both must agree: the example, the same model a second time, another batch size, another
size of every input dimension that the model takes, other values of masks and ids. A *candidate* is a way to record
(``recording.Options``): the first one as ever, others where it disagrees or refuses; the first that agrees on every
probe is taken, else the one that agrees on most. What is left becomes a *guard*: an input dimension that is fixed, with
the reason. A probe on which the model itself fails says nothing but that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import fx, nn

from fxprune.errors import FxpruneError, VerificationError
from fxprune.groups.channels import ChannelGraph
from fxprune.recording import Options, RecordedModule, Twin, boundary, guards
from fxprune.recording.inputs import (
    DIMS_KEY,
)
from fxprune.recording.structure import paths, tensors_of
from fxprune.verification.compare import TOLERANCE, compared, relative_error, strided
from fxprune.verification.oracle import Inputs
from fxprune.verification.places import Places
from fxprune.verification.prober import Outcome, Probe, Prober, outcome_of
from fxprune.verification.proof import InputDim, Proof
from fxprune.verification.sizes import SizeRuns

_FIRST = Options()


@dataclass(frozen=True)
class _Judged:
    module: RecordedModule
    options: Options
    outcomes: tuple[Outcome, ...]

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
    analysed: Callable[[RecordedModule], ChannelGraph] | None = None,
    options: Options = _FIRST,
) -> tuple[RecordedModule, Proof]:
    """The recording that agrees with the model, guarded where it cannot, and what was probed.

    Args:
        model: the caller's; copies of it are run.
        module: its recording, of the first candidate.
        args: the example inputs.
        kwargs: the same, keyword inputs.
        record_again: makes another candidate.
        runs: of ``module``.
        analysed: gives the channels of a recording, where any are to be cut.
        options: that it was made with.

    Raises:
        VerificationError: the recording does not compute what the model computes on the example itself, or the model
            is no function of its inputs: a second call answers otherwise.
    """
    prober = Prober(model, module, (tuple(args), dict(kwargs)), runs)
    outcomes = [*prober.outcomes(module)]
    best = _Judged(module, options, tuple(outcomes))
    if any(outcome.is_wrong for outcome in outcomes):
        _check_function(model, module, prober, outcomes[0].probe)
        best = replace(best, outcomes=tuple(prober.afresh(module, o) if o.is_wrong else o for o in outcomes))
    if best.score > (0, 0):
        best = _best(best, prober, record_again)
    first = best.outcomes[0]
    if first.is_wrong or first.guard is not None:
        raise VerificationError(
            f"The recorded graph differs from the model on the example inputs: {first.guard or first.details}. "
            "Does forward depend on something that changes from call to call?"
        )
    if best.module.meta["fused"]:
        _tell_of_fused(model, best)
    if analysed is not None and any(outcome.probe.dims and outcome.is_right for outcome in best.outcomes):
        best = _with_places(best, prober, analysed(best.module))
    fixed = _guarded(best, prober)
    proof = _proof(_under_guards(best), prober, fixed)
    best.module.meta[DIMS_KEY] = [asdict(dim) for dim in proof.inputs]
    return best.module, proof


def _check_function(model: nn.Module, module: RecordedModule, prober: Prober, probe: Probe) -> None:
    """Whether the model answers a first call as it answers a later one.

    Raises:
        VerificationError: it does not, so no graph can be right.
    """
    fresh = Twin.of(model, module)
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


def _tell_of_fused(model: nn.Module, best: _Judged) -> None:
    """Note where layers of torch answer otherwise by the fused kernels that they call without gradients.

    What decides it are masks, so that the example is looked at, and those among the probes that change them.
    """
    twin = Twin.of(model, best.module, fused=True)
    example, *others = (outcome.probe for outcome in best.outcomes)
    for probe in (example, *(other for other in others if other.tensors)):
        error = relative_error(twin(*probe.inputs), probe.expected)
        if error > TOLERANCE:
            best.module.meta["notes"].append(
                "without gradients layers of torch call fused kernels, which answer otherwise (what a padding mask "
                f"hides is 0 there; relative error {error:.1e} on {probe.text}): recorded as it goes with gradients"
            )
            return


def _best(best: _Judged, prober: Prober, again: Callable[[Options], RecordedModule]) -> _Judged:
    """The first candidate that agrees on all probes, else the one that agrees on most."""
    for change in (_cleared, _exported, _flipped, _unequal, _without_numpy, _without_builtins, _with_scripts):
        options = change(best, prober)
        if options is None or options == best.options:
            continue
        try:
            module = again(options)
        except FxpruneError:
            continue
        candidate = _Judged(module, options, tuple(outcome_of(module, outcome.probe) for outcome in best.outcomes))
        if candidate.score < best.score:
            best = candidate
        if best.score == (0, 0):
            break
    return best


def _cleared(best: _Judged, prober: Prober) -> Options | None:
    """What the model keeps for one size is as good as never set."""
    changed = frozenset(prober.twin.changed())
    return replace(best.options, cleared=changed) if changed else None


def _exported(best: _Judged, prober: Prober) -> Options | None:
    return replace(best.options, exporting=True)


def _flipped(best: _Judged, prober: Prober) -> Options | None:
    """Branches on values go the way that another probe takes."""
    lines = {outcome.guard.source for outcome in best.outcomes if outcome.guard and outcome.probe.tensors}
    return replace(best.options, flipped=best.options.flipped | lines) if lines else None


def _unequal(best: _Judged, prober: Prober) -> Options | None:
    """Branches on sizes that are equal go the way of unequal ones, as another probe does."""
    lines = {outcome.guard.source for outcome in best.outcomes if outcome.guard and outcome.probe.dims}
    return replace(best.options, unequal=best.options.unequal | lines) if lines else None


def _without_numpy(best: _Judged, prober: Prober) -> Options | None:
    return replace(best.options, traced_numpy=False)


def _without_builtins(best: _Judged, prober: Prober) -> Options | None:
    return replace(best.options, traced_builtins=False)


def _with_scripts(best: _Judged, prober: Prober) -> Options | None:
    return replace(best.options, inlined_scripts=False)


def _with_places(best: _Judged, prober: Prober, graph: ChannelGraph) -> _Judged:
    """The same; sizes for which channels lie elsewhere than for the example are wrong, alone if alone they are."""
    places, outcomes = Places(best.module, graph, prober.example), list[Outcome]()
    for outcome in best.outcomes:
        if not (outcome.probe.dims and outcome.is_right) or places.are_for(outcome.probe.inputs):
            outcomes.append(outcome)
            continue
        apart = [outcome_of(best.module, probe) for probe in prober.apart(outcome.probe.dims)]
        right = [each.is_right and places.are_for(each.probe.inputs) for each in apart]
        told = [each if fine else replace(each, elsewhere=True) for each, fine in zip(apart, right, strict=True)]
        outcomes += [replace(outcome, elsewhere=True)] if all(right) else told
    return replace(best, outcomes=tuple(outcomes))


def _guarded(best: _Judged, prober: Prober) -> dict[tuple[int, int], str]:
    """Put a guard where a probe is wrong, or where the graph takes a size that the model does not; dim -> reason."""
    module, fixed = best.module, {}
    for outcome in best.outcomes[1:]:
        if not outcome.is_wrong:
            continue
        probe = outcome.probe
        for place, size in probe.dims.items():
            fixed[place] = f"at {size} {outcome.text}"
        for n in probe.tensors:
            fix_values(module, prober, n, f"{prober.names[n]} is fixed at the example's values")
    taken = {place for outcome in best.outcomes for place in outcome.probe.dims}
    for place, sizes in prober.refused.items():
        if place not in taken:
            tried = ", ".join(map(str, dict.fromkeys(one[place] for one in sizes)))
            fixed[place] = f"the model takes no other size that was tried ({tried})"
    runs = SizeRuns(module, *prober.example)
    for place, why in fixed.items():
        refused = [] if place in taken else prober.refused[place]
        if not refused or any(runs(sizes).failed is None for sizes in refused):  # else an op refuses them by itself
            fix_size(module, prober, place, why)
    if fixed or any(outcome.is_wrong for outcome in best.outcomes):
        module.recompile()
    return fixed


def _under_guards(best: _Judged) -> _Judged:
    """The same after guards were put: what agreed before may be refused now."""
    if not any(outcome.is_wrong for outcome in best.outcomes):
        return best
    outcomes = [o if o.is_wrong or o.guard else outcome_of(best.module, o.probe) for o in best.outcomes]
    return replace(best, outcomes=tuple(outcomes))


def fix_size(module: RecordedModule, prober: Prober, place: tuple[int, int], why: str) -> None:
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


def fix_values(module: RecordedModule, prober: Prober, n: int, source: str) -> None:
    node = _input_node(module, prober, n)
    values = tensors_of(prober.example)[n].tolist()
    with module.graph.inserting_after(_after_inputs(node)):
        guard = module.graph.call_function(guards.holds, (node, "==", values, source))
    guard.meta.update(node.meta, shape=None)


def _input_node(module: RecordedModule, prober: Prober, n: int) -> fx.Node:
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


def _proof(best: _Judged, prober: Prober, fixed: Mapping[tuple[int, int], str]) -> Proof:
    agreed = [outcome for outcome in best.outcomes if outcome.is_right]
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


def _farthest(agreed: Sequence[Outcome], prober: Prober) -> Inputs:
    """The probe with the most sizes that are not the example's, and numbers to compare; at last the example.

    A model may take a size and have nothing to say of it: where a grid has one column left, ``x / (width - 1)``.
    """
    probes = [outcome.probe for outcome in agreed]
    told = [probe for probe in probes if _is_finite_somewhere(probe.expected)]
    farthest = max(told or probes, key=lambda probe: len(probe.dims))
    return farthest.inputs if farthest.dims else prober.example


def _is_finite_somewhere(outputs: Any) -> bool:
    floats = [strided(t) for t in tensors_of(outputs) if t.numel() and t.is_floating_point()]
    return not floats or any(bool(t.isfinite().any()) for t in floats)
