"""Random numbers: drawn from one seed, written down, and taken up again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fxprune.errors import InputError
from fxprune.training.batches import parts_of


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch, NumPy and Python from ``seed`` inside; as they were afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    several = torch.cuda.device_count()  # of which torch wants to be told, or warns
    with torch.random.fork_rng(range(several) if several > 1 else None):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy)
            random.setstate(python)


def random_state(*loaders: Any) -> dict[str, Any]:
    """Where all random numbers are, those of the loaders' own generators too; plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], *rest],
        "loaders": [[g.get_state() for g in _generators(loader)] for loader in loaders],
    }


def set_random_state(state: Mapping[str, Any], *loaders: Any) -> None:
    """Go on from ``random_state()``.

    Raises:
        InputError: the loaders have other generators than there were.
    """
    generators = [_generators(loader) for loader in loaders]
    before, here = ([len(each) for each in found] for found in (state["loaders"], generators))
    if before != here:
        raise InputError(
            f"The loaders (data=, validation=) have {_plus(here)} random generators of their own, and had "
            f"{_plus(before)} when the checkpoint was written. Make them as in the interrupted run."
        )
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    for own, saved in zip(generators, state["loaders"], strict=True):
        for generator, values in zip(own, saved, strict=True):
            generator.set_state(values.cpu())


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a loader, its samplers and its data set draw from, each once."""
    found = [getattr(part, "generator", None) for part in parts_of(loader)]
    return [*{id(g): g for g in found if isinstance(g, torch.Generator)}.values()]


def _plus(counts: list[int]) -> str:
    return " + ".join(map(str, counts))
