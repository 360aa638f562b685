"""Networks of five libraries, pruned and put back in their model's place: what holds there, and what does not.

Every network is pruned to 0.6 of its MACs (l2), or to the smallest ratio that can be reached, which is recorded, and
``fxprune.into`` makes an instance of the model's class with the pruned weights ("class back"); where that fails, of a
plan that ``for_class=True`` makes ("class back, for_class"). Between that instance,
in the model's role, and the pruned graph there are then all calls of ``checks/calls.py``, where an error of
fxprune's at call time counts as an answer; for a step that takes caches a graph of its own is recorded. Then what code
around a model does (``checks/places.py``): "generate": greedy decoding gives the same tokens with the cache and
without; "save": ``save_pretrained`` and ``from_pretrained`` give the same outputs; "train step": instance and graph
have equal gradients. "fused attention": attention calls keep heads of one width. What the model itself does not do is
not asked. Every network runs in a process of its own, within limits of time and memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import fxprune
from fxprune.errors import FxpruneError
from model_zoo.checks.answers import place
from model_zoo.networks.libraries import LEFT_OUT, PRELOAD, group_option, names
from model_zoo.pages.field import page
from model_zoo.records import Record, raised
from model_zoo.study import Options, Study, each

FLOPS, METHOD = 0.6, "l2"
FOR_CLASS = "class back, for_class"


def measure(spec: str, options: Options) -> Record:
    """All checks of one network; never raises."""
    from model_zoo.checks import calls, places
    from model_zoo.networks import libraries

    record = Record(spec, {"group": spec.partition(":")[0], "not asked": {}})
    checks: dict[str, str | None] = {}
    start = time.perf_counter()
    with _reason_in(checks, "load"):
        subject = libraries.load(spec)
    if checks["load"] == "":
        with _reason_in(checks, "prune"):
            pruned, ratio = places.pruned_to(subject, FLOPS, METHOD)
            record.figures |= {"smallest": ratio} if ratio != FLOPS else {}
    if checks.get("prune") == "":
        with _reason_in(checks, "fused attention"):
            checks["fused attention"] = places.fused_attention(subject, pruned)
        with _reason_in(checks, "class back"):
            instance = fxprune.into(subject.model, pruned)
        with _reason_in(checks, FOR_CLASS):
            if checks["class back"]:
                pruned, record.figures["for class"] = places.pruned_to(subject, FLOPS, METHOD, for_class=True)
                instance = fxprune.into(subject.model, pruned)
    if checks.get(FOR_CLASS) == "":
        with _reason_in(checks, "calls"):
            cells, checks["calls"] = calls.measure(replace(subject, model=instance), pruned)
            record.figures["cells"] = {name: cell.entry for name, cell in cells.items()}
            checks |= {name: cell.fault for name, cell in cells.items() if cell.state != "model refuses"}
        for name, own in places.OWN.items():
            with _reason_in(checks, name):
                checks[name] = own(subject.model, subject.example())
            if dense := checks[name]:
                record.figures["not asked"][name], checks[name] = dense, None
                continue
            with _reason_in(checks, name):
                checks[name] = own(instance, subject.example())
        with _reason_in(checks, "train step"):
            inputs, why = places.to_train_on(subject)
            if why:
                record.figures["not asked"]["train step"], checks["train step"] = why, None
            else:
                checks["train step"] = places.train_step(instance, pruned, inputs)
    record.checks = {name: reason for name, reason in checks.items() if reason is not None}
    record.seconds["all"] = round(time.perf_counter() - start, 2)
    return record


@contextmanager
def _reason_in(checks: dict[str, str | None], name: str) -> Iterator[None]:
    """What is raised becomes the reason why this check fails."""
    checks[name] = ""
    try:
        yield
    except FxpruneError as error:  # it names the line itself
        checks[name] = raised(error)
    except Exception as error:
        checks[name] = f"{raised(error)} ({place(error)})"


STUDY = Study(
    "field", "networks of five libraries, pruned and put back in their model's place; an hour",
    lambda options: names(options.group), each(measure), page,
    options=group_option,
    needs=(LEFT_OUT,), doc=__doc__, open=True, strict=True,
    apart=True, jobs=True, timeout=600, memory=16, preload=PRELOAD,
)  # fmt: skip
