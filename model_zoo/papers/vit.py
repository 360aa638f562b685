"""A small vision transformer for images of 32 x 32 pixels (Dosovitskiy et al., ICLR 2021), as timm writes it."""

from __future__ import annotations

from typing import Any

from torch import nn


def vit_32(num_classes: int = 10, in_channels: int = 3, size: int = 32, depth: int = 4, width: int = 96) -> nn.Module:
    """[N, in_channels, size, size] -> [N, num_classes]: patches of 4 x 4, heads of 32 channels."""
    from timm.models import VisionTransformer

    shape: dict[str, Any] = {"img_size": size, "patch_size": 4, "embed_dim": width, "num_heads": max(width // 32, 1)}
    model: nn.Module = VisionTransformer(num_classes=num_classes, in_chans=in_channels, depth=depth, **shape)
    return model
