"""Sparse momentum on MNIST: why the cut after it is not free, and what makes it so.

The steps, rates, momentum and decay of the recipe ``gsm_mnist``, which are those of the authors' code; batches of
``--batch`` images in place of 256 make a step cheaper, and its gradient less certain. All start from the same dense
weights, and the zeros are written to files:

- *the paper's*: every step ranks anew. Before the cut, and after it; nothing is trained in between.
- *held*: the same up to a share of the epochs; then the largest weights are active to the end (``optim.GSM.freeze``).
- *magnitude*: the largest of the dense weights, fine-tuned for as many epochs by the schedule of the dense training.
- *ticket*: the first weights with the zeros that the paper's rule and its cut left, trained as the dense network.

A passive weight shrinks by ``lr * weight_decay / (1 - momentum)`` of itself per step: with these settings it takes 59
of the 160 epochs before the first drop of the rate from 0.1 to 1e-4, and after the drops nothing shrinks to speak of.
Under the paper's rule weights take turns in the active set, so that more of them are kept alive than are active in a
step, and the rate drops upon all of these. Where the set is held for long enough before that, nothing else is left.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from model_zoo.measuring.gsm_digits import Case
from model_zoo.measuring.gsm_mnist import images_of, measured
from model_zoo.pages.gsm_mnist import page
from model_zoo.recipes.common import positive
from model_zoo.recipes.common import share as part
from model_zoo.recipes.gsm_mnist import NETWORKS, SPARSE
from model_zoo.study import Add, Measure, Options, Study, rules


def worker(options: Options) -> Measure:
    return partial(measured, images=images_of(options), options=options)


def _options(add: Add) -> None:
    add("--data", type=Path, metavar="DIR", help="MNIST")
    add("--network", choices=NETWORKS, default="lenet_300_100")
    add("--compressions", nargs="+", type=positive, default=[60])
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--freeze", nargs="*", type=part, default=[100 / 280, 160 / 280],
        help="shares of the epochs (default: 100 and 160 of 280)")  # fmt: skip
    add("--epochs", type=positive, default=SPARSE.epochs, help=f"of sparse momentum (default: {SPARSE.epochs})")
    add("--batch", type=positive, default=64, help="images in a step (default: 64)")
    add("--work", type=Path, default=Path("runs"), metavar="DIR", help="for trainings that go on (default: runs)")


def _check(options: Options) -> str:
    if options.data is None:
        return "pass --data DIR, where MNIST is"
    try:
        images_of(options)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _anew(options: Options) -> None:
    for file in options.work.glob("gsm_mnist-*/*.pt"):
        file.unlink()


def _cases(options: Options) -> list[Case]:
    return [Case(options.network, c, seed) for seed in options.seeds for c in options.compressions]


STUDY = Study(
    "gsm_mnist", "sparse momentum on MNIST, its active set held or not, and the size of what is left", _cases, worker,
    page, options=_options, needs=("--data DIR: MNIST",), doc=__doc__, rules=rules(__doc__), check=_check, anew=_anew,
    jobs=True,
)  # fmt: skip
