"""The table of ops: what every stage has to know of an op, in one record. ``fxprune.ops`` is the door to it.

An op is found by its full name, ``namespace::name``, without the overload. PyTorch's own are in ``aten``, one file for
each of ``KINDS``; what PyTorch calls a function or a method and takes apart by itself has a record there too, if a
recorded graph calls it and something has to be known of the call. What only Python knows (``x[i]``) is in ``python``.
The modules that bring the ops of a namespace are imported when the first of them is met.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

import torch
from torch import fx

from fxprune.errors import InputError
from fxprune.ops.refit import Refit

GROUP = "fxprune.ops"
"""The entry points' group. The name of an entry is a namespace, its value a module that registers the ops in it."""

KINDS = (
    "movement", "parts", "indexed", "pointwise", "contraction", "convolution", "attention", "normalisation",
    "reduction", "losses", "matrices", "spatial", "creation",
)  # fmt: skip
"""The files of PyTorch's own ops."""

_BUILT_IN = {
    **dict.fromkeys(("aten", "python"), tuple(f"fxprune.ops.{kind}" for kind in KINDS)),
    "fxprune": ("fxprune.ops.selection",),
    "torchvision": ("fxprune.ops.torchvision",),
    "transformers": ("fxprune.ops.transformers",),
}

Label = Callable[[Any, Any], Any]
Mask = Callable[[Any, Any, Any, Any], Any]
Fix = Callable[[Any, Any], None]
Cost = Callable[[Any, Any], Iterable[tuple[float, Any]]]
Dtypes = Literal["nothing", "anything", "floats", "floats of one kind"]


@dataclass(frozen=True)
class Op:
    """What is known of one op. A stage asks for what it needs; ``fxprune.ops.register`` says how to write a record.

    For the labels:

    - ``label``: ``(run, call) -> labels``: which position of the outputs belongs to which channel, one ``Labels`` for
      all outputs or a list with one each. Without one the channels that reach the op stay.
    - ``cost``: ``(run, call) -> [(constant, labels), ...]``: MACs as ``constant`` times the sizes that the factors in
      ``labels`` cut; ``()`` for what no cut lowers. In words, where none is needed.
    - ``reads_values``: the result depends on single channels (an index, a sort): they stay, and it carries none.
    - ``moves``: only moves positions, or looks at nothing but shapes: no parameter counts as used by it.
    - ``parts``: takes a part of the dimension ``dim``, which numbers name.
    - ``rearranges``: every position is there afterwards, once, in the same order as before or in another.
    - ``idempotent``: done twice, it is done once.
    - ``multiplies``: the names of the two operands of a product or a convolution.
    - ``chooses``: the names of the tensor that it copies channels of, and of the index that says which.
    - ``attends``: it is an attention; the places and names of its queries and values.

    For the proof:

    - ``mask``: ``(func, on, args, kwargs) -> outputs``: what the op gives without the channels that go. ``on``, of the
      operand's shape, says which positions stay. It shares no code with ``label`` and ``repair``, whose faults it is to
      find. In words, why the op needs none: nothing in a result comes from several channels.
    - ``operand``: the place of the operand that ``on`` is of.
    - ``counted``: the name under which the calls in a node are counted; other devices may call a like op there.
    - ``double``: what the op computes in double, where PyTorch has no kernel for it.

    For the rewriter:

    - ``repair``: ``(repair, node) -> None``: put new sizes into a node whose arguments name old ones. In words, where
      an argument that could be a size names none that is cut.

    For the refit:

    - ``refit``: a ``Contraction`` with a weight (``product``, ``sliding``), a norm with measured ``Statistics``, an
      ``Affine`` map of channels, an ``Addition``, or how entries of parameters are ``Followed``. In words, why it is
      none of these.

    For the recorder:

    - ``sizes``: the place from which on the arguments are sizes, or numbers at least.
    - ``many``: gives as many tensors as a size says.
    - ``takes``: operands of which dtypes it takes whatever their values, None: a view any, a pointwise op floats.
    - ``refuses``: ``(*args) -> bool``: of these it refuses some that it takes on meta.
    - ``lays``: ``(result, *args) -> result`` as the kernels of the processor lay it out, where that is not as on meta.

    For runs on meta tensors:

    - ``pointwise``: computes every position from the same position of its operands, though PyTorch has no tag on it.
    - ``fills``: makes a tensor of which the operand, if there is one, tells the shape, the dtype and the device.
    - ``meta``: by overload, what the op gives on meta tensors, or None to leave it to PyTorch.
    - ``without_values``: ``(node, *args, **kwargs) -> outputs``: the same where the values decide how many there are.

    ``kind``: the file that the record is from.
    """

    name: str
    label: Label | None = None
    mask: Mask | str | None = None
    repair: Fix | str | None = None
    cost: Cost | str | None = None
    reads_values: bool = False
    moves: bool = False
    parts: bool = False
    rearranges: bool = False
    idempotent: bool = False
    multiplies: tuple[str, str] | None = None
    chooses: tuple[str, str] | None = None
    attends: tuple[tuple[int, str], tuple[int, str]] | None = None
    operand: int = 0
    counted: str = ""
    double: Callable[..., Any] | None = None
    refit: Refit | None = None
    sizes: int | None = None
    many: bool = False
    takes: Dtypes | None = None
    refuses: Callable[..., bool] | None = None
    lays: Callable[..., Any] | None = None
    pointwise: bool = False
    fills: bool = False
    meta: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    without_values: Callable[..., Any] | None = None
    kind: str = ""

    @property
    def calls(self) -> str:
        """See ``counted``."""
        return self.counted or self.name.removeprefix("aten::")


