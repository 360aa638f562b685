"""``python -m fxprune.ops`` prints PyTorch's ops that fxprune knows, as the table in README.md."""

from __future__ import annotations

from importlib import import_module

import torch

from fxprune.ops.table import KINDS, OPS, Op, load


def markdown() -> str:
    """The ops by kind. What a kind means, the first paragraph of its file says."""
    load("aten")
    rows = ["| kind | what happens to channels | aten ops |", "|---|---|---|"]
    for kind in KINDS:
        meaning = " ".join((import_module(f"fxprune.ops.{kind}").__doc__ or "").partition("\n\n")[0].split())
        own = [op for op in OPS.values() if op.kind == kind]
        names = [_own_name(op) for op in [op for op in own if _is_told(op)] or own]
        listed = ", ".join(f"`{name}`" for name in sorted(names, key=lambda name: (name.strip("_"), name)))
        if kind == "pointwise":
            listed = f"everything that PyTorch tags as pointwise (`torch.Tag.pointwise`), and {listed}"
        rows.append(f"| {kind} | {meaning.rstrip('.')} | {listed} |")
    return "\n".join(rows)


def _own_name(op: Op) -> str:
    return op.name.partition("::")[2]


def _is_told(op: Op) -> bool:
    """An op that the labels see, other than those that carry PyTorch's tag alone."""
    if op.label is None and not op.reads_values:
        return False
    packet = getattr(torch.ops.aten, _own_name(op), None)
    tagged = packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())
    return op.kind != "pointwise" or op.pointwise or not tagged


if __name__ == "__main__":
    print(markdown())
