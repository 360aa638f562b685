"""DHP of networks that restore images (Li et al., ECCV 2020): DnCNN and U-Net denoise, SRResNet and EDSR enlarge.

``--data DIR`` holds two folders of PNG or JPEG files, ``train`` and ``test`` (the paper: DIV2K, and BSD68 or Set5).
Settings are those of the released scripts: L1 loss, Adam at 1e-4, Gaussian noise of deviation 70 of 255 on gray images,
or enlargement by 4 in colour. ``--share-upsampler``: as there, upsamplers have the latents of the stream that they
enlarge; without it, their own. Networks are trained on random crops, mirrored and turned; an epoch is so many of them
as in the scripts. PSNR is that of all colours of the whole test images, cut to multiples of 16 pixels, the mean over
them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

from fxprune.methods import DHP
from model_zoo import data
from model_zoo.papers import dncnn, edsr, srresnet, unet
from model_zoo.recipes.common import Run, parser, share
from model_zoo.recipes.dhp import dhp

SIGMA, SCALE = 70, 4
MULTIPLE = 16  # U-Net halves four times; a multiple of the scale, too
METHOD = DHP(strength=0.1, threshold=5e-3, limit=0.02)


@dataclass(frozen=True)
class Adam:
    """``every``: after so many epochs the rate is divided by ten, again and again."""

    epochs: int
    batch: int
    every: int
    lr: float = 1e-4

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr)

    def schedule(self, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler:
        return StepLR(optimizer, self.every, 0.1)


def noisy(clean: Tensor, generator: torch.Generator | None) -> Tensor:
    """With Gaussian noise: [C, H, W] -> [C, H, W]."""
    return clean + SIGMA / 255 * torch.randn(clean.shape, generator=generator)


def small(clean: Tensor, generator: torch.Generator | None, scale: int = SCALE) -> Tensor:
    """Reduced bicubically: [C, H, W] -> [C, H / scale, W / scale]."""
    size = [side // scale for side in clean.shape[1:]]
    return F.interpolate(clean[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)


class Network(NamedTuple):
    """``patch``: side of what it is trained on, in pixels. ``crops``: of an epoch. ``stream``: the head and upsamplers,
    whose channels may share one latent vector."""

    make: Callable[..., nn.Module]
    channels: int
    spoil: Callable[[Tensor, torch.Generator | None], Tensor]
    patch: int
    crops: int
    search: Adam
    converging: Adam
    narrow: dict[str, Any]
    stream: tuple[str, ...] = ()


SEARCH_EPOCHS = 60
SUB_IMAGES = 32_208
NETWORKS = {
    "dncnn": Network(
        dncnn, 1, noisy, 64, 640_000, Adam(SEARCH_EPOCHS, 64, 10), Adam(60, 64, 40), {"width": 0.25, "blocks": 2}
    ),
    "unet": Network(
        unet, 1, noisy, 128, 160_000, Adam(SEARCH_EPOCHS, 16, 10), Adam(60, 16, 40), {"width": 0.25, "depth": 3}
    ),
    "srresnet": Network(
        srresnet, 3, small, 96, SUB_IMAGES, Adam(SEARCH_EPOCHS, 16, 40), Adam(300, 16, 200),
        {"width": 0.25, "blocks": 1}, ("head.0", "tail.0", "tail.3"),
    ),
    "edsr": Network(
        edsr, 3, small, 192, SUB_IMAGES, Adam(SEARCH_EPOCHS, 16, 40), Adam(300, 16, 200),
        {"width": 0.125, "blocks": 1}, ("head", "tail.0", "tail.2"),
    ),
}  # fmt: skip
SMOKE_PATCH, SMOKE_CROPS = 32, 64


class Images(Dataset[Tensor]):
    """The files of a folder: images [C, H, W] in [0, 1].

    Raises:
        FileNotFoundError: there are none.
    """

    def __init__(self, folder: Path, channels: int):
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        self._files = [path for path in found if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
        if not self._files:
            raise FileNotFoundError(f"there is no PNG or JPEG file in {str(folder)!r}")
        self._mode = "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self._files[index]) as image:
            result: Tensor = to_tensor(image.convert(self._mode))
        return result


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Random pieces of images, spoiled, and as they were; ``count`` in an epoch, from torch's global generator."""

    def __init__(self, images: Any, spoil: Callable[..., Tensor], size: int, count: int):
        self._images, self._spoil, self._size, self._count = images, spoil, size, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self._images[index % len(self._images)]
        top, left = (int(torch.randint(side - self._size + 1, ())) for side in image.shape[1:])
        piece = image[:, top : top + self._size, left : left + self._size]
        flips, turns = torch.randint(2, ()), int(torch.randint(4, ()))
        piece = torch.rot90(piece.flip(2) if flips else piece, turns, (1, 2)).contiguous()
        return self._spoil(piece, None), piece


