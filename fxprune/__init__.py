"""Structured pruning of any PyTorch model: a compiler pass over ``torch.fx``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxprune.version import __version__

if TYPE_CHECKING:
    from fxprune import methods, ops, optim, study
    from fxprune.api import analyze, apply, attach, prune, prune_submodule, record
    from fxprune.artifact import load, save
    from fxprune.channels import ChannelGraph, ChannelGroup
    from fxprune.deploy import Validation, bench, export, validate
    from fxprune.errors import FxpruneError
    from fxprune.options import LatencyBudget, Loop, Options
    from fxprune.original import into
    from fxprune.plan import PruningPlan
    from fxprune.report import Latency, Report
    from fxprune.training import carry_over, distill_loss

_HOMES = {
    "ChannelGraph": "channels",
    "ChannelGroup": "channels",
    "FxpruneError": "errors",
    "Latency": "report",
    "LatencyBudget": "options",
    "Loop": "options",
    "Options": "options",
    "PruningPlan": "plan",
    "Report": "report",
    "Validation": "deploy",
    "analyze": "api",
    "apply": "api",
    "attach": "api",
    "bench": "deploy",
    "carry_over": "training",
    "distill_loss": "training",
    "export": "deploy",
    "into": "original",
    "load": "artifact",
    "prune": "api",
    "prune_submodule": "api",
    "record": "api",
    "save": "artifact",
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
    "distill_loss",
    "export",
    "into",
    "load",
    "methods",
    "ops",
    "optim",
    "prune",
    "prune_submodule",
    "record",
    "save",
    "study",
    "validate",
]


def __getattr__(name: str) -> Any:
    """The public names, imported at first use: the command line answers before torch is loaded."""
    if name in ("methods", "ops", "optim", "study"):
        return import_module(f"fxprune.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fxprune' has no attribute {name!r}")
    return getattr(import_module(f"fxprune.{_HOMES[name]}"), name)
