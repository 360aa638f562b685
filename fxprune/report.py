"""What came out of a pruning, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fxprune.channels import ChannelGraph, Parameter
from fxprune.cost import Keep
from fxprune.labels.factors import cut_sizes
from fxprune.plan import PruningPlan
from fxprune.text import quantity, table

_MANY_ZEROS = 0.001  # of the parameters that are left


@dataclass(frozen=True)
class Row:
    """One layer. ``before``, ``after``: shape of its weight. ``frozen``: why its outputs stay, or ''."""

    name: str
    kind: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    frozen: str
    source: str


@dataclass(frozen=True)
class Latency:
    """What a network takes on onnxruntime, beside the dense one.

    ``dense_ms``, ``pruned_ms``: median milliseconds of ``runs`` runs in turn at batch size ``batch``. ``provider``: the
    execution provider; ``device``: what it ran on; ``threads``: of the processor, 0: as many as it has cores.
    """

    dense_ms: float
    pruned_ms: float
    provider: str
    device: str
    threads: int
    batch: int
    runs: int
    onnxruntime_version: str

    @property
    def ratio(self) -> float:
        return self.pruned_ms / self.dense_ms

    def __str__(self) -> str:
        threads = f"{self.threads} threads, " if self.threads > 1 else "1 thread, " if self.threads else ""
        return (
            f"{self.dense_ms:.2f} ms -> {self.pruned_ms:.2f} ms  ({self.ratio:.1%}), batch size {self.batch}, "
            f"median of {self.runs} ({self.provider}, {threads}onnxruntime {self.onnxruntime_version})"
        )


@dataclass(frozen=True)
class Report:
    """The result of one pruning.

    ``macs_before``, ``macs_after``: multiply-accumulates of a forward pass on the example inputs, by the convention of
    ``torch.utils.flop_counter`` (its count is twice this). ``prunable_share``: of the dense MACs, those that some cut
    can lower; ``held``: why the others cannot be lowered, and how many they are (reason -> share). ``oracle_error``:
    relative error of the pruned model against its masked original, None if it was not asked for;
    ``oracle_error_in_double``: the same in double, where float32 rounds too much to tell. ``seconds``: per stage.
    ``notes``: what had to be left alone. ``optimizer``: the given one carried over to the result, if one was given.
    ``zeros``: entries of the weights of two or more dims that are left, and zero. ``round_to``: kept channels are a
    multiple of this. ``latency``: measured, where it was the budget. ``budget``: (kind, ratio) that was asked for, None
    where the method or a given plan decided.
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
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    zeros: int = 0
    round_to: int = 1
    latency: Latency | None = None
    budget: tuple[str, float] | None = None
    optimizer: Any = field(default=None, repr=False, compare=False)

    def data(self) -> dict[str, Any]:
        """The figures, rows and notes as plain data, for JSON; the plan has a file of its own."""
        left_out = ("plan", "optimizer")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        latency = None if self.latency is None else {**asdict(self.latency), "ratio": self.latency.ratio}
        return {**values, "rows": [asdict(row) for row in self.rows], "latency": latency}

    def __str__(self) -> str:
        lines = [
            f"{self.model}, method {self.method}",
            _change("MACs", self.macs_before, self.macs_after),
            _change("parameters", self.params_before, self.params_after),
        ]
        if self.latency is not None:
            lines.insert(2, f"latency     {self.latency}")
        if self.zeros > _MANY_ZEROS * self.params_after:  # a few are chance
            lines.append(f"zeros       {quantity(self.zeros)} of these  ({self.zeros / self.params_after:.1%})")
        lines += [f"{share:.1%} of the MACs cannot be lowered: {reason}" for reason, share in self.held.items()]
        if self.oracle_error is not None:
            double = self.oracle_error_in_double
            note = "" if double is None else f", {double:.1e} in double"
            lines.append(f"masked original and pruned model agree to {self.oracle_error:.1e} (relative{note})")
        lines.append("seconds     " + ", ".join(f"{stage} {value:.1f}" for stage, value in self.seconds.items()))
        rows = [("layer", "kind", "weight before", "after", "outputs frozen because")]
        rows += [(r.name, r.kind, _shape(r.before), _shape(r.after), r.frozen) for r in self.rows]
        lines += ["", *table(rows)]
        if self.notes:
            lines += ["", "notes:", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)


def layer_rows(
    graph: ChannelGraph, keep: Keep, kinds: Mapping[str, str], lines: Mapping[str, str], frozen: Mapping[str, str]
) -> tuple[Row, ...]:
    """One row per layer with a weight of at least two dimensions.

    Args:
        graph: of the dense model.
        keep: per channel.
        kinds: module name -> class name.
        lines: module or parameter name -> the user's source line.
        frozen: group name -> why a group that could be cut was left alone.
    """
    rows = []
    for parameter in graph.parameters:
        if not parameter.trainable or len(parameter.shape) < 2:
            continue
        path, _, last = parameter.name.rpartition(".")
        name = path if last == "weight" else parameter.name
        after = tuple(cut_sizes(parameter.shape, parameter.labels, keep))
        source = lines.get(path) or lines.get(parameter.name, "")
        rows.append(
            Row(name, kinds.get(path, "parameter"), parameter.shape, after, _why(graph, parameter, frozen), source)
        )
    return tuple(rows)


def _why(graph: ChannelGraph, parameter: Parameter, frozen: Mapping[str, str]) -> str:
    factor = next((f for f in parameter.labels if f.dim == 0), None)
    if factor is None:
        return "no channels along dim 0" if parameter.shape[0] > 1 else ""
    groups = {int(g) for g in graph.group_of[factor.ids.numpy().reshape(-1)]}
    reasons = {str(graph.groups[g].locked or frozen.get(graph.groups[g].name, "")) for g in groups}
    return "" if "" in reasons else "; ".join(sorted(reasons))


def _change(what: str, before: int, after: int) -> str:
    ratio = f"{after / before:.1%}" if before else "-"
    return f"{what:<12}{quantity(before)} -> {quantity(after)}  ({ratio})"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(s) for s in shape)
