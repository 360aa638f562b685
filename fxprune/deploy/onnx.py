"""ONNX export that is checked: torch.export with a dynamic batch, torch.onnx, then onnxruntime against torch."""

import contextlib
import inspect
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.deploy import runtime
from fxprune.deploy.batches import at_free_batch, up_to_the_largest
from fxprune.deploy.complex_numbers import by_parts
from fxprune.deploy.converting import lines_named
from fxprune.deploy.flat import Flat
from fxprune.deploy.onnx_file import PLAN_DIGEST
from fxprune.deploy.sparse import with_sparse_weights
from fxprune.deploy.validation import Validation, check, run
from fxprune.errors import ExportError, InputError, check_flags, first_line
from fxprune.io.files import check_writable, replacing
from fxprune.recording import evaluated
from fxprune.recording.checks import check_module, checked_inputs
from fxprune.recording.inputs import (
    batch_size,
    describe_inputs,
    fixed_dims,
    image_size,
    input_names,
    is_batched,
    is_image,
    make_inputs,
    specs_of,
    tensors_of,
)
from fxprune.reports.report import REPORT_KEY, Report, pruned_parts
from fxprune.version import __version__

_SEED = 2  # of the inputs that the exporter sees
_KEPT = "fxprune.kept"
_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
_LITTLE = 1e-4

FIXED_SIZES = "fixed_sizes"
"""Where a file whose batch is not open says so, with the reason, in its ``metadata_props``."""


def export(
    module: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    example_kwargs: Any = None,
    provider: str | None = None,
    *,
    opset: int | None = None,
    dynamic_size: bool = False,
    fold_norms: bool = True,
    half: bool = False,
    sparse: bool = False,
) -> Validation:
    """Write ``module`` as an ONNX file with a dynamic batch, and check it with onnxruntime against torch.

    Dim 0 is the batch: of inputs x [8, 3, 224, 224], mask [8, 50] and table [100, 64] it is left open in the first two,
    which agree. The file is then run at batch sizes 1, 3 and 5, on fresh inputs near the example's, beside the module
    in eval mode, which is left as it was. A recorded graph that runs at one batch size only (``GuardError``) gives a
    file that does too, and says why (``fixed_sizes`` in its ``metadata_props``, beside versions, method, budget, MACs
    and the digest of the plan); that a network does something else for large batches is said there, too. A file appears
    at ``path`` only after it was found right; where the weights come near 2 GB they go to ``<path>.data`` beside it.

    Args:
        module: the network, as a rule what ``fxprune.prune`` returned.
        path: where to write.
        example_inputs: a tensor, or a tuple of the positional arguments; inferred where possible.
        example_kwargs: keyword arguments.
        provider: onnxruntime's execution provider; every one that works here if not given, see ``validate``.
        opset: version of the ONNX operator set; what torch.onnx writes by itself if not given. From 23 on, attention is
            one operator.
        dynamic_size: leave the height and width of images open, of x [8, 3, 224, 224] and of all inputs whose last two
            dims are 224 and 224 as well. Checked at other sizes too.
        fold_norms: batch norms after a convolution or a linear layer become part of its weights, which is exact in
            eval mode; onnxruntime does the same when it loads a file. False keeps them as nodes.
        half: weights, inputs and outputs in float16 where they are float32, compared with what the network computes
            in its own dtype.
        sparse: weights that are mostly exact zeros (five of six at least in float32, nine of ten in float16) as
            sparse initializers: a smaller file, of which onnxruntime makes dense tensors when it loads it. Other
            runtimes and quantisers may not read them.

    Raises:
        InputError: ``path`` cannot be written, there is no such provider or opset, no image, or one whose size is
            fixed, nothing to be sparse, or ``half`` of float64.
        ExampleInputsError: inputs that are missing, or that do not run with another batch size.
        ExportError: the network cannot be exported like this, or the exported file computes something else. No file is
            left.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> validation = fxprune.export(small, "small.onnx")
        >>> validation.max_rel_error < 1e-4
        True
    """
    path = check_writable(path)
    runtime.check_provider(provider)
    _check_opset(opset)
    check_flags(dynamic_size=dynamic_size, fold_norms=fold_norms, half=half, sparse=sparse)
    check_module("module", module)
    wide = next((name for name, p in module.named_parameters() if p.dtype == torch.float64), None)
    if half and wide is not None:
        raise InputError(f"half=True makes float16 of float32, and {wide} is float64: export model.float()")
    flat = Flat(module, describe_inputs(*checked_inputs(module, example_inputs, example_kwargs)))
    if dynamic_size and image_size(flat.record) is None:
        raise InputError(f"dynamic_size: {flat.name} takes no image, that is no tensor with four dims or more")
    if dynamic_size:
        _check_free_size(flat)
    with evaluated(module), replacing(path) as draft:
        program, fixed = _converted(flat, opset, dynamic_size, fold_norms)
        program.model.metadata_props.update(_metadata(module) | fixed)
        with quiet():
            if half or any(tensor.dtype == torch.float16 for tensor in module.state_dict().values()):
                _align_matrices(program.model)
            if half:
                program.model = _in_half(program.model)
            if sparse:
                draft.write_bytes(with_sparse_weights(program.model))
            else:
                program.save(draft)
        return replace(check(draft, flat, provider), path=path)


