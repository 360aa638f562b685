"""A network of torchvision fine-tuned on a folder of images. Three lines make it fine-tune a pruned one instead.

    python -m model_zoo.examples.torchvision_finetuning flowers/ --model resnet50 --weights resnet50.pth

``flowers/`` has folders ``train`` and ``val``, each with a folder of images per class. The lines marked ``# fxprune``
are all that was added: between the weights and the optimizer, everything else trains and measures the smaller network.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

import fxprune  # fxprune

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="fine-tune a network on a folder of images")
    parser.add_argument("data", type=Path, help="folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("--model", default="resnet50", help="name of an architecture of torchvision")
    parser.add_argument("--weights", required=True, help="its state_dict, for as many classes as the folder has or not")
    parser.add_argument("--out", type=Path, default=Path("fine-tuned.pth"), help="file to write")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augmented = [transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip()]
    centred = [transforms.Resize(args.size * 8 // 7), transforms.CenterCrop(args.size)]
    train = datasets.ImageFolder(args.data / "train", transforms.Compose([*augmented, *normalise]))
    val = datasets.ImageFolder(args.data / "val", transforms.Compose([*centred, *normalise]))
    loader = DataLoader(train, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True)
    held = DataLoader(val, args.batch_size, num_workers=args.workers)

    model = models.get_model(args.model, weights=None, num_classes=len(train.classes))
    put_in(model, torch.load(args.weights, map_location="cpu", weights_only=True))
    model = fxprune.prune(model, torch.randn(1, 3, args.size, args.size), flops=0.5)  # fxprune
    model.to(args.device)

    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in range(args.epochs):
        model.train()
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(args.device)), labels.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch + 1}: {accuracy(model, held, args.device):.1%} of {len(val)} images")
    torch.save(model.state_dict(), args.out)
    fxprune.save(model, args.out.with_suffix(".safetensors"))  # fxprune


def put_in(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """The weights that fit; those of a classifier for other classes do not."""
    own = model.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    print(f"{len(fitting)} of {len(own)} tensors from the checkpoint")
    model.load_state_dict(fitting, strict=False)


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Iterable[tuple[torch.Tensor, torch.Tensor]], device: str) -> float:
    model.eval()
    right = [model(images.to(device)).argmax(1).cpu() == labels for images, labels in loader]
    return float(torch.cat(right).float().mean())


if __name__ == "__main__":
    main()
