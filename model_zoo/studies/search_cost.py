"""What it costs to find a pruned network: Pruning from Scratch against a training with Network Slimming's penalty.

The search of ``scratch`` is ``GATES`` epochs of gates on random weights; that of ``slimming`` is a whole training,
``TRAIN`` epochs with the penalty: the epochs of both papers. Both end with a network of the same MACs, and both are
timed from first weights to the cut network. They take turns in one run, scratch before and after, and its time is the
mean of the two, so that a machine that gets slower favours neither. Seconds are counted twice: those of the clock, and
those that the processor worked for this command, which another program on the machine does not lengthen.

Then both networks are trained to the end: slimming's is fine-tuned for ``TUNE`` epochs, scratch's has new weights and
trains for ``TRAIN + TUNE``. Images are fewer than the papers', and networks narrower but for that on CIFAR-10, which
shortens both alike. *TMACs seen* are those of the forward passes over training images, of the search and to the end of
the training after it; a backward pass takes about twice as many, of gates on fixed weights about as many.
"""

from __future__ import annotations

from pathlib import Path

from model_zoo.measuring.search_cost import GATES, IMAGES, NETWORKS, TRAIN, TUNE, images, measured
from model_zoo.pages.search_cost import page, with_epochs
from model_zoo.recipes.common import positive
from model_zoo.study import Add, Options, Study, each, rules


def _options(add: Add) -> None:
    add("--data", type=Path, metavar="DIR", help="CIFAR-10, for resnet_20_cifar10")
    add("--work", type=Path, default=Path("runs"), metavar="DIR", help="for checkpoints (default: runs)")
    add("--seed", type=int, default=0)
    add("--images", type=positive, default=IMAGES, help="to train on")
    add("--gates", type=positive, default=GATES, help="epochs of scratch's search")
    add("--train", type=positive, default=TRAIN, help="epochs of slimming's search")
    add("--tune", type=positive, default=TUNE, help="epochs of fine-tuning")


def _cases(options: Options) -> list[str]:
    return [name for name, network in NETWORKS.items() if network.dataset == "digits" or options.data is not None]


def _check(options: Options) -> str:
    try:
        if options.data is not None:
            images(NETWORKS["resnet_20_cifar10"], options)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


STUDY = Study(
    "search_cost", "how long searches take: gates on random weights, against a training with a penalty; 15 minutes",
    _cases, each(measured), page, options=_options, doc=__doc__, check=_check,
    rules=lambda results: with_epochs(rules(__doc__), results),
)  # fmt: skip
