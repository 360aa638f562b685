"""Small networks of kinds that no library of vision classifiers has, each with what must be prunable in it.

``@network(inputs, ...)`` above a network registers it; ``test_beyond_vision.py`` prunes it and runs every check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Network:
    """``free``: words ``parameter[dim]`` whose channels must be prunable; ``heads``: also to prune whole heads.

    ``warm``: train-mode runs that settle the statistics first.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    free: tuple[str, ...]
    flops: float = 0.5
    heads: bool = False
    warm: int = 0


NETWORKS: dict[str, Network] = {}


def network(inputs: Callable[[], Any], free: str, **options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a network. ``inputs`` makes a tensor, a tuple of positional inputs or a dict of keyword inputs."""

    def make() -> Inputs:
        made = inputs()
        if isinstance(made, dict):
            return (), made
        return (made if isinstance(made, tuple) else (made,)), {}

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        assert kind.__name__ not in NETWORKS, f"two networks {kind.__name__}"
        NETWORKS[kind.__name__] = Network(kind, make, tuple(free.split()), **options)
        return kind

    return register


def pixels(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, channels, size, size)


def words(count: int = 50, length: int = 9) -> Tensor:
    """Tokens [2, length], the first and the last of the table among them."""
    tokens = torch.randint(0, count, (2, length))
    tokens[0, 0], tokens[0, 1] = 0, count - 1
    return tokens


from networks import dense, language, reports, sequences  # noqa: E402, F401
