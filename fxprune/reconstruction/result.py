"""What a reconstruction did, for people and programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fxprune.io.forms import Either, Real, Whole
from fxprune.io.text import table

_KNOWN = Either(None, Real())
_LAYER = {"name": str, "op": str, "rows": Whole(), "before": _KNOWN, "after": _KNOWN, "ridge": _KNOWN, "kept": bool,
          "why": str}  # fmt: skip
_TUNING = {"steps": Whole(), "parameters": Whole(), "before": Real(False), "after": Real(False), "seconds": Real(),
           "why": str}  # fmt: skip
FORM = {
    "layers": [_LAYER],
    "output_before": Either(None, Real(False)),
    "output_after": Either(None, Real(False)),
    "samples": Whole(),
    "held_out": Whole(),
    "seconds": Real(),
    "not_applicable": str,
    "notes": [str],
    "tuning": Either(None, _TUNING),
    "of_noise": bool,
}  # fmt: skip
"""Of ``Reconstruction.data()``."""


@dataclass(frozen=True)
class LayerFit:
    """One refitted weight.

    ``before``, ``after``: mean squared error of its outputs on held-out data against the dense network's, relative to
    their variance: with the weights as they were cut, and as they are now. ``ridge``: relative to the mean eigenvalue
    of the inputs' Gram matrix; None where at most the bias changed. ``kept``: otherwise all was put back as it was cut.
    ``rows``: how many were fitted. ``why``: the reason why it was left alone, or ""; then the errors may be unknown.
    """

    name: str
    op: str
    rows: int
    before: float | None
    after: float | None
    ridge: float | None
    kept: bool
    why: str = ""


@dataclass(frozen=True)
class Tuning:
    """Scales, shifts and biases, trained after the refit.

    ``steps``: how many were taken. ``parameters``: how many tensors were trained. ``before``, ``after``: ``|pruned -
    dense|^2 / |dense|^2`` of the network's outputs on held-out data; the latter is the best of what was measured on the
    way. ``why``: the reason why nothing was trained, why it ended early or changed nothing, or "".
    """

    steps: int
    parameters: int
    before: float
    after: float
    seconds: float
    why: str = ""

    @property
    def summary(self) -> str:
        """One line."""
        what = f"{self.parameters} scales, shifts and biases tuned for {self.steps} steps"
        error = f"relative squared error of the outputs {self.before:.3g} -> {self.after:.3g}; {self.seconds:.1f} s"
        return f"{f'{what}; {error}' if self.parameters else 'nothing tuned'}{self.why and f': {self.why}'}"


@dataclass(frozen=True)
class Reconstruction:
    """Weights refitted to the dense network's activations.

    ``layers``: in graph order. ``output_before``, ``output_after``: ``|pruned - dense|^2 / |dense|^2`` of the network's
    outputs on held-out data, of what was given and of what came back; None where no output has the dense one's shape,
    because that depends on values. ``samples``, ``held_out``: how many were fitted,
    and how many were not, to judge by. ``not_applicable``: why nothing could be refitted, or "". ``tuning``: what was
    trained afterwards, None if that was not asked for. ``of_noise``: there were no data, and all figures are of noise.
    """

    layers: tuple[LayerFit, ...]
    output_before: float | None
    output_after: float | None
    samples: int
    held_out: int
    seconds: float
    not_applicable: str = ""
    notes: tuple[str, ...] = field(default=())
    tuning: Tuning | None = None
    of_noise: bool = False

    def data(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "notes": list(self.notes)}

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Reconstruction:
        """What ``data()`` gave, once it is known to have ``FORM``."""
        layers = tuple(LayerFit(**layer) for layer in data["layers"])
        tuning = None if data["tuning"] is None else Tuning(**data["tuning"])
        return cls(**{**data, "layers": layers, "notes": tuple(data["notes"]), "tuning": tuning})

    @property
    def summary(self) -> str:
        """One line."""
        tuned = "" if self.tuning is None else f"; {self.tuning.summary}"
        if self.not_applicable:
            return f"not applicable: {self.not_applicable}{tuned}"
        kept = sum(layer.kept for layer in self.layers)
        what = "samples of noise" if self.of_noise else "samples"
        fitted = self.output_after if self.tuning is None else self.tuning.before
        error = ""
        if self.output_before is not None:
            figures = f"{_figure(self.output_before)} -> {_figure(fitted)}"
            error = f"; relative squared error of the outputs on {self.held_out} others {figures}"
        weights = f"{kept} of {len(self.layers)} weights refitted on {self.samples} {what}"
        return f"{weights}{error}; {self.seconds:.1f} s{tuned}"

    def __str__(self) -> str:
        if self.not_applicable:
            return self.summary
        rows: list[Sequence[str]] = [("layer", "op", "error before", "after", "ridge", "")]
        rows += [
            (
                layer.name, layer.op, _figure(layer.before), _figure(layer.after),
                "" if layer.ridge is None else f"{layer.ridge:g}", layer.why or ("" if layer.kept else "put back"),
            )
            for layer in self.layers
        ]  # fmt: skip
        return "\n".join([self.summary, "", *table(rows), *self.notes])


def _figure(error: float | None) -> str:
    return "" if error is None else f"{error:.3g}"
