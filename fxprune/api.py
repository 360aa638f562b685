"""The stages put together: ``prune``, ``apply``, ``analyze`` and ``record``."""

from __future__ import annotations

import copy
import difflib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from fxprune import recording
from fxprune.analysis import analyse_graph
from fxprune.budget import Budget, Scope, Selection, select
from fxprune.channels import ChannelGraph, channels_of
from fxprune.cost import Keep
from fxprune.errors import BudgetError, ExampleInputsError, InputError, ModelError, PlanError, VerificationError
from fxprune.inputs import RECORD_KEY, describe_inputs, make_inputs, map_leaves, resolve_inputs, tensors_of
from fxprune.labels.classes import Reason
from fxprune.labels.propagate import Attention
from fxprune.methods import Criterion, ModelState, resolve, score_groups
from fxprune.plan import PruningPlan
from fxprune.report import Report, layer_rows
from fxprune.rewriting import UnrepairableError, check_rewrite, rewrite, run_on_meta
from fxprune.verify import TOLERANCE, Inputs, mask_oracle, relative_error

_ROUNDS = 20


class _Stages:
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


def record(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """Run ``model`` once in eval mode and write down what it did, as a ``GraphModule`` with the same state_dict.

    Args:
        model: any module; it is left exactly as it was.
        example_inputs: a tensor, or a tuple of positional inputs.
        example_kwargs: keyword inputs.

    Raises:
        ExampleInputsError: the model does not accept the inputs.
        RecordError: what it did cannot be written down.
    """
    _check_model(model)
    args, kwargs = resolve_inputs(model, example_inputs, example_kwargs)
    result = recording.record(model, args, kwargs)
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

    Raises:
        ExampleInputsError: inputs are missing or do not fit.
    """
    _check_model(model)
    args, kwargs = resolve_inputs(model, example_inputs, example_kwargs)
    names = _ignored(model, ignore)
    _check_choice("attention", attention, ("head_dim", "heads"))
    return analyse_graph(recording.record(model, args, kwargs), args, kwargs, attention=attention, ignore=names)


def prune(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    method: str | Criterion = "l2",
    flops: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    ignore: Sequence[str | nn.Module] = (),
    exact: bool = False,
    attention: Attention = "head_dim",
    scope: Scope = "global",
    round_to: int = 1,
    min_channels: int = 1,
    submodule: str | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """A smaller ``GraphModule`` that computes what ``model`` computes with the same channels masked.

    Args:
        model: any module; never changed.
        example_inputs: a tensor or a tuple; inferred for timm models, torchvision classifiers and segmenters.
        example_kwargs: keyword inputs.
        method: a registered name (``fxprune.methods.available()``) or a method object.
        flops: budget in (0, 1]: MACs as a ratio of the dense model's.
        params: the same for parameters. Exactly one budget is given.
        channels: the same for prunable channels.
        ignore: module names or modules whose output channels stay.
        exact: cut only channels whose removal changes no statistic (of a layer norm, for instance).
        attention: cut channels inside every head (``"head_dim"``) or whole heads (``"heads"``).
        scope: rank all channels together (``"global"``), or cut every group by the same share (``"uniform"``).
        round_to: kept channels of a group are a multiple of this.
        min_channels: at least so many channels stay along every dimension of every tensor.
        submodule: prune only this part of the model, with the inputs it gets when the model runs on the example inputs.
            Its outputs keep their shapes.
        verify: run the mask oracle on the result (never on ``device="meta"``, where nothing can be computed).
        seed: of random choices. Same seed, same versions: the same plan.
        progress: tell the stages on stderr.

    Returns:
        The pruned ``GraphModule``; ``meta["fxprune"]`` is its ``Report``. With ``submodule`` a copy of the model in
        which the part is such a module.

    Raises:
        InputError: an argument that cannot be used.
        ExampleInputsError: inputs are missing or do not fit.
        ModelError: NaN or inf in the weights, or nothing to prune.
        BudgetError: the budget cannot be reached.
        VerificationError: the result is not what it should be (a fault of fxprune).
    """
    budget = Budget.of(flops=flops, params=params, channels=channels)
    criterion = resolve(method)
    _check_choice("attention", attention, ("head_dim", "heads"))
    _check_choice("scope", scope, ("global", "uniform"))
    _check_count("round_to", round_to)
    _check_count("min_channels", min_channels)
    _check_count("seed", seed, least=0)
    _check_model(model)
    names = _ignored(model, ignore)
    _check_finite(model)
    args, kwargs = resolve_inputs(model, example_inputs, example_kwargs)
    if submodule is not None:
        part, inputs = part_of(model, submodule, args, kwargs)
        small = prune(
            part, inputs[0], example_kwargs=inputs[1], method=criterion, flops=flops, params=params, channels=channels,
            ignore=_ignored_below(submodule, names), exact=exact, attention=attention, scope=scope, round_to=round_to,
            min_channels=min_channels, verify=verify, seed=seed, progress=progress,
        )  # fmt: skip
        return _with_part(model, submodule, small, args, kwargs)
    stages = _Stages(progress)
    dense, graph = _record_and_analyse(model, args, kwargs, attention, names, stages)
    with stages("scoring"):
        state = ModelState(graph, dict([*dense.named_parameters(), *dense.named_buffers()]), seed)
        scores = score_groups(criterion, state)
    notes = list(graph.notes)
    for _ in range(_ROUNDS):
        with stages("selecting"):
            selection, unreachable = _select(
                graph, scores, budget, scope=scope, exact=exact, round_to=round_to, min_channels=min_channels
            )
        with stages("rewriting"):
            pruned, blame = _rewrite(dense, graph, selection.keep, args, kwargs)
        if pruned is not None:
            if unreachable is not None:
                raise unreachable
            break
        channels_left, reason = blame
        before, graph = graph, graph.with_locked(channels_left, reason)
        if graph.groups == before.groups:
            raise VerificationError(f"The rewriting cannot follow the plan: {reason}. The model is unchanged.")
        notes.append(f"left alone: {reason}")
    else:
        raise VerificationError(f"No plan could be rewritten in {_ROUNDS} rounds; the last reason: {blame[1]}.")
    name = method if isinstance(method, str) else repr(method)
    return _finish(model, dense, pruned, graph, selection, name, args, kwargs, verify, seed, stages, notes)


def apply(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> fx.GraphModule:
    """Apply a plan to a fresh instance of the model it was made for.

    Raises:
        PlanError: the plan belongs to another model, or is inconsistent.
        ExampleInputsError: inputs are missing or do not fit.
    """
    _check_model(model)
    if not isinstance(plan, PruningPlan):
        raise PlanError(f"plan is {plan!r}; pass a PruningPlan: report.plan, or PruningPlan.load of a file.")
    args, kwargs = resolve_inputs(model, example_inputs, example_kwargs)
    stages = _Stages(progress=False)
    attention: Any = plan.attention
    dense, graph = _record_and_analyse(model, args, kwargs, attention, (), stages)
    keep = plan.channels(graph)
    with stages("rewriting"):
        pruned, blame = _rewrite(dense, graph, keep, args, kwargs)
    if pruned is None:
        raise PlanError(f"The plan cannot be applied: {blame[1]}.")
    selection = Selection(keep, {})
    return _finish(model, dense, pruned, graph, selection, "plan", args, kwargs, True, 0, stages, list(graph.notes))


def _record_and_analyse(
    model: nn.Module, args: Any, kwargs: Any, attention: Attention, ignore: Sequence[str], stages: _Stages
) -> tuple[fx.GraphModule, ChannelGraph]:
    with stages("recording"):
        dense = recording.record(model, args, kwargs)
    with stages("analysing"):
        return dense, analyse_graph(dense, args, kwargs, attention=attention, ignore=ignore)


def _select(*args: Any, **options: Any) -> tuple[Selection, BudgetError | None]:
    """The selection; for a budget that cannot be reached the smallest one, which the error says can be reached."""
    try:
        return select(*args, **options), None
    except BudgetError as error:
        return Selection(error.floor, {}), error


def _rewrite(
    dense: fx.GraphModule, graph: ChannelGraph, keep: Keep, args: Any, kwargs: Any
) -> tuple[fx.GraphModule | None, tuple[Sequence[int], Reason]]:
    """The rewritten and checked module, or None and the channels that must stay, with the reason."""
    other = _other_batch(args, kwargs)
    dense_run = run_on_meta(dense, *other)
    try:
        pruned = rewrite(dense, graph, keep, dense_run)
    except UnrepairableError as error:
        return None, (
            _culprits(dense, graph, error.node.name, error.channels),
            Reason(error.text, str(error.node.meta.get("source", ""))),
        )
    mismatch = check_rewrite(pruned, graph, keep, args, kwargs)
    if mismatch is not None:
        text = f"the rewritten graph does not follow ({mismatch.text})"
        return None, (_culprits(dense, graph, mismatch.node, mismatch.channels), Reason(text, mismatch.source))
    if dense_run.failed is None:
        pruned_run = run_on_meta(pruned, *other)
        if pruned_run.failed is not None or pruned_run.shapes != dense_run.shapes:
            node = pruned_run.failed or next(n for n in pruned.graph.nodes if n.op == "output")
            reason = Reason("the rewritten graph fails with another batch size", str(node.meta.get("source", "")))
            return None, (_culprits(dense, graph, node.name, ()), reason)
    return pruned, ((), Reason(""))


def _culprits(dense: fx.GraphModule, graph: ChannelGraph, name: str, channels: Sequence[int]) -> list[int]:
    """The channels to leave alone: those given, or those of the nearest nodes before ``name`` that may be cut."""
    free = [c for c in channels if not graph.locked[c]]
    nodes = {n.name: n for n in dense.graph.nodes}
    level = [nodes[name]] if name in nodes else []
    seen = set(level)
    while level and not free:
        free = [c for n in level for c in channels_of(graph.nodes.get(n.name)) if not graph.locked[c]]
        level = [n for node in level for n in node.all_input_nodes if n not in seen]
        seen.update(level)
    return free


def _other_batch(args: Any, kwargs: Any, seed: int = 0) -> Inputs:
    """Fresh inputs like the example, with another batch size."""
    record = describe_inputs(args, kwargs)
    first = next((t for t in tensors_of((args, kwargs)) if t.ndim), None)
    batch = 2 if first is None or first.shape[0] != 2 else 3
    device = first.device if first is not None else torch.device("cpu")
    return make_inputs(record, device, batch=batch, seed=seed)


def _finish(
    model: nn.Module,
    dense: fx.GraphModule,
    pruned: fx.GraphModule,
    graph: ChannelGraph,
    selection: Selection,
    method: str,
    args: Any,
    kwargs: Any,
    verify: bool,
    seed: int,
    stages: _Stages,
    notes: list[str],
) -> fx.GraphModule:
    keep = selection.keep
    plan = PruningPlan.of(graph, keep)
    agreement = None
    if verify and not any(p.is_meta for p in dense.parameters()):
        with stages("verifying"):
            _check_recording(model, dense, args, kwargs)
            agreement = mask_oracle(dense, pruned, graph, plan, keep, _oracle_inputs(dense, args, kwargs, seed, notes))
    lines = {str(n.target): str(n.meta.get("source", "")) for n in reversed(dense.graph.nodes) if n.op == "call_module"}
    for node in dense.graph.nodes:
        if node.op == "get_attr":
            user = next(iter(node.users), node)
            lines.setdefault(str(node.target), str(user.meta.get("source", "")))
    kinds = {name: type(m).__name__ for name, m in model.named_modules()}
    pruned.meta[RECORD_KEY] = describe_inputs(args, kwargs)
    pruned.meta["fxprune"] = Report(
        model=type(model).__name__,
        method=method,
        macs_before=graph.macs(),
        macs_after=graph.macs(keep),
        params_before=graph.params(),
        params_after=graph.params(keep),
        prunable_share=graph.prunable_share,
        held=graph.held,
        plan=plan,
        rows=layer_rows(graph, keep, kinds, lines, selection.frozen),
        oracle_error=None if agreement is None else agreement.error,
        oracle_error_in_double=None if agreement is None else agreement.in_double,
        seconds=dict(stages.seconds),
        notes=tuple(notes),
    )
    return pruned


def _oracle_inputs(dense: fx.GraphModule, args: Any, kwargs: Any, seed: int, notes: list[str]) -> Inputs:
    """Fresh inputs with another batch size where the dense model takes one, else the example's own."""
    fresh = _other_batch(args, kwargs, seed)
    try:
        with _evaluated(dense), torch.no_grad():
            dense.forward(*fresh[0], **fresh[1])  # torch.fx prints what fails in __call__
        return fresh
    except Exception:  # the dense model itself is bound to its example's batch size
        notes.append("the recorded model does not run with another batch size; verified on the example inputs")
        return args, kwargs


def _check_recording(model: nn.Module, dense: fx.GraphModule, args: Any, kwargs: Any) -> None:
    """The recorded graph must compute what the model computes."""
    results = []
    for module in (dense, model):
        with _evaluated(module), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            results.append(module(*args, **kwargs))
    error = relative_error(*results)
    if error > TOLERANCE:
        raise VerificationError(
            f"The recorded graph differs from the model on the example inputs: relative error {error:.1e}. "
            "Does forward depend on something that changes from call to call?"
        )


def part_of(model: nn.Module, name: str, args: Any, kwargs: Any) -> tuple[nn.Module, Inputs]:
    """A submodule and the inputs of its first call when the model runs on the example inputs.

    Raises:
        InputError: there is no such submodule, or it is not called.
        ExampleInputsError: the model does not run on the inputs.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in known:
        raise InputError(f"submodule={name!r} is not part of the model.{_suggestion(name, known)}")
    calls: list[Inputs] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((given, named))

    handle = known[name].register_forward_pre_hook(note, with_kwargs=True)
    try:
        with _evaluated(model), torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise ExampleInputsError(f"The model does not run on the example inputs: {error}.") from error
    finally:
        handle.remove()
    if not calls:
        raise InputError(f"submodule={name!r} is not called when the model runs on the example inputs.")
    return known[name], map_leaves(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, calls[0])


def _with_part(model: nn.Module, name: str, part: fx.GraphModule, args: Any, kwargs: Any) -> nn.Module:
    """A copy of the model with ``part`` in place of a submodule; it must run on the example inputs."""
    result = copy.deepcopy(model)
    path, _, last = name.rpartition(".")
    setattr(result.get_submodule(path), last, part)
    with _evaluated(result), torch.no_grad():
        result(*args, **kwargs)
    return result


@contextmanager
def _evaluated(*roots: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode again afterwards."""
    modes = [(m, m.training) for root in roots for m in root.modules()]
    try:
        for root in roots:
            root.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


def _ignored_below(prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.removeprefix(f"{prefix}.") for name in names if name.startswith(f"{prefix}."))


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {', '.join(close)}?" if close else ""


def _ignored(model: nn.Module, ignore: Sequence[str | nn.Module]) -> tuple[str, ...]:
    modules = dict(model.named_modules(remove_duplicate=False))
    known = {*modules, *dict(model.named_parameters(remove_duplicate=False))}
    names = []
    items = [ignore] if isinstance(ignore, (str, nn.Module)) else ignore
    if not isinstance(items, Iterable):
        raise InputError(f"ignore={ignore!r} must be a module, a name, or a list of them.")
    for item in items:
        if isinstance(item, nn.Module):
            found = [name for name, module in modules.items() if module is item]
            if not found:
                raise InputError(f"ignore holds a {type(item).__name__} that is not part of the model.")
            names += found
        elif item in known:
            names.append(item)
        else:
            hint = _suggestion(str(item), known)
            raise InputError(f"ignore names {item!r}, which the model does not have.{hint}")
    return tuple(names)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {model!r}; pass a torch.nn.Module.")


def _check_finite(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantised" if tensor.is_quantized else "sparse"
            raise ModelError(f"{name} is {kind}; fxprune prunes dense weights. Prune first, then make them {kind}.")
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            if isinstance(tensor, nn.Parameter):
                raise ModelError(f"{name} holds NaN or inf. Load a sound checkpoint before pruning.")
            if bool(torch.isnan(tensor).any()):
                raise ModelError(f"{name} holds NaN. Load a sound checkpoint before pruning.")


def _check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name}={value!r} is unknown. Known: {', '.join(known)}.")


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}.")
