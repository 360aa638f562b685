"""The modules and tensors of a model under their names, collected once: every walk over a deep model costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxprune.recording.module import named_modules


@dataclass(frozen=True)
class Parts:
    """Everything by dotted name, each object under its first name."""

    modules: dict[str, nn.Module]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        """The names and the order that ``named_modules`` and its like give, in one walk."""
        modules: dict[str, nn.Module] = {}
        parameters: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        seen: set[int] = set()
        seen_parameters: set[int] = set()
        seen_buffers: set[int] = set()
        for path, module in named_modules(model):
            if id(module) in seen:
                continue
            seen.add(id(module))
            modules[path] = module
            prefix = f"{path}." if path else ""
            _add(parameters, seen_parameters, prefix, module._parameters)
            _add(buffers, seen_buffers, prefix, module._buffers)
        return cls(modules, parameters, buffers)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers}

    def scripted(self) -> list[torch.jit.ScriptModule]:
        return [module for module in self.modules.values() if isinstance(module, torch.jit.ScriptModule)]


def _add(found: dict[str, Tensor], seen: set[int], prefix: str, table: Mapping[str, Tensor | None]) -> None:
    for name, tensor in table.items():
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            found[prefix + name] = tensor
