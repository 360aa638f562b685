"""onnxruntime: choosing an execution provider, running a file on it, timing it."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import ExportError, InputError, check_installed, first_line

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

# onnxruntime prints warnings of its own to stderr below this level; what goes wrong is raised as well.
_ERRORS_ONLY = 3
_NOTHING = 4
# TF32 rounds products to 10 bits, which alone would fill the tolerance between torch and onnxruntime.
_PROVIDER_OPTIONS: dict[str, dict[str, Any]] = {CUDA: {"use_tf32": 0}}
# What no file is checked on unless the user names it.
_ON_REQUEST = {
    "AzureExecutionProvider": "it calls a remote service",
    "TensorrtExecutionProvider": "it builds an engine for every shape, for minutes",
    "NvTensorRTRTXExecutionProvider": "it builds an engine for every shape, for minutes",
}


class Session:
    """An ONNX file loaded on one execution provider, in full float32 precision."""

    def __init__(self, path: str | os.PathLike[str] | bytes, provider: str, threads: int = 0) -> None:
        """Load ``path``, or what a file would hold; ``threads`` of the processor, 0: as many as it has cores.

        Raises:
            ExportError: the file does not load, or the provider does not work on this machine.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _NOTHING if provider == CUDA else _ERRORS_ONLY
        wanted: list[Any] = [(provider, _PROVIDER_OPTIONS.get(provider, {}))]
        if provider != CPU:
            # A provider need not have every operator.
            wanted.append(CPU)
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, providers=wanted)
        except Exception as error:
            raise ExportError(f"onnxruntime cannot load the exported file: {first_line(error)}") from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != provider:
            # onnxruntime does not raise here: it prints, and goes on without the provider.
            raise ExportError(f"onnxruntime's {provider} does not work on this machine; pass provider={CPU!r}")

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, on the CPU.

        Raises:
            ExportError: the graph fails on these inputs.
        """
        feeds = {given.name: tensor.numpy(force=True) for given, tensor in zip(self._inputs(), tensors, strict=True)}
        try:
            return [torch.as_tensor(output) for output in self._session.run(None, feeds)]
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run the exported file: {first_line(error)}") from error

    def latency_ms(self, tensors: Sequence[Tensor], seconds: float = 1.0, least: int = 5, most: int = 50) -> float:
        """Median wall time of one run in milliseconds, inputs and outputs on the provider's device.

        ``least`` to ``most`` runs, as many as ``seconds`` allow, after two that are not counted.
        """
        return median_ms(self.timer(tensors), seconds, least, most)

    def timer(self, tensors: Sequence[Tensor]) -> Callable[[], float]:
        """What runs once and returns the milliseconds it took, inputs and outputs on the provider's device."""
        import onnxruntime

        device = "cuda" if self.provider == CUDA else "cpu"
        binding = self._session.io_binding()
        for given, tensor in zip(self._inputs(), tensors, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy(force=True), device, 0)
            binding.bind_ortvalue_input(given.name, value)
        for output in self._session.get_outputs():
            binding.bind_output(output.name, device, 0)

        def run() -> float:
            start = time.perf_counter()
            try:
                self._session.run_with_iobinding(binding)
                binding.synchronize_outputs()
            except Exception as error:
                raise ExportError(f"onnxruntime cannot run the exported file: {first_line(error)}") from error
            return (time.perf_counter() - start) * 1000

        return run

    def _inputs(self) -> list[Any]:
        inputs: list[Any] = self._session.get_inputs()
        return inputs


def median_ms(timer: Callable[[], float], seconds: float, least: int, most: int) -> float:
    """Of ``least`` to ``most`` runs, as many as ``seconds`` allow, after two that are not counted."""
    timer()
    timer()
    times: list[float] = []
    while len(times) < least or (sum(times) < seconds * 1000 and len(times) < most):
        times.append(timer())
    return statistics.median(times)


def open_session(path: str | os.PathLike[str] | bytes, provider: str | None) -> Session:
    """A session on ``provider``; without one, on CUDA if that works here, else on the CPU.

    Raises:
        ExportError: see :class:`Session`.
    """
    if provider is not None:
        return Session(path, provider)
    # The GPU build of onnxruntime lists CUDA on every machine, and prints complaints when it is then not there.
    if torch.cuda.is_available() and CUDA in available_providers():
        try:
            return Session(path, CUDA)
        except ExportError:
            # Its CUDA libraries need not be those of torch. Validation says which provider it was.
            pass
    return Session(path, CPU)


def providers_to_try(provider: str | None) -> tuple[list[str], dict[str, str]]:
    """On which providers to run a file: ``provider`` alone, else all that may work here, CUDA first, the CPU last.

    Returns:
        The providers, and of those that are left out, why.
    """
    if provider is not None:
        return [provider], {}
    left_out = {name: reason for name, reason in _ON_REQUEST.items() if name in available_providers()}
    if CUDA in available_providers() and not torch.cuda.is_available():
        # The GPU build of onnxruntime lists CUDA on every machine, and prints complaints when it is then not there.
        left_out[CUDA] = "torch finds no CUDA device"
    tried = [name for name in available_providers() if name not in left_out]
    return sorted(tried, key=lambda name: (name != CUDA, name == CPU)), left_out


def check_provider(provider: str | None) -> None:
    """Refuse a provider that this build of onnxruntime does not have, or all where a package is missing.

    Raises:
        InputError: names those it has, or what to install.
    """
    check_installed("onnx", "onnx", "onnxscript", "onnxruntime")
    if provider is not None and provider not in available_providers():
        known = ", ".join(available_providers())
        raise InputError(f"this onnxruntime has no execution provider {provider!r}; it has {known}")


def available_providers() -> list[str]:
    """The execution providers that the installed onnxruntime was built with, whether or not they work here."""
    import onnxruntime

    providers: list[str] = onnxruntime.get_available_providers()
    return providers


def version() -> str:
    """onnxruntime's version."""
    import onnxruntime

    return str(onnxruntime.__version__)
