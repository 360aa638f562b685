"""An ONNX file in onnxruntime next to the network in torch: on fresh inputs, on every execution provider."""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.deploy import runtime
from fxprune.deploy.batches import BATCHES
from fxprune.deploy.flat import Flat
from fxprune.deploy.onnx_file import PLAN_DIGEST, OnnxFile
from fxprune.errors import ExampleInputsError, ExportError, GuardError, InputError, first_line
from fxprune.io.files import as_path
from fxprune.recording import evaluated
from fxprune.recording.checks import check_module
from fxprune.recording.inputs import (
    TensorSpec,
    batch_size,
    describe_inputs,
    image_size,
    is_batched,
    is_image,
    make_inputs,
    resized,
    resolve_inputs,
    specs_of,
    tensors_of,
)
from fxprune.reports.report import REPORT_KEY, pruned_parts

TOLERANCE = 1e-3
"""Largest accepted difference of an output, relative to its largest magnitude."""
HALF_TOLERANCE = 1e-2
"""The same for float16, whose own rounding is 5e-4."""

# None of them is the size that a network is exported with. The first is also the batch size of the latency.

_DRAWS = 4  # of inputs, where the network itself does not say what it computes of some of them
_SHAKE, _SHAKEN = 0.01, 16  # by how much of the tolerance its inputs are changed to find out, and how often


@dataclass(frozen=True)
class Run:
    """One execution provider.

    Attributes:
        provider: its name in onnxruntime.
        max_abs_error: largest absolute difference over all elements of all outputs.
        max_rel_error: largest over the outputs of: largest difference / largest magnitude of the output in torch.
        latency_ms: median wall time of one run at the first batch size, inputs and outputs on the provider's device.
    """

    provider: str
    max_abs_error: float
    max_rel_error: float
    latency_ms: float


@dataclass(frozen=True)
class Validation:
    """What onnxruntime computed from an ONNX file, next to what torch computes.

    Attributes:
        path: the file.
        opset: version of the ONNX operator set it uses.
        dtype: of its first floating-point input, such as "float32"; of its first output where inputs are integers.
        max_abs_error, max_rel_error: the largest of all runs.
        provider, latency_ms: those of the first run, which is on CUDA if that works here.
        runs: one per execution provider.
        batches: the batch sizes of the comparison; the latency is that of the first.
        sizes: heights and widths of the comparison; one where they are fixed, none where the network takes no image.
        skipped: execution providers of this onnxruntime that did not run it, and why.
        redrawn: where other inputs than the first decided, and why.
        metadata: what the file says of itself (``metadata_props``).

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> validation = fxprune.export(small, "small.onnx", provider="CPUExecutionProvider")
        >>> validation.dtype, validation.provider, len(validation.runs)
        ('float32', 'CPUExecutionProvider', 1)
    """

    path: Path
    opset: int
    dtype: str
    max_abs_error: float
    max_rel_error: float
    provider: str
    latency_ms: float
    runs: tuple[Run, ...]
    batches: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    skipped: Mapping[str, str]
    redrawn: tuple[str, ...]
    metadata: Mapping[str, str]
    torch_version: str
    onnxruntime_version: str

    def __str__(self) -> str:
        sizes = f" and sizes {', '.join(map(_pixels, self.sizes))}" if len(self.sizes) > 1 else ""
        half = " in float16" if self.dtype == "float16" else ""
        latencies = ", ".join(f"{run.latency_ms:.2f} ms on {run.provider}" for run in self.runs)
        return (
            f"{self.path}: opset {self.opset}{half}, max error {self.max_abs_error:.1e} absolute, "
            f"{self.max_rel_error:.1e} relative at batch sizes {', '.join(map(str, self.batches))}{sizes}; "
            f"{latencies} at batch size {self.batches[0]}"
            f"{''.join(f'; inputs drawn anew: {why}' for why in self.redrawn)} "
            f"(onnxruntime {self.onnxruntime_version}, torch {self.torch_version})"
        )


