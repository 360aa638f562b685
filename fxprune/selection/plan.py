"""The plan: which indices of every parameter and buffer stay. Plain data, JSON in and out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from fxprune.errors import InputError, PlanError
from fxprune.groups.channels import ChannelGraph, Parameter
from fxprune.groups.cost import Keep
from fxprune.io.files import as_path, replacing
from fxprune.io.forms import Either, FormError, Map, Such, Whole, anything, check, json_of
from fxprune.io.text import some
from fxprune.labels.classes import Ids
from fxprune.labels.factors import Factor
from fxprune.labels.records import Attention

Kept = dict[str, dict[int, list[Any]]]
_FORMAT = 2
_FORMAT_WITH_BRANCHES = 3
_FORMAT_WITH_JOINS = 4
_FORMAT_WITH_EARLIER = 5
_FORMAT_WITH_LEAF_FUNCTIONS = 6
_FORMATS = (
    _FORMAT, _FORMAT_WITH_BRANCHES, _FORMAT_WITH_JOINS, _FORMAT_WITH_EARLIER, _FORMAT_WITH_LEAF_FUNCTIONS,
)  # fmt: skip
_NAMES = Such(anything, lambda names: isinstance(names, tuple) and all(type(n) is str for n in names), "names")
_ATTENTION = Either(*get_args(Attention))
_INDICES = [Whole()]
_WIDTHS = Such(
    (Whole(), Whole(1)), lambda counts: counts[0] <= counts[1], "how many channels are kept, and of how many"
)
_FORM = {
    "format": Either(*_FORMATS),
    "attention": _ATTENTION,
    "fingerprint": str,
    "torch": str,
    "widths": Map(_WIDTHS),
    "kept": Map(Map(Either(_INDICES, [_INDICES]), keys="0|[1-9][0-9]?")),
    "removed": [str],
    "joins": [str],
    "earlier": [Map(anything)],  # each a plan's
    "leaf_functions": [str],
}
_NEW_IN_FORMATS: dict[str, Any] = {"removed": [], "joins": [], "earlier": [], "leaf_functions": []}
_IN_MEMORY = {
    "kept": Map(Map(anything, keys=Whole())),
    "attention": _ATTENTION,
    "fingerprint": str,
    "torch_version": str,
    "widths": Map(_WIDTHS),
    "removed": _NAMES,
    "joins": _NAMES,
    "earlier": Such(anything, lambda plan: plan is None or isinstance(plan, PruningPlan), "a plan"),
    "leaf_functions": _NAMES,
}


SELECTION = "_selection"
"""How the names of buffers end that ``fxprune.select_inputs`` adds, but for a number behind it."""


def is_selection(name: str) -> bool:
    """Whether a buffer says by its name what a norm selects of a stream (``fxprune.select_inputs``)."""
    return re.search(rf"{SELECTION}(_\d+)?$", name) is not None


@dataclass(frozen=True)
class PruningPlan:
    """What stays of a model.

    ``kept``: name in the original state_dict -> dim -> kept indices, ascending. ``{"conv.weight": {0: [0, 2, 5]}}``: of
    its outputs three stay, and of its inputs all, which are left out. Of a grouped convolution's dim 1 there is one
    list per group. ``attention``: whether channels inside heads or whole heads were cut. ``fingerprint``: of the
    model's parameter names and shapes. ``widths``: (kept, original) number of channels of every group that may be cut,
    named after the first layer that makes them, in graph order; plans that keep the same are equal whatever they say
    here. ``removed``: residual branches that went as a whole (``prune(..., depth=)``), of whose parameters nothing is
    said otherwise. ``joins``: layers that choose what they read of a stream (``LatencyBudget(..., joins=True)``): of
    the channels of the whole stream ``kept`` has those that layer "conv" reads under "conv_reads". ``earlier``: the
    plan that made the network which this one is for, where that had been pruned before. ``leaf_functions``: functions
    of the model's, by ``package.module:name``, that its graph calls as they are, as what they do depends on values.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> plan = small.meta["fxprune"].plan
        >>> plan.save("plan.json")
        >>> fxprune.PruningPlan.load("plan.json") == plan
        True
        >>> len(plan.kept["0.bias"][0]) == plan.widths["0"][0]
        True
    """

    kept: Kept
    attention: str
    fingerprint: str
    torch_version: str = torch.__version__
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict, compare=False)
    removed: tuple[str, ...] = ()
    joins: tuple[str, ...] = ()
    earlier: PruningPlan | None = None
    leaf_functions: tuple[str, ...] = field(default=(), compare=False)

    def save(self, path: str | Path) -> None:
        """Write JSON.

        Raises:
            InputError: if the path cannot be written.
            PlanError: of a plan made by hand, if it holds what no plan holds.
        """
        self.check()
        _check(_NEW_IN_FORMATS | self._content(), _FORM)
        with replacing(path) as draft:
            draft.write_text(json.dumps(self.data(), separators=(",", ":")))

    def data(self) -> dict[str, Any]:
        """What a plan file holds, with a digest of the rest."""
        data = self._content()
        return {**data, "digest": _digest(data)}

    def _content(self) -> dict[str, Any]:
        needed = (
            (_FORMAT_WITH_LEAF_FUNCTIONS, self.leaf_functions),
            (_FORMAT_WITH_EARLIER, self.earlier),
            (_FORMAT_WITH_JOINS, self.joins),
            (_FORMAT_WITH_BRANCHES, self.removed),
        )
        return {
            "format": next((number for number, what in needed if what), _FORMAT),
            "attention": self.attention,
            "fingerprint": self.fingerprint,
            "torch": self.torch_version,
            "widths": {name: list(counts) for name, counts in self.widths.items()},
            "kept": {name: {str(d): v for d, v in dims.items()} for name, dims in self.kept.items()},
            **({"removed": list(self.removed)} if self.removed else {}),
            **({"joins": list(self.joins)} if self.joins else {}),
            **({"leaf_functions": list(self.leaf_functions)} if self.leaf_functions else {}),
            **({"earlier": [replace(plan, earlier=None).data() for plan in self.steps[:-1]]} if self.earlier else {}),
        }

    @property
    def steps(self) -> tuple[PruningPlan, ...]:
        """This plan behind those before it, the first of them first."""
        return (*(self.earlier.steps if self.earlier else ()), self)

    def check(self) -> None:
        """That names, dimensions and settings are such; of the indices only a model can tell whether they fit.

        Raises:
            PlanError: a part of it is of another kind; names which.
        """
        _check(vars(self), _IN_MEMORY)
        if self.earlier is not None:
            self.earlier.check()

    def onwards(self, graph: ChannelGraph) -> tuple[PruningPlan, ...]:
        """Those of ``steps`` that a model has before it: all of them if it is dense, or is none of these at all."""
        own = fingerprint(graph.parameters)
        return next((self.steps[i:] for i, plan in enumerate(self.steps) if plan.fingerprint == own), self.steps)

    @property
    def digest(self) -> str:
        """SHA-256 over what the plan file holds."""
        return str(self.data()["digest"])

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read what ``save`` wrote.

        Raises:
            PlanError: if the file is missing, no plan, truncated or edited.
        """
        try:
            text = as_path(path).read_bytes()
        except OSError as error:
            raise PlanError(f"The plan file {path} cannot be read: {error.strerror}.") from error
        except InputError:
            raise
        except ValueError as error:
            raise PlanError(f"The plan file {str(path)!r} cannot be read: {error}.") from error
        try:
            data = json_of(text)
        except FormError as error:
            raise PlanError(f"The plan file {path} is damaged or no JSON ({error}). Save the plan again.") from error
        return cls.of_data(data, path)

    @classmethod
    def of_data(cls, data: Any, path: str | Path) -> PruningPlan:
        """The plan that ``data()`` gave. ``path``: the file it comes from, for messages.

        Raises:
            PlanError: see ``load``.
        """
        if not isinstance(data, dict) or "kept" not in data or "digest" not in data:
            raise PlanError(
                f"{path} is no pruning plan: it lacks 'kept' or 'digest'. Pass a file that PruningPlan.save wrote."
            )
        if data.get("format") not in _FORMATS:
            known = f"{', '.join(map(str, _FORMATS[:-1]))} and {_FORMATS[-1]}"
            raise PlanError(f"{path} has plan format {data.get('format')!r}; this version reads formats {known}.")
        try:
            check(_NEW_IN_FORMATS | data, {**_FORM, "digest": str})
        except FormError as error:
            raise PlanError(f"The plan file {path} is damaged: {error}. Save the plan again.") from error
        if data["digest"] != _digest({key: value for key, value in data.items() if key != "digest"}):
            raise PlanError(
                f"The plan file {path} was changed after it was saved (its digest differs). Save the plan again."
            )
        kept = {name: {int(d): v for d, v in dims.items()} for name, dims in data["kept"].items()}
        widths = {name: (after, before) for name, (after, before) in data["widths"].items()}
        removed, joins = tuple(data.get("removed", ())), tuple(data.get("joins", ()))
        earlier: PruningPlan | None = None
        for step in data.get("earlier", ()):
            if "earlier" in step:
                raise PlanError(f"The plan file {path} is damaged: a step of it has steps of its own. Save it again.")
            earlier = replace(cls.of_data(step, path), earlier=earlier)
        return cls(
            kept, data["attention"], data["fingerprint"], data["torch"], widths, removed, joins, earlier,
            tuple(data.get("leaf_functions", ())),
        )  # fmt: skip

    def channels(self, graph: ChannelGraph, whole: ChannelGraph | None = None) -> Keep:
        """The plan as one boolean per channel of ``graph``.

        Args:
            graph: of the model, without the branches that the plan removes.
            whole: with them.

        Raises:
            PlanError: if the plan belongs to another model or cuts a channel in one place and keeps it in another.
        """
        if self.removed and whole is None:
            raise PlanError(
                f"The plan removes residual branches ({some(self.removed)}), which this graph has: pass it to "
                "fxprune.apply."
            )
        if self.joins and not len(graph.follows):
            raise PlanError(
                f"By the plan layers choose what they read ({some(self.joins)}), which none does here: pass it to "
                "fxprune.apply."
            )
        if self.fingerprint != fingerprint((whole or graph).parameters):
            raise PlanError(
                "The plan belongs to another model: parameter names or shapes differ. "
                "Apply it to the same architecture that it was made for."
            )
        keep = graph.everything()
        for name, dims in self.kept.items():
            parameter = graph.by_name.get(name)
            if parameter is None:
                selects = " It is of fxprune.select_inputs(model): pass that." if is_selection(name) else ""
                raise PlanError(f"The plan names {name!r}, which the model does not have.{selects}")
            factors = {f.dim: f for f in parameter.labels}
            for dim, kept in dims.items():
                if dim not in factors:
                    raise PlanError(f"The plan cuts dim {dim} of {name!r}, which cannot be cut in this model.")
                gone = np.ones(factors[dim].ids.shape[dim], dtype=bool)
                rows = _group_rows(parameter, factors[dim])
                lists = kept if isinstance(kept, list) and kept and isinstance(kept[0], list) else [kept]
                if len(lists) != len(rows):
                    raise PlanError(
                        f"The plan gives {len(lists)} lists for dim {dim} of {name!r}; it needs {len(rows)}."
                    )
                for row, indices in zip(rows, lists, strict=True):
                    gone[:] = True
                    _check_indices(name, dim, indices, len(gone))
                    gone[indices] = False
                    keep[row[gone]] = False
        uneven = any(len(np.unique(keep[group.channels].sum(1))) > 1 for group in graph.groups)
        if uneven or kept_of(graph, keep) != self.kept or (graph.closed(keep) != keep).any():
            raise PlanError(
                "The plan is inconsistent: it keeps a channel in one layer and cuts it in another that it is tied to. "
                "Use the plan as fxprune.prune wrote it, with the attention mode and example inputs it was made with."
            )
        if (graph.locked & ~keep).any():
            group = graph.groups[int(graph.group_of[np.flatnonzero(graph.locked & ~keep)[0]])]
            raise PlanError(f"The plan cuts channels of {group.name}, which cannot be cut here: {group.locked}.")
        return keep

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        keep: Keep,
        whole: ChannelGraph | None = None,
        removed: Sequence[str] = (),
        joins: Sequence[str] = (),
        earlier: PruningPlan | None = None,
        leaf_functions: Sequence[str] = (),
    ) -> PruningPlan:
        """The plan that keeps the channels ``keep``.

        ``whole``: the graph with the branches that were ``removed``. ``joins``: layers that choose what they read.
        ``earlier``: the plan that the model was made with. ``leaf_functions``: those that the graph calls.
        """
        widths = {group.name: (int(keep[group.channels].sum()), group.channels.size) for group in graph.prunable}
        for group in whole.prunable if whole is not None and removed else ():
            if not any(member.name in graph.by_name for member in group.members):
                widths[group.name] = 0, group.channels.size
        own = fingerprint((whole or graph).parameters)
        return cls(
            kept_of(graph, keep), graph.attention, own,
            widths=widths, removed=tuple(removed), joins=tuple(joins), earlier=earlier,
            leaf_functions=tuple(leaf_functions),
        )  # fmt: skip


