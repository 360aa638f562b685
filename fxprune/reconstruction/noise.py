"""Without data: noise in place of inputs, and norms with the statistics that they have on it.

A network was not trained on noise, but its norms with measured statistics say what came to them: mean and variance of
every channel. Where these are measured anew on the noise, what a norm gives has the moments that it has on real data,
and so has what the next layer reads, to which its weight is refitted. Then the statistics that were measured on real
data come back, with what the refit moved their means by.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.errors import GuardError, InputError
from fxprune.ops.meta import OpMode, tensors_in
from fxprune.ops.refit import Statistics
from fxprune.reconstruction.data import HELD_OUT, PIECE, Piece, held_out, on_item
from fxprune.reconstruction.entries import Entries
from fxprune.reconstruction.result import Reconstruction
from fxprune.reconstruction.survey import arguments_of, by_channel, once, refit_of
from fxprune.recording import evaluated, named_tensors
from fxprune.recording.inputs import RECORD_KEY, batch_size, fixed_batch, make_inputs, map_tensors, specs_of
from fxprune.recording.spec import TensorSpec
from fxprune.rewriting.slicing import Cuts, cut

SAMPLES = 256
"""So many, if nobody says."""


def noise_for(module: fx.GraphModule, samples: int | None, seed: int, device: torch.device) -> list[Piece]:
    """Random inputs like those that a graph was recorded with, a fifth of them held out.

    Integers and masks are near the example's (``make_inputs``). Floats are normal, of mean 0 and variance 1: white, or
    of four dims and more with a spectrum that falls with the frequency along those from the third on, as that of images
    does (Field 1987).
    """
    record, samples = module.meta[RECORD_KEY], SAMPLES if samples is None else samples
    specs = specs_of(record)
    fixed = fixed_batch(module, record) is not None
    size = (batch_size(record) if fixed else None) or max(1, min(PIECE, samples // HELD_OUT))
    count = max(2, math.ceil(samples / size))
    pieces = []
    for index in range(count):
        inputs = make_inputs(record, device, None if fixed else size, seed * 1_000_003 + index)
        args, kwargs = map_tensors(partial(_shaped, iter(specs)), inputs)
        pieces.append(Piece(args, kwargs, size, index))
    return held_out(pieces)


def _shaped(specs: Iterator[TensorSpec], x: Tensor) -> Tensor:
    """White noise with the spectrum of images, if it is noise and can be one. ``specs``: the next is its own."""
    if next(specs).values is not None or not x.is_floating_point() or x.ndim < 4 or not x.numel():
        return x
    dims, square = list(range(2, x.ndim)), torch.zeros((), device=x.device)
    for dim in dims:
        frequency = torch.fft.fftfreq(x.shape[dim], device=x.device)
        square = square + frequency.square().reshape([-1 if d == dim else 1 for d in dims])
    amplitude = square.sqrt().clamp_min(1 / max(x.shape[2:])).reciprocal()
    made: Tensor = torch.fft.ifftn(torch.fft.fftn(x.float(), dim=dims) * amplitude, dim=dims).real
    return (made / made.square().mean().sqrt()).to(x.dtype)


Fit = Callable[[fx.GraphModule, fx.GraphModule, Sequence[Piece], Cuts], tuple[fx.GraphModule, Reconstruction]]
"""``refit`` with its options: (dense, pruned, pieces, cuts) -> what it returns."""


def refit_on_noise(
    fit: Fit, dense: fx.GraphModule, pruned: fx.GraphModule, pieces: Sequence[Piece], cuts: Cuts
) -> tuple[fx.GraphModule, Reconstruction]:
    """``fit`` where ``pieces`` are noise; the errors that it tells of are those on the noise.

    Raises:
        InputError: a graph does not run on it, or has no norm with measured statistics.
    """
    begun = time.perf_counter()
    away = copy.deepcopy(dense)
    measured = _measure_anew(away, pieces)
    if not measured:
        raise InputError("no batch norm of this model says what real data are like.")
    start = copy.deepcopy(pruned)
    real, now, own, there = (named_tensors(module) for module in (dense, away, pruned, start))
    labels = cuts.labels
    with torch.no_grad():
        for name, is_mean in measured.items():
            before, after = (cut(t[name], labels.get(name, ()), cuts.keep).double() for t in (real, now))
            value = own[name].double()
            changed = value - before if is_mean else torch.where(before == 0, torch.ones_like(value), value / before)
            there[name].copy_(after + changed if is_mean else after * changed)
    fitted, told = fit(away, start, pieces, cuts)
    result = named_tensors(fitted)
    with torch.no_grad():
        for name, is_mean in measured.items():
            moved = result[name].double() - there[name].double() if is_mean else 0.0
            result[name].copy_(own[name].double() + moved)
    return fitted, replace(told, of_noise=True, seconds=time.perf_counter() - begun)


@contextmanager
def noise_is_taken() -> Iterator[None]:
    """Whoever passed no data is told what was run inside.

    Raises:
        InputError: noise does not do for the network.
    """
    try:
        yield
    except (GuardError, InputError) as error:
        raise InputError(
            f"Without data= the inputs are noise, which does not do here, so pass data: {error}"
        ) from error


def _measure_anew(module: fx.GraphModule, pieces: Sequence[Piece]) -> dict[str, bool]:
    """Give the norms of a graph the statistics that they have on these inputs. Returns name -> is it a mean?"""
    mode = _Measuring(Entries(module))
    with evaluated(module), mode:
        for piece in pieces:
            args, kwargs = piece.copied()
            mode.samples = piece.samples
            with on_item(piece.item):
                module(*args, **kwargs)
    return mode.write()


@dataclass
class _Moments:
    """Of one norm: which entries its mean and variance are, both ``[C]``, and sums over samples: of x and x^2."""

    entries: tuple[Tensor, Tensor]
    sums: list[Any]
    samples: int = 0

    @property
    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and variance."""
        mean, square = (total / self.samples for total in self.sums)
        return mean, (square - mean**2).clamp_min(0)


