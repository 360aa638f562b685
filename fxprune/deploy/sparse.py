"""Weights of an ONNX file that are mostly exact zeros, as sparse initializers.

A sparse initializer holds the values that are not zero and, as the format demands, 64 bits for the place of each.
onnxruntime makes dense tensors of them when it loads a file: the file is smaller, and what runs is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fxprune.errors import ExportError, InputError

_PLACE = 8  # bytes
_NAMES = 150  # bytes that a sparse tensor takes beside values and places, about


def with_sparse_weights(model: Any) -> bytes:
    """The file of an onnx_ir model, every weight sparse where that takes at most half of its bytes.

    Raises:
        InputError: no weight has so many zeros.
        ExportError: what is left is too large for one file.
    """
    import onnx
    import onnx_ir

    proto = onnx_ir.serde.serialize_model(model)
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    dense = []
    for initializer in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(initializer)
        places = np.flatnonzero(values)
        size = places.size * (values.itemsize + _PLACE) + _NAMES
        if initializer.data_type not in floats or 2 * size > values.nbytes:
            dense.append(onnx.TensorProto.FromString(initializer.SerializeToString()))
            continue
        name = initializer.name
        left = onnx.numpy_helper.from_array(values.reshape(-1)[places], name)
        where = onnx.numpy_helper.from_array(places.astype(np.int64), f"{name}_places")
        proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(left, where, list(values.shape)))
    if not proto.graph.sparse_initializer:
        raise InputError(
            "sparse=True: no weight has so many exact zeros that it would take half of its bytes (five of six in "
            "float32). Leave it out, or zero weights first: method='gsm', fxprune.optim.magnitude_cut."
        )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(dense)
    try:
        content: bytes = proto.SerializeToString()
    except ValueError as error:
        raise ExportError(f"The weights that are not sparse are too large for one file: {error}") from error
    return content
