"""Taking a network out of PyTorch. The only place that knows onnx, onnxruntime and OpenVINO, imported when used.

``flat`` is a network as a function from tensors to tensors, ``batches`` which batch a capture leaves open, ``onnx``
writes it, ``complex_numbers`` by their parts, ``sparse`` what is zero in it, ``onnx_file`` is what a file says,
``validation`` compares the file with the network on every provider, ``runtime`` opens sessions; ``program`` is one of
torch.export, ``converting`` tells the lines at which other converters fail, ``sparse_cores`` makes 2:4 weights sparse
on a GPU. ``engines`` run what is timed, ``kernels`` (made of a ``kernel_graph``) and ``stopwatch`` measure, ``store``
keeps what was measured. ``latency`` is latency as a budget: predicted, then measured; ``joins`` says which layers
choose what they read of a stream for its sake.
"""

from fxprune.deploy.converting import converting
from fxprune.deploy.engines import check_engine, placed
from fxprune.deploy.kernels import Kernel, alignment, kernel_ms, provider_at_hand
from fxprune.deploy.onnx import export
from fxprune.deploy.sparse_cores import SemiStructured, semi_structured
from fxprune.deploy.stopwatch import Stopwatch, bench
from fxprune.deploy.validation import Validation, validate

__all__ = [
    "Kernel", "SemiStructured", "Stopwatch", "Validation", "alignment", "bench", "check_engine", "converting", "export",
    "kernel_ms", "placed", "provider_at_hand", "semi_structured", "validate",
]  # fmt: skip
