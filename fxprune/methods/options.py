"""Options that criteria share."""

from __future__ import annotations

from dataclasses import dataclass

from fxprune.errors import InputError
from fxprune.methods.registry import Normalize
from fxprune.methods.state import Aggregate


@dataclass(frozen=True)
class Aggregated:
    """``aggregate``: how the places of a channel are put together. ``normalize``: what a group's scores are divided by.

    Raises:
        InputError: an unknown word.
    """

    aggregate: Aggregate = "sum"
    normalize: Normalize = "mean"

    def __post_init__(self) -> None:
        known = {"aggregate": ("sum", "mean", "max"), "normalize": ("mean", "max", "sum", "none")}
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown. Known: {', '.join(words)}.")
