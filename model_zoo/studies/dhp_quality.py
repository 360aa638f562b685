"""DHP beside slimming, scratch and l2 at equal MACs and epochs: accuracy of classifiers, PSNR of restoration networks.

The rules, the same for all:

- Every network trains for as many epochs in all: those of its *training* and of its *tuning*. Below its heading is how
  many. Split, noise, first weights and the order of batches are those of the seed.
- ``l2`` cuts the dense network after the training; the tuning follows. The dense network is tuned, too.
- ``slimming`` trains with its penalty in place of the training; the tuning is the same.
- ``dhp`` starts from random latents and hypernetworks. Its search has the optimizer and the schedule of the training at
  a tenth of the rate, and ends when the budget is met or its epochs are over; what is left trains on, from the weights
  that the search found and with the rates of the training, for all epochs that were not meant for the search. The
  strength is computed: a whole search shrinks every latent (by strength times rate, summed over all steps) by
  ``MARGIN`` times what a share of ``1 - sqrt(ratio)`` of them is below at first. The published strengths are for many
  times as many steps. Rate and margin were chosen in trials of another seed: there hypernetworks diverge with the whole
  rate, and with a third of it the loss on training images hardly falls. The accuracy of these trials was seen, too.
- ``scratch`` finds widths with gates on random weights, in epochs of its own. It, and the same share of every layer's
  channels, train with new weights for all epochs.
- Rates are those that suit the dense network, and the same for all methods. Those of ResNet-20, and noise and epochs on
  digits, are those of the study ``accuracy``, chosen there by test images of seed 0; the others were not tried out.
  What counts is the network after its last epoch.
- The budget is the largest number of MACs at or under the ratio, counted by ``fxprune.analyze`` for all.
- Networks and data are small, so that all of it is affordable on one core. The paper's figures are for larger networks
  and for ten times as many epochs; nothing here confirms or contradicts them.
"""

from __future__ import annotations

from model_zoo.comparison import Comparison
from model_zoo.measuring.dhp_quality import MARGIN, METHODS, NETWORKS, RATIOS
from model_zoo.pages.dhp_quality import against
from model_zoo.study import rules

SEEDS = 3
BASELINES = ("dense", "uniform, new weights")
RULES = rules(__doc__, after="The rules, the same for all:").replace("``MARGIN``", str(MARGIN))
COMPARISON = Comparison("dhp_quality", RULES, NETWORKS, METHODS, RATIOS, SEEDS, BASELINES, against)
STUDY = COMPARISON.study("DHP beside slimming, scratch and l2, classifiers and restoration networks; an hour", __doc__)
