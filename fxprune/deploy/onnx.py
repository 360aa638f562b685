"""ONNX export that is checked: torch.export with a dynamic batch, torch.onnx, then onnxruntime against torch.

The network is exported behind :class:`_Flat`, which takes the tensors of the inputs one by one and returns the tensors
of the outputs. So the ONNX graph's inputs and outputs are exactly the tensor leaves of the model's, in pytree order,
whatever the nesting and however the user ordered the keyword arguments, and what is no tensor (a number, a None) is not
in the file.
"""

import contextlib
import inspect
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxprune.deploy import runtime
from fxprune.errors import ExampleInputsError, ExportError
from fxprune.files import check_writable, replacing
from fxprune.inputs import (
    TensorSpec,
    describe_inputs,
    is_batched,
    make_inputs,
    map_leaves,
    resolve_inputs,
    specs_of,
    tensors_of,
)

TOLERANCE = 1e-3
"""Largest accepted difference of an output, relative to its largest magnitude."""
HALF_TOLERANCE = 1e-2
"""The same for float16, whose own rounding is 5e-4."""

# torch.export takes a size of 1 for a constant, so the network is exported with 2; checked with what it has not seen.
_EXPORT_BATCH = 2
_CHECK_BATCH = 3
_LATENCY_BATCH = 1


@dataclass(frozen=True)
class Validation:
    """What onnxruntime computed from an exported file, next to what torch computes.

    Attributes:
        path: the file.
        opset: version of the ONNX operator set it uses.
        max_abs_error: largest absolute difference over all elements of all outputs.
        max_rel_error: largest over the outputs of: largest difference / largest magnitude of the output in torch.
        provider: the execution provider that ran it.
        batch: the batch size of the comparison, which is not the exported one. Batch size 1 was compared too.
        latency_ms: median wall time of one run at batch size 1, inputs and outputs on the provider's device.
    """

    path: Path
    opset: int
    max_abs_error: float
    max_rel_error: float
    provider: str
    batch: int
    latency_ms: float
    torch_version: str
    onnxruntime_version: str

    def __str__(self) -> str:
        return (
            f"{self.path}: opset {self.opset}, max error {self.max_abs_error:.1e} absolute, {self.max_rel_error:.1e} "
            f"relative at batch size {self.batch}; {self.latency_ms:.2f} ms at batch size {_LATENCY_BATCH} "
            f"({self.provider}, onnxruntime {self.onnxruntime_version}, torch {self.torch_version})"
        )


def export(
    module: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    example_kwargs: Any = None,
    provider: str | None = None,
) -> Validation:
    """Write ``module`` as an ONNX file with a dynamic batch, and check it with onnxruntime against torch.

    Batch is dim 0 of the first input tensor and of all that agree with it there. The comparison is in eval mode, on
    fresh random inputs of another batch size than the exported one; the module is left as it was. A file appears at
    ``path`` only after it was found right; where the weights come near 2 GB they go to ``<path>.data`` beside it.

    Args:
        module: the network, as a rule what ``fxprune.prune`` returned.
        path: where to write.
        example_inputs: a tensor, or a tuple of the positional arguments; inferred where possible.
        example_kwargs: keyword arguments.
        provider: onnxruntime's execution provider; CUDA if that works here, else the CPU.

    Raises:
        InputError: ``path`` cannot be written, or there is no such provider.
        ExampleInputsError: inputs that are missing, or that do not run with another batch size.
        ExportError: the network cannot be exported, or the exported file computes something else. No file is left.
    """
    path = check_writable(path)
    runtime.check_provider(provider)
    record = describe_inputs(*resolve_inputs(module, example_inputs, example_kwargs))
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    flat = _Flat(module, record)

    def tensors(batch: int) -> list[Tensor]:
        return tensors_of(make_inputs(record, device, batch, seed=batch))

    with _eval_mode(module), torch.no_grad(), replacing(path) as draft:
        opset = _write(flat, tensors(_EXPORT_BATCH), draft)
        session = runtime.open_session(draft, provider)
        errors = [_compare(flat, session, tensors(batch)) for batch in (_CHECK_BATCH, _LATENCY_BATCH)]
        latency = session.latency_ms(tensors(_LATENCY_BATCH))
    return Validation(
        path=path,
        opset=opset,
        max_abs_error=max(absolute for absolute, _ in errors),
        max_rel_error=max(relative for _, relative in errors),
        provider=session.provider,
        batch=_CHECK_BATCH,
        latency_ms=latency,
        torch_version=str(torch.__version__),
        onnxruntime_version=runtime.version(),
    )


