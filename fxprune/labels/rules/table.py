"""The table of rules and what a rule sees of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fxprune.labels.factors import Labels
from fxprune.ops.meta import is_pointwise, op_name, tensors_in
from fxprune.ops.table import full_name

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation


# What only moves positions about, or looks at nothing but shapes, consumes nothing.
MOVES = frozenset(
    """
    alias detach clone contiguous lift lift_fresh lift_fresh_copy positive _to_copy _conj view _unsafe_view reshape
    _reshape_alias _reshape_copy view_copy permute transpose t numpy_T swapaxes unsqueeze squeeze expand expand_copy
    repeat select select_copy slice slice_copy split split_with_sizes unsafe_split unsafe_split_with_sizes chunk
    unsafe_chunk tensor_split unbind flip roll cat stack index _unsafe_index index_select diagonal as_strided
    constant_pad_nd pad pixel_shuffle pixel_unshuffle unfold view_as_complex view_as_real
    empty_like zeros_like ones_like full_like rand_like randn_like randint_like
    new_empty new_zeros new_ones new_full new_empty_strided sym_size is_same_size _assert_tensor_metadata
    """.split()
)
PARTS = frozenset("slice slice_copy select select_copy split split_with_sizes unsafe_split_with_sizes".split())
"""Take a part of one dimension, which numbers name."""


@dataclass(frozen=True)
class Signature:
    """What is said once of an op. ``name``: of its rule; of an op that is not PyTorch's own the full one.

    ``defaults``: of the arguments that have one. ``moves``, ``parts``: see ``MOVES`` and ``PARTS``.
    """

    name: str
    arguments: tuple[str, ...]
    defaults: dict[str, Any]
    is_mutable: bool
    is_pointwise: bool
    moves: bool
    parts: bool


@cache
def signature(func: Any) -> Signature:
    schema, own = func._schema, str(func.overloadpacket.__name__)
    name = own if own in RULES else op_name(func)
    return Signature(
        name if func.namespace == "aten" else full_name(func),
        tuple(a.name for a in schema.arguments),
        {a.name: a.default_value for a in schema.arguments if a.has_default_value()},
        schema.is_mutable,
        is_pointwise(func),
        name in MOVES,
        name in PARTS,
    )


class Call:
    """One aten call. ``arguments``: those given, by the schema's names; ``outputs``: the tensors it made."""

    def __init__(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]):
        self.func = func
        self.given = args, kwargs
        self.signature = signature(func)
        self.name = self.signature.name
        self.outputs = outputs
        arguments: dict[str, Any] = dict(kwargs)
        arguments.update(zip(self.signature.arguments, args, strict=False))
        written = arguments.pop("out", None)
        self.tensors = tensors_in(arguments.values())
        if written is not None and self.signature.is_mutable:
            arguments["out"] = written
        self.arguments = arguments

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name] if name in self.arguments else self.signature.defaults[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments[name] if name in self.arguments else self.signature.defaults.get(name, default)

    @property
    def input(self) -> Tensor:
        """The first operand."""
        tensor: Tensor = self.tensors[0]
        return tensor

    @property
    def out(self) -> Tensor:
        return self.outputs[0]

    def dims(self, name: str = "dim") -> list[int]:
        """The argument as a list of non-negative dims of ``input``; all of them if it is None or empty."""
        value, ndim = self.get(name), self.input.ndim
        if value is None or value == []:
            return list(range(ndim))
        return [d % ndim for d in ([value] if isinstance(value, int) else value)]


Rule = Callable[["Propagation", Call], "Labels | list[Labels]"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for aten ops by their names without overloads. In-place variants follow by themselves."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for aten.{name}")
            RULES[name] = function
        return function

    return register
