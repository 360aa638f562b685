"""Small nets with the channel groups that they must have, written down by hand: the specification of the label rules.

Every file holds one topic. ``@net(...)`` above a net states its groups; ``test_groups.py`` compares them with what the
analysis finds, prunes the net and checks the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

State = Literal["exact", "approximate", "locked"]


@dataclass(frozen=True)
class Expected:
    """A group: ``blocks`` times ``size`` channels that run through ``members``.

    ``members``: words ``name[dim]``; a module's name stands for all its parameters and buffers that have this dim (more
    than one long). ``reason``: part of the reason of an approximate or locked group.
    """

    size: int
    members: str
    blocks: int = 1
    state: State = "exact"
    reason: str = ""


def exact(size: int, members: str, *, blocks: int = 1) -> Expected:
    return Expected(size, members, blocks)


def approximate(size: int, members: str, reason: str, *, blocks: int = 1) -> Expected:
    return Expected(size, members, blocks, "approximate", reason)


def locked(size: int, members: str, reason: str) -> Expected:
    return Expected(size, members, 1, "locked", reason)


def image(members: str, size: int = 3) -> Expected:
    """The channels of the network's input."""
    return locked(size, members, "network input")


def result(members: str, size: int = 5) -> Expected:
    """The channels of the network's output."""
    return locked(size, members, "network output")


def rigid(size: int, members: str) -> Expected:
    """What is contracted with a dimension that cannot be cut."""
    return locked(size, members, "contracted with something that cannot be cut")


@dataclass(frozen=True)
class Case:
    """``inputs``: from the batch size. ``least``: so many channels stay along every dim when the net is pruned."""

    build: Callable[[], nn.Module]
    groups: tuple[Expected, ...]
    inputs: Callable[[int], Any]
    attention: Literal["head_dim", "uneven", "heads"] = "head_dim"
    least: int = 1
    gathers: int = 0
    frozen: bool = False
    counted: bool = True
    left_alone: str = ""


CASES: dict[str, Case] = {}


def pixels(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def words(batch: int) -> Tensor:
    return torch.randint(0, 10, (batch, 6))


def net(
    *groups: Expected,
    uneven: tuple[Expected, ...] = (),
    heads: tuple[Expected, ...] = (),
    inputs: Callable[[int], Any] = pixels,
    **options: Any,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """State the groups of a net, with ``uneven`` and ``heads`` those for ``attention="uneven"`` and ``"heads"``.

    ``frozen``: nothing can be pruned. ``gathers``: how many movements are replaced by a gather. ``counted``: whether
    torch's counter sees all MACs. ``left_alone``: why the rewriting may leave channels alone; otherwise it must not.
    """

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        name = kind.__name__
        assert name not in CASES, f"two nets {name}"
        CASES[name] = Case(kind, groups, inputs, **options)
        if uneven:
            CASES[f"{name}-uneven"] = Case(kind, uneven, inputs, "uneven", **options)
        if heads:
            CASES[f"{name}-heads"] = Case(kind, heads, inputs, "heads", **options)
        return kind

    return register


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def members_of(model: nn.Module, words_: str) -> frozenset[tuple[str, int]]:
    """``"a[0] b.weight[1]"`` as pairs of the parameter's name and dim."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    found: set[tuple[str, int]] = set()
    for word in words_.split():
        name, dim = word.removesuffix("]").split("[")
        place = int(dim)
        own = [name] if name in tensors else [n for n in tensors if n.rpartition(".")[0] == name]
        chosen = {
            (n, place) for n in own
            if (n == name or tensors[n].is_floating_point()) and tensors[n].ndim > place and tensors[n].shape[place] > 1
        }  # fmt: skip
        assert chosen, f"{word} names nothing"
        found |= chosen
    return frozenset(found)


from labels.nets import (  # noqa: E402
    attention,  # noqa: F401
    convolution,  # noqa: F401
    indexed,  # noqa: F401
    limits,  # noqa: F401
    movement,  # noqa: F401
    normalisation,  # noqa: F401
    routed,  # noqa: F401
    structure,  # noqa: F401
    usage,  # noqa: F401
)
