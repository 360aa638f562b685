"""Pruned networks quantised, on other runtimes and trained, beside dense ones: fusions, errors, milliseconds, bytes.

Every network is pruned to half of its MACs (l2, random weights). Dense network, pruned graph, and the class that
``fxprune.into`` gives back (of a plan that ``for_class=True`` makes, where another does not go in) then go the same
way, with eight random batches for calibration where that takes some. The error is the largest of the first output,
relative to the largest output of the same network in float in torch. Milliseconds: medians, dense and pruned in turn,
on one core, batch size 1. Ways that take minutes are gone without the class, unless the graph does not go. Where the
dense model's class does not go, what ``fxprune.record`` makes of it stands for it, and the page tells why; a way that
neither goes is not asked of the pruned network.

Trainers go three steps on these batches without labels, in eval mode; the error is against a loop without the library
(of adapters: merged, against not merged), milliseconds are those of the trained network in torch.

Checks: "pruned": graph and class go where the dense network goes; "ops": they run as many ops of every kind that
multiplies, is fused or is quantised; "milliseconds": at most the share of the dense network's that the MACs are, and
0.1 of it, for int8; "trained": the error is at most 1e-4, and training
changed more than that.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from fxprune.errors import InputError, check_installed
from fxprune.verification import relative_error
from model_zoo.measuring import integrations
from model_zoo.measuring.integrations import Prepared, Ran, Way, beside, first, other_ops, prepared
from model_zoo.measuring.trainers import TRAINERS
from model_zoo.networks.after import NETWORKS
from model_zoo.pages.integrations import page
from model_zoo.records import Record, raised
from model_zoo.study import Measure, Options, Study

SLACK = 0.1
SAME = 1e-4
WAYS = integrations.WAYS | TRAINERS


class Case(NamedTuple):
    """One network that goes one way."""

    network: str
    way: str

    def __str__(self) -> str:
        return f"{self.network}, {self.way}"


CASES = [Case(network, way) for network in NETWORKS for way in WAYS]


def worker(options: Options) -> Measure:
    """What measures a case; the ways of one network share its pruning."""
    if hasattr(os, "sched_setaffinity"):  # some runtimes start a thread for each core
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    return partial(measure, prepare=lru_cache(1)(prepared))


def measure(case: Case, prepare: Callable[[str], Prepared]) -> Record:
    way, record = WAYS[case.way], Record(str(case), {**case._asdict(), "int8": WAYS[case.way].int8})
    try:
        if way.modules:
            check_installed(way.extra, *way.modules)
    except InputError as error:
        record.figures["dense fails"] = str(error)
        return record
    networks, batches, record.figures["macs_ratio"] = prepare(case.network)
    ran: dict[str, Ran] = {}
    for name, network in networks.items():
        if "dense" in ran if name == "recorded" else name == "class" and _spared(way, ran, record):
            continue
        name = "dense" if name == "recorded" else name
        with tempfile.TemporaryDirectory() as folder:
            try:
                ran[name] = way.run(network, batches[1:], Path(folder))
                expected = network if way.plain is None else way.plain(network, batches[1:])
                apart = relative_error([first(ran[name].call(*batches[0]))], [first(expected(*batches[0]))])
                record.figures[name] = {"error": apart, "bytes": ran[name].size, "ops": dict(ran[name].ops)}
                if way.plain is not None:
                    moved = relative_error([first(expected(*batches[0]))], [first(network(*batches[0]))])
                    record.figures[name]["moved"] = moved
            except Exception as error:
                ran.pop(name, None)
                if name != "dense":
                    record.checks["pruned"] = f"{name}: {raised(error)}"
                elif record.figures.setdefault("dense fails", raised(error)) and network is networks["recorded"]:
                    return record
    record.checks.setdefault("pruned", "")
    record.checks["ops"] = other_ops(ran)
    if way.plain is not None:
        record.checks["trained"] = ", ".join(
            f"{name}: {f['error']:.1e}, trained by {f['moved']:.1e}"
            for name, f in ((name, record.figures[name]) for name in ran)
            if not f["error"] <= SAME < f["moved"]
        )
    times = beside({name: one.call for name, one in ran.items()}, *batches[0])
    for name, ms in times.items():
        record.figures[name]["ms"] = ms
    if way.int8 and "pruned" in times:
        share, most = times["pruned"] / times["dense"], record.figures["macs_ratio"] + SLACK
        record.checks["milliseconds"] = f"{share:.2f} of the dense network's" if share > most else ""
    return record


def _spared(way: Way, ran: Mapping[str, Ran], record: Record) -> bool:
    """Whether the class is left out."""
    return "dense fails" in record.figures or (way.slow and "pruned" in ran)


STUDY = Study(
    "integrations", "five networks, pruned, through quantisers, runtimes and trainers; an hour",
    lambda _: CASES, worker, partial(page, wanted=[*map(str, CASES)]), doc=__doc__,
    rules=__doc__.partition("\n\n")[2].strip(),
    needs=("pip install '.[integrations,zoo]': what is missing is told",),
    told=lambda r: f"{r.name}: {r.figures.get('dense fails') or r.failures or 'ok'}",
)  # fmt: skip
