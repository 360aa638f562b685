"""What recording replaces in torch and in the model's own Python modules, for as long as it lasts.

``nn.Module.__call__`` and ``autograd.Function.apply`` are not torch functions, so no mode sees them. ``int()`` and
``len()`` return exact ints whatever ``__int__`` and ``__len__`` give, so a size that passes through them would become
a literal: the Python packages that define the model's layers see versions that keep the memory of a ``TracedInt``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxprune.recording.traced import traced_float, traced_int

_APPLY = "apply"


def apply_function(cls: type, args: tuple[Any, ...]) -> Any:
    """Run ``cls.apply`` as torch does."""
    return _torch_apply.__get__(None, cls)(*args)


_torch_apply: Any = torch.autograd.Function.__dict__[_APPLY]


@contextmanager
def intercepted_apply(model: nn.Module, handler: Callable[[type, tuple[Any, ...]], Any]) -> Iterator[None]:
    """``Function.apply`` goes to ``handler(cls, args)``, also where a module of the model's packages bound it to a
    name."""

    def apply(cls: type, *args: Any) -> Any:
        return handler(cls, args)

    replaced: list[tuple[dict[str, Any], str, Any]] = []
    torch.autograd.Function.apply = classmethod(apply)
    try:
        for module in _defining_modules(model):
            for name, value in list(module.__dict__.items()):
                if _is_bound_apply(value):
                    replaced.append((module.__dict__, name, value))
                    module.__dict__[name] = value.__self__.apply
        yield
    finally:
        torch.autograd.Function.apply = _torch_apply
        for namespace, name, value in replaced:
            namespace[name] = value


def _is_bound_apply(value: Any) -> bool:
    if not isinstance(value, (types.BuiltinMethodType, types.MethodType)) or value.__name__ != _APPLY:
        return False
    return isinstance(value.__self__, type) and issubclass(value.__self__, torch.autograd.Function)


@contextmanager
def intercepted_modules(handler: Callable[..., Any]) -> Iterator[None]:
    """``module(*args)`` becomes ``handler(original_call, module, *args)``."""
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return handler(original, self, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


@contextmanager
def intercepted_autocast(
    entered: Callable[[torch.autocast], None], left: Callable[[torch.autocast], None]
) -> Iterator[None]:
    """``entered`` is called after an autocast region begins, ``left`` before it ends."""
    cls = torch.autocast
    enter, leave = cls.__enter__, cls.__exit__

    def on_enter(self: torch.autocast) -> Any:
        result = enter(self)
        entered(self)
        return result

    def on_exit(self: torch.autocast, *error: Any) -> Any:
        left(self)
        return leave(self, *error)

    cls.__enter__, cls.__exit__ = on_enter, on_exit  # type: ignore[method-assign]
    try:
        yield
    finally:
        cls.__enter__, cls.__exit__ = enter, leave  # type: ignore[method-assign]


@contextmanager
def without_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention and nn.TransformerEncoder take their Python path, not the fused inference kernel."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _NumberMeta(type):
    """``int`` or ``float`` in every respect but the call, which keeps the memory of a traced number."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.convert(*args, **kwargs)  # type: ignore[attr-defined]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__base__)  # type: ignore[arg-type]

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.__base__)  # type: ignore[arg-type]

    def __eq__(cls, other: object) -> bool:
        return other is cls.__base__ or other is cls

    def __hash__(cls) -> int:
        return hash(cls.__base__)


class Int(int, metaclass=_NumberMeta):
    convert = staticmethod(traced_int)


class Float(float, metaclass=_NumberMeta):
    convert = staticmethod(traced_float)


@contextmanager
def size_preserving_builtins(model: nn.Module, replacements: Mapping[str, Any]) -> Iterator[None]:
    """The packages that define the model's classes see the replacements instead of the builtins of these names."""
    replaced: list[tuple[dict[str, Any], str]] = []
    try:
        for module in _defining_modules(model):
            for name, value in replacements.items():
                if name not in module.__dict__:
                    module.__dict__[name] = value
                    replaced.append((module.__dict__, name))
        yield
    finally:
        for namespace, name in replaced:
            namespace.pop(name, None)


def _defining_modules(model: nn.Module) -> list[types.ModuleType]:
    packages = {cls.__module__.partition(".")[0] for module in model.modules() for cls in type(module).__mro__}
    packages -= {"torch", "fxprune", *sys.stdlib_module_names}
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in packages and isinstance(module, types.ModuleType)
    ]
