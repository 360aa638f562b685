"""Prune, save, load in a new process, export, run: twelve real networks give identical outputs on the way.

A network with random weights is pruned to half its MACs; a few weights are changed afterwards, as fine-tuning would.
The file that ``fxprune.save`` writes is loaded in a new process into an instance with other weights: every tensor and
the outputs at another batch size must be the same, bit for bit. There the loaded network is exported, and onnxruntime
compared. The ``.pt2`` file is loaded and run without the class.
"""

from __future__ import annotations

from model_zoo.measuring.roundtrip import NETWORKS, measure
from model_zoo.pages.roundtrip import page
from model_zoo.study import Study, each, passed

STUDY = Study(
    "roundtrip", "12 networks pruned, saved, loaded in a new process, exported and run", lambda _: NETWORKS,
    each(measure), page, doc=__doc__, finished=passed, open=True, strict=True,
)  # fmt: skip
