"""Ways that a network goes after pruning: quantised, compiled for a runtime, or both, each with the real library."""

from __future__ import annotations

import copy
import io
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.recording.inputs import tensors_of

Batch = tuple[Tensor, ...]


class Ran(NamedTuple):
    """A network at the end of a way.

    ``call``: its first output for a batch. ``size``: bytes, of the file where there is one, else of the weights.
    ``ops``: how many of each kind are run, or, where that cannot be seen, modules.
    """

    call: Callable[..., Any]
    size: int
    ops: Counter[str]


class Way(NamedTuple):
    """What turns a module into what runs, given calibration batches and an empty folder; the packages it takes."""

    run: Callable[[nn.Module, Sequence[Batch], Path], Ran]
    packages: tuple[str, ...]


WAYS: dict[str, Way] = {}


def way(name: str, *packages: str) -> Callable[[Callable[..., Ran]], Callable[..., Ran]]:
    """Enter a function into the table."""

    def enter(run: Callable[..., Ran]) -> Callable[..., Ran]:
        assert name not in WAYS
        WAYS[name] = Way(run, packages)
        return run

    return enter


def first(outputs: Any) -> Tensor:
    """The first tensor of what a network returns."""
    return tensors_of(outputs)[0]


# -- ONNX --------------------------------------------------------------------------------------------------------------


def _session(path: Path) -> Ran:
    """onnxruntime on one thread; the ops are those of the graph as it optimises it."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node

    def call(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return Ran(call, path.stat().st_size, Counter(node.op_type for node in nodes))


@way("onnxruntime", "onnxruntime-gpu", "onnx")
def onnx_float(net: nn.Module, batches: Sequence[Batch], folder: Path) -> Ran:
    return _session(fxprune.export(net, folder / "net.onnx", batches[0]).path)


@way("onnxruntime, opset 23", "onnxruntime-gpu", "onnx")
def onnx_attention(net: nn.Module, batches: Sequence[Batch], folder: Path) -> Ran:
    return _session(fxprune.export(net, folder / "net.onnx", batches[0], opset=23).path)


@way("onnxruntime int8 QDQ", "onnxruntime-gpu", "onnx")
def onnx_int8(net: nn.Module, batches: Sequence[Batch], folder: Path) -> Ran:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = fxprune.export(net, folder / "net.onnx", batches[0]).path
    name = _input(path)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {name: batch[0].numpy()}

    quant_pre_process(path, folder / "ready.onnx")
    unsigned = QuantType.QUInt8  # what kernels of x86 take
    quantize_static(folder / "ready.onnx", folder / "int8.onnx", Reader(), per_channel=True, activation_type=unsigned)
    return _session(folder / "int8.onnx")


def _input(path: Path) -> str:
    import onnx

    return str(onnx.load(path, load_external_data=False).graph.input[0].name)


# -- quantised in torch ------------------------------------------------------------------------------------------------


def _weights(net: nn.Module) -> int:
    """Bytes of the file that ``torch.save`` makes of its state."""
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    return buffer.tell()


def _calls(graph: fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


@way("FX graph mode int8", "torch")
def fx_int8(net: nn.Module, batches: Sequence[Batch], folder: Path) -> Ran:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    observed = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping("x86"), batches[0])
    for batch in batches:
        observed(*batch)
    int8 = convert_fx(observed)
    leaves = (type(int8.get_submodule(node.target)) for node in int8.graph.nodes if node.op == "call_module")
    ops = Counter(f"{leaf.__module__.rpartition('modules.')[0]}{leaf.__name__}" for leaf in leaves)
    return Ran(int8, _weights(int8), ops + _calls(int8.graph))


@way("torchao int8 weights", "torchao")
def torchao_int8(net: nn.Module, batches: Sequence[Batch], folder: Path) -> Ran:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    int8 = copy.deepcopy(net)
    quantize_(int8, Int8WeightOnlyConfig())
    kinds = Counter(
        f"{type(m).__name__}({type(m.weight.data).__name__})" for m in int8.modules() if isinstance(m, nn.Linear)
    )
    return Ran(int8, _weights(int8), kinds)


def _exported(net: nn.Module, batches: Sequence[Batch]) -> Any:
    return torch.export.export(net, batches[0])


@way("PT2E int8, x86", "torchao")
def pt2e_x86(net: nn.Module, batches: Sequence[Batch], folder: Path) -> Ran:
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    int8 = _pt2e(net, batches, quantizer)
    lowered = lower_pt2e_quantized_to_x86(int8, batches[0])
    return Ran(lowered, _weights(int8), _calls(lowered.graph))


def _pt2e(net: nn.Module, batches: Sequence[Batch], quantizer: Any) -> fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    observed = prepare_pt2e(_exported(net, batches).module(), quantizer)
    for batch in batches:
        observed(*batch)
    result: fx.GraphModule = convert_pt2e(observed)
    return result


# -- runtimes, by torch.export ------------------------------------------------------------------------------------------


@way("AOTInductor", "torch")
def aot(net: nn.Module, batches: Sequence[Batch], folder: Path) -> Ran:
    path = torch._inductor.aoti_compile_and_package(_exported(net, batches), package_path=str(folder / "net.pt2"))
    return Ran(torch._inductor.aoti_load_package(path), Path(path).stat().st_size, Counter())


@way("OpenVINO", "openvino")
def openvino(net: nn.Module, batches: Sequence[Batch], folder: Path) -> Ran:
    import openvino as ov

    model = ov.convert_model(_exported(net, batches))
    ov.save_model(model, folder / "net.xml", compress_to_fp16=False)
    compiled = ov.compile_model(
        folder / "net.xml", "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    ops = Counter(op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops())

    def call(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled([x.numpy()])[0].copy())

    return Ran(call, (folder / "net.bin").stat().st_size + (folder / "net.xml").stat().st_size, ops)


def _executorch(program: Any, folder: Path) -> Ran:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path = folder / "net.pte"
    path.write_bytes(edge.to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    graph = edge.exported_program().graph
    parts = [node for node in graph.nodes if str(node.target) == "executorch_call_delegate"]
    return Ran(lambda x: method.execute([x])[0], path.stat().st_size, _calls(graph))


@way("ExecuTorch XNNPACK", "executorch")
def executorch(net: nn.Module, batches: Sequence[Batch], folder: Path) -> Ran:
    return _executorch(_exported(net, batches), folder)


@way("PT2E int8, XNNPACK", "torchao", "executorch")
def executorch_int8(net: nn.Module, batches: Sequence[Batch], folder: Path) -> Ran:
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack

    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    int8 = _pt2e(net, batches, xnnpack.XNNPACKQuantizer().set_global(config))
    return _executorch(torch.export.export(int8, batches[0]), folder)


@way("LiteRT", "litert-torch", "ai-edge-litert")
def litert(net: nn.Module, batches: Sequence[Batch], folder: Path) -> Ran:
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    path = folder / "net.tflite"
    litert_torch.convert(net, batches[0]).export(str(path))
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (given, *_), (made, *_) = interpreter.get_input_details(), interpreter.get_output_details()

    def call(x: Tensor) -> Tensor:
        interpreter.set_tensor(given["index"], x.numpy())
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(made["index"]))

    return Ran(call, path.stat().st_size, Counter(op["op_name"] for op in interpreter._get_ops_details()))
