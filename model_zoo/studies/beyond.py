"""Networks of whole libraries, called as the example inputs did not: with nothing cut, results must be the model's.

A network is pruned with nothing cut and then called a second time, with another batch, size and values, with padded
masks, and in a step that takes caches (``checks/calls.py``). Every answer is free (the model's result), guarded (an
error of fxprune's at call time), wrong, or raw (an exception of another kind); where the model itself refuses, nothing
is asked. Every network runs in a process of its own, within limits of time and memory.
"""

from __future__ import annotations

import time

from model_zoo.checks.answers import place
from model_zoo.networks.libraries import LEFT_OUT, PRELOAD, group_option, names
from model_zoo.pages.beyond import page
from model_zoo.records import Record, raised
from model_zoo.study import Options, Study, each


def measure(spec: str, options: Options) -> Record:
    """All calls of one network; never raises."""
    from model_zoo.checks import calls
    from model_zoo.networks import libraries

    record = Record(spec, {"group": spec.partition(":")[0]}, checks={"load": ""})
    stage, start = "load", time.perf_counter()
    try:
        subject = libraries.load(spec)
        stage = "prune"
        record.seconds["load"] = round(time.perf_counter() - start, 2)
        cells, record.checks["prune"] = calls.measure(subject)
        record.figures["cells"] = {name: cell.entry for name, cell in cells.items()}
        record.checks |= {name: cell.fault for name, cell in cells.items()}
    except Exception as error:
        record.checks[stage] = f"{raised(error)} ({place(error)})"
    record.seconds["all"] = round(time.perf_counter() - start, 2)
    return record


def _told(record: Record) -> str:
    cells = record.figures.get("cells", {})
    states = ", ".join(f"{name} {cell['state']}" for name, cell in cells.items())
    stopped = "; ".join(f"{name}: {why}" for name, why in record.failures.items() if name not in cells)
    return f"{record.name}: {record.seconds.get('all', 0):.0f} s, {states or stopped}"


STUDY = Study(
    "beyond",
    "networks of five libraries, called as the example did not show; half an hour",
    lambda options: names(options.group),
    each(measure),
    page,
    options=group_option,
    needs=(LEFT_OUT,),
    doc=__doc__,
    told=_told,
    open=True,
    strict=True,
    apart=True,
    jobs=True,
    timeout=600,
    memory=16,
    preload=PRELOAD,
)