class _Measuring(OpMode):
    """Norms with measured statistics take those of what they are given, which are summed up."""

    def __init__(self, entries: Entries) -> None:
        super().__init__()
        self._entries = entries
        self._found: dict[bytes, _Moments] = {}
        self.samples = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = refit_of(func)
        if not isinstance(known, Statistics):
            out = func(*args, **kwargs)
            self._entries.follow(func, args, kwargs, tensors_in((out,)))
            return out
        arguments = arguments_of(func, args, kwargs)
        entries = self._own(known, arguments)
        if entries is None:
            return func(*args, **kwargs)
        x = by_channel(arguments[known.input], len(entries[0]))
        dims = [dim for dim in range(x.ndim) if dim != 1]
        moments = x.double().mean(dims), x.double().square().mean(dims)
        found = self._found.setdefault(entries[0].numpy().tobytes(), _Moments(entries, [0.0, 0.0]))
        found.samples += self.samples
        found.sums = [total + self.samples * value for total, value in zip(found.sums, moments, strict=True)]
        moments = found.result  # of all so far: of a batch of one and a single position there is no variance
        like = arguments[known.mean]
        mean, var = (moment.to(like).repeat(len(like) // len(moment)) for moment in moments)
        return func(**{**arguments, known.mean: mean, known.var: var})

    def _own(self, known: Statistics, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """The entries of a norm's statistics, None where they are not the module's, or those of its input anyway."""
        mean, var = arguments.get(known.mean), arguments.get(known.var)
        if mean is None or var is None or arguments.get(known.training):
            return None
        if mean.untyped_storage().data_ptr() == var.untyped_storage().data_ptr():
            return None  # a tensor is told apart as one of the two
        entries = self._entries.of(mean), self._entries.of(var)
        return None if entries[0] is None or entries[1] is None else (once(entries[0]), once(entries[1]))

    def write(self) -> dict[str, bool]:
        names: dict[str, bool] = {}
        for found in self._found.values():
            for entries, value, is_mean in zip(found.entries, found.result, (True, False), strict=True):
                self._entries.write(entries, value)
                names.update(dict.fromkeys(self._entries.names_of(entries), is_mean))
        return names
