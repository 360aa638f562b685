"""What was measured on this device, kept on disk: seconds of measuring are paid once per device and version."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fxprune.deploy import runtime
from fxprune.deploy.engines import engine
from fxprune.errors import InputError, WriteError
from fxprune.io.files import replacing
from fxprune.io.forms import FormError, Map, Real, Such, anything, check, json_of

_FORMAT = 1  # of the files, and of what is measured: another number, and everything is measured again
_FORM = {"facts": Map(anything), "values": Map(Such(Real(), lambda ms: ms >= 0, "a time"))}


class Store:
    """Numbers by name, of one engine on one device with so many threads and one version of its library.

    The file lies in ``$FXPRUNE_CACHE``, else in ``fxprune`` under ``$XDG_CACHE_HOME`` or ``~/.cache``. It may be
    deleted at any time; where it cannot be written, a warning says that everything is measured anew in every process.
    """

    def __init__(self, provider: str, threads: int):
        library, _, version = engine(provider).version().partition(" ")
        versions = {library: version, "format": _FORMAT}
        self.facts = {**device(provider), "provider": provider, "threads": threads, **versions}
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder() / f"{provider.replace(':', '-')}-{digest}.json"
        self._values: dict[str, float] = self._read()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that were not measured yet, each once."""
        return [name for name in dict.fromkeys(names) if name not in self._values]

    def add(self, values: Mapping[str, float]) -> None:
        """Keep ``values``, beside what other processes have written meanwhile."""
        if not values:
            return
        self._values = {**self._read(), **self._values, **values}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as draft:
                draft.write_text(json.dumps({"facts": self.facts, "values": self._values}, indent=1))
        except (OSError, InputError, WriteError) as error:
            warnings.warn(f"Measurements cannot be kept in {self.path}: {error}; they are made anew.", stacklevel=2)

    def _read(self) -> dict[str, float]:
        """What the file holds; a damaged one holds nothing, and is written anew."""
        try:
            content = json_of(self.path.read_bytes())
            check(content, _FORM)
        except (OSError, FormError):
            return {}
        return {name: float(value) for name, value in content["values"].items()}


@functools.lru_cache
def store(provider: str, threads: int) -> Store:
    """The store of an engine and a number of threads (0: all), read once per process."""
    return Store(provider, threads)


def folder() -> Path:
    """Where measurements are kept."""
    own = os.environ.get("FXPRUNE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune"


def on_card(provider: str) -> bool:
    """Whether this engine runs on a GPU."""
    return provider == runtime.CUDA or provider.endswith(":cuda")


def device(provider: str) -> dict[str, Any]:
    """What decides how fast an engine runs here: the card, or the processor and how much of it we may use."""
    if on_card(provider):
        import torch

        return {"device": torch.cuda.get_device_name(), "cores": 0}
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return {"device": _processor(), "cores": cores}


def _processor() -> str:
    """Model name and instruction sets; virtual machines name their model vaguely."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {key.strip(): value.strip() for key, value in found.items()}
    wide = sorted(flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx", "fma")))
    name = facts.get("model name") or facts.get("CPU part") or platform.machine()
    return " ".join([name, *wide])
