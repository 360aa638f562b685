"""What networks are timed on: an execution provider of onnxruntime, PyTorch itself, eager or compiled, and OpenVINO.

An engine makes timers, of whole networks and of single kernels; a timer runs once and returns the milliseconds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxprune.deploy import runtime
from fxprune.deploy.flat import Flat
from fxprune.deploy.kernel_graph import KernelGraph
from fxprune.deploy.onnx import write_unchecked
from fxprune.errors import ExportError, InputError, check_installed, first_line
from fxprune.recording import evaluated
from fxprune.recording.inputs import device_of, make_inputs, tensors_of

Timer = Callable[[], float]

EAGER, INDUCTOR, OPENVINO = "eager", "inductor", "openvino"
OTHERS = (EAGER, INDUCTOR, OPENVINO)
"""Engines besides the execution providers of onnxruntime."""
_COMPILED = 10_000  # networks of one class, at most


class Engine(Protocol):
    """``name``: as users give it, of PyTorch on a card with its device. ``kernels``: whose kernels it runs."""

    name: str
    kernels: str

    def version(self) -> str:
        """Library and version."""

    def network(self, module: nn.Module, record: Mapping[str, Any], threads: int) -> Timer:
        """Of a network on its example inputs; ``threads`` of the processor, 0: as many as the library takes.

        Raises:
            ExportError: the engine does not run it.
        """

    def kernel(self, graph: KernelGraph, threads: int) -> Timer:
        """Of a graph."""


def engine(name: str) -> Engine:
    """By its name: ``eager``, ``eager:cuda``, ``inductor``, ``openvino``, or an execution provider of onnxruntime."""
    kind, _, device = name.partition(":")
    if kind in (EAGER, INDUCTOR):
        return _Torch(name, kind, device or "cpu")
    return _OpenVino() if name == OPENVINO else _Onnxruntime(name)


def placed(name: str, module: nn.Module) -> str:
    """The name of the engine with the device where PyTorch runs the module."""
    device = device_of(module).type
    return f"{name}:{device}" if name in (EAGER, INDUCTOR) and device != "cpu" else name


def check_engine(name: str | None) -> None:
    """Refuse an engine that is not here. ``None``: of onnxruntime.

    Raises:
        InputError: names those that are, or what to install.
    """
    if name == OPENVINO:
        check_installed("openvino", "openvino")
        check_installed("onnx", "onnx", "onnxscript")
    elif name not in (EAGER, INDUCTOR):
        try:
            runtime.check_provider(name)
        except InputError as error:
            raise InputError(f"{str(error).rstrip('.')}. Besides there are {', '.join(OTHERS)}.") from None


class _Onnxruntime:
    def __init__(self, name: str) -> None:
        self.name = self.kernels = name

    def version(self) -> str:
        return f"onnxruntime {runtime.version()}"

    def network(self, module: nn.Module, record: Mapping[str, Any], threads: int) -> Timer:
        with _exported(module, record) as (path, tensors):
            return runtime.Session(path, self.name, threads).timer(tensors)

    def kernel(self, graph: KernelGraph, threads: int) -> Timer:
        return runtime.Session(graph.as_onnx(), self.name, threads).timer(graph.inputs())


class _OpenVino:
    """Its plug-in for processors, with its own settings: on those that have bfloat16 it computes in that."""

    name = kernels = OPENVINO

    def version(self) -> str:
        import openvino

        return f"openvino {openvino.__version__.partition('-')[0]}"

    def network(self, module: nn.Module, record: Mapping[str, Any], threads: int) -> Timer:
        with _exported(module, record) as (path, tensors):
            return self._timer(str(path), tensors, threads)

    def kernel(self, graph: KernelGraph, threads: int) -> Timer:
        return self._timer(graph.as_onnx(), graph.inputs(), threads)

    def _timer(self, model: str | bytes, tensors: Sequence[Tensor], threads: int) -> Timer:
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        try:
            core = openvino.Core()
            request = core.compile_model(core.read_model(model=model), "CPU", settings).create_infer_request()
            for index, tensor in enumerate(tensors):
                request.set_input_tensor(index, openvino.Tensor(tensor.numpy(force=True)))
            request.infer()
        except Exception as error:
            raise ExportError(f"openvino does not run the network: {first_line(error)}") from error
        return _timed(request.infer)


class _Torch:
    """PyTorch on one device. Compiled networks run PyTorch's own convolutions and products too."""

    def __init__(self, name: str, kind: str, device: str) -> None:
        self.name, self._kind, self._device = name, kind, device
        self.kernels = EAGER if device == "cpu" else f"{EAGER}:{device}"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def network(self, module: nn.Module, record: Mapping[str, Any], threads: int) -> Timer:
        args, kwargs = make_inputs(record, device_of(module), permute=False)
        run = torch.compile(module, dynamic=False) if self._kind == INDUCTOR else module
        return self._timer(module, lambda: run(*args, **kwargs), threads)

    def kernel(self, graph: KernelGraph, threads: int) -> Timer:
        module, inputs = graph.as_module().to(self._device), [x.to(self._device) for x in graph.inputs()]
        return self._timer(module, lambda: module(*inputs), threads)

    def _timer(self, module: nn.Module, run: Callable[[], Any], threads: int) -> Timer:
        def finished() -> None:
            run()
            if self._device != "cpu":
                torch.accelerator.synchronize()

        timed = _timed(finished)

        def timer() -> float:
            with evaluated(module), torch.no_grad(), _threads(threads), self._compiling():
                return timed()

        try:
            timer()  # what compiles does so now
        except Exception as error:
            raise ExportError(f"{self._kind} does not run the network: {first_line(error)}") from error
        return timer

    def _compiling(self) -> AbstractContextManager[Any]:
        """Every network is compiled: PyTorch would run those of one class eagerly, after a few, without an error."""
        if self._kind != INDUCTOR:
            return nullcontext()
        from torch._dynamo import config

        limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), _COMPILED)
        patched: AbstractContextManager[Any] = config.patch({**limits, "fail_on_recompile_limit_hit": True})
        return patched


def _timed(run: Callable[[], Any]) -> Timer:
    def timer() -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1000

    return timer


@contextmanager
def _exported(module: nn.Module, record: Mapping[str, Any]) -> Iterator[tuple[Path, list[Tensor]]]:
    """The ONNX file of a network, and what to feed it."""
    flat = Flat(module, record)
    tensors = tensors_of(make_inputs(record, flat.device, permute=False))
    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder:
        path = Path(folder) / "timed.onnx"
        write_unchecked(flat, path)
        yield path, tensors


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many of PyTorch's own inside; 0: as it is."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)
