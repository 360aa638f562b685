"""Checkpoints of the built-in loop: written whole or not at all, read as plain data, and refused where they do not fit.

A checkpoint is a dict: the epochs that are done, what it was ``made by`` (method, optimizer, schedule, epochs in all),
the states of all of these, and every process's random numbers.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import FxpruneError, InputError
from fxprune.io.files import replacing
from fxprune.io.forms import Either, FormError, Map, Real, Whole, anything, check

_FORMAT = 2
_RANDOM = {
    "torch": Tensor,
    "cuda": [Tensor],
    "python": (Whole(), (*[Whole(most=2**32 - 1)] * 624, Whole(most=624)), Either(None, Real())),
    "numpy": ("MT19937", (Whole(most=2**32 - 1),) * 624, Whole(most=624), Whole(most=1), Real()),
    "loaders": [[Tensor]],
}
_FORM = {
    "fxprune_checkpoint": _FORMAT,
    "made_by": Map(Either(str, Whole())),
    "epoch": Whole(),
    "model": Map(Tensor),
    "optimizer": {"state": Map(Map(anything), keys=Whole()), "param_groups": [Map(anything)]},
    "schedule": Either(None, Map(anything)),  # what is in these, their classes know
    "scaler": Map(anything),
    "method": Map(anything),
    "random": [_RANDOM],
}


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; one that is there stays as it is until the new one is complete.

    Raises:
        InputError: ``path`` cannot be written, or the state holds something that could not be read again.
    """
    with replacing(path) as draft:
        try:
            torch.save({"fxprune_checkpoint": _FORMAT, **state}, draft)
            torch.load(draft, map_location="cpu", weights_only=True, mmap=True)
        except (TypeError, AttributeError, pickle.PickleError) as error:
            raise InputError(
                f"No checkpoint can be written to {path}: the state_dict() of the optimizer, of the schedule or of the "
                "method holds more than plain values and tensors."
            ) from error


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    Raises:
        InputError: it cannot be read, is damaged, or is something else.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"The checkpoint {path} cannot be read: {error.strerror or error}.") from error
    try:
        with file:
            state = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # of the file, of zip, of pickle: whatever a damaged file leads to
        raise InputError(f"{path} is damaged, or no checkpoint of fxprune's training loop.") from error
    if not isinstance(state, dict) or "fxprune_checkpoint" not in state:
        raise InputError(f"{path} is no checkpoint of fxprune's training loop.")
    if state["fxprune_checkpoint"] != _FORMAT:
        raise InputError(f"{path} has checkpoint format {state['fxprune_checkpoint']}; this version reads {_FORMAT}.")
    try:
        check(state, _FORM)
    except FormError as error:
        raise InputError(f"{path} is damaged, or no checkpoint of fxprune's training loop: {error}.") from error
    return state


@contextmanager
def taking_up(path: Path, what: str) -> Iterator[None]:
    """Around the ``load_state_dict`` of a class that alone knows the form of its state.

    Raises:
        InputError: it does not take the state.
    """
    try:
        yield
    except FxpruneError:
        raise
    except Exception as error:
        raise InputError(
            f"The checkpoint {path} is damaged, or was written with another {what}: its state does not fit "
            f"({type(error).__name__}: {error})."
        ) from error


def check_fits(path: Path, state: Mapping[str, Any], made_by: Mapping[str, Any], model: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another run, before anything is taken from it.

    Raises:
        InputError: it was made by something else, or of another model.
    """
    for what, here in made_by.items():
        there = state["made_by"].get(what, here)  # earlier ones do not tell all of it
        if there != here:
            raise InputError(
                f"The checkpoint {path} was written with {what} {there}, and this run has {here}. Resume with the "
                "arguments of the interrupted run."
            )
    saved = state["model"]
    for name in (*model, *saved):
        there, here = (list(values[name].shape) if name in values else None for values in (saved, model))
        if there != here:
            raise InputError(
                f"The checkpoint {path} belongs to another model: {name} is {there or 'not there'} in it, and "
                f"{here or 'not there'} in this one."
            )
