"""The data sets: what is in them, that a seed determines them, and that files in the published formats are read."""

from __future__ import annotations

import pickle
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image

from model_zoo.data import (
    CIFAR_STATISTICS,
    IMAGENET_STATISTICS,
    MNIST_STATISTICS,
    digits,
    glyphs,
    load,
    loaders,
    patches,
    shape_and_texture,
)
from model_zoo.recipes import slimming_cifar, slimming_mnist


def equal(a: TensorDataset, b: TensorDataset) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits() -> None:
    train, test = digits()
    images, labels = train.tensors
    assert images.shape == (1437, 1, 16, 16)
    assert test.tensors[0].shape == (360, 1, 16, 16)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std()) == pytest.approx(1, abs=1e-5)
    shares = labels.bincount() / len(labels) - test.tensors[1].bincount() / 360
    assert float(shares.abs().max()) < 0.005, "not the same share of every class"
    assert len({image.numpy().tobytes() for image in torch.cat((images, test.tensors[0]))}) == 1797


def test_digits_are_those_of_their_seed() -> None:
    assert all(equal(a, b) for a, b in zip(digits(8, seed=1), digits(8, seed=1), strict=True))
    assert not equal(digits(8, seed=1)[0], digits(8, seed=2)[0])


def test_digits_are_enlarged_and_not_moved() -> None:
    small, large = (digits(size)[0].tensors[0] for size in (8, 16))
    pooled = torch.nn.functional.avg_pool2d(large, 2)
    correlation = torch.corrcoef(torch.stack((small.flatten(), pooled.flatten())))[0, 1]
    assert float(correlation) > 0.95, "moved by one pixel it is 0.91"


# -- patches -----------------------------------------------------------------------------------------------------------


def test_patches_for_testing_are_of_another_part_of_the_photographs() -> None:
    from sklearn.datasets import load_sample_images

    train, test = patches(48, 41)
    assert [part.tensors[0].shape for part in (train, test)] == [(41, 3, 48, 48), (9, 3, 48, 48)]
    assert 0 <= float(train.tensors[0].min()) < 0.1
    assert 0.9 < float(train.tensors[0].max()) <= 1
    photographs = [image.astype(np.float32).transpose(2, 0, 1) / 255 for image in load_sample_images().images]
    for part, at_least, below in ((train, 0, 480), (test, 480, 640)):
        for number, patch in enumerate(part.tensors[0].numpy()):
            photograph = photographs[number % 2]
            corners = np.argwhere((photograph[:, :-47, :-47] == patch[:, :1, :1]).all(0))
            (left,) = {x for y, x in corners if np.array_equal(photograph[:, y : y + 48, x : x + 48], patch)}
            assert at_least <= left <= below - 48


def test_patches_are_those_of_their_seed() -> None:
    assert equal(patches(16, 8, seed=1)[0], patches(16, 8, seed=1)[0])
    assert not equal(patches(16, 8, seed=1)[0], patches(16, 8, seed=2)[0])


def test_patches_must_fit() -> None:
    patches(160, 1)
    message = "size=161 does not fit; the smaller part of a photograph is 160 pixels wide."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        patches(161, 1)


# -- glyphs ------------------------------------------------------------------------------------------------------------


