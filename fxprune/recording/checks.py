"""What models and example inputs must be, said before the work begins."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from fxprune.errors import ExampleInputsError, InputError, ModelError, shown, suggestion
from fxprune.recording.inputs import Args, Kwargs, normalise_inputs, resolve_inputs, tensors_of
from fxprune.recording.shards import from_all, is_sharded, is_share, own_part

_SMALL = 4096  # entries of a tensor


def check_module(name: str, value: Any, made_by: str = "", shares: bool = False) -> None:
    """Refuse what is no module, or one of which every process holds a share.

    ``made_by``: what gives such modules. ``shares``: whether parameters may be shares of several processes.

    Raises:
        InputError: it is none.
        ModelError: its parameters are shares.
    """
    if not isinstance(value, nn.Module):
        raise InputError(f"{name} is {shown(value)}; pass {made_by or 'a torch.nn.Module'}.")
    if not shares and is_sharded(value):
        raise ModelError(
            f"Of the parameters of {name} every process holds a share, and whole ones are needed. Put them together "
            "with full_tensor(), and load them into what fxprune.apply makes by the same plan of a model that is whole."
        )


def check_unwrapped(model: nn.Module, name: str) -> None:
    """Refuse ``DistributedDataParallel``, ``torch.compile`` and averages around what is at ``name`` in them.

    Raises:
        InputError: the name is theirs.
    """
    if name and {"module", "_orig_mod"}.issuperset(name.split(".")):
        raise InputError(f"{type(model).__name__} wraps the pruned module: pass its .{name}.")


def check_model(model: Any, shares: bool = False) -> None:
    """Refuse what is no model in Python, or one whose tensors have no values and could have none.

    ``shares``: whether parameters may be shares of several processes.

    Raises:
        InputError: it is no module.
        ModelError: it is scripted, or a tensor is lazy, fake or of a class that stands for something else.
    """
    check_module("model", model, shares=True)
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
        if is_share(tensor):
            if not shares:
                raise ModelError(
                    f"{name} is a {kind.__name__}, of which this process holds a share, and only prune, apply and "
                    "reconstruct, and analyze, take a sharded model. Pass one with whole parameters."
                )
        elif kind is not Tensor and not issubclass(kind, nn.Parameter):
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


def chosen_names(model: nn.Module, argument: str, chosen: Any) -> tuple[str, ...]:
    """The names of the modules and parameters that ``ignore=`` or ``keep=`` lists.

    Args:
        model: whose they are.
        argument: ``"ignore"`` or ``"keep"``.
        chosen: a name, a pattern of names as ``fnmatch`` has them, a module of the model, or a list of these.

    Raises:
        InputError: it is no such list, or one of them is nothing that the model has; of ``keep``, nothing with tensors.
    """
    if isinstance(chosen, tuple) and not chosen:
        return ()
    modules = dict(model.named_modules(remove_duplicate=False))
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    tensors = [name for name, _ in named]
    items = [chosen] if isinstance(chosen, (str, nn.Module)) else chosen
    if not isinstance(items, (list, tuple, set, frozenset, Mapping, Iterator)):
        raise InputError(f"{argument}={chosen!r} must be a module, a name, or a list of them.")
    names: list[str] = []
    for item in items:
        found = _found(modules, tensors, argument, item)
        if argument == "keep" and not any(is_within(name, set(found)) for name in tensors):
            what = f"a {type(item).__name__}" if isinstance(item, nn.Module) else repr(item)
            raise InputError(f"keep names {what}, which has no parameters. Its channels stay by ignore=.")
        names += found
    return tuple(names)


def _found(modules: Mapping[str, nn.Module], tensors: Sequence[str], argument: str, item: Any) -> list[str]:
    """The names that one item of ``ignore=`` or ``keep=`` stands for."""
    if isinstance(item, nn.Module):
        found = [name for name, module in modules.items() if module is item]
        if not found:
            raise InputError(f"{argument} holds a {type(item).__name__} that is not part of the model.")
        return found
    if isinstance(item, Tensor):
        example = next(iter(tensors), "")
        raise InputError(f"{argument} holds a {type(item).__name__}: pass its name, such as {example!r}.")
    known = [*modules, *tensors]
    if isinstance(item, str) and item in known:
        return [item]
    is_pattern = isinstance(item, str) and any(sign in item for sign in "*?[")
    found = [name for name in known if name and fnmatchcase(name, item)] if is_pattern else []
    if found:
        return found
    if is_pattern:
        hint = suggestion(item, [*known, *(f"{name}.*" for name in modules if name)])
        raise InputError(f"{argument} has the pattern {item!r}, which fits no name of the model.{hint}")
    raise InputError(f"{argument} names {item!r}, which the model does not have.{suggestion(str(item), known)}")


def is_within(name: str, chosen: Container[str]) -> bool:
    """Whether the name of a module or a tensor is chosen, or lies below one that is; all lie below ""."""
    while name and name not in chosen:
        name = name.rpartition(".")[0]
    return name in chosen


def names_in_part(names: Sequence[str], part: str) -> tuple[str, ...]:
    """Those of the whole model's names that are about a part, as names of the part; "" is all of it."""
    below = [name.removeprefix(f"{part}.") for name in names if name.startswith(f"{part}.")]
    return ("", *below) if is_within(part, names) else tuple(below)


