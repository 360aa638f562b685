"""Images in memory: what is cropped and mirrored, what is kept of a folder, and what a folder must not be."""

from __future__ import annotations

import io
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from model_zoo import pictures
from model_zoo.data import load
from model_zoo.pictures import Batches, Folder, Pictures, TimeUpError, read_folders
from model_zoo.recipes.common import split

STATISTICS = ((0.5, 0.25), (0.5, 0.25))
FOLDER = Folder(3, 4, 2)


def some(count: int = 6, **changes: object) -> Pictures:
    images = torch.randint(1, 256, (count, 2, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Pictures(images, torch.arange(count), STATISTICS, **changes)  # type: ignore[arg-type]


def bytes_of(images: torch.Tensor) -> torch.Tensor:
    mean, deviation = (torch.tensor(s).view(-1, 1, 1) for s in STATISTICS)
    return ((images * deviation + mean) * 255).round().to(torch.uint8)


def draw(directory: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 3, side: int = 4) -> Path:
    """A folder of images, none like another."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in classes:
            (directory / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
                image.save(directory / part / name / f"{number}.png")
    return directory


def test_batches_are_the_images_normalised() -> None:
    found = list(Batches(some(), 4))
    assert [labels.tolist() for _, labels in found] == [[0, 1, 2, 3], [4, 5]]
    assert torch.equal(bytes_of(torch.cat([images for images, _ in found])), some().images)
    assert len(Batches(some(), 4)) == 2
    image, label = some()[-1]
    assert label == 5
    assert torch.equal(bytes_of(image), some().images[5])


def test_crops_and_mirrors_are_of_the_image() -> None:
    images, drawn = some(1), some(1, margin=2, mirrored=True)
    padded = torch.nn.functional.pad(images.images[0], [2] * 4)
    crops = {
        (top, left, turned): padded[:, top : top + 4, left : left + 4].flip([2] if turned else [])
        for top in range(5) for left in range(5) for turned in (False, True)
    }  # fmt: skip
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for image in bytes_of(drawn.batch(torch.zeros(400, dtype=torch.int64), generator)[0]):
        (place,) = (place for place, crop in crops.items() if torch.equal(crop, image))
        seen.add(place)
    assert seen == crops.keys()


def test_order_and_crops_are_those_of_the_seed_and_new_in_every_epoch() -> None:
    def epochs(seed: int) -> list[list[torch.Tensor]]:
        batches = Batches(some(40, margin=1, mirrored=True), 16, seed)
        return [[images for images, _ in batches] for _ in range(2)]

    one, again, other = epochs(0), epochs(0), epochs(1)
    assert all(torch.equal(a, b) for x, y in zip(one, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(one[0][0], one[1][0])
    assert not torch.equal(one[0][0], other[0][0])
    assert sorted(torch.cat([labels for _, labels in Batches(some(40), 16, 0)]).tolist()) == [*range(40)]


def test_a_generator_that_is_put_back_gives_the_same_batches() -> None:
    batches = Batches(some(40, margin=1), 16, 0)
    assert batches.generator is not None
    state = batches.generator.get_state()
    first = torch.cat([images for images, _ in batches])
    batches.generator.set_state(state)
    assert torch.equal(torch.cat([images for images, _ in batches]), first)


def test_no_batch_comes_when_the_time_is_up() -> None:
    assert len(list(Batches(some(), 4, until=time.time() + 60))) == 2
    with pytest.raises(TimeUpError):
        next(iter(Batches(some(), 4, until=time.time() - 1)))


def test_what_is_held_out_is_neither_cropped_nor_mirrored() -> None:
    train, held = split(some(6, margin=2, mirrored=True), range(4, 6), some())
    assert isinstance(train, Pictures)
    assert isinstance(held, Pictures)
    assert (train.labels.tolist(), held.labels.tolist()) == ([0, 1, 2, 3], [4, 5])
    assert (train.margin, train.mirrored, held.margin, held.mirrored) == (2, True, 0, False)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folders_are_read_in_an_order_that_mixes_the_classes(tmp_path: Path) -> None:
    (images, labels), (others, _) = read_folders("two", draw(tmp_path, count=20), FOLDER)
    assert (images.shape, images.dtype, others.shape) == ((40, 3, 4, 4), torch.uint8, (40, 3, 4, 4))
    assert labels.bincount().tolist() == [20, 20]
    assert 4 < int(labels[:20].sum()) < 16, "the first half is one class"
    known = {p.read_bytes(): p for p in tmp_path.glob("train/*/*.png")}
    assert len(known) == 40
    by_pixels = {np.asarray(Image.open(p)).tobytes(): p.parent.name for p in tmp_path.glob("train/*/*.png")}
    named = [by_pixels[image.permute(1, 2, 0).numpy().tobytes()] for image in images]
    assert named == [("cat", "dog")[label] for label in labels]


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_folders("two", draw(tmp_path), FOLDER)
    with monkeypatch.context() as patched:
        patched.setattr(pictures, "_decoded", lambda *_: pytest.fail("decoded again"))
        again = read_folders("two", tmp_path, FOLDER)
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))

    image = tmp_path / "train" / "cat" / "0.png"
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(image)
    os.utime(image, (1, 1))
    assert bool((read_folders("two", tmp_path, FOLDER)[0][0] == 0).flatten(1).all(1).any()), "an old image"
    (tmp_path / "two.pictures.pt").write_bytes(b"damaged")
    assert len(read_folders("two", tmp_path, FOLDER)[0][0]) == 6


def test_all_that_an_image_folder_finds_is_read(tmp_path: Path) -> None:
    """Images of other kinds, and those in folders below: Tiny ImageNet comes as ``train/CLASS/images/*``."""
    below = draw(tmp_path) / "train" / "cat" / "images"
    below.mkdir()
    (tmp_path / "train" / "cat" / "0.png").rename(below / "0.png")
    for number, ending in enumerate(IMG_EXTENSIONS):
        Image.new("L", (4, 4), number).save(tmp_path / "train" / "dog" / f"{number}{ending.upper()}")
    (_, labels), _ = read_folders("two", tmp_path, FOLDER)
    expected = ImageFolder(tmp_path / "train")
    assert labels.bincount().tolist() == np.bincount(expected.targets).tolist() == [3, 12]

    (below / "0.png").rename(below / "1.png")
    (below.parent / "1.png").rename(below.parent / "0.png")
    named = {np.asarray(Image.open(p)).tobytes() for p in tmp_path.glob("train/cat/**/*.png")}
    (images, labels), _ = read_folders("two", tmp_path, FOLDER)
    assert {image.permute(1, 2, 0).numpy().tobytes() for image in images[labels == 0]} == named


def test_shades_of_grey(tmp_path: Path) -> None:
    (images, _), _ = read_folders("two", draw(tmp_path), Folder(1, 4, 2))
    assert images.shape == (6, 1, 4, 4)


def huge() -> bytes:
    """A bitmap whose header was damaged: of 20000 x 20000 pixels."""
    Image.new("RGB", (4, 4)).save(file := io.BytesIO(), "BMP")
    return file.getvalue()[:18] + (20000).to_bytes(4, "little") * 2 + file.getvalue()[26:]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "test").rename(d / "val"), "two is not complete: there is no folder {d}/test"),
        (
            lambda d: [p.rename(d / p.name) for p in (d / "test").iterdir()],
            "two is not complete: {d}/test has no folders of classes, like {d}/test/cat",
        ),
        (
            lambda d: [p.unlink() for p in (d / "train" / "dog").iterdir()],
            "two is not complete: there are no images (.jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp) in "
            "{d}/train/dog",
        ),
        (
            lambda d: (d / "test" / "dog").rename(d / "test" / "cow"),
            "two: {d}/train and {d}/test have other classes: cow, dog",
        ),
        (
            lambda d: (d / "train" / "dog").rename(d / "dog"),
            "{d}/train has 1 classes (cat), and two has 2",
        ),
        (
            lambda d: (d / "train" / "dog" / "1.png").write_bytes(b"nothing"),
            "{d}/train/dog/1.png cannot be read as an image: cannot identify image file",
        ),
        (
            lambda d: Image.new("I;16", (4, 4), 256).save(d / "train" / "dog" / "1.png"),
            "{d}/train/dog/1.png cannot be read as an image: it has pixels of more than 8 bits (I;16)",
        ),
        (
            lambda d: (d / "train" / "dog" / "0.bmp").write_bytes(huge()),
            "{d}/train/dog/0.bmp cannot be read as an image: Image size (400000000 pixels) exceeds limit",
        ),
        (
            lambda d: Image.new("RGB", (4, 5)).save(d / "test" / "cat" / "2.png"),
            "{d}/test/cat/2.png is 4 x 5 pixels, and must be 4 x 4",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path, spoil: object, message: str) -> None:
    spoil(draw(tmp_path))  # type: ignore[operator]
    with pytest.raises((FileNotFoundError, ValueError), match="^" + re.escape(message.format(d=tmp_path))):
        read_folders("two", tmp_path, FOLDER)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    file = next(draw(tmp_path, side=64).glob("train/cat/0.png"))
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))} cannot be read as an image: "):
        read_folders("two", tmp_path, Folder(3, 64, 2))


def test_data_sets_are_read_from_folders_too(tmp_path: Path) -> None:
    train, test = load("mnist", draw(tmp_path, tuple("0123456789"), 1, 28))
    assert isinstance(train, Pictures)
    assert (len(train), len(test), train[0][0].shape) == (10, 10, (1, 28, 28))
    with pytest.raises(ValueError, match=r"has 10 classes \(0, 1, 2, 3, 4, 5, 6, 7, 8, 9\), and cifar100 has 100$"):
        load("cifar100", tmp_path)