def _check(data: Mapping[str, Any], form: Any) -> None:
    try:
        check(data, form)
    except FormError as error:
        raise PlanError(f"The plan is damaged: {error}.") from error


def kept_of(graph: ChannelGraph, keep: Keep) -> Kept:
    """``PruningPlan.kept`` for a boolean per channel."""
    result: Kept = {}
    for parameter in graph.parameters:
        dims: dict[int, list[Any]] = {}
        for factor in parameter.labels:
            masks = [keep[row] for row in _group_rows(parameter, factor)]
            if not all(mask.all() for mask in masks):
                lists = [np.flatnonzero(mask).tolist() for mask in masks]
                dims[factor.dim] = lists if len(lists) > 1 else lists[0]
        if dims:
            for name in parameter.names:
                result[name] = {d: dims[d] for d in sorted(dims)}
    return result


def _group_rows(parameter: Parameter, factor: Factor) -> list[Ids]:
    """The channels along the cut dim: one row, or several where they differ; one per group of a grouped weight."""
    if factor.dim != 1 or parameter.groups == 1:
        rows = factor.rows()
        if len(rows) == 1:
            return [rows[0]]
        starts = np.flatnonzero(np.r_[True, (rows[1:] != rows[:-1]).any(1)])
        return [rows[i] for i in starts]
    ids = np.broadcast_to(factor.ids, (parameter.shape[0], *factor.ids.shape[1:]))
    return list(Factor(ids[:: parameter.shape[0] // parameter.groups], 1).rows())


def _check_indices(name: str, dim: int, indices: Any, size: int) -> None:
    good = isinstance(indices, list) and all(type(i) is int and 0 <= i < size for i in indices)
    if not good or not indices or sorted(set(indices)) != indices:
        raise PlanError(
            f"The plan's indices for dim {dim} of {name!r} are not ascending numbers below {size}. The plan is damaged."
        )


def fingerprint(parameters: Sequence[Parameter]) -> str:
    """A digest of names and shapes of trainable parameters; a buffer may change its shape from call to call."""
    shapes = sorted((name, p.shape) for p in parameters if p.trainable for name in p.names)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
