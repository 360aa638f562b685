"""What recording replaces in torch and in the model's own Python modules, for as long as it lasts.

``nn.Module.__call__`` and ``autograd.Function.apply`` are not torch functions, so no mode sees them. ``int()`` and
``len()`` return exact ints whatever ``__int__`` and ``__len__`` give, so a size that passes through them would become
a literal: the Python packages that define the model's layers see versions that keep the memory of a ``TracedInt``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxprune.recording.traced import traced_float, traced_int

_APPLY = "apply"
_BOUND = (types.BuiltinMethodType, types.MethodType)


def apply_function(cls: type, args: tuple[Any, ...]) -> Any:
    """Run ``cls.apply`` as torch does."""
    return _torch_apply.__get__(None, cls)(*args)


_torch_apply: Any = torch.autograd.Function.__dict__[_APPLY]


@contextmanager
def intercepted_apply(
    modules: list[types.ModuleType], handler: Callable[[type, tuple[Any, ...]], Any]
) -> Iterator[None]:
    """``Function.apply`` goes to ``handler(cls, args)``, also where one of the Python modules bound it to a name."""

    def apply(cls: type, *args: Any) -> Any:
        return handler(cls, args)

    replaced: list[tuple[dict[str, Any], str, Any]] = []
    torch.autograd.Function.apply = classmethod(apply)
    try:
        for namespace in [module.__dict__ for module in modules]:
            for name, value in [item for item in namespace.items() if type(item[1]) in _BOUND]:
                if _is_bound_apply(value):
                    replaced.append((namespace, name, value))
                    namespace[name] = value.__self__.apply
        yield
    finally:
        torch.autograd.Function.apply = _torch_apply
        for namespace, name, value in replaced:
            namespace[name] = value


def _is_bound_apply(method: Any) -> bool:
    if method.__name__ != _APPLY:
        return False
    return isinstance(method.__self__, type) and issubclass(method.__self__, torch.autograd.Function)


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
def size_preserving_builtins(modules: list[types.ModuleType], replacements: Mapping[str, Any]) -> Iterator[None]:
    """The Python modules see the replacements instead of the builtins of these names."""
    replaced: list[tuple[dict[str, Any], str]] = []
    try:
        for module in modules:
            for name, value in replacements.items():
                if name not in module.__dict__:
                    module.__dict__[name] = value
                    replaced.append((module.__dict__, name))
        yield
    finally:
        for namespace, name in replaced:
            namespace.pop(name, None)


def defining_modules(modules: Iterable[nn.Module]) -> list[types.ModuleType]:
    """All Python modules of the packages that define the classes of these layers; not torch's own."""
    classes = {base for cls in {type(module) for module in modules} for base in cls.__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in classes}
    packages -= {"torch", "fxprune", *sys.stdlib_module_names}
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in packages and isinstance(module, types.ModuleType)
    ]
