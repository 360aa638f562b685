from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import randomise
from torch import Tensor, nn

from fxprune.errors import ExampleInputsError
from fxprune.inputs import (
    RECORD_KEY,
    TensorSpec,
    describe_inputs,
    infer_example_inputs,
    infer_inputs,
    make_inputs,
    normalise_inputs,
    resolve_inputs,
    specs_of,
    tensors_of,
)


@dataclass
class Batch:
    ids: Tensor
    scale: float


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return x * scale if mask is None else x * mask * scale


def message_of(example_inputs: Any, example_kwargs: Any = None) -> str:
    with pytest.raises(ExampleInputsError) as caught:
        normalise_inputs(example_inputs, example_kwargs)
    return str(caught.value)


# -- what the user passes


def test_a_tensor_is_one_argument_and_a_tuple_or_list_is_all() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert normalise_inputs(x) == ((x,), {})
    assert normalise_inputs((x, None, 2)) == ((x, None, 2), {})
    assert normalise_inputs([x, y]) == ((x, y), {})
    assert normalise_inputs(({"ids": x},)) == (({"ids": x},), {})
    assert normalise_inputs(None, {"x": x}) == ((), {"x": x})
    assert normalise_inputs(x, {"mask": None}) == ((x,), {"mask": None})
    assert normalise_inputs((Batch(x, 1.0),))[0][0].ids is x


def test_what_is_no_input_is_refused_with_the_remedy() -> None:
    assert message_of({"x": torch.zeros(1)}) == (
        "example_inputs is a dict; pass keyword arguments as example_kwargs=..., "
        "or, if forward takes the dict itself, wrap it: example_inputs=(the_dict,)"
    )
    assert message_of(np.zeros(3)) == (
        "example_inputs is a ndarray; pass a torch tensor, for instance torch.as_tensor(example_inputs)"
    )
    assert message_of("x") == (
        "example_inputs is a str; pass a tensor, or a tuple of all positional arguments of forward"
    )
    assert message_of(3).startswith("example_inputs is an int; pass a tensor")
    no_tensor = (
        "the example inputs hold no tensor; pass the tensors that the model's forward takes, "
        "as example_inputs=(x, ...) or example_kwargs={'x': ...}"
    )
    assert message_of(()) == message_of((3, None)) == message_of(None) == no_tensor
    bad_kwargs = "pass a dict from argument names of forward to values"
    assert message_of(torch.zeros(1), [1]) == f"example_kwargs is a list; {bad_kwargs}"
    assert message_of(torch.zeros(1), {1: 2}) == f"example_kwargs is a dict; {bad_kwargs}"


# -- what is inferred


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: timm.create_model("resnet18"), (1, 3, 224, 224)),
        (lambda: timm.create_model("resnet18", in_chans=1), (1, 1, 224, 224)),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=(96, 64)), (1, 3, 96, 64)),
        (lambda: timm.create_model("mixer_s32_224", img_size=64), (1, 3, 64, 64)),
        (lambda: timm.create_model("inception_v3"), (1, 3, 299, 299)),
        (lambda: timm.create_model("resnet18", features_only=True), (1, 3, 224, 224)),
        (torchvision.models.shufflenet_v2_x0_5, (1, 3, 224, 224)),
        (lambda: torchvision.models.inception_v3(init_weights=False), (1, 3, 299, 299)),
        (lambda: torchvision.models.quantization.inception_v3(init_weights=False), (1, 3, 299, 299)),
        (lambda: torchvision.models.googlenet(init_weights=False), (1, 3, 224, 224)),
        (lambda: torchvision.models.VisionTransformer(96, 16, 1, 2, 32, 64), (1, 3, 96, 96)),
        (lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None), (1, 3, 224, 224)),
    ],
)
def test_inferred_inputs_are_what_the_model_runs_on(model: Any, shape: tuple[int, ...]) -> None:
    network = model().eval()
    (x,) = infer_example_inputs(network)
    assert tuple(x.shape) == shape
    assert x.std() > 0.9
    with torch.no_grad():
        network(x)


def test_inferred_inputs_have_the_dtype_of_the_parameters_and_never_change() -> None:
    model = timm.create_model("resnet18").to(torch.float64)
    (x,) = infer_example_inputs(model)
    assert x.dtype == torch.float64
    torch.manual_seed(1)
    assert torch.equal(x, infer_example_inputs(model)[0])


