"""What models and example inputs must be, said before the work begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from fxprune.errors import ExampleInputsError, InputError, ModelError
from fxprune.recording.inputs import Args, Kwargs, normalise_inputs, resolve_inputs, tensors_of


def check_model(model: Any) -> None:
    """Refuse what is no model in Python, or one whose tensors have no values and could have none.

    Raises:
        InputError: it is no module.
        ModelError: it is scripted, or a tensor is lazy, fake or of a class that stands for something else.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {model!r}; pass a torch.nn.Module.")
    if detect_fake_mode() is not None:
        raise InputError("This is called under FakeTensorMode, where tensors have no values: call it outside.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{model.original_name} was scripted or traced by torch.jit, and its Python code, which is what is "
            "followed, is no part of it. Pass the nn.Module that it was made from."
        )
    exported = next((name for name, module in model.named_modules() if _is_exported(module)), None)
    if exported is not None:
        raise ModelError(
            f"{exported or 'The model'} is the module of a program of torch.export, whose layers are gone and whose "
            "sizes are fixed. Pass the nn.Module that it was made from."
        )
    if torch.get_default_device().type == "meta":
        raise InputError("The default device is meta, where nothing can be computed: call this outside of it.")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = type(tensor)
        if is_lazy(tensor):
            raise ModelError(
                f"{name} has no shape yet, as it belongs to a lazy layer. Run the model once on real inputs, "
                "model(x), then prune it."
            )
        if isinstance(tensor, FakeTensor):
            raise ModelError(
                f"{name} is a fake tensor and has no values. Make the model outside of FakeTensorMode; one on the meta "
                "device can be pruned without values."
            )
        if kind is not Tensor and not issubclass(kind, nn.Parameter):
            raise ModelError(
                f"{name} is a {kind.__name__}, a tensor with rules of its own. Prune the model with plain tensors, "
                f"then make them {kind.__name__} again."
            )


def _is_exported(module: nn.Module) -> bool:
    """Made by ``torch.export``, which leaves neither train nor eval."""
    return isinstance(module, fx.GraphModule) and {"train", "eval", "range_constraints"} <= module.__dict__.keys()


def checked_inputs(model: nn.Module, example_inputs: Any, example_kwargs: Any) -> tuple[Args, Kwargs]:
    """The example inputs, given or inferred.

    Raises:
        ExampleInputsError: they are missing, or a tensor among them cannot serve.
    """
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        normalise_inputs((), example_kwargs)  # raises; such values may have no truth either
    args, kwargs = resolve_inputs(model, example_inputs, example_kwargs)
    tensors = tensors_of((args, kwargs))
    for tensor in tensors:
        kind = type(tensor).__name__
        if isinstance(tensor, FakeTensor):
            raise ExampleInputsError("the example inputs are fake tensors; make them outside of FakeTensorMode")
        if tensor.is_nested:
            raise ExampleInputsError("the example inputs hold a nested tensor; pass one that is padded to one size")
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantised" if tensor.is_quantized else "sparse"
            raise ExampleInputsError(f"the example inputs hold a {kind} tensor; pass a dense one of floats")
        if type(tensor) not in (Tensor, nn.Parameter):
            raise ExampleInputsError(
                f"the example inputs hold a {kind}, a tensor with rules of its own; pass a plain one: "
                "x.as_subclass(torch.Tensor)"
            )
    sized = [tensor for tensor in tensors if tensor.ndim]
    if sized and (len(sized[0]) == 0 or not any(tensor.numel() for tensor in sized)):
        shape = list(sized[0].shape)
        raise ExampleInputsError(
            f"the example inputs hold no numbers: a tensor of shape {shape} has {math.prod(shape)} entries; pass at "
            "least one example, for instance the first rows of a batch of your data"
        )
    return args, kwargs