def test_glyphs() -> None:
    images, labels = glyphs(105).tensors
    assert images.shape == (105, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert {*labels.bincount().tolist()} == {10, 11}
    assert float(images.mean()) == pytest.approx(0, abs=0.2)
    assert float(images.std()) == pytest.approx(1, abs=0.2)
    assert glyphs(4, size=16).tensors[0].shape == (4, 3, 16, 16)


def test_glyphs_are_those_of_their_seed() -> None:
    assert equal(glyphs(300, seed=1), glyphs(300, seed=1))
    assert not equal(glyphs(300, seed=1), glyphs(300, seed=2))


def test_no_glyph_is_known_by_its_shape_or_its_texture_alone() -> None:
    classes = [shape_and_texture(label) for label in range(25)]
    assert len({*classes}) == 25
    for one in zip(*classes[:10], strict=True):
        assert {one.count(kind) for kind in one} == {2}


@pytest.mark.parametrize("classes", [0, 26])
def test_glyphs_of_unknown_classes(classes: int) -> None:
    with pytest.raises(ValueError, match=rf"^classes={classes} must be at least 1 and at most 25\.$"):
        glyphs(10, classes=classes)


def linear_accuracy(train: TensorDataset, test: TensorDataset) -> float:
    """Of regularised least squares on the pixels."""
    (x, labels), (y, truth) = train.tensors, test.tensors
    x, y = x.flatten(1), y.flatten(1)
    weight = torch.linalg.solve(x.T @ x + 1e4 * torch.eye(x.shape[1]), x.T @ nn.functional.one_hot(labels).float())
    return float(((y @ weight).argmax(1) == truth).float().mean())


def convolutional_accuracy(train: TensorDataset, test: TensorDataset, epochs: int) -> float:
    widths = (3, 16, 32, 64)
    blocks = [
        layer
        for a, b in pairwise(widths)
        for layer in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
    ]
    net = nn.Sequential(*blocks[:-1], nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    batches, (images, labels) = loaders(train, test, 64)[0], test.tensors
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, epochs=epochs, steps_per_epoch=len(batches))
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float((net.eval()(images).argmax(1) == labels).float().mean())


@pytest.mark.usefixtures("one_thread")
def test_glyphs_need_convolutions() -> None:
    train, test = glyphs(3000), glyphs(500, seed=1)
    assert linear_accuracy(train, test) < 0.2
    assert convolutional_accuracy(train, test, epochs=4) > 0.5


# -- loaders -----------------------------------------------------------------------------------------------------------


def test_order_is_that_of_the_seed_and_new_in_every_epoch() -> None:
    numbers = TensorDataset(torch.arange(100))

    def epochs(seed: int) -> list[list[int]]:
        train, _ = loaders(numbers, numbers, 32, seed)
        return [[int(n) for (batch,) in train for n in batch] for _ in range(2)]

    one, two = epochs(0)
    assert sorted(one) == sorted(two) == [*range(100)]
    assert one != two
    assert epochs(0) == [one, two] != epochs(1)
    _, test = loaders(numbers, numbers, 32)
    assert [batch.tolist() for (batch,) in test] == [[*range(i, min(i + 32, 100))] for i in range(0, 100, 32)]


# -- the papers' data sets ---------------------------------------------------------------------------------------------


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def pickled(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def normalised(images: np.ndarray, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """uint8 [N, C, H, W] -> float32."""
    mean, deviation = (torch.tensor(s).view(-1, 1, 1) for s in statistics)
    return (torch.from_numpy(images).float() / 255 - mean) / deviation


@pytest.mark.parametrize(("name", "batches"), [("cifar10", 5), ("cifar100", 1)])
def test_cifar(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str, batches: int
) -> None:
    # torchvision compares the files with the published ones, by their sums.
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5: Path(path).exists())
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    images = rng.integers(0, 256, (batches + 1, 4, 3, 32, 32), dtype=np.uint8)
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    folder = tmp_path / kind.base_folder
    for (file, _), content in zip(kind.train_list + kind.test_list, images, strict=True):
        pickled(folder / file, {"data": content.reshape(4, -1), key: [0, 1, 2, 3]})
    pickled(folder / kind.meta["filename"], {kind.meta["key"]: ["airplane", "automobile", "bird", "cat"]})

    train, test = load(name, tmp_path)
    assert (len(train), len(test)) == (4 * batches, 4)
    expected = normalised(images[-1], CIFAR_STATISTICS)
    for number, (image, label) in enumerate(Subset(test, range(4))):
        assert label == number
        torch.testing.assert_close(image, expected[number])

    zero = normalised(np.zeros((1, 3, 1, 1), dtype=np.uint8), CIFAR_STATISTICS)[0]
    padded = zero.expand(3, 40, 40).clone()
    padded[:, 4:36, 4:36] = normalised(images[0], CIFAR_STATISTICS)[1]
    crops = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    seen = set()
    for _ in range(32):
        image, label = train[1]
        assert label == 1
        hits = [
            (int(place), mirrored)
            for mirrored in (False, True)
            for place in (crops - (image.flip(-1) if mirrored else image)).abs().amax((1, 2, 3)).lt(1e-5).nonzero()
        ]
        assert len(hits) == 1, "neither a crop nor a mirrored crop"
        seen.update(hits)
    assert len({place for place, _ in seen}) > 16
    assert {mirrored for _, mirrored in seen} == {False, True}


def test_mnist(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = rng.integers(0, 256, (2, 4, 28, 28), dtype=np.uint8)
    for part, content in zip(("train", "t10k"), images, strict=True):
        sizes = np.array([0x803, 4, 28, 28], dtype=">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(sizes + content.tobytes())
        labels = np.array([7, 2, 1, 0], dtype=np.uint8)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, 4], dtype=">i4").tobytes() + labels.tobytes()
        )
    for part, content in zip(load("mnist", tmp_path), images, strict=True):
        assert [label for _, label in Subset(part, range(4))] == [7, 2, 1, 0]
        found = torch.stack([image for image, _ in Subset(part, range(4))])
        torch.testing.assert_close(found, normalised(content[:, None], MNIST_STATISTICS))


def test_imagenet(tmp_path: Path) -> None:
    shade = torch.linspace(0, 1, 300).expand(3, 280, 300)  # from left to right, so that mirrors show
    for part in ("train", "val"):
        for label in ("n01440764", "n01443537"):
            (tmp_path / part / label).mkdir(parents=True)
            to_pil_image(shade).save(tmp_path / part / label / "one.JPEG")
    train, test = load("imagenet", tmp_path)
    assert (len(train), len(test)) == (2, 2)
    assert [label for _, label in Subset(test, range(2))] == [0, 1]

    image, _ = test[0]
    mean, deviation = (torch.tensor(s) for s in IMAGENET_STATISTICS)
    middle = image.mean((1, 2)) * deviation + mean
    torch.testing.assert_close(middle, torch.full((3,), 0.5), atol=0.01, rtol=0)
    assert image.shape == (3, 224, 224)

    crops = [train[0][0] for _ in range(12)]
    assert {crop.shape for crop in crops} == {(3, 224, 224)}
    spread = [float(crop[0, :, -1].mean() - crop[0, :, 0].mean()) for crop in crops]
    assert min(spread) < 0 < max(spread), "never mirrored"
    assert len({round(abs(s), 2) for s in spread}) > 6, "always of one size"


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_1, "),
        (
            "cifar100",
            "cifar-100-python/train, cifar-100-python/test, cifar-100-python/meta, nor folders train and test",
        ),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte, MNIST/raw/train-labels-idx1-ubyte, MNIST/raw/t10k-images"),
        ("imagenet", "train, val in "),
    ],
)
def test_missing_files_are_named(tmp_path: Path, name: str, missing: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{name} is not complete: there is no {missing}.*{tmp_path}'$"):
        load(name, tmp_path)


def test_only_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^imagenet is not complete: there is no val in "):
        load("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("cifar10", [f"cifar-10-batches-py/{n}" for n in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")]),
        ("mnist", [f"MNIST/raw/{p}-{k}-ubyte" for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1")]),
    ],
)
def test_broken_files_are_an_error_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, files: list[str]
) -> None:
    for file in (*files, "cifar-10-batches-py/batches.meta"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("broken")
    with pytest.raises(ValueError, match=r"cannot be read \(.*Error\): its files are broken or not torchvision's"):
        load(name, tmp_path)
    recipe = slimming_mnist if name == "mnist" else slimming_cifar
    with pytest.raises(SystemExit) as stopped:
        recipe.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "cannot be read" in capsys.readouterr().err


def test_other_classes_for_testing_are_named(tmp_path: Path) -> None:
    for folder in ("train/n1", "train/n2", "val/n1", "val/n3"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpeg").touch()
    with pytest.raises(ValueError, match=r"^imagenet: .*train and .*val have other classes: n2, n3$"):
        load("imagenet", tmp_path)


def test_a_file_of_imagenet_that_is_no_image_is_named_before_the_training(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "n1").mkdir(parents=True)
        to_pil_image(torch.zeros(3, 8, 8)).save(tmp_path / part / "n1" / "a.jpeg")
    (tmp_path / "val" / "n1" / "b.jpeg").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"val/n1/b\.jpeg cannot be read as an image: "):
        load("imagenet", tmp_path)


def test_unknown_data_sets(tmp_path: Path) -> None:
    message = "there is no data set 'svhn'. Known: cifar10, cifar100, mnist, tiny_imagenet, imagenet."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load("svhn", tmp_path)
