"""What a refit owes to its data, its ridge, its order, its criterion and its allocation: one made otherwise at a time.

The networks are those of ``model_zoo/trained.py``, and ``--data`` is the folder that is told of there.
"""

from __future__ import annotations

from model_zoo.measuring.ablation import VARIANTS, Job, measured
from model_zoo.pages.ablation import page
from model_zoo.records import Record
from model_zoo.study import Add, Measure, Options, Study
from model_zoo.trained import NETWORKS, add_folder, opening, without_folder


def jobs(options: Options) -> list[Job]:
    return [
        Job(case, variant, ratio, seed)
        for seed in options.seeds
        for case in options.case
        for ratio in options.ratio
        for variant in options.variant
    ]


def worker(options: Options) -> Measure:
    opened = opening(options.data)
    return lambda job: measured(job, *opened(job.case))


def told(record: Record) -> str:
    found = record.figures
    return f"{record.name}: refitted {found['refitted']:.3f} of {found['dense']:.3f} {found['unit']}"


def options(add: Add) -> None:
    add_folder(add)
    add("--case", nargs="+", choices=NETWORKS, default=["dncnn-set12", "vdsr-x2", "minilm"])
    add("--variant", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    add("--ratio", nargs="+", type=float, default=[0.5], help="MACs that stay")
    add("--seeds", nargs="+", type=int, default=[0], help="of calibration data")


STUDY = Study(
    "ablation", "what a refit owes to its data, ridge, order, criterion and allocation",
    jobs, worker, page, None, options, needs=("--data DIR: images and weights",), doc=__doc__,
    check=without_folder, told=told, jobs=True,
)  # fmt: skip
