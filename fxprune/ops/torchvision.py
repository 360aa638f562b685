"""Ops of torchvision. Nothing of it is imported: this is read when a recorded network calls one of them."""

from __future__ import annotations

from typing import Any

from fxprune.ops import Call, Labels, Propagation, convolve, join_positions, register

_COMPUTED = "what lies under its kernel is read between positions, at offsets that are computed"


def _groups(repair: Any, node: Any) -> None:
    """Where whole groups went, their number follows the weight."""
    x, weight, groups = node.args[0], node.args[1], node.args[11]
    node.args = (*node.args[:11], repair.groups(x, weight, groups), *node.args[12:])


@register("torchvision::deform_conv2d", repair=_groups, refit=_COMPUTED)
def deform_conv2d(run: Propagation, call: Call) -> Labels:
    """A convolution whose kernel positions are moved by ``offset`` and weighted by ``mask``.

    ``input [N, C_in, H, W]``, ``weight [C_out, C_in / groups, kh, kw]``, ``offset [N, 2 offset_groups kh kw, *out]``,
    ``mask [N, offset_groups kh kw, *out]`` (``[N, 1]`` if there is none) -> ``[N, C_out, *out]``.
    """
    x, out, blocks = call["input"], call.out, call["offset_groups"]
    for positions in (call["offset"], call["mask"]):
        run.lock_all(run.labels(positions), "offsets of a deformable convolution")
    if blocks > 1:  # channels that share offsets keep equal counts, since the offset groups stay
        for factor in run.labels(x):
            if factor.varying == (1,):
                run.family(factor.ids.reshape(blocks, -1), "channels of a deformable convolution that share offsets")
            else:
                run.lock(factor.ids, "offsets of a deformable convolution")
    labels = convolve(run, x, call["weight"], call["groups"], out.shape[2] * out.shape[3])
    bias = tuple(f.laid(f.ids.reshape(1, -1, 1, 1), 1) for f in run.labels(call["bias"]))
    shape = tuple(out.shape)
    return join_positions(run, [(shape, labels), ((1, shape[1], 1, 1), bias)], shape)
