"""Accuracy against milliseconds: networks cut to several budgets, refitted without labels, and timed on onnxruntime.

The networks are those of ``model_zoo/trained.py`` that classify, and ``--data`` is the folder that is told of there.
"""

from __future__ import annotations

from functools import lru_cache

from model_zoo.measuring.frontier import DENSE, SERIES, Clocks, Job, measured
from model_zoo.measuring.reconstruction import METHODS, PEER
from model_zoo.pages.frontier import page, plot
from model_zoo.peers import is_here
from model_zoo.records import Record
from model_zoo.study import Add, Measure, Options, Study
from model_zoo.trained import NETWORKS, PANELS, Trained, add_folder, without_folder


def jobs(options: Options) -> list[Job]:
    """Of every network the dense one first; the peer's have one method."""
    found = []
    for case in options.case:
        ratios = options.ratio or NETWORKS[case][1]
        found.append(Job(case, DENSE, DENSE, 1.0, 0))
        for seed in options.seeds:
            for series in options.series:
                methods = [PEER] if SERIES[series].peer else options.method
                found += [Job(case, series, method, ratio, seed) for method in methods for ratio in ratios]
    return found


def worker(options: Options) -> Measure:
    @lru_cache(maxsize=1)
    def made(name: str) -> tuple[Trained, Clocks]:
        case = NETWORKS[name][0](options.data)
        return case, Clocks(case)

    return lambda job: measured(job, *made(job.case))


def told(record: Record) -> str:
    if record.failures:
        return f"{record.name}: {record.failures}"
    f = record.figures
    times = ", ".join(f"{f['dense_ms'][batch]:.2f} -> {ms:.2f}" for batch, ms in f["ms"].items())
    return f"{record.name}: {f['quality']:.2f} {f['unit']}, MACs {f['macs_ratio']:.3f}, ms {times}"


def options(add: Add) -> None:
    cases = [case for panel in PANELS.values() for case in panel]
    here = [name for name, series in SERIES.items() if not series.peer or is_here()]
    add_folder(add)
    add("--case", nargs="+", choices=cases, default=cases)
    add("--series", nargs="+", choices=SERIES, default=here, help=f"{PEER} only where it is installed")
    add("--method", nargs="+", choices=[m for m in METHODS if m != PEER], default=["obs"])
    add("--ratio", nargs="+", type=float, help="instead of the case's own")
    add("--seeds", nargs="+", type=int, default=[0], help="of calibration data")


STUDY = Study(
    "frontier", "accuracy of refitted networks against their milliseconds, beside Torch-Pruning and dense networks",
    jobs, worker, page, plot, options, needs=("--data DIR: images and weights",), doc=__doc__,
    check=without_folder, told=told,
)  # fmt: skip
