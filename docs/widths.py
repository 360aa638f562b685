"""Draw ``widths.svg``, the picture of README.md: ``python docs/widths.py`` from the root, in half a minute.

The weights are random, from a fixed seed, and the multiple of channels is given: the picture is the same everywhere.
"""

import os

import timm
import torch
from matplotlib import rc_context

import fxprune

os.environ["SOURCE_DATE_EPOCH"] = "0"  # matplotlib would write today's date into the file
torch.manual_seed(0)
small = fxprune.prune(timm.create_model("resnet50"), flops=0.5, round_to=16)
with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fxprune", "font.family": "sans-serif"}):
    small.meta["fxprune"].plot("docs/widths.svg")
