"""Models and weights named on a command line: ``timm:NAME``, ``torchvision:NAME``, ``path/to/file.py:factory``."""

import difflib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxprune.errors import InputError, check_installed
from fxprune.io.files import check_writable, replacing
from fxprune.io.text import some

FORMS = "timm:NAME, torchvision:NAME or path/to/file.py:factory"

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_BATCH = 32
_WRAPPED_IN = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
_TORCH_SUFFIXES = (".pt", ".pth")
_WEIGHT_SUFFIXES = (*_TORCH_SUFFIXES, ".safetensors")
_LOSS = re.compile(r"_loss$|cross_entropy|^kl_div$")


def load_model(spec: str, pretrained: bool = False) -> nn.Module:
    """The model that ``spec`` names, in eval mode, with random weights unless ``pretrained``.

    Raises:
        InputError: a name that nobody knows (lists close ones), a file or factory that is not there or fails, or
            ``pretrained`` for a factory.
    """
    origin, colon, name = spec.partition(":")
    if colon and origin in _LOADERS and name:
        return _LOADERS[origin](name, pretrained).eval()
    path, colon, factory = spec.rpartition(":")
    if not colon or not path.endswith(".py") or not factory:
        raise InputError(f"cannot read the model spec {spec!r}; write {FORMS}")
    if pretrained:
        raise InputError(f"pretrained weights are for timm and torchvision only; load those of {spec!r} in its factory")
    model = _from_file(Path(path), factory, lambda found: True)
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} returned {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def load_data(spec: str, model_spec: str, model: nn.Module) -> Any:
    """Inputs that ``spec`` names: what a function gives (``file.py:loader``), or the images in a folder, in batches.

    Images go through the preprocessing that timm or torchvision state for the model ``model_spec``.

    Raises:
        InputError: nothing is there, or the preprocessing is not known.
    """
    path, colon, function = spec.rpartition(":")
    if colon and path.endswith(".py") and function:
        return load_python(spec, "object")
    files = sorted(p for p in Path(spec).rglob("*") if p.suffix.lower() in _IMAGES)
    if not files:
        raise InputError(f"{spec!r} is neither a folder of images nor path/to/file.py:loader")
    origin, _, name = model_spec.partition(":")
    if origin == "timm":
        from timm.data import create_transform, resolve_model_data_config

        transform = create_transform(**resolve_model_data_config(model), is_training=False)
    elif origin == "torchvision":
        from torchvision.models import get_model_weights

        transform = next(iter(get_model_weights(name))).transforms()
    else:
        raise InputError(
            f"how {model_spec!r} wants its images is not known: give --data path/to/file.py:loader, a function that "
            "returns a tensor of inputs, or a loader of them"
        )
    return _Images(files, transform)


class _Images:
    """The images of some files in batches, read when they are asked for."""

    def __init__(self, files: list[Path], transform: Callable[[Any], Tensor]):
        self._files, self._transform = files, transform

    def __len__(self) -> int:
        return math.ceil(len(self._files) / _BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._files), _BATCH):
            yield torch.stack([self._read(path) for path in self._files[start : start + _BATCH]])

    def _read(self, path: Path) -> Tensor:
        from PIL import Image

        return cast(Tensor, _call(str(path), lambda: self._transform(Image.open(path).convert("RGB"))))


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state_dict file (.pt, .pth, .safetensors) into ``model``; nothing is loaded if anything does not fit.

    A state_dict may lie under "state_dict", "model" or "model_state_dict", and its names may carry the prefix of a
    wrapper ("module." of DistributedDataParallel, "_orig_mod." of torch.compile).

    Raises:
        InputError: the file cannot be read, or its names and shapes are not the model's (names them).
    """
    path = Path(path)
    given = _without_prefix(_read_state_dict(path))
    reasons = misfits(model.state_dict(keep_vars=True), given)
    if reasons:
        raise InputError(f"the weights in {str(path)!r} are not those of this {type(model).__name__}; {reasons}")
    model.load_state_dict(given, strict=False)


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Which names are missing, unexpected, or of another shape; "" where all fit.

    Args:
        own: a module's state_dict, with the parameters themselves.
        given: what is to be loaded into it.
    """
    # A tied tensor may be stored under one of its names only.
    stored = {id(own[name]) for name in own.keys() & given.keys()}
    missing = [name for name, tensor in own.items() if name not in given and id(tensor) not in stored]
    unexpected = [name for name in given if name not in own]
    shapes = [
        f"{name} ({list(given[name].shape)} in the file, {list(own[name].shape)} in the model)"
        for name in own
        if name in given and own[name].shape != given[name].shape
    ]
    complaints = [
        f"{what}: {some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    return "; ".join(complaints)


def check_weights_path(path: str | os.PathLike[str]) -> Path:
    """Refuse a path that :func:`save_weights` could not write.

    Raises:
        InputError: an unknown suffix, or see :func:`fxprune.io.files.check_writable`.
    """
    path = Path(path)
    if path.suffix not in _WEIGHT_SUFFIXES:
        endings = _listing(_WEIGHT_SUFFIXES)
        raise InputError(f"cannot tell the format of {str(path)!r} by its name; end it in {endings}")
    return check_writable(path)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state_dict in the format that the suffix names: .safetensors, or torch's own for .pt and .pth.

    Raises:
        InputError: see :func:`check_weights_path`.
    """
    path = check_weights_path(path)
    state = model.state_dict()
    with replacing(path) as draft:
        if path.suffix in _TORCH_SUFFIXES:
            torch.save(state, draft)
            return
        from safetensors.torch import save_file

        # The format has no notion of two names for one tensor: the first name stands for all of them.
        first = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
        save_file({name: state[name].contiguous() for name in first.values()}, draft)


def _timm(name: str, pretrained: bool) -> nn.Module:
    check_installed("timm", "timm")
    import timm

    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        _check_name("timm", name.partition(".")[0], timm.list_models())
    model: nn.Module = _call(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained))
    return model


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    check_installed("torchvision", "torchvision")
    from torchvision import models

    _check_name("torchvision", name, models.list_models())
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if "weights_backbone" in parameters:
        options["weights_backbone"] = None
    if not pretrained and name in ("googlenet", "inception_v3"):
        # Their own initialisation is slow, about to be dropped, and says so in a warning.
        options["init_weights"] = False
    model: nn.Module = _call(f"torchvision:{name}", lambda: models.get_model(name, **options))
    return model


_LOADERS: dict[str, Callable[[str, bool], nn.Module]] = {"timm": _timm, "torchvision": _torchvision}


def load_python(spec: str, kind: str) -> Any:
    """What ``spec`` names in Python: ``path/to/file.py:NAME``.

    Args:
        spec: the name.
        kind: ``"object"``: a function is called for it, everything else taken as it is. ``"function"``: a function, or
            a class, of which an instance is made. ``"loss"``: the same, or a name of ``torch.nn.functional``.

    Raises:
        InputError: there is no such file or name, or it fails.
    """
    losses = {
        name: function
        for name, function in vars(torch.nn.functional).items()
        if callable(function) and _LOSS.search(name) and not name.startswith("_")
    }
    path, colon, name = spec.rpartition(":")
    if colon and path.endswith(".py") and name:
        value = _from_file(Path(path), name, lambda found: kind == "object" or isinstance(found, type))
        if kind != "object" and not callable(value):
            raise InputError(f"{spec} is a {type(value).__name__}, no function")
        return value
    if kind == "loss" and spec in losses:
        return losses[spec]
    if kind == "loss":
        raise InputError(f"there is no loss {spec!r}; write path/to/file.py:NAME, or {_listing(sorted(losses))}")
    raise InputError(f"cannot read {spec!r}; write path/to/file.py:NAME")


def _from_file(path: Path, name: str, made: Callable[[Any], bool]) -> Any:
    """A name of a Python file; called for the result where ``made`` says so."""
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}")
    # What python does for a script: its neighbours can be imported, also when a function of it runs.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module = _module(path)
        value = getattr(module, name, None)
        if value is None:
            known = [key for key, each in vars(module).items() if callable(each) and not key.startswith("_")]
            raise InputError(f"{str(path)!r} has no function {name!r}; {_suggestion(name, known)}")
        return _call(f"{path}:{name}", value) if callable(value) and made(value) else value
    finally:
        sys.path.pop(0)


def _module(path: Path) -> ModuleType:
    """The file as a module, run once as long as it is the same."""
    # A name that cannot meet an installed module's; registered, since dataclasses and pickle look modules up.
    name = f"_fxprune_model_{path.stem}"
    stamp = (str(path.resolve()), path.stat().st_mtime_ns)
    known = sys.modules.get(name)
    if known is not None and getattr(known, "_fxprune_stamp", None) == stamp:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # it ends in .py
    loader = spec.loader
    assert loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _call(str(path), lambda: loader.exec_module(module))
    module._fxprune_stamp = stamp  # type: ignore[attr-defined]
    return module


def _call(what: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{what} could not be loaded: {type(error).__name__}: {reason}") from error


def _check_name(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise InputError(f"{library} has no model {name!r}; {_suggestion(name, known)}")


def _suggestion(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    if close:
        return f"did you mean {_listing(close)}?"
    if len(known) > 20:
        return f"it knows {len(known)} names, none of them close to this one"
    return f"it knows {_listing(known)}" if known else "it has none"


def _listing(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}")
    if path.suffix not in _WEIGHT_SUFFIXES:
        endings = _listing(_WEIGHT_SUFFIXES)
        raise InputError(f"cannot tell the format of {str(path)!r} by its name; weights end in {endings}")
    try:
        if path.suffix in _TORCH_SUFFIXES:
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            from safetensors.torch import load_file

            content = load_file(path)
    except Exception as error:
        raise InputError(
            f"cannot read {str(path)!r} ({type(error).__name__}); it must hold a state_dict, "
            "as torch.save(model.state_dict(), path) or safetensors write it"
        ) from error
    for key in _WRAPPED_IN:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(each, Tensor) for each in content.values()):
        places = _listing([repr(key) for key in _WRAPPED_IN])
        raise InputError(f"{str(path)!r} holds no state_dict, neither at its top nor under {places}")
    return dict(content)


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return {name[len(prefix) :]: tensor for name, tensor in state.items()}
    return state
