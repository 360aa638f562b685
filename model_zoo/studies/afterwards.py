"""Does reconstruction still pay after training? The same cuts, brought back in some way or in none, trained on.

The networks are those of ``model_zoo/trained.py`` on CIFAR-10, and ``--data`` is the folder that is told of there.
"""

from __future__ import annotations

from functools import lru_cache

from model_zoo.measuring.afterwards import DENSE, STARTS, Job, Made, measured
from model_zoo.measuring.reconstruction import PEER
from model_zoo.pages.afterwards import page, plot
from model_zoo.records import Record
from model_zoo.study import Add, Measure, Options, Study
from model_zoo.trained import PANELS, add_folder, without_folder


def jobs(options: Options) -> list[Job]:
    """One seed of all, then the next; the dense network first."""
    found = []
    for seed in options.seeds:
        for case in options.case:
            for images in options.images:
                found.append(Job(case, DENSE, DENSE, 1.0, images, seed))
                for ratio in options.ratio:
                    for method in options.method:
                        starts = [start for start in STARTS if method != PEER or start != "refitted"]
                        found += [Job(case, method, start, ratio, images, seed) for start in starts]
    return found


def worker(options: Options) -> Measure:
    made = lru_cache(maxsize=1)(lambda name: Made(name, options))
    return lambda job: measured(job, made(job.case))


def told(record: Record) -> str:
    found = ", ".join(f"{key} {record.figures[key]:.2f}" for key in ("before", "after") if key in record.figures)
    return f"{record.name}: {found} {record.figures['unit']}, {sum(record.seconds.values()):.0f} s"


def options(add: Add) -> None:
    add_folder(add)
    add("--case", nargs="+", choices=PANELS["CIFAR-10"], default=["resnet20"])
    add("--method", nargs="+", choices=("l2", "taylor", "obs", PEER), default=["l2", "obs"])
    add("--ratio", nargs="+", type=float, default=[0.5, 0.3], help="MACs that stay")
    add("--images", nargs="+", type=int, default=[6400, 25600], metavar="N", help="to train on, in all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of calibration data and of the training")


STUDY = Study(
    "afterwards", "whether reconstruction still pays after training, at equal numbers of images",
    jobs, worker, page, plot, options, needs=("--data DIR: images and weights",), doc=__doc__,
    check=without_folder, told=told, jobs=True,
)  # fmt: skip