def write_unchecked(flat: Flat, path: Path) -> None:
    """The file that ``export`` would write, compared with nothing: to be timed.

    Raises:
        ExampleInputsError, ExportError: see ``export``.
    """
    with evaluated(flat.module):
        program, _ = _converted(flat, None, False, True)
        with quiet():
            program.save(path)


def _check_opset(opset: int | None) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int) or not 1 <= opset <= newest):
        raise InputError(f"opset={opset!r}: pass a number from 1 to {newest}, the newest of onnx {onnx.__version__}")


def _check_free_size(flat: Flat) -> None:
    fixed, specs = fixed_dims(flat.module), specs_of(flat.record)
    for (n, dim), why in fixed.items():
        from_end = dim - len(specs[n].shape)
        if from_end in (-2, -1) and is_image(specs[n], flat.record):
            what = "height" if from_end == -2 else "width"
            raise InputError(
                f"dynamic_size: the {what} of {_input_names(flat)[n]} is fixed at {specs[n].shape[dim]} ({why}); "
                "leave out dynamic_size"
            )


def _converted(flat: Flat, opset: int | None, dynamic_size: bool, fold_norms: bool) -> tuple[Any, dict[str, str]]:
    """The ``torch.onnx.ONNXProgram``, and what of its sizes is fixed against the rule, as metadata."""
    tensors, outputs, fixed = _to_export(flat)
    for does, given in (("takes", tensors), ("returns", tensors_of(outputs))):
        if any(tensor.is_complex() for tensor in given):
            raise ExportError(
                f"{flat.name} {does} complex numbers, which an ONNX file cannot: wrap it in a module that {does} pairs "
                "(torch.view_as_complex, torch.view_as_real). Inside they are no matter."
            )
    open_dims = _open_dims(flat, dynamic_size, "batch" if not fixed else None)
    with quiet():
        exported, most = _captured(flat, tensors, open_dims)
        if most is not None:
            fixed = {FIXED_SIZES: f"batch <= {most}: the network does something else for larger ones"}
        try:
            program = torch.onnx.export(
                by_parts(exported), dynamo=True, verbose=False, opset_version=opset, optimize=False
            )
            assert program is not None
            _optimise(program, fold_norms)
        except Exception as error:
            named = lines_named(error, exported)
            reason = first_line(_root(error)) + (f" ({named})" if named else "")
            raise ExportError(f"torch.onnx cannot write {flat.name}: {reason}") from error
        written = int(program.model.opset_imports[""])
        if opset not in (None, written):
            raise ExportError(
                f"torch.onnx cannot write {flat.name} with opset {opset}: it leaves it at {written}; "
                f"pass opset={written} or none"
            )
        _register_constants(program.model)
        _keep_pads(program.model)
        _rename(program.model, open_dims, _input_names(flat), _output_names(outputs))
    return program, fixed


