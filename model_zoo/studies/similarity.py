"""How alike the structures are that Pruning from Scratch finds: from random weights, and from weights in training.

The paper (Wang et al., AAAI 2020, figure 2) says that structures from random weights are diverse and differ from those
of pretrained weights, which become homogeneous after about ten epochs of training.
"""

from __future__ import annotations

from model_zoo.data import glyphs
from model_zoo.measuring.similarity import SMALL, TEST_SEED, Sizes, Structure, network, pruned, training
from model_zoo.pages.similarity import page, plot
from model_zoo.records import Record, read
from model_zoo.study import Measure, Options, Study


def worker(options: Options) -> Measure:
    sizes = _sizes(options)
    images = glyphs(sizes.images, sizes.side)
    held = glyphs(max(sizes.images // 5, 1), sizes.side, seed=TEST_SEED)

    def measured(structure: Structure) -> Record:
        model = network(sizes, structure.seed)
        if structure.epoch:
            kept = options.out.with_suffix(f".{structure.seed}.pt")
            model.load_state_dict(training(sizes, structure.seed, model, images, kept)[structure.epoch])
        return pruned(sizes, str(structure), model, structure.seed, images, held)

    return measured


def _sizes(options: Options) -> Sizes:
    return SMALL if options.smoke else Sizes()


def _check(options: Options) -> str:
    if options.resume and options.out.exists():
        command = read(options.out)[0]["command"]
        if ("--smoke" in command) != options.smoke:
            return f"{options.out} was made by another command: {command}"
    return ""


def _anew(options: Options) -> None:
    for kept in options.out.parent.glob(f"{options.out.stem}.*.pt"):
        kept.unlink()


STUDY = Study(
    "similarity",
    "how alike structures from random and from trained weights are: Pruning from Scratch, figure 2; 20 minutes",
    lambda options: _sizes(options).structures(), worker, page, plot,
    lambda add: add("--smoke", action="store_true", help="the same code in seconds, on tiny sizes"), doc=__doc__,
    check=_check, anew=_anew,
)  # fmt: skip