def validate(
    path: str | os.PathLike[str],
    module: nn.Module,
    example_inputs: Any = None,
    example_kwargs: Any = None,
    provider: str | None = None,
) -> Validation:
    """Check an ONNX file with onnxruntime against the network it was exported from, in eval mode, on fresh inputs.

    The inputs are near the example's: floats are standard normal, or of its range where none is negative, integers the
    example's in another order (its own where the network refuses that), masks the example's. Whatever the file leaves
    open is tried: several batch sizes, and other heights and widths, but for those that the recording of the network
    does not cover. A file in float16 is compared with what the network computes in its own dtype. Where an output
    differs, and does in torch, too, when the floats change by a hundredth of the tolerance, other inputs decide, if
    there are any: of two scores that are all but equal rounding says which a top-k puts first.

    Args:
        path: the file.
        module: the network; left as it was.
        example_inputs: a tensor, or a tuple of the positional arguments; inferred where possible.
        example_kwargs: keyword arguments.
        provider: onnxruntime's execution provider; every one that works here if not given, CUDA first. Those that build
            engines for minutes or call a service (TensorRT, Azure) are used only when named.

    Raises:
        InputError: there is no such file or provider.
        ExampleInputsError: inputs that are missing, or that do not run.
        ExportError: the file is damaged, is that of another network or cut, or computes something else.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> _ = fxprune.export(small, "small.onnx")
        >>> fxprune.validate("small.onnx", small, provider="CPUExecutionProvider").provider
        'CPUExecutionProvider'
    """
    path = as_path(path)
    check_module("module", module)
    runtime.check_provider(provider)
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}")
    flat = Flat(module, describe_inputs(*resolve_inputs(module, example_inputs, example_kwargs)))
    with evaluated(module):
        return check(path, flat, provider)


def check(path: Path, flat: Flat, provider: str | None) -> Validation:
    """``validate`` of a network in eval mode.

    Raises:
        ExampleInputsError, ExportError: see ``validate``.
    """
    file = OnnxFile.read(path)
    _check_fit(file, flat)
    with full_precision():
        trials, expected = _expected(file, flat)
    names, skipped = runtime.providers_to_try(provider)
    runs: list[Run] = []
    redrawn: list[str] = []
    for name in names:
        try:
            session = runtime.Session(path, name)
        except ExportError as error:
            if name in (provider, runtime.CPU):
                raise
            skipped[name] = str(error)  # its libraries need not be those of torch
            continue
        compared = [_compare(*pair, flat, file, session) for pair in zip(trials, expected, strict=True)]
        trials, expected = [each.trial for each in compared], [each.expected for each in compared]
        redrawn += [why for each in compared for why in each.redrawn]
        latency = session.latency_ms(trials[0].feeds(file, flat))
        runs.append(Run(name, max(e.absolute for e in compared), max(e.relative for e in compared), latency))
    return Validation(
        path=path,
        opset=file.opset,
        dtype=str(file.dtype).removeprefix("torch."),
        max_abs_error=max(each.max_abs_error for each in runs),
        max_rel_error=max(each.max_rel_error for each in runs),
        provider=runs[0].provider,
        latency_ms=runs[0].latency_ms,
        runs=tuple(runs),
        batches=tuple(dict.fromkeys(trial.batch for trial in trials)),
        sizes=tuple(dict.fromkeys(trial.size for trial in trials if trial.size is not None)),
        skipped=skipped,
        redrawn=tuple(redrawn),
        metadata=file.metadata,
        torch_version=str(torch.__version__),
        onnxruntime_version=runtime.version(),
    )


@dataclass(frozen=True)
class _Trial:
    """Inputs to compare on.

    ``record``: as in ``fxprune.recording.inputs``, at this size; ``size``: None without an image; ``permute``: whether
    integers are in another order than the example's; ``draw``: which inputs of these sizes.
    """

    record: Mapping[str, Any]
    batch: int
    size: tuple[int, int] | None
    remedy: str
    permute: bool = True
    draw: int = 0

    @property
    def specs(self) -> list[TensorSpec]:
        return specs_of(self.record)

    def feeds(self, file: OnnxFile, flat: Flat) -> list[Tensor]:
        """The input tensors in the dtypes of the file, always the same."""
        seed = self.batch + 1000 * self.draw
        made = tensors_of(make_inputs(self.record, flat.device, self.batch, seed, self.permute))
        return [tensor.to(dtype) for tensor, dtype in zip(made, file.dtypes, strict=True)]

    def in_torch(self, file: OnnxFile, flat: Flat) -> list[Tensor]:
        """What the network makes of them, in its own dtypes; refuses as ``run`` does."""
        tensors = [tensor.to(spec.dtype) for tensor, spec in zip(self.feeds(file, flat), self.specs, strict=True)]
        return [tensor.cpu() for tensor in tensors_of(run(flat, tensors, self.remedy))]