def _captured(
    flat: Flat, tensors: list[Tensor], open_dims: Sequence[Mapping[int, str]]
) -> tuple[torch.export.ExportedProgram, int | None]:
    """The program, and the largest batch that it is one of, where the network does something else beyond."""
    free = dict.fromkeys(name for names in open_dims for name in names.values())
    what = " and ".join(filter(None, (", ".join([*free][:-1]), *[*free][-1:])))

    def capture(batch: Any) -> torch.export.ExportedProgram:
        # Not a Dim for height and width: what a stride demands of them cannot be known beforehand.
        shapes = torch.export.ShapesCollection()
        for tensor, names in zip(tensors, open_dims, strict=True):
            if names:
                shapes[tensor] = {d: batch if n == "batch" else torch.export.Dim.DYNAMIC for d, n in names.items()}
        return torch.export.export(flat, tuple(tensors), dynamic_shapes=shapes, strict=False)

    try:
        return up_to_the_largest(flat.device, capture)
    except Exception as error:
        reason = capture_reason(error, {dim: name for names in open_dims for dim, name in names.items()})
        raise ExportError(
            f"torch.export cannot capture {flat.name}{f' with a dynamic {what}' if what else ''}: {reason}; "
            "its forward must take sizes from x.shape and not branch on the values of tensors"
        ) from error


def _to_export(flat: Flat) -> tuple[list[Tensor], Any, dict[str, str]]:
    """The inputs to export with, what comes of them, and why their batch is fixed, as metadata: nothing if it is not.

    The integers are the example's own: which values the exporter sees makes no difference, as long as they run.
    """

    def call(batch: int | None) -> tuple[list[Tensor], Any]:
        free = "an export needs inputs whose dim 0 is a batch of any size"
        tensors = tensors_of(make_inputs(flat.record, flat.device, batch, seed=_SEED, permute=False))
        return tensors, run(flat, tensors, "these are the sizes of the example" if batch is None else free)

    (tensors, outputs), why = at_free_batch(flat.module, flat.record, call)
    return tensors, outputs, {} if why is None else {FIXED_SIZES: f"batch = {batch_size(flat.record)}: {why}"}


def _open_dims(flat: Flat, dynamic_size: bool, batch: str | None) -> list[dict[int, str]]:
    """Of every input tensor the dims that are left open, and what their size is called."""
    result = []
    for spec in specs_of(flat.record):
        names = {0: batch} if batch is not None and is_batched(spec, flat.record) else {}
        if dynamic_size and is_image(spec, flat.record):
            names |= {len(spec.shape) - 2: "height", len(spec.shape) - 1: "width"}
        result.append(names)
    return result


def _optimise(program: Any, fold_norms: bool) -> None:
    """torch.onnx's own clean-up of the graph, without its folding of batch norms, and of what all but does nothing.

    It has no switches of its own; no rule knows an operator of a foreign domain.
    """
    from onnxscript.optimizer import fold_constants

    fold_constants(program.model)  # to see all that is constant
    kept = [
        node
        for node in program.model.graph.all_nodes()
        if (node.op_type == "BatchNormalization" and not fold_norms) or _does_little(node)
    ]
    for node in kept:
        node.domain = _KEPT
    program.optimize()
    for node in kept:
        node.domain = ""


def _does_little(node: Any) -> bool:
    """Whether it adds a number that is all but 0, or multiplies by one that is all but 1.

    The rewriter of onnxscript takes what is within 1e-8 of 0, or 1e-5 of 1, for it: of ``x / (x.norm() + 1e-12)`` it
    leaves ``x / x.norm()``, which is NaN where x is 0, and of ``(p + 1e-10).log()`` an infinity where p is.
    """
    import onnx_ir

    if node.op_type not in _NEUTRAL:
        return False
    constants = (onnx_ir.convenience.get_const_tensor(value) for value in node.inputs)
    numbers = [constant.numpy().item() for constant in constants if constant is not None and not constant.shape]
    return any(0 < abs(number - _NEUTRAL[node.op_type]) < _LITTLE for number in numbers)


