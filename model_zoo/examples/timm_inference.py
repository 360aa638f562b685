"""Labels for a folder of images with a network of timm, as a CSV file. Three lines make it run a pruned network too.

    fxprune prune timm:resnet50 --weights resnet50.safetensors --flops 0.5 --save half.safetensors
    python -m model_zoo.examples.timm_inference photos/ --model resnet50 --pruned half.safetensors

The lines marked ``# fxprune`` are all that was added.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence

import timm
import timm.data
import torch

import fxprune  # fxprune


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="label the images in a folder")
    parser.add_argument("data", help="folder of images, or of folders of images")
    parser.add_argument("--model", default="resnet50", help="name of an architecture of timm")
    parser.add_argument("--checkpoint", help="its weights (.pth, .safetensors)")
    parser.add_argument("--num-classes", type=int, help="where it is not the architecture's own number")
    parser.add_argument("--pruned", help="what fxprune.save wrote of it")  # fxprune
    parser.add_argument("--results", default="results.csv", help="file to write")
    parser.add_argument("--top", type=int, default=5, help="classes to name per image")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    model = timm.create_model(args.model, num_classes=args.num_classes, checkpoint_path=args.checkpoint)
    config = timm.data.resolve_model_data_config(model)
    model = fxprune.load(args.pruned, model) if args.pruned else model  # fxprune
    model.eval().to(args.device)

    dataset = timm.data.create_dataset("", root=args.data)
    loader = timm.data.create_loader(
        dataset,
        **config,
        batch_size=args.batch_size,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        use_prefetcher=False,
    )
    found = []
    with torch.inference_mode():
        for images, _ in loader:
            found.append(model(images.to(args.device)).softmax(1).topk(args.top))
    classes = torch.cat([top.indices for top in found]).tolist()
    shares = torch.cat([top.values for top in found]).tolist()

    with open(args.results, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *(f"{what} {rank + 1}" for rank in range(args.top) for what in ("class", "share"))])
        for name, labels, values in zip(dataset.filenames(), classes, shares, strict=True):
            writer.writerow([name, *(cell for pair in zip(labels, values, strict=True) for cell in pair)])
    print(f"{len(dataset)} images: {args.results}")


if __name__ == "__main__":
    main()
