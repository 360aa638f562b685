"""A YOLO of ultralytics pruned, trained by ultralytics' own trainer, validated, exported to ONNX and run.

    python -m model_zoo.examples.yolo data.yaml --model best.pt --size 640 --epochs 50 --out runs/half
    python -m model_zoo.examples.yolo --task pose --out runs/pose

``data.yaml`` is a data set as ultralytics has them. Without one a few images are drawn, to see all of it in minutes:
boxes in two colours, to be found by ``--task detect``, ``segment``, ``pose`` (their corners) or ``obb``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

import fxprune
from fxprune.errors import check_installed
from fxprune.recording.inputs import tensors_of

NAMES = {
    "detect": "yolo11n.yaml",
    "segment": "yolo11n-seg.yaml",
    "pose": "yolo11n-pose.yaml",
    "obb": "yolo11n-obb.yaml",
}
COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="prune, train, validate and export a YOLO of ultralytics")
    parser.add_argument("data", nargs="?", type=Path, help="data set, as ultralytics has them; drawn if not given")
    parser.add_argument("--model", help="configuration or weights (default: the smallest YOLO11 of the task)")
    parser.add_argument("--task", choices=NAMES, default="detect", help="of what is drawn")
    parser.add_argument("--flops", type=float, default=0.6, help="what stays of the multiply-accumulates")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, help="side of the images, a multiple of 32")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    args = parser.parse_args(argv)
    check_installed("ultralytics", "ultralytics")
    from ultralytics import YOLO

    out = args.out.absolute()
    data = args.data or drawn(out / "drawn", args.task, args.size)
    yolo = YOLO(args.model or NAMES[args.task])
    how = {"data": str(data), "imgsz": args.size, "workers": args.workers, "device": args.device, "plots": False}
    yolo.train(trainer=pruning(yolo, args.flops), epochs=args.epochs, batch=args.batch_size, project=str(out), **how)
    metrics = yolo.val(project=str(out), **how).results_dict
    model = yolo.model.cpu().float().eval()
    fxprune.save_pretrained(model, out / "pruned", accuracy={name: float(value) for name, value in metrics.items()})
    path = yolo.export(format="onnx", imgsz=args.size, dynamic=True, device="cpu")
    for size in ((args.size, args.size), (args.size, args.size + 32)):
        print(
            f"{Path(path).name} at {size[0]} x {size[1]}: relative error {error(path, model, size):.1e} against torch"
        )


def pruning(yolo: Any, flops: float) -> type:
    """The trainer of its task, which prunes the network that it makes: its head has the classes of the data by then."""

    class PrunedTrainer(yolo.task_map[yolo.task]["trainer"]):  # type: ignore[misc]
        def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
            dense = super().get_model(cfg, weights, verbose)
            for layer in dense.modules():
                if hasattr(layer, "forward_split"):  # what ultralytics' export calls instead of forward
                    layer.forward = layer.forward_split
            example = torch.rand(1, 3, self.args.imgsz, self.args.imgsz)
            small = fxprune.prune(dense, example, flops=flops, for_class=True, progress=False)
            print(small.meta["fxprune"])
            return fxprune.into(dense, small)

    return PrunedTrainer


@torch.no_grad()
def error(path: str, model: nn.Module, size: tuple[int, int]) -> float:
    """The largest difference of the boxes of two images, relative to the largest number."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.rand(2, 3, *size)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    expected = tensors_of(model(x))[0]
    return float((found - expected).abs().max() / expected.abs().max())


def drawn(folder: Path, task: str, size: int, count: int = 8) -> Path:
    """Images of boxes with what is to be found, for training and for validation; the file that tells of them."""
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, lines = Image.new("RGB", (size, size), (90, 90, 90)), []
            for label, colour in enumerate(COLOURS.values()):
                left, top, wide, high = (int(n) for n in draw.integers(size // 6, size // 2, 4))
                ImageDraw.Draw(image).rectangle((left, top, left + wide, top + high), fill=colour)
                lines.append(" ".join(map(str, (label, *told(task, size, left, top, wide, high)))))
            image.save(folder / f"images/{part}/{number}.png")
            (folder / f"labels/{part}/{number}.txt").write_text("\n".join(lines))
    data: dict[str, Any] = {"path": str(folder), "train": "images/train", "val": "images/val", "names": [*COLOURS]}
    if task == "pose":
        data |= {"kpt_shape": [4, 3], "flip_idx": [1, 0, 3, 2]}
    (folder / "data.yaml").write_text(json.dumps(data))
    return folder / "data.yaml"


def told(task: str, size: int, left: int, top: int, wide: int, high: int) -> list[float]:
    """What a line of labels says of a box, after its class."""
    corners = [(left, top), (left + wide, top), (left + wide, top + high), (left, top + high)]
    box = [(left + wide / 2) / size, (top + high / 2) / size, wide / size, high / size]
    if task == "detect":
        return box
    if task == "pose":
        return [*box, *(value for x, y in corners for value in (x / size, y / size, 2))]
    return [value / size for corner in corners for value in corner]


if __name__ == "__main__":
    main()
