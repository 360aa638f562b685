"""One argument of the user's: how it is checked, and how it is a word of the command line.

A check turns a value into the one that will be used (``as_...``), or raises an ``InputError``.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fxprune.errors import InputError, check_choice, check_count, check_flags, is_real
from fxprune.io.files import as_path

Check = Callable[[str, Any], Any]
"""Of an argument's name and value: the value as it will be used, or an ``InputError``."""


@dataclass(frozen=True)
class Flag:
    """A field as an option of the command line.

    ``group``: the heading it stands under. ``metavar``: what the help calls its value. ``read``: a word's value, or an
    ``InputError``. ``join``: makes one value of those of many words; None where there is one. ``name``: where it is not
    the field's. ``python``: the word names something in Python, see ``fxprune.io.specs``.
    """

    group: str
    metavar: str = ""
    read: Callable[[str], Any] = str
    join: Callable[[list[Any]], Any] | None = None
    name: str = ""
    python: Literal["", "object", "function", "loss", "data"] = ""


def documented(record: type) -> dict[str, str]:
    """Of every field that the record's docstring lists under ``Args``: the first sentence, without its full stop."""
    text = re.split(r"^\S", inspect.cleandoc(record.__doc__ or "").partition("Args:\n")[2], flags=re.MULTILINE)[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", text, re.MULTILINE | re.DOTALL)
    return {name: re.split(r"\.\s", " ".join(said.split()) + " ")[0].strip() for name, said in entries}


def option(check: Check, flag: Flag | None = None) -> dict[str, Any]:
    """What is known of a field: how it is checked, and how it is given on the command line, if it can be."""
    return {"check": check, "flag": flag}


@dataclass(frozen=True)
class Checked:
    def __post_init__(self) -> None:
        for each in fields(self):
            value = each.metadata["check"](each.name, getattr(self, each.name))
            object.__setattr__(self, each.name, value)


# -- checks ------------------------------------------------------------------------------------------------------------


def check_ratio(kind: str, value: Any) -> float:
    """A budget as a float.

    Raises:
        InputError: it is no ratio in (0, 1].
    """
    if not is_real(value) or not 0 < value <= 1:
        raise InputError(f"{kind}={value} is no budget: pass a ratio of the dense model in (0, 1], such as {kind}=0.5.")
    return float(value)


def check_loader(data: Any, what: str = "data") -> None:
    """Refuse what cannot be a loader; nothing is drawn from it.

    Raises:
        InputError: it cannot be iterated over, or says itself that it is empty.
    """
    if not isinstance(data, Iterable):
        kind = type(data).__name__
        raise InputError(f"{what}= is a {kind}, which is no loader: pass an iterable of (inputs, target) batches.")
    if length_of(data) == 0:
        raise InputError(without_batches(what))


def length_of(data: Any) -> int | None:
    """How many batches a loader has; None where it does not know."""
    try:
        return len(data)
    except TypeError:
        return None


def without_batches(what: str) -> str:
    """What is said of a loader that yields nothing."""
    return f"{what}= yields no batches. Is it a generator that was used up, or smaller than one batch?"


def anything(name: str, value: Any) -> Any:
    return value


def or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def one_of(kind: Any) -> Check:
    def check(name: str, value: Any) -> Any:
        check_choice(name, value, get_args(kind))
        return value

    return check


def as_flag(name: str, value: Any) -> bool:
    check_flags(**{name: value})
    return bool(value)


def as_whole(least: int) -> Check:
    return lambda name, value: check_count(name, value, least)


def as_multiple(name: str, value: Any) -> Any:
    return value if isinstance(value, str) and value in ("auto", "measured") else check_count(name, value)


def as_depth(name: str, value: Any) -> float | None:
    """A share of residual branches in (0, 1]; True is all of them, False or None none: None."""
    if value is None or value is False:
        return None
    if value is True:
        return 1.0
    if not is_real(value) or not 0 < value <= 1:
        raise InputError(f"{name}={value!r} must be True or the share of residual branches that may go, in (0, 1].")
    return float(value)


def as_loader(name: str, value: Any) -> Any:
    check_loader(value, name)
    return value


OPTIMIZER = "lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
SCHEDULE = "lambda optimizer, epochs: CosineAnnealingLR(optimizer, epochs)"


def as_maker(example: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if not callable(value):
            raise InputError(f"{name}= is a {type(value).__name__}; pass a function that makes it: {example}.")
        return value

    return check


def as_loss(name: str, value: Any) -> Any:
    if not callable(value):
        raise InputError(f"loss_fn= is a {type(value).__name__}; pass a function of (output, target).")
    if isinstance(value, type):
        raise InputError(f"loss_fn= is the class {value.__name__}; pass an object of it, such as {value.__name__}().")
    return value


def as_device(name: str, value: Any) -> Any:
    import torch

    try:
        torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"device={value!r} is no device: pass one such as 'cpu' or 'cuda'.") from error
    return value


def as_positive(name: str, value: Any) -> Any:
    if not (is_real(value) and value > 0):
        raise InputError(f"{name}={value} must be positive.")
    return value


def as_file(name: str, value: Any) -> Path:
    return as_path(value)


def as_checkpoint(name: str, value: Any) -> Any:
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{name}= is a {type(value).__name__}; pass the path of a checkpoint.")
    return value


def as_provider(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"provider={value!r} is no name: pass an execution provider of onnxruntime, eager, inductor or openvino."
        )
    return value


def by_pattern(value: Any) -> Mapping[Any, Any]:
    return {} if value is None else value if isinstance(value, Mapping) else {"*": value}


def as_shares(name: str, value: Any) -> Any:
    for pattern, share in by_pattern(value).items():
        if not isinstance(pattern, str):
            raise InputError(f"max_ratio has the pattern {pattern!r}: pass names of layers, such as 'layer4.*'.")
        if not is_real(share) or not 0 <= share <= 1:
            raise InputError(f"max_ratio of {pattern!r} is {share!r}: pass the share that may go, in [0, 1].")
    return value


# -- words of the command line -----------------------------------------------------------------------------------------


def multiple_in(word: str) -> Any:
    try:
        return word if word in ("auto", "measured") else int(word)
    except ValueError:
        raise InputError(f"{word!r} is no number of channels, nor auto, nor measured") from None


def share_in(word: str) -> tuple[str, float]:
    pattern, equals, share = word.rpartition("=")
    try:
        return (pattern if equals else "*"), float(share)
    except ValueError:
        raise InputError(f"{word!r} is no share: write 0.5, or 'layer4.*=0.5' for some layers") from None
