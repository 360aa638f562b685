"""What criteria read: weights, and what was measured over data, summed channel by channel.

A channel owns slices of several parameters: a row of one weight, a column of the next, a bias, a scale. A *place* is
one dimension of one parameter; what a criterion computes element by element is summed over the slice in every place,
and the places are put together by ``aggregate``: ``"sum"``, ``"mean"`` or ``"max"``. Every number is computed once for
all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxprune.errors import InputError, ModelError
from fxprune.groups.channels import ChannelGraph, ChannelGroup, Parameter
from fxprune.io.text import some

Scores = npt.NDArray[np.float64]
Aggregate = Literal["sum", "mean", "max"]
_ENTRIES = 2**24  # of a weight, that are looked at together
_ENTRIES_IN_CACHE = 2**18  # of a processor


@dataclass(frozen=True)
class Activation:
    """One tensor that a layer contracts over channels, averaged over data.

    ``node``: the layer. ``parameters``: the layer's own. ``channels [n]``: what it reads, ascending. ``absolute``,
    ``square``, ``nonzero``: mean of ``|x|``, of ``x^2``, and the share of entries other than zero, all ``[n]``.
    """

    node: str
    parameters: tuple[str, ...]
    channels: npt.NDArray[np.int64]
    absolute: Scores
    square: Scores
    nonzero: Scores


@dataclass(frozen=True)
class Saliency:
    """First-order changes of the loss, ``T = sum(gradient * weight)`` over a slice: the mean of ``T^2`` over data.

    ``joint [channels]``: ``T`` over everything a channel owns. ``places``: the same for each place (channels, values).
    """

    joint: Scores
    places: Sequence[tuple[npt.NDArray[np.int64], Scores]]


@dataclass(frozen=True)
class Read:
    """One weight that reads channels, as ``groups`` matrices side by side.

    ``node``: the layer that calls it first. ``channels [g, K]``: of every input, -1 where it is of none. ``gram
    [g, K, K]``: of the inputs, the mean over positions of all calls; about their mean, where a bias or the norm behind
    takes that up. ``weight [g, K, O]``. ``sensitivity [g, O]``: how much the square of the network's outputs changes
    with the square of an error of this output, summed over positions. ``count``: how many independent positions the
    data are worth. ``refitted``: False if the refit leaves it alone, as a weight that something else reads as well.
    """

    node: str
    channels: npt.NDArray[np.int64]
    gram: Tensor
    weight: Tensor
    sensitivity: Tensor
    count: float
    refitted: bool = True


@dataclass(frozen=True)
class Gate:
    """A tensor that holds channels of which some are read by no weight, as queries are, which meet keys.

    ``node``: what gives it. ``channels [K]``. ``energy [K, K]``: ``u^T u`` summed over positions, the mean over
    samples, where ``u [K]`` is how the network's outputs change, to first order, when a channel is set to zero at a
    position.
    """

    node: str
    channels: npt.NDArray[np.int64]
    energy: Tensor


Trial = Callable[[Mapping[str, Tensor], Mapping[str, npt.NDArray[np.int64]]], float]
"""``(weights, closed)``: node -> another weight ``[g, K, O]`` of a ``Read``, whose bias follows if it can, node ->
channels of a ``Gate`` that are set to zero. Returns ``|change of the network's outputs|^2`` per sample, measured."""


@dataclass(frozen=True)
class Measured:
    """What was collected over data. ``batches``: one ``T`` per batch. ``samples``: one per sample.

    ``trial``: of changes of what is in ``reads``.
    """

    batches: Saliency | None = None
    samples: Saliency | None = None
    activations: Sequence[Activation] = ()
    reads: Sequence[Read | Gate] = ()
    trial: Trial | None = None


