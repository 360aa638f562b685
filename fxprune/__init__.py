"""Structured pruning of any PyTorch model: a compiler pass over ``torch.fx``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxprune import _moved
from fxprune.version import __version__

if TYPE_CHECKING:
    from fxprune import methods, ops
    from fxprune.api import analyze, apply, attach, prune, prune_submodule, record, select_inputs
    from fxprune.deploy import Validation, bench, converting, export, semi_structured, validate
    from fxprune.errors import FxpruneError
    from fxprune.groups.channels import ChannelGraph, ChannelGroup
    from fxprune.io.artifact import load, save
    from fxprune.io.hub import load_pretrained, save_pretrained
    from fxprune.methods import optim
    from fxprune.options import LatencyBudget, Loop, Options
    from fxprune.reconstruction.front import reconstruct
    from fxprune.recording.together import one_call
    from fxprune.reports import study
    from fxprune.reports.report import Latency, Report
    from fxprune.rewriting.carry_over import carry_over
    from fxprune.rewriting.into import into
    from fxprune.selection.plan import PruningPlan
    from fxprune.training import distill_loss

_moved.install()

_HOMES = {
    "ChannelGraph": "groups.channels",
    "ChannelGroup": "groups.channels",
    "FxpruneError": "errors",
    "Latency": "reports.report",
    "LatencyBudget": "options",
    "Loop": "options",
    "Options": "options",
    "PruningPlan": "selection.plan",
    "Report": "reports.report",
    "Validation": "deploy",
    "analyze": "api",
    "apply": "api",
    "attach": "api",
    "bench": "deploy",
    "carry_over": "rewriting.carry_over",
    "converting": "deploy",
    "distill_loss": "training",
    "export": "deploy",
    "into": "rewriting.into",
    "load": "io.artifact",
    "load_pretrained": "io.hub",
    "one_call": "recording.together",
    "prune": "api",
    "prune_submodule": "api",
    "record": "api",
    "reconstruct": "reconstruction.front",
    "save": "io.artifact",
    "save_pretrained": "io.hub",
    "select_inputs": "api",
    "semi_structured": "deploy",
    "validate": "deploy",
}
__all__ = [
    "ChannelGraph",
    "ChannelGroup",
    "FxpruneError",
    "Latency",
    "LatencyBudget",
    "Loop",
    "Options",
    "PruningPlan",
    "Report",
    "Validation",
    "__version__",
    "analyze",
    "apply",
    "attach",
    "bench",
    "carry_over",
    "converting",
    "distill_loss",
    "export",
    "into",
    "load",
    "load_pretrained",
    "methods",
    "one_call",
    "ops",
    "optim",
    "prune",
    "prune_submodule",
    "reconstruct",
    "record",
    "save",
    "save_pretrained",
    "select_inputs",
    "semi_structured",
    "study",
    "validate",
]


def __getattr__(name: str) -> Any:
    """The public names, imported at first use: the command line answers before torch is loaded."""
    if name in ("methods", "ops") or name in _moved.PUBLIC or name in _moved.MOVED:
        return import_module(f"fxprune.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fxprune' has no attribute {name!r}")
    return getattr(import_module(f"fxprune.{_HOMES[name]}"), name)
