"""What is checked of a pruned network, and how one is measured.

A check is a small function that gets the ``Case`` and returns the reason why it fails, or "". Weights are random from a
seed; so are norm statistics, affine terms and whatever a library initialises to a constant, since a fresh network hides
mistakes.
"""

from __future__ import annotations

import copy
import inspect
import resource
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune.api import part_of
from fxprune.labels.records import Attention
from fxprune.recording.inputs import describe_inputs, is_batched, make_inputs, map_leaves, specs_of, tensors_of
from fxprune.verification import DOUBLE_TOLERANCE, relative_error, zero_slices
from model_zoo.networks import example_inputs, load, split_part
from model_zoo.records import Record, stage

BUDGET_SLACK = 0.01
ORACLE_TOLERANCE = 1e-5
ONNX_TOLERANCE = 1e-3
SAME = 1e-5  # relative error of two float32 runs that compute the same in another order
DIFFERENT = 1e-3  # outputs that must differ differ by more, relative to the largest
OTHER_BATCH = 3
MODES_BATCH = 2  # stochastic depth drops whole samples: one alone might stay
ONNX_BATCH = 4  # neither the recorded one, nor the exported one, nor those that fxprune.export compares
DROP = 0.2
BIAS = 0.1
NORM_BIAS = 0.6
MOST_REASONS = 3
AFFINE = ("weight", "bias")  # buffers of norm layers that do not train

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


# -- a network and what is known of it --------------------------------------------------------------------------------


@dataclass
class Case:
    """What the checks look at.

    ``dense``: the recorded model; ``inputs``: describes the example inputs; ``state``: the model's, before. Where a
    part was pruned, all of these are the part's, and ``whole`` and ``whole_pruned`` are the models it is part of.
    """

    spec: str
    flops: float
    model: nn.Module
    state: dict[str, Tensor]
    dense: fx.GraphModule
    pruned: fx.GraphModule
    inputs: dict[str, Any]
    figures: dict[str, Any]
    whole: nn.Module | None = None
    whole_pruned: nn.Module | None = None

    @property
    def report(self) -> fxprune.Report:
        report: fxprune.Report = self.pruned.meta["fxprune"]
        return report

    def run(self, module: nn.Module, batch: int | None = None, seed: int = 0, noise: int = 0) -> Any:
        """Outputs of ``module`` in its present mode on random inputs from ``seed``; ``noise`` seeds its dropout."""
        args, kwargs = make_inputs(self.inputs, batch=batch, seed=seed)
        torch.manual_seed(noise)
        with torch.no_grad():
            return module(*args, **kwargs)


