"""What the hypernetworks of DHP take in memory and time.

Every line is a training with SGD and momentum in a process of its
own: the network as it is, with hypernetworks (``dhp``), and with hypernetworks whose intermediate tensors are kept for
the backward pass instead of being computed anew (``dhp, kept``). One thread, float32, on the CPU.

Columns: parameters that are trained; what the forward pass keeps for the backward pass, parameters left out; the peak
of resident memory above what the process holds before there is a network, so with gradients and momentum; CPU time of a
step, the median.
"""

from __future__ import annotations

from model_zoo.measuring.dhp_overhead import NETWORKS, WAYS, Case, measure
from model_zoo.pages.dhp_overhead import page
from model_zoo.records import Layout
from model_zoo.study import Study, each, rules

STUDY = Study(
    "dhp_overhead", "what the hypernetworks of DHP take in memory and time",
    lambda _: [Case(network, way) for network in NETWORKS for way in WAYS], each(measure), page,
    options=lambda add: add("--steps", type=int, default=3, help="the median of so many is shown"), doc=__doc__,
    rules=rules(__doc__),
    apart=True, layout=Layout(named_by=("network", "way")),
)  # fmt: skip
