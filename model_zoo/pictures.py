"""Images that are decoded once, kept as bytes where the network is, and cropped and mirrored there, batch by batch.

A data set of small images fits into a GPU's memory. Taken from there, a batch costs a few kernels; a ``DataLoader``
over files would decode every image anew in every epoch, and takes longer than a small network's step.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from fxprune.io.files import replacing

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and deviation by channel, of images in [0, 1]

ENDINGS = IMG_EXTENSIONS  # of an ImageFolder
PARTS = ("train", "test")
_AT_ONCE = 10_000  # files of which the first bytes are looked at
_ORDER = 0  # seed of the order that images of folders get


class TimeUpError(Exception):
    """The time that a run was given is over."""


@dataclass(frozen=True, eq=False)
class Pictures(Dataset[Any]):
    """Images and their labels in memory.

    ``images``: uint8 [N, C, H, W]. ``labels``: int64 [N], on the same device. ``statistics``: what they are normalised
    by. ``margin``: pixels of black around an image, of which a random crop of its size is taken; 0: none.
    ``mirrored``: half of the images, drawn at random.
    """

    images: Tensor
    labels: Tensor
    statistics: Statistics
    margin: int = 0
    mirrored: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(torch.tensor([range(len(self))[index]], device=self.images.device))
        return images[0], int(labels)

    def to(self, device: torch.device | str) -> Pictures:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def part(self, indices: Sequence[int] | Tensor) -> Pictures:
        """Those at ``indices``."""
        chosen = torch.as_tensor(indices, device=self.labels.device)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def plain(self) -> Pictures:
        """Neither cropped nor mirrored."""
        return replace(self, margin=0, mirrored=False)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """float32 [n, C, H, W] and int64 [n] of those at ``index [n]``, drawn anew from ``generator``."""
        images, device = self.images[index], self.images.device
        count, channels, height, width = images.shape
        if self.margin or self.mirrored:
            images = F.pad(images, [self.margin] * 4)
            top, left = torch.randint(2 * self.margin + 1, (2, count, 1), generator=generator, device=device)
            rows, columns = (torch.arange(size, device=device) + at for size, at in ((height, top), (width, left)))
            if self.mirrored:
                turned = torch.rand(count, 1, generator=generator, device=device) < 0.5
                columns = torch.where(turned, columns.flip(1), columns)
            of, channel = (torch.arange(size, device=device) for size in (count, channels))
            images = images[
                of[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]
            ]
        mean, deviation = self._normalised_by
        return (images - mean) / deviation, self.labels[index]

    @cached_property
    def _normalised_by(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation [C, 1, 1] of bytes; moved once, since that waits for all that a GPU has still to do."""
        mean, deviation = (torch.tensor(s, device=self.images.device).view(-1, 1, 1) * 255 for s in self.statistics)
        return mean, deviation


class Batches:
    """Batches of pictures where these are; in an order that is drawn anew for every epoch, if ``seed`` is given.

    Args:
        pictures: on the device that trains.
        batch: images in one; the last may have fewer.
        seed: of the order, the crops and the mirroring.
        until: when to raise ``TimeUpError`` in place of a batch, in seconds of ``time.time()``.
        memory_format: of the images.
    """

    def __init__(
        self,
        pictures: Pictures,
        batch: int,
        seed: int | None = None,
        until: float | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.pictures, self._batch, self._until, self._format = pictures, batch, until, memory_format
        self.generator = None if seed is None else torch.Generator(pictures.images.device).manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.pictures) / self._batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, device = len(self.pictures), self.pictures.images.device
        if self.generator is None:
            order = torch.arange(count, device=device)
        else:
            order = torch.randperm(count, generator=self.generator, device=device)
        for index in order.split(self._batch):
            if self._until is not None and time.time() > self._until:
                raise TimeUpError
            images, labels = self.pictures.batch(index, self.generator)
            yield images.contiguous(memory_format=self._format), labels


# -- folders -----------------------------------------------------------------------------------------------------------


class Folder(NamedTuple):
    """What the images of a data set are: ``channels`` (1: shades of grey), ``side`` in pixels, ``classes``."""

    channels: int
    side: int
    classes: int


Read = tuple[Tensor, Tensor]  # images and labels


def has_folders(directory: Path) -> bool:
    """Whether there is a folder ``train`` or ``test``."""
    return any((directory / part).is_dir() for part in PARTS)


