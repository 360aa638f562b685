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

from model_zoo.measuring.benchmark import measured
from model_zoo.pages.benchmark import page, plot
from model_zoo.study import Add, Study, each, rules

NETWORKS = [
    f"timm:{name}"
    for name in """
    resnet50 resnet152 densenet201 mobilenetv3_large_100 efficientnet_b4 convnext_base inception_v4 hrnet_w32
    resnest50d vgg16_bn
    """.split()
]


def _options(add: Add) -> None:
    add("--rounds", type=int, default=5, help="runs of each, in turn (default: 5)")
    add("--timeout", type=float, default=300, help="seconds for one run (default: 300)")
    add("--latency", action="store_true", help="onnxruntime's latency of both results as well, which is slow")


STUDY = Study(
    "benchmark", "seconds and memory from a model to its pruned model, beside Torch-Pruning", lambda _: NETWORKS,
    each(lambda spec, options: measured(spec, options.rounds, options.timeout, options.latency)), page, plot, _options,
    needs=("torch-pruning",), doc=__doc__, rules=rules(__doc__), open=True,
)  # fmt: skip
