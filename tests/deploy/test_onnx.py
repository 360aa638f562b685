import importlib
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import randomise
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.deploy import export, flat, runtime, validate
from fxprune.deploy import onnx as deploy_onnx
from fxprune.deploy.validation import _error
from fxprune.errors import ExampleInputsError, ExportError, GuardError, InputError
from fxprune.recording.inputs import DIMS_KEY, RECORD_KEY, describe_inputs, make_inputs

pytestmark = pytest.mark.usefixtures("ops_read_once")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2)
        return self.head(self.drop(x.reshape(x.shape[0], -1)))


class Structured(nn.Module):
    """Nested inputs, keyword-only arguments, and outputs that are not all tensors."""

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, scale: int = 2, mask: Tensor | None = None) -> Any:
        y = x * scale + pair[0][:, None] + pair[1]
        return {"add": y if mask is None else y * mask, "count": 3, "nothing": None, "same": x, "many": [y, y + 1]}


def shapes(path: Path, what: str) -> dict[str, list[Any]]:
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in getattr(onnx.load(path).graph, what)
    }


def test_a_graph_module_is_exported_and_checked(tmp_path: Path) -> None:
    graph = torch.fx.symbolic_trace(randomise(Net())).train()
    graph.norm.eval()
    weights = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    path = tmp_path / "net.onnx"

    validation = export(graph, path, torch.randn(1, 3, 8, 8))

    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert validation.path == path
    assert 0 < validation.max_abs_error < 1e-4
    assert 0 < validation.max_rel_error < 1e-5
    assert validation.provider in ("CPUExecutionProvider", "CUDAExecutionProvider")
    assert validation.batches == (1, 3, 5)
    assert validation.sizes == ((8, 8),)
    assert validation.dtype == "float32"
    assert (validation.runs[0].provider, validation.runs[-1].provider) == (validation.provider, runtime.CPU)
    assert validation.opset >= 18
    assert 0 < validation.latency_ms < 1000
    assert validation.torch_version == torch.__version__
    assert validation.onnxruntime_version == onnxruntime.__version__
    assert f"{path}: opset {validation.opset}, max error " in str(validation)
    # The user's names, and a batch of any size.
    assert shapes(path, "input") == {"x": ["batch", 3, 8, 8]}
    assert shapes(path, "output") == {"output": ["batch", 5]}
    assert "head.weight" in {tensor.name for tensor in onnx.load(path).graph.initializer}
    # The module is as it was, and nothing else lies about.
    assert graph.training
    assert graph.conv.training
    assert not graph.norm.training
    assert all(torch.equal(tensor, graph.state_dict()[name]) for name, tensor in weights.items())
    assert [each.name for each in tmp_path.iterdir()] == ["net.onnx"]