Check = Callable[[Case], str]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Register a check; they run in this order."""

    def register(function: Check) -> Check:
        if name in CHECKS:
            raise ValueError(f"two checks are named {name!r}")
        CHECKS[name] = function
        return function

    return register


def measure(
    spec: str,
    *,
    flops: float = 0.5,
    method: str = "l2",
    attention: Attention = "head_dim",
    size: Sequence[int] | None = None,
    onnx: bool = True,
) -> Record:
    """Prune the network that ``spec`` names and run every check on the result; never raises.

    Args:
        spec: see ``fxprune.io.specs.load_model``; ``SPEC@PART`` prunes a submodule.
        flops: the budget.
        method: by name.
        attention: see ``fxprune.prune``.
        size: shape of one input without the batch, where it is not the one that is inferred.
        onnx: also export, and run onnxruntime.
    """
    result = Record(spec)
    name, part = split_part(spec)
    with stage(result, "load"):
        torch.manual_seed(0)
        whole = load(name).eval()
        args, kwargs = example_inputs(whole, size)
        model = whole.get_submodule(part) if part else whole
        given: Any = part_of(whole, part, args, kwargs)[1] if part else (args, kwargs)
        inputs = describe_inputs(*given)
        randomise(model, inputs)
        state = copy.deepcopy(model.state_dict())  # with the versions of its modules
    if result.failures:
        return result
    with stage(result, "prune"):
        how: dict[str, Any] = {"method": method, "flops": flops, "attention": attention, "progress": False}
        if part:
            whole_pruned = fxprune.prune_submodule(whole, part, args, example_kwargs=kwargs, **how)
        else:
            whole_pruned = fxprune.prune(whole, args, example_kwargs=kwargs, **how)
        pruned: Any = whole_pruned.get_submodule(part)
        dense = fxprune.record(model, *make_inputs(inputs))
        case = Case(spec, flops, model, state, dense, pruned, inputs, result.figures)
        if part:
            case.whole, case.whole_pruned = whole, whole_pruned
        result.figures |= _figures_of(case.report)
    if result.failures:
        return result
    left_out = {name for name, wanted in (("onnx", onnx), ("whole", bool(part))) if not wanted}
    for name, function in CHECKS.items():
        if name in left_out:
            continue
        with stage(result, name):
            result.checks[name] = function(case)
    result.figures["memory_gib"] = _peak_memory()
    return result


def measure_on_meta(spec: str, *, flops: float = 0.5, attention: Attention = "head_dim") -> Record:
    """Record, label, plan and rewrite without weights, with random scores; never raises."""
    result = Record(spec)
    with stage(result, "load"), torch.device("meta"):
        model = load(spec)
        args, kwargs = example_inputs(model)
    if result.failures:
        return result
    with stage(result, "prune"):
        pruned = fxprune.prune(
            model, args, example_kwargs=kwargs, method="random", flops=flops, attention=attention, progress=False
        )
        report: fxprune.Report = pruned.meta["fxprune"]
        result.figures |= _figures_of(report) | {
            "macs_before": report.macs_before,
            "macs_after": report.macs_after,
            "ratio": report.macs_after / report.macs_before,
            "params_before": report.params_before,
            "params_after": report.params_after,
        }
    if result.failures:
        return result
    with stage(result, "shapes"), torch.no_grad():
        before, after = (_shapes_of(module.eval()(*args, **kwargs)) for module in (model, pruned))
        result.checks["shapes"] = "" if after == before else f"outputs {after} instead of {before}"
    result.checks["budget"] = _outside_budget(result.figures["ratio"], flops)
    result.figures["memory_gib"] = _peak_memory()
    return result


def _figures_of(report: fxprune.Report) -> dict[str, Any]:
    return {
        "stages": {stage: round(value, 2) for stage, value in report.seconds.items()},
        "notes": list(report.notes),
        "prunable_share": round(report.prunable_share, 4),
        "held": [f"{share:.1%}: {reason}" for reason, share in [*report.held.items()][:MOST_REASONS]],
    }


def _peak_memory() -> float:
    """GiB, of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def randomise(model: nn.Module, inputs: dict[str, Any] | Callable[[], tuple[Any, Any]], seed: int = 0) -> None:
    """Make every index of every parameter and statistic differ from every other, and keep signals alive.

    The library's own initialisation stays where it is random, but no matrix lowers the scale of its input: with weights
    of 0.02 attention is all but uniform, and nothing depends on queries and keys. What is 1-D or constant (zero heads,
    layer scales of 1e-6, fresh affine terms) is drawn anew. Batch norms get random statistics at the scale of what they
    see: at an arbitrary scale the output of a deep network no longer depends on its input. Their biases are positive in
    the mean, since deep random networks of centred norms and ReLUs amplify rounding errors a thousandfold.

    ``inputs`` describes what the batch norms see, or makes it; without such norms the model is not run.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return (torch.randn(like.shape, generator=generator) * std).to(like)

    def positive(like: Tensor) -> Tensor:
        return (torch.rand(like.shape, generator=generator) + 0.5).to(like)

    def calibrate(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        power = args[0].square().mean([dim for dim in range(args[0].ndim) if dim != 1])
        power += 0.1 * power.mean() + 1e-4  # a channel that is all but dead here may not be on other inputs
        mean.copy_(normal(power, 0.2) * power.sqrt())
        variance.copy_(power * positive(power))

    modules = dict(model.named_modules())
    norms = {name: m for name, m in modules.items() if getattr(m, "running_var", None) is not None}
    frozen = [(f"{name}.{key}", b) for name, m in norms.items() for key, b in m.named_buffers() if key in AFFINE]
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *frozen):
            if not tensor.numel():
                continue
            owner, _, last = name.rpartition(".")
            unit = (tensor.shape[0] / tensor.numel()) ** 0.5 if tensor.ndim > 1 else 1.0  # fan-in to the power of -1/2
            if last.endswith("bias"):
                tensor.copy_(normal(tensor, BIAS) + (NORM_BIAS if owner in norms else 0.0))
            elif tensor.ndim < 2:
                tensor.copy_(positive(tensor))
            elif bool((tensor == tensor.flatten()[0]).all()):
                tensor.copy_(normal(tensor, unit))
            elif last.endswith("weight") and not isinstance(modules[owner], nn.Embedding):
                tensor.mul_((unit / tensor.std()).clamp_min(1))
        hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms.values()]
        if hooks:
            args, kwargs = inputs() if callable(inputs) else make_inputs(inputs, batch=2, seed=seed)
            model(*args, **kwargs)
        for hook in hooks:
            hook.remove()


# -- checks -----------------------------------------------------------------------------------------------------------


def count_macs(module: nn.Module, args: Any, kwargs: Any) -> int:
    """Multiply-accumulates by torch's own counter, which counts two operations for each.

    It counts nothing of the fused kernels of nn.MultiheadAttention in eval mode and of LSTMs on the CPU, and in some
    versions nothing of attention's: they are switched off.
    """
    learned = [p for p in module.parameters() if p.requires_grad]  # the counter trips over a parameter that is an input
    fused, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    module.requires_grad_(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.backends.mkldnn.enabled = onednn
        for parameter in learned:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops()) // 2


@check("macs")
def _macs(case: Case) -> str:
    """Our count is torch's, of the model, its recording and the pruned module; parameters likewise."""
    report, inputs = case.report, make_inputs(case.inputs)
    counted = {name: count_macs(getattr(case, name), *inputs) for name in ("model", "dense", "pruned")}
    parameters = {name: sum(p.numel() for p in getattr(case, name).parameters()) for name in ("model", "pruned")}
    case.figures |= {
        "macs_before": counted["dense"],
        "macs_after": counted["pruned"],
        "ratio": counted["pruned"] / counted["dense"],
        "params_before": parameters["model"],
        "params_after": parameters["pruned"],
    }
    promised = (report.macs_before, report.macs_before, report.macs_after, report.params_before, report.params_after)
    found = (*counted.values(), *parameters.values())
    return "" if found == promised else f"counted {found} in model, dense, pruned; the report says {promised}"


