"""The tensors of a run: which node computed which, and whose memory they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.multiprocessing.reductions import StorageWeakRef

from fxprune.recording import state


class Tensors:
    """Tensors are told apart by identity, which is forgotten with them, and memory by the address of its storage.

    A weak reference to every storage lets go of the memory as early as the model does, and keeps the address from being
    used twice. ``storages``, ``writes``: what memory a node's result is, and what it writes to; ``joined``: the memory
    that may be other memory as well, in another call. ``lasting``: the memory that outlives the call.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        """``named``: the parameters and buffers of the model that runs."""
        self.storages: dict[Node, frozenset[int]] = {}
        self.writes: dict[Node, frozenset[int]] = {}
        self.joined: dict[int, frozenset[int]] = {}
        self.lasting: set[int] = set()
        self._nodes: dict[int, Node] = {}
        self._views: dict[Any, Node] = {}
        self._names: dict[int, str] = {}
        self._named: dict[str, Tensor] = {}
        self._replaced: set[int] = set()
        self._watched: dict[int, weakref.ref[Tensor]] = {}
        self._memory: dict[int, StorageWeakRef] = {}
        self._kept: list[Tensor] = []
        for name, tensor in named.items():
            self.name(tensor, name)

    def name(self, tensor: Tensor, name: str) -> None:
        """The tensor stands for the parameter or buffer ``name``: itself, or the caller's, which a closure reaches."""
        self._names.setdefault(id(tensor), name)
        self._named.setdefault(name, tensor)
        self._kept.append(tensor)
        self.lasting |= storage_of(tensor)

    def map(self, tensor: Tensor, node: Node, *, lasting: bool = False) -> None:
        """``node`` computed ``tensor``. ``lasting``: its memory outlives the call, so writes to it matter."""
        storage = state.storage_id(tensor)
        storages = frozenset() if storage is None else frozenset((storage,))
        self._nodes[id(tensor)] = node
        self._views[_view_key(tensor, storage)] = node
        self.storages[node] = storages
        if lasting or storage is None:
            self._kept.append(tensor)
        else:
            self._watch(tensor, storage)
        if lasting:
            self.lasting |= storages

    def _watch(self, tensor: Tensor, storage: int) -> None:
        key = id(tensor)

        def forget(_: weakref.ref[Tensor]) -> None:
            self._nodes.pop(key, None)
            self._watched.pop(key, None)

        self._watched[key] = weakref.ref(tensor, forget)
        if storage not in self._memory:
            self._memory[storage] = StorageWeakRef(tensor.untyped_storage())

    def alias(self, node: Node, other: Node) -> None:
        """What ``node`` gives is the memory of what ``other`` gives."""
        self.storages[node] = self.storages.get(other, frozenset())

    def replaced(self, parameter: Tensor, node: Node) -> None:
        """From here on the parameter is what ``node`` computed."""
        self._replaced.add(id(parameter))
        self.map(parameter, node)

    def mark_writes(self, node: Node, changed: Iterable[Tensor]) -> None:
        """``node`` writes to these tensors."""
        written = frozenset(storage for tensor in changed for storage in storage_of(tensor))
        if written:
            node.meta["mutates"] = True
            self.writes[node] = written

    def join(self, results: Iterable[Tensor], given: Iterable[Tensor]) -> None:
        """For other values, what a node gives may be the memory of what it is given."""
        either = frozenset(storage for tensor in (*results, *given) for storage in storage_of(tensor))
        for storage in either:
            self.joined[storage] = self.joined.get(storage, frozenset()) | either

    def written_for_good(self) -> frozenset[int]:
        """The memory that was written to and outlives the call."""
        return frozenset().union(*self.writes.values()) & self.lasting

    def find(self, tensor: Tensor) -> tuple[Node | None, str | None]:
        """The node that computed the tensor, or the same view of the same memory; else its name, if it has one."""
        node = self._nodes.get(id(tensor))
        name = None if node is not None else self._names.get(id(tensor))
        if node is None and name is None:
            node = self._views.get(_view_key(tensor, state.storage_id(tensor)))
        return node, name

    def computed(self, tensor: Tensor) -> bool:
        """Whether a node computed this very tensor."""
        return id(tensor) in self._nodes

    def known(self, tensor: Tensor) -> bool:
        """Whether a node computed this very tensor, or it has a name."""
        return id(tensor) in self._nodes or id(tensor) in self._names

    def is_own(self, tensor: Tensor, name: str | None = None) -> bool:
        """Whether the tensor is a parameter or buffer of the model, with its own values.

        ``name``: of the one whose place it has; what ``layer.to(x.device)`` made of that without moving it is, too.
        """
        if id(tensor) in self._names:
            return id(tensor) not in self._replaced
        named = self._named.get(name) if name is not None else None
        return named is not None and id(named) not in self._replaced and are_same_view(tensor, named)


def are_same_view(one: Tensor, other: Tensor) -> bool:
    """Whether two tensor objects are the same view of the same memory."""
    storage = state.storage_id(one)
    return storage is not None and _view_key(one, storage) == _view_key(other, state.storage_id(other))


def storage_of(tensor: Tensor) -> frozenset[int]:
    """The memory of a tensor, if it has one."""
    key = state.storage_id(tensor)
    return frozenset() if key is None else frozenset((key,))


def _view_key(tensor: Tensor, storage: int | None) -> Any:
    """What two tensor objects that are the same view of the same memory have in common."""
    if storage is None:
        return id(tensor)
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj()
