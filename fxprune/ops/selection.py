"""The op by which a block reads some channels of a tensor that stays whole.

``fxprune::select_channels(x [N, C, ...], index [K], whole) -> [N, K, ...]`` is ``x.index_select(1, index)``. To the
labels it is something else: what it gives are channels of their own, one for every entry of ``index``, a buffer. They
are cut by cutting that buffer. With ``whole`` ``x`` keeps all of its channels; else entries go with the channels that
they are about (``ChannelGraph.follows``), and those that stay are numbered anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.labels.factors import Factor, Labels
from fxprune.labels.propagation import Propagation
from fxprune.ops.call import Call
from fxprune.ops.table import add


@torch.library.custom_op("fxprune::select_channels", mutates_args=())
def select_channels(x: Tensor, index: Tensor, whole: bool = True) -> Tensor:
    """``x [N, C, ...]`` at ``index [K]`` -> ``[N, K, ...]``."""
    return x.index_select(1, index)


@select_channels.register_fake
def _(x: Tensor, index: Tensor, whole: bool = True) -> Tensor:
    return x.new_empty((x.shape[0], index.shape[0], *x.shape[2:]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    x, index, _ = inputs
    ctx.channels = x.shape[1]
    ctx.save_for_backward(index)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    size = (gradient.shape[0], ctx.channels, *gradient.shape[2:])
    return gradient.new_zeros(size).index_add_(1, index, gradient), None, None


select_channels.register_autograd(_backward, setup_context=_keep)


def _label(run: Propagation, call: Call) -> Labels:
    x, index = call["x"], call["index"]
    result = []
    for factor in run.labels(x):
        if factor.ids.shape[1] > 1:
            if call["whole"] or factor.ids.size != factor.ids.shape[1]:
                run.lock(factor.ids, "a block selects from these channels, which stay as they are")
        else:
            result.append(factor)
    own = run.labels(index)
    if not own and index.shape[0] > 1:
        run.request_index(index)
    for factor in own:
        if not call["whole"]:
            run.entries.append(factor.ids.reshape(-1))
        result.append(Factor(factor.ids.reshape(1, -1, *[1] * (x.ndim - 2)), 1))
    return tuple(result)


add(
    "fxprune::select_channels",
    label=_label,
    mask="every channel that it gives is one that it is given",
    cost="it moves",
    chooses=("x", "index"),
    repair="the index says how many",
    refit="what an index chooses is not followed",
)
