"""Prune, save, load in a new process, export, run: twelve real networks give identical outputs on the way.

A network with random weights is pruned to half its MACs; a few weights are changed afterwards, as fine-tuning would.
The file that ``fxprune.save`` writes is loaded in a new process into an instance with other weights: every tensor and
the outputs at another batch size must be the same, bit for bit. There the loaded network is exported, and onnxruntime
compared. The ``.pt2`` file is loaded and run without the class.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from functools import partial
from pathlib import Path

from model_zoo.measuring.roundtrip import read, write
from model_zoo.pages.roundtrip import page
from model_zoo.records import Record, stage
from model_zoo.study import Options, Study, each, passed

NETWORKS = (
    *(
        f"timm:{name}"
        for name in """
        resnet50 resnext50_32x4d densenet121 efficientnet_b0 mobilenetv3_large_100 regnety_008 convnext_tiny
        vit_small_patch16_224 swin_tiny_patch4_window7_224 mobilevit_s
        """.split()
    ),
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:deeplabv3_resnet50",
)
TIMEOUT = 1800  # seconds


def measure(spec: str, options: Options) -> Record:
    """The whole way of one network; never raises."""
    record = Record(spec)
    with tempfile.TemporaryDirectory() as name:
        with stage(record, "prune and save"):
            write(spec, Path(name), record)
        if not record.failures:
            with stage(record, "new process"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply_async(read, (spec, Path(name), options.threads)).get(TIMEOUT)
                record.figures |= found.figures
                record.checks |= found.checks
                record.seconds |= found.seconds
    return record


STUDY = Study(
    "roundtrip", "12 networks pruned, saved, loaded in a new process, exported and run", lambda _: NETWORKS,
    each(measure), partial(page, wanted=NETWORKS), doc=__doc__, finished=passed, open=True, strict=True,
)  # fmt: skip