def write_unchecked(module: nn.Module, record: Mapping[str, Any], path: Path) -> None:
    """The file that ``export`` would write, compared with nothing: to be timed.

    Raises:
        ExampleInputsError, ExportError: see ``export``.
    """
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    tensors = tensors_of(make_inputs(record, device, _EXPORT_BATCH, seed=_EXPORT_BATCH))
    with _eval_mode(module), torch.no_grad():
        _write(_Flat(module, record), tensors, path)


class _Flat(nn.Module):
    """``module`` as a function from tensors to a tuple of tensors; what is no tensor is built in.

    Attributes:
        record: the example inputs of ``module``, see ``fxprune.inputs.describe_inputs``.
    """

    def __init__(self, module: nn.Module, record: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.record = record

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with _FoldedAttention():
            return tuple(tensors_of(self.call(tensors)))

    def call(self, tensors: Sequence[Tensor]) -> Any:
        """What ``module`` returns for these tensors."""
        remaining = iter(tensors)
        filled = map_leaves(lambda leaf: next(remaining) if isinstance(leaf, TensorSpec) else leaf, dict(self.record))
        return self.module(*filled["args"], **filled["kwargs"])


class _FoldedAttention(TorchFunctionMode):
    """Attention with one batch dimension, whatever it was called with: torch.onnx knows no other."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _folded_attention(*args, **(kwargs or {}))


def _folded_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any,
                      **options: Any) -> Tensor:  # fmt: skip
    if query.ndim in (2, 4):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **options)
    batch = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in (query, key, value)))

    def folded(tensor: Tensor) -> Tensor:
        return tensor.expand(*batch, *tensor.shape[-3:]).reshape(-1, *tensor.shape[-3:])

    mask = folded(attn_mask) if attn_mask is not None and attn_mask.ndim > 3 else attn_mask
    result = F.scaled_dot_product_attention(folded(query), folded(key), folded(value), mask, *rest, **options)
    return result.reshape(*batch, *result.shape[-3:])


def _write(flat: _Flat, tensors: Sequence[Tensor], path: Path) -> int:
    """Export to ``path``; returns the opset version."""
    outputs = _run(flat, tensors)
    shapes = torch.export.ShapesCollection()
    batch = torch.export.Dim("batch", min=1)
    for tensor, spec in zip(tensors, specs_of(flat.record), strict=True):
        if is_batched(spec, flat.record):
            shapes[tensor] = {0: batch}
    name = type(flat.module).__name__
    with _quiet():
        try:
            exported = torch.export.export(flat, tuple(tensors), dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise ExportError(
                f"torch.export cannot capture {name} with a dynamic batch: {_capture_reason(error)}; "
                "its forward must take sizes from x.shape and not branch on the values of tensors"
            ) from error
        try:
            program = torch.onnx.export(exported, dynamo=True, verbose=False)
            assert program is not None
        except Exception as error:
            raise ExportError(f"torch.onnx cannot write {name}: {runtime.first_line(_root(error))}") from error
        _register_constants(program.model)
        _rename(program.model, _input_names(flat), _output_names(outputs))
        program.save(path)
    return int(program.model.opset_imports[""])


def _run(flat: _Flat, tensors: Sequence[Tensor]) -> Any:
    """What the module returns in torch; refuses what no ONNX file could be compared with."""
    try:
        outputs = flat.call(tensors)
    except Exception as error:
        shapes = [list(tensor.shape) for tensor in tensors]
        raise ExampleInputsError(
            f"{type(flat.module).__name__} fails on random inputs of the shapes {shapes}: {runtime.first_line(error)}; "
            "an export needs inputs whose dim 0 is a batch of any size"
        ) from error
    found = tensors_of(outputs)
    if any(tensor.dtype == torch.bfloat16 for tensor in (*tensors, *found)):
        raise ExportError("onnxruntime has no bfloat16 kernels to check most networks with; export model.float()")
    if any(tensor.isnan().any() for tensor in found):
        raise ExportError("the outputs are NaN in torch already, so that no file can be checked; look at the weights")
    return outputs


def _compare(flat: _Flat, session: runtime.Session, tensors: Sequence[Tensor]) -> tuple[float, float]:
    """Largest absolute and largest relative error of the session's outputs; refuses an error above tolerance."""
    with _full_precision():
        expected = [tensor.cpu() for tensor in tensors_of(_run(flat, tensors))]
    actual = session.run(tensors)
    shapes, shapes_expected = ([list(tensor.shape) for tensor in side] for side in (actual, expected))
    if shapes != shapes_expected:
        raise ExportError(
            f"the exported file returns the shapes {shapes} at batch size {len(tensors[0])}, torch {shapes_expected}"
        )
    errors = [_error(*pair) for pair in zip(actual, expected, strict=True)]
    for number, (output, (_, relative)) in enumerate(zip(expected, errors, strict=True)):
        tolerance = HALF_TOLERANCE if output.dtype == torch.float16 else TOLERANCE
        if not relative <= tolerance:
            _check_deterministic(flat, tensors)
            raise ExportError(
                f"the exported file does not compute what torch does: output {number} is off by {relative:.1e} of its "
                f"largest magnitude on {session.provider} at batch size {len(tensors[0])}, tolerance {tolerance:.0e}"
            )
    return max((absolute for absolute, _ in errors), default=0.0), max(
        (relative for _, relative in errors), default=0.0
    )


def _check_deterministic(flat: _Flat, tensors: Sequence[Tensor]) -> None:
    """Refuse a network that is random by itself: the file is not to blame."""
    first, second = (tensors_of(flat.call(tensors)) for _ in range(2))
    if not all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(first, second, strict=True)):
        raise ExportError(
            f"{type(flat.module).__name__} returns something else at every run, in eval mode too, so that no file "
            "can be checked; look for random operations, for instance a dropout that does not ask self.training"
        )


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


