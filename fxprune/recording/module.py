"""The result of recording: a ``GraphModule`` that keeps the model's whole state_dict, in order."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import RecordError
from fxprune.recording.code import Code
from fxprune.recording.leaves import is_leaf
from fxprune.recording.pickling import Line, graph_of, lines_of

TRAINING_FLAG = "_training_flag"
_COPIED = (dict, OrderedDict, set)
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class TrainingFlag(nn.Module):
    """Says whether the module it sits in is in training mode: ``self.training``, as a node."""

    def forward(self) -> bool:
        return self.training


class RecordedModule(fx.GraphModule):
    """A model as a graph, with every parameter and buffer of the original under its original name and in its order.

    ``root`` is taken over (its children are not copied): see ``clone_tree``. Not ``compiled``, its Python code is
    written when it is first called or looked at: of a graph that is only read, never.
    """

    def __init__(
        self, root: nn.Module, graph: fx.Graph, class_name: str = "RecordedModule", *, compiled: bool = True
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name)
        _check_names(root)
        for table in _TABLES:
            self.__dict__[table] = root.__dict__[table]
        self.training = root.training
        graph.set_codegen(Code())
        if compiled:
            self.graph = graph
        else:
            self._graph, graph.owning_module = graph, self
            del type(self).forward  # of the empty graph; every instance has a class of its own

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """Seen only until there is code, which hides it."""
        self.recompile()
        return self.forward

    @property
    def code(self) -> str:
        """The Python code of the graph."""
        self._write()
        return str(super().code)

    def _write(self) -> None:
        if "forward" not in vars(type(self)):
            self.recompile()

    def __reduce__(self) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in _OF_THE_CODE}
        return _restored, (type(self).__name__, state, lines_of(self.graph))

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


# What a graph module derives from its graph.
_OF_THE_CODE = ("_graph", "_code", "_lineno_map", "_prologue_start")


def _restored(class_name: str, state: dict[str, Any], lines: list[Line]) -> RecordedModule:
    """A module as it was pickled."""
    shell = nn.Module()
    shell.__dict__.update({name: value for name, value in state.items() if name in (*_TABLES, "training")})
    result = RecordedModule(shell, graph_of(lines), class_name)
    result.__dict__.update({name: value for name, value in state.items() if name not in _TABLES})
    return result


def _check_names(root: nn.Module) -> None:
    for name in (*root._parameters, *root._buffers, *root._modules):
        if hasattr(fx.GraphModule, name) or name in ("meta", "_graph", "_code"):
            raise RecordError(
                f"The model has an attribute named {name!r}, which torch.fx.GraphModule uses itself. Rename it."
            )


# What ``train()`` and ``eval()`` go through.
_MODES = ("train", "eval", "training", "children", "named_children", "__setattr__")


def have_their_own_modes(modules: Collection[nn.Module]) -> bool:
    """Whether ``train()`` and ``eval()`` of a module may do anything else than to set ``training`` of all inside."""
    if any("train" in module.__dict__ or "eval" in module.__dict__ for module in modules):
        return True
    torchs = {name: getattr(nn.Module, name, None) for name in _MODES}
    classes = {type(module) for module in modules}
    return any(getattr(cls, name, None) is not own for cls in classes for name, own in torchs.items())


def put_in_eval_mode(root: nn.Module) -> None:
    """``root.eval()``, faster where nobody overrides it."""
    modules = [module for _, module in named_modules(root)]
    if have_their_own_modes(modules):
        root.eval()
    else:
        for module in modules:
            module.__dict__["training"] = False


@contextmanager
def evaluated(*roots: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; afterwards every module's own mode again, and every buffer as it was."""
    modules = [module for root in roots for _, module in named_modules(root)]
    modes = [(module, module.training) for module in modules]
    tables = [(module._buffers, dict(module._buffers.items())) for module in modules if module._buffers]
    known = {
        id(b): b for _, own in tables for b in own.values() if b is not None and not (b.is_meta or b.is_inference())
    }
    values = [(buffer, buffer._version, buffer.detach().clone()) for buffer in known.values()]
    try:
        for root in roots:
            put_in_eval_mode(root)
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for table, own in tables:
            for name, buffer in own.items():
                if table.get(name) is not buffer:
                    table[name] = buffer
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)


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
    leaves = {id(module) for name, module in named_modules(root) if name in leaf_names}
    return _clone(root, False, leaves, {id(root): _shell(root)})


def _clone(module: nn.Module, whole: bool, leaves: set[int], made: dict[int, nn.Module]) -> nn.Module:
    """``whole``: inside a leaf. ``made``: identity of a module -> its clone."""
    new = made[id(module)]
    new.__dict__["training"] = module.training
    for name, child in module._modules.items():
        if child is not None and id(child) not in made:
            inside = whole or id(child) in leaves or is_leaf(child)
            made[id(child)] = _shallow_clone(child) if inside else _shell(child)
            _clone(child, inside, leaves, made)
        new._modules[name] = None if child is None else made[id(child)]
    return new


def named_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under every name it has, in torch's order, without its generators that nest as deep as the tree."""
    found: list[tuple[str, nn.Module]] = []
    _collect(root, "", found)
    return found


def _collect(module: nn.Module, name: str, found: list[tuple[str, nn.Module]]) -> None:
    found.append((name, module))
    prefix = f"{name}." if name else ""
    for child_name, child in module._modules.items():
        if child is not None:
            _collect(child, prefix + child_name, found)


def named_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Every parameter, then every buffer, under every name it has."""
    modules = [(f"{name}." if name else "", module) for name, module in named_modules(root)]
    return {
        prefix + name: tensor
        for table in ("_parameters", "_buffers")
        for prefix, module in modules
        for name, tensor in getattr(module, table).items()
        if tensor is not None
    }


_BARE = nn.Module().__dict__


def _shell(module: nn.Module) -> nn.Module:
    shell = nn.Module.__new__(nn.Module)
    shell.__dict__.update({name: value.copy() if type(value) in _COPIED else value for name, value in _BARE.items()})
    shell._parameters.update(module._parameters.items())
    shell._buffers.update(module._buffers.items())
    if not isinstance(module, torch.jit.ScriptModule):
        shell._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return shell


def _shallow_clone(module: nn.Module) -> nn.Module:
    new = module.__class__.__new__(module.__class__)
    new.__dict__.update(
        {
            name: value.copy() if type(value) in _COPIED or name in _TABLES else value
            for name, value in module.__dict__.items()
        }
    )
    return new


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter is; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def widest_dtype(model: nn.Module) -> torch.dtype:
    """The wider of float32 and what the parameters are: for what learns in small steps, which halves would lose."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return reduce(torch.promote_types, floats, torch.float32)


def replace_tensors(root: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> None:
    """Put ``stand_in(tensor)`` in the place of every parameter and buffer of a module and its children."""
    for owner in {id(module): module for _, module in named_modules(root)}.values():
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
