"""Networks of transformers whose layers have widths of their own: a class of the library with other sizes.

The class makes itself of its config, as ever, and is then given the sizes that the config holds as ``fxprune``, before
weights are loaded; on the meta device too. This file needs nothing but torch and transformers. A copy of it lies in
every folder that such a network was saved in, and ``auto_map`` in ``config.json`` names it:
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``.

The entry ``fxprune`` of a config is plain data, of what differs from what the class makes:

    attributes   path of a module -> its attribute -> number, or list of numbers
    shapes       name of a parameter or buffer -> shape
    stored       names of those buffers that the class computes and does not save, and that are saved here
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor, nn

ENTRY = "fxprune"


def set_sizes(model: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Give modules these attributes and tensors these shapes, cut at their ends; what is one tensor stays one."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, whose id nothing else may get
    for name, shape in sizes["shapes"].items():
        tensors, key = _place(model, name)
        old = tensors[key]
        if id(old) not in made:
            made[id(old)] = old, _cut(old, shape)
        tensors[key] = made[id(old)][1]
    store(model, sizes)
    for path, values in sizes["attributes"].items():
        for key, value in values.items():
            setattr(model.get_submodule(path), key, tuple(value) if isinstance(value, list) else value)


def store(model: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Have the buffers that the sizes name saved with the weights."""
    for name in sizes["stored"]:
        path, _, key = name.rpartition(".")
        model.get_submodule(path)._non_persistent_buffers_set.discard(key)


def current(model: nn.Module, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries with the sizes that the model has now: rows may have been added to embeddings."""
    attributes: dict[str, Any] = {}
    for path, values in sizes["attributes"].items():
        own = {key: getattr(model.get_submodule(path), key) for key in values}
        attributes[path] = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
    shapes = {}
    for name in sizes["shapes"]:
        tensors, key = _place(model, name)
        shapes[name] = list(tensors[key].shape)
    return {"attributes": attributes, "shapes": shapes, "stored": list(sizes["stored"])}


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if key in module._parameters else module._buffers), key


def _cut(old: Tensor, shape: list[int]) -> Tensor:
    if old.ndim != len(shape) or any(now < size for now, size in zip(old.shape, shape, strict=True)):
        raise ValueError(f"a tensor of shape {list(old.shape)} cannot be cut to {list(shape)}: the config is another's")
    new = old.detach()[tuple(slice(size) for size in shape)].clone()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    return new


def class_of(base: type[Any]) -> type[Any]:
    """The subclass of a class of transformers, of the same name, that has the sizes its config says."""
    if base not in _CLASSES:
        _CLASSES[base] = _made(base)
    return _CLASSES[base]


_CLASSES: dict[type[Any], type[Any]] = {}  # pickle asks that there be one


def _made(base: Any) -> type[Any]:
    class Pruned(base):
        def __init__(self, config: Any, *inputs: Any, **kwargs: Any):
            super().__init__(config, *inputs, **kwargs)
            sizes = getattr(config, ENTRY, None)
            if sizes:
                set_sizes(self, sizes)

        def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
            sizes = getattr(self.config, ENTRY, None)
            if sizes:
                setattr(self.config, ENTRY, current(self, sizes))
            file = os.path.basename(__file__)
            names = auto_classes(base, type(self.config))
            if names:
                self.config.auto_map = dict.fromkeys(names, f"{file.removesuffix('.py')}.{base.__name__}")
            if not os.path.isfile(save_directory):  # which the class itself refuses
                os.makedirs(save_directory, exist_ok=True)
                shutil.copyfile(__file__, os.path.join(save_directory, file))
            return super().save_pretrained(save_directory, *args, **kwargs)

    Pruned.__name__ = Pruned.__qualname__ = base.__name__
    Pruned.__doc__ = base.__doc__
    return Pruned


def auto_classes(base: type[Any], config: type[Any]) -> list[str]:
    """Names of the auto classes that take this class for such a config."""
    found = []
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        known = mapping.get(config, ()) if mapping is not None else ()
        if base in (known if isinstance(known, (list, tuple)) else (known,)):
            found.append(name)
    return found


def __getattr__(name: str) -> type[Any]:
    """The pruned class of any class of transformers, by its name: what ``auto_map`` and pickle ask for."""
    base = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, nn.Module)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: transformers has no such network")
    return class_of(base)
