"""Modules under the names they had before, for one release: they load, and say where they are now.

Also what was pickled by such a name loads. ``fxprune.optim`` and ``fxprune.study`` are public names and say nothing.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PUBLIC = {"optim": "methods.optim", "study": "reports.study"}
MOVED = {
    "analysis": "groups",
    "artifact": "io.artifact",
    "budget": "selection.budget",
    "channels": "groups.channels",
    "checks": "recording.checks",
    "cost": "groups.cost",
    "files": "io.files",
    "forms": "io.forms",
    "inputs": "recording.inputs",
    "latency": "deploy.latency",
    "meta": "ops.meta",
    "near": "recording.near",
    "op_table": "ops.table",
    "original": "rewriting.into",
    "page": "reports.page",
    "plan": "selection.plan",
    "plots": "reports.plots",
    "probes": "verification.probes",
    "proof": "verification.proof",
    "randomness": "recording.randomness",
    "report": "reports.report",
    "rows": "reports.rows",
    "specs": "io.specs",
    "structure": "recording.structure",
    "text": "io.text",
    "training.flow": "groups.flow",
    "training.gates": "rewriting.gates",
    "training.hypernetworks": "rewriting.hypernetworks",
    "training.optimizer": "rewriting.carry_over",
    "verify": "verification",
}
MOVED.update({f"analysis.{name}": f"groups.{name}" for name in ("analyse", "freeze", "order", "shadow", "workload")})


class _Finder(MetaPathFinder, Loader):
    """Finds a module's old name, and puts the module itself in ``sys.modules`` under it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        known = package == "fxprune" and (name in MOVED or name in PUBLIC)
        return ModuleSpec(fullname, self) if known else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.partition(".")[2]
        home = f"fxprune.{PUBLIC.get(name) or MOVED[name]}"
        if name in MOVED:
            warnings.warn(f"fxprune.{name} is now {home}.", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = import_module(home)


def install() -> None:
    """Let ``import`` find the old names. Before other finders: a package's old name has the files of its new one."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