def test_the_file_computes_what_eval_mode_computes(tmp_path: Path) -> None:
    net = randomise(Net()).eval()
    export(net, tmp_path / "net.onnx", torch.randn(4, 3, 8, 8))
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            expected = net(x)
        torch.testing.assert_close(torch.as_tensor(session.run(None, {"x": x.numpy()})[0]), expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_networks(tmp_path: Path, name: str) -> None:
    validation = export(randomise(timm.create_model(name)), tmp_path / "net.onnx")
    assert validation.max_rel_error < 1e-4


def test_structured_inputs_and_outputs(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    kwargs = {"mask": torch.ones(1, 4), "scale": 3, "pair": (torch.arange(1), torch.randn(4))}
    validation = export(Structured(), path, torch.randn(1, 4), kwargs)
    assert validation.max_rel_error < 1e-5
    assert shapes(path, "input") == {
        "x": ["batch", 4],
        "mask": ["batch", 4],
        "pair_0": ["batch"],
        "pair_1": [4],
    }
    names = list(shapes(path, "output"))
    assert len(names) == len(set(names)) == 4
    assert names[1:] == ["same", "many_0", "many_1"]


@pytest.mark.parametrize("names", [("mean",), ("relu_1", "add"), ("x", "output"), ("val_0", "val_1", "val_2")])
def test_buffers_are_called_as_what_torch_calls_results_and_constants(tmp_path: Path, names: tuple[str, ...]) -> None:
    """As the mean and the standard deviation of the images in a network that takes them as they are."""

    class Normalised(Net):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                self.register_buffer(name, torch.rand(1, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            for name in names:
                x = x - self.get_buffer(name)
            return super().forward((3.5 + 2.0 * x.relu().relu()) / (1 + x.square().mean()))

    net = randomise(Normalised())
    path = tmp_path / "net.onnx"
    assert export(net, path, torch.randn(1, 3, 8, 8)).max_rel_error < 1e-5
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for name in names:
        np.testing.assert_array_equal(weights[name], net.get_buffer(name))


class Memory:
    """Keys and values of the tokens so far, per layer; the network writes into it."""

    def __init__(self, *lengths: int) -> None:
        self.layers = [Slot(torch.randn(1, length, 4), torch.randn(1, length, 4)) for length in lengths]
        self.owner = self


class Slot:
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.scale = keys, values, 0.5

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1)
        return self.keys, self.values


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 12) for _ in range(2))

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        for layer, slot in zip(self.layers, memory.layers, strict=True):
            q, k, v = layer(x).chunk(3, -1)
            k, v = slot.update(k, v)
            x = x + F.scaled_dot_product_attention(q, k, v, scale=slot.scale)
        return x, memory


def test_an_object_as_an_input_and_as_an_output(tmp_path: Path) -> None:
    path, memory = tmp_path / "net.onnx", Memory(3, 2)
    found = export(randomise(Remembering()), path, (torch.randn(1, 2, 4), memory))
    assert found.max_rel_error < 1e-5
    assert shapes(path, "input") == {
        "x": ["batch", 2, 4],
        "memory_layers_0_keys": ["batch", 3, 4],
        "memory_layers_0_values": ["batch", 3, 4],
        "memory_layers_1_keys": ["batch", 2, 4],
        "memory_layers_1_values": ["batch", 2, 4],
    }
    assert list(shapes(path, "output").values()) == [["batch", n, 4] for n in (2, 5, 5, 4, 4)]
    assert list(shapes(path, "output"))[1] == "output_1_layers_0_keys"
    assert [slot.keys.shape[1] for slot in memory.layers] == [3, 2], "what was passed stays as it was"


class Decoder(nn.Module):
    """A causal language model with a mask of what is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 16), nn.Embedding(8, 16)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 50)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(position_ids)
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mask = causal & attention_mask[:, None, None, :].bool()
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return self.head(x)


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
def test_a_causal_language_model_with_a_mask(tmp_path: Path, mask: list[int]) -> None:
    """With coin flips for a mask some tokens saw nothing, of which torch and onnxruntime make different numbers."""
    ids = torch.tensor([[3, 49, 7, 0, 1, 1]])
    net = randomise(Decoder())
    found = export(net, tmp_path / "net.onnx", (ids, torch.tensor([mask]), torch.arange(6)[None]))
    assert 0 < found.max_rel_error < 1e-5
    assert found.batches == (1, 3, 5)


class Sorted(nn.Module):
    """Takes lengths that never grow only, as ``pack_padded_sequence`` does."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and bool((lengths.diff() > 0).any()):
            raise ValueError("lengths must be sorted")
        return x * lengths.sum()


def test_a_network_that_refuses_integers_near_the_examples_is_checked_on_its_own(tmp_path: Path) -> None:
    inputs = (torch.randn(1, 4), torch.arange(10, 2, -1))
    assert export(Sorted(), tmp_path / "net.onnx", inputs).max_rel_error < 1e-5
    assert refused(ExampleInputsError, Sorted(), tmp_path / "net.onnx", (inputs[0], torch.arange(8))).startswith(
        "Sorted fails on random inputs of the shapes [[2, 4], [8]]: lengths must be sorted; "
    )


class Windows(nn.Module):
    """Attention inside windows, with three batch dimensions, a mask and keys shared by all windows; then no head."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(2, 1, 1, 4, 4, dtype=torch.bool).tril()
        tokens = x.unflatten(1, (2, 3)).unsqueeze(3)  # batch, windows, rows, one head, tokens, channels
        attended = F.scaled_dot_product_attention(tokens, tokens[:, :1], tokens[:, :1] * 2, mask)
        return F.scaled_dot_product_attention(*3 * [attended.flatten(1, 4)])


def test_attention_with_any_number_of_dimensions(tmp_path: Path) -> None:
    assert 0 < export(Windows(), tmp_path / "windows.onnx", torch.randn(1, 6, 4, 8)).max_rel_error < 1e-5


def test_inputs_come_from_the_record_of_a_recorded_graph(tmp_path: Path) -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)))
    graph.meta[RECORD_KEY] = describe_inputs((torch.tensor([[0, 4]]),), {})
    assert export(graph, tmp_path / "net.onnx").max_rel_error < 1e-5


def test_half_precision_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).half()
    assert export(net, tmp_path / "net.onnx", torch.randn(1, 64).half()).max_rel_error < 1e-2


def test_half_of_double_is_refused(tmp_path: Path) -> None:
    net, x = nn.Linear(4, 4).double(), torch.randn(1, 4).double()
    assert refused(InputError, net, tmp_path / "net.onnx", x, half=True) == (
        "half=True makes float16 of float32, and weight is float64: export model.float()"
    )


@pytest.mark.gpu
def test_cuda(tmp_path: Path) -> None:
    validation = export(randomise(Net()).cuda(), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8).cuda())
    assert [run.provider for run in validation.runs] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert validation.max_rel_error < 1e-4
    validation = export(randomise(Net()).cuda(), tmp_path / "half.onnx", torch.randn(1, 3, 8, 8).cuda(), half=True)
    assert (validation.provider, validation.dtype) == ("CUDAExecutionProvider", "float16")


# -- what is chosen


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_an_opset_of_choice(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    assert export(randomise(Net()), path, torch.randn(1, 3, 8, 8), opset=21).opset == 21
    assert [each.version for each in onnx.load(path).opset_import] == [21]


class Pixels(nn.Module):
    """Any image whose height and width are multiples of 2, and a second one that is not of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2, 2)

    def forward(self, x: Tensor, small: Tensor) -> Tensor:
        return torch.cat([self.up(self.norm(self.down(x)).relu()), x], 1) + small.mean((1, 2, 3), keepdim=True)


def test_height_and_width_may_stay_open(tmp_path: Path) -> None:
    net, path = randomise(Pixels()), tmp_path / "net.onnx"
    found = export(net, path, (torch.randn(1, 3, 6, 8), torch.randn(1, 1, 2, 2)), dynamic_size=True)
    assert found.sizes == ((6, 8), (6, 16), (12, 8))
    assert " at batch sizes 1, 3, 5 and sizes 6 x 8, 6 x 16, 12 x 8; " in str(found)
    assert shapes(path, "input") == {"x": ["batch", 3, "height", "width"], "small": ["batch", 1, 2, 2]}
    session = onnxruntime.InferenceSession(path, providers=[runtime.CPU])
    x, small = torch.randn(2, 3, 10, 4), torch.randn(2, 1, 2, 2)
    with torch.no_grad():
        expected = net.eval()(x, small)
    torch.testing.assert_close(
        torch.as_tensor(session.run(None, {"x": x.numpy(), "small": small.numpy()})[0]), expected
    )


