"""Networks of transformers and diffusers whose layers have widths of their own: a class of the library, other sizes.

The class makes itself of its config, as ever, and is then given the sizes that the config holds as ``fxprune``, before
weights are loaded; on the meta device too. This file needs nothing but torch and the library. A copy of it lies in
every folder that such a network was saved in, and ``auto_map`` in ``config.json`` names it:
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``, of diffusers ``AutoModel``.

The entry ``fxprune`` of a config is plain data, of what differs from what the class makes:

    attributes   path of a module -> its attribute -> number, or list of numbers
    shapes       name of a parameter or buffer -> shape
    stored       names of those buffers that the class computes and does not save, and that are saved here
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

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
        _CLASSES[base] = (_made_by_config if hasattr(base, "register_to_config") else _made)(base)
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
            names = auto_classes(base, type(self.config))
            if names:
                self.config.auto_map = dict.fromkeys(names, _reference(base))
            _copy_code(save_directory)
            return super().save_pretrained(save_directory, *args, **kwargs)

    return _named_as(base, Pruned)


def _made_by_config(base: Any) -> type[Any]:
    """Of diffusers, whose classes are made by ``from_config``, and whose configs are not written to."""

    class Pruned(base):
        @classmethod
        def from_config(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
            sizes = config.get(ENTRY) if isinstance(config, Mapping) else None
            made = super().from_config(without_sizes(config) if sizes else config, *args, **kwargs)
            if sizes:
                model = made[0] if isinstance(made, tuple) else made
                set_sizes(model, sizes)
                model.register_to_config(**{ENTRY: sizes})
            return made

        def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
            sizes = self.config.get(ENTRY)
            if sizes:
                self.register_to_config(**{ENTRY: current(self, sizes)})
            self.register_to_config(auto_map={"AutoModel": _reference(base)})
            _copy_code(save_directory)
            return super().save_pretrained(save_directory, *args, **kwargs)

    return _named_as(base, Pruned)


def without_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of diffusers as its own class knows it."""
    return {key: value for key, value in config.items() if key not in (ENTRY, "auto_map")}


def _named_as(base: type[Any], made: type[Any]) -> type[Any]:
    made.__name__ = made.__qualname__ = base.__name__
    made.__doc__ = base.__doc__
    return made


def _reference(base: type[Any]) -> str:
    """How ``auto_map`` names the pruned class."""
    return f"{os.path.basename(__file__).removesuffix('.py')}.{base.__name__}"


def _copy_code(folder: str | os.PathLike[str]) -> None:
    if not os.path.isfile(folder):  # which the class itself refuses
        os.makedirs(folder, exist_ok=True)
        shutil.copyfile(__file__, os.path.join(folder, os.path.basename(__file__)))


def auto_classes(base: type[Any], config: type[Any]) -> list[str]:
    """Names of the auto classes that take this class for such a config."""
    transformers, found = import_module("transformers"), []
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        known = mapping.get(config, ()) if mapping is not None else ()
        if base in (known if isinstance(known, (list, tuple)) else (known,)):
            found.append(name)
    return found


def __getattr__(name: str) -> type[Any]:
    """The pruned class of any class of the libraries, by its name: what ``auto_map`` and pickle ask for."""
    for library in () if name.startswith("_") else sorted(_LIBRARIES, key=lambda each: each not in sys.modules):
        try:
            base = getattr(import_module(library), name, None)
        except ImportError:
            continue
        if isinstance(base, type) and issubclass(base, nn.Module):
            return class_of(base)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}: {' or '.join(_LIBRARIES)} has no such network"
    )


_LIBRARIES = ("transformers", "diffusers")
