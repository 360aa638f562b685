"""What came out of a pruning, for people and for programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from torch import fx, nn

from fxprune.errors import InputError
from fxprune.io.text import quantity, some, table
from fxprune.recording.checks import check_unwrapped
from fxprune.reports.page import Figure, Section, write_page
from fxprune.reports.plots import new_figure, save_figure
from fxprune.reports.rows import GroupRow, Row
from fxprune.selection.plan import PruningPlan
from fxprune.verification.proof import InputDim, Proof

REPORT_KEY = "fxprune"
"""Where a pruned ``GraphModule`` keeps its ``Report``, in its ``meta``."""

ORIGIN_KEY = "fxprune_meta"
"""The attribute of what ``fxprune.into`` returns that tells of its pruning what the graph's ``meta`` does."""

_MANY_ZEROS = 0.001  # of the parameters that are left


@dataclass(frozen=True)
class Latency:
    """What a network takes, beside the dense one.

    ``dense_ms``, ``pruned_ms``: median milliseconds of ``runs`` runs in turn at batch size ``batch``. ``provider``: the
    execution provider of onnxruntime, or ``eager``, ``inductor`` or ``openvino``; ``device``: what it ran on;
    ``threads``: of the processor, 0: as many as the library takes; ``version``: of which library.

    Examples:
        >>> fxprune.Latency(8.0, 5.0, "CPUExecutionProvider", "AMD EPYC", 1, 1, 31, "onnxruntime 1.31.1").ratio
        0.625
    """

    dense_ms: float
    pruned_ms: float
    provider: str
    device: str
    threads: int
    batch: int
    runs: int
    version: str

    @property
    def ratio(self) -> float:
        """What stays: pruned to dense."""
        return self.pruned_ms / self.dense_ms

    def data(self) -> dict[str, Any]:
        """Its fields and the ratio, for JSON."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        threads = f"{self.threads} threads, " if self.threads > 1 else "1 thread, " if self.threads else ""
        return (
            f"{self.dense_ms:.2f} ms -> {self.pruned_ms:.2f} ms  ({self.ratio:.1%}), batch size {self.batch}, "
            f"median of {self.runs} ({self.provider}, {threads}{self.version})"
        )


@dataclass(frozen=True)
class Report:
    """The result of one pruning.

    ``macs_before``, ``macs_after``: multiply-accumulates of a forward pass on the example inputs, by the convention of
    ``torch.utils.flop_counter`` (its count is twice this). ``prunable_share``: of the dense MACs, those that some cut
    can lower; ``held``: why the others cannot be lowered, and how many they are (reason -> share). ``oracle_error``:
    relative error of the pruned model against its masked original, None if it was not asked for;
    ``oracle_error_in_double``: the same in double, where float32 rounds too much to tell; ``oracle_compared``: whether
    numbers come out of the network, or ``"flags"`` alone, all of them the same, or ``"nothing"``. ``seconds``: per
    stage. ``notes``: what had to be locked. ``optimizer``: the given one carried over to the result, if one was given.
    ``zeros``: entries of the weights of two or more dims that are left, and zero. ``rows``: layers, in graph order.
    ``groups``: of channels. ``round_to``: kept channels are a multiple of this. ``latency``: measured, where it was the
    budget. ``budget``: (kind, ratio) that was asked for, None where the method or a given plan decided. ``proof``: the
    recording against the model on what the example does not show, None if it was not asked for. ``reconstruction``:
    what refitting the weights did (``fxprune.reconstruction.Reconstruction``), None if it was not asked for.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> report = small.meta["fxprune"]
        >>> report.oracle_error <= 1e-5
        True
        >>> report.rows[0].name, report.rows[0].before, report.rows[0].locked
        ('0', (16, 3, 3, 3), '')
    """

    model: str
    method: str
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    prunable_share: float
    held: Mapping[str, float]
    plan: PruningPlan
    rows: tuple[Row, ...]
    oracle_error: float | None
    oracle_error_in_double: float | None = None
    oracle_compared: str = "numbers"
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    zeros: int = 0
    round_to: int = 1
    latency: Latency | None = None
    budget: tuple[str, float] | None = None
    optimizer: Any = field(default=None, repr=False, compare=False)
    groups: tuple[GroupRow, ...] = field(default=(), repr=False)
    proof: Proof | None = field(default=None, repr=False, compare=False)
    reconstruction: Any = field(default=None, repr=False, compare=False)

    @property
    def budget_used(self) -> float | None:
        """How much of the budget the result takes, as a share of it; None where no budget was asked for."""
        if self.budget is None:
            return None
        kind, ratio = self.budget
        free = [group for group in self.groups if not group.why]
        left = {
            "flops": (self.macs_after, self.macs_before),
            "params": (self.params_after, self.params_before),
            "channels": (sum(g.after for g in free), sum(g.before for g in free)),
            "latency": (self.latency.pruned_ms, self.latency.dense_ms) if self.latency is not None else (0, 0),
        }
        after, before = left[kind]
        return after / before / ratio if before else None

    @property
    def inputs(self) -> tuple[InputDim, ...]:
        """Of every dimension of every input tensor: may calls have another size, and why not; empty if not probed."""
        return () if self.proof is None else self.proof.inputs

    def data(self) -> dict[str, Any]:
        """The figures, rows and notes as plain data, for JSON; the plan has a file of its own."""
        left_out = ("plan", "optimizer")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        lists = {name: [asdict(row) for row in values[name]] for name in ("rows", "groups")}
        own = {"latency": self.latency and self.latency.data(), "proof": self.proof and self.proof.data(),
               "reconstruction": self.reconstruction and self.reconstruction.data()}  # fmt: skip
        return {**values, **lists, **own}

    def to_html(self, path: str | os.PathLike[str], validation: Any = None) -> None:
        """Write all of it as one page: widths, groups, what is locked and why, what was proven.

        Args:
            path: of the file. It needs nothing else: no other file, no network.
            validation: what ``fxprune.export`` returned, to be shown too.

        Raises:
            InputError: ``path`` cannot be written, or ``validation`` is something else.
        """
        if validation is not None and (not is_dataclass(validation) or isinstance(validation, type)):
            raise InputError(f"validation is a {type(validation).__name__}; pass what fxprune.export returned.")
        write_page(
            path,
            title=self.model,
            subtitle=f"method {self.method}" + ("" if self.budget is None else ", {}={:g}".format(*self.budget)),
            figures=self._figures(),
            held=self.held,
            rows=self.rows,
            groups=self.groups,
            sections=[*_validated(validation), *_timed(self.seconds)],
            notes=self.notes,
            versions=f"torch {self.plan.torch_version}",
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Bars of every layer's output channels, dense and pruned, in graph order.

        Args:
            path: where to write it; the ending chooses the format.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            InputError: matplotlib is missing, or the path cannot be written.
        """
        least, most = _PLOT_WIDTH
        figure = new_figure((min(max(least, 0.16 * len(self.rows)), most), 4.5))
        axes = figure.add_subplot()
        places = range(len(self.rows))
        axes.bar(places, [row.width[0] for row in self.rows], color="#d3dbe5", label="dense")
        axes.bar(places, [row.width[1] for row in self.rows], color="#0b62b5", label="pruned")
        axes.set_xticks(places, [row.name for row in self.rows], rotation=90, fontsize=6)
        axes.set_xlim(-0.8, len(self.rows) - 0.2)
        axes.set_ylabel("output channels")
        axes.set_title(f"{self.model}: {quantity(self.macs_before)} → {quantity(self.macs_after)} MACs")
        axes.legend()
        if path is not None:
            save_figure(figure, path)
        return figure

    def _figures(self) -> list[Figure]:
        free = [group for group in self.groups if not group.why]
        counts = [("prunable channels", sum(g.before for g in free), sum(g.after for g in free))] if free else []
        figures = [
            Figure(what, f"{quantity(before)} → {quantity(after)}", f"{after / before:.1%} stay", after / before)
            for what, before, after in (
                ("MACs", self.macs_before, self.macs_after),
                ("parameters", self.params_before, self.params_after),
                *counts,
            )
            if before
        ]
        if self.latency is not None:
            ms = f"{self.latency.dense_ms:.2f} → {self.latency.pruned_ms:.2f} ms"
            batch = f"batch size {self.latency.batch}, {self.latency.provider}"
            figures.insert(1, Figure("latency", ms, f"{self.latency.ratio:.1%} stay; {batch}", self.latency.ratio))
        figures.append(Figure("prunable MACs", f"{self.prunable_share:.1%}", "of the dense model's"))
        if self.zeros > _MANY_ZEROS * self.params_after:
            figures.append(Figure("zeros", quantity(self.zeros), f"{self.zeros / self.params_after:.1%} of what stays"))
        if self.oracle_error is None:
            return [*figures, Figure("masked ≡ pruned", "not checked")]
        if self.oracle_compared in _NO_NUMBERS:
            return [*figures, Figure("masked ≡ pruned", self.oracle_compared, _NO_NUMBERS[self.oracle_compared])]
        double = self.oracle_error_in_double
        detail = "relative error of the pruned model against the masked original"
        detail += "" if double is None else f"; {double:.1e} in double"
        return [*figures, Figure("masked ≡ pruned", f"{self.oracle_error:.1e}", detail)]

    def __str__(self) -> str:
        lines = [
            f"{self.model}, method {self.method}",
            _change("MACs", self.macs_before, self.macs_after),
            _change("parameters", self.params_before, self.params_after),
        ]
        if self.latency is not None:
            lines.insert(2, f"latency     {self.latency}")
        if self.plan.removed:
            lines.append(f"branches    {len(self.plan.removed)} removed: {some(self.plan.removed, 8)}")
        if self.plan.joins:
            lines.append(f"joins       {len(self.plan.joins)} freed: {some(self.plan.joins, 8)}")
        if self.round_to > 1:
            used = self.budget_used
            unused = "" if used is None else f", which leaves {max(0.0, 1 - used):.1%} of the budget unused"
            lines.append(f"channels    kept in multiples of {self.round_to}{unused}")
        if self.zeros > _MANY_ZEROS * self.params_after:  # a few are chance
            lines.append(f"zeros       {quantity(self.zeros)} of these  ({self.zeros / self.params_after:.1%})")
        lines += [f"{share:.1%} of the MACs cannot be lowered: {reason}" for reason, share in self.held.items()]
        if self.oracle_error is not None and self.oracle_compared in _NO_NUMBERS:
            lines.append(f"masked original and pruned model: {_NO_NUMBERS[self.oracle_compared]}")
        elif self.oracle_error is not None:
            double = self.oracle_error_in_double
            note = "" if double is None else f", {double:.1e} in double"
            lines.append(f"masked original and pruned model agree to {self.oracle_error:.1e} (relative{note})")
        if self.proof is not None:
            lines += self.proof.lines()
        if self.reconstruction is not None:
            lines.append(f"refitted    {self.reconstruction.summary}")
        lines.append("seconds     " + ", ".join(f"{stage} {value:.1f}" for stage, value in self.seconds.items()))
        rows = [("layer", "kind", "weight before", "after", "outputs locked because")]
        rows += [(r.name, r.kind, _shape(r.before), _shape(r.after), r.locked) for r in self.rows]
        lines += ["", *table(rows)]
        if self.notes:
            lines += ["", "notes:", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)


