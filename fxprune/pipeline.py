"""The stages put together: from a model to a graph with its channels, and from scores to a proven smaller graph."""

from __future__ import annotations

import copy
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxprune import recording
from fxprune.depth import Branch, compared_with_zeroed, without
from fxprune.errors import BudgetError, ExampleInputsError, GuardError, ModelError, RecordError, VerificationError
from fxprune.groups import analyse_graph
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.io.text import some
from fxprune.labels.classes import Reason
from fxprune.labels.records import Attention, TensorLabels, channels_of
from fxprune.methods.state import Scores
from fxprune.recording.inputs import RECORD_KEY, describe_inputs, device_of, map_tensors
from fxprune.recording.leaf_functions import leaf_functions_of
from fxprune.recording.liveness import IDLE
from fxprune.recording.shards import check_same, is_sharded, recordable, without_values
from fxprune.recording.shards import whole as whole_of
from fxprune.recording.together import CALLS_KEY, is_together, one_call, parameters_of
from fxprune.reports.graph import group_rows, groups_with_removed, rows, with_removed
from fxprune.reports.report import Report, plan_of
from fxprune.rewriting import CUTS_KEY, REPAIRED, Cuts, Draft, MetaRun, UnrepairableError, check_rewrite, draft
from fxprune.rewriting.selections import follows, with_choices
from fxprune.selection.budget import Budget, Scope, Selection, remaining, select
from fxprune.selection.plan import PruningPlan
from fxprune.verification import TOLERANCE, Agreement, Inputs, ReplayError, mask_oracle
from fxprune.verification.deciding import with_leaf_functions
from fxprune.verification.probes import prove
from fxprune.verification.proof import Proof
from fxprune.verification.sizes import SizeRuns, settled

_ROUNDS = 20
_ENTRIES_IN_CACHE = 2**18
COARSEST = 16
"""The largest multiple that channels are kept in without being asked for."""

_NO_NUMBER = "no attribute of the class can say this size"
_IDLE = "read by a layer of which nothing comes"
_WASTE = 0.01  # of the budget that a plan may leave unused for the sake of a coarser multiple
_LOSS = 0.1  # of what is lost with any number of channels, that a coarser multiple may lose more
_WASTE_OF_LATENCY = 0.04  # which is measured, and then corrected