@dataclass(frozen=True)
class ModelState:
    """What criteria read.

    ``tensors``: name -> parameter or buffer. ``seed``: for criteria that draw. ``measured``: over data, of the kinds
    that the criterion ``needs``. ``kept``: per channel, False where earlier steps have cut it (its weights are zero).
    ``costs``: the share of what the budget counts that a choice of channels leaves; without, of the MACs.
    ``unscaled``: which channels something takes up without the scale of a norm (``groups.flow.unscaled``); none, if
    that is not given.
    """

    graph: ChannelGraph
    tensors: Mapping[str, Tensor]
    seed: int = 0
    measured: Measured = field(default_factory=Measured)
    kept: npt.NDArray[np.bool_] | None = None
    unscaled: Callable[[], frozenset[int]] = frozenset
    costs: Callable[[npt.NDArray[np.bool_]], float] | None = None
    _cache: dict[Any, Any] = field(default_factory=dict)

    def share(self, keep: npt.NDArray[np.bool_]) -> float:
        """What a choice of channels leaves of what the budget counts."""
        if self.costs is not None:
            return self.costs(keep)
        return self.graph.macs(keep) / max(self.graph.macs(), 1)

    def power_sums(self, group: ChannelGroup, power: int, aggregate: Aggregate = "sum") -> Scores:
        """``sum |w|^power`` over the slices of every parameter that a channel owns, ``[blocks, size]``."""

        def compute() -> Scores:
            return self.aggregated((p for p in self.graph.parameters if p.trainable), magnitude, aggregate)

        def magnitude(values: Tensor) -> Tensor:
            values = values.abs() if values.is_complex() else values
            values = values.to(torch.float64, copy=True)  # changed in place: memory is what costs
            return values.mul_(values) if power == 2 else values.abs_().pow_(power)

        result: Scores = self.cached(("power", power, aggregate), compute)[group.channels]
        return result

    def norm_scales(self, group: ChannelGroup, aggregate: Aggregate = "sum") -> Scores | None:
        """``|gamma|`` over the scales of the norm layers a channel passes, ``[blocks, size]``.

        None without any, and where something takes the channels up that no scale has multiplied, which is noted.
        """

        def compute() -> Scores:
            scales = (p for p in self.graph.parameters if set(p.names) & self.graph.norm_scales)
            return self.aggregated(scales, lambda values: values.double().abs(), aggregate, missing=np.nan)

        scales: Scores = self.cached(("norm", aggregate), compute)[group.channels]
        if np.isnan(scales).any():
            return None
        if not self.cached("unscaled", self.unscaled).isdisjoint(group.channels.reshape(-1).tolist()):
            self.cached("held", dict)[group.name] = None
            return None
        return scales

    @property
    def notes(self) -> list[str]:
        """For the report: what was left without a score, and why."""
        held: dict[str, None] = self.cached("held", dict)
        return [f"no score for {some([*held])}: layers read them past the scales of norms"] if held else []

    def aggregated(
        self,
        parameters: Iterable[Parameter],
        element: Callable[[Tensor], Tensor],
        aggregate: Aggregate,
        missing: float = 0.0,
    ) -> Scores:
        """``element(values)`` of every parameter, value by value, summed over slices; ``[channels]``."""
        total = Aggregator(self.graph.channel_count, aggregate)
        for parameter in parameters:
            places = places_of(parameter)
            if places:
                for place, sums in zip(places, _sums(self.values(parameter.name), element, places), strict=True):
                    total.add(place.channels, place.of_channels(sums))
        return total.result(missing)

    def saliency(self, group: ChannelGroup, kind: Literal["batches", "samples"], aggregate: Aggregate) -> Scores:
        """The mean of ``T^2`` over data (see ``Saliency``), ``[blocks, size]``."""
        measured: Saliency | None = getattr(self.measured, kind)
        if measured is None:
            raise InputError(f"Gradients of {kind} were not measured: the criterion must say that it needs them.")
        if aggregate == "sum":
            return measured.joint[group.channels]

        def compute() -> Scores:
            places = Aggregator(self.graph.channel_count, aggregate)
            for channels, values in measured.places:
                places.add(channels, values)
            return places.result()

        result: Scores = self.cached(("saliency", kind, aggregate), compute)[group.channels]
        return result

    def slices(self, group: ChannelGroup) -> Iterator[tuple[str, Tensor]]:
        """Every weight of two or more dims that the group's channels produce: (name, slices ``[channels, n]``).

        Rows in the order of ``group.channels.reshape(-1)``.
        """
        order = group.channels.reshape(-1)
        for member in group.members:
            parameter = self.graph.by_name[member.name]
            if member.dim != 0 or len(parameter.shape) < 2 or not parameter.trainable or member.name != parameter.name:
                continue
            (factor,) = (f for f in parameter.labels if f.dim == 0)
            ids = factor.rows()[0]
            places = np.argsort(ids, kind="stable")
            starts = np.searchsorted(ids[places], order)
            counts = np.searchsorted(ids[places], order, side="right") - starts
            if factor.rows().shape[0] > 1 or len(np.unique(counts)) > 1 or not counts[0]:
                continue
            index = torch.from_numpy(places[starts[:, None] + np.arange(counts[0])])
            values = as_real(self.values(member.name))
            yield member.name, values[index.to(values.device)].flatten(1).double().cpu()

    def values(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            ModelError: it is on the meta device.
        """
        tensor = self.tensors[name]
        if tensor.is_meta:
            raise ModelError(
                f"{name} is on the meta device and has no values. Load the weights before pruning, or use a method "
                'that reads none, such as method="random".'
            )
        return tensor.detach()

    def cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """``compute()``, once per state and key."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


class Aggregator:
    """Values of channels in several places, put together."""

    def __init__(self, channel_count: int, aggregate: Aggregate):
        self._aggregate = aggregate
        self._total = np.full(channel_count, -np.inf) if aggregate == "max" else np.zeros(channel_count)
        self._count = np.zeros(channel_count)

    def add(self, channels: npt.NDArray[np.int64], values: Scores) -> None:
        """``channels`` are distinct."""
        if self._aggregate == "max":
            self._total[channels] = np.maximum(self._total[channels], values)
        else:
            self._total[channels] += values
        self._count[channels] += 1

    def result(self, missing: float = 0.0) -> Scores:
        """``[channels]``; ``missing`` where nothing was added."""
        total = self._total / np.maximum(self._count, 1) if self._aggregate == "mean" else self._total
        return np.where(self._count > 0, total, missing)


@dataclass(frozen=True)
class Place:
    """One dimension of one parameter, in which every one of ``channels`` owns a slice.

    ``dim``: what a cut shortens. ``position``: for every entry of the factor's ids the place in ``channels``. ``runs``:
    of dims along which ids do not vary, each of neighbours, the outermost first.
    """

    parameter: Parameter
    dim: int
    channels: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    runs: tuple[tuple[int, ...], ...]

    def sums(self, values: Tensor) -> Scores:
        """``values``, of the parameter's shape, summed over every channel's slice; as long as ``channels``."""
        return self.of_channels(self.summed(values))

    def summed(self, values: Tensor) -> Tensor:
        """``values``, of the parameter's shape but for the length of dim 0, summed where ids do not vary.

        One dim after the other, where others lie between them: to jump over those value by value is slow.
        """
        for dims in self.runs:
            values = values.sum(dim=dims, keepdim=True)
        return values

    def of_channels(self, sums: Tensor) -> Scores:
        """What ``summed`` gave for the whole parameter, added up channel by channel; as long as ``channels``."""
        values = sums.double().cpu().numpy().reshape(-1)
        return np.bincount(self.position, values, len(self.channels)).astype(np.float64)


def sums_in_places(values: Iterable[tuple[Tensor, Sequence[Place]]]) -> list[Scores]:
    """``place.sums(value)`` of every place, one after the other, with one transfer from the device for all."""
    found = [(place, place.summed(value).double().reshape(-1)) for value, places in values for place in places]
    if not found:
        return []
    device = found[0][1].device
    parts = torch.cat([sums.to(device) for _, sums in found]).cpu().split([len(sums) for _, sums in found])
    return [place.of_channels(part) for (place, _), part in zip(found, parts, strict=True)]


def _sums(values: Tensor, element: Callable[[Tensor], Tensor], places: Sequence[Place]) -> list[Tensor]:
    """``place.summed(element(values))`` of every place, a few rows at a time: big copies are slow."""
    entries = _ENTRIES_IN_CACHE if values.device.type == "cpu" else _ENTRIES
    if values.numel() <= entries:
        whole = element(values)
        return [place.summed(whole) for place in places]
    rows = max(1, entries * len(values) // values.numel())
    parts = [[place.summed(chunk) for place in places] for chunk in map(element, values.split(rows))]
    return [
        torch.stack(of_place).sum(0) if place.runs and place.runs[0][0] == 0 else torch.cat(of_place)
        for place, of_place in zip(places, zip(*parts, strict=True), strict=True)
    ]


def as_real(values: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones along a last dim of their own; others as they are."""
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def first_order(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """Weight times gradient in float64: what the loss loses with every entry, to first order. None is no gradient.

    Of complex entries the change of both parts: ``Re(w conj(g))``, with torch's gradient ``dL/da + i dL/db``.
    """
    if gradient is None:
        return torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    product = as_real(weight).double() * as_real(gradient).double()
    return product.sum(-1) if weight.is_complex() else product


def places_of(parameter: Parameter) -> list[Place]:
    """Where channels run through the parameter."""
    places = []
    for factor in parameter.labels:
        channels = factor.ids.reshape(-1)
        position = np.arange(len(channels))
        if not (channels[1:] > channels[:-1]).all():  # which is usual, and sorting is slow
            channels, position = np.unique(channels, return_inverse=True)
        runs = tuple(
            tuple(d for d, _ in run)
            for constant, run in groupby(enumerate(factor.ids.shape), lambda d: d[1] == 1)
            if constant
        )
        places.append(Place(parameter, factor.dim, channels, position.reshape(-1), runs))
    return places


def kept_entries(parameter: Parameter, keep: npt.NDArray[np.bool_]) -> Tensor:
    """Which entries of the parameter belong to channels with ``keep`` only; of size 1 where that does not vary."""
    entries = torch.ones([1] * len(parameter.shape), dtype=torch.bool)
    for factor in parameter.labels:
        entries = entries & torch.from_numpy(keep[factor.ids])
    return entries
