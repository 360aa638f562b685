"""The modules and tensors of a model under their names, collected once: every walk over a deep model costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Parts:
    """Everything by dotted name, each object under its first name."""

    modules: dict[str, nn.Module]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        return cls(dict(model.named_modules()), dict(model.named_parameters()), dict(model.named_buffers()))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers}

    def with_tensors(self, other: Callable[[Tensor], Tensor]) -> Parts:
        """The same modules, and ``other(tensor)`` for every tensor."""
        parameters = {name: other(tensor) for name, tensor in self.parameters.items()}
        return replace(self, parameters=parameters, buffers={name: other(t) for name, t in self.buffers.items()})

    def scripted(self) -> list[torch.jit.ScriptModule]:
        return [module for module in self.modules.values() if isinstance(module, torch.jit.ScriptModule)]
