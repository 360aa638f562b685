"""Where ops of other packages are registered and looked up; ``fxprune.ops`` is the door, with a worked example."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from fxprune.errors import InputError
from fxprune.ops.table import OPS, Label, Op, add, load

L = TypeVar("L", bound=Label)


def register(name: str, **facts: Any) -> Callable[[L], L]:
    """Say what an op does. As a decorator it registers the function below it as ``label``.

    Args:
        name: ``namespace::name``, without the overload, as in ``torch.ops.namespace.name``. The op must run on meta
            tensors (``torch.library.register_fake``).
        facts: the fields of ``fxprune.ops.Op``, of which these matter to most:

            ``label``: ``(run, call) -> labels``. It joins what must live together (``join_positions``, ``contract``,
            ``convolve``, ``run.join``), locks what must stay (``run.lock(ids, reason)``), and notes where a number is
            computed over channels (``run.approximate`` and ``run.statistic(call.name, labels)``). It looks at the
            labels of all operands, or names those that it does not look at (``run.unread(call.name, tensor)``).

            ``mask``: ``(func, on, args, kwargs) -> outputs``: the counterpart of such a statistic in the proof.

            ``repair``: ``(repair, node) -> None``: put new sizes into a node whose arguments name old ones.
            ``repair.dense`` and ``repair.value`` tell what an argument was and is, ``repair.promised`` the new shape
            of a tensor.

            ``cost``: ``(run, call) -> [(constant, labels), ...]``: MACs. Not for what ``contract`` and ``convolve``
            count already.

            ``refit``: a weight that the op contracts can be refitted (``fxprune.reconstruct``) if it says which product
            that is: ``product("x", "weight", "...k,ok->...o")``.

            ``reads_values``: the op's result depends on single channels: they stay, and it carries none.

    Raises:
        InputError: the name is taken, has no namespace, or its namespace has no such op (near names are listed).
    """
    _check(name)
    add(name, **facts)

    def label(function: L) -> L:
        OPS[name] = replace(OPS[name], label=function)
        return function

    return label


def lookup(name: str) -> Op:
    """The record of an op.

    Raises:
        InputError: there is none; near names are listed.
    """
    load(name.partition("::")[0])
    if name not in OPS:
        raise InputError(f"No op {name!r} is registered.{_near(name, OPS)}")
    return OPS[name]


def _check(name: str) -> None:
    namespace, _, own = name.partition("::")
    if not namespace or not own or "." in own:
        raise InputError(f"{name!r} names no op; write namespace::name, such as torchvision::deform_conv2d.")
    if namespace == "aten":
        load(namespace)
    known = {op.partition(".")[0] for op in torch._C._dispatch_get_all_op_names() if op.startswith(f"{namespace}::")}
    if known and name not in known:  # of a namespace that is not loaded yet nothing is known
        raise InputError(f"There is no op {name!r}.{_near(name, known)}")


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, sorted(known), 5, 0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
