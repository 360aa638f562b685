"""Latency as a budget: a table of measured kernels predicts any choice of channels, and the whole model has the word.

Prediction: every convolution and matrix product is timed alone on the engine, onnxruntime or another, at a few channel
counts, and interpolated in between; what the dense model takes beyond the sum of those goes by the elements that the
other ops make. Scores say which channels go and the prediction says how many; then the pruned model is measured beside
the dense one, in turn, and the prediction is corrected until the measured ratio is the budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

from fxprune.deploy import Kernel, Stopwatch, kernel_ms, placed, provider_at_hand
from fxprune.errors import BudgetError, ModelError
from fxprune.groups import Work, groups_of, workload
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Counts, Keep, Products, elements
from fxprune.methods.state import Scores
from fxprune.options import LatencyBudget
from fxprune.pipeline import Cut, Dense, compress
from fxprune.recording.inputs import describe_inputs, device_of, make_inputs
from fxprune.reports.report import Latency
from fxprune.training.distributed import from_first

TOLERANCE = 0.04
"""How far the measured ratio may be from the budget, as a share of it."""
_STEADY = 0.1  # difference of two measurements of the same, as a share, that is worth a note
_AT_LEAST_LESS = 0.9  # of a prediction that was too slow, the next one
_ROUNDS = 6  # of cutting and measuring the whole model
_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the channels of a dimension: where kernels are timed
_AXES = 2  # dimensions of a kernel that the table follows; by others, such as whole heads, its time is proportional

_RUNS = 31  # of each network, for the figures of the report

Floats = npt.NDArray[np.float64]


class Clock:
    """The latency of a dense model on one engine, and of what pruning leaves of it.

    Args:
        dense: the model.
        budget: what is measured, and how.
        align: multiple of channels at which kernels are timed.

    Raises:
        ModelError: the weights are on the meta device.
        ExportError: the model cannot be exported, or the engine does not run it.
    """

    def __init__(self, dense: Dense, budget: LatencyBudget, align: int):
        if dense.on_meta:
            raise ModelError("latency= is measured, and weights on the meta device cannot run. Load them first.")
        provider = placed(budget.provider or provider_at_hand(), dense.module)
        threads = budget.threads or 0
        args, kwargs = dense.args, dense.kwargs
        if budget.batch is not None:
            device = device_of(dense.module)
            args, kwargs = make_inputs(describe_inputs(args, kwargs), device, batch=budget.batch)
        with dense.stages("timing"):
            self._stopwatch = Stopwatch(dense.whole.module, describe_inputs(args, kwargs), provider, threads)
            works = workload(dense.module, dense.graph, args, kwargs)
            whole_ms = dense_ms = from_first(self._stopwatch.dense_ms())
            if dense.removed:
                dense_ms = whole_ms * from_first(self._stopwatch.ratio(dense.module))
            self._whole = round(whole_ms * 1e6) if dense.removed else None
            self.cost = LatencyModel(
                works, dense.graph, dense_ms, align, lambda kernels: from_first(kernel_ms(kernels, provider, threads))
            )

    def within(self, options: Cut) -> Cut:
        """The options with a budget that reads this clock."""
        return replace(options, budget=replace(options.budget, cost=self.cost, whole=self._whole))

    def compress(
        self, dense: Dense, scores: Sequence[Scores | None], options: Cut, method: str, notes: Sequence[str] = ()
    ) -> fx.GraphModule:
        """``pipeline.compress``, until the measured latency is the budget.

        Raises:
            BudgetError: no plan that was measured meets it.
        """
        target = options.budget.ratio
        tried: dict[float, float] = {}
        ratio, stop = target, None
        while ratio not in tried and len(tried) < _ROUNDS:
            trial = replace(options, budget=replace(options.budget, ratio=ratio), verify=False)
            try:
                pruned = compress(dense, scores, trial, method, notes)
            except BudgetError as error:
                stop = error
                break
            with dense.stages("timing"):
                tried[ratio] = from_first(self._stopwatch.ratio(pruned))
            if abs(tried[ratio] / target - 1) <= TOLERANCE:
                break
            ratio = _next(tried, target)
        good = [predicted for predicted, measured in tried.items() if measured <= target * (1 + TOLERANCE)]
        if not good:
            if stop is not None and not tried:
                raise stop
            raise BudgetError(
                f"latency={target:g} was not reached: the smallest ratio measured was {min(tried.values()):.2f}"
                + (f". {stop}" if stop is not None else f", in {len(tried)} rounds of cutting and measuring."),
            )
        final = max(good, key=lambda predicted: tried[predicted])
        pruned = compress(dense, scores, replace(options, budget=replace(options.budget, ratio=final)), method, notes)
        with dense.stages("timing"):
            latency: Latency = from_first(self._stopwatch.beside(pruned, _RUNS))
        report = pruned.meta["fxprune"]
        told = report.notes
        if abs(latency.ratio / tried[final] - 1) > _STEADY:
            told = (
                *told,
                f"the latency ratio was {tried[final]:.2f} in the search and {latency.ratio:.2f} at the end: something "
                "else runs on this machine; measure again when it does not",
            )
        seconds = dict(dense.stages.seconds)
        pruned.meta["fxprune"] = replace(
            report, latency=latency, budget=("latency", target), seconds=seconds, notes=told
        )
        return pruned


def _next(tried: dict[float, float], target: float) -> float:
    """The predicted ratio to try next, from measured ones: between the nearest two, else in proportion.

    Where all were above the target it is always smaller than those: what is measured need not follow the prediction.
    """
    below = max((p for p, m in tried.items() if m <= target), default=None)
    above = min((p for p, m in tried.items() if m > target), default=None)
    if below is not None and above is not None and below < above:
        part = (target - tried[below]) / (tried[above] - tried[below])
        return below + min(0.9, max(0.1, part)) * (above - below)
    if below is None:
        least = min(tried)
        return least * min(_AT_LEAST_LESS, target / tried[least])
    return min(1.0, below * target / tried[below])


class LatencyModel:
    """Predicted nanoseconds of a choice of channels, a boolean per channel.

    Args:
        works: the ops of the dense model.
        graph: its channels.
        dense_ms: what it takes as a whole, measured.
        align: multiple of channels at which kernels are timed.
        time: milliseconds of kernels.
    """

    def __init__(
        self,
        works: Sequence[Work],
        graph: ChannelGraph,
        dense_ms: float,
        align: int,
        time: Callable[[Sequence[Kernel]], list[float]],
    ):
        counts, free = Counts(), np.append(~graph.locked, False)
        kernels = [_Sized.of(work, counts, free) for work in works if work.kind != "other"]
        others = [tensor for work in works if work.kind == "other" for tensor in work.operands]
        self._elements = Products([elements(tensor.shape, tensor.labels) for tensor in others])
        choices = [number for number, kernel in enumerate(kernels) if kernel.work.kind == "choice"]
        self._choices = np.isin(np.arange(len(kernels)), choices)
        self._chosen = [(number, *pair) for number in choices if (pair := _chosen(kernels[number].work, counts))]
        self._counts = counts.reader()
        self._table = _Table(kernels, align, time)
        alone, made, _ = self._parts(graph.everything())
        self._scale = min(1.0, dense_ms / alone) if alone else 1.0  # alone, kernels reorder what a model need not
        self._per_element = max(0.0, dense_ms - alone) / made if made else 0.0

    def __call__(self, keep: Keep) -> int:
        alone, made, choosing = self._parts(keep)
        return round((self._scale * alone + self._per_element * made + choosing) * 1e6)

    def _parts(self, keep: Keep) -> tuple[float, int, float]:
        """Milliseconds of the kernels alone, the elements that the other ops make, and milliseconds of choices.

        To choose all the channels that there are takes nothing: it will not be done.
        """
        extended = np.append(keep, True)  # the last stands for what is no channel
        counts = self._counts(extended)
        times = self._table(counts)
        for kernel, given, chosen in self._chosen:
            if counts[given] == counts[chosen]:
                times[kernel] = 0.0
        choices = self._choices
        return float(times[~choices].sum()), self._elements(extended), float(times[choices].sum())


def _chosen(work: Work, counts: Counts) -> tuple[int, ...]:
    """Where the counts are of what a choice is of, and of what it chooses; nothing where they are not channels."""
    x, index = work.operands
    factors = [factor for tensor, dim in ((x, 1), (index, 0)) for factor in tensor.labels if factor.dim == dim]
    return tuple(map(counts.place, factors)) if len(factors) == 2 else ()


@dataclass(frozen=True)
class _Along:
    """A size that follows an axis: ``share`` times its count."""

    axis: int
    share: Fraction


@dataclass(frozen=True)
class _Sized:
    """A kernel whose sizes follow channels. An axis is a set of channels that fill dimensions, some of them repeated.

    ``shapes``: of its operands; ``dense``: the axes' sizes in the dense model; ``places``: where their counts are;
    ``steps``: their counts are multiples of these.
    """

    work: Work
    shapes: tuple[tuple[int | _Along, ...], ...]
    dense: tuple[int, ...]
    places: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def of(cls, work: Work, counts: Counts, free: Keep) -> _Sized:
        axes: dict[bytes, int] = {}  # which channels -> number
        dense: list[int] = []
        places: list[int] = []
        shapes = []
        for tensor in work.operands:
            shape: list[int | _Along] = list(tensor.shape)
            for factor in tensor.labels:
                ids, size = factor.ids, tensor.shape[factor.dim]
                if free[ids].any():
                    axis = axes.setdefault(np.unique(ids).tobytes(), len(axes))
                    if axis == len(dense):
                        dense.append(size)
                        places.append(counts.place(factor))
                    shape[factor.dim] = _Along(axis, Fraction(size, dense[axis]))
            shapes.append(tuple(shape))
        steps = [1] * len(dense)
        for along in itertools.chain(*shapes):
            if isinstance(along, _Along):
                steps[along.axis] = math.lcm(steps[along.axis], along.share.denominator)
        if work.kind == "convolution" and len(dense) > 1:  # groups that stay keep equal counts of inputs and of outputs
            steps = [math.lcm(step, work.groups) for step in steps]
        return cls(work, tuple(shapes), tuple(dense), tuple(places), tuple(steps))

    @property
    def key(self) -> Any:
        """The same for kernels of equal sizes and options."""
        return self.work.kind, self.work.constant, self.work.options, self.shapes, self.dense, self._dtype

    @property
    def _dtype(self) -> str:
        return str(self.work.operands[0].dtype).removeprefix("torch.")

    def grid(self, align: int) -> list[list[int]]:
        """The counts of the first axes at which it is timed: shares in multiples of ``align``, and the dense one."""
        result = []
        for size, step in zip(self.dense[:_AXES], self.steps, strict=False):
            step = math.lcm(step, align)
            found = {max(step, round(share * size / step) * step) for share in _SHARES[:-1]}
            result.append(sorted({count for count in found if count < size} | {size}))
        return result

    def at(self, sizes: Sequence[int]) -> Kernel:
        """The kernel for these counts of its axes."""
        shapes = tuple(
            tuple(int(s.share * sizes[s.axis]) if isinstance(s, _Along) else s for s in shape) for shape in self.shapes
        )
        options = self.work.options
        if self.work.kind == "convolution":
            options = (*options, ("groups", groups_of(shapes, dict(options)["transposed"])))
        assert self.work.kind != "other"
        return Kernel(self.work.kind, shapes[:2], self.work.constant, options, self._dtype)


class _Table:
    """Times of kernels over the counts of up to two axes, interpolated between the counts that were timed."""

    def __init__(self, kernels: Sequence[_Sized], align: int, time: Callable[[Sequence[Kernel]], list[float]]):
        patterns = {kernel.key: kernel for kernel in kernels}
        rows = {key: number for number, key in enumerate(patterns)}
        grids = [kernel.grid(align) for kernel in patterns.values()]
        wanted: list[Kernel] = []
        for kernel, grid in zip(patterns.values(), grids, strict=True):
            rest = kernel.dense[_AXES:]
            wanted += [kernel.at((*sizes, *rest)) for sizes in itertools.product(*grid)]
        times = iter(time(wanted))
        width = len(_SHARES)
        self._grid = np.full((len(patterns), _AXES, width), np.inf)
        self._times = np.zeros((len(patterns), width, width))
        for row, grid in enumerate(grids):
            lengths = [len(points) for points in grid] + [1] * (_AXES - len(grid))
            for axis, points in enumerate(grid):
                self._grid[row, axis, : len(points)] = points
            for axis in range(len(grid), _AXES):
                self._grid[row, axis, 0] = 1
            measured = np.array([next(times) for _ in range(math.prod(lengths))]).reshape(lengths)
            padding = [(0, width - length) for length in lengths]
            self._times[row] = np.pad(measured, padding, mode="edge")
        self._rows = np.array([rows[k.key] for k in kernels], dtype=np.int64)
        self._axes = np.array([[*k.places[:_AXES], *[0] * (_AXES - len(k.places))] for k in kernels], dtype=np.int64)
        self._axes = self._axes.reshape(-1, _AXES)
        self._rest = [(number, place, size) for number, k in enumerate(kernels)
                      for place, size in zip(k.places[_AXES:], k.dense[_AXES:], strict=True)]  # fmt: skip

    def __call__(self, counts: Floats) -> Floats:
        """Milliseconds per kernel."""
        grid, at = self._grid[self._rows], counts[self._axes]  # [kernels, axes, points], [kernels, axes]
        low = np.clip((grid <= at[:, :, None]).sum(2) - 1, 0, grid.shape[2] - 2)
        below, above = (np.take_along_axis(grid, place[:, :, None], 2)[:, :, 0] for place in (low, low + 1))
        part = np.where(np.isinf(above), 0.0, np.clip((at - below) / np.where(np.isinf(above), 1, above - below), 0, 1))
        fewer = np.minimum(1.0, at / grid[:, :, 0]).prod(1)  # than were timed: in proportion
        times = self._times[self._rows]
        number = np.arange(len(times))
        result = np.zeros(len(times))
        for one in (0, 1):
            for two in (0, 1):
                weight = np.abs(1 - one - part[:, 0]) * np.abs(1 - two - part[:, 1])
                result += weight * times[number, low[:, 0] + one, low[:, 1] + two]
        result *= fewer
        for kernel, place, size in self._rest:
            result[kernel] *= counts[place] / size
        return result
