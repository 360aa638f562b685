"""What a method is, and where its name is registered.

A *criterion* scores the channels of a group from the state of the model. It sees channel groups and tensors, never
layers or graphs: which channels belong together is not its business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fxprune.channels import ChannelGraph, ChannelGroup
from fxprune.errors import InputError, ModelError

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ModelState:
    """What criteria read.

    ``tensors``: name -> parameter. ``seed``: for criteria that draw. Sums are cached: one pass over the weights each.
    """

    graph: ChannelGraph
    tensors: Mapping[str, Tensor]
    seed: int = 0
    _cache: dict[Any, Scores] = field(default_factory=dict)

    def power_sums(self, group: ChannelGroup, power: int) -> Scores:
        """``sum |w|^power`` over every slice of every parameter that a channel owns, ``[blocks, size]``."""

        def compute() -> Scores:
            total = np.zeros(self.graph.channel_count)
            for parameter in self.graph.parameters:
                if parameter.trainable:
                    _add(total, parameter.labels, self._values(parameter.name), power)
            return total

        return self._cached(("power", power), compute)[group.channels]

    def norm_scales(self, group: ChannelGroup) -> Scores | None:
        """``sum |gamma|`` over the scales of the norm layers a channel passes, ``[blocks, size]``; None without any."""

        def compute() -> Scores:
            total = np.zeros(self.graph.channel_count)
            count = np.zeros(self.graph.channel_count)
            for parameter in self.graph.parameters:
                if set(parameter.names) & self.graph.norm_scales:
                    _add(total, parameter.labels, self._values(parameter.name), 1)
                    for factor in parameter.labels:
                        np.add.at(count, factor.ids.numpy().reshape(-1), 1)
            return np.where(count > 0, total, np.nan)

        scales = self._cached("norm", compute)[group.channels]
        return None if np.isnan(scales).any() else scales

    def _values(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if tensor.is_meta:
            raise ModelError(
                f"{name} is on the meta device and has no values. Load the weights before pruning, or use a method "
                'that reads none, such as method="random".'
            )
        return tensor.detach()

    def _cached(self, key: Any, compute: Callable[[], Scores]) -> Scores:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


def _add(total: Scores, labels: Any, tensor: Tensor, power: int) -> None:
    magnitude = tensor.abs().double() if power == 1 else tensor.double().abs().pow(power)
    for factor in labels:
        over = [d for d, size in enumerate(factor.ids.shape) if size == 1]
        sums = magnitude.sum(dim=over, keepdim=True) if over else magnitude
        np.add.at(total, factor.ids.numpy().reshape(-1), sums.cpu().numpy().reshape(-1))


@runtime_checkable
class Criterion(Protocol):
    """Scores channels; the lowest go first. Scores of a group are compared after division by the group's mean."""

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        """One number per channel, ``[blocks, size]``, or None if the criterion says nothing of this group."""


_METHODS: dict[str, type] = {}
M = TypeVar("M", bound=type)


def method(name: str) -> Callable[[M], M]:
    """Register a method class under ``name``; without arguments it must construct the default."""

    def register(cls: M) -> M:
        if name in _METHODS:
            raise ValueError(f"two methods are named {name!r}")
        _METHODS[name] = cls
        return cls

    return register


def available() -> dict[str, str]:
    """Name -> first line of the docstring, for every registered method."""
    found = {e.name: e.load() for e in entry_points(group="fxprune.methods")}
    return {name: (cls.__doc__ or "").strip().splitlines()[0] for name, cls in sorted({**found, **_METHODS}.items())}


def resolve(spec: str | Criterion) -> Criterion:
    """The method object for a name or an object.

    Raises:
        InputError: for an unknown name (lists the known ones) or something that cannot score.
    """
    if isinstance(spec, str):
        if spec in _METHODS:
            made: Criterion = _METHODS[spec]()
            return made
        for entry in entry_points(group="fxprune.methods"):
            if entry.name == spec:
                loaded: Criterion = entry.load()()
                return loaded
        raise InputError(f"Unknown method {spec!r}. Known methods: {', '.join(available())}.")
    if isinstance(spec, type) or not isinstance(spec, Criterion):
        raise InputError(
            f"method must be a name or a method object such as fxprune.methods.L2(), not {spec!r}. "
            f"Known methods: {', '.join(available())}."
        )
    return spec


def score_groups(criterion: Criterion, state: ModelState) -> list[Scores | None]:
    """Scores ``[blocks, size]`` of every group that may be cut; None of the others, and of those without a score.

    Raises:
        InputError: the criterion gives something else.
    """
    return [None if group.locked else _checked(criterion, group, state) for group in state.graph.groups]


def _checked(criterion: Criterion, group: ChannelGroup, state: ModelState) -> Scores | None:
    given = criterion.score(group, state)
    if given is None:
        return None
    scores = np.asarray(given)
    if scores.dtype.kind not in "biuf" or scores.shape != group.channels.shape:
        raise InputError(
            f"{type(criterion).__name__} scores {group.name} with {scores.dtype} {list(scores.shape)}; a method gives "
            f"one number per channel, [blocks, size] = {list(group.channels.shape)}, or None."
        )
    return scores.astype(np.float64)
