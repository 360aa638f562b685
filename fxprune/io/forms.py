"""The form of data that comes from a file, checked before anything reads it.

A form is plain data that looks like what it describes:

    str, bool, Tensor          a value of that type
    None, 2, "flops"           that value
    Whole(0), Real()           a number within bounds; a bool is none
    [form]                     a list of any length
    (form, form)               a list or tuple of that length
    {"name": form}             an object with exactly these keys
    Map(form)                  an object with any names as keys
    Either(form, form)         one of these
    Such(form, test, "text")   a form, and a test of the value that has it; ``text`` says what must be
    anything                   whatever
    a function of no arguments the form that it returns: for forms that hold themselves

``json_of`` reads JSON, and refuses what Python's reader would take silently; ``check`` walks over data and form
together. Both say what is wrong and where. What is inside a value that has the form is no larger and no deeper than the
file, so whatever reads it needs no more care.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_DEEPEST = 100
_LARGEST = 2**63 - 1


class FormError(ValueError):
    """Data of another form; the text says where, what must be there, and what is. ``depth``: of the part."""

    def __init__(self, text: str, depth: int = 0):
        super().__init__(text)
        self.depth = depth


@dataclass(frozen=True)
class Whole:
    """A whole number from ``least`` to ``most``."""

    least: int = 0
    most: int = _LARGEST

    def __str__(self) -> str:
        if self.most == _LARGEST:
            return f"a whole number of at least {self.least}"
        return f"a whole number from {self.least} to {self.most}"


@dataclass(frozen=True)
class Real:
    """A number; ``finite``: neither NaN nor infinite."""

    finite: bool = True

    def __str__(self) -> str:
        return "a finite number" if self.finite else "a number"


@dataclass(frozen=True)
class Map:
    """An object of any size. ``keys``: the form of its names, or a regular expression that they match as a whole."""

    values: Any
    keys: Any = str

    def __str__(self) -> str:
        return "an object"


class Either:
    """One of several forms."""

    def __init__(self, *forms: Any):
        self.forms = forms

    def __str__(self) -> str:
        return " or ".join(dict.fromkeys(map(_named, self.forms)))


@dataclass(frozen=True)
class Such:
    """A form with a test beyond it."""

    form: Any
    test: Callable[[Any], bool]
    text: str

    def __str__(self) -> str:
        return self.text


class _Anything:
    def __str__(self) -> str:
        return "anything"


anything = _Anything()


def json_of(text: str | bytes) -> Any:
    """The value that JSON describes.

    Raises:
        FormError: it is no JSON, no UTF-8, too deep, or gives one name twice in one object.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise FormError("it is nested too deeply") from None
    except FormError:
        raise
    except ValueError as error:
        raise FormError(str(error)) from None


def check(value: Any, form: Any) -> None:
    """Compare data with a form, all the way down.

    Raises:
        FormError: names a part that is wrong: ``kept['conv1.weight']['0'][3]``.
    """
    _walk(value, form, _Place())


@dataclass(frozen=True)
class _Place:
    """Where a value is: written out only in messages, for there are many values."""

    outer: _Place | None = None
    key: Any = None
    depth: int = 0

    def inside(self, key: Any) -> _Place:
        return _Place(self, key, self.depth + 1)

    def __str__(self) -> str:
        keys = []
        place = self
        while place.outer is not None:
            keys.append(place.key)
            place = place.outer
        first, *rest = reversed(keys) if keys else [""]
        start = first if isinstance(first, str) else f"[{first}]"
        return "".join([_short(start), *(f"[{_short(repr(key))}]" for key in rest[:10]), "…" if len(rest) > 10 else ""])


def _walk(value: Any, form: Any, place: _Place) -> None:
    if place.depth > _DEEPEST:
        raise FormError(f"{place} is nested too deeply", place.depth)
    if callable(form) and not isinstance(form, type):
        form = form()
    if isinstance(form, Either):
        _walk_either(value, form, place)
        return
    if isinstance(form, Such):
        _walk(value, form.form, place)
        if not form.test(value):
            raise _wrong(value, form, place, nearly=1)
        return
    if not _fits(value, form):
        raise _wrong(value, form, place)
    if isinstance(form, list):
        (own,) = form
        plain = isinstance(own, (Whole, Real))  # of which there are many
        for index, item in enumerate(value):
            if not (plain and _fits(item, own)):
                _walk(item, own, place.inside(index))
    elif isinstance(form, tuple):
        for index, (item, own) in enumerate(zip(value, form, strict=True)):
            _walk(item, own, place.inside(index))
    elif isinstance(form, dict):
        missing, unknown = [k for k in form if k not in value], [k for k in value if k not in form]
        for what, names in (("missing", missing), ("unknown", unknown)):
            if names:
                where = f" in {place}" if place.depth else ""
                raise FormError(f"{_short(repr(names[0]))} is {what}{where}", place.depth + 1)
        for name, own in form.items():
            _walk(value[name], own, place.inside(name))
    elif isinstance(form, Map):
        for name, item in value.items():
            if not _names(form.keys, name):
                where = f" in {place}" if place.depth else ""
                raise FormError(f"{_short(repr(name))}{where} is no name that can be there", place.depth + 1)
            _walk(item, form.values, place.inside(name))


def _walk_either(value: Any, either: Either, place: _Place) -> None:
    """The message of the form that the value has down to the deepest part."""
    deepest = _wrong(value, either, place)
    for form in either.forms:
        try:
            _walk(value, form, place)
        except FormError as error:
            deepest = error if error.depth > deepest.depth else deepest
        else:
            return
    raise deepest


def _names(keys: Any, name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(keys, name)) if isinstance(keys, str) else _fits(name, keys)


def _fits(value: Any, form: Any) -> bool:
    """Whether the value itself has the form, whatever it holds."""
    if form is anything:
        return True
    if isinstance(form, Whole):
        return type(value) is int and form.least <= value <= form.most
    if isinstance(form, Real):
        if type(value) is int:
            return abs(value) <= _LARGEST
        return type(value) is float and (not form.finite or math.isfinite(value))
    if isinstance(form, (dict, Map)):
        return isinstance(value, Mapping)
    if isinstance(form, list):
        return isinstance(value, list)
    if isinstance(form, tuple):
        return isinstance(value, (list, tuple)) and len(value) == len(form)
    if isinstance(form, type):
        return isinstance(value, form) and (form is bool or not isinstance(value, bool))
    return type(value) is type(form) and bool(value == form)


def _wrong(value: Any, form: Any, place: _Place, nearly: int = 0) -> FormError:
    return FormError(f"{str(place) or 'it'} must be {_named(form)}, and is {_told(value)}", place.depth + nearly)


def _named(form: Any) -> str:
    if form is None:
        return "null"
    if isinstance(form, list):
        return "a list"
    if isinstance(form, tuple):
        return f"a list of {len(form)}"
    if isinstance(form, dict):
        return "an object"
    if isinstance(form, type):
        return {str: "text", bool: "true or false"}.get(form) or f"a {form.__name__}"
    if isinstance(form, (Whole, Real, Map, Either, Such, _Anything)):
        return str(form)
    return repr(form)


def _told(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (bool, float, str)) or (isinstance(value, int) and abs(value) < 10**30):
        return _short(repr(value))
    if isinstance(value, int):
        return "a number of more than 30 digits"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}…{text[-1]}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormError(f"{_short(repr(twice))} is there twice")
    return result
