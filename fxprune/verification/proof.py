"""What was proven of a recording, beyond the example: plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class InputDim:
    """One dimension of one input tensor.

    ``tensor``: its place among the input tensors; ``name``: ``x``, ``cache.keys``; ``free``: whether calls may have
    another size; ``why``: the size that was tried, or what fixes it.
    """

    tensor: int
    name: str
    dim: int
    size: int
    free: bool
    why: str


@dataclass(frozen=True)
class Proof:
    """What was probed. ``error``: the largest relative error of the recording against the model; ``compared``: whether
    numbers come out, or flags alone, or nothing.

    ``probes``: those on which both agree, in words. ``refused``: those that end in a guard, with its line. ``inputs``:
    every dimension of every input tensor. ``farthest``: the inputs, among those that agree, whose sizes are farthest
    from the example's, ``(args, kwargs)``: for the mask oracle.
    """

    error: float
    compared: str
    probes: tuple[str, ...]
    refused: tuple[str, ...]
    inputs: tuple[InputDim, ...]
    farthest: Any = field(default=None, repr=False, compare=False)

    def data(self) -> dict[str, Any]:
        """Its fields as plain data, for JSON; without the inputs themselves."""
        return {name: value for name, value in asdict(self).items() if name != "farthest"}

    def lines(self) -> list[str]:
        """In two or three lines of text: what was probed, which sizes are free, what is fixed and why."""
        what = f"agree to {self.error:.1e}" if self.compared == "numbers" else f"give the same {self.compared}"
        found = [f"probed      model and recording {what}: {', '.join(self.probes)}"]
        free = ", ".join(f"{dim.name}[{dim.dim}]" for dim in self.inputs if dim.free)
        fixed = "; ".join(f"{dim.name}[{dim.dim}] = {dim.size} ({dim.why})" for dim in self.inputs if not dim.free)
        sizes = [f"{kind} {dims}" for kind, dims in (("free", free), ("fixed", fixed)) if dims]
        if sizes:
            found.append(f"input sizes {'; '.join(sizes)}")
        if self.refused:
            found.append(f"guarded     {'; '.join(self.refused)}")
        return found