def read_folders(name: str, directory: Path, folder: Folder) -> tuple[Read, Read]:
    """Images in ``directory/train/CLASS`` and ``directory/test/CLASS``, in an order that mixes the classes.

    They are those that an ``ImageFolder`` finds, in folders below, too (``CLASS/images/*``). Labels number the classes
    in the order of their names. What was decoded is kept in ``directory/NAME.pictures.pt`` and read from there while no
    file changes; where nothing can be written, it is decoded every time.

    Raises:
        FileNotFoundError: there is no folder ``train`` or ``test``, or one without classes or without images.
        ValueError: other classes than there must be, or a file that is no such image (named).
    """
    listed = [_listed(name, directory / part, folder) for part in PARTS]
    if [*listed[0]] != [*listed[1]]:
        odd = sorted({*listed[0]} ^ {*listed[1]})
        raise ValueError(f"{name}: {directory / 'train'} and {directory / 'test'} have other classes: {', '.join(odd)}")
    files = [[(file, label) for label, found in enumerate(part.values()) for file in found] for part in listed]
    cache = directory / f"{name}.pictures.pt"
    now = _fingerprint([file for part in files for file, _ in part], directory)
    kept = _kept(cache, now)
    if kept is None:
        kept = [(_decoded([file for file, _ in part], folder), torch.tensor([n for _, n in part])) for part in files]
        orders = [torch.randperm(len(n), generator=torch.Generator().manual_seed(_ORDER)) for _, n in kept]
        kept = [(images[order], labels[order]) for (images, labels), order in zip(kept, orders, strict=True)]
        if os.access(directory, os.W_OK):
            with replacing(cache) as draft:
                torch.save({"made_from": now, "parts": kept}, draft)
    train, test = kept
    return train, test


def _listed(name: str, part: Path, folder: Folder) -> dict[str, list[Path]]:
    """Class -> its images."""
    if not part.is_dir():
        raise FileNotFoundError(f"{name} is not complete: there is no folder {part}")
    found: dict[str, list[Path]] = {}
    for below in sorted(path for path in part.iterdir() if path.is_dir()):
        walked = ((place, file) for place, _, files in os.walk(below, followlinks=True) for file in files)
        found[below.name] = sorted(Path(place, file) for place, file in walked if file.lower().endswith(ENDINGS))
        if not found[below.name]:
            raise FileNotFoundError(f"{name} is not complete: there are no images ({', '.join(ENDINGS)}) in {below}")
    if not found:
        raise FileNotFoundError(f"{name} is not complete: {part} has no folders of classes, like {part / 'cat'}")
    if len(found) != folder.classes:
        raise ValueError(f"{part} has {len(found)} classes ({', '.join(found)}), and {name} has {folder.classes}")
    return found


def _fingerprint(files: Sequence[Path], directory: Path) -> str:
    """Of names below ``train`` or ``test``, sizes and times."""
    result = hashlib.sha256()
    for file in files:
        state, name = file.stat(), "/".join(file.relative_to(directory).parts[1:])
        result.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return result.hexdigest()


def _kept(cache: Path, made_from: str) -> list[Read] | None:
    """What was decoded before, or None: there is nothing, of other files, or damaged."""
    if not cache.exists():
        return None
    try:
        found = torch.load(cache, weights_only=True, mmap=True)
    except Exception:  # of zip, of pickle: whatever a damaged file leads to
        return None
    if not isinstance(found, dict) or found.get("made_from") != made_from:
        return None
    parts: list[Read] = found["parts"]
    return parts


def _decoded(files: Sequence[Path], folder: Folder) -> Tensor:
    """uint8 [N, C, H, W]."""
    with ThreadPoolExecutor() as pool:
        arrays = [*pool.map(lambda file: _image(file, folder), files)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """Raises ``ValueError`` where it is no image, or anything inside says so."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {str(error).partition(chr(10))[0]}") from error


def check_images(files: Sequence[str | Path]) -> None:
    """Look at the first bytes of every file, of very many too.

    Raises:
        ValueError: one is no image (named). What is broken further on is seen when it is decoded.
    """

    def look(file: str | Path) -> None:
        with _opened(Path(file)):
            pass

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), _AT_ONCE):
            for _ in pool.map(look, files[start : start + _AT_ONCE]):
                pass


def _image(file: Path, folder: Folder) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [H, W, C]."""
    with _opened(file) as image:
        if image.mode.startswith(("I", "F")):  # which a conversion cuts off at 255
            raise ValueError(f"it has pixels of more than 8 bits ({image.mode})")
        pixels = np.asarray(image.convert("L" if folder.channels == 1 else "RGB"))
    if pixels.shape[:2] != (folder.side, folder.side):
        height, width = pixels.shape[:2]
        raise ValueError(f"{file} is {width} x {height} pixels, and must be {folder.side} x {folder.side}")
    return pixels.reshape(folder.side, folder.side, folder.channels)
