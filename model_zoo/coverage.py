"""Prune real networks to half their MACs and check everything that fxprune promises of the result.

    python -m model_zoo.coverage                      the 24 networks, to model_zoo/results/coverage.jsonl
    python -m model_zoo.coverage timm:resnet50        some
    python -m model_zoo.coverage --families           the smallest architecture of every timm family
    python -m model_zoo.coverage --all                every architecture of timm, on the meta device: no oracle
    python -m model_zoo.coverage --list FILE          those that a file names, one a line
    python -m model_zoo.coverage --resume             those without a passing line in the file
    python -m model_zoo.coverage --table              the file as a markdown table

Every network runs in a process of its own, so that one that fails or runs out of memory loses nothing. A check is a
small function that gets the ``Case`` and returns the reason why it fails, or "". Weights are random from a seed; so are
norm statistics, affine terms and whatever a library initialises to a constant, since a fresh network hides mistakes.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune.inputs import (
    describe_inputs,
    image_like,
    infer_inputs,
    is_batched,
    make_inputs,
    map_leaves,
    specs_of,
    tensors_of,
)
from fxprune.specs import load_model
from fxprune.verify import relative_error
from model_zoo.networks import NETWORKS, everything, families, read_list

RESULTS = Path(__file__).parent / "results" / "coverage.jsonl"
RESULTS_OF = {"families": "families.jsonl", "all": "all.jsonl"}

BUDGET_SLACK = 0.01
ORACLE_TOLERANCE = 1e-5
ONNX_TOLERANCE = 1e-3
SAME = 1e-5  # relative error of two float32 runs that compute the same in another order
DIFFERENT = 1e-3  # outputs that must differ differ by more, relative to the largest
OTHER_BATCH = 3
ONNX_BATCH = 4  # neither the recorded one, nor the exported one, nor those that fxprune.export compares
TIMEOUT = 1800  # seconds
MEMORY = 16  # GiB
DROP = 0.2
NORM_BIAS = 0.5

_VERSIONS = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


# -- a network and what is known of it --------------------------------------------------------------------------------


@dataclass
class Record:
    """One network's line in the result file. ``checks``: name -> the reason why it fails, or ""."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> dict[str, str]:
        return {name: reason for name, reason in self.checks.items() if reason}

    @property
    def passed(self) -> bool:
        return bool(self.checks) and not self.failures


