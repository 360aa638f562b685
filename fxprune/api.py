"""What users call: ``prune``, ``attach``, ``apply``, ``analyze`` and ``record``."""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import fx, nn

from fxprune.deploy import alignment, check_provider, provider_at_hand
from fxprune.deploy.latency import Clock
from fxprune.errors import ExampleInputsError, InputError, ModelError, PlanError, check_choice, check_flags
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.io.files import check_writable
from fxprune.labels.classes import Reason
from fxprune.methods import Criterion, Learner, Method, ModelState, Outcome, name_of, needs_of, resolve, score_groups
from fxprune.methods.state import Measured, Scores
from fxprune.options import Attention, Keywords, LatencyBudget, Loop, Options, RoundTo, Scope, asked, suggestion
from fxprune.pipeline import (
    COARSEST,
    Cut,
    Dense,
    Stages,
    choose,
    collected,
    compress,
    record_and_analyse,
    recorded,
    rewrite_as,
    uncollected,
)
from fxprune.reconstruction import measure_reads, pieces_of
from fxprune.reconstruction.front import refitted
from fxprune.recording import Twin, evaluated
from fxprune.recording.checks import check_model, checked_inputs
from fxprune.recording.inputs import RECORD_KEY, describe_inputs, device_of, map_leaves
from fxprune.rewriting.carry_over import carry_over, held_names
from fxprune.selection.budget import Budget
from fxprune.selection.plan import PruningPlan
from fxprune.training import (
    Loss,
    Training,
    fit,
    measure,
    plain_state,
    reset_parameters,
    seeded,
    site_of,
)
from fxprune.training.distributed import from_first, is_first
from fxprune.verification import Inputs, zero_slices

_SMALL = 4096  # entries of a tensor


