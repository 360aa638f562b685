"""What is checked of a pruned network, and how one is measured.

A check is a small function that gets the ``Case`` and returns the reason why it fails, or "". Weights are random from a
seed; so are norm statistics, affine terms and whatever a library initialises to a constant, since a fresh network hides
mistakes. Of other calls than the example's: ``calls``; of a network in its model's place: ``places``.
"""

from model_zoo.checks import counts, outputs, state, training, use  # checks run in the order of these imports
from model_zoo.checks.case import CHECKS, Case
from model_zoo.checks.measured import measure, measure_on_meta

__all__ = ["CHECKS", "Case", "counts", "measure", "measure_on_meta", "outputs", "state", "training", "use"]
