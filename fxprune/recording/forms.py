"""The form of an input: all that a recording takes for granted in it but its sizes, its numbers and its entries.

Python code that takes an input apart sees how many items it has, and under which keys; it may ask what kind of thing it
got, and it may branch on any plain value. A form is that, as plain nested tuples that a graph can hold.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.recording.structure import parts

Form = tuple[Any, ...]
"""("tensor", kind, dims), ("number",), ("sequence", forms), ("mapping", keys, forms), ("object", class, names, forms),
("value", text), ("itself",) of an object inside of itself, or ("absent", form): that, or None in its place."""

_DEPTH = 8  # of objects that hold no tensor


def form_of(value: Any, *, numbers: bool = True, inside: tuple[int, ...] = ()) -> Form:
    """The form of an input. ``numbers``: they are free; else they are fixed like other plain values.

    ``inside``: the identities of what it is a part of, since objects may hold themselves.
    """
    if isinstance(value, Tensor):
        return ("tensor", _kind(value), value.ndim) if numbers else ("value", _text(value))
    if numbers and _is_number(value):
        return ("number",)
    if id(value) in inside:
        return ("itself",)
    found = parts(value)
    if found is None or (found and found[0].kind == "leaf"):
        return "value", _text(value)
    forms = tuple(form_of(part.value, numbers=numbers, inside=(*inside, id(value))) for part in found)
    if isinstance(value, Mapping):
        return "mapping", tuple(_text(part.key) for part in found), forms
    if isinstance(value, (tuple, list)):
        return "sequence", forms
    return "object", _class_of(value), tuple(part.key for part in found), forms


def difference(value: Any, form: Form) -> tuple[str, str] | None:
    """Where a value differs from a form, as Python writes it after its name, and how; None if it does not."""
    kind = form[0]
    if kind == "itself" or isinstance(value, fx.Proxy):  # somebody traces the graph
        return None
    if kind == "absent":
        return None if value is None else difference(value, form[1])
    if kind == "tensor":
        return _at("", _difference_of_tensor(value, form))
    if kind == "number":
        return None if _is_number(value) else ("", f"is {_shown(value)}, where a number was recorded")
    if kind == "sequence":
        if not isinstance(value, (tuple, list)):
            return "", f"is {_shown(value)}, where {len(form[1])} items were recorded"
        if len(value) != len(form[1]):
            return "", f"has {len(value)} items, where {len(form[1])} were recorded"
        return _first(value, range(len(value)), form[1])
    if torch.compiler.is_exporting() and kind != "mapping":  # what is no tensor is fixed there in any case
        return None
    if kind == "mapping":
        keys = {_text(key): key for key in value} if isinstance(value, Mapping) else {}
        if set(keys) != set(form[1]):
            given = f"has the keys {', '.join(keys)}" if keys else f"is {_shown(value)}"
            return "", f"{given}, where {', '.join(form[1])} were recorded"
        return _first(value, [keys[text] for text in form[1]], form[2])
    if kind == "object":
        if _class_of(value) != form[1]:
            return "", f"is {_shown(value)}, where {form[1]} was recorded"
        for name, each in zip(form[2], form[3], strict=True):
            found = difference(getattr(value, name, None), each)
            if found is not None:
                return f".{name}{found[0]}", found[1]
        return None
    text = _text(value)
    return None if text == form[1] else ("", f"is {_shown(value)}, where {_short(form[1])} was recorded")


def _first(value: Any, keys: Any, forms: tuple[Form, ...]) -> tuple[str, str] | None:
    for key, form in zip(keys, forms, strict=True):
        found = difference(value[key], form)
        if found is not None:
            return f"[{key!r}]{found[0]}", found[1]
    return None


def _at(path: str, text: str) -> tuple[str, str] | None:
    return (path, text) if text else None


def _difference_of_tensor(value: Any, form: Form) -> str:
    if not isinstance(value, Tensor):
        return f"is {_shown(value)}, where a tensor was recorded"
    if _kind(value) != form[1]:
        return f"is a tensor of {value.dtype}, where one of {form[1]} was recorded"
    return "" if value.ndim == form[2] else f"has {value.ndim} dims, where {form[2]} were recorded"


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "booleans"
    if tensor.dtype.is_complex:
        return "complex numbers"
    return "floats" if tensor.dtype.is_floating_point else "integers"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, (bool, np.generic))


def _class_of(value: Any) -> str:
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


def _text(value: Any, depth: int = _DEPTH) -> str:
    """A text that is the same for what is as good as the same, in any process."""
    if type(value) in (int, float):
        return repr(float(value) if abs(value) < 2**53 else value)
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        entries = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        held = hashlib.sha1(entries.tobytes(), usedforsecurity=False).hexdigest()
        return f"a tensor of {value.dtype} {list(value.shape)} {held[:12]}"
    if isinstance(value, np.ndarray):
        held = hashlib.sha1(np.ascontiguousarray(value).tobytes(), usedforsecurity=False).hexdigest()
        return f"an array of {value.dtype} {list(value.shape)} {held[:12]}" if value.dtype != object else "an array"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        code = getattr(value, "__code__", None)
        line = f":{code.co_firstlineno}" if code is not None else ""
        return f"{value.__module__}.{value.__qualname__}{line}"
    if not depth or isinstance(value, (Tensor, nn.Module, torch.Generator, types.ModuleType)):
        return _class_of(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(k, depth - 1)}: {_text(v, depth - 1)}' for k, v in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_text(item, depth - 1) for item in value)})"
    attributes = getattr(value, "__dict__", None)
    shown = str(repr(value))
    if attributes is None or " object at 0x" not in shown:
        return shown if " at 0x" not in shown else _class_of(value)
    return f"{_class_of(value)} {_text(attributes, depth - 1)}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    return _short(_text(value))


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "..."
