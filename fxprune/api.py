"""What users call: ``prune``, ``attach``, ``apply``, ``analyze``, ``select_inputs`` and ``record``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import fx, nn

from fxprune import running
from fxprune.errors import InputError, PlanError, check_choice, check_count, shown
from fxprune.groups.channels import ChannelGraph
from fxprune.labels.classes import Reason
from fxprune.methods import Learner, Method, name_of, needs_of, resolve
from fxprune.methods.registry import WITH_TARGET
from fxprune.options import Attention, LatencyBudget, Loop, Options, RoundTo, Scope, asked
from fxprune.pipeline import Cut, Dense, Stages, record_and_analyse, recorded, rewrite_as
from fxprune.reconstruction.data import pieces_of
from fxprune.reconstruction.front import inside, refitted
from fxprune.recording.boundary import describe
from fxprune.recording.checks import check_finite, check_model, checked_inputs, chosen_names, names_in_part
from fxprune.recording.inputs import RECORD_KEY, describe_inputs, device_of
from fxprune.recording.part import part_of as part_of  # noqa: PLC0414 - for those who look for it here
from fxprune.recording.part import with_part
from fxprune.recording.shards import check_same, check_shares, is_sharded, resharded
from fxprune.recording.together import joined
from fxprune.request import (
    check_consumable,
    check_data,
    check_reconstructible,
    check_shardable,
    check_steps,
    facts_of,
    requested,
)
from fxprune.rewriting.carry_over import carry_over, held_names
from fxprune.rewriting.selections import with_selections
from fxprune.selection.budget import Budget
from fxprune.selection.plan import PruningPlan
from fxprune.training import Loss, Training, fit, seeded


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
    model, example_inputs, example_kwargs = joined(model, example_inputs, example_kwargs)
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
    keep: Sequence[str | nn.Module] = (),
    attention: Attention = "head_dim",
) -> ChannelGraph:
    """The channels of ``model``: which live or die together, what is locked and why.

    Args:
        model: any module; it is left exactly as it was.
        example_inputs: a tensor or a tuple; inferred as by ``prune``.
        example_kwargs: keyword inputs.
        ignore: see ``prune``.
        keep: see ``prune``.
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
    check_model(model, shares=True)
    model, example_inputs, example_kwargs = joined(model, example_inputs, example_kwargs)
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    ignored, kept = chosen_names(model, "ignore", ignore), chosen_names(model, "keep", keep)
    check_choice("attention", attention, get_args(Attention))
    return record_and_analyse(model, args, kwargs, attention, ignored, Stages(progress=False), keep=kept).graph


