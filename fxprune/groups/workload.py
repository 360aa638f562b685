"""What one forward pass has to do, op by op, with sizes that follow the channels: what a table of timings is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from fxprune.groups.channels import ChannelGraph
from fxprune.groups.shadow import replay
from fxprune.labels.factors import Factor
from fxprune.labels.propagation import Propagation, describe
from fxprune.labels.records import TensorLabels
from fxprune.ops.call import Call

Kind = Literal["convolution", "product", "choice", "other"]
_OPTIONS = ("stride", "padding", "dilation", "transposed", "output_padding")


@dataclass(frozen=True)
class Work:
    """One op of a forward pass.

    ``operands``: of a convolution the input and the weight, of a product both factors, ``[..., m, k]`` and
    ``[..., k, n]``, of a choice of channels the tensor and the index, of everything else what it
    makes; ids in labels are channels, or ``graph.channel_count`` for what cannot go. ``constant``: the second operand
    is a parameter. ``options``: a convolution's, as pairs.
    """

    node: str
    kind: Kind
    operands: tuple[TensorLabels, ...]
    constant: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def groups(self) -> int:
        """Of a convolution."""
        return groups_of([tensor.shape for tensor in self.operands], dict(self.options)["transposed"])


def groups_of(shapes: Sequence[Sequence[int]], transposed: bool) -> int:
    """Groups of a convolution with these shapes of input, weight and output."""
    x, weight, out = shapes
    return max(1, (out if transposed else x)[1] // max(weight[1], 1))


def workload(
    module: fx.GraphModule, graph: ChannelGraph, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Work, ...]:
    """The ops of the recorded ``module``, views left out.

    Args:
        module: the recorded model.
        graph: its channels.
        args: example inputs; only shapes and dtypes matter.
        kwargs: example keyword inputs.
    """
    found: list[Work] = []

    def watch(run: Propagation, func: Any, given: Any, named: Any, out: Any) -> None:
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if outputs and not (func.is_view or torch.Tag.inplace_view in func.tags):
            found.append(_work(run, Call(func, given, named, outputs)))

    run, failed = replay(module, graph, graph.everything(), args, kwargs, watch)
    assert not failed, f"what was analysed can be replayed: {failed}"
    channels = _channels(run, graph.channel_count)
    return tuple(_numbered(work, channels) for work in found)


def _work(run: Propagation, call: Call) -> Work:
    node, record = run.node_name, call.record
    if record is not None and record.chooses is not None:
        return Work(node, "choice", tuple(describe(run, call[name]) for name in record.chooses))
    if record is None or record.multiplies is None:
        return Work(node, "other", (describe(run, call.out),))
    first, second = (call[name] for name in record.multiplies)
    operands, constant = (describe(run, first), describe(run, second)), run.is_parameter(second)
    if "stride" not in call.signature.arguments:
        return Work(node, "product", operands, constant)
    options = tuple((name, _plain(call[name])) for name in _OPTIONS)
    return Work(node, "convolution", (*operands, describe(run, call.out)), constant, options)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _channels(run: Propagation, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Atom -> channel, ``count`` for atoms that are no channel's."""
    roots = run.classes.find(np.arange(len(run.classes)))
    of_root = np.full(len(roots), count)
    of_root[roots[:count]] = np.arange(count)
    result: np.ndarray[Any, np.dtype[np.int64]] = of_root[roots]
    return result


def _numbered(work: Work, channels: np.ndarray[Any, np.dtype[np.int64]]) -> Work:
    def numbered(tensor: TensorLabels) -> TensorLabels:
        labels = (Factor(channels[f.ids], f.dim) for f in tensor.labels)
        return replace(tensor, labels=tuple(labels))

    return replace(work, operands=tuple(map(numbered, work.operands)))
