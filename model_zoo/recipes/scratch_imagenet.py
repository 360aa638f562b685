"""Pruning from Scratch on ImageNet (Wang et al., AAAI 2020): ResNet-50, MobileNetV1, MobileNetV2.

Settings are those of the released code; it leaves the batch of the second training open, and the rate follows the
batch. Images are cropped and coloured as there. Accuracy is that after the last epoch, where the code keeps the best.
Unlike there, the residual stream is as wide as the rest of the expanded network, and the images of the gates' one pass
are drawn anew for every evaluation, so that an interrupted search can go on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms import v2

from fxprune.methods import Scratch
from model_zoo.data import IMAGENET_STATISTICS
from model_zoo.papers import mobilenet_v1, mobilenet_v2, resnet_50
from model_zoo.recipes.common import (
    Images,
    Run,
    Sgd,
    parser,
    positive,
    share,
    split,
    start,
    transformed,
    vector_or_depthwise,
)
from model_zoo.recipes.scratch import Network, Search, scratch

SINGLE = ("features.1.body.1", "features.17.body.2")  # MobileNetV2: block outputs that nothing is added to
NETWORKS = {
    "resnet_50": Network(resnet_50, 1.0, True, ("stem.0",), {"width": 0.125}),
    "mobilenet_v1": Network(mobilenet_v1, 1.0, False, (), {"width": 0.25}),
    "mobilenet_v2": Network(mobilenet_v2, 1.0, True, SINGLE, {"width": 0.25}),
}
GATES = Scratch(strength=0.05, sparsity=0.5, lr=0.01)
GATE_BATCH, EVALUATE_EVERY = 100, 500  # in one pass over the training images
VALIDATION = 50  # the last training images of every class
BATCH = 256
RATE = 0.05 / 256  # per image of a batch
STEPS = Sgd(
    150, BATCH, RATE * BATCH, nesterov=True, weight_decay=4e-5, drops=(0.3, 0.6, 0.9), spared=vector_or_depthwise
)
COSINE = replace(STEPS, drops=None)
TRAIN = {"resnet_50": STEPS, "mobilenet_v1": COSINE, "mobilenet_v2": COSINE}
LONGER = {"resnet_50": 200, "mobilenet_v1": 300, "mobilenet_v2": 300}  # epochs of the pruned networks
SMALLEST_CROP = {"resnet_50": 0.08, "mobilenet_v1": 0.25, "mobilenet_v2": 0.25}  # as a share of the image
GATE_CROP = 0.25
JITTER, LIGHTING = 0.4, 0.1


def main(argv: Sequence[str] | None = None) -> None:
    options = (known := arguments()).parse_args(argv)
    run = start("scratch_imagenet", known, options)
    name = options.network
    found = gates(run)
    settings = replace(TRAIN[name], batch=options.batch, lr=RATE * options.batch)
    epochs = LONGER[name] if options.scratch_b else settings.epochs
    run.images = transformed(run.images, cropped(SMALLEST_CROP[name], coloured=True))
    scratch(run, NETWORKS[name], GATES, options.ratio, found, settings, epochs)


def gates(run: Run) -> Search:
    """One pass, in parts between which there is an evaluation."""
    images = transformed(run.images, cropped(GATE_CROP, coloured=False))
    train, held = split(images, last_of_every_class(images, run.pick(VALIDATION, 5)), run.test)
    steps = run.pick(EVALUATE_EVERY, 2)
    generator = torch.Generator().manual_seed(run.options.seed)
    part = RandomSampler(train, num_samples=steps * GATE_BATCH, generator=generator)
    batches = DataLoader(train, GATE_BATCH, sampler=part, generator=generator, num_workers=run.options.workers)
    parts = max(1, round(len(train) / (steps * GATE_BATCH)))
    return Search(batches, run.batches(GATE_BATCH, train, held)[1], run.pick(parts, 1))


def last_of_every_class(images: Images, count: int) -> list[int]:
    """Their places."""
    labels = torch.as_tensor(images.targets if hasattr(images, "targets") else images.tensors[1])
    return [int(i) for label in labels.unique() for i in torch.nonzero(labels == label)[-count:]]


def cropped(smallest: float, coloured: bool) -> nn.Module:
    """What is done to training images: crops of at least a share of the image, mirrored; with other colours."""
    colours = [v2.ColorJitter(JITTER, JITTER, JITTER)] if coloured else []
    light = [Lighting(LIGHTING)] if coloured else []
    crop = (v2.RandomResizedCrop(224, scale=(smallest, 1)), v2.RandomHorizontalFlip())
    floats = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
    mean, deviation = IMAGENET_STATISTICS
    return v2.Compose([*crop, *colours, *floats, *light, v2.Normalize([*mean], [*deviation])])


class Lighting(nn.Module):
    """Adds a random colour along the principal components of ImageNet's colours (Krizhevsky et al. 2012)."""

    VALUES = (0.2175, 0.0188, 0.0045)
    VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

    def __init__(self, deviation: float):
        super().__init__()
        self.deviation = deviation

    def forward(self, image: Tensor) -> Tensor:
        colour = torch.tensor(self.VECTORS) @ (torch.tensor(self.VALUES) * torch.randn(3) * self.deviation)
        return image + colour[:, None, None]


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.set_defaults(dataset="imagenet")
    result.add_argument("--network", choices=NETWORKS, default="resnet_50")
    result.add_argument("--ratio", type=share, default=0.5, help="MACs that stay (default: 0.5)")
    result.add_argument("--batch", type=positive, default=BATCH, help=f"of the second training (default: {BATCH})")
    result.add_argument("--scratch-b", action=argparse.BooleanOptionalAction, default=True, help="train for longer")
    return result


if __name__ == "__main__":
    main()