def _check_fit(file: OnnxFile, flat: Flat) -> None:
    specs = specs_of(flat.record)
    fits = [len(shape) for shape in file.shapes] == [len(spec.shape) for spec in specs] and all(
        isinstance(size, str) or size == own or (dim == 0 and is_batched(spec, flat.record))
        for shape, spec in zip(file.shapes, specs, strict=True)
        for dim, (size, own) in enumerate(zip(shape, spec.shape, strict=True))
    )
    if not fits:
        taken = ", ".join(str(list(spec.shape)) for spec in specs)
        raise ExportError(
            f"{str(file.path)!r} is the file of another network: it takes {file.described()}, and {flat.name} {taken}"
        )
    own = [part.meta[REPORT_KEY].plan.digest for _, part in pruned_parts(flat.module)]
    digest = file.metadata.get(PLAN_DIGEST)
    if digest is not None and len(own) == 1 and digest != own[0]:
        raise ExportError(
            f"{str(file.path)!r} is the file of another cut: its plan has the digest {digest[:12]}…, that of this "
            f"{flat.name} {own[0][:12]}…"
        )


def _trials(file: OnnxFile, record: Mapping[str, Any]) -> list[_Trial]:
    """Several batch sizes, and twice the height or the width (multiples stay multiples), where they are open."""
    shapes = list(zip(file.shapes, specs_of(record), strict=True))
    first = next((shape[0] for shape, spec in shapes if is_batched(spec, record)), "?")
    batches = BATCHES if isinstance(first, str) else (first,)
    size = image_size(record)
    remedy = "an export needs inputs whose dim 0 is a batch of any size"
    trials = [_Trial(record, batch, size, remedy) for batch in batches]
    image = next((shape for shape, spec in shapes if is_image(spec, record)), ())
    if size is not None and all(isinstance(each, str) for each in image[-2:]):
        height, width = size
        remedy = "its height and width are not free: leave out dynamic_size"
        for batch, other in zip((batches[-1], batches[0]), ((height, 2 * width), (2 * height, width)), strict=True):
            trials.append(_Trial(resized(record, other), batch, other, remedy))
    return trials


def _expected(file: OnnxFile, flat: Flat) -> tuple[list[_Trial], list[list[Tensor]]]:
    """What to compare on and what the network makes of it, at all sizes that its recording covers."""
    trials: list[_Trial] = []
    expected: list[list[Tensor]] = []
    own = _Trial(flat.record, batch_size(flat.record) or 1, image_size(flat.record), "these are the example's sizes")
    for trial in (*_trials(file, flat.record), own):
        if trial is own and trials:
            continue
        try:
            trial, outputs = _near_or_own(trial, file, flat)
        except GuardError:
            if trial is own:
                raise
            continue
        trials.append(trial)
        expected.append(outputs)
    return trials, expected


def _near_or_own(trial: _Trial, file: OnnxFile, flat: Flat) -> tuple[_Trial, list[Tensor]]:
    """With integers near the example's, or its own where the network refuses those."""
    try:
        return trial, trial.in_torch(file, flat)
    except (ExampleInputsError, ExportError):
        if any(spec.is_ids for spec in trial.specs):
            own = replace(trial, permute=False)
            with contextlib.suppress(ExampleInputsError, ExportError):
                return own, own.in_torch(file, flat)
        raise


