"""Classes of transformers and diffusers: pruned, they are saved and loaded by their own methods.

Such a class makes itself of a config. Where numbers of a config of transformers say all sizes, they are set, and the
class is the library's own; else the instance gets a subclass of the same name (see ``modeling_pruned``), and its config
the sizes.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fxprune.recording import named_tensors
from fxprune.recording.inputs import device_of
from fxprune.recording.randomness import repeatable

Sizes = dict[str, Any]  # see modeling_pruned

_MOST_NUMBERS = 3  # that one number of a config may have become


def library_class(model: nn.Module, library: str = "transformers", base: str = "PreTrainedModel") -> type[Any] | None:
    """The class of transformers that a model is of, by its public name, pruned before or not; else None."""
    module = sys.modules.get(library)
    kind = getattr(module, base, None)
    if kind is None or not isinstance(model, kind):
        return None
    own = getattr(module, type(model).__name__, None)
    return own if own is not None and (type(model) is own or _is_pruned(type(model), own)) else None


def _diffusers_class(model: nn.Module) -> type[Any] | None:
    return library_class(model, "diffusers", "ModelMixin")


def saves_its_config(model: nn.Module) -> bool:
    """Whether a model is of a class of transformers or diffusers, which makes itself of its config again."""
    return library_class(model) is not None or _diffusers_class(model) is not None


def _is_pruned(kind: type[Any], own: type[Any]) -> bool:
    """Whether a class is what ``modeling_pruned`` made of ``own``, here or from the copy in a folder."""
    return kind.__bases__ == (own,) and kind.__module__.rpartition(".")[2] == "modeling_pruned"


def in_its_class(result: nn.Module, equals: Callable[[nn.Module], bool]) -> nn.Module:
    """Of a class of transformers or diffusers: a network with pruned layers that saves itself with its sizes.

    Any other stays as it is, and so does one that differs from what its class makes of its config in more than sizes.

    Args:
        result: changed in place.
        equals: whether another network computes what ``result`` does.
    """
    own, other = library_class(result), _diffusers_class(result)
    kind = own or other
    made = None if kind is None else _fresh(kind, result)
    if kind is None or made is None or not any((sizes := differences(made, result)).values()):
        return result
    from fxprune.rewriting import modeling_pruned

    if own is None:
        result.__class__ = modeling_pruned.class_of(kind)
        result.register_to_config(**{modeling_pruned.ENTRY: sizes})  # type: ignore[operator]
        modeling_pruned.store(result, sizes)
        return result
    numbers = {} if sizes["stored"] else _numbers(own, made, result, sizes)
    if numbers and equals(_filled(own, result, numbers)):
        for path, number in numbers.items():
            _set(result.config, path, number)
        return result
    result.__class__ = modeling_pruned.class_of(own)
    setattr(result.config, modeling_pruned.ENTRY, sizes)
    modeling_pruned.store(result, sizes)
    return result


def loads_itself(model: nn.Module) -> bool:
    """Whether this is a network of transformers whose class makes these sizes of its config."""
    made = None if library_class(model) is None else _fresh(type(model), model)
    return made is not None and not differences(made, model)["shapes"]


def _fresh(kind: type[Any], model: nn.Module) -> nn.Module | None:
    """What a class makes of a network's config; None where that is no network of the same modules and tensors."""
    try:
        made = _made(kind, model.config, {})
    except Exception:  # somebody changed the config since
        return None
    modules = [name for name, _ in made.named_modules()] == [name for name, _ in model.named_modules()]
    return made if modules and named_tensors(made).keys() == named_tensors(model).keys() else None


def auto_classes_of(model: Any) -> list[str]:
    """Names of the auto classes of transformers that take a network's class for its config."""
    from fxprune.rewriting.modeling_pruned import auto_classes

    own = library_class(model)
    return auto_classes(own, type(model.config)) if own is not None else []