def _register_constants(model: Any) -> None:
    """Put constants that nodes use and the graph has lost back into it.

    The rewriter of onnxscript names the bounds of a clip after what is clipped; where one tensor is clipped several
    times, as before the projections of queries, keys and values, only the last of the equal names is kept.
    """
    graph = model.graph
    for node in graph.all_nodes():
        for value in node.inputs:
            lost = value is not None and value.producer() is None and value.const_value is not None
            if lost and not value.is_initializer() and not value.is_graph_input():
                names = (value.name, *(f"{value.name}_{n}" for n in range(len(graph.initializers))))
                value.name = next(name for name in names if name not in graph.initializers)
                graph.initializers[value.name] = value


def _rename(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Give an ONNX model the user's names: of the arguments, the outputs, the parameters, and "batch" for its size."""
    import onnx_ir

    graph = model.graph
    values = [*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)]
    symbol = next((size.value for value in graph.inputs for size in value.shape[:1] if not isinstance(size, int)), None)
    if symbol is not None:
        batch = re.compile(rf"\b{re.escape(symbol)}\b")
        for value in values:
            if value.shape is not None:
                value.shape = onnx_ir.Shape(
                    size if isinstance(size, int) or size.value is None else batch.sub("batch", size.value)
                    for size in value.shape
                )

    for name, value in list(graph.initializers.items()):
        del graph.initializers[name]
        value.name = name.removeprefix("module.")
        graph.initializers[value.name] = value

    taken = {value.name for value in values} | set(graph.initializers)
    for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        taken.discard(value.name)
        value.name = next(free for free in (name, *(f"{name}_{n}" for n in range(len(taken) + 1))) if free not in taken)
        taken.add(value.name)


def _input_names(flat: _Flat) -> list[str]:
    """A name per tensor, after the parameters of ``forward``: "x", or "batch_ids" for ``ids`` in the dict ``batch``."""
    positional = [
        name
        for name, parameter in inspect.signature(flat.module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    args, kwargs = flat.record["args"], flat.record["kwargs"]
    named = [(positional[n] if n < len(positional) else f"input_{n}", value) for n, value in enumerate(args)]
    return [name for prefix, value in (*named, *kwargs.items()) for name in _leaf_names(prefix, value)]


def _output_names(outputs: Any) -> list[str]:
    """A name per tensor: "output", "output_0", or the keys of a dict."""
    (specs,) = describe_inputs((outputs,), {})["args"]
    if isinstance(specs, Mapping):
        return [name for key, value in specs.items() for name in _leaf_names(str(key), value)]
    return _leaf_names("output", specs)


def _leaf_names(prefix: str, tree: Any) -> list[str]:
    names = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        name = re.sub(r"\W+", "_", prefix + pytree.keystr(path)).strip("_")
        count = len(specs_of({"args": (leaf,), "kwargs": {}}))
        names += [name] if count == 1 else [f"{name}_{n}" for n in range(count)]
    return names


def _capture_reason(error: Exception) -> str:
    """What torch.export found, in one line: mostly that the batch is not free."""
    fixes = re.search(r"Suggested fixes:\s+(.+)", str(error))
    if fixes:
        return f"the network works for {fixes.group(1).strip()} only"
    if "data-dependent" in str(error):
        return "which operations run depends on the values of its tensors"
    return runtime.first_line(error)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks are for its developers: what goes wrong comes as an exception, with its reason."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
