"""Cut parameters and buffers, and give modules the attributes that go with their new weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.labels.factors import Labels, cut_sizes, left_rows
from fxprune.ops.meta import channels_last_of
from fxprune.ops.table import Shape, layers
from fxprune.recording import named_tensors, replace_tensors
from fxprune.recording.shards import shared_like, whole

_LARGE = 2**22  # entries
_ENTRIES_IN_CACHE = 2**19


def cut(tensor: Tensor, labels: Labels, keep: Keep, copy: bool = True) -> Tensor:
    """``tensor`` without the channels that go, in the same dtype, device and memory format.

    ``copy``: where none goes as well; else that is the tensor's own memory.
    """
    picks: list[tuple[int, Tensor]] = []
    for factor in sorted(labels, key=lambda f: len(f.carriers)):
        rows = left_rows(factor, labels, keep)
        stays = keep[np.moveaxis(rows, factor.dim, -1) if factor.carriers else rows.reshape(-1)]
        if stays.all():
            continue
        index = torch.from_numpy(stays.nonzero()[-1]).to(tensor.device)
        if factor.carriers:
            index = index.reshape(*stays.shape[:-1], -1).movedim(-1, factor.dim)
        picks.append((factor.dim, index))
    if not picks:
        dense = tensor.detach()
        return dense.clone(memory_format=torch.preserve_format) if copy else dense
    result = _picked(tensor.detach(), picks)
    return result.contiguous(memory_format=channels_last_of(tensor) or torch.contiguous_format)


def _picked(tensor: Tensor, picks: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The positions ``index`` along ``dim``, one pair after the other.

    Of a large tensor a few rows at a time, so that what lies between two picks stays in the processor's cache.
    """
    (dim, rows), *others = picks
    in_parts = tensor.numel() > _LARGE and not tensor.is_meta and bool(others) and dim == 0
    if in_parts and all(index.ndim == 1 for _, index in picks):
        sizes = list(tensor.shape)
        for d, index in picks:
            sizes[d] = len(index)
        result = tensor.new_empty(sizes)
        *between, (last, chosen) = others
        count = max(1, _ENTRIES_IN_CACHE * len(tensor) // tensor.numel())
        for part, out in zip(rows.split(count), result.split(count), strict=True):
            torch.index_select(_picked(tensor, [(0, part), *between]), last, chosen, out=out)
        return result
    for dim, index in picks:
        tensor = tensor.index_select(dim, index) if index.ndim == 1 else tensor.take_along_dim(index, dim)
    return tensor


CUTS_KEY = "fxprune_cuts"
"""Where a pruned ``GraphModule`` keeps its ``Cuts``, in its ``meta``."""


@dataclass(frozen=True)
class Cuts:
    """How every parameter and buffer was cut. ``labels``, ``shapes``: dense name -> of that tensor.

    ``removed``: names of those that went as a whole, with a residual branch.
    """

    labels: Mapping[str, Labels]
    shapes: Mapping[str, tuple[int, ...]]
    keep: Keep
    removed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, graph: ChannelGraph, keep: Keep) -> Cuts:
        named = {name: parameter for parameter in graph.parameters for name in parameter.names}
        return cls({n: p.labels for n, p in named.items()}, {n: p.shape for n, p in named.items()}, keep)

    def with_removed(self, whole: ChannelGraph) -> Cuts:
        """The same, of the graph that had what is not here."""
        shapes = {name: parameter.shape for parameter in whole.parameters for name in parameter.names}
        return replace(self, shapes=shapes, removed=frozenset(shapes.keys() - self.shapes.keys()))

    def follow(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of a tensor that belongs to the dense parameter ``name``, cut like it.

        ``tensor`` has the parameter's shape, or 1 in its place along some dimensions (a mean over them, say).

        Raises:
            ValueError: it has another shape, or the mean covers groups that were cut differently.
        """
        shape, labels = self.shapes.get(name, tuple(tensor.shape)), self.labels.get(name, ())
        if tensor.ndim != len(shape) or any(
            have not in (1, want) for have, want in zip(tensor.shape, shape, strict=True)
        ):
            raise ValueError(f"has the shape {list(tensor.shape)}, which does not follow {list(shape)}")
        whole = [d for d, size in enumerate(shape) if tensor.shape[d] == size]
        followed = tuple(f for f in labels if f.dim in whole)
        if any(d not in whole for f in followed for d in f.varying):
            raise ValueError(f"has the shape {list(tensor.shape)}, one value for groups that were cut differently")
        return cut(tensor, followed, self.keep)


@dataclass(frozen=True)
class Uncut:
    """Meta tensors that stand in a rewritten module for what its parameters will be.

    ``dense``: identity of a stand-in -> the stand-in, the tensor to cut, and the labels of that.
    """

    dense: Mapping[int, tuple[Tensor, Tensor, Labels]]
    keep: Keep

    def fill(self, module: nn.Module, consume: bool = False) -> None:
        """Put cut copies in the places of the stand-ins in ``module``; tied ones stay tied, names stay.

        ``consume``: a dense tensor is emptied as soon as it is cut, wherever it is held: its memory goes.
        """
        made: dict[int, Tensor] = {}

        def filled(tensor: Tensor) -> Tensor:
            if id(tensor) in self.dense and id(tensor) not in made:
                _, dense, labels = self.dense[id(tensor)]
                smaller = shared_like(cut(whole(dense), labels, self.keep, copy=not consume), dense)
                made[id(tensor)] = _as_parameter(smaller, dense)
                if consume:
                    dense.data = dense.data.new_empty(0)
            return made.get(id(tensor), tensor)

        replace_tensors(module, filled)


def stand_ins(module: nn.Module, cuts: Cuts) -> Uncut:
    """Replace every parameter and buffer of ``module`` by a meta tensor of its new size; integers are cut at once."""
    tensors = named_tensors(module)
    labels = {id(tensors[name]): labels for name, labels in cuts.labels.items()}
    made: dict[int, Tensor] = {}
    dense: dict[int, tuple[Tensor, Tensor, Labels]] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            own = labels.get(id(tensor), ())
            if tensor.is_floating_point() or tensor.is_complex():
                shape = cut_sizes(tensor.shape, own, cuts.keep)
                new = _as_parameter(torch.empty(shape, dtype=tensor.dtype, device="meta"), tensor)
                dense[id(new)] = new, tensor, own
            else:
                new = _as_parameter(cut(tensor, own, cuts.keep), tensor)
            made[id(tensor)] = new
        return made[id(tensor)]

    replace_tensors(module, stand_in)
    return Uncut(dense, cuts.keep)


def _as_parameter(new: Tensor, dense: Tensor) -> Tensor:
    """``new`` is a parameter if ``dense`` is, with what that carries."""
    if not isinstance(dense, nn.Parameter):
        return new
    parameter = nn.Parameter(new, requires_grad=dense.requires_grad)
    parameter.__dict__.update(dense.__dict__)
    return parameter


def adapt(module: nn.Module, before: Shape, after: Shape) -> None:
    """Set the size attributes of a leaf module.

    Args:
        module: with its weights already cut.
        before: the dense shape of its first input.
        after: the new shape of its first input.
    """
    for kind, function in layers():
        if isinstance(module, kind):
            function(module, before, after)


def adapts_by_itself(module: nn.Module) -> bool:
    """Whether the size attributes of a module follow from its weights alone."""
    weights = any(p is not None for p in module._parameters.values())
    return weights and any(isinstance(module, kind) for kind, _ in layers())
