"""Methods that learn: what goes into the graph, around the steps, and the loop that runs them."""

from fxprune.training.batches import Loss, examples, unpack
from fxprune.training.learner import Training, site_of
from fxprune.training.loop import Loop, fit
from fxprune.training.reset import reset_parameters, seeded
from fxprune.training.statistics import measure

__all__ = ["Loop", "Loss", "Training", "examples", "fit", "measure", "reset_parameters", "seeded", "site_of", "unpack"]
