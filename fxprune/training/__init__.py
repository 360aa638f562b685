"""Learn: methods that read data or train.

``batches`` is what a loader yields, ``statistics`` what criteria need of it. ``learner`` is a training under way,
``loop`` the built-in one, with ``checkpoint`` and ``distillation``; ``distributed`` is several processes that agree,
``randomness`` numbers from one seed, ``reset`` weights drawn anew.
"""

from fxprune.options import Loop
from fxprune.training.batches import Loss, examples, unpack
from fxprune.training.distillation import distill_loss
from fxprune.training.learner import Training, plain_state, site_of
from fxprune.training.loop import fit
from fxprune.training.randomness import seeded
from fxprune.training.reset import reset_parameters
from fxprune.training.statistics import measure

__all__ = [
    "Loop",
    "Loss",
    "Training",
    "check_loader",
    "distill_loss",
    "examples",
    "fit",
    "measure",
    "plain_state",
    "reset_parameters",
    "seeded",
    "site_of",
    "unpack",
]
