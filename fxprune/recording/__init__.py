"""Record: a model, run once and written down as a ``torch.fx`` graph.

The files in reading order: ``record`` (the entry point), ``options`` (how to record), ``recorder`` (the hooks that see
the run), ``modes`` (those of torch, and when they look away), ``special`` (functions that become no node of their own),
``decisions`` (what Python code takes out of the graph), ``rehearsal`` (the run without data), ``writer`` (the graph in
the making), ``tensors`` (which node computed which), ``calls`` (how one call is written as a node), ``traced`` (numbers
that remember their node), ``constants`` (floats of the model's code, which leave sizes theirs), ``arrays`` (what NumPy
makes of such numbers), ``guards`` (what a graph cannot follow), ``leaves`` (which modules stay whole),
``leaf_functions`` (which functions), ``layers`` (which become whole again), ``either`` (numbers that follow train and
eval), ``dtypes`` (those that follow the floats' width), ``placing`` and ``boundary`` (inputs and outputs), ``parts``
(modules and tensors by name), ``copies`` and ``twin`` (the caller's model itself never runs), ``state`` and ``patches``
(memory, random numbers and torch, left as they were), ``liveness`` (dead code), ``upstream`` (what nodes come from),
``module`` (the result), ``sources`` (the user's line behind every node), ``trees`` (nested arguments).

Before it: ``structure`` (the one walk over what networks take and return), ``spec`` and ``records`` (example inputs as
plain data), ``inputs`` (checked or inferred), ``near`` (values near an example's), ``checks`` (models and inputs that
cannot serve), ``part`` (one part of a model, and what it is given), ``randomness`` (random ops that draw the same
numbers in every run), ``forms`` (what a recording takes for granted in its inputs), ``together`` (several calls of a
model as one), ``code`` (Python code of a graph in which names are only names), ``pickling`` (a graph as plain data),
``shards`` (models of which every process holds a share).
"""

from fxprune.recording.module import (
    RecordedModule,
    clone_modules,
    clone_structure,
    evaluated,
    named_modules,
    named_tensors,
    put_in_eval_mode,
    replace_tensors,
)
from fxprune.recording.options import Options
from fxprune.recording.patches import without_fast_path
from fxprune.recording.record import record, recorded
from fxprune.recording.sources import raised_at
from fxprune.recording.state import cached_tensor_dicts
from fxprune.recording.twin import Twin

__all__ = [
    "Options",
    "RecordedModule",
    "Twin",
    "cached_tensor_dicts",
    "clone_modules",
    "clone_structure",
    "evaluated",
    "named_modules",
    "named_tensors",
    "put_in_eval_mode",
    "raised_at",
    "record",
    "recorded",
    "replace_tensors",
    "without_fast_path",
]
