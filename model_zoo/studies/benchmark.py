"""Seconds from a model to its pruned model: fxprune and Torch-Pruning on the same networks, in turn.

Every network has a process of its own, in which both run in turn on fresh copies of it, on one thread. Given are the
medians, of the time on the clock and of the processor time of the process, which what else runs on the machine disturbs
less. Torch-Pruning prunes 30 % of the channels by their Euclidean norm over the whole network (building its graph and
pruning once, in place); fxprune is then given the MACs that it reached as its budget, with ``method="l2"``,
``round_to=1`` and ``verify=False``: what the verification adds is a column of its own. Where Torch-Pruning's network
does not run, or ``--timeout`` ends it, fxprune's budget is half of the MACs.

*Floor* is what cannot be avoided: one recorded run without data (on the meta device) and a copy of the weights that
stay. *Forward* is one run of the dense network on the processor. *Memory* is the most that the process held above what
it held before. *MACs* are those of the results, as counted by ``fxprune.analyze``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from model_zoo.measuring.benchmark import Bench
from model_zoo.measuring.child import Found, Step, listen, tell
from model_zoo.pages.benchmark import page, plot
from model_zoo.records import Record
from model_zoo.study import Add, Study, each, rules

NETWORKS = [
    f"timm:{name}"
    for name in """
    resnet50 resnet152 densenet201 mobilenetv3_large_100 efficientnet_b4 convnext_base inception_v4 hrnet_w32
    resnest50d vgg16_bn
    """.split()
]
CHANNELS = 0.3  # the share that the peer prunes; about half of the MACs go
START = 120  # seconds for a process to load a network


def _work(spec: str, rounds: int, peer: bool, latency: bool, sender: Connection) -> None:
    """In a new process: everything that is done with a network, one after the other."""
    bench = Bench(spec, CHANNELS)
    first: list[Step] = [("started", dict), ("peer, first", bench.peer), ("ours, first", bench.ours)]
    a_round: list[Step]
    a_round = [("ours", bench.ours), ("peer", bench.peer), ("forward", bench.forward), ("floor", bench.floor)]
    last: list[Step] = [("verified", partial(bench.ours, verify=True)), ("latency", bench.latency)]
    wanted = {"peer, first": peer, "peer": peer, "latency": latency}
    tell(sender, [step for step in (*first, *rounds * a_round, *last) if wanted.get(step[0], True)])


def measured(
    spec: str, rounds: int, timeout: float, latency: bool = False, work: Callable[..., None] = _work
) -> Record:
    """One network. A peer that takes longer than ``timeout`` seconds is ended, and ours goes on without it."""
    found: Found = defaultdict(list)
    ended = not listen(work, (spec, rounds, True, latency), START, timeout, found)
    if ended and (left := rounds - len(found["ours"])) > 0:
        listen(work, (spec, left, False, False), START, timeout, found)
    figures: dict[str, Any] = {"channels": CHANNELS}
    for what in ("ours", "peer", "forward", "floor"):
        for key in ("s", "cpu_s"):
            if taken := [f[key] for f in found[what] if key in f]:
                figures[f"{what}_{key}"] = median(taken)
        # later runs are given memory that the process has already
        if held := [f["mib"] for f in (*found[what], *found[f"{what}, first"]) if "mib" in f]:
            figures[f"{what}_mib"] = max(held)
    for what in ("ours", "peer"):
        said = [{}, *(found[what] or found[f"{what}, first"])][-1]
        figures |= {f"{what}_{key}": said[key] for key in ("macs", "dense_macs", "fails", "stages") if key in said}
    once = {what: found[what][0] if found[what] else {} for what in ("verified", "ours, first", "latency")}
    figures |= {"peer_fails": f"no end within {timeout:g} s"} if ended else {}
    figures |= {"runs": len(found["ours"]), "verified_s": once["verified"].get("s")}
    return Record(spec, figures | {"first_s": once["ours, first"].get("s"), **once["latency"]})


def _options(add: Add) -> None:
    add("--rounds", type=int, default=5, help="runs of each, in turn (default: 5)")
    add("--timeout", type=float, default=300, help="seconds for one run (default: 300)")
    add("--latency", action="store_true", help="onnxruntime's latency of both results as well, which is slow")


STUDY = Study(
    "benchmark", "seconds and memory from a model to its pruned model, beside Torch-Pruning", lambda _: NETWORKS,
    each(lambda spec, options: measured(spec, options.rounds, options.timeout, options.latency)), page, plot, _options,
    needs=("torch-pruning",), doc=__doc__, rules=rules(__doc__), open=True,
)  # fmt: skip
