"""Ways that a network goes after pruning, each with the real library: quantised, made ready for a runtime, trained."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import ConversionError
from fxprune.recording.inputs import tensors_of
from model_zoo.networks.after import made

FLOPS = 0.5
Batches = Sequence[tuple[Tensor]]


class Ran(NamedTuple):
    """A network at the end of a way.

    ``call``: what it returns for a batch. ``size``: bytes, of the file where there is one, else of the weights as
    ``torch.save`` writes them. ``ops``: how many of each kind run; empty where that cannot be seen.
    """

    call: Callable[[Tensor], Any]
    size: int
    ops: Counter[str]


class Way(NamedTuple):
    """``run(network, batches, empty folder)``; the extra and the modules that it takes.

    ``plain(network, batches)``: of one that trains, what it should make of the network; None: that does not change.
    """

    run: Callable[[nn.Module, Batches, Path], Ran]
    int8: bool
    slow: bool
    extra: str
    modules: tuple[str, ...]
    plain: Callable[[nn.Module, Batches], nn.Module] | None = None


WAYS: dict[str, Way] = {}
_SLOW = ("AOTInductor", "ExecuTorch", "ExecuTorch int8", "LiteRT")


def _way(name: str, extra: str = "", *modules: str) -> Callable[[Callable[..., Ran]], Callable[..., Ran]]:
    def enter(run: Callable[..., Ran]) -> Callable[..., Ran]:
        assert name not in WAYS
        WAYS[name] = Way(run, "int8" in name, name in _SLOW, extra, modules)
        return run

    return enter


def first(outputs: Any) -> Tensor:
    """The first tensor of what a network returns."""
    return tensors_of(outputs)[0]


class Prepared(NamedTuple):
    """A network: dense, recorded, pruned, and that as its class; a batch to look at, others to calibrate with."""

    networks: dict[str, nn.Module]
    batches: Batches
    macs_ratio: float


def prepared(spec: str) -> Prepared:
    """The network of that name, and what pruning makes of it."""
    model, batches = made(spec)
    small = fxprune.prune(model, batches[0], flops=FLOPS, progress=False)
    report = small.meta["fxprune"]
    try:
        own = fxprune.into(model, small)
    except ConversionError:
        own = fxprune.into(model, fxprune.prune(model, batches[0], flops=FLOPS, for_class=True, progress=False))
    networks: dict[str, nn.Module] = {
        "dense": model, "recorded": fxprune.record(model, batches[0]), "pruned": small, "class": own,
    }  # fmt: skip
    ready = {name: network.eval().requires_grad_(False) for name, network in networks.items()}
    return Prepared(ready, batches, report.macs_after / report.macs_before)


KERNELS = re.compile("conv|gemm|matmul|mm|linear|connected|attention|fused|delegate|^q|quantized", re.IGNORECASE)


def other_ops(ran: Mapping[str, Ran]) -> str:
    """Which kinds of ops that multiply, are fused or are quantised run more or less often than in the dense network."""
    dense = ran["dense"].ops
    return "; ".join(
        f"{kind}: {dense[kind]} in dense, {one.ops[kind]} in {name}"
        for name, one in ran.items() for kind in sorted({*dense, *one.ops})
        if KERNELS.search(kind) and one.ops[kind] != dense[kind]
    )  # fmt: skip


RUNS, SECONDS = 15, 3.0  # of all networks in turn, at least


def beside(calls: Mapping[str, Callable[[Tensor], Any]], x: Tensor) -> dict[str, float]:
    """Median milliseconds of each, all of them in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while len(times[next(iter(times))]) < RUNS or time.perf_counter() - begin < SECONDS:
        for name, call in calls.items():
            start = time.perf_counter()
            call(x)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


# -- onnxruntime -------------------------------------------------------------------------------------------------------


