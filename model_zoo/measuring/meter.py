"""Seconds and memory of this process."""

from __future__ import annotations

import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Meter:
    """Seconds on the clock and of the processor, and the most memory, of what runs inside."""

    def __enter__(self) -> Meter:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the kernel counts the peak anew
        self._before = _status("VmRSS")
        self._cpu, self._clock = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._clock, self._cpu = time.perf_counter() - self._clock, time.process_time() - self._cpu
        self._mib = (_status("VmHWM") - self._before) / 1024

    def figures(self) -> dict[str, float]:
        return {"s": self._clock, "cpu_s": self._cpu, "mib": self._mib}


def _status(field: str) -> int:
    """A line of ``/proc/self/status`` in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def spent(run: Callable[[], Result]) -> tuple[Result, float]:
    """What it returns, and the seconds of processor time that it takes."""
    begun = time.process_time()
    return run(), time.process_time() - begun


def peak_gib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def machine_gib() -> float:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def in_turn(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of what timers say, each once in every round."""
    found = [{name: timer() for name, timer in timers.items()} for _ in range(rounds)]
    return {name: round(statistics.median(times[name] for times in found), 4) for name in timers}


def milliseconds(work: Callable[[], object], seconds: float, device: str) -> float:
    """Median of one call, of at least five and for so long, after two that do not count."""
    once = timer(work, device)
    once(), once()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 5 or time.perf_counter() < end:
        found.append(once())
    return statistics.median(found)


def timer(work: Callable[[], object], device: str = "cpu") -> Callable[[], float]:
    """What calls it once and returns the milliseconds."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1000

    return once
