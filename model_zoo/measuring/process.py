"""What a whole process takes: to import the package, or to prune what fills the machine."""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from typing import Any

import torch
from torch import nn

import fxprune
from model_zoo.measuring.meter import machine_gib, peak_gib, spent
from model_zoo.networks.growing import perceptron

INTERPRETERS = 5


def consuming(gib: str) -> dict[str, Any]:
    """The machine's memory, what the dense weights take, and the most that the process held while they were pruned."""
    model, given = perceptron(float(gib)).eval(), fxprune.Options(consume=True)
    found = {"weights_gib": _weights(model), "before_gib": peak_gib(), "machine_gib": machine_gib()}
    how: dict[str, Any] = {"params": 0.5, "round_to": 1, "verify": False, "progress": False, "options": given}
    pruned, seconds = spent(lambda: fxprune.prune(model, torch.zeros(1, 4096), **how))
    return {"s": seconds, "pruned_gib": _weights(pruned), **found}


def _weights(model: nn.Module) -> float:
    return sum(p.nbytes for p in model.parameters()) / 2**30


def importing(name: str) -> dict[str, Any]:
    """Seconds of a new interpreter, the median of several."""
    code = (
        f"import time, torch; begun = time.process_time(); import fxprune; {name}; print(time.process_time() - begun)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(INTERPRETERS)]
    return {"import": median(float(run.stdout) for run in runs)}
