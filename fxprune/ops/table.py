"""The table of ops: what every stage has to know of an op, in one record. ``fxprune.ops`` is the door to it.

Here are the ops that are not PyTorch's own. They are found by their full name, ``namespace::name``; the module that
brings those of a namespace is imported when the first of them is met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from fxprune.errors import InputError

GROUP = "fxprune.ops"
"""The entry points' group. The name of an entry is a namespace, its value a module that registers the ops in it."""

_BUILT_IN = {"torchvision": "fxprune.ops.torchvision", "transformers": "fxprune.ops.transformers"}

Label = Callable[[Any, Any], Any]
Mask = Callable[[Any, Any, Any, Any], Any]
Fix = Callable[[Any, Any], None]
Cost = Callable[[Any, Any], Iterable[tuple[float, Any]]]


@dataclass(frozen=True)
class Op:
    """What is known of one op; see ``fxprune.ops.register``."""

    name: str
    label: Label | None = None
    mask: Mask | None = None
    repair: Fix | None = None
    cost: Cost | None = None
    reads_values: bool = False


OPS: dict[str, Op] = {}
_loaded: set[str] = set()


def find(name: str) -> Op | None:
    """The record of ``namespace::name``, if there is one.

    Raises:
        InputError: a package has an entry point for this namespace that cannot be loaded.
    """
    if name not in OPS:
        load(name.partition("::")[0])
    return OPS.get(name)


def load(namespace: str) -> None:
    """Import what registers the ops of a namespace, once."""
    if namespace in _loaded or namespace == "aten":
        return
    _loaded.add(namespace)
    if namespace in _BUILT_IN:
        import_module(_BUILT_IN[namespace])
    for entry in entry_points(group=GROUP):
        if entry.name == namespace:
            try:
                entry.load()
            except Exception as error:
                _loaded.discard(namespace)
                raise InputError(
                    f"The ops of {namespace!r} cannot be loaded from {entry.value} ({type(error).__name__}: {error}). "
                    "Repair or uninstall the package that brings them."
                ) from error


def full_name(op: Any) -> str:
    """``namespace::name`` of an op as it is called, of a node's target too; ``""`` of anything else."""
    op = getattr(op, "function", op)  # as a recorded node holds an op
    schema = getattr(op, "_schema", None)
    return str(getattr(op, "_qualified_op_name", "") if schema is None else schema.name)


def record_of(op: Any) -> Op | None:
    """The record of an op that is not PyTorch's own, or None."""
    name = full_name(op)
    return find(name) if name and not name.startswith("aten::") else None
