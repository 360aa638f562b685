"""Pruned checkpoints: trained networks cut, refitted without labels, and written as folders with plan and card.

The networks are those of ``model_zoo/trained.py``, and ``--data`` is the folder that is told of there. Each is pruned
to a share of its MACs by ``obs``, channels in multiples of 8, and refitted on a few hundred images or sentences without
labels (``--tune``: and its scales and shifts tuned for so many steps); nothing is trained. ``fxprune.save_pretrained``
writes a folder beside the result file, and a new process reads it with ``fxprune.load_pretrained`` into an instance of
other weights. MB: of the dense weights, and of the file with the pruned ones. Milliseconds: medians on onnxruntime, the
processor, one thread, one input, dense and pruned in turn; both are too long where the machine has other work, too.

Checks: "prune", "onnxruntime" and "folder" are done; "budget": no more MACs than asked for; "loaded": in the new
process the quality is the same, to the last digit.
"""

from __future__ import annotations

from pathlib import Path

from model_zoo.measuring.checkpoints import CHECKPOINTS, Fitting, Job, loaded, make_of, written
from model_zoo.pages.checkpoints import page
from model_zoo.records import Record
from model_zoo.study import Add, Measure, Options, Study, passed, rules
from model_zoo.trained import NETWORKS, add_folder, opening, without_folder

BUDGETS = 2  # of each network's, the largest


def jobs(options: Options) -> list[Job]:
    return [Job(name, ratio) for name in options.case for ratio in options.ratio or NETWORKS[name][1][:BUDGETS]]


def worker(options: Options) -> Measure:
    opened, how = opening(options.data), Fitting(options.round_to, options.tune, options.seed)

    def measured(job: Job) -> Record:
        folder: Path = options.out.with_suffix("") / job.folder
        record = written(job, how, *opened(job.case), folder)
        if not record.failures:
            loaded(record, make_of(job), options.data, folder, options.threads)
        return record

    return measured


def told(record: Record) -> str:
    f = record.figures
    return f"{record.name}: {f['dense']:.4g} -> {f.get('quality', 0):.4g} {f['unit']}, {record.failures or 'ok'}"


def options(add: Add) -> None:
    add_folder(add)
    add("--case", nargs="+", choices=CHECKPOINTS, default=[*CHECKPOINTS])
    add("--ratio", nargs="+", type=float, help=f"of the MACs, instead of {BUDGETS} of the network's own")
    add("--round-to", type=int, default=8, metavar="N", help="channels in multiples of this (default: 8)")
    add("--tune", type=int, default=0, metavar="N", help="steps of tuning after the refit (default: none)")
    add("--seed", type=int, default=0, help="of calibration data")


STUDY = Study(
    "checkpoints", "trained networks pruned and refitted, as folders with plan and card", jobs, worker, page,
    options=options, needs=("--data DIR: images and weights",), doc=__doc__, rules=rules(__doc__), check=without_folder,
    finished=passed, strict=True, told=told,
)  # fmt: skip