@dataclass
class Case:
    """What the checks look at. ``dense``: the recorded model; ``inputs``: describes the example inputs."""

    spec: str
    flops: float
    model: nn.Module
    state: dict[str, Tensor]
    dense: fx.GraphModule
    pruned: fx.GraphModule
    inputs: dict[str, Any]
    figures: dict[str, Any]

    @property
    def report(self) -> fxprune.Report:
        report: fxprune.Report = self.pruned.meta["fxprune"]
        return report

    def run(self, module: nn.Module, batch: int | None = None, seed: int = 0) -> Any:
        """Outputs of ``module`` in its present mode on fresh random inputs, the same for the same seed."""
        args, kwargs = make_inputs(self.inputs, batch=batch, seed=seed)
        torch.manual_seed(seed)
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
    spec: str, *, flops: float = 0.5, method: str = "l2", size: Sequence[int] | None = None, onnx: bool = True
) -> Record:
    """Prune the network that ``spec`` names and run every check on the result; never raises.

    Args:
        spec: see ``fxprune.specs.load_model``.
        flops: the budget.
        method: by name.
        size: shape of one input without the batch, where it is not the one that is inferred.
        onnx: also export, and run onnxruntime.
    """
    result = Record(spec)
    with _stage(result, "load"):
        torch.manual_seed(0)
        model = load_model(spec)
        args, kwargs = infer_inputs(model) if size is None else ((image_like(model, size),), {})
        inputs = describe_inputs(args, kwargs)
        randomise(model, inputs)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if result.failures:
        return result
    with _stage(result, "prune"):
        pruned = fxprune.prune(model, args, example_kwargs=kwargs, method=method, flops=flops, progress=False)
        case = Case(spec, flops, model, state, fxprune.record(model, args, kwargs), pruned, inputs, result.figures)
        result.figures["stages"] = {stage: round(value, 2) for stage, value in case.report.seconds.items()}
        result.figures["notes"] = list(case.report.notes)
        result.figures["prunable_share"] = round(case.report.prunable_share, 4)
    if result.failures:
        return result
    for name, function in CHECKS.items():
        if name == "onnx" and not onnx:
            continue
        with _stage(result, name):
            result.checks[name] = function(case)
    result.figures["memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return result


def measure_on_meta(spec: str, *, flops: float = 0.5) -> Record:
    """Record, label, plan and rewrite without weights, with random scores; never raises."""
    result = Record(spec)
    with _stage(result, "load"), torch.device("meta"):
        model = load_model(spec)
        args, kwargs = infer_inputs(model)
    if result.failures:
        return result
    with _stage(result, "prune"):
        pruned = fxprune.prune(model, args, example_kwargs=kwargs, method="random", flops=flops, progress=False)
        report: fxprune.Report = pruned.meta["fxprune"]
        result.figures |= {
            "stages": {stage: round(value, 2) for stage, value in report.seconds.items()},
            "notes": list(report.notes),
            "prunable_share": round(report.prunable_share, 4),
            "macs_before": report.macs_before,
            "macs_after": report.macs_after,
            "ratio": report.macs_after / report.macs_before,
            "params_before": report.params_before,
            "params_after": report.params_after,
        }
        with torch.no_grad():
            before, after = (module.eval()(*args, **kwargs) for module in (model, pruned))
        if _shapes_of(before) != _shapes_of(after):
            result.checks["prune"] = f"outputs {_shapes_of(after)} instead of {_shapes_of(before)}"
        elif not flops * (1 - BUDGET_SLACK) <= result.figures["ratio"] <= flops:
            result.checks["prune"] = f"ratio {result.figures['ratio']:.4f}"
    result.figures["memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return result


@contextmanager
def _stage(result: Record, name: str) -> Iterator[None]:
    """Time a stage; what it raises becomes the reason of its failure."""
    start = time.perf_counter()
    result.checks[name] = ""
    try:
        yield
    except Exception as error:
        result.checks[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    result.seconds[name] = round(time.perf_counter() - start, 2)


def randomise(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> None:
    """Make every index of every parameter and statistic differ from every other, and keep signals alive.

    The library's own initialisation stays where it is random. What is 1-D or constant (zero heads, layer scales of
    1e-6, fresh affine terms) is drawn anew. Batch norms get random statistics at the scale of what they see: at an
    arbitrary scale the output of a deep network no longer depends on its input. Their biases are positive in the mean,
    since deep random networks of centred norms and ReLUs amplify rounding errors a thousandfold.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return (torch.randn(like.shape, generator=generator) * std).to(like)

    def positive(like: Tensor) -> Tensor:
        return (torch.rand(like.shape, generator=generator) + 0.5).to(like)

    def calibrate(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        power = args[0].square().mean([dim for dim in range(args[0].ndim) if dim != 1]) + 1e-4
        norm.running_mean.copy_(normal(power, 0.2) * power.sqrt())
        norm.running_var.copy_(power * positive(power))

    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, _, last = name.rpartition(".")
            if last.endswith("bias"):
                parameter.copy_(normal(parameter, 0.2) + (NORM_BIAS if owner in norms else 0.0))
            elif parameter.ndim < 2:
                parameter.copy_(positive(parameter))
            elif bool((parameter == parameter.flatten()[0]).all()):
                parameter.copy_(normal(parameter, (parameter.shape[0] / parameter.numel()) ** 0.5))
        hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms.values()]
        args, kwargs = make_inputs(inputs, batch=2, seed=seed)
        model(*args, **kwargs)
        for hook in hooks:
            hook.remove()


# -- checks -----------------------------------------------------------------------------------------------------------


def count_macs(module: nn.Module, args: Any, kwargs: Any) -> int:
    """Multiply-accumulates by torch's own counter, which counts two operations for each.

    It counts nothing of the fused kernel that nn.MultiheadAttention takes in eval mode; that one is switched off.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    learned = [p for p in module.parameters() if p.requires_grad]  # the counter trips over a parameter that is an input
    torch.backends.mha.set_fastpath_enabled(False)
    module.requires_grad_(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
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
    ratio = case.figures["ratio"]
    if (1 - BUDGET_SLACK) * case.flops <= ratio <= case.flops:
        return ""
    return f"{ratio:.4f} of the MACs stay; the budget is {case.flops}"


@check("oracle")
def _oracle(case: Case) -> str:
    """The masked dense model computes the same, and what it computes depends on the input."""
    error = case.report.oracle_error
    case.figures["oracle"] = error
    if error is None or not error <= ORACLE_TOLERANCE:
        return f"relative error {error}"
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
    dead = [name for name, grad in pruned.items() if not grad.any() and name in dense and dense[name].any()]
    if dead:
        return f"zero gradients for {len(dead)} parameters: {', '.join(dead[:3])}"
    broken = [name for name, grad in pruned.items() if not grad.isfinite().all()]
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
        calm = case.run(module.eval(), OTHER_BATCH)
        _train_without_norms(module)
        one, again, other = (case.run(module, OTHER_BATCH, seed) for seed in (0, 0, 5))
        if not _equal(one, again):
            return f"the {name} in train mode differs from run to run with one seed"
        calm_other = case.run(module.eval(), OTHER_BATCH, 5)
        reactions[name] = (_differ(one, calm), _differ(other, calm_other))
        if not _equal(case.run(module.eval(), OTHER_BATCH), calm):
            return f"the {name} is not what it was after train() and eval()"
    case.figures["reacts"] = reactions["original"][0]
    if reactions["original"] == reactions["pruned"]:
        return ""
    return f"train and eval differ, original {reactions['original']}, pruned {reactions['pruned']}"


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


def _gradients(case: Case, module: nn.Module) -> dict[str, Tensor]:
    """Parameter -> gradient of the sum of all outputs' squares, in train mode, batch 2; ``module`` stays as it was."""
    module = copy.deepcopy(module).train()
    args, kwargs = make_inputs(case.inputs, batch=2)
    torch.manual_seed(0)
    loss = sum(output.square().sum() for output in tensors_of(module(*args, **kwargs)))
    assert isinstance(loss, Tensor)
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def _stochastic(spec: str) -> tuple[nn.Module, dict[str, float]]:
    """A fresh instance with dropout and stochastic depth where the network has such options, and the options."""
    library, _, name = spec.partition(":")
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
            return make(**chosen), chosen
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


# -- the result file --------------------------------------------------------------------------------------------------


def header(command: str) -> dict[str, Any]:
    """What a result depends on besides the code."""
    installed = {d.metadata["Name"].lower() for d in metadata.distributions() if d.metadata["Name"]}
    return {
        "fxprune": fxprune.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _VERSIONS if name in installed},
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def read(path: Path = RESULTS) -> tuple[dict[str, Any], dict[str, Record]]:
    """The header and the last record of every network."""
    head, *lines = (json.loads(line) for line in path.read_text().splitlines())
    return head, {line["name"]: Record(**line) for line in lines if "name" in line}


def table(records: Iterable[Record]) -> str:
    """A markdown table, one line per network."""
    rows = [
        "| network | GMACs | pruned | ratio | parameters | prunable MACs | masked ≡ pruned | ONNX | GiB | s | checks |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for record in records:
        f = record.figures
        bad = record.failures
        state = f"{len(record.checks)} pass" if not bad else f"**fails: {', '.join(bad)}**"
        if "ratio" not in f:
            rows.append(f"| {record.name} | | | | | | | | | | {state}{': ' if bad else ''}{'; '.join(bad.values())} |")
            continue
        cells = [
            record.name,
            f"{f['macs_before'] / 1e9:.3f}",
            f"{f['macs_after'] / 1e9:.3f}",
            f"{f['ratio']:.4f}",
            f"{f['params_before'] / 1e6:.2f} M → {f['params_after'] / 1e6:.2f} M",
            f"{f['prunable_share']:.1%}" if "prunable_share" in f else "–",
            *(f"{f[key]:.0e}" if f.get(key) is not None else "–" for key in ("oracle", "onnx")),
            f"{f.get('memory_gib', 0):.1f}",
            f"{sum(record.seconds.values()):.0f}",
            state,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def write_page(results: Path) -> None:
    """The result file as a page beside it: what it was made with, and the table."""
    head, records = read(results)
    passed = sum(record.passed for record in records.values())
    made = ", ".join(f"{key} {value}" for key, value in head.items())
    lines = [f"# {passed} of {len(records)} networks pass every check", "", made, "", table(records.values())]
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")


def run_apart(spec: str, options: argparse.Namespace) -> Record:
    """``measure`` in a process of its own."""
    command = [sys.executable, "-m", "model_zoo.coverage", "--here", spec, "--flops", str(options.flops)]
    command += ["--method", options.method, "--onnx" if options.onnx else "--no-onnx"]
    command += ["--meta"] if options.meta else []
    limit = options.memory * 2**30
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=options.timeout,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
            cwd=Path(__file__).parents[1],
            env={"OMP_WAIT_POLICY": "passive", **os.environ},  # idle threads sleep: cores may be shared
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Record(spec, checks={"process": f"no end within {options.timeout} s"})
    try:
        return Record(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        said = " ".join(done.stderr.split())[-400:]
        return Record(spec, checks={"process": f"exit code {done.returncode} (-9: out of memory): {said}"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if a check failed."""
    options = _options(argv)
    if options.here:
        warnings.simplefilter("ignore")
        if options.meta:
            record = measure_on_meta(options.here, flops=options.flops)
        else:
            record = measure(options.here, flops=options.flops, method=options.method, onnx=options.onnx)
        print(json.dumps(asdict(record)))
        return 0
    if options.table:
        print(table(read(options.out)[1].values()))
        return 0
    records: dict[str, Record] = {}
    if options.resume and options.out.exists():
        records = read(options.out)[1]
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        words = [*options.names, "--flops", str(options.flops), "--method", options.method]
        words += [] if options.onnx else ["--no-onnx"]
        words += [f"--{flag}" for flag in RESULTS_OF if getattr(options, flag)]
        options.out.write_text(json.dumps(header(" ".join(["python -m model_zoo.coverage", *words]))) + "\n")
    todo = [spec for spec in _chosen(options) if not (spec in records and records[spec].passed)]
    with ThreadPoolExecutor(options.jobs) as pool:
        for record in pool.map(partial(run_apart, options=options), todo):
            records[record.name] = record
            with options.out.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")
            state = "ok" if record.passed else "; ".join(f"{n}: {why}" for n, why in record.failures.items())
            ratio = record.figures.get("ratio", float("nan"))
            print(f"{record.name}: {sum(record.seconds.values()):.0f} s, ratio {ratio:.4f}, {state}", flush=True)
    write_page(options.out)
    failed = [name for name, record in records.items() if not record.passed]
    print(f"{len(records) - len(failed)} of {len(records)} networks pass every check")
    return 1 if failed else 0


def _chosen(options: argparse.Namespace) -> Sequence[str]:
    if options.families:
        return families()
    if options.all:
        return everything()
    return read_list(options.list) if options.list else options.names or NETWORKS


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m model_zoo.coverage", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="timm:NAME or torchvision:NAME (default: the 24)")
    parser.add_argument("--families", action="store_true", help="the smallest architecture of every timm family")
    parser.add_argument("--all", action="store_true", help="every architecture of timm, on the meta device")
    parser.add_argument("--list", type=Path, help="a file with one name a line")
    parser.add_argument("--meta", action="store_true", help="without weights: record, label, plan, rewrite")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time (default: 1)")
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help=f"seconds for a network (default: {TIMEOUT})")
    parser.add_argument("--memory", type=int, default=MEMORY, help=f"GiB for a network (default: {MEMORY})")
    parser.add_argument("--out", type=Path, help="result file, one JSON object per line")
    parser.add_argument("--resume", action="store_true", help="keep the file, run what has no passing line in it")
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True, help="export and check ONNX")
    parser.add_argument("--flops", type=float, default=0.5, help="budget (default: 0.5)")
    parser.add_argument("--method", default="l2", help="method (default: l2)")
    parser.add_argument("--table", action="store_true", help="print the result file as a markdown table")
    parser.add_argument("--here", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.meta |= options.all
    if options.out is None:
        name = next((file for flag, file in RESULTS_OF.items() if getattr(options, flag)), RESULTS.name)
        options.out = RESULTS.with_name(name)
    return options


if __name__ == "__main__":
    sys.exit(main())
