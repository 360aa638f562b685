"""Leaf policy: which modules become one ``call_module`` node, and which are traced through.

A leaf is a layer whose data flow later stages know (torch.nn's own layers), or a layer that behaves differently in
train and eval, which a graph recorded in eval could not express. Decided from the code of the module's class, never
from its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_COMPOSITE = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.ChannelShuffle,
)
_NEVER = (*_CONTAINERS, *_COMPOSITE, torch.jit.ScriptModule, torch.fx.GraphModule)
# What a subclass of a torch.nn layer may define and still compute what the layer computes.
_HARMLESS = {"__init__", "extra_repr", "reset_parameters", "__repr__", "_get_name"}


def is_leaf(module: nn.Module) -> bool:
    """Whether the module is recorded as one node."""
    if isinstance(module, _NEVER):
        return False
    if "forward" in module.__dict__ or _computes_its_weights(module):
        return False
    return _is_torch_layer(module) or _is_mode_dependent(module)


def is_only_torch(module: nn.Module) -> bool:
    """Whether nothing but torch's own code runs when the leaf is called: no hook, no function put into it."""
    if _has_any_global_hook() or not _is_torch_layer(module):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or any(map(callable, module.__dict__.values())))


def _is_torch_layer(module: nn.Module) -> bool:
    if module._modules:
        return False
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.modules."):
            return cls is not nn.Module
        if any(name not in _HARMLESS and callable(value) for name, value in vars(cls).items()):
            return False
    return False


def _is_mode_dependent(module: nn.Module) -> bool:
    """The forward code reads ``training``, and the module holds no weight matrix and no layer with weights."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or not _mentions_training(code):
        return False
    if any(parameter.ndim > 1 for parameter in module._parameters.values() if parameter is not None):
        return False
    return not any(_holds_tensors(child) for child in module._modules.values() if child is not None)


def _holds_tensors(module: nn.Module) -> bool:
    own = (*module._parameters.values(), *module._buffers.values())
    if any(tensor is not None for tensor in own):
        return True
    return any(_holds_tensors(child) for child in module._modules.values() if child is not None)


def _mentions_training(code: CodeType) -> bool:
    if "training" in code.co_names:
        return True
    return any(_mentions_training(inner) for inner in code.co_consts if isinstance(inner, CodeType))


def _computes_its_weights(module: nn.Module) -> bool:
    """Parametrized, or its weights are set by a hook of torch.nn.utils (weight_norm, spectral_norm, pruning masks)."""
    if "parametrizations" in module._modules:
        return True
    if not module._forward_pre_hooks:
        return False
    hooks: Iterable[Any] = module._forward_pre_hooks.values()
    return any(type(hook).__module__.startswith("torch.nn.utils") for hook in hooks)


def is_torchs(hook: Any) -> bool:
    """Whether torch itself has put it on a module: to compute weights, to gather or to reduce them."""
    owner = hook if hasattr(hook, "__qualname__") else type(hook)
    return (owner.__module__ or "").partition(".")[0] == "torch"