class OneHeight(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 8, "8 or nothing"
        return x * 2


class OneSize(nn.Module):
    """torch.export finds nothing wrong with another size: x could still have 192 values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 3 * 8 * 8)


def test_height_and_width_that_are_fixed(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", torch.randn(1, 3, 8, 8)
    assert refused(ExportError, OneHeight(), path, x, dynamic_size=True) == (
        "torch.export cannot capture OneHeight with a dynamic batch, height and width: the network works for "
        "height = 8 only; its forward must take sizes from x.shape and not branch on the values of tensors"
    )
    assert refused(ExampleInputsError, OneSize(), path, x, dynamic_size=True) == (
        "OneSize fails on random inputs of the shapes [[5, 3, 8, 16]]: shape '[5, 192]' is invalid for input of size "
        "1920; its height and width are not free: leave out dynamic_size"
    )
    assert refused(InputError, nn.Linear(4, 4), path, torch.randn(1, 4), dynamic_size=True) == (
        "dynamic_size: Linear takes no image, that is no tensor with four dims or more"
    )


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, groups=1, bias=False), nn.BatchNorm2d(4)
        self.up, self.second = nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)
        self.linear, self.third = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.alone = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.up(self.norm(self.conv(x)).relu())).relu()
        return self.alone(self.third(self.linear(x.mean((2, 3)))).relu())


def test_batch_norms_are_folded_or_kept(tmp_path: Path) -> None:
    net, path, x = randomise(Normed()), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert export(net, path, x).max_rel_error < 1e-5
    assert operators(path)["BatchNormalization"] == 1, "what follows no layer with weights stays"
    assert export(net, path, x, fold_norms=False).max_rel_error < 1e-5
    kept = operators(path)
    assert kept["BatchNormalization"] == 4
    assert "CastLike" not in kept, "the graph is cleaned up all the same"
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_half_is_compared_with_the_network_in_float(tmp_path: Path) -> None:
    net, path, x = randomise(Net()), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8)
    folders = list(sys.path)
    found = export(net, path, x, half=True)
    assert 1e-5 < found.max_rel_error < 5e-3
    assert found.dtype == "float16"
    assert ": opset 20 in float16, max error " in str(found).replace(f"opset {found.opset}", "opset 20")
    graph = onnx.load(path).graph
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert onnx.TensorProto.FLOAT not in {tensor.data_type for tensor in graph.initializer}
    assert net.conv.weight.dtype == torch.float32  # type: ignore[attr-defined]
    assert sys.path == folders
    importlib.import_module("onnxruntime.quantization")  # which needs a folder that is gone from there


@pytest.mark.parametrize("half", [False, True])
def test_weights_that_are_mostly_zeros_are_sparse(tmp_path: Path, half: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 5),
    )  # fmt: skip
    randomise(net)
    fxprune.optim.magnitude_cut([net[3].weight, net[6].weight], 20)
    x = torch.randn(1, 3, 8, 8)
    dense, path = tmp_path / "dense.onnx", tmp_path / "sparse.onnx"
    export(net, dense, x, half=half)
    assert export(net, path, x, half=half, sparse=True).max_rel_error < (1e-2 if half else 1e-5)
    graph = onnx.load(path).graph
    assert sorted(t.values.name for t in graph.sparse_initializer) == ["3.weight", "6.weight"]
    assert {"8.weight", "8.bias", "3.bias"} <= {t.name for t in graph.initializer}, "full, or too small to matter"
    whole = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(dense).graph.initializer}
    for sparse in graph.sparse_initializer:
        values, places = (onnx.numpy_helper.to_array(t) for t in (sparse.values, sparse.indices))
        expected = whole[sparse.values.name]
        assert list(sparse.dims) == list(expected.shape)
        assert (expected.reshape(-1)[places] == values).all()
        assert len(values) == (expected != 0).sum() > 0
    assert path.stat().st_size < 0.6 * dense.stat().st_size
    assert validate(path, net, x).max_rel_error < (1e-2 if half else 1e-5)


def test_where_nothing_is_sparse_there_is_no_file(tmp_path: Path) -> None:
    told = refused(InputError, randomise(Net()), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), sparse=True)
    assert told.startswith("sparse=True: no weight has so many exact zeros that it would take half of its bytes")


def test_what_float16_cannot_hold(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[0].weight.data *= 1e5
    net[1].weight.data *= 1e5
    assert refused(ExportError, net, tmp_path / "net.onnx", torch.randn(1, 4), half=True).endswith(
        "tolerance 1e-02; float16 rounds and overflows: export without half"
    )


class Pooled(nn.Module):
    """Rows summed or multiplied by the places that an index gives them."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator, self.body = operator, nn.Linear(8, 16)
        self.register_buffer("index", torch.tensor([0, 1, 1, 2, 2, 0]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        index, start = self.index.view(1, -1, 1).expand_as(h), h.new_ones(h.shape[0], 3, 16)
        if self.operator == "index_add":
            return start.index_add(1, self.index, h)
        if self.operator == "scatter_add":
            return start.scatter_add(1, index, h)
        return start.scatter_reduce(1, index, h, self.operator)


@pytest.mark.parametrize("operator", ["index_add", "scatter_add", "prod", "amax"])
def test_half_where_an_index_says_what_is_added(operator: str, tmp_path: Path) -> None:
    """For the CPU onnxruntime has such sums and products in float32 alone."""
    exported = export(Pooled(operator), tmp_path / "net.onnx", torch.randn(2, 6, 8), half=True)
    assert exported.dtype == "float16"
    assert 1e-6 < exported.max_rel_error < 5e-3


def test_half_of_a_network_that_takes_integers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    assert export(net, tmp_path / "net.onnx", torch.tensor([[0, 4]]), half=True).dtype == "float16"


class Mixture(nn.Module):
    """Every row is for one of four experts, which its values choose."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.gate = nn.Linear(4, 8), nn.Linear(8, 4)
        self.up, self.down = (nn.Parameter(torch.randn(4, *size)) for size in ((8, 16), (16, 4)))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.front(x)
        chosen = self.gate(rows).argmax(-1)
        order = chosen.argsort()
        ends = F.one_hot(chosen, 4).sum(0).cumsum(0).to(torch.int32)
        inner = torch._grouped_mm(rows[order], self.up, ends).relu()
        outer: Tensor = torch._grouped_mm(inner, self.down, ends)
        return outer[order.argsort()]


@pytest.mark.parametrize("recorded", [False, True])
def test_a_mixture_of_experts(recorded: bool, tmp_path: Path) -> None:
    net, x = randomise(Mixture()), torch.randn(16, 4)
    if recorded:
        net = fxprune.prune(net, x, flops=0.7, verify=False, progress=False)
    assert 0 < export(net, tmp_path / "net.onnx", x).max_rel_error < 1e-5
    loaded = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    many = torch.randn(64, 4)
    with torch.no_grad():
        expected = net(many)
    assert np.allclose(loaded.run(None, {"x": many.numpy()})[0], expected.numpy(), rtol=1e-4, atol=1e-4)


class Rotated(nn.Module):
    """Queries turned by complex numbers, a Fourier layer, and a linear recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(6, 8), nn.Linear(8, 6)
        angles = torch.outer(torch.arange(32.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))
        self.mixed = nn.Parameter(torch.randn(8, 8, 3, dtype=torch.complex64))
        self.decay = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.front(x)
        pairs = torch.view_as_complex(rows.unflatten(-1, (4, 2)))
        turned = torch.view_as_real(pairs * self.turns[: x.shape[1]].unsqueeze(0)).flatten(2)
        waves = torch.fft.rfft(rows, dim=1)
        kept = torch.zeros_like(waves)
        kept[:, :3] = torch.einsum("bwi,iow->bwo", waves[:, :3], self.mixed)
        smooth = torch.fft.irfft(kept, n=x.shape[1], dim=1)
        state = torch.zeros(x.shape[0], 8, dtype=torch.complex64)
        for row in rows.unbind(1):
            state = state * torch.exp(torch.complex(-self.decay, self.decay)) + row
        return self.back(turned.relu() + smooth + state.real[:, None])


def test_complex_numbers(tmp_path: Path) -> None:
    net, x = randomise(Rotated()), torch.randn(2, 12, 6)
    pruned = fxprune.prune(net, x, flops=0.8, round_to=1, progress=False)
    for name, module in (("dense", net), ("pruned", pruned)):
        assert 0 < export(module, tmp_path / f"{name}.onnx", x).max_rel_error < 1e-5


@pytest.mark.parametrize("does", ["takes", "returns"])
def test_complex_numbers_at_the_ends(does: str, tmp_path: Path) -> None:
    class Ends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs() if does == "takes" else torch.polar(x, x)

    x = torch.randn(2, 4, dtype=torch.complex64 if does == "takes" else torch.float32)
    with pytest.raises(ExportError, match=f"Ends {does} complex numbers"):
        export(Ends(), tmp_path / "net.onnx", x)


COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers": lambda z: z * 1j + (2 - 1j),
    "a product with real numbers": lambda z: z * z.abs(),
    "a quotient": lambda z: z / (1 + z.abs()) + z / (3 + z),
    "a matrix product": lambda z: z @ z.mT.conj(),
    "whole powers": lambda z: z**3,
    "a logarithm": torch.log,
    "an exponential": torch.exp,
    "chosen": lambda z: torch.where(z.real > 0, z, torch.ones(5, dtype=z.dtype)),
    "chosen, or a real number": lambda z: torch.where(z.real > 0, z, z.abs()),
    "gathered": lambda z: z.gather(1, torch.arange(3).view(1, 3, 1).expand(z.shape[0], 3, 5)),
    "by places": lambda z: z[:, [2, 0], 1:],
    "expanded and squeezed": lambda z: z[:, None].expand(-1, 2, -1, -1).mean(1).unsqueeze(-1).squeeze(-1),
    "padded": lambda z: F.pad(z, (1, 2)),
    "in parts": lambda z: torch.cat([part * n for n, part in enumerate(z.split([1, 3], 1), 1)], 1),
    "made": lambda z: z + torch.full((5,), 2 + 1j) * torch.ones(5, dtype=z.dtype),
    "real numbers as complex ones": lambda z: z.real.to(z.dtype) + z,
    "written": lambda z: torch.stack([z, z]).index_put((torch.tensor([1]),), z[None] * 2),
    "repeated": lambda z: z.repeat(1, 2, 1),
}


def test_operators_on_complex_numbers(tmp_path: Path) -> None:
    class Every(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {name: torch.view_as_real(made(torch.complex(x, y))) for name, made in COMPLEX.items()}

    x, y = torch.randn(2, 2, 4, 5).unbind(0)
    assert 0 < export(Every(), tmp_path / "net.onnx", (x, y)).max_rel_error < 1e-5


def test_triangular_systems(tmp_path: Path) -> None:
    class Solves(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            solve = torch.linalg.solve_triangular
            return solve(x, y, upper=False), solve(x, y.mT, upper=True, left=False, unitriangular=True)

    inputs = (torch.randn(2, 3, 5, 5) + 2 * torch.eye(5), torch.randn(2, 1, 5, 2))
    assert export(Solves(), tmp_path / "net.onnx", inputs).max_rel_error < 1e-5


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8])
def test_triangular_systems_of_any_kind(size: int) -> None:
    x = torch.randn(2, 3, size, size, dtype=torch.float64) + 2 * torch.eye(size)
    for upper, left, unit in product((False, True), repeat=3):
        kind = {"upper": upper, "left": left, "unitriangular": unit}
        y = torch.randn(3, size, 2, dtype=torch.float64) if left else torch.randn(3, 2, size, dtype=torch.float64)
        torch.testing.assert_close(flat._solved(x, y, **kind), torch.linalg.solve_triangular(x, y, **kind))


def test_a_triangular_system_whose_powers_grow() -> None:
    ones, right = torch.ones(64, 64), torch.randn(64, 3)
    exact = torch.linalg.solve_triangular(ones.double(), right.double(), upper=False)
    found = flat._solved(ones, right, upper=False)
    assert found is not None
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_zeros_around_what_is_pooled(tmp_path: Path) -> None:
    class Pools(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = -1 - x.abs()
            return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1), F.max_pool1d(F.pad(x[:, 0], (1, 1), value=-0.5), 3)

    assert export(Pools(), tmp_path / "net.onnx", torch.randn(2, 3, 8, 8)).max_rel_error < 1e-6


def test_strides_of_what_lies_in_another_order(tmp_path: Path) -> None:
    """torch.onnx takes any tensor for contiguous: LED makes chunks that overlap of a transposed one."""

    def chunks(x: Tensor) -> Tensor:
        batch, step, channel = x.stride()
        return x.as_strided((x.shape[0], 2, 4, x.shape[2]), (batch, 2 * step, step, channel))

    class Chunks(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            heads = x.permute(1, 0, 2).reshape(8, -1, 3).transpose(0, 1)
            single = torch.as_strided(x[:, None].mT, (x.shape[0], 5), (48, 2), 1)
            return chunks(x), chunks(x.mT), chunks(heads), single

    assert export(Chunks(), tmp_path / "net.onnx", torch.randn(2, 8, 6)).max_rel_error == 0


def test_the_largest_of_parts_and_slopes_that_training_draws(tmp_path: Path) -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x[:, :, 0]
            return (
                F.adaptive_max_pool2d(x, 3), F.adaptive_max_pool2d(x, (None, 1)), F.adaptive_max_pool1d(y, 2),
                F.adaptive_max_pool3d(x, (2, 1, 7)), F.rrelu(x), F.rrelu(x, 0.1, 0.5, inplace=False),
            )  # fmt: skip

    assert export(Largest().eval(), tmp_path / "net.onnx", torch.randn(2, 3, 7, 8)).max_rel_error < 1e-6


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_distances(tmp_path: Path, p: float) -> None:
    class Distances(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cdist(x, y, p)

    file = export(Distances(), tmp_path / "net.onnx", (torch.randn(2, 5, 4), torch.randn(2, 3, 4)))
    assert file.max_rel_error < 1e-6


def test_nothing_to_squeeze(tmp_path: Path) -> None:
    class Squeezes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x.squeeze(1), torch.squeeze(x[:, :, None], dim=(2, 3)), x[:, :1].squeeze(dim=1)

    assert export(Squeezes(), tmp_path / "net.onnx", torch.randn(2, 3, 4)).max_rel_error < 1e-6


def test_a_check_of_values(tmp_path: Path) -> None:
    class Checks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check_tensor_all(x > -100)
            return x + 1

    assert export(Checks(), tmp_path / "net.onnx", torch.randn(2, 3)).max_rel_error < 1e-6


def test_what_is_added_or_multiplied_stays_however_little(tmp_path: Path) -> None:
    """The rewriter of onnxscript takes 1e-12 for 0 and 1.000008 for 1."""

    class Little(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("eps", torch.tensor(1e-12))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            p = x.relu() * 0
            return p / (p.sum(-1, keepdim=True) + 1e-12), 1 / (p + self.eps), (p - -1e-10).log(), (x + 0) * 1 * 1.000008

    path = tmp_path / "net.onnx"
    assert export(Little(), path, torch.randn(2, 3)).max_rel_error < 1e-5
    found = operators(path)
    assert (found["Add"], found["Sub"], found["Mul"]) == (2, 1, 2), "what does nothing goes, and nothing else"


def test_a_number_less_integers(tmp_path: Path) -> None:
    class Masks(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return x - (1.0 - mask) * 1e4, torch.rsub(mask.to(torch.uint8), 2.5)

    inputs = (torch.randn(2, 3), torch.randint(0, 2, (2, 3)))
    assert export(Masks(), tmp_path / "net.onnx", inputs).max_rel_error < 1e-5


class SequenceFirst(nn.Module):
    """With a matrix, and with a vector."""

    def __init__(self, kind: str):
        super().__init__()
        self.vector = nn.Parameter(torch.randn(8))
        self.front = nn.Linear(4, 8)
        self.rnn = getattr(nn, kind)(8, 8) if kind != "Linear" else None
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states = self.front(x).transpose(0, 1)
        states = torch.cat([states, states]) if self.rnn is None else self.rnn(states)[0]
        made = self.head(states.transpose(0, 1)) if self.rnn is not None else self.head(states).transpose(0, 1)
        return made, (states @ self.vector).T


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "Linear"])
def test_half_with_the_sequence_first(kind: str, tmp_path: Path) -> None:
    """onnxruntime ends the process when it loads a file in which a transpose that moves the batch meets a matrix."""
    net, path, x = randomise(SequenceFirst(kind)), tmp_path / "net.onnx", torch.randn(2, 3, 4)
    assert 1e-6 < export(net, path, x, half=True).max_rel_error < 5e-3
    if kind == "Linear":
        assert export(net.half(), path, x.half()).max_rel_error < 5e-3


class Read(nn.Module):
    """Two operators that have no float16 read the same tensor."""

    def __init__(self, operator: Callable[[Tensor, int], Tensor]):
        super().__init__()
        self.front, self.operator = nn.Linear(4, 8), operator

    def forward(self, x: Tensor) -> Tensor:
        states = self.front(x)
        return self.operator(states, 1) + self.operator(states, 2)


@pytest.mark.parametrize(
    "operator",
    [
        lambda x, n: x.cumsum(n),
        lambda x, n: torch.maximum(x, n * x),
        lambda x, n: x.topk(3, largest=n > 1)[0],
    ],
    ids=["cumsum", "maximum", "topk"],
)
def test_what_has_no_float16_stays_in_float32(operator: Callable[[Tensor, int], Tensor], tmp_path: Path) -> None:
    assert export(Read(operator), tmp_path / "net.onnx", torch.randn(2, 3, 4), half=True).max_rel_error < 5e-3


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    small = fxprune.prune(randomise(Net()), torch.randn(1, 3, 8, 8), params=0.5, method="l1", progress=False)
    report = small.meta["fxprune"]
    found = export(small, tmp_path / "net.onnx")
    written = {each.key: each.value for each in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert found.metadata == written
    assert written == {
        "fxprune_version": fxprune.__version__,
        "torch_version": torch.__version__,
        "model": "Net",
        "method": "l1",
        "macs_before": str(report.macs_before),
        "macs_after": str(report.macs_after),
        "budget": "params",
        "budget_ratio": "0.5",
        "plan_digest": report.plan.digest,
    }
    again = fxprune.apply(randomise(Net()), report.plan, torch.randn(1, 3, 8, 8))
    assert again.meta["fxprune"].budget is None, "a plan knows nothing of a budget"
    assert deploy_onnx._metadata(nn.Linear(1, 1)).keys() == {"fxprune_version", "torch_version"}


class Coarse(nn.Module):
    """Rounding alone decides what it adds, ``always`` or for inputs of a positive mean."""

    def __init__(self, always: bool):
        super().__init__()
        self.front, self.always = nn.Linear(64, 64), always

    def forward(self, x: Tensor) -> Tensor:
        added = (self.front(x).exp().log() > self.front(x)).float()
        return x + added * (True if self.always else x.mean() > 0)


def test_inputs_of_which_rounding_decides_are_no_measure(tmp_path: Path) -> None:
    net, path, x = randomise(Coarse(always=False)), tmp_path / "net.onnx", torch.randn(2, 64)
    validation = export(net, path, x, provider=runtime.CPU)
    assert validation.max_rel_error < 1e-6
    assert re.search(r"output 0 is off by \S+ on CPUExecutionProvider at batch size \d, but in torch", str(validation))
    means = [make_inputs(describe_inputs((x,), {}), batch=n, seed=n)[0][0].mean() for n in (1, 3, 5)]
    assert max(means) > 0, "one of the first that are drawn is none"
    message = refused(ExportError, randomise(Coarse(always=True)), path, x, provider=runtime.CPU)
    assert re.search(
        r"tolerance 1e-03; in torch, too, it moves by \S+ when the inputs do by 1e-05, so that nothing decides",
        message,
    )


# -- a file by itself


def test_a_file_is_validated_by_itself(tmp_path: Path) -> None:
    net, path, x = randomise(Pixels()), tmp_path / "net.onnx", (torch.randn(1, 3, 8, 8), torch.randn(1, 1, 2, 2))
    exported = export(net, path, x, dynamic_size=True, opset=21, half=True)
    found = validate(path, net.train(), x, provider=runtime.CPU)
    assert (found.opset, found.dtype, found.sizes, found.metadata) == (
        exported.opset,
        exported.dtype,
        exported.sizes,
        exported.metadata,
    )
    assert found.runs[0].max_rel_error == exported.runs[-1].max_rel_error
    assert net.training
    net.up.bias.data += 1
    with pytest.raises(ExportError, match=r"^the exported file does not compute what torch does: output 0 is off by "):
        validate(path, net, x)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    net, path, x = randomise(Net()), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8)
    small = fxprune.prune(net, x, flops=0.5, progress=False)
    export(small, path)
    with pytest.raises(ExportError) as caught:
        validate(path, nn.Linear(4, 4), torch.randn(2, 4))
    assert str(caught.value) == (
        f"'{path}' is the file of another network: it takes x [batch, 3, 8, 8], and Linear [2, 4]"
    )
    other = fxprune.prune(net, x, flops=0.5, method="random", progress=False)
    with pytest.raises(ExportError, match=r"is the file of another cut: its plan has the digest [0-9a-f]{12}…, that "):
        validate(path, other)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", torch.randn(1, 4)
    export(nn.Linear(4, 4), path, x)
    content = path.read_bytes()
    for wrong in (content[:-30], b"", b"no such thing"):
        path.write_bytes(wrong)
        with pytest.raises(ExportError) as caught:
            validate(path, nn.Linear(4, 4), x)
        assert re.fullmatch(rf"'{path}' is damaged or no ONNX file \(.+\); export it again", str(caught.value))
    with pytest.raises(InputError) as missing:
        validate(tmp_path / "none.onnx", nn.Linear(4, 4), x)
    assert str(missing.value) == f"there is no file '{tmp_path / 'none.onnx'}'"
    with pytest.raises(InputError, match=r"^Linear\(.*\) is no path: pass a str or a pathlib\.Path$"):
        validate(nn.Linear(4, 4), path, x)
    with pytest.raises(InputError, match=r"^module is None; pass a torch\.nn\.Module\.$"):
        validate(path, None, x)


def test_providers_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA first, the CPU last; one that does not work here is left out and named, with the reason."""
    opened = []

    class Session(runtime.Session):
        def __init__(self, path: Path, provider: str) -> None:
            opened.append(provider)
            if provider == "BrokenExecutionProvider":
                raise ExportError("no such library")
            super().__init__(path, runtime.CPU)

    known = ["TensorrtExecutionProvider", "BrokenExecutionProvider", runtime.CPU, runtime.CUDA]
    net, path, x = nn.Linear(4, 4), tmp_path / "net.onnx", torch.randn(1, 4)
    export(net, path, x)
    monkeypatch.setattr(runtime, "available_providers", lambda: known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "Session", Session)
    found = validate(path, net, x)
    assert opened == [runtime.CUDA, "BrokenExecutionProvider", runtime.CPU]
    assert [run.provider for run in found.runs] == [runtime.CUDA, runtime.CPU]
    assert found.provider == runtime.CUDA
    assert found.skipped == {
        "TensorrtExecutionProvider": "it builds an engine for every shape, for minutes",
        "BrokenExecutionProvider": "no such library",
    }
    assert f" ms on {runtime.CUDA}, " in str(found)
    opened.clear()
    with pytest.raises(ExportError, match=r"^no such library$"):
        validate(path, net, x, provider="BrokenExecutionProvider")
    assert opened == ["BrokenExecutionProvider"]


def test_the_exporter_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "torch.fx", "onnxscript")}
    export(Net(), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8))
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert levels == {name: logging.getLogger(name).level for name in levels}


# -- what is refused: one sentence, no file


def refused(kind: type[Exception], module: nn.Module, path: Path, *inputs: Any, **options: Any) -> str:
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    modes = [each.training for each in module.modules()]
    with pytest.raises(kind) as caught:
        export(module, path, *inputs, **options)
    assert (sorted(path.parent.iterdir()) if path.parent.is_dir() else []) == before
    assert [each.training for each in module.modules()] == modes
    return str(caught.value)


class Wrong(nn.Module):
    """Computes something else in the exported graph than in Python."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.01 if torch.compiler.is_exporting() else 1.0)


class WrongShape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] if torch.compiler.is_exporting() else x


class OtherAtEight(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] == 8 else 2 * x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.shape[0])


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class NoOperator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


class AlwaysDropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


class OneSample(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4)


def test_a_file_that_computes_something_else(tmp_path: Path) -> None:
    message = refused(ExportError, Wrong(), tmp_path / "net.onnx", torch.randn(1, 4))
    provider = "CUDAExecutionProvider" if torch.cuda.is_available() else "CPUExecutionProvider"
    assert message == (
        "the exported file does not compute what torch does: output 0 is off by 1.0e-02 of its largest magnitude "
        f"on {provider} at batch size 1, tolerance 1e-03"
    )
    message = refused(ExportError, WrongShape(), tmp_path / "net.onnx", torch.randn(1, 4))
    assert message == "the exported file returns the shapes [[1, 2]] at batch size 1, torch [[1, 4]]"


def test_a_network_that_is_random_in_eval_mode(tmp_path: Path) -> None:
    assert refused(ExportError, AlwaysDropping(), tmp_path / "net.onnx", torch.randn(1, 400)) == (
        "AlwaysDropping returns something else at every run, in eval mode too, so that no file can be checked; "
        "look for random operations, for instance a dropout that does not ask self.training"
    )


@pytest.mark.parametrize("stage", ["_converted", "check"])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(deploy_onnx, stage, interrupt)
    net = nn.Linear(4, 4).train()
    (tmp_path / "net.onnx").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        export(net, tmp_path / "net.onnx", torch.randn(1, 4))
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("net.onnx", "old")]
    assert net.training


def test_opsets_that_cannot_be_written(tmp_path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    for wrong in (0, newest + 1, True, "20"):
        assert refused(InputError, Net(), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), opset=wrong) == (
            f"opset={wrong!r}: pass a number from 1 to {newest}, the newest of onnx {onnx.__version__}"
        )
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1))
    message = refused(ExportError, net, tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), opset=11)
    assert message == "torch.onnx cannot write Sequential with opset 11: it leaves it at 18; pass opset=18 or none"


