"""The modules and tensors of a model under their names, collected once: every walk over a deep model costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Parts:
    """``modules``, ``parameters`` and ``buffers`` by dotted name, each object under its first name."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.buffers: dict[str, Tensor] = dict(model.named_buffers())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers}

    def scripted(self) -> list[torch.jit.ScriptModule]:
        return [module for module in self.modules.values() if isinstance(module, torch.jit.ScriptModule)]
