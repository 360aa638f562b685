"""What a method is, and where its name is registered.

A *criterion* scores the channels of a group from the state of the model; it ``needs`` nothing but weights unless it
says so. A *learner* takes part in a training and says afterwards which channels matter (``methods/learner.py``). Both
see channel groups and tensors, never layers or graphs: which channels belong together is not their business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from fxprune.errors import InputError
from fxprune.groups.channels import ChannelGraph, ChannelGroup
from fxprune.methods.learner import Hooks, Outcome, Site
from fxprune.methods.state import ModelState, Scores

Need = Literal["gradients", "sample_gradients", "activations", "reads"]
Normalize = Literal["mean", "max", "sum", "none"]
NEEDS = ("gradients", "sample_gradients", "activations", "reads")
WITH_TARGET = frozenset({"gradients", "sample_gradients"})
"""The needs that read targets; for the others inputs are enough."""


@runtime_checkable
class Criterion(Protocol):
    """Scores channels; the lowest go first.

    ``needs`` (optional, a set): what has to be measured over data first: ``"gradients"`` of batches,
    ``"sample_gradients"``, ``"activations"``. ``normalize`` (optional, default ``"mean"``): what a group's scores are
    divided by before groups are compared.
    """

    def score(self, group: ChannelGroup, state: ModelState) -> Scores | None:
        """One number per channel, ``[blocks, size]``, or None if the criterion says nothing of this group."""


@runtime_checkable
class Learner(Protocol):
    """Takes part in a training, and scores channels when it is over.

    ``decides`` (optional, default False): it says itself how much goes (``Outcome.threshold``), in place of a budget.
    ``within_budget()`` (optional): a variant of a method that decides which meets a budget instead; None where its
    settings leave no room for one.
    ``label_free`` (optional, default False): it can do without data; ``steps`` and ``batch`` then say how many inputs.
    """

    def attach(self, site: Site) -> Hooks:
        """What runs around every step of this training. The learner itself keeps no state."""


Method = Criterion | Learner
_METHODS: dict[str, type] = {}
M = TypeVar("M", bound=type)


def register(name: str) -> Callable[[M], M]:
    """Register a method class under ``name``; without arguments it must construct the default.

    Raises:
        ValueError: the name is taken.
    """

    def add(cls: M) -> M:
        if name in _METHODS:
            raise ValueError(f"two methods are named {name!r}")
        _METHODS[name] = cls
        return cls

    return add


def available() -> dict[str, str]:
    """Name -> first line of the docstring, for every registered method.

    Raises:
        InputError: a package has an entry point that cannot be loaded.
    """
    found = {e.name: _load(e) for e in entry_points(group="fxprune.methods")}
    return {name: (cls.__doc__ or "").strip().splitlines()[0] for name, cls in sorted({**found, **_METHODS}.items())}


def resolve(spec: str | Method) -> Method:
    """The method object for a name or an object.

    Raises:
        InputError: for an unknown name (lists the known ones), one whose package cannot be loaded, or something that
            can neither score nor attach.
    """
    if isinstance(spec, str):
        if spec in _METHODS:
            made: Method = _METHODS[spec]()
            return made
        for entry in entry_points(group="fxprune.methods"):
            if entry.name == spec:
                loaded: Method = _load(entry)()
                return loaded
        raise InputError(f"Unknown method {spec!r}. Known methods: {', '.join(available())}.")
    if isinstance(spec, type) or not isinstance(spec, (Criterion, Learner)):
        raise InputError(
            f"method must be a name or a method object such as fxprune.methods.L2(), not {spec!r}. "
            f"Known methods: {', '.join(available())}."
        )
    return spec


def _load(entry: EntryPoint) -> type:
    try:
        loaded: type = entry.load()
    except Exception as error:
        raise InputError(
            f"The method {entry.name!r} cannot be loaded from {entry.value} ({type(error).__name__}: {error}). Repair "
            "or uninstall the package that brings it."
        ) from error
    return loaded


def name_of(method: Any) -> str:
    """A name, or how to construct a method object: ``L2(aggregate='max')``."""
    if isinstance(method, str) or not dataclasses.is_dataclass(method) or isinstance(method, type):
        return method if isinstance(method, str) else repr(method)
    given = [(f.name, getattr(method, f.name)) for f in dataclasses.fields(method) if f.repr]
    defaults = {f.name: f.default for f in dataclasses.fields(method)}
    shown = ", ".join(f"{name}={value!r}" for name, value in given if value != defaults[name])
    return f"{type(method).__name__}({shown})"


def needs_of(criterion: Criterion) -> frozenset[Need]:
    """What a criterion has to have measured over data.

    Raises:
        InputError: it asks for something that nobody measures.
    """
    needs: frozenset[Any] = frozenset(getattr(criterion, "needs", ()))
    unknown = sorted(str(need) for need in needs - set(NEEDS))
    if unknown:
        raise InputError(f"{type(criterion).__name__} needs {', '.join(unknown)}. Known: {', '.join(NEEDS)}.")
    return needs


def score_groups(criterion: Criterion, state: ModelState) -> list[Scores | None]:
    """Normalised scores ``[blocks, size]`` of every group that may be cut; None of the others, and where it says none.

    Channels that earlier steps have cut come before all others.

    Raises:
        InputError: the criterion gives something else.
        ModelError: a score is not finite.
    """
    normalize: Normalize = getattr(criterion, "normalize", "mean")
    if normalize not in _NORMALIZERS:
        raise InputError(f"normalize={normalize!r} is unknown. Known: {', '.join(_NORMALIZERS)}.")
    scored = []
    for group in state.graph.groups:
        scores = None if group.locked else _checked(criterion, group, state)
        if scores is not None:
            kept = np.ones(scores.shape, dtype=bool) if state.kept is None else state.kept[group.channels]
            scale = _NORMALIZERS[normalize](scores[kept]) if kept.any() else 1.0
            scores = scores / scale if scale > 0 and np.isfinite(scale) else scores
        scored.append(scores)
    return scored if state.kept is None else _cut_first(scored, state.graph, state.kept)


def _cut_first(scored: list[Scores | None], graph: ChannelGraph, kept: npt.NDArray[np.bool_]) -> list[Scores | None]:
    """The scores with those of channels that were cut below all others."""
    lowest = min((float(scores.min()) for scores in scored if scores is not None), default=0.0) - 1.0
    groups = zip(graph.groups, scored, strict=True)
    return [None if scores is None else np.where(kept[group.channels], scores, lowest) for group, scores in groups]


_NORMALIZERS: dict[str, Callable[[Scores], float]] = {
    "mean": lambda scores: float(scores.mean()),
    "max": lambda scores: float(scores.max()),
    "sum": lambda scores: float(scores.sum()),
    "none": lambda scores: 1.0,
}


def _checked(criterion: Criterion, group: ChannelGroup, state: ModelState) -> Scores | None:
    return _numbers(type(criterion).__name__, group, criterion.score(group, state))


def _numbers(name: str, group: ChannelGroup, given: Any) -> Scores | None:
    if given is None:
        return None
    scores = np.asarray(given)
    if scores.dtype.kind not in "biuf" or scores.shape != group.channels.shape:
        raise InputError(
            f"{name} scores {group.name} with {scores.dtype} {list(scores.shape)}; a method gives "
            f"one number per channel, [blocks, size] = {list(group.channels.shape)}, or None."
        )
    return scores.astype(np.float64)


def checked_outcome(name: str, outcome: Any, graph: ChannelGraph) -> Outcome:
    """What a learner of this name says, its scores as arrays.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(outcome, Outcome):
        raise InputError(f"outcome() of {name} gave a {type(outcome).__name__}; it gives a fxprune.methods.Outcome.")
    if len(outcome.scores) != len(graph.groups):
        raise InputError(
            f"{name} scores {len(outcome.scores)} groups, and there are {len(graph.groups)}: scores are one for each "
            "of site.graph.groups, None to leave it alone."
        )
    pairs = zip(graph.groups, outcome.scores, strict=True)
    return replace(outcome, scores=[_numbers(name, group, scores) for group, scores in pairs])