def test_an_old_file_survives_a_failed_export(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_text("old")
    refused(ExportError, Wrong(), tmp_path / "net.onnx", torch.randn(1, 4))
    assert (tmp_path / "net.onnx").read_text() == "old"


def test_a_network_that_torch_export_cannot_capture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    remedy = "its forward must take sizes from x.shape and not branch on the values of tensors"
    assert refused(ExportError, FixedBatch(), tmp_path / "net.onnx", torch.randn(1, 4)) == (
        f"torch.export cannot capture FixedBatch with a dynamic batch: the network works for batch = 2 only; {remedy}"
    )
    assert refused(ExportError, Branching(), tmp_path / "net.onnx", torch.randn(1, 4)) == (
        "torch.export cannot capture Branching with a dynamic batch: "
        f"which operations run depends on the values of its tensors; {remedy}"
    )
    assert refused(ExportError, OtherAtEight(), tmp_path / "net.onnx", torch.randn(1, 4)) == (
        "torch.export cannot capture OtherAtEight with a dynamic batch: "
        f"the network does something else for batch = 8; {remedy}"
    )
    assert capfd.readouterr() == ("", "")


# -- sizes that a recording does not cover


def guard(x: Tensor, dim: int, size: int) -> Tensor:
    """As recorded graphs hold it."""
    if x.shape[dim] != size:
        raise GuardError(f"dim {dim} of x is {x.shape[dim]}, recorded with {size} (net.py:7)")
    return x


def guarded(dim: int, size: int, wrapped: bool = False) -> nn.Module:
    graph = torch.fx.Graph()
    x = graph.call_function(guard, (graph.placeholder("x"), dim, size))
    graph.output(graph.call_module("conv", (x,)))
    module = torch.fx.GraphModule({"conv": randomise(nn.Conv2d(3, 4, 3))}, graph)
    if wrapped:
        return nn.Sequential(module)
    module.meta[DIMS_KEY] = [
        {"tensor": 0, "dim": 1, "size": 3, "free": False, "why": "net.py:6 is a convolution"},
        {"tensor": 0, "dim": dim, "size": size, "free": False, "why": "net.py:7 takes no other"},
        {"tensor": 0, "dim": 3, "size": 8, "free": True, "why": ""},
    ]
    return module


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_has_the_batch_that_the_recording_covers(tmp_path: Path, size: int, wrapped: bool) -> None:
    """It is told by the recorded graph, or, where that is a part of a network, by the error alone."""
    net, path, x = guarded(0, size, wrapped), tmp_path / "net.onnx", torch.randn(size, 3, 8, 8)
    found = export(net, path, x)
    assert shapes(path, "input") == {"input" if wrapped else "x": [size, 3, 8, 8]}
    assert shapes(path, "output") == {"output": [size, 4, 6, 6]}
    assert found.batches == (size,)
    other = 3 if size == 2 else 2
    why = f"dim 0 of x is {other}, recorded with {size} (net.py:7)" if wrapped else "net.py:7 takes no other"
    assert found.metadata["fixed_sizes"] == f"batch = {size}: {why}"
    assert 0 < validate(path, net, x).max_rel_error < 1e-5


@pytest.mark.parametrize("recorded", [False, True])
def test_a_network_that_does_something_else_for_large_batches(recorded: bool, tmp_path: Path) -> None:
    limit = 63

    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.shape[0] > limit else x

    net, x = Large(), torch.randn(1, 3)
    found = export(fxprune.record(net, x) if recorded else net, tmp_path / "net.onnx", x)
    assert found.metadata["fixed_sizes"] == "batch <= 63: the network does something else for larger ones"
    assert shapes(tmp_path / "net.onnx", "input") == {"x": ["batch", 3]}
    limit = 4
    with pytest.raises(ExportError, match=r"batch = Dim\('batch', max=4\) only"):
        export(Large(), tmp_path / "net.onnx", x)


class ThreeFactors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 16), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnd,bmd,bme->bne", self.left(x), self.right(x), x)


