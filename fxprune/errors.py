"""Every error fxprune raises on purpose. Each says what is wrong, where, and what to do about it."""

import contextlib
import difflib
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any


class FxpruneError(Exception):
    """Base class of all errors raised by fxprune.

    Examples:
        >>> try:
        ...     fxprune.prune(model, x, flops=50)
        ... except fxprune.FxpruneError as error:
        ...     print(error)
        flops=50 is no budget: pass a ratio of the dense model in (0, 1], such as flops=0.5.
    """


class InputError(FxpruneError, ValueError):
    """An argument that cannot be used: unknown method, bad budget, unknown module name."""


class ExampleInputsError(InputError):
    """Example inputs that are missing or that the model's ``forward`` does not accept."""


class RecordError(FxpruneError):
    """The model ran, but what it did could not be written down as a graph."""


class GuardError(FxpruneError, RuntimeError):
    """A recorded graph was called outside what its recording covers. ``source``: the line, or the input, that it is."""

    def __init__(self, text: str, source: str = ""):
        super().__init__(text)
        self.source = source


class ModelError(FxpruneError, ValueError):
    """A model that cannot be pruned: NaN weights, or no prunable channels."""


class BudgetError(FxpruneError, ValueError):
    """A budget that no allowed choice of channels reaches. ``floor``: the smallest allowed choice, per channel."""

    def __init__(self, text: str, floor: Any = None):
        super().__init__(text)
        self.floor = floor


class PlanError(FxpruneError, ValueError):
    """A plan file that is damaged, or a plan that belongs to another model."""


class ArtifactError(FxpruneError, ValueError):
    """A saved network that is damaged or of another kind, or that does not fit the model it is loaded into."""


class ConversionError(FxpruneError):
    """The model's own class cannot hold the pruned layers."""


class WriteError(FxpruneError, OSError):
    """A file could not be written to its end, on a full disk for instance; nothing was left of it."""


class VerificationError(FxpruneError):
    """The pruned model does not compute what its masked original computes."""


class ExportError(FxpruneError):
    """A file of another format could not be written, or does not compute what the model computes."""


def check_installed(extra: str, *packages: str) -> None:
    """Refuse to go on without packages that not every install has, before any work; nothing is imported.

    Args:
        extra: of fxprune, that brings them.
        packages: to be imported later.

    Raises:
        InputError: names those that are missing, or older than the extra wants, and what to install.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise InputError(f"This needs {' and '.join(missing)}: pip install 'fxprune[{extra}]'.")
    old = [f"{name}>={least}, and {found} is installed" for name, least, found in _too_old(extra)]
    if old:
        raise InputError(f"This needs {'; and '.join(old)}: pip install 'fxprune[{extra}]'.")


def _too_old(extra: str) -> list[tuple[str, str, str]]:
    """Packages of the extra that are installed in an older version: name, version wanted, version found."""
    try:
        wanted = metadata.requires("fxprune") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed wants nothing
        return []
    result = []
    for line in wanted:
        named = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", line)
        if named is None or not re.search(rf"extra\s*==\s*[\"']{re.escape(extra)}[\"']", line):
            continue
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = metadata.version(named[1])
            if _release(found) < _release(named[2]):
                result.append((named[1], named[2], found))
    return result


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version: ``1.17.0rc1`` -> (1, 17)."""
    numbers = re.match(r"[\d.]*", version.rpartition("!")[2])
    parts = [int(part) for part in (numbers[0] if numbers else "").split(".") if part]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


def shown(value: Any) -> str:
    """A value for a message: itself if it is short, else its type: ``of type OrderedDict``."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"of type {type(value).__name__}"


def named(value: Any) -> str:
    """The same to begin a sentence with: ``OrderedDict``."""
    return shown(value).removeprefix("of type ")


def is_real(value: Any) -> bool:
    """Whether this is a number on the line, numpy's too; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """An argument as an int, numpy's too; refuses what is no whole number, too small a one, or beyond 64 bits.

    Raises:
        InputError: names the argument and what it was.
    """
    if not (is_real(value) and isinstance(value, numbers.Integral)) or int(value) < least:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}.")
    if int(value) >= 2**63:
        raise InputError(f"{name}={value!r} must be below 2**63.")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """An argument as a float, numpy's too; refuses what is no finite number of at least 0.

    Raises:
        InputError: names the argument and what it was.
    """
    if not is_real(value):
        raise InputError(f"{name}={value!r} must be a number.")
    if not 0 <= value < math.inf:
        raise InputError(f"{name}={value} must {'be finite' if value == math.inf else 'not be negative'}.")
    return float(value)


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse what is none of the known words.

    Raises:
        InputError: lists them.
    """
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name}={value!r} is unknown. Known: {', '.join(known)}.")


def check_flags(**flags: Any) -> None:
    """Refuse what is neither true nor false: ``exact="no"`` would be true.

    Raises:
        InputError: names the argument and what it was.
    """
    for name, value in flags.items():
        if type(value).__name__ not in ("bool", "bool_"):  # numpy's too
            raise InputError(f"{name}={value!r} must be True or False.")


def first_line(error: BaseException) -> str:
    """What an exception says, without the pages that follow and the full stop; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(". ") if lines else type(error).__name__


def suggestion(name: str, known: Iterable[str]) -> str:
    """Names that look like this one, as the end of a message; "" if there are none."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {', '.join(close)}?" if close else ""
