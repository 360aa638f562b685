"""Cut parameters and buffers, and give modules the attributes that go with their new weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.channels import ChannelGraph
from fxprune.cost import Keep
from fxprune.labels.factors import Labels, left_rows
from fxprune.recording import replace_tensors


def cut(tensor: Tensor, labels: Labels, keep: Keep) -> Tensor:
    """A copy of ``tensor`` without the channels that go. Same dtype, device and memory format."""
    result = tensor.detach()
    for factor in sorted(labels, key=lambda f: len(f.varying)):
        mask = torch.from_numpy(keep[left_rows(factor, labels, keep).movedim(factor.dim, -1).numpy()])
        if bool(mask.all()):
            continue
        index = mask.nonzero()[:, -1].reshape(*mask.shape[:-1], -1).movedim(-1, factor.dim).to(result.device)
        if len(factor.varying) == 1:
            result = result.index_select(factor.dim, index.reshape(-1))
        else:
            result = result.take_along_dim(index, factor.dim)
    if result.data_ptr() == tensor.data_ptr():
        return result.clone(memory_format=torch.preserve_format)
    for layout, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.ndim == ndim and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous():
            return result.contiguous(memory_format=layout)
    return result.contiguous()


def slice_tensors(module: nn.Module, graph: ChannelGraph, keep: Keep) -> None:
    """Replace every parameter and buffer of ``module`` by a cut copy; tied ones stay tied, names stay."""
    labels = {id(_find(module, p.name)): p.labels for p in graph.parameters}
    made: dict[int, Tensor] = {}

    def cut_once(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = cut(tensor, labels.get(id(tensor), ()), keep)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                new.__dict__.update(tensor.__dict__)
            made[id(tensor)] = new
        return made[id(tensor)]

    replace_tensors(module, cut_once)


def _find(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    table: Mapping[str, Any] = owner._parameters if last in owner._parameters else owner._buffers
    tensor: Tensor = table[last]
    return tensor


# -- attributes ---------------------------------------------------------------------------------------------------

Shape = tuple[int, ...]
_ADAPT: list[tuple[type, Callable[[Any, Shape, Shape], None]]] = []


def _adapts(*kinds: type) -> Callable[[Callable[[Any, Shape, Shape], None]], Callable[[Any, Shape, Shape], None]]:
    def register(function: Callable[[Any, Shape, Shape], None]) -> Callable[[Any, Shape, Shape], None]:
        _ADAPT.extend((kind, function) for kind in kinds)
        return function

    return register


def adapt(module: nn.Module, before: Shape, after: Shape) -> None:
    """Set the size attributes of a leaf module.

    Args:
        module: with its weights already cut.
        before: the dense shape of its first input.
        after: the new shape of its first input.
    """
    for kind, function in _ADAPT:
        if isinstance(module, kind):
            function(module, before, after)


@_adapts(nn.Linear)
def _linear(module: nn.Linear, before: Shape, after: Shape) -> None:
    module.out_features, module.in_features = module.weight.shape


@_adapts(nn.modules.conv._ConvNd)
def _convolution(module: nn.modules.conv._ConvNd, before: Shape, after: Shape) -> None:
    first, second = module.weight.shape[:2]
    per_in, per_out = module.in_channels // module.groups, module.out_channels // module.groups
    if module.groups > 1 and 1 in (per_in, per_out):  # whole groups went
        module.groups = first // (per_in if module.transposed else per_out)
    channels = (first, second * module.groups)
    module.in_channels, module.out_channels = channels if module.transposed else channels[::-1]


@_adapts(nn.modules.batchnorm._NormBase)
def _batch_norm(module: nn.modules.batchnorm._NormBase, before: Shape, after: Shape) -> None:
    channels = {t.shape[0] for t in (module.weight, module.bias, module.running_mean) if t is not None}
    module.num_features = channels.pop() if channels else after[1]


@_adapts(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(module: Any, before: Shape, after: Shape) -> None:
    module.normalized_shape = tuple(after[len(after) - len(module.normalized_shape) :])


@_adapts(nn.GroupNorm)
def _group_norm(module: nn.GroupNorm, before: Shape, after: Shape) -> None:
    if module.num_groups == before[1]:
        module.num_groups = after[1]
    module.num_channels = after[1]


@_adapts(nn.Embedding)
def _embedding(module: nn.Embedding, before: Shape, after: Shape) -> None:
    module.embedding_dim = module.weight.shape[1]


@_adapts(nn.RNNBase)
def _recurrent(module: Any, before: Shape, after: Shape) -> None:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.input_size = module.weight_ih_l0.shape[1]
    module.hidden_size = module.weight_ih_l0.shape[0] // gates
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]


@_adapts(nn.RNNCellBase)
def _recurrent_cell(module: Any, before: Shape, after: Shape) -> None:
    module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]


@_adapts(nn.PReLU)
def _prelu(module: nn.PReLU, before: Shape, after: Shape) -> None:
    module.num_parameters = module.weight.shape[0]


@_adapts(nn.Bilinear)
def _bilinear(module: nn.Bilinear, before: Shape, after: Shape) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape
