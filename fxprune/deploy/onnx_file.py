"""What an ONNX file says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxprune.errors import ExportError, first_line

PLAN_DIGEST = "plan_digest"
"""Where a file keeps the digest of the plan it was cut by, in its ``metadata_props``."""


@dataclass(frozen=True)
class OnnxFile:
    """What an ONNX file says of itself. ``shapes``: of every input, names for sizes that are open.

    ``dtype``: of its first floating-point input, or of its first such output where all inputs are integers.
    """

    path: Path
    opset: int
    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int | str, ...], ...]
    metadata: Mapping[str, str]
    dtype: torch.dtype

    @classmethod
    def read(cls, path: Path) -> OnnxFile:
        """The file at this path.

        Raises:
            ExportError: it is damaged, or no ONNX file.
        """
        import onnx

        try:
            model = onnx.load(path, load_external_data=False)
            onnx.checker.check_model(path)
            inputs = [(given.name, given.type.tensor_type) for given in model.graph.input]
            dtypes = tuple(_dtype(kind.elem_type) for _, kind in inputs)
            outputs = (_dtype(made.type.tensor_type.elem_type) for made in model.graph.output)
            return cls(
                path,
                next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0),
                tuple(name for name, _ in inputs),
                dtypes,
                tuple(tuple(map(_size, kind.shape.dim)) for _, kind in inputs),
                {each.key: each.value for each in model.metadata_props},
                next((dtype for dtype in (*dtypes, *outputs) if dtype.is_floating_point), torch.float32),
            )
        except Exception as error:
            raise ExportError(
                f"{str(path)!r} is damaged or no ONNX file ({first_line(error)}); export it again"
            ) from error

    def described(self) -> str:
        """Its inputs, for a message."""
        return ", ".join(
            f"{name} [{', '.join(map(str, shape))}]" for name, shape in zip(self.names, self.shapes, strict=True)
        )


def _dtype(elem_type: int) -> torch.dtype:
    import onnx

    return torch.as_tensor(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(elem_type))).dtype


def _size(dim: Any) -> int | str:
    """A number, or the name of a size that is open."""
    return int(dim.dim_value) if dim.WhichOneof("value") == "dim_value" else str(dim.dim_param or "?")