OPS: dict[str, Op] = {}
_loaded: set[str] = set()
_loading: set[str] = set()
_LOCK = threading.RLock()


def add(*names: str, kind: str = "", **facts: Any) -> None:
    """Put one record with the same ``facts`` into the table under each name; one without a namespace is PyTorch's.

    Raises:
        InputError: a name is taken.
    """
    for name in names:
        full = name if "::" in name else f"aten::{name}"
        if full in OPS:
            raise InputError(f"Two records for the op {full}.")
        OPS[full] = Op(full, kind=kind, **facts)


def adder(module: str, **facts: Any) -> Callable[..., None]:
    """``add`` for the file of a kind. ``facts``: of all its ops, unless a record says otherwise."""

    def put(*names: str, **own: Any) -> None:
        add(*names, kind=module.rpartition(".")[2], **{**facts, **own})

    return put


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
    if namespace in _loaded:
        return
    with _LOCK:
        if namespace in _loaded or namespace in _loading:
            return
        _loading.add(namespace)
        try:
            for module in _BUILT_IN.get(namespace, ()):
                import_module(module)
            for entry in entry_points(group=GROUP):
                if entry.name == namespace:
                    _load_entry(namespace, entry)
        finally:
            _loading.discard(namespace)
        _loaded.add(namespace)


def _load_entry(namespace: str, entry: Any) -> None:
    try:
        entry.load()
    except Exception as error:
        raise InputError(
            f"The ops of {namespace!r} cannot be loaded from {entry.value} ({type(error).__name__}: {error}). "
            "Repair or uninstall the package that brings them."
        ) from error


# -- which op is this? ------------------------------------------------------------------------------------------------


def full_name(op: Any) -> str:
    """``namespace::name`` of an op as it is called, of a node's target too; ``""`` of anything else."""
    op = getattr(op, "function", op)  # as a recorded node holds an op
    schema = getattr(op, "_schema", None)
    return str(getattr(op, "_qualified_op_name", "") if schema is None else schema.name)


def record_name(func: Any) -> str:
    """The name of an op's record, one for all overloads; an op that writes in place may share the other's."""
    name = str(func._schema.name)
    if func.namespace == "aten" and func._schema.is_mutable and find(name) is None:
        return name.rstrip("_")
    return name


@lru_cache(maxsize=4096)
def _record_name(func: Any) -> str:
    return record_name(func)


def record_of(func: Any) -> Op | None:
    """The record of an op as it is called, if there is one."""
    return find(_record_name(func))


def op_name(func: Any) -> str:
    """The bare name of an op's record: ``add`` for ``aten.add_.Tensor``."""
    return _record_name(func).partition("::")[2]


def is_pointwise(func: Any) -> bool:
    """Whether the op computes every position from the same position of its operands, also where it writes in place."""
    if torch.Tag.pointwise in func.tags:
        return True
    record = record_of(func)
    return record is not None and record.pointwise


def base_name(node: fx.Node) -> str:
    """The bare name of what a node calls: ``view`` for the method, the function and ``aten.view.default`` alike."""
    target: Any = node.target
    if target is getattr and len(node.args) > 1:
        return str(node.args[1])
    name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    return name.split(".")[0]


def find_call(name: str) -> Op | None:
    """The record of a function or a method of PyTorch's, or of Python's, by its bare name."""
    return find(f"aten::{name}") or find(f"python::{name}")


def record_at(node: fx.Node) -> Op | None:
    """The record of what a node calls: by its bare name, or of an op that is not PyTorch's own by its full one."""
    if node.op not in ("call_method", "call_function"):
        return None
    name = full_name(node.target)
    return find(name) if name and not name.startswith("aten::") else find_call(base_name(node))


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """What a node passes for one parameter, by position or by name."""
    return node.kwargs.get(name, node.args[place] if place < len(node.args) else default)


def is_movement(node: fx.Node | None) -> bool:
    """Does the node only move positions about?"""
    record = None if node is None else record_at(node)
    return record is not None and record.rearranges


# -- layers -----------------------------------------------------------------------------------------------------------

Shape = tuple[int, ...]
Adapt = Callable[[Any, Shape, Shape], None]
_LAYERS: list[tuple[type, Adapt]] = []


def layer(*kinds: type) -> Callable[[Adapt], Adapt]:
    """Register ``(module, before, after) -> None``: the module's weights are cut already, and the first input's shape
    was ``before`` and is ``after``; ``module``'s size attributes follow."""

    def register(function: Adapt) -> Adapt:
        _LAYERS.extend((kind, function) for kind in kinds)
        return function

    return register


def layers() -> list[tuple[type, Adapt]]:
    """The modules that stay whole in a graph, and what sets their attributes that name sizes."""
    load("aten")
    return _LAYERS
