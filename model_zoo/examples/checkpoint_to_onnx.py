"""From a checkpoint file to a folder that ``serve.py`` serves: load, prune, fine-tune, save, export.

    python -m model_zoo.examples.checkpoint_to_onnx flowers/ --weights resnet50.safetensors --out served/
    python -m model_zoo.examples.serve served/ --port 8000
    curl --data-binary @rose.jpg localhost:8000

``flowers/`` has folders ``train`` and ``val``, each with a folder of images per class; the checkpoint is of a network
for these classes. In ``served/`` will be:

- ``model.onnx``: compared with torch in onnxruntime;
- ``preprocessing.json``: how an image becomes its input, and the names of the classes;
- ``pruned.safetensors``: to go on with in Python, by ``fxprune.load``;
- ``report.html``: what was cut.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import fxprune


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="prune a trained network, fine-tune it, write what a server needs")
    parser.add_argument("data", type=Path, help="folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("--model", default="resnet50", help="name of an architecture of timm")
    parser.add_argument("--weights", required=True, help="its state_dict (.pth, .safetensors)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--flops", type=float, default=0.5, help="multiply-accumulates that stay")
    parser.add_argument("--round-to", type=int, default=8, help="keep multiples of so many channels")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    # 1. The checkpoint, into an ordinary network.
    classes = datasets.ImageFolder(args.data / "train").classes
    dense = timm.create_model(args.model, num_classes=len(classes), checkpoint_path=args.weights).to(args.device)
    recipe = preprocessing_of(dense, classes)
    train, val = loaders(args, recipe)
    print(f"dense: {accuracy(dense, val, args.device):.1%}")

    # 2. Prune.
    small = fxprune.prune(dense, flops=args.flops, round_to=args.round_to)
    report = small.meta["fxprune"]
    print(
        f"pruned to {report.macs_after / report.macs_before:.1%} of the MACs: {accuracy(small, val, args.device):.1%}"
    )

    # 3. Fine-tune, with the dense network as teacher.
    optimizer = torch.optim.SGD(small.parameters(), args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    dense.eval()
    for epoch in range(args.epochs):
        small.train()
        for images, labels in train:
            images, labels = images.to(args.device), labels.to(args.device)
            with torch.no_grad():
                teacher = dense(images)
            loss = fxprune.distill_loss(small(images), teacher, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch + 1}: {accuracy(small, val, args.device):.1%}")
    small.eval()

    # 4. Save; 5. export, which compares with onnxruntime; and write down what happened.
    fxprune.save(small, args.out / "pruned.safetensors")
    validation = fxprune.export(small, args.out / "model.onnx")
    print(validation)
    report.to_html(args.out / "report.html", validation)
    (args.out / "preprocessing.json").write_text(json.dumps(recipe, indent=2))


def preprocessing_of(model: nn.Module, classes: Sequence[str]) -> dict[str, Any]:
    """How the network wants its images: size of the square, of the image around it, and what is subtracted."""
    config = timm.data.resolve_model_data_config(model)
    size = config["input_size"][-1]
    return {
        "size": size,
        "resize": round(size / config["crop_pct"]),
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "classes": list(classes),
    }


def centred(recipe: dict[str, Any]) -> transforms.Compose:
    """What a network is measured and served with; ``serve.py`` does the same without torch."""
    return transforms.Compose([
        transforms.Resize(recipe["resize"], transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(recipe["size"]),
        transforms.ToTensor(),
        transforms.Normalize(recipe["mean"], recipe["std"]),
    ])  # fmt: skip


def loaders(args: argparse.Namespace, recipe: dict[str, Any]) -> tuple[DataLoader[Any], DataLoader[Any]]:
    augmented = transforms.Compose([
        transforms.RandomResizedCrop(recipe["size"], interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(recipe["mean"], recipe["std"]),
    ])  # fmt: skip
    train = datasets.ImageFolder(args.data / "train", augmented)
    val = datasets.ImageFolder(args.data / "val", centred(recipe))
    return (
        DataLoader(train, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True),
        DataLoader(val, args.batch_size, num_workers=args.workers),
    )


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Iterable[Any], device: str) -> float:
    model.eval()
    right = [model(images.to(device)).argmax(1).cpu() == labels for images, labels in loader]
    return float(torch.cat(right).float().mean())


if __name__ == "__main__":
    main()
