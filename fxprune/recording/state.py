"""Recording leaves no trace: flags, attributes, in-place writes, RNG and torch settings are put back, also after an
error."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.recording.parts import Parts

_CONTAINERS = frozenset([dict, OrderedDict, defaultdict, list, set, deque])


class Storages:
    """The contents of storages that existed before the run, kept just before their first in-place write."""

    def __init__(self) -> None:
        self._created: set[int] = set()
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def created(self, tensor: Tensor) -> None:
        """``tensor`` was computed during the run, by an op that made its storage or a view of a known one."""
        if tensor.is_meta:
            return
        key = storage_id(tensor)
        if key is not None and key not in self._saved:
            self._created.add(key)

    def before_write(self, tensor: Tensor) -> None:
        if tensor.is_meta:  # has no contents
            return
        key = storage_id(tensor)
        if key is None or key in self._created or key in self._saved:
            return
        storage = tensor.untyped_storage()
        self._saved[key] = (storage, storage.clone())

    def restore(self) -> None:
        for storage, contents in self._saved.values():
            storage.copy_(contents)


def storage_id(tensor: Tensor) -> int | None:
    """What identifies the memory behind a tensor; None for layouts without one (sparse)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


@contextmanager
def preserved(parts: Parts) -> Iterator[None]:
    """Put back every module's attributes and training flag and every tensor's ``requires_grad`` afterwards."""
    scripted = [(module, module.training) for module in parts.scripted()]
    modules = [module for module in parts.modules.values() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [(module, dict(module.__dict__)) for module in modules]
    containers = [value for module in modules for value in module.__dict__.values() if type(value) in _CONTAINERS]
    empty = [container for container in containers if not container]  # nearly all: a module has a dozen tables of hooks
    full = [(container, _contents(container)) for container in containers if container]
    tensors = list(parts.tensors.values())
    needed_grad = [tensor for tensor in tensors if tensor.requires_grad and tensor.is_leaf]
    data = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor in needed_grad:
            tensor.requires_grad_(False)
        yield
    finally:
        for module, values in attributes:
            module.__dict__.clear()
            module.__dict__.update(values)
        for container in empty:
            if container:
                container.clear()
        for container, contents in full:
            _refill(container, contents)
        for module, training in scripted:
            module.training = training
        for tensor, before in data:
            if storage_id(tensor) != storage_id(before):
                tensor.data = before
        for tensor in needed_grad:
            tensor.requires_grad_(True)


def _contents(container: Any) -> list[Any]:
    return list(container.items() if isinstance(container, dict) else container)


def _refill(container: Any, contents: list[Any]) -> None:
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(contents)
    else:
        container.update(contents)


def cached_tensor_dicts(modules: Iterable[nn.Module]) -> list[dict[Any, Any]]:
    """Plain dict attributes that hold tensors: results of an earlier call, kept by a module itself."""
    own = nn.Module().__dict__.keys()
    attributes = [
        module.__dict__[name]
        for module in modules
        if not isinstance(module, torch.jit.ScriptModule)
        for name in module.__dict__.keys() - own
    ]
    return [
        value
        for value in attributes
        if isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values())
    ]


@contextmanager
def forked_random_state(parts: Parts) -> Iterator[None]:
    """Random numbers drawn inside are drawn again afterwards: torch's, Python's and numpy's."""
    devices = {tensor.device for tensor in parts.tensors.values() if tensor.device.type == "cuda"}
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices, key=str)))
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def without_compilation() -> Iterator[None]:
    """Compiled modules run their Python code. Without the compiler, which takes a second to import, there are none."""
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield
