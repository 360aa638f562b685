"""Pruning methods: a registry, and one file per method; a file that is added registers its own.

Examples:
    >>> assert "l2" in fxprune.methods.available()
    >>> mean = fxprune.methods.L2(aggregate="mean")
    >>> small = fxprune.prune(model, example_inputs, method=mean, flops=0.5, progress=False)
"""

from importlib import import_module
from pkgutil import iter_modules

from fxprune.methods.activation import Activation
from fxprune.methods.bn_scale import BNScale
from fxprune.methods.dhp import DHP
from fxprune.methods.fisher import Fisher
from fxprune.methods.fpgm import FPGM
from fxprune.methods.gsm import GSM
from fxprune.methods.lamp import LAMP
from fxprune.methods.learner import Gates, Hooks, Latents, Outcome, Site
from fxprune.methods.magnitude import L1, L2
from fxprune.methods.obs import OBS
from fxprune.methods.registry import (
    Criterion,
    Learner,
    Method,
    available,
    name_of,
    needs_of,
    register,
    resolve,
    score_groups,
)
from fxprune.methods.scratch import Scratch
from fxprune.methods.slimming import Slimming
from fxprune.methods.state import ModelState
from fxprune.methods.taylor import Taylor
from fxprune.methods.uniform_random import Random
from fxprune.methods.wanda import Wanda

__all__ = [
    "DHP",
    "FPGM",
    "GSM",
    "L1",
    "L2",
    "LAMP",
    "OBS",
    "Activation",
    "BNScale",
    "Criterion",
    "Fisher",
    "Gates",
    "Hooks",
    "Latents",
    "Learner",
    "Method",
    "ModelState",
    "Outcome",
    "Random",
    "Scratch",
    "Site",
    "Slimming",
    "Taylor",
    "Wanda",
    "available",
    "name_of",
    "needs_of",
    "register",
    "resolve",
    "score_groups",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
