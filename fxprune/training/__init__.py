"""Methods that learn: what goes into the graph, around the steps, and the loop that runs them."""

from fxprune.options import Loop
from fxprune.training.batches import Loss, examples, unpack
from fxprune.training.distillation import distill_loss
from fxprune.training.learner import Training, plain_state, site_of
from fxprune.training.loop import fit
from fxprune.training.optimizer import carry_over
from fxprune.training.randomness import seeded
from fxprune.training.reset import reset_parameters
from fxprune.training.statistics import measure

__all__ = [
    "Loop",
    "Loss",
    "Training",
    "carry_over",
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
