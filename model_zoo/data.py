"""What the papers' networks are trained on: data sets that come with scikit-learn or are drawn, and the papers' own.

Everything is determined by its seed, but for the papers' random crops, which draw from torch's global generator.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

from model_zoo.pictures import Batches, Folder, Pictures, Statistics, check_images, has_folders, read_folders

Array = npt.NDArray[Any]  # of floating point
Split = tuple[Dataset[Any], Dataset[Any]]
Loader = DataLoader[Any] | Batches

TEST_SHARE = 0.2


def loaders(
    train: Dataset[Any], test: Dataset[Any], batch: int, seed: int = 0, workers: int = 0
) -> tuple[Loader, Loader]:
    """Batches: of ``train`` in an order that is drawn anew from ``seed`` for every epoch, of ``test`` in its own.

    ``workers``: processes that read the images; 0: this one. Of pictures no images are read: batches are made where
    these are.
    """
    if isinstance(train, Pictures) and isinstance(test, Pictures):
        return Batches(train, batch, seed), Batches(test, batch)
    generator = torch.Generator().manual_seed(seed)
    shuffled = DataLoader(train, batch, shuffle=True, generator=generator, num_workers=workers)
    return shuffled, DataLoader(test, batch, num_workers=workers)


# -- what comes with scikit-learn --------------------------------------------------------------------------------------


def digits(size: int = 16, seed: int = 0, test: float = TEST_SHARE) -> tuple[TensorDataset, TensorDataset]:
    """Handwritten digits, train and test: images [1, size, size] of mean 0 and deviation 1, labels 0 to 9.

    The 1797 images of 8 x 8 pixels of scikit-learn, enlarged bilinearly; the share ``test`` of every class is for
    testing.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None]
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(found.target).long()
    parts = train_test_split(np.arange(len(labels)), test_size=test, stratify=found.target, random_state=seed)
    train, held = (torch.from_numpy(part) for part in parts)
    images = (images - images[train].mean()) / images[train].std()
    return TensorDataset(images[train], labels[train]), TensorDataset(images[held], labels[held])


