"""A small graph of convolutions and matrix products to be timed: as an ONNX file, and as a module of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Op = Literal["Add", "Conv", "ConvTranspose", "Gather", "MatMul", "Relu"]  # as ONNX names them
_OPSET, _IR = 17, 9  # old enough for every onnxruntime of these years


@dataclass
class KernelGraph:
    """The ops in order, each with the names of its operands; values are ones, which cost what any other number costs.

    ``given``, ``weights``: shapes of what it is fed and of what is constant. ``indices``: the numbers of constants by
    which channels are chosen. ``output``: its name.
    """

    dtype: str = "float32"
    given: list[tuple[int, ...]] = field(default_factory=list)
    weights: list[tuple[int, ...]] = field(default_factory=list)
    indices: list[tuple[int, ...]] = field(default_factory=list)
    nodes: list[tuple[Op, tuple[str, ...], dict[str, Any]]] = field(default_factory=list)
    output: str = ""

    def feed(self, shape: Sequence[int]) -> str:
        self.given.append(tuple(shape))
        return f"x{len(self.given) - 1}"

    def weight(self, shape: Sequence[int]) -> str:
        self.weights.append(tuple(shape))
        return f"w{len(self.weights) - 1}"

    def index(self, numbers: Sequence[int]) -> str:
        self.indices.append(tuple(numbers))
        return f"i{len(self.indices) - 1}"

    def add(self, op: Op, *operands: str, **attributes: Any) -> str:
        self.nodes.append((op, operands, attributes))
        self.output = f"y{len(self.nodes) - 1}"
        return self.output

    def inputs(self) -> list[Tensor]:
        """What it is fed."""
        return [torch.ones(shape, dtype=self._dtype) for shape in self.given]

    def constants(self) -> list[Tensor]:
        """The weights; equal ones would be merged."""
        return [torch.full(shape, 1.0 + number, dtype=self._dtype) for number, shape in enumerate(self.weights)]

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def as_onnx(self) -> bytes:
        """What an ONNX file holds."""
        from onnx import helper, numpy_helper

        kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=self._dtype).numpy().dtype)
        nodes = [
            helper.make_node(op, list(operands), [f"y{number}"], **attributes)
            for number, (op, operands, attributes) in enumerate(self.nodes)
        ]
        given = [helper.make_tensor_value_info(f"x{number}", kind, shape) for number, shape in enumerate(self.given)]
        weights = [numpy_helper.from_array(value.numpy(), f"w{n}") for n, value in enumerate(self.constants())]
        weights += [numpy_helper.from_array(np.array(index), f"i{n}") for n, index in enumerate(self.indices)]
        made = helper.make_empty_tensor_value_info(self.output)
        made.type.tensor_type.elem_type = kind
        graph = helper.make_graph(nodes, "timed", given, [made], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
        return bytes(model.SerializeToString())

    def as_module(self) -> nn.Module:
        """A module of the inputs."""
        return _Module(self)


class _Module(nn.Module):
    def __init__(self, graph: KernelGraph) -> None:
        super().__init__()
        self.graph = graph
        self.weights = nn.ParameterList(nn.Parameter(value, requires_grad=False) for value in graph.constants())
        for number, index in enumerate(graph.indices):
            self.register_buffer(f"i{number}", torch.tensor(index))

    def forward(self, *inputs: Tensor) -> Tensor:
        values = {f"x{number}": value for number, value in enumerate(inputs)}
        values |= {f"w{number}": value for number, value in enumerate(self.weights)}
        values |= dict(self.named_buffers())
        for number, (op, operands, attributes) in enumerate(self.graph.nodes):
            values[f"y{number}"] = _computed(op, [values[name] for name in operands], attributes)
        return values[self.graph.output]


def _computed(op: Op, operands: Sequence[Tensor], attributes: dict[str, Any]) -> Tensor:
    match op:
        case "Add":
            return operands[0] + operands[1]
        case "Gather":
            return operands[0].index_select(attributes["axis"], operands[1])
        case "MatMul":
            return operands[0] @ operands[1]
        case "Relu":
            return F.relu(operands[0])
    x, weight = operands
    spatial = weight.ndim - 2
    one, none = [1] * spatial, [0] * spatial
    padding = attributes.get("pads", none * 2)[:spatial]
    stride, dilation = attributes.get("strides", one), attributes.get("dilations", one)
    extra = attributes.get("output_padding", none)
    transposed, groups = op == "ConvTranspose", attributes.get("group", 1)
    return torch.convolution(x, weight, None, stride, padding, dilation, transposed, extra, groups)
