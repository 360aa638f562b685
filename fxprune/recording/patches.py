"""What recording replaces in torch and in the model's own Python modules, for as long as it lasts.

Other threads never notice: every replacement does what the original does for them, and one thread records at a time.

A torch function mode is told of ``x.add(1)`` where the model says ``1 + x``, so operators on tensors are replaced.
``nn.Module.__call__`` and ``autograd.Function.apply`` are not torch functions, so no mode sees them. ``int()`` and
``len()`` return exact ints whatever ``__int__`` and ``__len__`` give, so a size that passes through them would become
a literal: the Python packages that define the model's layers see versions that keep the memory of a ``TracedInt``.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.recording.arrays import has_arrays, to_torch
from fxprune.recording.calls import SLOTS, Operator
from fxprune.recording.modes import FunctionMode
from fxprune.recording.sources import script_source
from fxprune.recording.traced import traced_call, traced_float, traced_int

_APPLY = "apply"

FAST_PATH = (torch.backends.mha, "get_fastpath_enabled")
"""What attention layers of torch ask before they call a fused kernel, which they do without gradients alone."""
_BOUND = frozenset([types.BuiltinMethodType, types.MethodType])


def apply_function(cls: type, args: tuple[Any, ...]) -> Any:
    """Run ``cls.apply`` as torch does."""
    return _torch_apply.__get__(None, cls)(*args)


def apply_forward(cls: Any, args: tuple[Any, ...]) -> Any:
    """Run the forward of a ``torch.autograd.Function`` alone, as ordinary code."""
    if cls.setup_context is not torch.autograd.Function.setup_context:
        return cls.forward(*args)
    context = torch.autograd.function.FunctionCtx()
    context.needs_input_grad = (False,) * len(args)  # type: ignore[attr-defined]
    return cls.forward(context, *args)


_torch_apply: Any = torch.autograd.Function.__dict__[_APPLY]


@contextmanager
def intercepted_apply(
    namespaces: list[dict[str, Any]], handler: Callable[[type, tuple[Any, ...]], Any]
) -> Iterator[None]:
    """``Function.apply`` goes to ``handler(cls, args)``, also where one of the namespaces has it bound to a name."""

    def apply(cls: type, *args: Any) -> Any:
        return handler(cls, args)

    replaced: list[tuple[dict[str, Any], str, Any]] = []
    torch.autograd.Function.apply = classmethod(apply)
    try:
        for namespace in namespaces:
            if _BOUND.isdisjoint(map(type, namespace.values())):  # nearly all, and there are hundreds
                continue
            for name, value in list(namespace.items()):
                if type(value) in _BOUND and _is_bound_apply(value):
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
def inlined_scripts(is_followed: Callable[[], bool], is_asked: Callable[[], bool]) -> Iterator[None]:
    """Functions compiled by ``torch.jit.script`` run the Python code they were made of, wherever ``is_followed()``.

    ``is_asked``: whether it is that code which asks now whether it is scripted. It is told what it was when compiled.
    """
    original, depth = torch.jit.ScriptFunction.__call__, 0

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        function = script_source(self) if is_followed() else None
        if function is None:
            return original(self, *args, **kwargs)
        depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            depth -= 1

    torch.jit.ScriptFunction.__call__ = call  # type: ignore[method-assign]
    try:
        with answered({(torch.jit, "is_scripting"): lambda: True}, lambda: depth > 0 and is_asked()):
            yield
    finally:
        torch.jit.ScriptFunction.__call__ = original  # type: ignore[method-assign]


@contextmanager
def intercepted_operators(mode: FunctionMode) -> Iterator[None]:
    """``mode`` is told of Python's operators on tensors as they are written, where no other mode comes before it."""
    before = {slot: vars(Tensor).get(slot) for slot in SLOTS}
    for slot in SLOTS:
        setattr(Tensor, slot, _telling(mode, Operator(slot, getattr(Tensor, slot))))
    try:
        yield
    finally:
        for slot, own in before.items():
            if own is None:  # it is inherited
                delattr(Tensor, slot)
            else:
                setattr(Tensor, slot, own)


def _telling(mode: FunctionMode, operator: Operator) -> Any:
    @functools.wraps(operator.method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) > 2 or not mode.is_next():
            return operator.method(*args, **kwargs)
        return mode.see(operator, args)

    return call


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
def answered(answers: Mapping[tuple[Any, str], Callable[[], bool]], is_asked: Callable[[], bool]) -> Iterator[None]:
    """The functions ``(owner, name)`` give another answer wherever ``is_asked()``, and their own elsewhere."""
    before = [(owner, name, getattr(owner, name)) for owner, name in answers]
    for owner, name, original in before:
        setattr(owner, name, _answering(original, answers[owner, name], is_asked))
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


