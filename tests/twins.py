"""Networks whose channels have twins: what goes is linear in what stays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import fxprune


class LastStay:
    """Scores rise along every group: of n channels the first go."""

    def score(self, group, state):
        return np.broadcast_to(np.arange(1.0, group.size + 1), group.channels.shape).copy()


def with_twins(model: nn.Module, example: Tensor) -> nn.Module:
    """The model with every channel of the first half of a group computed like one of the second half."""
    graph = fxprune.analyze(model, example)
    twin = np.arange(graph.channel_count)
    for group in graph.prunable:
        half = group.size // 2
        twin[group.channels[:, :half]] = group.channels[:, half : 2 * half]
    read = {(m.name, m.dim) for group in graph.groups for m in group.members if m.read}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for parameter in graph.parameters:
            for factor in parameter.labels:
                if (parameter.name, factor.dim) in read:
                    continue
                last = np.moveaxis(factor.ids, factor.dim, -1)
                order = [[list(row).index(c) for c in twin[row]] for row in last.reshape(-1, last.shape[-1])]
                index = torch.tensor(order).view(last.shape).movedim(-1, factor.dim)
                tensor = tensors[parameter.name]
                tensor.copy_(tensor.take_along_dim(index, factor.dim))
    return model


def settled(model: nn.Module) -> nn.Module:
    """Norms whose statistics and scales differ from channel to channel."""
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()
