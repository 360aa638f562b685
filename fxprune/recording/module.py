"""The result of recording: a ``GraphModule`` that keeps the model's whole state_dict, in order."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import RecordError
from fxprune.recording.leaves import is_leaf

TRAINING_FLAG = "_training_flag"
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class TrainingFlag(nn.Module):
    """Says whether the module it sits in is in training mode: ``self.training``, as a node."""

    def forward(self) -> bool:
        return self.training


class RecordedModule(fx.GraphModule):
    """A model as a graph, with every parameter and buffer of the original under its original name and in its order.

    ``root`` is taken over (its children are not copied): see ``clone_tree``.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "RecordedModule") -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name)
        _check_names(root)
        for table in _TABLES:
            self.__dict__[table] = root.__dict__[table]
        self.training = root.training
        self.graph = graph

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> RecordedModule:
        memo = {} if memo is None else memo
        shell = nn.Module()
        for table in _TABLES:
            shell.__dict__[table] = copy.deepcopy(self.__dict__[table], memo)
        shell.training = self.training
        result = RecordedModule(shell, copy.deepcopy(self.graph), type(self).__name__)
        memo[id(self)] = result
        result.meta = copy.copy(self.meta)
        return result


def _check_names(root: nn.Module) -> None:
    for name in (*root._parameters, *root._buffers, *root._modules):
        if hasattr(fx.GraphModule, name) or name in ("meta", "_graph", "_code"):
            raise RecordError(
                f"The model has an attribute named {name!r}, which torch.fx.GraphModule uses itself. Rename it."
            )


def clone_structure(gm: fx.GraphModule) -> RecordedModule:
    """A second graph and module tree over the same tensors: free to be edited, nothing of ``gm`` changes.

    Parameters and buffers are the very objects of ``gm``; modules are shallow clones. ``gm.meta`` is copied shallowly.
    """
    result = RecordedModule(clone_modules(gm), copy.deepcopy(gm.graph), type(gm).__name__)
    result.meta = copy.copy(gm.meta)
    return result


def clone_modules(gm: fx.GraphModule) -> nn.Module:
    """A second module tree over the same tensors, for ``fx.Interpreter(tree, graph=gm.graph)``: no code, no graph."""
    return clone_tree(gm, {str(node.target) for node in gm.graph.nodes if node.op == "call_module"})


def clone_tree(root: nn.Module, leaf_names: set[str]) -> nn.Module:
    """The module tree with shared tensors: leaves as shallow clones of their class, everything else a plain shell.

    A module reachable under two names stays one module.
    """
    leaves = {id(module) for name, module in root.named_modules(remove_duplicate=False) if name in leaf_names}
    memo: dict[int, nn.Module] = {}

    def clone(module: nn.Module, whole: bool) -> nn.Module:
        if id(module) in memo:
            return memo[id(module)]
        whole = module is not root and (whole or id(module) in leaves or is_leaf(module))
        new = _shallow_clone(module) if whole else _shell(module)
        memo[id(module)] = new
        new.__dict__["training"] = module.training
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else clone(child, whole)
        return new

    return clone(root, False)


def _shell(module: nn.Module) -> nn.Module:
    shell = nn.Module()
    shell._parameters.update(module._parameters.items())
    shell._buffers.update(module._buffers.items())
    if not isinstance(module, torch.jit.ScriptModule):
        shell._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return shell


def _shallow_clone(module: nn.Module) -> nn.Module:
    new = module.__class__.__new__(module.__class__)
    own = new.__dict__
    for name, value in module.__dict__.items():
        if type(value) in (dict, OrderedDict) or name in _TABLES or name.endswith("_hooks"):
            value = value.copy()
        own[name] = value
    return new


def replace_tensors(root: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> None:
    """Put ``stand_in(tensor)`` in the place of every parameter and buffer of a module and its children."""
    for owner in root.modules():
        tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = stand_in(tensor)
        if isinstance(owner, nn.RNNBase):  # holds its weights a second time
            owner.__dict__["_flat_weights"] = [getattr(owner, name) for name in owner._flat_weights_names]


def add_constant(root: nn.Module, name: str, value: Tensor) -> None:
    """Hold a tensor that is no parameter or buffer of the model as a non-persistent buffer of the recorded module."""
    root.register_buffer(name, value, persistent=False)


def add_training_flag(root: nn.Module, path: str) -> None:
    """Give the module at ``path`` ("" = root) a child that reads its training flag."""
    owner = root.get_submodule(path)
    if TRAINING_FLAG not in owner._modules:
        flag = TrainingFlag()
        flag.training = owner.training
        owner._modules[TRAINING_FLAG] = flag