def _align_matrices(model: Any) -> None:
    """Give matrices as many dims as the tensors that they are multiplied with, where a transpose moves the batch.

    onnxruntime pushes transposes down to a MatMul and makes one operator of the two, and in float16 crashes on it when
    it loads the file for the CPU, unless both factors have as many dims (1.31; a recurrent layer or attention with the
    sequence first, then a linear layer). A vector becomes a matrix of one column.
    """
    nodes = list(model.graph.all_nodes())
    orders = [n.attributes["perm"].as_ints() for n in nodes if n.op_type == "Transpose" and "perm" in n.attributes]
    if all(order[0] == 0 for order in orders):
        return
    for node in nodes:
        if node.op_type != "MatMul":
            continue
        left, right = (None if value.shape is None else value.shape.dims for value in node.inputs)
        if left is None or right is None or not all(isinstance(n, int) for n in right) or len(right) >= len(left):
            continue
        matrix, product = right if len(right) > 1 else (*right, 1), node.outputs[0]
        if len(right) == 1:
            whole = _reshaped(product, [0] * (len(left) - 1), f"{product.name}_vector", node)
            product.replace_all_uses_with(whole, replace_graph_outputs=True)
            whole.producer().replace_input_with(0, product)  # which the line before has replaced, too
            whole.shape, product.shape = product.shape, None
            product.name, whole.name = whole.name, product.name
        sizes = [*[1] * (len(left) - len(matrix)), *matrix]
        node.replace_input_with(
            1, _reshaped(node.inputs[1], sizes, f"{node.outputs[0].name}_matrix", node, before=True)
        )


def _reshaped(value: Any, sizes: Sequence[int], name: str, node: Any, before: bool = False) -> Any:
    """The value with these sizes, of which 0 is that of the value, made before or after a node."""
    import onnx_ir

    shape = onnx_ir.Value(name=f"{name}_shape", const_value=onnx_ir.tensor(sizes, onnx_ir.DataType.INT64))
    node.graph.register_initializer(shape)
    reshape = onnx_ir.node("Reshape", [value, shape])
    result = reshape.outputs[0]
    result.name, result.type = name, value.type
    (node.graph.insert_before if before else node.graph.insert_after)(node, reshape)
    return result


def _in_half(model: Any) -> Any:
    """The model with float16 in place of float32, but for operators that have no float16."""
    import onnx_ir

    path = list(sys.path)
    try:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        import_module("onnxruntime.transformers.onnx_utils")  # onnxruntime.quantization's, which needs the folder too
    finally:
        sys.path[:] = path  # the package adds its folder, and with it modules of common names
    wide = [node.name for node in model.graph.all_nodes() if _adds_by_index(node)]
    serialised = onnx_ir.serde.serialize_model(model)
    proto = convert_float_to_float16(serialised, disable_shape_infer=True, node_block_list=wide)
    nodes, seen = proto.graph.node, set()
    for place in reversed(range(len(nodes))):  # a value that two operators want in float32 is cast for each of them
        if (outputs := tuple(nodes[place].output)) in seen:
            del nodes[place]
        seen.add(outputs)
    result = onnx_ir.serde.deserialize_model(proto)
    result.graph.sort()  # casts are the last nodes
    return result


def _adds_by_index(node: Any) -> bool:
    """Whether it adds or multiplies at places that an index gives: for the CPU onnxruntime has no float16 of that."""
    reduction = node.attributes.get("reduction")
    return (
        node.op_type in ("ScatterElements", "ScatterND")
        and reduction is not None
        and reduction.as_string() in ("add", "mul")
    )


def _metadata(module: nn.Module) -> dict[str, str]:
    """What a file says of itself: names and plain text."""
    result = {"fxprune_version": __version__, "torch_version": str(torch.__version__)}
    found = pruned_parts(module)
    if len(found) == 1:
        report: Report = found[0][1].meta[REPORT_KEY]
        result |= {
            "model": report.model,
            "method": report.method,
            "macs_before": str(report.macs_before),
            "macs_after": str(report.macs_after),
            PLAN_DIGEST: report.plan.digest,
        }
        if report.budget is not None:
            kind, ratio = report.budget
            result |= {"budget": kind, "budget_ratio": str(ratio)}
    return result


