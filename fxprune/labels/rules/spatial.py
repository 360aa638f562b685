"""Pooling and resampling: channel by channel, mixing positions within the last dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.labels.factors import Labels
from fxprune.labels.rules.table import Call, rule

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation


def _last(count: int, *names: str) -> None:
    @rule(*names)
    def _mix(run: Propagation, call: Call) -> Labels:
        dims = list(range(call.input.ndim - count, call.input.ndim))
        mixed = [run.mix(f, dims, f"{call.name} along channels") for f in run.labels(call.input)]
        return tuple(f for f in mixed if f is not None)


_last(
    1, "avg_pool1d", "adaptive_avg_pool1d", "max_pool1d", "max_pool1d_with_indices", "upsample_nearest1d",
    "upsample_linear1d", "_upsample_nearest_exact1d",
)  # fmt: skip
_last(
    2, "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "max_pool2d_with_indices", "max_pool2d",
    "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d",
    "fractional_max_pool2d",
)  # fmt: skip
_last(
    3, "avg_pool3d", "_adaptive_avg_pool3d", "adaptive_avg_pool3d", "max_pool3d_with_indices", "adaptive_max_pool3d",
    "upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact3d", "grid_sampler_3d",
)  # fmt: skip
