"""Train the scales, shifts and biases of a refitted network to give the dense network's outputs.

A refit solves for one weight at a time, so what is left of the error at the outputs has many small causes. The vectors
that scale and shift channels are few, see all of them through the loss, and hardly overfit a few hundred samples.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fxprune.reconstruction.data import Piece, on_item
from fxprune.reconstruction.entries import Entries
from fxprune.reconstruction.lanes import Lane
from fxprune.reconstruction.result import Tuning
from fxprune.reconstruction.survey import survey
from fxprune.reconstruction.walk import floating, room, square
from fxprune.recording import evaluated

_RATE = 0.003  # of Adam, at the first step
_LOOKS = 10  # at the held-out data


def tune(
    dense: fx.GraphModule,
    fitted: fx.GraphModule,
    pieces: Sequence[Piece],
    steps: int,
    *,
    memory: int | None = None,
    seed: int = 0,
) -> Tuning:
    """Train what scales and shifts channels in ``fitted``, in place, for at most ``steps`` steps; tell what was done.

    Args:
        dense: the recorded graph of the dense network; runs in eval mode.
        fitted: the pruned graph.
        pieces: calibration data; those held out choose among what was measured.
        steps: of one piece each.
        memory: bytes of dense outputs to keep at most; half of what is free if None.
        seed: of the order of the pieces.

    Raises:
        InputError: a graph does not run on the data.
    """
    start = time.perf_counter()
    working = copy.deepcopy(fitted).eval().requires_grad_(False)
    with evaluated(dense):
        aim = _Aim(dense, working, pieces, room(fitted) if memory is None else memory)
        vectors = _vectors(working, pieces[0])
        taken, before, after, kept, why = _train(aim, working, vectors, steps, seed)
        for name, value in kept.items():
            fitted.get_parameter(name).copy_(value)
    return Tuning(taken, len(vectors), before, after, time.perf_counter() - start, why)


class _Aim:
    """The dense outputs of every piece, computed once where there is room for them."""

    def __init__(self, dense: fx.GraphModule, small: nn.Module, pieces: Sequence[Piece], memory: int):
        self.fit, self._held = ([p for p in pieces if p.held == held] for held in (False, True))
        self._dense, self._kept, energies = dense, {}, {}
        self._varying: set[int] = set()  # outputs whose shapes depend on values: they have no error
        for piece in pieces:
            outputs = _outputs(dense, piece)
            energies[id(piece)] = [float(y.double().square().sum()) for y in outputs]
            pairs = enumerate(zip(_outputs(small, piece), outputs, strict=True))
            self._varying.update(number for number, (now, y) in pairs if now.shape != y.shape)
            memory -= sum(y.nbytes for y in outputs)
            if memory >= 0:
                self._kept[id(piece)] = outputs

        def energy(piece: Piece) -> float:
            return sum(e for number, e in enumerate(energies[id(piece)]) if number not in self._varying)

        self._energy, self._held_energy = (max(sum(map(energy, part)), 1e-300) for part in (self.fit, self._held))

    def loss(self, small: nn.Module, piece: Piece, values: Mapping[str, Tensor]) -> Tensor:
        """``|pruned - dense|^2`` of one piece, relative to the mean of ``|dense|^2`` over those to fit."""
        return self._square(small, piece, values) * (len(self.fit) / self._energy)

    def held_error(self, small: nn.Module, values: Mapping[str, Tensor] | None = None) -> float:
        """``|pruned - dense|^2 / |dense|^2`` on held-out data."""
        return sum(float(self._square(small, piece, values or {})) for piece in self._held) / self._held_energy

    def _wanted(self, piece: Piece) -> list[Tensor]:
        kept = self._kept.get(id(piece))
        if kept is not None:
            return kept
        with torch.no_grad():
            return _outputs(self._dense, piece)

    def _square(self, small: nn.Module, piece: Piece, values: Mapping[str, Tensor]) -> Tensor:
        pairs = zip(_outputs(small, piece, values), self._wanted(piece), strict=True)
        total = torch.zeros((), dtype=torch.double)
        for number, (now, y) in enumerate(pairs):
            if number not in self._varying:
                total = total + (square(now, y) if now.shape == y.shape else math.inf)
        return total


def _outputs(module: nn.Module, piece: Piece, values: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """``values``: instead of the module's own."""
    with on_item(piece.item):
        return floating(functional_call(module, dict(values or {}), *piece.copied()))


def _vectors(module: fx.GraphModule, piece: Piece) -> list[list[str]]:
    """The parameters ``[C]`` that scale or shift channels, each with all of its names."""
    lane, entries = Lane(module), Entries(module)
    with on_item(piece.item):
        facts, _ = survey(lane, lane.begin(piece.args, piece.kwargs))
    parameters = dict(module.named_parameters(remove_duplicate=False))

    def alone(name: str) -> bool:
        """No part of a larger tensor, which would have to change as well."""
        tensor = parameters.get(name)
        return tensor is not None and tensor.ndim == 1 and tensor.nbytes == tensor.untyped_storage().nbytes()

    return [n for n in entries.names.values() if not facts.vectors.isdisjoint(n) and all(map(alone, n))]


def _train(
    aim: _Aim, small: nn.Module, vectors: Sequence[list[str]], steps: int, seed: int
) -> tuple[int, float, float, dict[str, Tensor], str]:
    """How many steps were taken, the error on held-out data before and after, the best values, if any, and why."""
    before = best = aim.held_error(small)
    kept: dict[str, Tensor] = {}
    own = [small.get_parameter(names[0]).detach() for names in vectors]
    leaves = [p.to(torch.promote_types(p.dtype, torch.float32), copy=True).requires_grad_() for p in own]
    if not leaves:
        return 0, before, best, kept, "no parameter of one dimension scales or shifts channels"

    def values() -> dict[str, Tensor]:
        cast = [leaf.to(p.dtype) for leaf, p in zip(leaves, own, strict=True)]
        return {name: value for names, value in zip(vectors, cast, strict=True) for name in names}

    optimizer = torch.optim.Adam(leaves, _RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for taken in range(1, steps + 1):
        order = order or torch.randperm(len(aim.fit), generator=generator).tolist()
        with torch.enable_grad():
            loss = aim.loss(small, aim.fit[order.pop()], values())
        if not loss.requires_grad:
            return 0, before, best, kept, "no output has a gradient"
        if not loss.isfinite():
            return taken - 1, before, best, kept, f"the loss became {float(loss)}, which ended it"
        optimizer.zero_grad()
        loss.backward(inputs=leaves)
        optimizer.step()
        schedule.step()
        if taken % math.ceil(steps / _LOOKS) == 0 or taken == steps:
            error = aim.held_error(small, values())
            if error < best:
                best, kept = error, {name: value.detach().clone() for name, value in values().items()}
    return steps, before, best, kept, "" if kept else "nothing was better than before"
