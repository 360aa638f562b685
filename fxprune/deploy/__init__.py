"""Taking a network out of PyTorch. The only place that knows onnx and onnxruntime, both imported when they are used.

``flat`` is a network as a function from tensors to tensors, ``onnx`` writes it, ``onnx_file`` is what a file says,
``validation`` compares the file with the network on every provider, ``runtime`` opens sessions; ``program`` is one of
torch.export. ``kernels`` and ``stopwatch`` measure, ``store`` keeps what was measured. ``latency`` is latency as a
budget: predicted, then measured.
"""

from fxprune.deploy.kernels import Kernel, alignment, kernel_ms, provider_at_hand
from fxprune.deploy.onnx import export
from fxprune.deploy.runtime import check_provider
from fxprune.deploy.stopwatch import Stopwatch, bench
from fxprune.deploy.validation import Validation, validate

__all__ = [
    "Kernel", "Stopwatch", "Validation", "alignment", "bench", "check_provider", "export", "kernel_ms",
    "provider_at_hand", "validate",
]  # fmt: skip