def record(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """Run ``model`` once in eval mode and write down what it did, as a ``GraphModule`` with the same state_dict.

    Args:
        model: any module; it is left exactly as it was.
        example_inputs: a tensor, or a tuple of positional inputs.
        example_kwargs: keyword inputs.

    Raises:
        ExampleInputsError: the model does not accept the inputs.
        RecordError: what it did cannot be written down.

    Examples:
        >>> graph = fxprune.record(model, x)
        >>> [node.target for node in graph.graph.nodes if node.op == "call_module"][:3]
        ['0', '1', '2']
        >>> bool(torch.equal(graph.eval()(x), model.eval()(x)))
        True
    """
    check_model(model)
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    result, _ = recorded(model, args, kwargs)
    result.meta[RECORD_KEY] = describe_inputs(args, kwargs)
    return result


def analyze(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    ignore: Sequence[str | nn.Module] = (),
    attention: Attention = "head_dim",
) -> ChannelGraph:
    """The channels of ``model``: which live or die together, what is frozen and why.

    Args:
        model: any module; it is left exactly as it was.
        example_inputs: a tensor or a tuple; inferred as by ``prune``.
        example_kwargs: keyword inputs.
        ignore: module names or modules whose output channels stay.
        attention: see ``prune``.

    Raises:
        ExampleInputsError: inputs are missing or do not fit.
        InputError: an argument that cannot be used.
        RecordError: what the model did cannot be written down.

    Examples:
        >>> graph = fxprune.analyze(model, x)
        >>> [(group.name, group.size) for group in graph.prunable]
        [('0', 16), ('3', 32)]
    """
    check_model(model)
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    names = _ignored(model, ignore)
    check_choice("attention", attention, get_args(Attention))
    return record_and_analyse(model, args, kwargs, attention, names, Stages(progress=False)).graph


@dataclass(frozen=True)
class _Request:
    """What ``prune`` and ``attach`` are asked for, as the pipeline needs it."""

    method: Method
    name: str
    cut: Cut
    attention: Attention
    ignore: tuple[str, ...]
    latency: LatencyBudget | None


def prune(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    method: str | Method = "l2",
    flops: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    latency: float | LatencyBudget | None = None,
    data: Any = None,
    loss_fn: Loss | None = None,
    epochs: int | None = None,
    ignore: Sequence[str | nn.Module] = (),
    exact: bool = False,
    attention: Attention = "head_dim",
    scope: Scope = "global",
    round_to: RoundTo = "auto",
    verify: bool = True,
    reconstruct: bool = False,
    seed: int = 0,
    progress: bool = True,
    options: Options | None = None,
    **old: Any,
) -> Any:
    """A smaller ``GraphModule`` that computes what ``model`` computes with the same channels masked.

    Args:
        model: any module; never changed, unless ``options`` say ``consume``.
        example_inputs: a tensor or a tuple; inferred for timm models, torchvision classifiers and segmenters.
        example_kwargs: keyword inputs.
        method: a registered name (``fxprune.methods.available()``) or a method object.
        flops: budget in (0, 1]: MACs as a ratio of the dense model's.
        macs: the same.
        params: the same for parameters. Exactly one budget is given.
        channels: the same for prunable channels.
        latency: the same for the time of a run on onnxruntime; a ``LatencyBudget`` says where and how it is measured.
            Kernels are timed at several channel counts (kept on disk, see the guide) to predict it, and the pruned
            model is measured beside the dense one until it is right.
        data: batches ``(inputs, target)``, for methods that train or measure.
        loss_fn: ``loss_fn(output, target)``; cross entropy for classifiers if not given.
        epochs: how long a method that trains does.
        ignore: module names or modules whose output channels stay.
        exact: cut only channels whose removal changes no statistic (of a layer norm, for instance).
        attention: cut channels inside every head (``"head_dim"``) or whole heads (``"heads"``).
        scope: rank all channels together (``"global"``), cut every group by the same share (``"uniform"``), or rank
            together only groups of the same structure, each structure cut by the same share (``"isomorphic"``).
        round_to: kept channels of a group are a multiple of this. ``"auto"``: of the largest power of two up to 16
            that costs no more than 1 % of the budget. What it costs is what the plan leaves of the budget: with 16,
            then 8, 4 and 2 channels at a time the scores are turned into a plan, and the first plan that takes at least
            99 % of the budget is the one; if none does, channels go one by one. That depends on the model, the scores
            and the budget alone, so it is the same on every machine. ``"measured"``, and ``"auto"`` with ``latency``:
            up to the power of two that the execution provider likes, which is timed once per device and kept.
        verify: run the mask oracle on the result (never on ``device="meta"``, where nothing can be computed).
        reconstruct: refit the weights to the dense model's activations on ``data``, of which no targets are read; see
            ``fxprune.reconstruct``, which has more options.
        seed: of random choices. Same seed, same versions: the same plan.
        progress: tell the stages on stderr.
        options: what is rarely needed, see ``Options``: steps, limits of what may go, the training loop, memory.
        **old: names of earlier releases, which say in a ``DeprecationWarning`` what takes their place.

    Returns:
        The pruned ``GraphModule``; ``meta["fxprune"]`` is its ``Report``.

    Raises:
        InputError: an argument or data that cannot be used.
        ExampleInputsError: inputs are missing or do not fit.
        ModelError: NaN or inf in the weights or the loss, or nothing to prune.
        BudgetError: the budget cannot be reached.
        VerificationError: the result is not what it should be (a fault of fxprune).

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> report = small.meta["fxprune"]
        >>> 0.49 < report.macs_after / report.macs_before <= 0.5
        True
        >>> small(torch.randn(7, 3, 16, 16)).shape
        torch.Size([7, 10])
    """
    keywords, options, rest = asked("prune", locals())
    optimizer = rest.get("optimizer")
    if "submodule" in rest:
        whole = prune_submodule(
            model, rest["submodule"], example_inputs, example_kwargs=example_kwargs, options=options, **vars(keywords)
        )
        return _carried(whole, model, optimizer)
    request = _request(model, keywords, options)
    learns = isinstance(request.method, Learner)
    if options.consume:
        _check_consumable(request, optimizer)
    if optimizer is not None:
        if learns:
            raise InputError(f"{request.name} trains other weights than the optimizer's state is for: leave it out.")
        held_names(optimizer, model)
    calibration = keywords.data
    if keywords.reconstruct:
        calibration = _check_reconstructible(request, keywords, options)
        keywords = replace(keywords, data=calibration if needs_of(request.method) else None)  # type: ignore[arg-type]
    _check_data(request, keywords, options)
    _check_finite(model)
    stages = Stages(keywords.progress)
    if learns:
        training = _attached(model, example_inputs, example_kwargs, request, stages)
        if data is None:
            learner: Any = request.method
            data, loss_fn = training.label_free(learner.steps, learner.batch, keywords.seed)
        with stages("learning"), seeded(keywords.seed):
            fit(training, data, loss_fn, keywords.epochs or 1, options.loop or Loop(), progress=keywords.progress)
        return training.finish()
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    dense, pruned = _pruned(model, args, kwargs, request, keywords, options.steps, stages)
    if keywords.reconstruct:
        with stages("reconstructing"):
            pruned = refitted(pruned, model, calibration, dense.module, seed=keywords.seed)
    return _carried(pruned, model, optimizer)


def prune_submodule(
    model: nn.Module,
    submodule: str,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    ignore: Sequence[str | nn.Module] = (),
    data: Any = None,
    reconstruct: bool = False,
    options: Options | None = None,
    **keywords: Any,
) -> nn.Module:
    """A copy of ``model`` in which one part is pruned, with the inputs it gets when the model runs on the example.

    Args:
        model: any module; never changed. It is run once; what of it is outside the part need not be recordable.
        submodule: a name of ``model.named_modules()``. Its outputs keep their shapes.
        example_inputs: of the whole model, as for ``prune``.
        example_kwargs: keyword inputs.
        ignore: names or modules of the whole model.
        data: inputs of the whole model, for ``reconstruct`` alone.
        reconstruct: as for ``prune``.
        options: as for ``prune``.
        **keywords: those of ``prune``, about the part: a budget is a ratio of the part's own MACs.

    Returns:
        The copy; its part is a pruned ``GraphModule``, whose ``meta["fxprune"]`` is the ``Report``.

    Raises:
        InputError: there is no such part, it is not called, or an argument cannot be used.
        ExampleInputsError: the model does not run on the inputs.
        FxpruneError: as ``prune``.

    Examples:
        >>> detector = torch.nn.Sequential(model, torch.nn.Softmax(1))
        >>> smaller = fxprune.prune_submodule(detector, "0", x, flops=0.5, progress=False)
        >>> report = smaller[0].meta["fxprune"]
        >>> report.macs_after <= 0.5 * report.macs_before
        True
    """
    check_model(model)
    if not isinstance(submodule, str):
        raise InputError(f"submodule={submodule!r} is no name: pass one of model.named_modules().")
    check_flags(reconstruct=reconstruct)
    if data is not None and not reconstruct:
        raise InputError("A part is pruned without data: choose a method that needs none.")
    if isinstance(options, Options) and options.consume:
        raise InputError("consume=True empties the model, and a copy of all of it is returned here: leave it out.")
    ignored = _ignored(model, ignore)
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    part, inputs = part_of(model, submodule, args, kwargs)
    keywords |= {"ignore": _ignored_below(submodule, ignored), "options": options}
    small = prune(part, inputs[0], example_kwargs=inputs[1], **keywords)
    pruned = _with_part(model, submodule, small, args, kwargs)
    return refitted(pruned, model, data, seed=small.meta["fxprune"].plan.seed) if reconstruct else pruned


@uncollected()
def _pruned(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    request: _Request,
    keywords: Keywords,
    steps: int,
    stages: Stages,
) -> tuple[Dense, fx.GraphModule]:
    """The whole pipeline with a criterion: what was recorded, and what came out."""
    verify = request.cut.verify
    dense = record_and_analyse(model, args, kwargs, request.attention, request.ignore, stages, verify=verify)
    measures = request.latency is not None or keywords.data is not None or steps > 1
    with collected() if measures else nullcontext():
        cut, finish = _timed(dense, request)
        scores = _scores(dense, replace(request, cut=cut), keywords, steps)
        return dense, finish(dense, scores, cut, request.name)


def attach(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    method: str | Method,
    flops: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    latency: float | LatencyBudget | None = None,
    ignore: Sequence[str | nn.Module] = (),
    exact: bool = False,
    attention: Attention = "head_dim",
    scope: Scope = "global",
    round_to: RoundTo = "auto",
    verify: bool = True,
    seed: int = 0,
    progress: bool = True,
    options: Options | None = None,
    **old: Any,
) -> Training:
    """Prepare ``model`` for a method that trains, in a training loop of your own.

    Train ``.model``, which is a copy; pass the loss through ``.loss``, call ``.after_backward()`` before and
    ``.after_step(optimizer)`` after the optimizer's step, stop when ``.done``, and at last ``.finish()``, which returns
    what ``prune`` returns. The arguments are those of ``prune``. ``model`` itself stays as it is, whatever happens.

    Raises:
        InputError: an argument that cannot be used, or a method that does not train.
        ExampleInputsError: inputs are missing or do not fit.
        ModelError: NaN or inf in the weights, weights on the meta device, or nothing to prune.

    Examples:
        >>> learner = fxprune.attach(model, x, method="slimming", flops=0.5, progress=False)
        >>> optimizer = learner.optimizer()
        >>> for images, labels in loader:
        ...     optimizer.zero_grad()
        ...     learner.loss(nn.functional.cross_entropy(learner.model(images), labels)).backward()
        ...     learner.after_backward()
        ...     optimizer.step()
        ...     learner.after_step(optimizer)
        >>> small = learner.finish()
        >>> small.meta["fxprune"].method
        'slimming'
    """
    keywords, options, rest = asked("attach", locals())
    request = _request(model, keywords, options)
    if not isinstance(request.method, Learner):
        raise InputError(f"{request.name} does not train: call fxprune.prune(..., method={request.name!r}).")
    if rest or options.loop is not None:
        raise InputError(f"{next(iter(rest), 'loop')}= has no meaning here, where the loop is yours.")
    if options.consume:
        _check_consumable(request, None)
    _check_steps(request, options)
    _check_finite(model)
    return _attached(model, example_inputs, example_kwargs, request, Stages(keywords.progress))


def _attached(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    request: _Request,
    stages: Stages,
) -> Training:
    learner, cut = request.method, request.cut
    assert isinstance(learner, Learner)
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    wider = learner.wider() if hasattr(learner, "wider") else None
    if wider is not None:
        if cut.budget.kind == "latency":
            raise InputError(f"{request.name} starts from a wider network here, for which there is no latency= budget.")
        given = record_and_analyse(model, args, kwargs, request.attention, request.ignore, stages).graph
        whole = given.macs() if cut.budget.kind == "flops" else given.params()
        cut = replace(cut, budget=replace(cut.budget, whole=whole))
        model = wider
    dense = record_and_analyse(model, args, kwargs, request.attention, request.ignore, stages, verify=cut.verify)
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

    def finish(outcome: Outcome) -> fx.GraphModule:
        outcome = from_first(outcome)
        trained = dense.trained(plain_state(live))
        chosen = replace(cut, threshold=outcome.threshold)
        pruned = compressed(trained, list(outcome.scores), chosen, request.name, list(outcome.notes))
        if outcome.reinitialise:
            drawn = reset_parameters(pruned, cut.seed)
            note = "weights initialised anew" + (f"; drawn like their values: {', '.join(drawn)}" if drawn else "")
            report = pruned.meta["fxprune"]
            pruned.meta["fxprune"] = replace(report, notes=(*report.notes, note))
        return pruned

    def reference() -> fx.GraphModule:
        return copy.deepcopy(dense.module).train()

    record = describe_inputs(args, kwargs)
    return Training(live, learner.attach(site), dense.graph, record, reference, finish, type(learner).__name__)


def _check_consumable(request: _Request, optimizer: Any) -> None:
    """Whether the dense weights are read no more once they are cut."""
    reader = (
        f"{request.name} trains a copy" if isinstance(request.method, Learner)
        else "latency= measures the dense model" if request.latency is not None
        else "optimizer= compares its state with the dense parameters" if optimizer is not None
        else ""
    )  # fmt: skip
    if reader:
        raise InputError(f"consume=True empties the model, and {reader}: leave one of them out.")


def _check_reconstructible(request: _Request, keywords: Keywords, options: Options) -> Any:
    """The data, to be read more than once."""
    if options.consume:
        raise InputError("reconstruct=True compares with the dense weights, which consume=True empties: leave one out.")
    if isinstance(request.method, Learner):
        raise InputError(
            f"{request.name} trains the weights; reconstruct=True is for criteria. To refit what a training gave, call "
            "fxprune.reconstruct with the trained model."
        )
    data = keywords.data
    if data is None:
        raise InputError("reconstruct=True needs data=: a tensor of inputs, a list of them, or a loader.")
    return list(data) if isinstance(data, Iterator) else data


def _timed(dense: Dense, request: _Request) -> tuple[Cut, Callable[..., fx.GraphModule]]:
    """The cut, and what makes the smaller module; for a budget of latency they share a clock."""
    if request.latency is None:
        return request.cut, compress
    clock = Clock(dense, request.latency, request.cut.round_to[0])
    return clock.within(request.cut), clock.compress


def apply(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> fx.GraphModule:
    """Apply a plan to a fresh instance of the model it was made for.

    Args:
        model: an unpruned instance, with any weights; not changed.
        plan: ``report.plan``, or ``PruningPlan.load`` of a file.
        example_inputs: a tensor or a tuple; inferred as by ``prune``.
        example_kwargs: keyword inputs.

    Returns:
        What ``prune`` returns.

    Raises:
        PlanError: the plan belongs to another model, or is inconsistent.
        ExampleInputsError: inputs are missing or do not fit.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> again = fxprune.apply(model, small.meta["fxprune"].plan, x)
        >>> bool(torch.equal(again.eval()(x), small.eval()(x)))
        True
    """
    check_model(model)
    if not isinstance(plan, PruningPlan):
        raise PlanError(f"plan is {plan!r}; pass a PruningPlan: report.plan, or PruningPlan.load of a file.")
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    plan.check()
    return applied(model, plan, args, kwargs)


def applied(
    model: nn.Module, plan: PruningPlan, args: Any, kwargs: Any, method: str = "plan", verify: bool = True
) -> fx.GraphModule:
    """``apply`` with inputs that were resolved. ``verify``: run the mask oracle. ``method``: for the report.

    Raises:
        PlanError: see ``apply``.
    """
    attention: Any = plan.attention
    dense = record_and_analyse(model, args, kwargs, attention, (), Stages(progress=False), verify=True)
    keep = plan.channels(dense.graph)
    pruned = rewrite_as(dense, keep, Cut(Budget("flops", 1.0), verify=verify), method)
    if isinstance(pruned, Reason):
        raise PlanError(f"The plan cannot be applied: {pruned}.")
    return pruned


def _request(model: nn.Module, keywords: Keywords, options: Options) -> _Request:
    method = resolve(keywords.method)
    budget, latency = _budget(method, keywords), keywords.latency
    provider = None if latency is None else latency.provider
    check_model(model)
    ignored = _ignored(model, keywords.ignore)
    if latency is not None or keywords.round_to == "measured":
        check_provider(provider)
    cut = Cut(
        budget, scope=keywords.scope, exact=keywords.exact, round_to=_multiples(method, keywords, provider),
        min_channels=options.min_channels, max_ratio=options.limits, verify=keywords.verify,
        consume=options.consume, seed=keywords.seed,
    )  # fmt: skip
    return _Request(method, name_of(keywords.method), cut, keywords.attention, ignored, latency)


def _multiples(method: Method, keywords: Keywords, provider: str | None) -> tuple[int, ...]:
    """Of how many channels to try, coarse to fine; measured ones in several processes are those of the first."""
    round_to = keywords.round_to
    if isinstance(round_to, int):
        return (round_to,)
    if round_to == "auto" and getattr(method, "decides", False):
        return (1,)
    if round_to == "auto" and keywords.latency is None:
        coarsest = COARSEST
    else:
        coarsest = from_first(alignment(provider or provider_at_hand()))
    return tuple(2**power for power in reversed(range(coarsest.bit_length())))


def _budget(method: Method, keywords: Keywords) -> Budget:
    """The one that was given; of a method that says itself how much goes, none."""
    if not getattr(method, "decides", False):
        return Budget.of(**keywords.budgets)
    given = [f"{kind}={ratio}" for kind, ratio in keywords.budgets.items() if ratio is not None]
    if given:
        raise InputError(f"{name_of(method)} says itself how much goes: leave out {' and '.join(given)}.")
    return Budget("channels", 1.0)


def _check_steps(request: _Request, options: Options) -> None:
    if options.steps != 1 and isinstance(request.method, Learner):
        raise InputError(f"{request.name} trains once; steps= is for criteria.")


def _check_data(request: _Request, keywords: Keywords, options: Options) -> None:
    """Whether the method makes use of what is given, and is given what it needs."""
    method, name, data, loop = request.method, request.name, keywords.data, options.loop
    if data is None and keywords.loss_fn is not None:
        raise InputError("loss_fn= compares outputs with targets: pass data=, a loader of (inputs, target), as well.")
    _check_steps(request, options)
    if isinstance(method, Learner):
        if data is None and not getattr(method, "label_free", False):
            raise InputError(f"{name} trains: pass data=, a loader of (inputs, target), and epochs=.")
        if data is not None and keywords.epochs is None:
            raise InputError(f"{name} trains: pass epochs=.")
        if loop is not None and loop.checkpoint is not None and is_first():
            check_writable(loop.checkpoint)
        if loop is not None and loop.resume is not None and not os.path.exists(loop.resume):
            raise InputError(f"The checkpoint {os.fspath(loop.resume)} cannot be read: No such file or directory.")
        return
    given = [n for n, v in (("epochs", keywords.epochs), ("loop", loop)) if v is not None]
    if given:
        raise InputError(f"{name} does not train, so {given[0]}= has no meaning. Fine-tune what prune returns.")
    needs = sorted(needs_of(method))
    if needs and data is None:
        raise InputError(f"{name} measures {' and '.join(needs)}: pass data=, a loader of (inputs, target).")
    if data is not None and not needs:
        raise InputError(f"{name} reads only weights: leave out data=, or choose a method that measures.")


def _scores(dense: Dense, request: _Request, keywords: Keywords, steps: int) -> list[Scores | None]:
    """Scores of a criterion; in several steps each time for what the step before has left."""
    graph, criterion, cut = dense.graph, request.method, request.cut
    assert isinstance(criterion, Criterion)
    needs = needs_of(criterion)
    module, kept = dense.module, None
    for step in range(1, steps + 1):
        with dense.stages("scoring"):
            measured = Measured()
            if needs - {"reads"}:
                measured = measure(copy.deepcopy(module), graph, needs, keywords.data, keywords.loss_fn)
            if "reads" in needs:
                pieces = pieces_of(keywords.data, describe_inputs(dense.args, dense.kwargs), None, device_of(module))
                measured = replace(measured, reads=measure_reads(copy.deepcopy(module), graph, pieces, cut.seed))
            tensors = dict([*module.named_parameters(), *module.named_buffers()])
            state = ModelState(graph, tensors, cut.seed, measured, kept)
            scores: list[Scores | None] = from_first(score_groups(criterion, state))
        if step == steps:
            break
        with dense.stages("selecting"):
            ratio = 1 - (1 - cut.budget.ratio) * step / steps
            selection, _ = choose(graph, scores, replace(cut, budget=replace(cut.budget, ratio=ratio)))
        kept = selection.keep if kept is None else selection.keep & kept
        module = copy.deepcopy(dense.module)
        zero_slices(module, PruningPlan.of(graph, kept))
    return scores


def part_of(model: nn.Module, name: str, args: Any, kwargs: Any) -> tuple[nn.Module, Inputs]:
    """A submodule and the inputs of its first call when a copy of the model runs on the example inputs.

    Raises:
        InputError: there is no such submodule, or it is not called.
        ExampleInputsError: the model does not run on the inputs.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in known:
        raise InputError(f"submodule={name!r} is not part of the model.{suggestion(name, known)}")
    calls: list[Inputs] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((given, named))

    twin = Twin(model)
    twin.model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
    try:
        twin(args, kwargs)
    except Exception as error:
        raise ExampleInputsError(f"The model does not run on the example inputs: {error}.") from error
    if not calls:
        raise InputError(f"submodule={name!r} is not called when the model runs on the example inputs.")
    return known[name], map_leaves(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, calls[0])


def _with_part(model: nn.Module, name: str, part: fx.GraphModule, args: Any, kwargs: Any) -> nn.Module:
    """A copy of the model with ``part`` in place of a submodule; it must run on the example inputs."""
    result = copy.deepcopy(model)
    path, _, last = name.rpartition(".")
    setattr(result.get_submodule(path), last, part)
    with evaluated(result), torch.no_grad():
        result(*args, **kwargs)
    return result


def _carried(result: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> nn.Module:
    """The result; where an optimizer was given, with one of its own in its report."""
    if optimizer is not None:
        report = next(m.meta for m in result.modules() if isinstance(m, fx.GraphModule) and "fxprune" in m.meta)
        report["fxprune"] = replace(report["fxprune"], optimizer=carry_over(optimizer, model, result))
    return result


def _ignored_below(prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.removeprefix(f"{prefix}.") for name in names if name.startswith(f"{prefix}."))


def _ignored(model: nn.Module, ignore: Sequence[str | nn.Module]) -> tuple[str, ...]:
    if isinstance(ignore, tuple) and not ignore:
        return ()
    modules = dict(model.named_modules(remove_duplicate=False))
    known = {*modules, *dict(model.named_parameters(remove_duplicate=False))}
    names = []
    items = [ignore] if isinstance(ignore, (str, nn.Module)) else ignore
    if not isinstance(items, (list, tuple, set, frozenset, Mapping, Iterator)):
        raise InputError(f"ignore={ignore!r} must be a module, a name, or a list of them.")
    for item in items:
        if isinstance(item, nn.Module):
            found = [name for name, module in modules.items() if module is item]
            if not found:
                raise InputError(f"ignore holds a {type(item).__name__} that is not part of the model.")
            names += found
        elif isinstance(item, str) and item in known:
            names.append(item)
        else:
            hint = suggestion(str(item), known)
            raise InputError(f"ignore names {item!r}, which the model does not have.{hint}")
    return tuple(names)


def _check_finite(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantised" if tensor.is_quantized else "sparse"
            raise ModelError(f"{name} is {kind}; fxprune prunes dense weights. Prune first, then make them {kind}.")
    known = [(name, t.detach(), isinstance(t, nn.Parameter)) for name, t in tensors if _has_values(t)]
    weights = _extremes(tensor for _, tensor, trained in known if trained)
    buffers = _extremes(tensor for _, tensor, trained in known if not trained)
    if bool(weights.isfinite().all()) and not bool(buffers.isnan().any()):
        return
    for name, tensor, trained in known:
        tensor = _comparable(tensor)
        if trained and not bool(tensor.isfinite().all()):
            raise ModelError(f"{name} holds NaN or inf. Load a sound checkpoint before pruning.")
        if not trained and bool(tensor.isnan().any()):
            raise ModelError(f"{name} holds NaN. Load a sound checkpoint before pruning.")


def _has_values(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0


def _extremes(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The smallest and the largest values; NaN is both wherever there is one. One pass, without a mask.

    Small tensors are looked at together: a network has hundreds.
    """
    large, small = [], defaultdict(list)
    for tensor in tensors:
        if tensor.numel() < _SMALL:
            small[tensor.dtype, tensor.device].append(_comparable(tensor).reshape(-1))
        else:
            large.append(_comparable(tensor))
    large += map(torch.cat, small.values())
    extremes: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for tensor in large:
        extremes[tensor.dtype, tensor.device] += torch.aminmax(tensor)
    return torch.cat(
        [torch.empty(0, device="cpu"), *(torch.stack(found).double().cpu() for found in extremes.values())]
    )


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """Torch has no order of numbers of 8 bits."""
    return tensor.float() if tensor.itemsize == 1 else tensor
