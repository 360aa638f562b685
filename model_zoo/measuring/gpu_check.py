"""Where things are measured: a device that torch and onnxruntime both work on; beside others, or alone."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fxprune
from fxprune.deploy.runtime import CUDA
from fxprune.errors import FxpruneError


@dataclass(frozen=True)
class Place:
    """Where to check. ``device``: of torch; ``provider``: of onnxruntime, on the same device."""

    device: str = "cuda"
    provider: str = CUDA

    def why_not(self) -> str:
        """Why nothing can be checked here, or ""."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA device"
        try:
            with tempfile.TemporaryDirectory() as folder:
                given = torch.randn(1, 4, device=self.device)
                fxprune.export(nn.Linear(4, 4).to(self.device), Path(folder) / "a.onnx", given, provider=self.provider)
        except FxpruneError as error:
            return str(error)
        return ""

    def described(self) -> dict[str, str]:
        """The device, by the name that its maker gave it."""
        if self.device != "cuda":
            return {"device": self.device, "provider": self.provider}
        return {"device": torch.cuda.get_device_name(), "provider": self.provider, "cuda": str(torch.version.cuda)}


@contextmanager
def turn(out: Path, alone: bool = False) -> Iterator[None]:
    """Beside others, or alone, among all processes whose result file is in this folder."""
    folder = os.open(out.resolve().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(folder)
