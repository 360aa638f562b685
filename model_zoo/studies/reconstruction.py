"""Pruned networks refitted without labels: what comes back of the dense network's quality.

The networks are those of ``model_zoo/trained.py``, and ``--data`` is the folder that is told of there.
"""

from __future__ import annotations

from typing import Any

import torch

from model_zoo.measuring.reconstruction import METHODS, PEER, QUALITIES, Job, measured
from model_zoo.pages.reconstruction import page, plot
from model_zoo.peers import is_here
from model_zoo.records import Record
from model_zoo.study import Add, Measure, Options, Study
from model_zoo.trained import NETWORKS, add_folder, opening, without_folder


def jobs(options: Options) -> list[Job]:
    """One seed of all, then the next."""
    return [
        Job(name, method, ratio, seed)
        for seed in options.seeds
        for name in options.case
        for ratio in options.ratio or NETWORKS[name][1]
        for method in options.method
    ]


def worker(options: Options) -> Measure:
    opened = opening(options.data, options.device)
    return lambda job: measured(job, *opened(job.case), options.tune)


def told(record: Record) -> str:
    found = ", ".join(f"{key} {record.figures[key]:.2f}" for key in QUALITIES if key in record.figures)
    return f"{record.name}: {found} {record.figures['unit']}, {sum(record.seconds.values()):.0f} s"


def options(add: Add) -> None:
    here = [method for method in METHODS if method != PEER or is_here()]
    add_folder(add)
    add("--case", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    add("--method", nargs="+", choices=METHODS, default=here, help=f"{PEER} only where it is installed")
    add("--ratio", nargs="+", type=float, help="instead of the case's own")
    add("--tune", type=int, default=400, metavar="N", help="steps of tuning after the refit; 0: none")
    add("--device", default="cpu", help="of torch (default: cpu)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of calibration data")


def head(options: Options) -> dict[str, Any]:
    cuda = options.device.startswith("cuda")
    return {"device": torch.cuda.get_device_name()} if cuda else {}


STUDY = Study(
    "reconstruction", "what refitting a pruned network gives back, on real images and trained weights, without labels",
    jobs, worker, page, plot, options, needs=("--data DIR: images and weights",), doc=__doc__,
    check=without_folder, head=head, told=told, jobs=True,
)  # fmt: skip
