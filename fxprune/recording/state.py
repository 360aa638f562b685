"""Recording leaves no trace: what the run of a private copy (see ``copies``) may still reach is put back or refused."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.ops.meta import tensors_in
from fxprune.recording.parts import Parts


class PrivateMemoryNeededError(Exception):
    """The run is about to write to memory of the caller's: it must have a copy of it."""


class Memory:
    """The memory behind a private copy's tensors, watched for writes.

    Parameters are views of the caller's memory; everything else, buffers above all, is copied. A run that is about to
    write to a parameter is ended, to be made again with ``private`` memory, where parameters are copied too. What is
    neither the copy's nor made by the run (a tensor that a function keeps) is saved before its first write.

    ``gradients``: copies have the gradients of their parameters. Where another thread trains the model, autograd writes
    these without a lock, so they are not so much as read unless a forward asks for them (``take_gradient``).
    """

    def __init__(self, parts: Parts, private: bool = False, gradients: bool = False) -> None:
        self.was_refused = False
        self._private, self._gradients = private, gradients
        self._originals: dict[int, Tensor] = {}
        self._views = {storage_id(tensor) for tensor in parts.parameters.values()} - {None}
        self._copies: dict[int, torch.UntypedStorage] = {}
        self._created: set[int] = set()
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def stand_in(self, tensor: Tensor) -> Tensor:
        """What takes the place of a tensor of the model in its copy."""
        storage = storage_id(tensor)
        if storage is None or tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
            own = tensor.detach() if storage in self._views and not self._private else tensor.detach().clone()
        elif storage in self._views and not self._private:
            own = tensor.data
        else:
            own = self._copied(tensor, storage)
        if isinstance(tensor, nn.Parameter):
            own = nn.Parameter(own, requires_grad=False)
            self._originals[id(own)] = tensor
            if self._gradients:
                self.take_gradient(own)
        own.__dict__.update(tensor.__dict__)
        return own

    def take_gradient(self, own: Tensor) -> None:
        """A parameter's copy gets its gradient, once."""
        original = self._originals.pop(id(own), None)
        if original is not None:
            own.grad = original.grad

    def _copied(self, tensor: Tensor, storage: int) -> Tensor:
        """The same view of a copy of its memory: what shares memory goes on to share it."""
        if storage not in self._copies:
            self._copies[storage] = tensor.untyped_storage().clone()
        memory = self._copies[storage]
        own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        own.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())
        own = own.conj() if tensor.is_conj() else own
        self.created(own)
        return own

    def created(self, tensor: Tensor) -> None:
        """``tensor`` was computed during the run, by an op that made its storage or a view of a known one."""
        if tensor.is_meta:
            return
        key = storage_id(tensor)
        if key is not None and key not in self._saved and key not in self._views:
            self._created.add(key)

    def before_write(self, tensor: Tensor) -> None:
        """An op is about to write to ``tensor``.

        Raises:
            PrivateMemoryNeededError: this is the caller's memory.
        """
        if tensor.is_meta:  # has no contents
            return
        key = storage_id(tensor)
        if key is None or key in self._created or key in self._saved:
            return
        if not self._private:
            self.was_refused = True
            raise PrivateMemoryNeededError
        storage = tensor.untyped_storage()
        self._saved[key] = (storage, storage.clone())

    def before_op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """``before_write`` for all that an aten op writes to, which are returned."""
        found: list[Tensor] = []
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found += tensors_in((args[index] if index < len(args) else kwargs.get(argument.name),))
        for tensor in found:
            self.before_write(tensor)
        return found

    @property
    def was_written(self) -> bool:
        """Whether there is, or was in the run before this one, a write to memory of the caller's."""
        return self._private or bool(self._saved)

    def restore(self) -> None:
        for storage, contents in self._saved.values():
            storage.copy_(contents)


def storage_id(tensor: Tensor) -> int | None:
    """What identifies the memory behind a tensor; None for layouts without one (sparse)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def cached_tensor_dicts(modules: Iterable[nn.Module]) -> list[dict[Any, Any]]:
    """Plain dict attributes that hold tensors, in an order that copies have too: as a rule of an earlier call."""
    own = nn.Module().__dict__.keys()
    attributes = [
        module.__dict__[name]
        for module in modules
        if not isinstance(module, torch.jit.ScriptModule)
        for name in sorted(module.__dict__.keys() - own)
    ]
    return [
        value
        for value in attributes
        if issubclass(type(value), dict) and any(isinstance(item, Tensor) for item in value.values())
    ]


class RandomStates:
    """Where the process's random generators stood, to put back those that moved.

    Torch's for the CPU and for the devices of ``tensors``, Python's and NumPy's. ``foreign``: whether one of the last
    two moved.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.foreign = False
        devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
        self._devices = [device for device in devices if hasattr(torch.get_device_module(device), "get_rng_state")]
        self._numpy = sys.modules.get("numpy")
        self._before = self._now()

    def _now(self) -> tuple[Any, ...]:
        ours = [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)]
        numpy = None if self._numpy is None else self._numpy.random.get_state()
        return ours, random.getstate(), numpy

    def restore(self) -> None:
        """Put back what moved; what did not is not touched, since another thread may draw from it."""
        ours, python, numpy = self._before
        now, python_now, numpy_now = self._now()
        if not torch.equal(ours[0], now[0]):
            torch.set_rng_state(ours[0])
        for device, before, after in zip(self._devices, ours[1:], now[1:], strict=True):
            if not torch.equal(before, after):
                torch.get_device_module(device).set_rng_state(before, device)
        if python != python_now:
            self.foreign = True
            random.setstate(python)
        if self._numpy is not None and not _same_state(numpy, numpy_now):
            self.foreign = True
            self._numpy.random.set_state(numpy)


def _same_state(one: Any, other: Any) -> bool:
    """Of NumPy's: name, keys, position, and two numbers more."""
    return bool(one[0] == other[0] and one[2:] == other[2:] and (one[1] == other[1]).all())


_eager, _eager_runs, _eager_lock = ExitStack(), list[object](), threading.Lock()


@contextmanager
def without_compilation() -> Iterator[None]:
    """Compiled modules run their Python code. Without the compiler, which takes a second to import, there are none.

    Torch keeps one stance for all threads, so the first that comes takes it, and the last that goes gives it back.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _eager_lock:
        if not _eager_runs:
            _eager.enter_context(torch.compiler.set_stance("force_eager"))
        _eager_runs.append(run := object())
    try:
        yield
    finally:
        with _eager_lock:
            _eager_runs.remove(run)
            if not _eager_runs:
                _eager.close()
