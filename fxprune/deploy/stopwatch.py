"""The latency of a pruned network beside the dense one, both on one engine, in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx, nn

from fxprune.deploy.engines import check_engine, engine, placed
from fxprune.deploy.kernels import provider_at_hand
from fxprune.deploy.store import device
from fxprune.errors import check_count
from fxprune.recording.checks import check_module
from fxprune.recording.inputs import RECORD_KEY, describe_inputs, resolve_inputs, specs_of
from fxprune.reports.report import Latency

_WARM_UP = 3  # runs that do not count
_QUICK, _MOST = 11, 200  # runs: at least, for a first look, and at most
_SECONDS = 1.5  # of running, where that is more than the least number of runs


class Stopwatch:
    """A dense network on one engine, to measure others beside it.

    Args:
        dense: the network.
        record: its example inputs, see ``fxprune.recording.inputs.describe_inputs``; their batch size is that of every
            run.
        provider: onnxruntime's execution provider, or another engine.
        threads: of the processor; 0: as many as it has cores.

    Raises:
        ExportError: the network cannot be exported, or the engine does not run it.
    """

    def __init__(self, dense: nn.Module, record: Mapping[str, Any], provider: str, threads: int = 0):
        self._record, self._threads = record, threads
        self._engine = engine(placed(provider, dense))
        self._dense = self.timer(dense)

    def dense_ms(self) -> float:
        """Milliseconds of the dense network when little else runs on the machine: the first quartile."""
        return _quartile(column[0] for column in _in_turn(_QUICK, self._dense))

    def ratio(self, pruned: nn.Module) -> float:
        """The ratio of the first quartiles, pruned to dense: what else runs on the machine disturbs it the least."""
        dense, smaller = zip(*_in_turn(_QUICK, self._dense, self.timer(pruned)), strict=True)
        return _quartile(smaller) / _quartile(dense)

    def beside(self, pruned: nn.Module, runs: int) -> Latency:
        """Medians of at least ``runs`` runs of the dense and the pruned network in turn."""
        pairs = _in_turn(runs, self._dense, self.timer(pruned))
        dense, smaller = (statistics.median(column) for column in zip(*pairs, strict=True))
        shape = specs_of(self._record)[0].shape
        return Latency(
            dense_ms=dense,
            pruned_ms=smaller,
            provider=self._engine.name,
            device=str(device(self._engine.name)["device"]),
            threads=self._threads,
            batch=shape[0] if shape else 1,
            runs=len(pairs),
            version=self._engine.version(),
        )

    def timer(self, module: nn.Module) -> Callable[[], float]:
        """What runs a network once and returns the milliseconds that it took."""
        return self._engine.network(module, self._record, self._threads)


def _in_turn(least: int, *timers: Callable[[], float]) -> list[tuple[float, ...]]:
    """Milliseconds of at least so many runs of each, and of runs for ``_SECONDS``, after a few that do not count."""
    times: list[tuple[float, ...]] = []
    for _ in range(_WARM_UP):
        _ = [timer() for timer in timers]
    while len(times) < least or (len(times) < _MOST and sum(map(sum, times)) < _SECONDS * 1000):
        times.append(tuple(timer() for timer in timers))
    return times


def _quartile(times: Iterable[float]) -> float:
    return statistics.quantiles(times)[0]


def bench(
    dense: nn.Module,
    pruned: nn.Module,
    example_inputs: Any = None,
    example_kwargs: Any = None,
    *,
    provider: str | None = None,
    threads: int | None = None,
    runs: int = 31,
) -> Latency:
    """Latency of ``pruned`` beside ``dense``, run in turn: on onnxruntime, PyTorch or OpenVINO.

    Args:
        dense: a network.
        pruned: another that takes the same inputs.
        example_inputs: a tensor, or a tuple of the positional arguments; those that ``pruned`` was recorded with where
            none are given, or inferred where possible. Their batch size is that of every run.
        example_kwargs: keyword arguments.
        provider: onnxruntime's execution provider; ``"eager"`` or ``"inductor"``, PyTorch where the networks are, as
            they are or compiled; ``"openvino"``. Without one CUDA of onnxruntime if that works here, else the CPU.
        threads: of the processor; as many as the library takes where none is given: onnxruntime one for every core.
        runs: of each network, at least; more where they are short.

    Raises:
        InputError: there is no such provider, it is not installed, ``threads`` or ``runs`` is not a positive number, or
            ``dense`` or ``pruned`` is no module.
        ExampleInputsError: inputs that are missing or do not fit.
        ExportError: a network cannot be exported, or the provider does not run it.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> latency = fxprune.bench(model, small, x, threads=1, runs=3)
        >>> latency.batch
        2
    """
    if threads is not None:
        check_count("threads", threads)
    check_count("runs", runs)
    check_engine(provider)
    check_module("dense", dense)
    check_module("pruned", pruned)
    # A class of one's own cannot say what it takes; what was pruned of it was recorded with that.
    says = pruned if isinstance(pruned, fx.GraphModule) and RECORD_KEY in pruned.meta else dense
    record = describe_inputs(*resolve_inputs(says, example_inputs, example_kwargs))
    return Stopwatch(dense, record, provider or provider_at_hand(), threads or 0).beside(pruned, runs)
