"""A request, run: a criterion through the whole pipeline, or a method that trains up to where the training begins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxprune.deploy.joins import choosers, freed, told
from fxprune.deploy.latency import Clock
from fxprune.depth.choice import JUDGED_ON, chosen, part_of_data, usable
from fxprune.errors import BudgetError, ConversionError, FxpruneError, InputError, ModelError, PlanError, is_real
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.groups.flow import flows, unscaled
from fxprune.io.text import some
from fxprune.labels.classes import Reason
from fxprune.methods import Criterion, Learner, ModelState, Outcome, needs_of, score_groups
from fxprune.methods.state import Measured, Scores
from fxprune.options import Keywords
from fxprune.pipeline import (
    Cut,
    Dense,
    Stages,
    choose,
    collected,
    compress,
    joined,
    record_and_analyse,
    rewrite_as,
    shallower,
    uncollected,
)
from fxprune.reconstruction import Piece, checksum, inputs_of, measure_reads, pieces_of, refit, spread
from fxprune.recording.checks import check_finite, checked_inputs
from fxprune.recording.inputs import describe_inputs, device_of, only_batch
from fxprune.recording.liveness import IDLE
from fxprune.recording.module import named_tensors
from fxprune.recording.shards import Wholes
from fxprune.recording.shards import check_same as check_processes
from fxprune.request import Request
from fxprune.rewriting import CUTS_KEY
from fxprune.rewriting.into import REMEDY, into
from fxprune.rewriting.into import obstacles as obstacles_to
from fxprune.rewriting.selections import readers_of_joins
from fxprune.selection.budget import Budget, remaining
from fxprune.selection.plan import PruningPlan
from fxprune.training import Training, measure, plain_state, reset_parameters, site_of
from fxprune.training.distributed import from_first, process_count
from fxprune.training.learner import DIVERGED
from fxprune.verification import zero_slices

_ALIGNED = 8
"""Channels: 16 bytes in half precision, of which kernels that multiply matrices in groups want multiples."""


@uncollected()
@torch.inference_mode(False)
def pruned(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    request: Request,
    keywords: Keywords,
    steps: int,
    stages: Stages,
    calibration: Any = None,
) -> tuple[Dense, fx.GraphModule]:
    """The whole pipeline with a criterion: what was recorded, and what came out.

    ``calibration``: data that the result will be refitted on, so what a step leaves is refitted before the next.

    Raises:
        BudgetError, ModelError, VerificationError: see ``fxprune.prune``.
    """
    dense = _analysed(model, args, kwargs, request, stages, request.cut.verify)
    measures = request.latency is not None or keywords.data is not None or steps > 1 or request.depth is not None
    with collected() if measures else nullcontext():
        if request.depth is not None:
            dense, keywords = _without_some(model, dense, request, keywords, steps, calibration)
        return dense, _cut(model, dense, request, keywords, steps, calibration)


def _cut(
    model: nn.Module, dense: Dense, request: Request, keywords: Keywords, steps: int, calibration: Any
) -> fx.GraphModule:
    """What a criterion and the budget make of a dense model, or of one that lacks branches."""
    if request.latency is not None and request.latency.joins:
        return _with_joins(model, dense, request, keywords, steps, calibration)
    cut, finish = _timed(dense, request)
    scores, notes = _scores(dense, replace(request, cut=cut), keywords, steps, calibration)
    if keywords.data is not None and not needs_of(request.method):  # type: ignore[arg-type]
        notes.append(f"data= was not needed: {request.name} reads only weights")
    if "reads" in needs_of(request.method) and not keywords.reconstruct:  # type: ignore[arg-type]
        notes.append(
            f"{request.name} chose for what a refit leaves, which fxprune.reconstruct or reconstruct=True makes"
        )
    return _held(model, request, dense, lambda cut: finish(dense, scores, cut, request.name, notes), cut)


def _with_joins(
    model: nn.Module, dense: Dense, request: Request, keywords: Keywords, steps: int, calibration: Any
) -> fx.GraphModule:
    """The same with layers that choose what they read of a stream, if more of the scores stays so, both measured."""
    assert request.latency is not None, "only then"
    choosers(dense)
    if isinstance(keywords.data, Iterator):
        keywords = replace(keywords, data=list(keywords.data))

    def scored(trial: Dense, cut: Cut) -> list[Scores | None]:
        return _scores(trial, replace(request, cut=cut), keywords, steps, calibration)[0]

    tied = replace(request, latency=replace(request.latency, joins=False))

    def without() -> fx.GraphModule:
        return _cut(model, dense, tied, keywords, steps, calibration)

    other, plain = None, None
    with suppress(BudgetError):
        other = without()
        plain = other.meta["fxprune"].plan.channels(dense.graph)
    found = freed(dense, request.latency, request.cut, scored, plain)
    if found is None:
        note = "joins=True: of no layer a choice of what it reads is predicted to pay"
        return _noted(other if other is not None else without(), note)
    clock = Clock(found.dense, request.latency, found.cut.round_to[0])
    budget = replace(found.cut.budget, ratio=request.cut.budget.ratio)
    cut, graph = clock.within(replace(found.cut, budget=budget)), found.dense.graph
    scores = scored(found.dense, cut)
    try:
        result = clock.compress(found.dense, scores, cut, request.name)
    except BudgetError:
        if other is None:
            raise
        return _noted(other, "joins=True: the budget was not met with layers that choose what they read")
    keep = result.meta["fxprune"].plan.channels(graph, found.dense.whole.graph)
    note = told(graph, clock.cost, found.dense.joins, keep)
    share = found.share(graph, keep)
    if other is None or plain is None:
        return _noted(result, note)
    before = found.share(dense.graph, plain)
    if before >= share:
        return _noted(
            other,
            f"joins=True: measured, {share:.2%} of the scores stays with choices ({note}), and {before:.2%} without",
        )
    return _noted(result, f"{note}; {share:.2%} of the scores stays, and {before:.2%} without")


def _noted(result: fx.GraphModule, note: str) -> fx.GraphModule:
    report = result.meta["fxprune"]
    result.meta["fxprune"] = replace(report, notes=(*report.notes, note))
    return result


def _without_some(
    model: nn.Module, dense: Dense, request: Request, keywords: Keywords, steps: int, calibration: Any
) -> tuple[Dense, Keywords]:
    """The dense model without the branches that serve the budget best, and the keywords with data to be read again."""
    assert request.depth is not None, "only then"
    if dense.on_meta:
        raise ModelError("depth= chooses by what is measured, and weights on the meta device cannot run. Load them.")
    if isinstance(keywords.data, Iterator):
        keywords = replace(keywords, data=list(keywords.data))
    few = replace(keywords, data=part_of_data(keywords.data))
    data = calibration if calibration is not None else keywords.data if "reads" in needs_of(request.method) else None  # type: ignore[arg-type]
    pieces: Sequence[Piece] = ()
    if data is not None:
        pieces = _pieces(dense, data, JUDGED_ON)
    quick = replace(request, cut=replace(request.cut, verify=False))

    def attempt(trial: Dense) -> fx.GraphModule:
        return _cut(model, trial, quick, few, steps, part_of_data(calibration))

    return chosen(dense, request.depth, request.cut.budget.ratio, pieces, attempt), keywords


def without_branches(dense: Dense, names: Sequence[str]) -> Dense:
    """The dense model without the branches of these names.

    Raises:
        PlanError: it has no such branch.
    """
    known = {branch.name: branch for branch in usable(dense, 1.0)[0]}
    missing = [name for name in names if name not in known]
    if missing:
        raise PlanError(f"The plan removes {some(missing)}, which is no residual branch of this model.")
    return shallower(dense, [known[name] for name in names])


def with_choices_of(dense: Dense, names: Sequence[str]) -> Dense:
    """The dense model in which these layers choose what they read of a stream.

    Raises:
        PlanError: one of them reads none.
    """
    missing = sorted(set(names) - set(readers_of_joins(dense.module, dense.graph)))
    if missing:
        raise PlanError(f"By the plan {some(missing)} choose what they read of a stream, and in this model cannot.")
    return joined(dense, names)


def _held(
    model: nn.Module, request: Request, dense: Dense, made: Callable[[Cut], fx.GraphModule], cut: Cut
) -> fx.GraphModule:
    """What comes out; if asked for the first that the class holds.

    That is the plan as it is, one with aligned widths, which some kernels demand and a graph provides by padding, one
    with what no attribute says locked, one with all of that locked which the graph says otherwise than the class, or
    one with all of the tensors around it locked: layers that the recording did not run may have their sizes too. Then
    the last three, with what layers read locked of which nothing comes: the class runs them.

    Raises:
        ConversionError: the class cannot hold any cut.
    """
    if not request.for_class:
        return made(cut)
    known = replace(cut, obstacles=partial(obstacles_to, model))
    if dense.on_meta:
        return made(known)  # nothing can be compared
    strict = replace(cut, obstacles=partial(obstacles_to, model, strict=True))
    aligned = [replace(cut, round_to=(_ALIGNED,))] if max(cut.round_to) < _ALIGNED else []
    refused: FxpruneError | None = None
    widest = replace(strict, widely=True)
    are_idle = any(IDLE in node.meta for node in dense.module.graph.nodes)
    idle = [replace(held, idle=True) for held in (known, strict, widest)] if are_idle else []
    for held in (cut, *aligned, known, strict, widest, *idle):
        try:
            result = made(held)
            into(model, result)
        except (ConversionError, BudgetError) as error:
            refused = error if refused is None or held not in (*aligned, known) else refused
        else:
            if held in aligned:
                _noted(
                    result, f"channels are kept in multiples of {_ALIGNED}, without which the class did not hold them"
                )
            return result
    assert refused is not None, "something was tried"
    if isinstance(refused, ConversionError):
        why = str(refused).removesuffix(REMEDY).rstrip()
        raise ConversionError(
            f"for_class=True: no plan that was tried fits. {why} Leave out for_class=True."
        ) from refused
    raise refused


@torch.inference_mode(False)
def attached(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    request: Request,
    stages: Stages,
) -> Training:
    """A copy of the model, ready to be trained with the request's method.

    Raises:
        InputError, ModelError: see ``fxprune.attach``.
    """
    learner, cut = request.method, request.cut
    assert isinstance(learner, Learner)
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    wider, narrow = learner.wider() if hasattr(learner, "wider") else None, None
    if wider is not None:
        if cut.budget.kind == "latency":
            raise InputError(f"{request.name} starts from a wider network here, for which there is no latency= budget.")
        narrow = _analysed(model, args, kwargs, request, stages, verify=False)
        given = narrow.graph
        cut = replace(
            cut, budget=replace(cut.budget, whole=_whole(given, cut.budget)), before=(given.macs(), given.params())
        )
        model = wider
    dense = _analysed(model, args, kwargs, request, stages, cut.verify)
    if narrow is not None:
        _check_answers_alike(narrow, dense)
    if dense.on_meta:
        raise ModelError("The weights are on the meta device, where nothing can be trained. Load them first.")
    if not dense.graph.prunable:
        compress(dense, [None] * len(dense.graph.groups), cut, request.name)  # raises, and says what holds them
    cut, compressed = _timed(dense, replace(request, cut=cut))
    live = copy.deepcopy(dense.module).train()

    def select(scores: Sequence[Scores | None]) -> Keep:
        selection, unreachable = choose(dense.graph, scores, cut)
        if unreachable is not None:
            raise unreachable
        return selection.keep

    site = site_of(live, dense.graph, cut.budget, select, cut.seed)

    def finish(live: fx.GraphModule, outcome: Outcome) -> fx.GraphModule:
        if outcome.threshold is not None and not getattr(learner, "decides", False):
            raise InputError(
                f"{request.name} gives a threshold, which takes the place of the budget that was asked for: a learner "
                "that decides how much goes says so, decides = True."
            )
        outcome = from_first(outcome)
        trained = dense.trained(plain_state(live))
        check_finite(trained.module, DIVERGED)  # those, too, that hypernetworks generate
        chosen = replace(cut, threshold=outcome.threshold)
        given = list(outcome.scores), list(outcome.notes)
        pruned = _held(
            model, request, dense, lambda cut: compressed(trained, given[0], cut, request.name, given[1]), chosen
        )
        if outcome.reinitialise:
            drawn = reset_parameters(pruned, cut.seed)
            note = "weights initialised anew" + (f"; drawn like their values: {', '.join(drawn)}" if drawn else "")
            frozen = [name for name, p in pruned.named_parameters() if not p.requires_grad]
            _noted(pruned, f"{note}; frozen ones stay as they are: {some(frozen)}" if frozen else note)
        return pruned

    def reference() -> fx.GraphModule:
        return copy.deepcopy(dense.module).train()

    record, hooks = describe_inputs(args, kwargs), learner.attach(site)
    settings = {f"option {name}": value for name, value in _plain_options(learner).items()}
    for name, names in (("ignore", request.ignore), ("keep", request.keep)):
        settings[name] = ", ".join(sorted(names)) or "nothing"
    if not hooks.for_any_budget:
        settings |= _demands(cut)
    return Training(live, hooks, dense.graph, record, reference, finish, type(learner).__name__, settings)


def _check_answers_alike(given: Dense, wider: Dense) -> None:
    """What comes out is cut from the wider network and stands in for the one that is given.

    Raises:
        InputError: their outputs have other shapes.
    """
    here, there = given.runs({}), wider.runs({})
    if here.failed is None and there.failed is None and here.shapes != there.shapes:
        wanted, found = (" and ".join(str(list(shape)) for shape in run.shapes) for run in (here, there))
        raise InputError(
            f"factory= made a network whose outputs are {found}, and those of the model that is given are {wanted}. It "
            "must make that model at a width, with as many classes."
        )


def _demands(cut: Cut) -> dict[str, str]:
    """On what a budget leaves, in words."""
    return {
        "budget": f"{cut.budget.kind}={cut.budget.ratio:g}",
        "scope": cut.scope,
        "round_to": " or ".join(map(str, cut.round_to)),
        "min_channels": str(cut.min_channels),
        "limits": str({name: float(share) for name, share in sorted(cut.max_ratio.items())}),
    }


def _plain_options(learner: object) -> dict[str, str]:
    """Those that are numbers, words and the like, which say the same in another process: 4 and 4.0 are one."""
    if not is_dataclass(learner):
        return {}
    values = {field.name: getattr(learner, field.name) for field in fields(learner)}
    numbers = {name: str(float(value)).removesuffix(".0") for name, value in values.items() if is_real(value)}
    return numbers | {name: repr(value) for name, value in values.items() if isinstance(value, (bool, str, type(None)))}


def _analysed(model: nn.Module, args: Any, kwargs: Any, request: Request, stages: Stages, verify: bool) -> Dense:
    """The first half of the pipeline, with what is to stay."""
    attention, ignore, keep = request.attention, request.ignore, request.keep
    return record_and_analyse(model, args, kwargs, attention, ignore, stages, keep=keep, verify=verify)


def _timed(dense: Dense, request: Request) -> tuple[Cut, Callable[..., fx.GraphModule]]:
    """The cut, and what makes the smaller module; for a budget of latency they share a clock."""
    if request.latency is None:
        return _of_whole(request.cut, dense), compress
    clock = Clock(dense, request.latency, request.cut.round_to[0])
    return clock.within(request.cut), clock.compress


def _of_whole(cut: Cut, dense: Dense) -> Cut:
    """The cut, its budget a ratio of the model with all branches."""
    if not dense.removed or cut.budget.whole is not None:
        return cut
    return replace(cut, budget=replace(cut.budget, whole=_whole(dense.whole.graph, cut.budget)))


def _whole(graph: ChannelGraph, budget: Budget) -> int:
    """What the budget counts of all of a model."""
    if budget.kind == "channels":
        return sum(group.channels.size for group in graph.prunable)
    return graph.macs() if budget.kind == "flops" else graph.params()


def _scores(
    dense: Dense, request: Request, keywords: Keywords, steps: int, calibration: Any
) -> tuple[list[Scores | None], list[str]]:
    """Scores of a criterion, and notes; in several steps each time for what the step before has left.

    What is left is refitted where the result will be, or the criterion counts on it.
    """
    graph, criterion, cut = dense.graph, request.method, request.cut
    assert isinstance(criterion, Criterion)
    needs, notes = needs_of(criterion), []
    module, kept = dense.module, None
    data = keywords.data if "reads" in needs else calibration if steps > 1 else None
    pieces: Sequence[Piece] = ()
    if data is not None:
        pieces = _pieces(dense, data)
    for step in range(1, steps + 1):
        with dense.stages("scoring"):
            measured = Measured()
            if needs - {"reads"}:
                given = inputs_of(keywords.data)
                measured = measure(copy.deepcopy(module), graph, needs, given, keywords.loss_fn)
            if "reads" in needs:
                reads, trial = measure_reads(copy.deepcopy(module), graph, pieces, cut.seed)
                measured = replace(measured, reads=reads, trial=trial)
            tensors = Wholes(named_tensors(module))  # under all names: one reader of a shared weight knows one of them
            bare = partial(_unscaled, module, graph)
            state = ModelState(graph, tensors, cut.seed, measured, kept, bare, partial(remaining, graph, cut.budget))
            scores: list[Scores | None] = from_first(score_groups(criterion, state))
        if step == steps:
            notes += state.notes
            break
        with dense.stages("selecting"):
            ratio = 1 - (1 - cut.budget.ratio) * step / steps
            selection, _ = choose(graph, scores, replace(cut, budget=replace(cut.budget, ratio=ratio)))
        kept = selection.keep if kept is None else selection.keep & kept
        module = copy.deepcopy(dense.module)
        zero_slices(module, PruningPlan.of(graph, kept))
        if pieces and (why := _refit(dense, kept, pieces, cut, module)):
            notes.append(f"not refitted after step {step} of {steps}: {why}")
    return scores, notes


def _pieces(dense: Dense, data: Any, samples: int | None = None) -> Sequence[Piece]:
    """The inputs in ``data``, of which every process has to have all: no sums are taken over processes.

    Raises:
        InputError: ``data`` cannot be used, or another process has others.
    """
    record = describe_inputs(dense.args, dense.kwargs)
    pieces = pieces_of(data, record, samples, device_of(dense.module), only_batch(dense.module, record))
    if process_count() > 1:
        check_processes({"data=": checksum(pieces)})
    return pieces


def _unscaled(module: fx.GraphModule, graph: ChannelGraph) -> frozenset[int]:
    return unscaled(module, graph, flows(module, graph))


def _refit(dense: Dense, keep: Keep, pieces: Sequence[Piece], cut: Cut, module: fx.GraphModule) -> Reason | None:
    """Write to ``module`` the weights that stay, refitted to the dense activations; or why that cannot be."""
    small = rewrite_as(dense, keep, replace(cut, verify=False), "")
    if isinstance(small, Reason):
        return small
    with dense.stages("reconstructing"):
        cuts = small.meta[CUTS_KEY]
        spread(refit(dense.module, small, pieces, cuts, seed=cut.seed)[0], module, cuts)
    return None