@check("budget")
def _budget(case: Case) -> str:
    """At or under the budget, and within 1 % of it."""
    return _outside_budget(case.figures["ratio"], case.flops)


def _outside_budget(ratio: float, flops: float) -> str:
    if (1 - BUDGET_SLACK) * flops <= ratio <= flops:
        return ""
    return f"{ratio:.4f} of the MACs stay; the budget is {flops}"


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
    expected, found = (_shapes_of(case.run(module)) for module in (case.model, case.pruned))
    case.figures["outputs"] = found
    return "" if found == expected else f"{found} instead of {expected}"


@check("batch")
def _batch(case: Case) -> str:
    """Another batch size works, and every row is what it is by itself."""
    expected, found = (_shapes_of(case.run(module, OTHER_BATCH)) for module in (case.model, case.pruned))
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


@check("untouched")
def _untouched(case: Case) -> str:
    """The model that was given is as it was."""
    state = case.model.state_dict()
    changed = [name for name, tensor in case.state.items() if not torch.equal(tensor, state[name])]
    return f"changed: {', '.join(changed[:3])}" if changed else ""


@check("names")
def _names(case: Case) -> str:
    """The state_dict has the original's names, in their order."""
    expected, found = list(case.state), list(case.pruned.state_dict())
    if found == expected:
        return ""
    return f"missing {sorted({*expected} - {*found})[:3]}, added {sorted({*found} - {*expected})[:3]}"