_NO_NUMBERS = {
    "flags": "no numbers come out, only flags, and these are the same",
    "nothing": "nothing was compared, for no tensor comes out",
}
_PLOT_WIDTH = (6.0, 24.0)  # inches, the least and the most


def _validated(validation: Any) -> list[Section]:
    if validation is None:
        return []
    values = ((f.name.replace("_", " "), getattr(validation, f.name)) for f in fields(validation))
    return [Section("ONNX", [(name, f"{v:.3g}" if isinstance(v, float) else str(v)) for name, v in values])]


def _timed(seconds: Mapping[str, float]) -> list[Section]:
    total = sum(seconds.values())
    lines = [(stage, f"{value:.2f} s") for stage, value in seconds.items()]
    return [Section("Seconds", lines, [value / total for value in seconds.values()])] if total else []


def _change(what: str, before: int, after: int) -> str:
    ratio = f"{after / before:.1%}" if before else "-"
    return f"{what:<12}{quantity(before)} -> {quantity(after)}  ({ratio})"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(s) for s in shape) or "removed"


def plan_of(model: nn.Module) -> PruningPlan | None:
    """The plan that a whole model was made with, as a graph or in its class; None of one that was not pruned."""
    meta = vars(model).get(ORIGIN_KEY) or (model.meta if isinstance(model, fx.GraphModule) else {})
    report = meta.get(REPORT_KEY)
    return report.plan if isinstance(report, Report) else None


def pruned_parts(model: nn.Module) -> list[tuple[str, fx.GraphModule]]:
    """Every ``GraphModule`` in a model that has a report, and its name there ("" for the model itself)."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, fx.GraphModule) and isinstance(module.meta.get(REPORT_KEY), Report)
    ]


def pruned_part(model: nn.Module) -> tuple[str, fx.GraphModule]:
    """The pruned ``GraphModule`` in a model, and its name there.

    Raises:
        InputError: there is none, or more than one, or it is wrapped.
    """
    found = pruned_parts(model)
    if len(found) != 1:
        count = "no" if not found else "more than one"
        raise InputError(
            f"{type(model).__name__} holds {count} part that fxprune pruned. Pass what fxprune.prune, apply or load "
            "returned, or a deepcopy of it."
        )
    check_unwrapped(model, found[0][0])
    return found[0]