def run(flat: Flat, tensors: Sequence[Tensor], remedy: str) -> Any:
    """What the module returns in torch; refuses what no ONNX file could be compared with.

    Raises:
        GuardError: a recorded graph does not cover these sizes.
        ExampleInputsError: the network fails otherwise.
        ExportError: NaN, or a dtype that onnxruntime does not take.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints what fails before it raises
            outputs = flat.call(tensors)
    except GuardError:
        raise
    except Exception as error:
        shapes = [list(tensor.shape) for tensor in tensors]
        raise ExampleInputsError(
            f"{flat.name} fails on random inputs of the shapes {shapes}: {first_line(error)}; {remedy}"
        ) from error
    found = tensors_of(outputs)
    if any(tensor.dtype == torch.bfloat16 for tensor in (*tensors, *found)):
        raise ExportError("onnxruntime has no bfloat16 kernels to check most networks with; export model.float()")
    if any(tensor.isnan().any() for tensor in found):
        raise ExportError(
            "the outputs are NaN in torch already, so that no file can be checked; look at the weights, and at whether "
            "the example inputs show what the network takes (positive numbers only, say)"
        )
    return outputs


@dataclass(frozen=True)
class _Compared:
    """The inputs that decided, what torch makes of them, the largest errors of all outputs, why no others decided."""

    trial: _Trial
    expected: list[Tensor]
    absolute: float
    relative: float
    redrawn: tuple[str, ...] = ()


def _compare(trial: _Trial, expected: list[Tensor], flat: Flat, file: OnnxFile, session: runtime.Session) -> _Compared:
    """The errors of the session's outputs; refuses one above tolerance, unless the inputs are no measure."""
    feeds = trial.feeds(file, flat)
    where = f"batch size {trial.batch}"
    if trial.size not in (None, image_size(flat.record)):
        where += f" and {_pixels(trial.size)}"
    actual = session.run(feeds)
    shapes, shapes_expected = ([list(tensor.shape) for tensor in side] for side in (actual, expected))
    if shapes != shapes_expected:
        raise ExportError(f"the exported file returns the shapes {shapes} at {where}, torch {shapes_expected}")
    errors = [_error(*pair) for pair in zip(actual, expected, strict=True)]
    for number, (found, output, (_, relative)) in enumerate(zip(actual, expected, errors, strict=True)):
        half = found.dtype == torch.float16
        tolerance = HALF_TOLERANCE if half else TOLERANCE
        if relative <= tolerance:
            continue
        tensors = [t.to(spec.dtype) for t, spec in zip(feeds, trial.specs, strict=True)]
        _check_deterministic(flat, tensors)
        remedy = "; float16 rounds and overflows: export without half" if half and output.dtype != found.dtype else ""
        by = _SHAKE * tolerance
        moved = _moved(flat, tensors, number, output, by)
        if moved > tolerance:
            why = f"in torch, too, it moves by {moved:.1e} when the inputs do by {by:.0e}"
            other = _another(trial, file, flat)
            if other is not None:
                result = _compare(*other, flat, file, session)
                told = f"output {number} is off by {relative:.1e} on {session.provider} at {where}, but {why}"
                return replace(result, redrawn=(told, *result.redrawn))
            remedy = f"; {why}, so that nothing decides: look at the weights"
        raise ExportError(
            f"the exported file does not compute what torch does: output {number} is off by {relative:.1e} of its "
            f"largest magnitude on {session.provider} at {where}, tolerance {tolerance:.0e}{remedy}"
        )
    absolute, relative = (max((error[kind] for error in errors), default=0.0) for kind in (0, 1))
    return _Compared(trial, expected, absolute, relative)


def _another(trial: _Trial, file: OnnxFile, flat: Flat) -> tuple[_Trial, list[Tensor]] | None:
    """Other inputs of these sizes and what torch makes of them; None, where enough were tried."""
    for draw in range(trial.draw + 1, _DRAWS):
        with contextlib.suppress(GuardError, ExampleInputsError), full_precision():
            return _near_or_own(replace(trial, draw=draw), file, flat)
    return None


def _check_deterministic(flat: Flat, tensors: Sequence[Tensor]) -> None:
    """Refuse a network that is random by itself: the file is not to blame."""
    first, second = (tensors_of(flat.call(tensors)) for _ in range(2))
    if not all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(first, second, strict=True)):
        raise ExportError(
            f"{flat.name} returns something else at every run, in eval mode too, so that no file "
            "can be checked; look for random operations, for instance a dropout that does not ask self.training"
        )


def _moved(flat: Flat, tensors: Sequence[Tensor], number: int, output: Tensor, by: float) -> float:
    """How much this output changes in torch when every float of the inputs does, relative to its largest magnitude."""
    generator, most = torch.Generator().manual_seed(0), 0.0

    def shaken(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor * (1 + by * noise) if tensor.is_floating_point() else tensor

    if not any(tensor.is_floating_point() for tensor in tensors):
        return most
    for _ in range(_SHAKEN):
        with contextlib.suppress(GuardError), full_precision():
            found = tensors_of(flat.call([shaken(tensor) for tensor in tensors]))[number].cpu()
            most = max(most, _error(found, output)[1] if found.shape == output.shape else float("inf"))
    return most


def _error(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the same over the largest magnitude of ``expected``."""
    actual, expected = actual.double(), expected.double()
    if not expected.numel():
        return 0.0, 0.0
    # Masked attention may put out infinities; equal ones agree, though inf - inf is not 0.
    difference = torch.where(actual == expected, 0.0, (actual - expected).abs()).max().item()
    magnitude = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    if not difference:
        return 0.0, 0.0
    return difference, difference / magnitude if magnitude else float("inf")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Float32 means float32: TF32 on the GPU would hide an error, or be one."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    switches: list[tuple[Any, str, Any]]
    if hasattr(matmul, "fp32_precision"):
        # torch raises when the older switches are read after the newer ones were set.
        switches = [(kind, "fp32_precision", "ieee") for kind in (matmul, cudnn.conv, cudnn.rnn)]
    else:
        switches = [(kind, "allow_tf32", False) for kind in (matmul, cudnn)]
    before = [getattr(kind, name) for kind, name, _ in switches]
    try:
        for kind, name, value in switches:
            setattr(kind, name, value)
        yield
    finally:
        for (kind, name, _), value in zip(switches, before, strict=True):
            setattr(kind, name, value)


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
