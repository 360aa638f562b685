"""Example inputs: checked when given, inferred where the model says enough. Here are also the names of ``records``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import ExampleInputsError
from fxprune.recording.module import device_of
from fxprune.recording.records import (
    DIMS_KEY,
    RECORD_KEY,
    Args,
    Kwargs,
    batch_size,
    describe_inputs,
    fixed_batch,
    fixed_dims,
    image_size,
    input_names,
    is_batched,
    is_image,
    like_parameters,
    make_inputs,
    only_batch,
    other_values,
    resized,
    specs_of,
    with_sizes,
    with_values,
)
from fxprune.recording.spec import TensorSpec, from_json, to_json
from fxprune.recording.structure import leaves_of, map_leaves, map_tensors, tensors_of

__all__ = [
    "DIMS_KEY",
    "RECORD_KEY",
    "Args",
    "Kwargs",
    "TensorSpec",
    "batch_size",
    "describe_inputs",
    "device_of",
    "fixed_batch",
    "fixed_dims",
    "from_json",
    "image_like",
    "image_size",
    "infer_inputs",
    "input_names",
    "is_batched",
    "is_image",
    "leaves_of",
    "like_parameters",
    "make_inputs",
    "map_leaves",
    "map_tensors",
    "normalise_inputs",
    "only_batch",
    "other_values",
    "resized",
    "resolve_inputs",
    "specs_of",
    "tensors_of",
    "to_json",
    "with_sizes",
    "with_values",
]

# torchvision's classification models take any size from about 32 up, but are defined and measured at these.
_TORCHVISION_SIZE = 224
_TORCHVISION_SIZES = {"Inception3": 299}
# Models of these packages take lists of images, clips or pairs of frames: no single tensor fits them.
_TORCHVISION_OTHER_TASKS = ("detection", "video", "optical_flow")


def normalise_inputs(example_inputs: Any, example_kwargs: Any = None) -> tuple[Args, Kwargs]:
    """What the user passed, as ``(args, kwargs)``: a tensor is one argument, a tuple or a list is all of them.

    Raises:
        ExampleInputsError: something that cannot be spread over the arguments of ``forward``, or no tensor in it.
    """
    args = _as_args(example_inputs)
    if example_kwargs is None:
        kwargs: Kwargs = {}
    elif isinstance(example_kwargs, Mapping) and all(isinstance(name, str) for name in example_kwargs):
        kwargs = dict(example_kwargs)
    else:
        raise ExampleInputsError(
            f"example_kwargs is {_a(example_kwargs)}; pass a dict from argument names of forward to values"
        )
    if not tensors_of((args, kwargs)):
        raise ExampleInputsError(
            "the example inputs hold no tensor; pass the tensors that the model's forward takes, "
            "as example_inputs=(x, ...) or example_kwargs={'x': ...}"
        )
    return args, kwargs


def infer_inputs(model: nn.Module) -> tuple[Args, Kwargs]:
    """Example inputs ``(args, kwargs)``, batch size 1, for a model that says what it takes; the same at every call.

    A graph that fxprune recorded knows what it was recorded with, with the values of integers and masks; its floats are
    made in the dtype that the graph has now, after ``half()`` say. timm's models carry their input size in
    ``pretrained_cfg``. torchvision's classification models are taken at 224 x 224 (Inception v3 at 299), and so are its
    segmentation models: these are fully convolutional, every MAC ratio is that of any other size, and 224 is a multiple
    of their stride of 8 to 32. The tensors are standard normal, on the device and of the dtype of the first parameter.

    Raises:
        ExampleInputsError: the model is none of these; says what to pass.
    """
    recorded = model.meta.get(RECORD_KEY) if isinstance(model, torch.fx.GraphModule) else None
    if recorded is not None:
        return make_inputs(like_parameters(recorded, model), device_of(model), permute=False)
    shape = _timm_shape(model) or _torchvision_shape(model)
    if shape is None:
        raise ExampleInputsError(_cannot_infer(model))
    return (image_like(model, shape),), {}


def image_like(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """A standard normal tensor [1, *shape] on the device and of the dtype of the first parameter; always the same."""
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    dtype = dtype if dtype.is_floating_point else torch.float32
    return TensorSpec((1, *shape), dtype).make(torch.Generator().manual_seed(0), device_of(model))


def resolve_inputs(model: nn.Module, example_inputs: Any = None, example_kwargs: Any = None) -> tuple[Args, Kwargs]:
    """What the user passed, checked; inferred from the model where nothing was passed.

    Raises:
        ExampleInputsError: see :func:`normalise_inputs` and :func:`infer_inputs`.
    """
    if example_inputs is None and not example_kwargs:
        return infer_inputs(model)
    return normalise_inputs(example_inputs, example_kwargs)


def _as_args(example_inputs: Any) -> Args:
    if example_inputs is None:
        return ()
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    # A named tuple is one structured argument to most models, yet it is a tuple; the user can always wrap it.
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, (str, bytes)):
        return tuple(example_inputs)
    if isinstance(example_inputs, Mapping):
        raise ExampleInputsError(
            "example_inputs is a dict; pass keyword arguments as example_kwargs=..., "
            "or, if forward takes the dict itself, wrap it: example_inputs=(the_dict,)"
        )
    if hasattr(example_inputs, "__array__"):
        raise ExampleInputsError(
            f"example_inputs is {_a(example_inputs)}; pass a torch tensor, for instance torch.as_tensor(example_inputs)"
        )
    raise ExampleInputsError(
        f"example_inputs is {_a(example_inputs)}; pass a tensor, or a tuple of all positional arguments of forward"
    )


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeio" else f"a {name}"


def _timm_shape(model: nn.Module) -> tuple[int, ...] | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if config is None:
        return None
    read = config.get if isinstance(config, Mapping) else lambda key: getattr(config, key, None)
    declared = read("input_size")
    if not isinstance(declared, Sequence) or len(declared) != 3:
        return None
    channels, height, width = declared
    # The configuration is that of the published weights; create_model(in_chans=1, img_size=96) does not change it.
    first = read("first_conv")
    if isinstance(first, str):
        seen = getattr(_submodule(model, first), "in_channels", channels)
        # Space-to-depth before the first convolution multiplies what the network is given.
        channels = seen if seen < 2 * channels else channels
        size = getattr(_submodule(model, first.rpartition(".")[0]), "img_size", None)
        if isinstance(size, Sequence) and len(size) == 2:
            height, width = size
    return int(channels), int(height), int(width)


def _torchvision_shape(model: nn.Module) -> tuple[int, ...] | None:
    prefix = "torchvision.models."
    home = next((cls for cls in type(model).__mro__ if cls.__module__.startswith(prefix)), None)
    if home is None or home.__module__.removeprefix(prefix).split(".")[0] in _TORCHVISION_OTHER_TASKS:
        return None
    # Parts of a network live in the same modules: a BasicBlock takes features, not images.
    if not _is_whole_network(home):
        return None
    known = (_TORCHVISION_SIZES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _TORCHVISION_SIZES)
    size = getattr(model, "image_size", next(known, _TORCHVISION_SIZE))
    stem = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    return (stem.in_channels if stem is not None else 3), size, size


def _is_whole_network(home: type) -> bool:
    """Whether a function of its torchvision module (``resnet50``, ``vit_b_16``) says that it returns this class."""
    return any(
        inspect.isfunction(builder) and inspect.signature(builder).return_annotation in (home, home.__name__)
        for builder in vars(sys.modules[home.__module__]).values()
    )


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _cannot_infer(model: nn.Module) -> str:
    parameters = inspect.signature(model.forward).parameters
    return (
        f"cannot tell what {type(model).__name__}.forward({', '.join(parameters)}) takes: example inputs are inferred "
        "for timm models and for torchvision's classification and segmentation models only; pass example_inputs, "
        "a tensor or a tuple of tensors with the batch first, for instance example_inputs=torch.randn(1, 3, 224, 224)"
    )