def check_finite(model: nn.Module, remedy: str = "Load a sound checkpoint before pruning.") -> None:
    """Refuse weights that are no dense numbers.

    Args:
        model: its parameters and buffers.
        remedy: for weights that are not finite.

    Raises:
        ModelError: one is quantised or sparse, or holds NaN or inf; buffers may hold inf.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantised" if tensor.is_quantized else "sparse"
            raise ModelError(f"{name} is {kind}; fxprune prunes dense weights. Prune first, then make them {kind}.")
    known = [(name, own_part(t.detach()), isinstance(t, nn.Parameter)) for name, t in tensors if _has_values(t)]
    found = _not_finite([each for each in known if each[1].numel()])
    if is_sharded(model):
        found = next(filter(None, from_all(found)), "")
    if found:
        raise ModelError(f"{found}. {remedy}")


def _not_finite(known: Sequence[tuple[str, Tensor, bool]]) -> str:
    """What is NaN or inf: (name, tensor, is it a parameter?); "" if nothing is."""
    weights = _extremes(tensor for _, tensor, trained in known if trained)
    buffers = _extremes(tensor for _, tensor, trained in known if not trained)
    if bool(weights.isfinite().all()) and not bool(buffers.isnan().any()):
        return ""
    for name, tensor, trained in known:
        tensor = _comparable(tensor)
        if trained and not bool(tensor.isfinite().all()):
            return f"{name} holds NaN or inf"
        if not trained and bool(tensor.isnan().any()):
            return f"{name} holds NaN"
    return ""


def _has_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0


def _extremes(tensors: Iterable[Tensor]) -> Tensor:
    """The smallest and the largest values; NaN is both wherever there is one. One pass, without a mask.

    Small tensors are looked at together: a network has hundreds.
    """
    large, small = [], defaultdict(list)
    for tensor in tensors:
        if tensor.numel() < _SMALL:
            small[tensor.dtype, tensor.device].append(_comparable(tensor).reshape(-1))
        else:
            large.append(_comparable(tensor))
    large += map(torch.cat, small.values())
    extremes: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in large:
        extremes[tensor.dtype, tensor.device] += torch.aminmax(tensor)
    return torch.cat(
        [torch.empty(0, device="cpu"), *(torch.stack(found).double().cpu() for found in extremes.values())]
    )


def _comparable(tensor: Tensor) -> Tensor:
    """Torch has no order of numbers of 8 bits."""
    return tensor.float() if tensor.itemsize == 1 else tensor