def _keep_pads(model: Any) -> None:
    """Name the axes of padding before a max-pooling: onnxruntime makes one operator of the two else, which pads -inf.

    It does so whatever the padding's value is (1.31), and leaves alone a ``Pad`` that has ``axes`` (opset 18).
    """
    import onnx_ir

    for node in model.graph.all_nodes():
        pad = node.inputs[0].producer() if node.op_type == "MaxPool" else None
        if pad is None or pad.op_type != "Pad" or len(pad.inputs) > 3 or model.opset_imports[""] < 18:
            continue
        sizes = [*pad.inputs[1].shape.dims] if pad.inputs[1].shape is not None else [None]
        if not isinstance(sizes[0], int):
            continue
        every = onnx_ir.tensor(range(sizes[0] // 2), onnx_ir.DataType.INT64)
        axes = onnx_ir.Value(name=f"{pad.outputs[0].name}_axes", const_value=every)
        pad.graph.register_initializer(axes)
        pad.resize_inputs(4)
        pad.replace_input_with(3, axes)


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


def _rename(model: Any, open_dims: Sequence[Mapping[int, str]], inputs: list[str], outputs: list[str]) -> None:
    """Give an ONNX model the user's names: of the arguments, the outputs, the parameters, and of what is left open."""
    import onnx_ir

    graph = model.graph
    values = [*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)]
    symbols: dict[str, str] = {}
    for value, given, dims in zip(graph.inputs, inputs, open_dims, strict=True):
        for dim, name in dims.items():
            symbol = str(value.shape[dim])
            symbols.setdefault(symbol, f"{given}_{name}" if name in symbols.values() else name)
    if symbols:
        pattern = re.compile(rf"\b({'|'.join(map(re.escape, symbols))})\b")
        for value in values:
            if value.shape is not None:
                value.shape = onnx_ir.Shape(
                    size
                    if isinstance(size, int) or size.value is None
                    else pattern.sub(lambda found: symbols[found[1]], size.value)
                    for size in value.shape
                )

    # Torch names an initializer after where it lies and what a node gives after its op, each unlike the others of its
    # kind. Parameters and buffers have the names of the state_dict, so all else gives way: a mean to a buffer "mean".
    initializers = list(graph.initializers.items())
    initializers.sort(key=lambda entry: not entry[0].startswith("module."))
    graph.initializers.clear()
    taken: set[str] = set()

    def named(value: Any, name: str) -> None:
        value.name = next(free for free in (name, *(f"{name}_{n}" for n in range(len(taken) + 1))) if free not in taken)
        taken.add(value.name)

    for name, value in initializers:
        named(value, name.removeprefix("module."))
        graph.initializers[value.name] = value
    for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        named(value, name)
    ends = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for value in values:
        if value.name and id(value) not in ends:
            named(value, value.name)


def _input_names(flat: Flat) -> list[str]:
    """A name per tensor, after the parameters of ``forward``: "x", or "batch_ids" for ``ids`` in the dict ``batch``."""
    positional = [
        name
        for name, parameter in inspect.signature(flat.module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return [_plain_name(name) for name in input_names(flat.record, positional)]


def _output_names(outputs: Any) -> list[str]:
    """A name per tensor: "output", "output_0", or the keys of a dict."""
    (specs,) = describe_inputs((outputs,), {})["args"]
    named = isinstance(specs, Mapping)
    record = {"args": (), "kwargs": {str(key): value for key, value in specs.items()} if named else {"output": specs}}
    return [_plain_name(name) for name in input_names(record)]


def _plain_name(name: str) -> str:
    """``batch_ids`` for ``batch['ids']``."""
    return re.sub(r"\W+", "_", name).strip("_")


def capture_reason(error: Exception, names: Mapping[int, str] | None = None) -> str:
    """What torch.export found, in one line: mostly that the batch is not free. ``names``: dim -> what its size is."""
    fixed = re.findall(
        r"size\(\)\[(\d+)\] as dynamic but your code specialized it to be a constant \((\d+)\)", str(error)
    )
    if fixed and names:
        sizes = dict.fromkeys(f"{names.get(int(dim), f'dim {dim}')} = {size}" for dim, size in fixed)
        return f"the network works for {', '.join(sizes)} only"
    left_out = re.findall(r"generated guard L\['\w+'\]\[\d+\]\.size\(\)\[(\d+)\] != (\d+)", str(error))
    if left_out and names:
        sizes = dict.fromkeys(f"{names.get(int(dim), f'dim {dim}')} = {size}" for dim, size in left_out)
        return f"the network does something else for {', '.join(sizes)}"
    fixes = re.search(r"Suggested fixes:\s+(.+)", str(error))
    if fixes:
        return f"the network works for {fixes.group(1).strip()} only"
    if "data-dependent" in str(error):
        return "which operations run depends on the values of its tensors"
    return first_line(error)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
