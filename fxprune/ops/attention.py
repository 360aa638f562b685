"""Attention in one call: PyTorch makes products and a softmax of it, which the labels and the oracle see."""

from __future__ import annotations

from torch import fx

from fxprune.labels.factors import cut_sizes
from fxprune.ops.repair import RESCALED, Repair
from fxprune.ops.table import adder, argument


def _attention(repair: Repair, node: fx.Node) -> None:
    """The implicit scale is that of the dense head dimension."""
    query = repair.dense(argument(node, 0, "query"))
    dim = len(query.shape) - 1
    scale = node.kwargs.get("scale")
    if scale is None and repair.is_cut(query, dim):
        node.kwargs = {**node.kwargs, "scale": float(query.shape[dim]) ** -0.5}
        node.meta[RESCALED] = (cut_sizes(query.shape, query.labels, repair.keep)[dim] / query.shape[dim]) ** 0.5
    elif isinstance(scale, fx.Node) and repair.value(scale) != repair.dense(scale):
        node.kwargs = {**node.kwargs, "scale": repair.dense(scale)}


# Made of other ops; a recorded graph calls it. Its fused kernels take heads of one width.
_call = adder(__name__)
_call("scaled_dot_product_attention", repair=_attention, attends=((0, "query"), (2, "value")))
