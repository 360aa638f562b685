"""Ops of transformers. Nothing of it is imported: this is read when a recorded network calls one of them."""

from __future__ import annotations

from fxprune.ops import Call, Labels, Propagation, register
from fxprune.ops.contraction import grouped_product


@register("transformers::grouped_mm_fallback", refit="the data decide which matrix a row meets")
def grouped_mm_fallback(run: Propagation, call: Call) -> Labels:
    """The experts of a mixture: ``input [m, k]``, ``weight [g, k, n]`` -> ``[m, n]``, as ``torch._grouped_mm``."""
    return grouped_product(run, call["input"], call["weight"], call.out, call.get("offs"))
