"""How long an engine takes for one convolution or matrix product, and which alignment of channels it likes."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fxprune.deploy import runtime
from fxprune.deploy.engines import engine
from fxprune.deploy.kernel_graph import KernelGraph
from fxprune.deploy.store import on_card, store

COPIES = 2
"""How often a kernel stands in the graph that is timed, so that reordering its input and output weighs less."""
ALIGNMENTS = (32, 16, 8, 4, 2, 1)
_ALONE = 1  # thread: with more, what else runs on the machine has a say
_WORTH = 1.1  # a finer alignment is chosen unless a coarser one is this much faster
_ROUNDS, _READINGS = 33, 5  # of timing the chains, each round all of them; of the whole
_SECONDS, _LEAST, _MOST = 0.02, 5, 30  # of timing one kernel; runs


@dataclass(frozen=True)
class Kernel:
    """A convolution or matrix product with its sizes, or a choice of channels.

    ``shapes``: of a convolution the input ``[N, I, ...]`` and the weight as torch has it; of a product both factors; of
    a choice the tensor ``[N, C, ...]`` and the index ``[K]``.
    ``constant``: the second operand is known beforehand. ``options``: a convolution's, as pairs.
    """

    kind: Literal["convolution", "product", "choice"]
    shapes: tuple[tuple[int, ...], ...]
    constant: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """What it is called where measurements are kept."""
        shapes = " ".join("x".join(map(str, shape)) for shape in self.shapes)
        options = " ".join(f"{key}={value}".replace(" ", "") for key, value in self.options)
        return f"{self.kind} {shapes} {'constant' if self.constant else 'given'} {self.dtype} {options}".rstrip()


@functools.lru_cache
def provider_at_hand() -> str:
    """The execution provider that ``open_session`` takes when it is left the choice: CUDA if it works, else the CPU."""
    if not torch.cuda.is_available():
        return runtime.CPU
    return runtime.open_session(_nothing().as_onnx(), None).provider


def kernel_ms(kernels: Iterable[Kernel], provider: str, threads: int = 0) -> list[float]:
    """Milliseconds of each kernel on an engine: measured now, or by an earlier run on the same device.

    ``threads``: of the processor; 0: as many as it has cores.
    """
    kernels, provider = list(kernels), engine(provider).kernels
    kept = store(provider, threads)
    wanted = {kernel.name: kernel for kernel in kernels}
    names = kept.missing(wanted)
    if names:
        idle = _idle_ms(provider, threads)
        fresh: dict[str, float] = {}
        try:
            for name in names:
                fresh[name] = _alone_ms(wanted[name], provider, threads, idle)
        finally:
            kept.add(fresh)  # also when a person has no more patience
    return [kept[kernel.name] for kernel in kernels]


def alignment(provider: str) -> int:
    """The smallest multiple of channels that an engine runs as fast as coarser ones, give or take a tenth.

    Measured with chains of convolutions (dense and depthwise) and of matrix products, at counts of channels that are
    multiples of 1, 2, ... 32 and of nothing coarser, by time per multiply-accumulate; the coarsest that any of the
    chains needs. On a processor this is a matter of blocked convolution kernels, which take 8 or 16 channels at a
    time. Measured until two readings in a row agree, for it is kept; if none do, the coarsest reading counts.
    """
    provider = engine(provider).kernels
    kept, name = store(provider, _ALONE), "alignment"
    if name not in kept:
        readings = [_measure_alignment(provider)]
        while len(readings) < 2 or (readings[-1] != readings[-2] and len(readings) < _READINGS):
            readings.append(_measure_alignment(provider))
        agreed = readings[-1] == readings[-2]
        kept.add({name: float(readings[-1] if agreed else max(readings))})
    return int(kept[name])


def _measure_alignment(provider: str) -> int:
    images = 32 if on_card(provider) else 1  # fewer would not fill it
    coarsest = 1
    for chain, base in ((_inverted, 96), (_plain, 96), (_products, 192)):
        timers, macs = [], []
        for step in ALIGNMENTS:
            channels = base + step % ALIGNMENTS[0]  # little more than a multiple of all that is coarser: the worst
            graph, count = chain(channels, images)
            timers.append(_timer(graph, provider))
            macs.append(count)
        rounds = [[timer() for timer in timers] for _ in range(_ROUNDS)]
        times = [statistics.quantiles(column[3:])[0] for column in zip(*rounds, strict=True)]  # others slow some down
        rates = [time / count for time, count in zip(times, macs, strict=True)]
        fine = [step for step, rate in zip(ALIGNMENTS, rates, strict=True) if rate <= _WORTH * min(rates)]
        coarsest = max(coarsest, min(fine))
    return coarsest


# -- timing ------------------------------------------------------------------------------------------------------------


def _timer(graph: KernelGraph, name: str) -> Callable[[], float]:
    return engine(name).kernel(graph, _ALONE)


def _time(graph: KernelGraph, name: str, threads: int) -> float:
    return runtime.median_ms(engine(name).kernel(graph, threads), _SECONDS, _LEAST, _MOST)


def _alone_ms(kernel: Kernel, name: str, threads: int, idle: float) -> float:
    if kernel.kind != "choice":
        return max(0.0, _time(_graph(kernel), name, threads) - idle) / COPIES
    within, without = (_time(_chosen(kernel, chooses), name, threads) for chooses in (True, False))
    return max(0.0, within - without)


def _idle_ms(name: str, threads: int) -> float:
    """What a run costs that computes nothing."""
    return _time(_nothing(), name, threads)


# -- graphs ------------------------------------------------------------------------------------------------------------


def _nothing() -> KernelGraph:
    """One number goes through."""
    build = KernelGraph()
    build.add("Relu", build.feed((1,)))
    return build


def _graph(kernel: Kernel) -> KernelGraph:
    """Copies of the kernel on one input, added up."""
    build, (first, second) = KernelGraph(kernel.dtype), kernel.shapes[:2]
    x, total = build.feed(first), ""
    for copy in range(COPIES):
        weight = build.weight(second) if kernel.constant else build.feed(second)
        made = build.add("MatMul", x, weight) if kernel.kind == "product" else _convolution(build, kernel, x, weight)
        total = build.add("Add", total, made) if copy else made
    return build


def _chosen(kernel: Kernel, chooses: bool) -> KernelGraph:
    """A choice of channels between two light layers, or these alone.

    Engines keep what flows between convolutions in a form of their own, and have to leave it for the choice.
    """
    build, (first, (count,)) = KernelGraph(kernel.dtype), kernel.shapes
    channels = first[1]

    def layer(x: str, channels: int) -> str:
        if len(first) == 2:
            return build.add("Relu", x)
        return build.add("Conv", x, build.weight((channels, *[1] * (len(first) - 1))), group=channels)

    x = layer(build.feed(first), channels)
    if not chooses:
        layer(x, channels)
        return build
    index = build.index([number * channels // count for number in range(count)])
    layer(build.add("Gather", x, index, axis=1), count)
    return build


def _convolution(build: KernelGraph, kernel: Kernel, x: str, weight: str) -> str:
    options, (first, second) = dict(kernel.options), kernel.shapes[:2]
    spatial = len(first) - 2

    def each(name: str) -> list[int]:
        values = list(options[name])
        return values if len(values) == spatial else values * spatial

    attributes: dict[str, Any] = {
        "strides": each("stride"), "dilations": each("dilation"), "pads": each("padding") * 2,
        "group": options["groups"], "kernel_shape": list(second[2:]),
    }  # fmt: skip
    if options["transposed"]:
        return build.add("ConvTranspose", x, weight, **attributes, output_padding=each("output_padding"))
    return build.add("Conv", x, weight, **attributes)


def _inverted(channels: int, images: int) -> tuple[KernelGraph, int]:
    """Two inverted residual blocks at 28 x 28: pointwise, depthwise, pointwise. With their MACs."""
    build = KernelGraph()
    x = build.feed((images, channels, 28, 28))
    for _ in range(2):
        wide = build.add("Relu", build.add("Conv", x, build.weight((channels, channels, 1, 1))))
        deep = build.add("Conv", wide, build.weight((channels, 1, 3, 3)), group=channels, pads=[1] * 4)
        thin = build.add("Conv", build.add("Relu", deep), build.weight((channels, channels, 1, 1)))
        x = build.add("Add", thin, x)
    return build, 2 * images * 28 * 28 * channels * (2 * channels + 9)


def _plain(channels: int, images: int) -> tuple[KernelGraph, int]:
    """Two 3 x 3 convolutions at 14 x 14."""
    build = KernelGraph()
    x = build.feed((images, channels, 14, 14))
    for _ in range(2):
        x = build.add("Relu", build.add("Conv", x, build.weight((channels, channels, 3, 3)), pads=[1] * 4))
    return build, 2 * images * 14 * 14 * 9 * channels**2


def _products(channels: int, images: int) -> tuple[KernelGraph, int]:
    """Four matrix products of 196 rows."""
    build = KernelGraph()
    x = build.feed((images * 196, channels))
    for _ in range(4):
        x = build.add("Relu", build.add("MatMul", x, build.weight((channels, channels))))
    return build, 4 * images * 196 * channels**2