def differences(made: nn.Module, result: nn.Module) -> Sizes:
    """What ``result`` has in other sizes than ``made``, of the same modules."""
    attributes: dict[str, dict[str, Any]] = {}
    for (path, module), other in zip(result.named_modules(), made.modules(), strict=True):
        before = {**vars(type(other)), **vars(other)}
        changed = {key: value for key, value in vars(module).items() if _is_size(value) and key in before}
        changed = {key: value for key, value in changed.items() if value != before[key]}
        if changed:
            attributes[path] = {key: list(v) if isinstance(v, tuple) else v for key, v in changed.items()}
    ours, theirs = named_tensors(result), named_tensors(made)
    shapes = {name: list(tensor.shape) for name, tensor in ours.items() if tensor.shape != theirs[name].shape}
    stored = [name for name in shapes if name not in made.state_dict()]
    return {"attributes": attributes, "shapes": shapes, "stored": stored}


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_size, value)) and not any(isinstance(each, tuple) for each in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- numbers of the config --------------------------------------------------------------------------------------------


def _numbers(own: type[Any], made: nn.Module, result: nn.Module, left: Sizes) -> dict[str, int]:
    """Numbers of the config with which the class makes all of these sizes by itself; none where there are no such.

    ``made``: by the config as it is, and ``left``: what ``result`` has in other sizes. Other attributes, which ``into``
    left as they were, may become other numbers: a class keeps many that it does not use.
    """
    found: dict[str, int] = {}
    wanted = _names(left)
    while _names(left) & wanted:
        for path, number in _candidates(result.config, made, result, left):
            try:
                trial = _made(own, result.config, {**found, path: number})
                beside = differences(trial, result)
            except Exception:  # numbers that do not go together
                continue
            fewer = _names(beside) & wanted < _names(left) & wanted and _shapes(beside) <= _shapes(left)
            if path not in found and fewer:
                found[path], made, left = number, trial, beside
                break
        else:
            return {}
    return found


def _candidates(config: Any, made: nn.Module, result: nn.Module, left: Sizes) -> Iterator[tuple[str, int]]:
    """Numbers of the config that are a size which became another one, and what it became."""
    after: dict[int, dict[int, None]] = defaultdict(dict)
    ours, theirs = named_tensors(result), named_tensors(made)
    for name in left["shapes"]:
        for old, new in zip(theirs[name].shape, ours[name].shape, strict=False):
            if old != new:
                after[old][new] = None
    for path, values in left["attributes"].items():
        for key, new in values.items():
            old = getattr(made.get_submodule(path), key)
            if type(old) is int and type(new) is int:
                after[old][new] = None
    for path, value in _entries(config):
        if len(after.get(value, ())) <= _MOST_NUMBERS:
            yield from ((path, new) for new in after.get(value, ()))


def _entries(config: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a config and of those inside it."""
    for key, value in vars(config).items():
        if type(value) is int:
            yield f"{path}{key}", value
        elif isinstance(value, sys.modules["transformers"].PreTrainedConfig):
            yield from _entries(value, f"{path}{key}.")


def _made(own: type[Any], config: Any, numbers: dict[str, int], device: str | torch.device = "meta") -> nn.Module:
    """An instance of the class, of a copy of the config with these numbers."""
    if hasattr(own, "register_to_config"):  # of diffusers
        from fxprune.rewriting.modeling_pruned import without_sizes

        with repeatable(), torch.device(device):
            made: nn.Module = own.from_config(without_sizes(config))
        return made
    config = copy.deepcopy(config)
    for path, number in numbers.items():
        _set(config, path, number)
    if numbers:
        type(config).from_dict(config.to_dict())  # as loading does: it refuses numbers that do not go together
    with repeatable(), torch.device(device):
        instance: nn.Module = own(config)
    return instance


def _set(config: Any, path: str, number: int) -> None:
    *parents, key = path.split(".")
    for name in parents:
        config = getattr(config, name)
    setattr(config, key, number)


def _names(sizes: Sizes) -> set[tuple[str, str]]:
    """Of every attribute and tensor."""
    of_attributes = {(f"{path}.{key}", "attribute") for path, values in sizes["attributes"].items() for key in values}
    return of_attributes | _shapes(sizes)


def _shapes(sizes: Sizes) -> set[tuple[str, str]]:
    return {(name, "shape") for name in sizes["shapes"]}


def _filled(own: type[Any], result: nn.Module, numbers: dict[str, int]) -> nn.Module:
    """What the class makes of these numbers, with the tensors of ``result`` that are saved, and with no other."""
    instance = _made(own, result.config, numbers, device_of(result))
    instance.load_state_dict(result.state_dict(), assign=True)
    return instance