@check("copy")
def _copy(case: Case) -> str:
    """A deep copy computes the same; so does one with other values after loading the saved state_dict."""
    expected = case.run(case.pruned)
    twin = copy.deepcopy(case.pruned)
    if not _equal(case.run(twin), expected):
        return "a deepcopy computes something else"
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    if _equal(case.run(twin), expected):
        return "a deepcopy with other values computes the same"
    if not _equal(case.run(case.pruned), expected):
        return "a deepcopy shares its values with the original"
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case.pruned.state_dict(), f"{folder}/state.pt")
        twin.load_state_dict(torch.load(f"{folder}/state.pt", weights_only=True))
    return "" if _equal(case.run(twin), expected) else "after loading the saved state_dict it computes something else"


@check("training")
def _training(case: Case) -> str:
    """One step in train mode gives every parameter a finite gradient wherever the dense model's has one.

    It may be zero where that of the masked dense model is: all that a small layer has left may be dead behind a ReLU.
    Branches that exist in train mode only (auxiliary classifiers) are not in a recording of eval mode, pruned or not:
    they are listed in the figures.
    """
    original, dense, pruned = (_gradients(case, getattr(case, name)) for name in ("model", "dense", "pruned"))
    case.figures["training_only"] = len(original.keys() - dense.keys())
    case.figures["gradients"] = len(pruned)
    used = {str(node.target) for node in case.dense.graph.nodes if node.op in ("call_module", "get_attr")}
    missing = [name for name in original if name not in pruned and (name in used or name.rpartition(".")[0] in used)]
    missing += [name for name in dense if name not in pruned and name not in missing]
    if missing:
        return f"no gradient for {len(missing)} parameters: {', '.join(missing[:3])}"
    dead = [name for name, grad in pruned.items() if grad.zero and name in dense and not dense[name].zero]
    if dead and (dead := sorted({*dead} & _alive(case))):
        return f"zero gradients for {len(dead)} parameters: {', '.join(dead[:3])}"
    broken = [name for name, grad in pruned.items() if not grad.finite]
    return f"gradients that are not finite: {', '.join(broken[:3])}" if broken else ""


@check("modes")
def _modes(case: Case) -> str:
    """Dropout and stochastic depth react to train() and eval() as in the original.

    The plan is applied to a fresh instance of the network with dropout and stochastic depth switched on where it has
    such options. Norm layers stay in eval, so that nothing else can react.
    """
    model, options = _stochastic(case.spec)
    case.figures["stochastic"] = options
    model.load_state_dict(case.state)
    args, kwargs = make_inputs(case.inputs)
    pruned = fxprune.apply(model.eval(), case.report.plan, args, kwargs)
    error = relative_error(case.run(pruned), case.run(case.pruned))
    if not error <= SAME:
        return f"the plan applied to a fresh instance computes something else: relative error {error:.1e}"
    reactions = {}
    for name, module in (("original", model), ("pruned", pruned)):
        calm = case.run(module.eval(), MODES_BATCH)
        _train_without_norms(module)
        one, again, other = (case.run(module, MODES_BATCH, noise=noise) for noise in (0, 0, 5))
        if not _equal(one, again):
            return f"the {name} in train mode differs from run to run with one seed"
        reactions[name] = (_differ(one, calm), _differ(other, calm))
        if not _equal(case.run(module.eval(), MODES_BATCH), calm):
            return f"the {name} is not what it was after train() and eval()"
    case.figures["reacts"] = reactions["original"][0]
    if reactions["original"] == reactions["pruned"]:
        return ""
    return f"train and eval differ, original {reactions['original']}, pruned {reactions['pruned']}"


@check("whole")
def _whole(case: Case) -> str:
    """The model that the part was taken from runs with the pruned one in its place, on one image and on others."""
    assert case.whole is not None
    assert case.whole_pruned is not None
    for seed, side in ((0, 320), (1, 256)):
        images = [torch.rand(3, side, side + 64 * i, generator=torch.Generator().manual_seed(seed)) for i in range(2)]
        with torch.no_grad():
            expected, found = ([sorted(each) for each in module(images)] for module in (case.whole, case.whole_pruned))
        if found != expected:
            return f"results {found} instead of {expected}"
    return ""


