"""Random ops in the proof: the pruned model draws what the masked one drew, without the positions that went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fxprune.ops.meta import OpMode, tensors_in
from fxprune.recording.randomness import drawn, draws
from fxprune.verification.masks import on_all

Shapes = dict[tuple[int, ...], Tensor]
"""Shape of a tensor -> which of its positions stay."""


@dataclass(frozen=True)
class Draw:
    """A random op of the masked model, with what it was given. ``masks``: shape -> which positions stay."""

    func: Any
    args: Any
    kwargs: Any
    seed: int
    masks: Shapes

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, seed: int, masks: Shapes) -> Draw:
        """A call that is about to be made: it may write to its operands."""
        args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), (tuple(args), dict(kwargs)))
        return cls(func, args, kwargs, seed, {shape: mask for shape, mask in masks.items() if not bool(mask.all())})

    def again(self, given: Sequence[Tensor]) -> Any:
        """The same numbers, from operands of which the kept positions are those of the cut tensors ``given``."""
        left = iter(given)
        args, kwargs = tree_map_only(Tensor, lambda t: self._whole(t, next(left)), (self.args, self.kwargs))
        return drawn(self.func, args, kwargs, self.seed)

    def _whole(self, dense: Tensor, cut: Tensor) -> Tensor:
        dense = dense.clone()
        dense[self._stays(dense)] = cut.to(dense.dtype).reshape(-1)
        return dense

    def cut(self, dense: Tensor) -> Tensor:
        """The kept positions, in a row."""
        return dense[self._stays(dense)]

    def _stays(self, dense: Tensor) -> Tensor:
        mask = self.masks.get(tuple(dense.shape), torch.ones((), dtype=torch.bool))
        return on_all(mask, dense)


class Redrawing(OpMode):
    """The pruned model's random numbers: those of the masked model, without the positions that went.

    The numbers are drawn again for whole tensors, whose kept positions hold what the pruned model computed.
    """

    supports_higher_order_operators = True

    def __init__(self, noise: Sequence[Draw]):
        super().__init__()
        self._noise = list(noise)
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not draws(func, args, kwargs):
            return func(*args, **kwargs)
        place, self._count = self._count, self._count + 1
        if place >= len(self._noise) or self._noise[place].func is not func:  # the comparison will tell
            return drawn(func, args, kwargs, place)
        draw = self._noise[place]
        given = [t.detach().clone() for t in tensors_in((*args, *kwargs.values()))]
        result = drawn(func, args, kwargs, draw.seed)
        try:
            whole = draw.again(given)
            pairs = [*zip(tensors_in((result,)), map(draw.cut, tensors_in((whole,))), strict=True)]
            pairs = [(own, cut.reshape(own.shape)) for own, cut in pairs]
        except (RuntimeError, IndexError, StopIteration):  # other sizes than the labels promise: likewise
            return result
        for own, cut in pairs:
            own.copy_(cut)
        return result