@contextmanager
def watched(functions: Iterable[tuple[Any, str]], called: Callable[[], None]) -> Iterator[None]:
    """``called`` is called before any of the functions ``(owner, name)`` is."""
    before = [(owner, name, getattr(owner, name)) for owner, name in functions]
    for owner, name, original in before:
        setattr(owner, name, _watching(original, called))
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def _watching(original: Callable[..., Any], called: Callable[[], None]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        called()
        return original(*args, **kwargs)

    return call


def _answering(original: Callable[..., Any], answer: Callable[[], bool], is_asked: Callable[[], bool]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return answer() if is_asked() else original(*args, **kwargs)

    return call


_exclusive = threading.RLock()


@contextmanager
def exclusively() -> Iterator[None]:
    """One recording at a time in the whole process: what is replaced below is everybody's."""
    with _exclusive:
        yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """``nn.MultiheadAttention`` and ``nn.TransformerEncoder`` run their Python code on this thread, as a recording."""
    thread = threading.get_ident()
    with exclusively(), answered({FAST_PATH: lambda: False}, lambda: threading.get_ident() == thread):
        yield


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


def _traced_math() -> types.ModuleType:
    """``math`` whose functions keep the memory of traced numbers."""
    module = types.ModuleType("math")
    for name, value in vars(math).items():
        setattr(module, name, traced_call(value) if isinstance(value, types.BuiltinFunctionType) else value)
    return module


MATH = _traced_math()
_OF_MATH = {id(math): MATH, **{id(value): getattr(MATH, name) for name, value in vars(math).items()
                               if isinstance(value, types.BuiltinFunctionType)}}  # fmt: skip


@contextmanager
def size_preserving_builtins(namespaces: list[dict[str, Any]], replacements: Mapping[str, Any]) -> Iterator[None]:
    """Code in the namespaces sees the replacements instead of the builtins of these names, and ``MATH`` as ``math``,
    whatever it is called there; and its functions, where they have names of their own (``from math import sqrt``)."""
    replaced: list[tuple[dict[str, Any], str]] = []
    of_math = [(space, name, value) for space in namespaces for name, value in space.items() if id(value) in _OF_MATH]
    try:
        for namespace, name, value in of_math:
            namespace[name] = _OF_MATH[id(value)]
        for namespace in namespaces:
            for name, value in replacements.items():
                if name not in namespace:
                    namespace[name] = value
                    replaced.append((namespace, name))
        yield
    finally:
        for namespace, name in replaced:
            namespace.pop(name, None)
        for namespace, name, value in of_math:
            namespace[name] = value


@contextmanager
def seen_numpy(namespaces: list[dict[str, Any]], module: types.ModuleType) -> Iterator[None]:
    """Code in the namespaces sees the module as ``numpy``; ``torch.from_numpy`` takes what that makes."""
    named = [(namespace, name) for namespace in namespaces for name in ("np", "numpy") if namespace.get(name) is np]
    from_numpy: Any = torch.from_numpy
    for namespace, name in named:
        namespace[name] = module
    torch.from_numpy = lambda ndarray: (
        torch.as_tensor(to_torch(ndarray)) if has_arrays(ndarray) else from_numpy(ndarray)
    )
    try:
        yield
    finally:
        torch.from_numpy = from_numpy
        for namespace, name in named:
            namespace[name] = np


def defining_namespaces(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """Those of all Python modules of the packages that define the classes of these layers; not torch's own."""
    classes = {base for cls in {type(module) for module in modules} for base in cls.__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in classes}
    return namespaces_of(frozenset(packages - {"torch", "fxprune", *sys.stdlib_module_names}))


def namespaces_of(packages: frozenset[str]) -> list[dict[str, Any]]:
    """Those of all Python modules of these packages that were imported."""
    found = [sys.modules.get(name) for name in _names_below(packages, tuple(sys.modules))]
    return [module.__dict__ for module in found if isinstance(module, types.ModuleType)]


@lru_cache(maxsize=4)
def _names_below(packages: frozenset[str], names: tuple[str, ...]) -> list[str]:
    """The dotted names that begin with one of the packages."""
    return [name for name in names if name.partition(".")[0] in packages]
