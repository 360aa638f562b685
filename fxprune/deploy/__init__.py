"""Taking a network out of PyTorch. The only place that knows onnx and onnxruntime, both imported when they are used."""

from fxprune.deploy.onnx import Validation, export

__all__ = ["Validation", "export"]
