"""A small vision transformer trained on CIFAR-10, dense, for studies that begin with a trained one.

No paper's schedule: as many epochs as a processor makes in about an hour, and random crops and flips alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxprune.io.files import replacing
from model_zoo.papers.vit import vit_32
from model_zoo.recipes.common import SMOKE_SIDES, AdamW, parser, positive, start, writable

TRAIN = AdamW(epochs=15, batch=128, lr=1e-3, weight_decay=0.05)


def main(argv: Sequence[str] | None = None) -> None:
    known = parser(__doc__)
    known.set_defaults(dataset="cifar10", network="vit_32")
    known.add_argument("--epochs", type=positive, default=TRAIN.epochs)
    known.add_argument("--save", type=writable, metavar="FILE", help="for the state_dict, besides the run's folder")
    options = known.parse_args(argv)
    file = vars(options).pop("save")
    run = start("vit_cifar", known, options)
    shape = run.pick({}, {"size": SMOKE_SIDES["cifar10"], "depth": 1, "width": 32})
    model = run.network(vit_32, **shape)
    settings = run.shortened(AdamW(options.epochs, TRAIN.batch, TRAIN.lr, TRAIN.weight_decay))
    trained = model if run.takes_weights(model) else run.train("dense", model, settings)
    for path in (run.file("dense.pt"), *([file] if file else [])):
        with replacing(path) as draft:
            torch.save({name: value.cpu() for name, value in trained.state_dict().items()}, draft)
    figures = run.figures(trained)
    run.result(figures, figures)


if __name__ == "__main__":
    main()
