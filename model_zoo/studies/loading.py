"""What an epoch over CIFAR-10 costs without any network: read from files by a ``DataLoader``, and decoded once.

Batches of 128 in an order drawn anew; every image is cropped at random from a margin of 4 pixels, mirrored or not, and
normalised. *files*: a ``torch.utils.data.DataLoader`` over torchvision's ``ImageFolder``, with its transforms of PIL
images. *decoded*: the same from a tensor of bytes that lies in memory, as the recipes and studies here do
(``model_zoo.pictures``). *decoding*: what that takes before the first epoch, for images to train and to test on; what
was decoded is kept in a file, and later runs read that. One thread, no workers, seconds of processor time; workers of a
``DataLoader`` divide seconds of the clock among cores, and spend as many of the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from model_zoo import data
from model_zoo.data import CIFAR_STATISTICS
from model_zoo.measuring.meter import spent
from model_zoo.pictures import PARTS, Batches
from model_zoo.records import Record, Results, table
from model_zoo.study import Add, Options, Study, each, rules

BATCH = 128


def _of_files(options: Options) -> tuple[int, float]:
    cropped = (transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip())
    steps = transforms.Compose([*cropped, transforms.ToTensor(), transforms.Normalize(*CIFAR_STATISTICS)])
    return _epoch(DataLoader(ImageFolder(options.data / "train", steps), BATCH, shuffle=True))


def _of_decoded(options: Options) -> tuple[int, float]:
    return _epoch(Batches(_load(options.data)[0], BATCH, seed=0))


def _decoding(options: Options) -> tuple[int, float]:
    """In a folder where nothing was decoded before."""
    with TemporaryDirectory() as folder:
        for part in PARTS:
            (Path(folder) / part).symlink_to((options.data / part).resolve())
        parts, seconds = spent(lambda: _load(Path(folder)))
    return sum(map(len, parts)), seconds


def _load(directory: Path) -> Any:
    return data.load("cifar10", directory)


def _epoch(batches: Any) -> tuple[int, float]:
    """How many images, and seconds; a batch before them is not counted."""
    next(iter(batches))
    return spent(lambda: sum(len(labels) for _, labels in batches))


CASES: dict[str, Callable[[Options], tuple[int, float]]] = {
    "files": _of_files,
    "decoded": _of_decoded,
    "decoding": _decoding,
}


def measured(name: str, options: Options) -> Record:
    images, seconds = CASES[name](options)
    return Record(name, {"images": images, "cpu": seconds})


def page(results: Results) -> Sequence[str]:
    rows = [[r.name, str(r.figures["images"]), f"{r.figures['cpu']:.1f}"] for r in results.lines]
    parts = [table(["", "images", "seconds"], rows)]
    if {"files", "decoded"} <= results.records.keys():
        files, decoded = (results.records[name].figures["cpu"] for name in ("files", "decoded"))
        parts.append(f"An epoch from files takes {files / decoded:.1f} times as long.")
    return parts


def _options(add: Add) -> None:
    add("--data", type=Path, metavar="DIR", help="CIFAR-10 as folders of images")


def _check(options: Options) -> str:
    if options.data is None or not all((options.data / part).is_dir() for part in PARTS):
        return "pass --data DIR, where folders train and test of images are"
    try:
        _load(options.data)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


STUDY = Study(
    "loading", "what an epoch over images takes, from files and decoded once", lambda _: CASES, each(measured), page,
    options=_options, needs=("--data DIR: CIFAR-10 as folders of images",), doc=__doc__, rules=rules(__doc__),
    check=_check,
)  # fmt: skip