@check("onnx")
def _onnx(case: Case) -> str:
    """The exported file computes the same in onnxruntime, also with a batch that the export never saw."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        validation = fxprune.export(case.pruned, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        args, kwargs = make_inputs(case.inputs, batch=ONNX_BATCH, seed=3)
        feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors_of((args, kwargs)), strict=True)}
        found = [torch.as_tensor(output) for output in session.run(None, feeds)]
    error = relative_error(found, tensors_of(case.run(case.pruned, ONNX_BATCH, 3)))
    case.figures |= {
        "onnx": max(error, validation.max_rel_error),
        "opset": validation.opset,
        "onnx_latency_ms": round(validation.latency_ms, 2),
    }
    return "" if case.figures["onnx"] <= ONNX_TOLERANCE else f"relative error {case.figures['onnx']:.1e}"


class _Gradient(NamedTuple):
    zero: bool
    finite: bool


def _gradients(case: Case, module: nn.Module) -> dict[str, _Gradient]:
    """Parameter -> what its gradient is like, of the sum of squares, in train mode, batch 2; ``module`` stays as is."""
    module = copy.deepcopy(module)
    _backward(case, module)
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    result = {name: _Gradient(not bool(g.any()), bool(g.isfinite().all())) for name, g in found.items()}
    module.zero_grad()
    return result


def _alive(case: Case) -> set[str]:
    """The parameters whose gradient in the masked dense model is not zero in the slices that stay."""
    masked = copy.deepcopy(case.dense)
    zero_slices(masked, case.report.plan)
    _backward(case, masked)
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    zero_slices(masked, case.report.plan)
    return {name for name, gradient in masked.named_parameters() if bool(gradient.any())}


def _backward(case: Case, module: nn.Module) -> None:
    args, kwargs = make_inputs(case.inputs, batch=2)
    torch.manual_seed(0)
    loss = sum(output.square().sum() for output in tensors_of(module.train()(*args, **kwargs)))
    assert isinstance(loss, Tensor)
    loss.backward()


def _stochastic(spec: str) -> tuple[nn.Module, dict[str, float]]:
    """A fresh instance with dropout and stochastic depth where the network has such options, and the options."""
    network, part = split_part(spec)
    library, _, name = network.partition(":")
    make: Callable[..., nn.Module]
    if library == "timm":
        import timm

        make, options = partial(timm.create_model, name), {"drop_rate": DROP, "drop_path_rate": DROP}
    else:
        from torchvision import models

        fixed: dict[str, Any] = {"weights_backbone": None, "init_weights": False}
        known = {*inspect.signature(models.get_model_builder(name)).parameters}
        known |= {"init_weights"} if name in ("googlenet", "inception_v3") else set()
        fixed = {key: value for key, value in fixed.items() if key in known}
        make, options = partial(models.get_model, name, **fixed), {"dropout": DROP}
    for names in (list(options), list(options)[:1], []):
        chosen = {key: options[key] for key in names}
        try:
            model = make(**chosen)
            return model.get_submodule(part), chosen
        except TypeError:  # the network has no such option
            continue
    raise AssertionError("a network without options cannot fail here")


def _train_without_norms(module: nn.Module) -> None:
    module.train()
    for child in module.modules():
        if isinstance(child, _NORMS):
            child.eval()


def _differ(one: Any, other: Any) -> bool:
    """Of the outputs that both have: some networks return more in train mode."""
    pairs = list(zip(tensors_of(one), tensors_of(other), strict=False))
    return relative_error([a for a, _ in pairs], [b for _, b in pairs]) > DIFFERENT


def _equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(other), strict=True))


def _shapes_of(outputs: Any) -> list[list[int]]:
    return [list(value.shape) for value in tensors_of(outputs)]