@pytest.mark.gpu
def test_inferred_inputs_are_on_the_device_of_the_parameters() -> None:
    assert infer_example_inputs(timm.create_model("resnet18").cuda())[0].is_cuda


def test_a_model_that_says_nothing_is_an_error_that_says_what_to_pass() -> None:
    with pytest.raises(ExampleInputsError) as caught:
        infer_example_inputs(Masked())
    assert str(caught.value) == (
        "cannot tell what Masked.forward(x, mask, scale) takes: example inputs are inferred for timm models and for "
        "torchvision's classification and segmentation models only; pass example_inputs, a tensor or a tuple of "
        "tensors with the batch first, for instance example_inputs=torch.randn(1, 3, 224, 224)"
    )


@pytest.mark.parametrize(
    "model",
    [
        lambda: torchvision.models.resnet18().layer1[0],
        lambda: torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights_backbone=None),
        torchvision.models.video.r3d_18,
    ],
)
def test_parts_of_networks_and_other_tasks_are_not_guessed(model: Any) -> None:
    with pytest.raises(ExampleInputsError, match="cannot tell what"):
        infer_example_inputs(model())


def test_a_recorded_graph_knows_its_inputs() -> None:
    graph = torch.fx.symbolic_trace(Masked())
    graph.meta[RECORD_KEY] = describe_inputs((torch.zeros(4, 3),), {"mask": torch.zeros(4, 1, dtype=torch.bool)})
    (x,), kwargs = infer_inputs(graph)
    assert x.shape == (4, 3)
    assert kwargs["mask"].dtype == torch.bool
    assert [tensor.shape for tensor in resolve_inputs(graph)[0]] == [(4, 3)]


def test_resolve_prefers_what_was_passed() -> None:
    model = timm.create_model("resnet18")
    x = torch.zeros(2, 3, 64, 64)
    assert resolve_inputs(model, x) == ((x,), {})
    assert resolve_inputs(Masked(), None, {"x": x}) == ((), {"x": x})


# -- made again


def test_made_inputs_are_like_those_described() -> None:
    Pair = namedtuple("Pair", "left right")
    ids = torch.tensor([[5, 9], [7, 6]])
    args = (torch.zeros(2, 3), {"pair": Pair(ids, None)}, [torch.zeros(4, 2, dtype=torch.float64)])
    kwargs = {
        "batch": Batch(torch.zeros(2, dtype=torch.bool), 0.5),
        "flag": True,
        "z": torch.zeros(2, 1, dtype=torch.cfloat),
    }
    record = describe_inputs(args, kwargs)
    assert record["args"][0] == TensorSpec((2, 3), torch.float32)
    assert record["args"][1]["pair"].left == TensorSpec((2, 2), torch.int64, 5, 9)
    assert len(specs_of(record)) == 5

    made_args, made_kwargs = make_inputs(record, batch=50)
    assert [(tuple(each.shape), each.dtype) for each in tensors_of((made_args, made_kwargs))] == [
        ((50, 3), torch.float32),
        ((50, 2), torch.int64),
        ((4, 2), torch.float64),
        ((50,), torch.bool),
        ((50, 1), torch.complex64),
    ]
    assert made_args[1]["pair"].right is None
    assert made_kwargs["flag"] is True
    assert made_kwargs["batch"].scale == 0.5
    assert set(made_args[1]["pair"].left.flatten().tolist()) == {5, 6, 7, 8, 9}
    assert set(made_kwargs["batch"].ids.tolist()) == {True, False}
    assert 0.7 < made_args[0].std() < 1.3


def test_made_inputs_depend_on_the_seed_alone() -> None:
    record = describe_inputs((torch.zeros(2, 3),), {})
    ((first,), _), ((again,), _), ((other,), _) = (make_inputs(record, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2, 3)


# -- the helper of the other tests


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vgg11_bn", "convnext_atto", "vit_tiny_patch16_224"])
def test_randomised_networks_neither_vanish_nor_explode(name: str) -> None:
    model = randomise(timm.create_model(name)).eval()
    x = make_inputs(describe_inputs((torch.zeros(2, 3, 224, 224),), {}))[0][0]
    with torch.no_grad():
        y = model(x)
    assert 1e-2 < y.std() < 1e2
    # The second image gives another answer: the biases do not drown the signal.
    assert (y[0] - y[1]).std() > 1e-3 * y.std()
    small = [parameter for parameter in model.parameters() if parameter.numel() <= 10_000]
    assert all(parameter.unique().numel() > 0.9 * parameter.numel() for parameter in small)