def select_inputs(
    model: nn.Module, example_inputs: Any = None, *, example_kwargs: Mapping[str, Any] | None = None
) -> fx.GraphModule:
    """A copy of ``model`` whose blocks each select what they read of a stream, at first all of it.

    Where blocks begin with a norm (pre-activation ResNets, DenseNets), a channel of the stream is worth something else
    to each of them. ``prune`` of the result cuts the selections, with the norms behind them and the columns of the
    layers that read these, and leaves the streams whole: Network Slimming of such networks. A plan fits what this
    returns of a fresh instance (``apply``, ``load``). An ``index_select`` (ONNX: Gather) is what a selection costs.

    Args:
        model: any module; it is left exactly as it was.
        example_inputs: a tensor or a tuple; inferred as by ``prune``.
        example_kwargs: keyword inputs.

    Raises:
        ExampleInputsError, InputError, RecordError: see ``analyze``.
        ModelError: no norm of the model reads a stream for a block alone.

    Examples:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        ...     def forward(self, x):
        ...         return x + self.conv(self.norm(x).relu())
        >>> net = fxprune.select_inputs(nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), nn.Conv2d(8, 4, 1)), x)
        >>> small = fxprune.prune(net, x, channels=0.5, progress=False)
        >>> [len(small.get_buffer(f"{block}.norm_selection")) < 8 for block in (1, 2)]
        [True, True]
    """
    check_model(model)
    model, example_inputs, example_kwargs = joined(model, example_inputs, example_kwargs)
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    dense = record_and_analyse(model, args, kwargs, "head_dim", (), Stages(progress=False))
    result = with_selections(dense.module, dense.graph)
    result.meta[RECORD_KEY] = describe_inputs(args, kwargs)
    return result


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
    keep: Sequence[str | nn.Module] = (),
    exact: bool = False,
    attention: Attention = "head_dim",
    scope: Scope = "global",
    round_to: RoundTo = "auto",
    depth: float | bool = False,
    for_class: bool = False,
    verify: bool = True,
    reconstruct: bool = False,
    seed: int = 0,
    progress: bool = True,
    options: Options | None = None,
    **old: Any,
) -> Any:
    """A smaller ``GraphModule`` that computes what ``model`` computes with the same channels masked.

    Args:
        model: any module; never changed, unless ``options`` say ``consume``. Of one that ``fully_shard`` has spread
            over several processes, call this alike in each of them: the result is spread in the same way.
        example_inputs: a tensor or a tuple; inferred for timm models, torchvision classifiers and segmenters. Or a dict
            of several calls by name, each with its inputs (for keyword inputs a dict): they are recorded as one graph,
            whose channels, MACs and outputs are those of all of them; see ``one_call``.
        example_kwargs: keyword inputs.
        method: a registered name (``fxprune.methods.available()``) or a method object.
        flops: budget in (0, 1]: MACs as a ratio of the dense model's.
        macs: the same.
        params: the same for parameters. Exactly one budget is given.
        channels: the same for prunable channels.
        latency: the same for the time of a run, on onnxruntime, or on what a ``LatencyBudget`` says, PyTorch for one.
            Kernels are timed at several channel counts (kept on disk, see the guide) to predict it, and the pruned
            model is measured beside the dense one until it is right.
        data: batches ``(inputs, target)``, for methods that train or measure gradients; those that measure activations
            take inputs alone, or a tensor of them. With a method that reads only weights the report notes that they
            were not needed, unless the result is refitted on them.
        loss_fn: ``loss_fn(output, target)``; cross entropy for classifiers if not given.
        epochs: how long a method that trains does.
        ignore: modules whose output channels stay: names of modules or parameters, patterns of names such as
            ``"layer4.*"``, or the modules themselves.
        keep: modules that stay entirely: nothing of their parameters is cut, neither what they make nor what they read.
            Given as for ``ignore``.
        exact: cut only channels whose removal changes no statistic (of a layer norm, for instance).
        attention: cut channels inside every head (``"head_dim"``: of 12 heads of 64, say, 12 of 40 stay) or whole heads
            (``"heads"``: 7 of 64). Queries and values of one attention call keep heads of one width, as fused kernels
            want it; with ``"uneven"`` they need not.
        scope: rank all channels together (``"global"``), cut every group by the same share (``"uniform"``), or rank
            together only groups of the same structure, each structure cut by the same share (``"isomorphic"``): of a
            transformer the hidden channels of all MLPs, and for themselves those of all heads.
        round_to: kept channels of a group are a multiple of this. ``"auto"``: the largest of 16, 8, 4, 2 and 1 whose
            plan takes at least 99 % of the budget, and loses at most a tenth more by the scores than multiples of 1.
            With ``flops=0.5``, if multiples of 16 take 0.488 of the MACs (97.6 % of the budget) and multiples of 8 take
            0.497 (99.4 %), it is 8. That depends on the model, the scores and the budget alone, so it is the same on
            every machine. ``"measured"``, and ``"auto"`` with ``latency``: up to the power of two that the execution
            provider likes, which is timed once per device and kept.
        depth: remove whole residual branches too, at most this share of them, in (0, 1], or with ``True`` as many as
            serve: a branch is what is added to a stream that is there without it. How many go, and how much thinner the
            rest becomes, is chosen by the error of the outputs, on the data where there are any, else on the example
            inputs; which can be that none goes. The plan names them. Not for methods that train.
        for_class: cut only what the model's own class can hold, so that ``into(model, small)`` gives it back: what its
            forward counts with and keeps in no attribute of its own stays. The report says what that locked, and where.
        verify: run the mask oracle on the result (never on ``device="meta"``, where nothing can be computed).
        reconstruct: refit the weights to the dense model's activations on ``data``, of which no targets are read, or
            on noise if there are none; see ``fxprune.reconstruct``, which has more options.
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
        ConversionError: ``for_class``, and the class cannot hold any cut.
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
        return _carried(whole, whole.get_submodule(rest["submodule"]), model, optimizer)
    request = requested(model, keywords, options)
    model, example_inputs, example_kwargs = joined(model, example_inputs, example_kwargs)
    learns = isinstance(request.method, Learner)
    given = model
    if is_sharded(model):
        check_shares(model)
        check_shardable(request, keywords, options, optimizer)
    if options.consume:
        check_consumable(request, optimizer)
    if optimizer is not None:
        if learns:
            raise InputError(f"{request.name} trains other weights than the optimizer's state is for: leave it out.")
        held_names(optimizer, model)
    calibration = None
    if keywords.reconstruct:
        calibration = check_reconstructible(request, keywords, options)
        keywords = replace(keywords, data=calibration if needs_of(request.method) else None)  # type: ignore[arg-type]
    check_data(request, keywords, options)
    check_finite(model)
    stages = Stages(keywords.progress)
    if learns:
        training = running.attached(model, example_inputs, example_kwargs, request, stages)
        if data is None:
            learner: Any = request.method
            data, loss_fn = training.label_free(learner.steps, learner.batch, keywords.seed)
        with stages("learning"), seeded(keywords.seed):
            fit(training, data, loss_fn, keywords.epochs or 1, options.loop or Loop(), progress=keywords.progress)
        return training.finish()
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    _check_alike(model, args, kwargs, facts_of(request, keywords, options))
    reads = keywords.data is not None or calibration is not None
    with seeded(keywords.seed) if reads else nullcontext():  # loaders shuffle and augment by the global numbers
        dense, pruned = running.pruned(model, args, kwargs, request, keywords, options.steps, stages, calibration)
        if keywords.reconstruct:
            with stages("reconstructing"):
                recording = dense.whole.module
                pruned = refitted(pruned, model, calibration, recording, seed=keywords.seed, tune=options.tune)
    return _carried(resharded(pruned, given), pruned, model, optimizer)


def prune_submodule(
    model: nn.Module,
    submodule: str,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    ignore: Sequence[str | nn.Module] = (),
    keep: Sequence[str | nn.Module] = (),
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
        ignore: as for ``prune``, of the whole model.
        keep: as for ``prune``, of the whole model.
        data: inputs of the whole model, for ``reconstruct`` and for methods that read no targets (``obs``, ``wanda``).
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
    method = resolve(keywords.get("method", "l2"))
    if data is not None and (isinstance(method, Learner) or needs_of(method) & WITH_TARGET):
        raise InputError(
            f"{name_of(method)} takes batches (inputs, target), and targets are the whole model's: for a part choose a "
            "method that needs none."
        )
    if isinstance(options, Options) and options.consume:
        raise InputError("consume=True empties the model, and a copy of all of it is returned here: leave it out.")
    chosen = {"ignore": chosen_names(model, "ignore", ignore), "keep": chosen_names(model, "keep", keep)}
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    part, inputs = part_of(model, submodule, args, kwargs)
    if data is not None:
        with seeded(check_count("seed", keywords.get("seed", 0), least=0)):
            pieces = pieces_of(data, {"args": args, "kwargs": kwargs}, None, device_of(model))
        keywords["data"] = inside(model, model.get_submodule(submodule), pieces)
    keywords["reconstruct"] = reconstruct
    keywords |= {name: names_in_part(names, submodule) for name, names in chosen.items()} | {"options": options}
    small = prune(part, inputs[0], example_kwargs=inputs[1], **keywords)
    return with_part(model, submodule, small, args, kwargs)


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
    keep: Sequence[str | nn.Module] = (),
    exact: bool = False,
    attention: Attention = "head_dim",
    scope: Scope = "global",
    round_to: RoundTo = "auto",
    for_class: bool = False,
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
    request = requested(model, keywords, options)
    check_model(model)
    if not isinstance(request.method, Learner):
        raise InputError(f"{request.name} does not train: call fxprune.prune(..., method={request.name!r}).")
    if rest or options.loop is not None:
        raise InputError(f"{next(iter(rest), 'loop')}= has no meaning here, where the loop is yours.")
    if options.tune:
        raise InputError(f"tune={options.tune} follows a refit: call fxprune.reconstruct with what comes out.")
    if options.consume:
        check_consumable(request, None)
    check_steps(request, options)
    check_finite(model)
    model, example_inputs, example_kwargs = joined(model, example_inputs, example_kwargs)
    return running.attached(model, example_inputs, example_kwargs, request, Stages(keywords.progress))


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
    check_model(model, shares=True)
    if not isinstance(plan, PruningPlan):
        raise PlanError(f"plan is {shown(plan)}; pass a PruningPlan: report.plan, or PruningPlan.load of a file.")
    model, example_inputs, example_kwargs = joined(model, example_inputs, example_kwargs)
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    plan.check()
    _check_alike(model, args, kwargs, {"attention=": plan.attention})
    result: fx.GraphModule = resharded(applied(model, plan, args, kwargs), model)
    return result


def applied(
    model: nn.Module,
    plan: PruningPlan,
    args: Any,
    kwargs: Any,
    method: str = "plan",
    verify: bool = True,
    put: Callable[[nn.Module, fx.GraphModule], nn.Module] = lambda model, pruned: pruned,
) -> Any:
    """``apply`` with inputs that were resolved. ``verify``: run the mask oracle. ``method``: for the report.

    ``put``: what is made of the result; of a plan with earlier ones of every step, which the next is applied to.

    Raises:
        PlanError: see ``apply``.
    """

    def analysed(model: nn.Module, plan: PruningPlan) -> Dense:
        attention: Any = plan.attention
        stages, leaves = Stages(progress=False), plan.leaf_functions
        return record_and_analyse(model, args, kwargs, attention, (), stages, verify=True, leaf_functions=leaves)

    try:
        dense = analysed(model, plan.steps[0])
        first, *others = plan.onwards(dense.graph)
        if first.attention != dense.graph.attention:
            dense = analysed(model, first)
        result = put(model, _applied(dense, first, method, verify))
        for step in others:
            result = put(result, _applied(analysed(result, step), step, method, verify))
    except PlanError as error:
        if plan.earlier is None:
            raise
        raise PlanError(
            f"{error} The network was pruned {len(plan.steps)} times: if a layer was exchanged in between, or other "
            "inputs were given, pass what the last pruning was given (fxprune.apply with the plan's .earlier)."
        ) from error
    return result


def _applied(dense: Dense, plan: PruningPlan, method: str, verify: bool) -> fx.GraphModule:
    """One plan applied, without those before it."""
    dense = replace(dense, earlier=plan.earlier)
    if plan.removed:
        dense = running.without_branches(dense, plan.removed)
    if plan.joins:
        dense = running.with_choices_of(dense, plan.joins)
    keep = plan.channels(dense.graph, dense.whole.graph)
    pruned = rewrite_as(dense, keep, Cut(Budget("flops", 1.0), verify=verify), method)
    if isinstance(pruned, Reason):
        raise PlanError(f"The plan cannot be applied: {pruned}.")
    return pruned


def _check_alike(model: nn.Module, args: Any, kwargs: Any, asked_for: Mapping[str, Any]) -> None:
    """Of a model that several processes share: all of them were asked for the same.

    Raises:
        InputError, ModelError: they were not, or its parameters cannot be gathered.
    """
    if is_sharded(model):
        check_shares(model)
        check_same(
            {
                "the example inputs": describe(args, kwargs),
                **{f"the shape of {name}": list(p.shape) for name, p in model.named_parameters()},
                **asked_for,
            }
        )


def _carried(
    result: nn.Module, part: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> nn.Module:
    """The result; where an optimizer was given, with one of its own in the report of ``part``, which was pruned."""
    if optimizer is not None:
        meta: Any = part.meta
        meta["fxprune"] = replace(meta["fxprune"], optimizer=carry_over(optimizer, model, result))
    return result