def test_products_of_three_have_a_free_batch_where_opt_einsum_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It chooses an order by comparing sizes; a stand-in, since it need not be there."""

    def contract_path(equation: str, *factors: Tensor, **settings: Any) -> tuple[list[tuple[int, int]], str]:
        return [(0, 1), (0, 1)], f"{[int(size) for factor in factors for size in factor.shape]}"

    installed = torch.backends.opt_einsum.m
    for name, value in (("get_opt_einsum", lambda: package), ("is_available", lambda: True), ("enabled", True)):
        monkeypatch.setattr(installed, name, value)
    monkeypatch.setattr(installed, "strategy", "auto")
    package = SimpleNamespace(contract_path=contract_path)
    small = fxprune.prune(randomise(ThreeFactors()), torch.randn(2, 5, 4), flops=0.6, round_to=1, progress=False)
    assert export(small, tmp_path / "net.onnx").batches == (1, 3, 5)
    fxprune.save(small, tmp_path / "net.pt2")
    x = torch.randn(7, 5, 4)
    torch.testing.assert_close(fxprune.load(tmp_path / "net.pt2")(x), small(x))
    assert torch.backends.opt_einsum.enabled  # as it was


def test_sizes_that_the_recording_does_not_cover_are_not_compared(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", torch.randn(3, 3, 8, 8)
    free = guarded(0, 3, wrapped=True)[0].conv  # type: ignore[index]
    export(free, path, x)
    assert validate(path, free, x).batches == (1, 3, 5)
    covered = guarded(0, 4, wrapped=True)
    covered[0].conv = free  # type: ignore[index]
    assert validate(path, covered, torch.randn(4, 3, 8, 8)).batches == (4,), "only the example's is left"
    with pytest.raises(GuardError, match=r"^dim 0 of x is 3, recorded with 4 \(net.py:7\)$"):
        validate(path, covered, x)


def test_a_height_that_is_fixed_is_refused_before_the_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, path, x = guarded(2, 8), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8)
    assert "fixed_sizes" not in export(net, path, x).metadata, "a file keeps its height anyway"
    monkeypatch.setattr(deploy_onnx, "_converted", lambda *_: pytest.fail("the work has started"))
    assert refused(InputError, net, path, x, dynamic_size=True) == (
        "dynamic_size: the height of x is fixed at 8 (net.py:7 takes no other); leave out dynamic_size"
    )


def test_an_operator_that_onnx_has_not(tmp_path: Path) -> None:
    message = refused(ExportError, NoOperator(), tmp_path / "net.onnx", torch.randn(1, 4, 4))
    assert message.startswith(
        "torch.onnx cannot write NoOperator: No ONNX function found for <OpOverload(op='aten.linalg_eig'"
    )
    assert "\n" not in message


def test_inputs_that_do_not_take_another_batch_size(tmp_path: Path) -> None:
    assert refused(ExampleInputsError, OneSample(), tmp_path / "net.onnx", torch.randn(1, 4)) == (
        "OneSample fails on random inputs of the shapes [[2, 4]]: shape '[4]' is invalid for input of size 8; "
        "an export needs inputs whose dim 0 is a batch of any size"
    )
    assert "cannot tell what OneSample.forward(x) takes" in refused(
        ExampleInputsError, OneSample(), tmp_path / "net.onnx"
    )


def test_outputs_that_nothing_can_be_compared_with(tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    net.bias.data[0] = float("nan")
    assert refused(ExportError, net, tmp_path / "net.onnx", torch.randn(1, 4)) == (
        "the outputs are NaN in torch already, so that no file can be checked; look at the weights, and at whether "
        "the example inputs show what the network takes (positive numbers only, say)"
    )
    assert refused(ExportError, nn.Linear(4, 4).bfloat16(), tmp_path / "net.onnx", torch.randn(1, 4).bfloat16()) == (
        "onnxruntime has no bfloat16 kernels to check most networks with; export model.float()"
    )


def test_what_is_found_before_the_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy_onnx, "_converted", lambda *_: pytest.fail("the work has started"))
    x = torch.randn(1, 3, 8, 8)
    assert refused(InputError, Net(), tmp_path / "no" / "net.onnx", x) == (
        f"cannot write '{tmp_path}/no/net.onnx': the folder '{tmp_path}/no' does not exist; create it first"
    )
    message = refused(InputError, Net(), tmp_path / "net.onnx", x, provider="GPU")
    assert message.startswith("this onnxruntime has no execution provider 'GPU'; it has ")
    assert "CPUExecutionProvider" in message


def test_a_provider_that_does_not_work_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs the GPU build of onnxruntime on a machine without a GPU")
    message = refused(
        ExportError, Net(), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), provider="CUDAExecutionProvider"
    )
    assert message == (
        "onnxruntime's CUDAExecutionProvider does not work on this machine; pass provider='CPUExecutionProvider'"
    )


def test_errors_of_outputs() -> None:
    inf, nan = float("inf"), float("nan")
    for actual, expected, errors in [
        ([1.0, 2.0], [1.0, 2.0], (0.0, 0.0)),
        ([1.0, 2.0], [1.0, 4.0], (2.0, 0.5)),
        ([-inf, 2.0], [-inf, 2.0], (0.0, 0.0)),
        ([0.0, 1e-9], [0.0, 0.0], (1e-9, inf)),
        ([inf, 2.0], [4.0, 2.0], (inf, inf)),
        ([], [], (0.0, 0.0)),
    ]:
        assert _error(
            torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
        ) == pytest.approx(errors)
    absolute, relative = _error(torch.tensor([nan]), torch.tensor([1.0]))
    assert not relative <= 1e-3
    assert not absolute <= 1e-3


def test_large_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As torch does above its threshold; a network of 2 GB is too much for a test.
    onnx_program = sys.modules["torch.onnx._internal.exporter._onnx_program"]
    monkeypatch.setattr(onnx_program, "_LARGE_MODEL_THRESHOLD", 1)
    export(nn.Linear(40, 40), tmp_path / "net.onnx", torch.randn(1, 40))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape == ["batch", 40]


class Clipped(nn.Module):
    """One tensor clipped three times, within bounds that are buffers: the rewriter loses constants of equal names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        for i in range(3):
            self.register_buffer(f"low_{i}", torch.tensor(-0.1 * (i + 1)))
            self.register_buffer(f"high_{i}", torch.tensor(0.2 * (i + 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x
        bounds = [(self.get_buffer(f"low_{i}"), self.get_buffer(f"high_{i}")) for i in range(3)]
        return sum(layer(torch.clamp(x, *bound)) for layer, bound in zip(self.layers, bounds, strict=True))  # type: ignore[return-value]


def test_one_tensor_clipped_several_times(tmp_path: Path) -> None:
    assert export(Clipped(), tmp_path / "net.onnx", torch.randn(2, 4)).max_rel_error < 1e-5