class Stages:
    """Seconds per stage, told on stderr as they begin."""

    def __init__(self, progress: bool):
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._progress:
            print(f"fxprune: {name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Cut:
    """What may be cut, and how it is proven.

    ``round_to``: kept channels are a multiple of one of these, coarse to fine: of the first whose plan uses the budget
    up but for ``_WASTE`` of it and loses no more by the scores than that of the last but for ``_LOSS`` of it, else of
    the last. ``max_ratio``: name pattern -> largest share of a group that may go.
    ``threshold``: cut the scores up to this one, whatever the budget. ``obstacles``: nodes of a rewritten module that
    are not to be, so that what they cut is locked; ``widely``: all of a tensor, where they read one size of it;
    ``idle``: what layers read of which nothing comes stays as well.
    ``consume``: the dense weights are emptied as they are cut, so nothing can be proven by running. ``gone``: channels
    that go in any case; ``settled``: of which no others go. ``before``: MACs and parameters of the model that is given,
    where another one is cut.
    """

    budget: Budget
    scope: Scope = "global"
    exact: bool = False
    round_to: tuple[int, ...] = (1,)
    min_channels: int = 1
    max_ratio: Mapping[str, float] = field(default_factory=dict)
    threshold: float | None = None
    verify: bool = True
    consume: bool = False
    seed: int = 0
    obstacles: Callable[[fx.GraphModule], Sequence[fx.Node]] = lambda module: ()
    widely: bool = False
    idle: bool = False
    gone: Keep | None = None
    settled: Keep | None = None
    before: tuple[int, int] | None = None


@dataclass(frozen=True)
class Dense:
    """A recorded model and its channels. ``runs``: of the graph with other sizes. ``name``: of the model's class.

    ``stays``: names of what is not to be cut, as ``analyse_graph`` takes them. ``removed``: the branches that ``whole``
    has and this lacks; without any it is ``whole`` itself. ``joins``: layers that choose what they read of a stream,
    which in ``whole`` read all of it. ``earlier``: the plan that the model was made with, if it was pruned before.
    """

    module: fx.GraphModule
    runs: SizeRuns
    graph: ChannelGraph
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    stages: Stages
    proof: Proof | None = None
    stays: Mapping[str, Sequence[str]] = field(default_factory=dict)
    removed: tuple[Branch, ...] = ()
    with_all: Dense | None = None
    joins: tuple[str, ...] = ()
    earlier: PruningPlan | None = None

    @property
    def whole(self) -> Dense:
        """With all branches."""
        return self.with_all or self

    @property
    def on_meta(self) -> bool:
        return any(p.is_meta for p in self.module.parameters())

    @cached_property
    def other_run(self) -> MetaRun:
        """The run with another batch size, without data."""
        return self.runs.other_batch()

    def trained(self, values: Mapping[str, torch.Tensor]) -> Dense:
        """The same with the values of a whole state_dict, on their device."""
        module = copy.deepcopy(self.module)
        device = next((value.device for value in values.values()), torch.device("cpu"))
        module.to(device).load_state_dict(values)
        args, kwargs = map_tensors(lambda tensor: tensor.to(device), (self.args, self.kwargs))
        return replace(self, module=module, args=args, kwargs=kwargs)


_paused: list[bool] = []  # for every ``uncollected`` under way: was the search on before?


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for cycles, which would walk through all that is alive whenever much is made.

    What has no cycle is freed at once as ever; the rest is found afterwards.
    """
    _paused.append(gc.isenabled())
    gc.disable()
    try:
        yield
    finally:
        if _paused.pop():
            gc.enable()


@contextmanager
def collected() -> Iterator[None]:
    """The search goes on inside, for what takes long, runs the user's code or makes copies of weights."""
    before = gc.isenabled()
    if any(_paused):
        gc.enable()
    try:
        yield
    finally:
        if not before:
            gc.disable()


@uncollected()
@torch.inference_mode(False)
def record_and_analyse(
    model: nn.Module, args: Any, kwargs: Any, attention: Attention, ignore: Sequence[str], stages: Stages,
    *, keep: Sequence[str] = (), verify: bool = False, leaf_functions: Sequence[str] = (),
) -> Dense:  # fmt: skip
    """The first half of the pipeline: the model as a graph, and which of its channels belong together.

    ``verify``: the graph is compared with the model, on the example and on what the example does not show.
    ``leaf_functions``: those that are called as they are in any case.
    """
    proof, options = None, recording.Options(leaf_functions=frozenset(leaf_functions))
    given, (model, put_back) = model, recordable(model)

    def again(options: recording.Options) -> recording.RecordedModule:
        return recorded(model, args, kwargs, options)[0]

    with stages("recording"):
        if model is given:
            module, runs = recorded(model, args, kwargs, options)
        else:
            module, runs = _without_values(model, args, kwargs)
    graphs: dict[tuple[recording.RecordedModule, int], ChannelGraph] = {}

    def analysed(module: recording.RecordedModule) -> ChannelGraph:
        key = module, len(module.graph.nodes)  # a proof puts guards in
        if key not in graphs:
            graphs[key] = analyse_graph(module, args, kwargs, attention=attention, ignore=ignore, keep=keep)
        return graphs[key]

    if given is model and not any(p.is_meta for p in module.parameters()):
        with stages("recording"), collected():
            first = module
            module, options = with_leaf_functions(first, options, again, analysed, runs, (args, kwargs))
            runs = runs if module is first else SizeRuns(module, args, kwargs)
        if verify:
            with stages("probing"), collected():
                proven, proof = prove(model, module, args, kwargs, again, runs, analysed, options)
            if proven is not module:
                module, runs = proven, SizeRuns(proven, args, kwargs)
    with stages("analysing"):
        graph = analysed(module)
    put_back(module)
    kinds = {name: type(m).__name__ for name, m in recording.named_modules(model)}
    if model is not given:
        graph = replace(graph, notes=(*graph.notes, "the recording was not compared with the model, which is sharded"))
    graph, stays = replace(graph, kinds=kinds), {"ignore": ignore, "keep": keep}
    return Dense(module, runs, graph, args, kwargs, type(model).__name__, stages, proof, stays, earlier=plan_of(given))


def recorded_of_shares(model: nn.Module, args: Any, kwargs: Any) -> recording.RecordedModule:
    """The recording of a model that processes share, over the same shares."""
    model, put_back = recordable(model)
    module, _ = _without_values(model, args, kwargs)
    put_back(module)
    return module


def _without_values(model: nn.Module, args: Any, kwargs: Any) -> tuple[recording.RecordedModule, SizeRuns]:
    """``recorded`` of a ``recordable`` model: parameters and inputs on meta."""
    try:
        return recorded(model, *map_tensors(without_values, (args, kwargs)))
    except (ExampleInputsError, RecordError) as error:
        raise type(error)(
            f"{error} As every process holds a share of the parameters, forward was recorded without their values. "
            "Where it reads them, prune the whole model and shard the result."
        ) from error


@uncollected()
@torch.inference_mode(False)
def shallower(dense: Dense, branches: Sequence[Branch]) -> Dense:
    """The same model without these residual branches, in graph order, and its channels anew."""
    place = {node.name: index for index, node in enumerate(dense.module.graph.nodes)}
    going = sorted(branches, key=lambda branch: place[branch.sum])
    with dense.stages("removing branches"):
        module = without(dense.module, going)
    with dense.stages("analysing"):
        graph = analyse_graph(module, dense.args, dense.kwargs, attention=dense.graph.attention, **dense.stays)
    runs = SizeRuns(module, dense.args, dense.kwargs)
    graph = replace(graph, kinds=dense.graph.kinds)
    return replace(dense, module=module, runs=runs, graph=graph, removed=tuple(going), with_all=dense)


@uncollected()
@torch.inference_mode(False)
def joined(dense: Dense, readers: Sequence[str]) -> Dense:
    """The same model in which these layers choose what they read of a stream, at first all of it; its channels anew."""
    module = with_choices(dense.module, readers)
    with dense.stages("analysing"):
        graph = analyse_graph(module, dense.args, dense.kwargs, attention=dense.graph.attention, **dense.stays)
    graph = replace(graph, kinds=dense.graph.kinds, follows=follows(module, graph))
    runs = SizeRuns(module, dense.args, dense.kwargs)
    return replace(dense, module=module, runs=runs, graph=graph, joins=tuple(readers), with_all=dense)


def recorded(
    model: nn.Module, args: Any, kwargs: Any, options: recording.Options | None = None
) -> tuple[recording.RecordedModule, SizeRuns]:
    """The recording without guards that no input decides, and its runs with other sizes."""
    options = options or recording.Options()
    module = recording.recorded(model, args, kwargs, compiled=False, options=options)
    if is_together(model):
        module.meta[CALLS_KEY] = parameters_of(model, kwargs)
        for name in kwargs:
            one_call(module, name)  # raises where it needs another one
    runs = SizeRuns(module, args, kwargs)
    settled(runs)
    return module, runs


@uncollected()
@torch.inference_mode(False)
def compress(
    dense: Dense, scores: Sequence[Scores | None], options: Cut, method: str, notes: Sequence[str] = ()
) -> fx.GraphModule:
    """The second half: the module that scores and a budget lead to, verified, with its report.

    Raises:
        BudgetError, ModelError, VerificationError: see ``fxprune.prune``.
    """
    graph, told = dense.graph, [*dense.graph.notes, *notes]
    if options.idle:
        graph = _without_idle_reads(dense, graph)
        told.append(f"locked: {_IDLE}, which its class runs nevertheless")
    loosened, reason = False, Reason("")
    for _ in range(_ROUNDS):
        with dense.stages("selecting"):
            selection, unreachable = choose(graph, scores, options)
        with dense.stages("rewriting"):
            found, blame = _rewrite(dense, graph, selection.keep)
        refused = [] if found is None else options.obstacles(found.module)
        if found is not None and refused:
            before, (graph, note) = graph, _without_obstacles(dense, graph, selection.keep, refused, options.widely)
            if graph.groups == before.groups:
                raise ModelError(f"The class cannot hold any cut: {note}.")
            told.append(note)
            continue
        if found is not None:
            if unreachable is not None:
                before, graph = graph, graph if loosened else _loosened(dense, graph, scores, options)
                if graph is before:
                    if not reason.text:
                        raise unreachable
                    text = f"{unreachable} A smaller plan could not be rewritten: {reason}."
                    raise BudgetError(text, unreachable.floor)  # with other channels, fewer may do
                loosened = True
                continue
            with dense.stages("rewriting"):
                _check_agreed(dense, graph, selection.keep)
                pruned = found.finished(options.consume)
            if options.consume:
                told.append("not compared with the masked model: consume=True released its weights as they were cut")
            if selection.guarded:
                names = ", ".join(selection.guarded)
                told.append(f"min_channels={options.min_channels} kept channels that others outrank: of {names}")
            return _finish(replace(dense, graph=graph), pruned, selection, options, method, told)
        channels_left, reason = blame
        before, (graph, note) = graph, graph.without(selection.keep, channels_left, reason)
        if graph.groups == before.groups:
            raise VerificationError(f"The rewriting cannot follow the plan: {reason}. The model is unchanged.")
        told.append(note)
    raise VerificationError(f"No plan could be rewritten in {_ROUNDS} rounds; the last reason: {blame[1]}.")


def _without_idle_reads(dense: Dense, graph: ChannelGraph) -> ChannelGraph:
    """The graph without cuts of what a layer reads that the graph lacks, as nothing comes of it."""
    for node in dense.module.graph.nodes:
        if IDLE in node.meta:
            reason = Reason(_IDLE, str(node.meta.get("source", "")))
            graph = graph.with_locked(channels_of(graph.nodes.get(node.name)), reason)
    return graph


def _without_obstacles(
    dense: Dense, graph: ChannelGraph, keep: Keep, nodes: Sequence[fx.Node], widely: bool
) -> tuple[ChannelGraph, str]:
    """The graph without the cuts that these nodes of the rewritten module show, and what is told of it."""
    recorded, lines = {n.name: n for n in dense.module.graph.nodes}, set[str]()
    for node in nodes:
        line = str(node.meta.get("source", node.name))
        lines.add(line)
        graph = graph.with_locked(_cut_around(graph, keep, recorded[node.name], widely), Reason(_NO_NUMBER, line))
    return graph, f"locked: {_NO_NUMBER}, at {some(sorted(lines))}"


def _cut_around(graph: ChannelGraph, keep: Keep, node: fx.Node, widely: bool) -> list[int]:
    """What is cut of the tensor that a node gives, of those that it reads and those whose sizes it is told."""
    found, waiting, seen = list[int](), [node], {node}
    while waiting:
        here = waiting.pop()
        found += [c for c in channels_of(graph.nodes.get(here.name)) if not keep[c]]
        if not widely and here is not node and here.target == "size" and len(here.args) == 2:
            found += [c for c in _along(graph, *here.args) if not keep[c]]
        elif here is node or not isinstance(graph.nodes.get(here.name), TensorLabels):
            waiting += [n for n in here.all_input_nodes if n not in seen]
            seen.update(here.all_input_nodes)
    return found


def _along(graph: ChannelGraph, node: Any, dim: Any) -> list[int]:
    """The channels along one dimension of the tensor that a node gives."""
    known = graph.nodes.get(node.name)
    if not isinstance(known, TensorLabels):
        return channels_of(known)
    return [int(c) for f in known.labels if f.dim == dim % len(known.shape) for c in np.unique(f.ids)]


def _loosened(dense: Dense, graph: ChannelGraph, scores: Sequence[Scores | None], options: Cut) -> ChannelGraph:
    """The same graph, if possible with fewer slots that must stay: not every group that was suspected was to blame."""
    kinds: dict[Any, list[int]] = defaultdict(list)
    for index, group in enumerate(graph.groups):
        if group.least and group.locked is None:
            kinds[graph.structure(group)].append(index)
    for indices in kinds.values():
        for least in range(0, graph.groups[indices[0]].least, 2):
            trial = graph.with_least(dict.fromkeys(indices, least))
            with dense.stages("selecting"):
                selection, _ = choose(trial, scores, options)
            with dense.stages("rewriting"):
                if _rewrite(dense, trial, selection.keep)[0] is not None:
                    graph = trial
                    break
    return graph


@torch.inference_mode(False)
def rewrite_as(dense: Dense, keep: Keep, options: Cut, method: str) -> fx.GraphModule | Reason:
    """The verified module with these channels, or why it cannot be made."""
    graph = dense.graph  # channels that were locked because no rewriting followed are among those that stay whole
    whole = [int(channel) for group in graph.groups if keep[group.channels].all() for channel in group.channels.flat]
    with dense.stages("rewriting"):
        found, blame = _rewrite(dense, graph.with_locked(whole, Reason("the plan leaves them")), keep)
        if found is None:
            return blame[1]
        _check_agreed(dense, dense.graph, keep)
        pruned = found.finished()
    result = _finish(dense, pruned, Selection(keep, {}), options, method, list(dense.graph.notes))
    result.meta["fxprune"] = replace(result.meta["fxprune"], budget=None)  # the plan is given
    return result


def _check_agreed(dense: Dense, graph: ChannelGraph, keep: Keep) -> None:
    """Before shares are cut: every process has the same plan.

    Raises:
        InputError: two have not.
    """
    if is_sharded(dense.module):
        check_same(
            {
                f"what the plan keeps of {name}": ", ".join(
                    f"{len(rows)} in dim {dim} (checksum {crc32(repr(rows).encode())})" for dim, rows in dims.items()
                )
                for name, dims in PruningPlan.of(graph, keep).kept.items()
            }
        )


def choose(graph: ChannelGraph, scores: Sequence[Scores | None], options: Cut) -> tuple[Selection, BudgetError | None]:
    """The selection; for a budget that cannot be reached the smallest one, which the error says can be reached."""
    budget = options.budget
    waste = _WASTE_OF_LATENCY if budget.kind == "latency" else _WASTE

    def at(step: int) -> tuple[Selection, BudgetError | None]:
        try:
            selection = select(
                graph, scores, budget, scope=options.scope, exact=options.exact, round_to=step,
                min_channels=options.min_channels, max_ratio=options.max_ratio, threshold=options.threshold,
                gone=options.gone, settled=options.settled,
            )  # fmt: skip
        except BudgetError as error:
            return Selection(error.floor, {}, round_to=step), error
        return replace(selection, round_to=step), None

    *coarser, finest = options.round_to
    last = at(finest)
    least = _lost(graph, scores, last[0].keep)
    for step in coarser if options.threshold is None else ():
        selection, unreachable = at(step)
        good = unreachable is None and _used(graph, budget, selection.keep) >= 1 - waste
        if good and _lost(graph, scores, selection.keep) <= least + _LOSS * abs(least):
            return selection, None
    return last


def _lost(graph: ChannelGraph, scores: Sequence[Scores | None], keep: Keep) -> float:
    """The sum of the scores of what goes."""
    pairs = zip(graph.groups, scores, strict=True)
    return sum(float(score[~keep[group.channels]].sum()) for group, score in pairs if score is not None)


def _used(graph: ChannelGraph, budget: Budget, keep: Keep) -> float:
    """How much of the budget a choice uses up, as a share of it."""
    return remaining(graph, budget, keep) / budget.ratio


def _rewrite(dense: Dense, graph: ChannelGraph, keep: Keep) -> tuple[Draft | None, tuple[Sequence[int], Reason]]:
    """The rewritten and checked module without its weights, or None and the channels that must stay, with the reason.

    Another batch size is tried where the graph computes with numbers or an argument was repaired. A graph of which
    neither is true says word for word what the dense one says.
    """
    module, with_numbers = dense.module, _computes_with_numbers(graph)
    try:
        found = draft(module, graph, keep, dense.other_run.numbers if with_numbers else {})
    except UnrepairableError as error:
        return None, (
            _culprits(module, graph, error.node.name, error.channels),
            Reason(error.text, str(error.node.meta.get("source", ""))),
        )
    pruned = found.module
    mismatch = check_rewrite(pruned, graph, keep, dense.args, dense.kwargs)
    if mismatch is not None:
        text = f"the rewritten graph does not follow ({mismatch.text})"
        return None, (_culprits(module, graph, mismatch.node, mismatch.channels), Reason(text, mismatch.source))
    other = with_numbers or any(REPAIRED in n.meta for n in pruned.graph.nodes)
    if other and dense.other_run.failed is None:
        pruned_run = dense.runs.other_batch(pruned)
        if pruned_run.failed is not None or pruned_run.shapes != dense.other_run.shapes:
            node = pruned_run.failed or next(n for n in pruned.graph.nodes if n.op == "output")
            reason = Reason("the rewritten graph fails with another batch size", str(node.meta.get("source", "")))
            return None, (_culprits(module, graph, node.name, ()), reason)
    return found, ((), Reason(""))


def _computes_with_numbers(graph: ChannelGraph) -> bool:
    """Whether a node's value is more than tensors and flags: a size, say."""
    leaves = (leaf for value in graph.nodes.values() for leaf in tree_leaves(value))
    return not all(isinstance(leaf, (TensorLabels, bool, type(None))) for leaf in leaves)


def _culprits(module: fx.GraphModule, graph: ChannelGraph, name: str, channels: Sequence[int]) -> list[int]:
    """The channels to lock: those given, or those of the nearest nodes before ``name`` that may be cut."""
    free = [c for c in channels if not graph.locked[c]]
    nodes = {n.name: n for n in module.graph.nodes}
    level = [nodes[name]] if name in nodes else []
    seen = set(level)
    while level and not free:
        free = [c for n in level for c in channels_of(graph.nodes.get(n.name)) if not graph.locked[c]]
        level = [n for node in level for n in node.all_input_nodes if n not in seen]
        seen.update(level)
    return free


def _finish(
    dense: Dense, pruned: fx.GraphModule, selection: Selection, options: Cut, method: str, notes: list[str]
) -> fx.GraphModule:
    graph, keep, whole = dense.graph, selection.keep, dense.whole.graph
    removed, called = [branch.name for branch in dense.removed], leaf_functions_of(dense.module.graph)
    plan = PruningPlan.of(graph, keep, whole, removed, dense.joins, dense.earlier, called)
    agreement = None
    if dense.removed:
        cuts: Cuts = pruned.meta[CUTS_KEY]
        pruned.meta[CUTS_KEY] = cuts.with_removed(whole)
    if options.verify and not options.consume and not dense.on_meta:
        with dense.stages("verifying"), collected():
            inputs = _oracle_inputs(dense)
            try:
                agreement = _compared(dense, pruned, graph, plan, keep, inputs, notes)
                if agreement.constant:
                    notes.append(_too_little_left(graph, keep))
                if dense.with_all is not None:
                    agreement = _with_branches(dense, agreement, inputs)
            except GuardError as error:
                raise ModelError(
                    f"{error.source}: forward branches on a value here, or reads it, which these channels change, so "
                    "that the graph does not hold without them. Lock the layers that it comes from (ignore=), or prune "
                    "a part of the model that ends before: fxprune.prune_submodule."
                ) from error
    if dense.earlier is not None:
        times = len(plan.steps) - 1
        notes.append(f"the network had been pruned before ({times}x): the figures are against what it was then")
    macs, params = options.before or (whole.macs(), whole.params())
    pruned.meta[RECORD_KEY] = describe_inputs(dense.args, dense.kwargs)
    pruned.meta["fxprune"] = Report(
        model=dense.name,
        method=method,
        macs_before=macs,
        macs_after=graph.macs(keep),
        params_before=params,
        params_after=graph.params(keep),
        prunable_share=whole.prunable_share,
        held=whole.held,
        plan=plan,
        rows=with_removed(rows(graph, keep, selection.locked), whole),
        groups=groups_with_removed(group_rows(graph, keep, selection.locked), whole),
        oracle_error=None if agreement is None else agreement.error,
        oracle_error_in_double=None if agreement is None else agreement.in_double,
        oracle_compared="numbers" if agreement is None else agreement.compared,
        seconds=dict(dense.stages.seconds),
        notes=tuple(notes),
        round_to=selection.round_to,
        budget=(options.budget.kind, options.budget.ratio) if options.threshold is None else None,
        proof=dense.proof and replace(dense.proof, farthest=None),
        zeros=sum(_zeros(whole_of(p.detach())) for p in pruned.parameters() if p.ndim > 1 and not p.is_meta),
    )
    return pruned


def _with_branches(dense: Dense, agreement: Agreement, inputs: Inputs) -> Agreement:
    """Beside the channels what branches that went are: the dense graph with zeros for them computes the same.

    So it does where layers choose what they read, as long as that is everything.

    Raises:
        VerificationError: it does not.
    """
    error = compared_with_zeroed(dense.whole.module, dense.module, dense.removed, inputs)
    if error > TOLERANCE:
        raise VerificationError(
            "The graph without residual branches, or with choices, differs from the dense one with zeros for them: "
            f"relative error {error:.1e}. This is a fault of fxprune; please report it with the model."
        )
    return replace(agreement, error=max(agreement.error, error))


def _compared(
    dense: Dense, pruned: fx.GraphModule, graph: ChannelGraph, plan: PruningPlan, keep: Keep, inputs: Inputs,
    notes: list[str],
) -> Agreement:  # fmt: skip
    """The mask oracle; on the example inputs where the labels of others are not known, which is noted."""
    try:
        return mask_oracle(dense.module, pruned, graph, plan, keep, inputs)
    except ReplayError as error:
        notes.append(f"masked and pruned model were compared on the example inputs only: {error}")
        return mask_oracle(dense.module, pruned, graph, plan, keep, (dense.args, dense.kwargs))


def _too_little_left(graph: ChannelGraph, keep: Keep) -> str:
    """What is told of a network that answers the same whatever goes in."""
    single = [group.name for group in graph.groups if group.channels.size > 1 == int(keep[group.channels].sum())]
    of = f" (one channel is left of {some(single)})" if single else ""
    told = f"the pruned network answers the same whatever goes in{of}"
    return f"{told}: give it a larger budget, or Options(min_channels=...)"


def _zeros(weight: torch.Tensor) -> int:
    """How many entries are zero; where none is, that is seen in a third of the time of a count."""
    parts = [part for part in weight.reshape(-1).split(_ENTRIES_IN_CACHE) if len(part) and not part.abs().amin()]
    return sum(len(part) - int(torch.count_nonzero(part)) for part in parts)


def _oracle_inputs(dense: Dense) -> Inputs:
    """Inputs that are not the example's, of other sizes where the model takes them and the recording follows."""
    if is_sharded(dense.module):
        return dense.args, dense.kwargs
    assert dense.proof is not None, "what is verified was probed"
    device = device_of(dense.module)
    found = map_tensors(lambda tensor: tensor.to(device), dense.proof.farthest)
    return found[0], found[1]