class Whole(Dataset[tuple[Tensor, Tensor]]):
    """Images up to the last multiple of 16 pixels, spoiled the same way every time, and as they were."""

    def __init__(self, images: Any, spoil: Callable[..., Tensor]):
        self._images, self._spoil = images, spoil

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self._images[index]
        height, width = (side // MULTIPLE * MULTIPLE for side in image.shape[1:])
        image = image[:, :height, :width]
        return self._spoil(image, torch.Generator().manual_seed(index)), image


class Restoration(Run):
    """A run that is measured by the peak signal-to-noise ratio of restored images, in dB."""

    loss, metric = staticmethod(F.l1_loss), "psnr"
    axis, scale = "PSNR, dB", 1.0

    def network(self, make: Callable[..., nn.Module], **options: Any) -> nn.Module:
        self.reseed()
        return make(in_channels=self.example.shape[1], **options).to(self.device)

    def quality(self, model: nn.Module) -> float:
        model.eval()
        found = []
        with torch.no_grad():
            for spoiled, clean in self.batches(1)[1]:
                error = model(spoiled.to(self.device)).clamp(0, 1).cpu() - clean
                found.append(-10 * math.log10(max(float(error.square().mean()), 1e-12)))
        return sum(found) / len(found)

    def told(self, quality: float) -> str:
        return f"PSNR {quality:.2f} dB"


def main(argv: Sequence[str] | None = None) -> None:
    options = (known := arguments()).parse_args(argv)
    network = NETWORKS[options.network]
    if options.share_upsampler and not network.stream:
        known.error(f"--share-upsampler: {options.network} has no upsampler")
    train: Any
    test: Any
    if options.smoke:
        train, test = (_drawn(part, network.channels) for part in data.patches(SMOKE_PATCH, 16))
    elif options.data is None:
        known.error("pass --data DIR, with images in DIR/train and DIR/test, or --smoke for a run of seconds without")
    else:
        try:
            train, test = (Images(options.data / part, network.channels) for part in ("train", "test"))
        except FileNotFoundError as error:
            known.error(str(error))
    patch, crops = (SMOKE_PATCH, SMOKE_CROPS) if options.smoke else (network.patch, network.crops)
    pairs = Crops(train, network.spoil, patch, crops), Whole(test, network.spoil)
    run = Restoration("dhp_restoration", options, *pairs)
    make = run.pick(network.make, lambda **others: network.make(**network.narrow, **others))
    method = replace(METHOD, shared=(network.stream,)) if options.share_upsampler else METHOD
    dhp(run, make, method, options.ratio, network.search, network.converging)


def _drawn(part: Dataset[Any], channels: int) -> list[Tensor]:
    images = [image for (image,) in part]  # type: ignore[attr-defined]
    return [image.mean(0, keepdim=True) if channels == 1 else image for image in images]


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument("--network", choices=NETWORKS, default="dncnn")
    result.add_argument("--ratio", type=share, default=0.6, help="MACs that stay (default: 0.6; the paper: .6, .4, .2)")
    result.add_argument("--share-upsampler", action="store_true", help="with the latents of the stream it enlarges")
    return result


if __name__ == "__main__":
    main()