def _session(path: Path) -> Ran:
    """On one thread; the ops are those of the graph as onnxruntime optimises it."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    name = session.get_inputs()[0].name
    return Ran(
        lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]),
        path.stat().st_size,
        Counter(node.op_type for node in nodes),
    )


_ONNX = ("onnx", "onnx", "onnxscript", "onnxruntime")


@_way("onnxruntime", *_ONNX)
def _onnx(net: nn.Module, batches: Batches, folder: Path) -> Ran:
    fxprune.export(net, folder / "net.onnx", batches[0])
    return _session(folder / "net.onnx")


@_way("onnxruntime, opset 23", *_ONNX)
def _onnx_attention(net: nn.Module, batches: Batches, folder: Path) -> Ran:
    fxprune.export(net, folder / "net.onnx", batches[0], opset=23)
    return _session(folder / "net.onnx")


@_way("onnxruntime int8 QDQ", *_ONNX)
def _onnx_int8(net: nn.Module, batches: Batches, folder: Path) -> Ran:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    fxprune.export(net, folder / "net.onnx", batches[0])
    name = onnx.load(folder / "net.onnx", load_external_data=False).graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = ({name: x.numpy()} for (x,) in batches)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    quant_pre_process(folder / "net.onnx", folder / "ready.onnx", skip_symbolic_shape=True)
    unsigned = QuantType.QUInt8  # what kernels of x86 take
    quantize_static(folder / "ready.onnx", folder / "int8.onnx", Reader(), per_channel=True, activation_type=unsigned)
    return _session(folder / "int8.onnx")


# -- quantised in torch ------------------------------------------------------------------------------------------------


def weights(net: nn.Module) -> int:
    """Bytes, as ``torch.save`` writes them."""
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    return buffer.tell()


def _calls(graph: fx.Graph, pattern: str = "") -> Counter[str]:
    """The functions that are called, those that match."""
    called = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return Counter(re.sub(" at 0x.*", "", name) for name in called if re.match(pattern, name))


@_way("FX graph mode int8")
def _fx(net: nn.Module, batches: Batches, folder: Path) -> Ran:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    observed = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping("x86"), batches[0])
    for batch in batches:
        observed(*batch)
    int8 = convert_fx(observed)
    called = [type(int8.get_submodule(n.target)) for n in int8.graph.nodes if n.op == "call_module"]
    layers = Counter(f"quantized.{kind.__name__.lower()}" for kind in called if ".quantized." in kind.__module__)
    return Ran(int8, weights(int8), layers + _calls(int8.graph, "quantized"))


@_way("torchao int8 weights", "torchao", "torchao")
def _torchao(net: nn.Module, batches: Batches, folder: Path) -> Ran:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    int8 = copy.deepcopy(net)
    quantize_(int8, Int8WeightOnlyConfig())
    linear = [layer for layer in int8.modules() if isinstance(layer, nn.Linear)]
    return Ran(int8, weights(int8), Counter(f"Linear of {type(layer.weight.data).__name__}" for layer in linear))


def _pt2e(net: nn.Module, batches: Batches, quantizer: Any) -> fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    observed = prepare_pt2e(torch.export.export(net, batches[0]).module(), quantizer)
    with fxprune.converting(observed):
        for batch in batches:
            observed(*batch)
    int8: fx.GraphModule = convert_pt2e(observed)
    return int8


@_way("PT2E int8, x86", "torchao", "torchao")
def _pt2e_x86(net: nn.Module, batches: Batches, folder: Path) -> Ran:
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    int8 = _pt2e(net, batches, quantizer)
    size = weights(int8)
    lowered = lower_pt2e_quantized_to_x86(int8, batches[0])
    return Ran(lowered, size, _calls(lowered.graph))


# -- runtimes, by torch.export -----------------------------------------------------------------------------------------


@_way("AOTInductor")
def _aot(net: nn.Module, batches: Batches, folder: Path) -> Ran:
    exported = torch.export.export(net, batches[0])
    path = Path(torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "net.pt2")))
    return Ran(torch._inductor.aoti_load_package(str(path)), path.stat().st_size, Counter())


@_way("OpenVINO", "openvino", "openvino")
def _openvino(net: nn.Module, batches: Batches, folder: Path) -> Ran:
    import openvino

    model = openvino.convert_model(torch.export.export(net, batches[0]))
    openvino.save_model(model, folder / "net.xml", compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(folder / "net.xml", "CPU", settings)
    kinds = (op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops())
    size = sum((folder / name).stat().st_size for name in ("net.xml", "net.bin"))
    return Ran(lambda x: torch.from_numpy(compiled([x.numpy()])[0]), size, Counter(kinds))


def _xnnpack(program: Any, folder: Path) -> Ran:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path = folder / "net.pte"
    path.write_bytes(edge.to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    return Ran(lambda x: method.execute([x]), path.stat().st_size, _calls(edge.exported_program().graph))


_EXECUTORCH = ("executorch", "executorch", "torchao")


@_way("ExecuTorch", *_EXECUTORCH)
def _executorch(net: nn.Module, batches: Batches, folder: Path) -> Ran:
    return _xnnpack(torch.export.export(net, batches[0]), folder)


@_way("ExecuTorch int8", *_EXECUTORCH)
def _executorch_int8(net: nn.Module, batches: Batches, folder: Path) -> Ran:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack

    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    int8 = _pt2e(net, batches, xnnpack.XNNPACKQuantizer().set_global(config))
    return _xnnpack(torch.export.export(int8, batches[0]), folder)


@_way("LiteRT", "litert", "litert_torch", "ai_edge_litert")
def _litert(net: nn.Module, batches: Batches, folder: Path) -> Ran:
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    path = folder / "net.tflite"
    with contextlib.redirect_stdout(io.StringIO()):  # it tells every stage
        litert_torch.convert(net, batches[0]).export(str(path))
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (given, *_), made = interpreter.get_input_details(), interpreter.get_output_details()[0]["index"]

    def call(x: Tensor) -> Tensor:
        interpreter.set_tensor(given["index"], x.numpy().astype(given["dtype"]))  # whole numbers have 32 bits there
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(made))

    return Ran(call, path.stat().st_size, Counter(op["op_name"] for op in interpreter._get_ops_details()))