def patches(size: int, count: int, seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Pieces of the two photographs of scikit-learn, train and test: images [3, size, size] in [0, 1], no labels.

    ``count`` for training, from the left three quarters of the photographs, and a fifth as many for testing, from the
    rest.

    Raises:
        ValueError: the photographs are too small.
    """
    from sklearn.datasets import load_sample_images

    photographs = [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    borders = [photograph.shape[2] * 3 // 4 for photograph in photographs]
    parts = (
        [photograph[..., :border] for photograph, border in zip(photographs, borders, strict=True)],
        [photograph[..., border:] for photograph, border in zip(photographs, borders, strict=True)],
    )
    most = min(side for part in parts for area in part for side in area.shape[1:])
    if not 0 < size <= most:
        raise ValueError(f"size={size} does not fit; the smaller part of a photograph is {most} pixels wide.")
    generator = torch.Generator().manual_seed(seed)
    train, test = (_cut(part, size, n, generator) for part, n in zip(parts, (count, -(-count // 5)), strict=True))
    return train, test


def _cut(areas: list[Tensor], size: int, count: int, generator: torch.Generator) -> TensorDataset:
    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    found = []
    for number in range(count):
        area = areas[number % len(areas)]
        top, left = (below(side - size + 1) for side in area.shape[1:])
        found.append(area[:, top : top + size, left : left + size])
    return TensorDataset(torch.stack(found))


# -- glyphs ------------------------------------------------------------------------------------------------------------

SHAPES: tuple[Callable[[Array, Array], Array], ...] = (  # distance from the outline, below 0 inside; of size about 1
    lambda u, v: np.hypot(u, v) - 1,  # disc
    lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.85,  # square
    lambda u, v: np.maximum(-v, v / 2 + np.abs(u) * 0.866) - 0.6,  # triangle
    lambda u, v: np.minimum(
        np.maximum(np.abs(u) - 1.1, np.abs(v) - 0.4), np.maximum(np.abs(v) - 1.1, np.abs(u) - 0.4)
    ),  # cross
    lambda u, v: np.abs(np.hypot(u, v) - 0.8) - 0.35,  # ring
)
TEXTURES: tuple[Callable[[Array, Array], Array], ...] = (  # in [-1, 1]; of period 2 pi
    lambda u, v: np.sin(u),  # stripes
    lambda u, v: np.sin(u) * np.sin(v),  # checks
    lambda u, v: np.sin(np.hypot(u, v)),  # circles
    lambda u, v: (np.cos(u) + np.cos(v) - 0.8) / 2,  # dots
    lambda u, v: np.sin(u / 5),  # a gradient
)
_AT_ONCE = 256  # images


def glyphs(count: int, size: int = 32, classes: int = 10, seed: int = 0) -> TensorDataset:
    """Drawn images [3, size, size] of about mean 0 and deviation 1, with labels; as many of every class as can be.

    A class is a shape and a texture; every shape is in two of ten classes, and so is every texture. Position, size,
    rotation, colours, background and noise are random, so that no pixel says anything by itself.

    Args:
        count: of images.
        size: height and width in pixels.
        classes: at most 25.
        seed: of everything; another seed draws other images of the same classes.

    Raises:
        ValueError: there are not so many classes.
    """
    known = len(SHAPES) * len(TEXTURES)
    if not 0 < classes <= known:
        raise ValueError(f"classes={classes} must be at least 1 and at most {known}.")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    images = np.empty((count, 3, size, size), dtype=np.float32)
    for start in range(0, count, _AT_ONCE):
        images[start : start + _AT_ONCE] = _draw(labels[start : start + _AT_ONCE], size, rng)
    return TensorDataset(torch.from_numpy((images - 0.5) / 0.25), torch.from_numpy(labels))


def shape_and_texture(label: int) -> tuple[int, int]:
    """Indices into ``SHAPES`` and ``TEXTURES``."""
    return label % len(SHAPES), (label + label // len(SHAPES)) % len(TEXTURES)


def _draw(labels: npt.NDArray[np.int64], size: int, rng: np.random.Generator) -> Array:
    """Images [N, 3, size, size] in [0, 1]. The picture is the square from -1 to 1."""
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Array:
        return rng.uniform(low, high, (n, *(shape or (1, 1)))).astype(np.float32)

    def turned(x: Array, y: Array) -> tuple[Array, Array]:
        angle = uniform(0, 2 * np.pi)
        return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    line = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1
    x, y = line[None, None, :], line[None, :, None]
    radius, period = uniform(0.45, 0.7), uniform(0.28, 0.42)
    u, v = turned(x - uniform(-0.3, 0.3), y - uniform(-0.3, 0.3))
    s, t = turned(u + uniform(-0.1, 0.1), v + uniform(-0.1, 0.1))
    s, t = s * (2 * np.pi / period), t * (2 * np.pi / period)
    outline, pattern = np.empty((2, n, size, size), dtype=np.float32)
    for label in np.unique(labels):
        of, (shape, texture) = labels == label, shape_and_texture(int(label))
        outline[of] = SHAPES[shape](u[of] / radius[of], v[of] / radius[of]) * radius[of]
        pattern[of] = TEXTURES[texture](s[of], t[of])
    inside = np.clip(0.5 - outline * size / 2, 0, 1)[:, None]
    mix = np.clip(0.5 + 1.5 * pattern, 0, 1)[:, None]
    behind = np.clip(0.5 + (turned(x, y)[0] - uniform(-0.5, 0.5)) * size / 2, 0, 1)[:, None]  # two colours, an edge

    dark = uniform(0, 0.45, 3, 1, 1)
    light = dark + uniform(0.3, 0.55, 3, 1, 1)
    swapped = rng.random((n, 3, 1, 1)) < 0.5
    dark, light = np.where(swapped, light, dark), np.where(swapped, dark, light)
    ground = uniform(0, 1, 3, 1, 1) * behind + uniform(0, 1, 3, 1, 1) * (1 - behind)
    image = inside * (mix * light + (1 - mix) * dark) + (1 - inside) * ground
    return np.clip(image + uniform(0, 0.12, 1, 1, 1) * rng.standard_normal(image.shape, dtype=np.float32), 0, 1)


# -- the papers' data sets ---------------------------------------------------------------------------------------------

CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # as in Network Slimming, mean and deviation
MNIST_STATISTICS = ((0.1307,), (0.3081,))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load(name: str, directory: str | os.PathLike[str]) -> Split:
    """A data set of the papers, train and test, from files that are there; nothing is downloaded.

    - ``cifar10``, ``cifar100``: images [3, 32, 32]; trained on crops of the image with 4 zeros around it, and mirrored.
    - ``mnist``: images [1, 28, 28], as they are. All but ImageNet are ``Pictures``.
    - ``tiny_imagenet``: images [3, 64, 64] from folders; trained on mirrored.
    - ``imagenet``: images [3, 224, 224] from folders ``train`` and ``val`` with a folder per class; trained on crops of
      random size and shape, and mirrored; tested on the middle of the image with its shorter side made 256.

    Args:
        name: of the data set.
        directory: where torchvision would have downloaded it to: above ``cifar-10-batches-py``, ``cifar-100-python`` or
            ``MNIST``; for ImageNet, above ``train`` and ``val``. All but ImageNet also as images in folders,
            ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``, see ``pictures.read_folders``.

    Raises:
        ValueError: nobody knows the name (lists the known ones); a file is no image of the data set (named; of ImageNet
            by its first bytes), or one of torchvision's is broken; training and test images have other classes.
        FileNotFoundError: files are missing (names them).
    """
    if name not in _SETS:
        raise ValueError(f"there is no data set {name!r}. Known: {', '.join(_SETS)}.")
    files, read = _SETS[name]
    directory = Path(directory)
    missing = [file for file in files if not (directory / file).exists()]
    if name in _PICTURES:
        folder, finish = _PICTURES[name]
        if missing and has_folders(directory):
            return finish(*read_folders(name, directory, folder))
        also = ", nor folders train and test of images,"
    else:
        also = ""
    if missing:
        raise FileNotFoundError(f"{name} is not complete: there is no {', '.join(missing)}{also} in {str(directory)!r}")
    return read(directory)


Read = tuple[Tensor, Tensor]
Finish = Callable[[Read, Read], Split]


def _cifar(train: Read, test: Read) -> Split:
    return Pictures(*train, CIFAR_STATISTICS, margin=4, mirrored=True), Pictures(*test, CIFAR_STATISTICS)


def _mnist(train: Read, test: Read) -> Split:
    return Pictures(*train, MNIST_STATISTICS), Pictures(*test, MNIST_STATISTICS)


def _tiny_imagenet(directory: Path) -> Split:
    train, test = read_folders("tiny_imagenet", directory, Folder(3, 64, 200))
    return Pictures(*train, IMAGENET_STATISTICS, mirrored=True), Pictures(*test, IMAGENET_STATISTICS)


def _downloaded(kind: type[datasets.CIFAR10] | type[datasets.MNIST], finish: Finish) -> Callable[[Path], Split]:
    """As torchvision reads it; CIFAR has its images [N, H, W, C] as an array, MNIST [N, H, W] as a tensor."""

    def part(directory: Path, train: bool) -> Read:
        try:
            found = kind(directory, train=train)
        except Exception as error:  # of any kind: an assertion, a struct, a pickle
            raise ValueError(
                f"{kind.__name__} in {str(directory)!r} cannot be read ({type(error).__name__}): its files are "
                "broken or not torchvision's. Fetch them again."
            ) from error
        images = torch.as_tensor(found.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return images, torch.as_tensor(found.targets)

    return lambda directory: finish(part(directory, True), part(directory, False))


def _imagenet(directory: Path) -> Split:
    train = _steps(IMAGENET_STATISTICS, v2.RandomResizedCrop(224), v2.RandomHorizontalFlip())
    test = _steps(IMAGENET_STATISTICS, v2.Resize(256), v2.CenterCrop(224))
    parts = datasets.ImageFolder(directory / "train", train), datasets.ImageFolder(directory / "val", test)
    if odd := sorted({*parts[0].classes} ^ {*parts[1].classes}):
        some = ", ".join(odd[:5])
        raise ValueError(f"imagenet: {directory / 'train'} and {directory / 'val'} have other classes: {some}")
    for part in parts:
        check_images([file for file, _ in part.samples])
    return parts


def _steps(statistics: Statistics, *changes: torch.nn.Module) -> v2.Compose:
    mean, deviation = statistics
    to_tensor = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
    return v2.Compose([*changes, *to_tensor, v2.Normalize([*mean], [*deviation])])


def _cifar_files(kind: type[datasets.CIFAR10]) -> list[str]:
    names = [name for name, _ in kind.train_list + kind.test_list]
    return [f"{kind.base_folder}/{name}" for name in (*names, kind.meta["filename"])]


# name -> what images it has, and what they become
_PICTURES: dict[str, tuple[Folder, Finish]] = {
    "cifar10": (Folder(3, 32, 10), _cifar),
    "cifar100": (Folder(3, 32, 100), _cifar),
    "mnist": (Folder(1, 28, 10), _mnist),
}
_MNIST_FILES = [f"MNIST/raw/{name.removesuffix('.gz')}" for name, _ in datasets.MNIST.resources]
# name -> the files that must be there, and what reads them
_SETS: dict[str, tuple[list[str], Callable[[Path], Split]]] = {
    "cifar10": (_cifar_files(datasets.CIFAR10), _downloaded(datasets.CIFAR10, _cifar)),
    "cifar100": (_cifar_files(datasets.CIFAR100), _downloaded(datasets.CIFAR100, _cifar)),
    "mnist": (_MNIST_FILES, _downloaded(datasets.MNIST, _mnist)),
    "tiny_imagenet": (["train", "test"], _tiny_imagenet),
    "imagenet": (["train", "val"], _imagenet),
}
