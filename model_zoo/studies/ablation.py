"""What a refit owes to its data, its ridge, its order, its criterion and its allocation: one made otherwise at a time.

The networks are those of ``model_zoo/trained.py``, and ``--data`` is the folder that is told of there.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from model_zoo.measuring.ablation import VARIANTS, Job, measured
from model_zoo.pages.ablation import page
from model_zoo.records import Record
from model_zoo.study import Add, Measure, Options, Study
from model_zoo.trained import NETWORKS, Trained


def jobs(options: Options) -> list[Job]:
    return [
        Job(case, variant, ratio, seed)
        for seed in options.seeds
        for case in options.case
        for ratio in options.ratio
        for variant in options.variant
    ]


def worker(options: Options) -> Measure:
    @lru_cache(maxsize=1)
    def made(name: str) -> tuple[Trained, float]:
        case = NETWORKS[name][0](options.data)
        return case, case.quality(case.model)

    return lambda job: measured(job, *made(job.case))


def told(record: Record) -> str:
    found = record.figures
    return f"{record.name}: refitted {found['refitted']:.3f} of {found['dense']:.3f} {found['unit']}"


def options(add: Add) -> None:
    add("--data", type=Path, metavar="DIR", help="the folder")
    add("--case", nargs="+", choices=NETWORKS, default=["dncnn-set12", "vdsr-x2", "minilm"])
    add("--variant", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    add("--ratio", nargs="+", type=float, default=[0.5], help="MACs that stay")
    add("--seeds", nargs="+", type=int, default=[0], help="of calibration data")


STUDY = Study(
    "ablation", "what a refit owes to its data, ridge, order, criterion and allocation",
    jobs, worker, page, None, options, needs=("--data DIR: images and weights",), doc=__doc__,
    check=lambda options: "" if options.data else "give --data DIR, with images and weights", told=told, jobs=True,
)  # fmt: skip
