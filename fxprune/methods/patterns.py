"""Zeros in a pattern along what a layer reads, such as 2:4, which sparse tensor cores run."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.errors import InputError


@dataclass(frozen=True)
class Pattern:
    """Of every ``of`` consecutive weights along the dim ``dim`` of a tensor at most ``most`` are not zero.

    Examples:
        >>> from fxprune.methods.patterns import Pattern
        >>> scores = torch.tensor([[3.0, 1.0, 2.0, 1.0, 5.0, 5.0, 5.0, 5.0]])
        >>> Pattern.parse("2:4").confine(scores)
        >>> scores.tolist()
        [[3.0, -1.0, 2.0, -1.0, 5.0, 5.0, -1.0, -1.0]]
    """

    most: int
    of: int
    dim: int = 1

    @classmethod
    def parse(cls, text: object, dim: int = 1) -> Pattern:
        """Of ``"2:4"``.

        Raises:
            InputError: it is no such text, or leaves all or nothing.
        """
        found = re.fullmatch(r"([1-9][0-9]{0,3}):([1-9][0-9]{0,3})", text) if isinstance(text, str) else None
        if found is None or int(found[1]) >= int(found[2]):
            raise InputError(f"pattern={text!r} must be like '2:4': at most 2 of every 4 weights are not zero.")
        return cls(int(found[1]), int(found[2]), dim)

    def __str__(self) -> str:
        return f"{self.most}:{self.of}"

    def fits(self, tensor: Tensor) -> bool:
        """Whether the dim is there and its size a multiple."""
        return tensor.ndim > self.dim and tensor.shape[self.dim] % self.of == 0

    def room(self, tensor: Tensor) -> int:
        """How many weights are not zero at most."""
        return tensor.numel() // self.of * self.most

    def blocks(self, tensor: Tensor) -> Tensor:
        """A view ``[..., blocks, of]``."""
        last = tensor.movedim(self.dim, -1)
        return last.view(*last.shape[:-1], -1, self.of)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor that it fits has this pattern."""
        return bool((self.blocks(tensor).count_nonzero(-1) <= self.most).all())

    def confine(self, scores: Tensor) -> None:
        """Write -1 over all but the ``most`` largest of every block; of equal ones the first stay."""
        blocks = self.blocks(scores)
        before = torch.zeros_like(blocks, dtype=torch.uint8 if self.of < 2**8 else torch.int16)  # how many come first
        entries, counts = blocks.unbind(-1), before.unbind(-1)
        for later in range(self.of):
            for earlier in range(later):
                first = entries[earlier] >= entries[later]
                counts[later].add_(first)
                counts[earlier].add_(first.logical_not_())
        blocks.masked_fill_(before >= self.most, -1)
