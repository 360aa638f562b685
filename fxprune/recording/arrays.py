"""What NumPy computes from traced numbers, which stays in the graph.

A few numbers in an array (``np.array(x.shape[2:]) // 2``) are so many traced numbers in an array of objects. Grids of
a size (``np.arange(x.shape[2])``) are tensors, of which ``torch._numpy``, by which ``torch.compile`` follows NumPy too,
makes what NumPy would. To a number that goes into another function the graph is bound.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch._numpy as tnp
from numpy.lib.mixins import NDArrayOperatorsMixin
from torch import Tensor

from fxprune.recording.traced import (
    Constant,
    TracedFloat,
    TracedInt,
    as_numpys,
    plain,
    traced_call,
    traced_float,
    traced_int,
)

_ARRAY: Any = tnp.__dict__["ndarray"]
_ARRAYS = {"array", "asarray", "asanyarray"}
_CONVERSIONS: dict[Any, Callable[[Any], Any]] = {np.dtype(np.int64): traced_int, np.dtype(np.float64): traced_float}
_CHOICES: dict[Any, Any] = {
    np.maximum: np.frompyfunc(traced_call(max), 2, 1),
    np.minimum: np.frompyfunc(traced_call(min), 2, 1),
}


class Numbers(np.ndarray):
    """Traced numbers, and others, as an array of objects: an operator of the array is one of every number."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, TracedArray) for value in inputs):
            return NotImplemented
        given = [_objects(value) for value in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(map(_objects, kwargs["out"]))
        if ufunc in _CHOICES:
            ufunc = _CHOICES[ufunc]  # NumPy would compare
        elif method == "__call__" and ufunc.nin == ufunc.nout == 1 and not kwargs:
            ufunc = np.frompyfunc(ufunc, 1, 1)  # of every number; NumPy would call a method of that name
        return _as_numbers(getattr(ufunc, method)(*given, **kwargs))

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        """The numbers, converted; to another type than Python's own numbers are of, the values leave."""
        convert = _CONVERSIONS.get(np.dtype(dtype))
        if convert is None or args or kwargs:
            return _objects(self).astype(dtype, *args, **kwargs)
        return _as_numbers(np.frompyfunc(lambda value: as_numpys(convert(value)), 1, 1)(_objects(self)))


def _objects(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, Numbers) else value


def _as_numbers(value: Any) -> Any:
    return value.view(Numbers) if isinstance(value, np.ndarray) and value.dtype == object else value


def numbers(values: Any, dtype: Any = None) -> Any:
    """Nested sequences of numbers as an array; None where NumPy's would be of another type than Python's numbers."""
    found = np.array(values, dtype=object)
    if dtype is None:
        dtype = np.float64 if any(isinstance(value, (float, np.floating)) for value in found.reshape(-1)) else np.int64
    return found.view(Numbers).astype(dtype) if np.dtype(dtype) in _CONVERSIONS else None


class TracedArray(NDArrayOperatorsMixin):
    """An array that a graph computes: ``tensor``. What takes its values out of the graph raises ``TypeError``."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        out = kwargs.pop("out", (None,))[0]
        if method != "__call__" or not hasattr(tnp, ufunc.__name__):
            return NotImplemented
        given = [self._beside(value) if isinstance(value, (TracedInt, TracedFloat)) else value for value in inputs]
        result = _given_back(getattr(tnp, ufunc.__name__)(*map(_given, given), **_all_given(kwargs)))
        if out is None:
            return result
        out.tensor.copy_(result.tensor)
        return out

    def _beside(self, number: Any) -> TracedArray:
        """A number as an array of the type by which NumPy computes with it: its own if Python's number fits in that."""
        fits = isinstance(number, int) or self.tensor.is_floating_point()
        dtype = self.tensor.dtype if fits and not number.lazy.of_numpy else _type_of(None, number)
        return TracedArray(torch.as_tensor(number, dtype=dtype))

    def __array_function__(self, function: Any, kinds: Any, args: Any, kwargs: Any) -> Any:
        if not hasattr(tnp, function.__name__):
            return NotImplemented
        return _given_back(getattr(tnp, function.__name__)(*map(_given, args), **_all_given(kwargs)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # ways to the values
            raise AttributeError(name)
        return self._attribute(name)

    def _attribute(self, name: str) -> Any:
        value = getattr(_ARRAY(self.tensor), name)
        if not callable(value):
            return _given_back(value)
        return lambda *args, **kwargs: _given_back(value(*map(_given, args), **_all_given(kwargs)))

    def __getitem__(self, index: Any) -> Any:
        return self._attribute("__getitem__")(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._attribute("__setitem__")(index, value)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"a {type(self).__name__} has no values")

    __bool__ = __int__ = __float__ = __index__ = __len__ = __iter__ = __array__


def _given(value: Any) -> Any:
    """As ``torch._numpy`` takes it, which has types of its own."""
    if isinstance(value, TracedArray):
        return _ARRAY(value.tensor)
    if isinstance(value, np.ndarray):
        return _ARRAY(torch.tensor(value.tolist() if isinstance(value, Numbers) else value))
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Constant):
        return plain(value)
    if type(value) in (tuple, list):
        return type(value)(map(_given, value))
    return value


def _all_given(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: _given(value) for name, value in kwargs.items()}


def _given_back(value: Any) -> Any:
    if isinstance(value, _ARRAY):
        return TracedArray(value.tensor)
    return type(value)(map(_given_back, value)) if type(value) in (tuple, list) else value


def has_arrays(values: Any) -> bool:
    """Whether these are arrays that remember something, or sequences of such."""
    return _has(values, (Numbers, TracedArray))


def _has(values: Any, kinds: tuple[type, ...]) -> bool:
    if type(values) in (tuple, list, torch.Size):
        return any(_has(value, kinds) for value in values)
    return isinstance(values, kinds)


def _left(value: Any) -> Any:
    """What C code takes from a traced number unseen, the graph is bound to; any other value as it is."""
    if type(value) in (tuple, list, torch.Size):
        return type(value)(map(_left, value))
    if isinstance(value, (TracedInt, TracedFloat)):
        value.lazy.owner.decided(value, "==", plain(value), True)
    return plain(value)


def _are_numbers(values: Any) -> bool:
    return type(values) in (tuple, list, torch.Size) and all(isinstance(value, (int, float)) for value in values)


def to_torch(values: Any) -> Any:
    """Arguments of a torch function with tensors and numbers in place of what arrays remember."""
    if isinstance(values, TracedArray):
        return values.tensor
    if isinstance(values, Numbers):
        return values.tolist()
    if type(values) in (tuple, list):
        return type(values)(map(to_torch, values))
    return values


# -- grids -------------------------------------------------------------------------------------------------------------


def _type_of(dtype: Any, *numbers: Any) -> torch.dtype:
    """Of an array of that type, else of what NumPy makes of these numbers."""
    whole = bool(numbers) and all(isinstance(number, (int, np.integer)) for number in numbers)
    return torch.from_numpy(np.empty(0, dtype or (np.int64 if whole else np.float64))).dtype


def _arange(*bounds: Any, dtype: Any = None) -> Tensor:
    return torch.arange(*bounds, dtype=_type_of(dtype, *bounds))


def _linspace(start: Any, stop: Any, num: Any = 50, dtype: Any = None) -> Tensor:
    return torch.linspace(start, stop, num, dtype=_type_of(dtype))


def _full(shape: Any, fill_value: Any, dtype: Any = None) -> Tensor:
    return torch.full(_shape(shape), fill_value, dtype=_type_of(dtype, fill_value))


def _zeros(shape: Any, dtype: Any = None) -> Tensor:
    return torch.zeros(_shape(shape), dtype=_type_of(dtype))


def _ones(shape: Any, dtype: Any = None) -> Tensor:
    return torch.ones(_shape(shape), dtype=_type_of(dtype))


def _eye(rows: Any, columns: Any = None, dtype: Any = None) -> Tensor:
    return torch.eye(rows, rows if columns is None else columns, dtype=_type_of(dtype))


def _shape(shape: Any) -> Any:
    return to_torch(shape) if isinstance(shape, (tuple, list, np.ndarray)) else (shape,)


_GRIDS: dict[str, Callable[..., Tensor]] = {
    "arange": _arange, "linspace": _linspace, "full": _full, "zeros": _zeros, "ones": _ones, "empty": _zeros,
    "eye": _eye,
}  # fmt: skip
_ROUNDED = {"round", "around"}


# -- the module --------------------------------------------------------------------------------------------------------


def _following(name: str, function: Callable[..., Any], follow: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _has([*args, *kwargs.values()], (TracedInt, TracedFloat, Numbers, TracedArray)):
            return function(*args, **kwargs)
        if not follow:
            return function(*map(_left, args), **{key: _left(value) for key, value in kwargs.items()})
        grid = _GRIDS.get(name)
        if grid is not None and kwargs.keys() <= inspect.signature(grid).parameters.keys():
            return TracedArray(grid(*args, **kwargs))
        if name in _ROUNDED and len(args) == 1 and not kwargs and isinstance(args[0], (TracedFloat, Numbers)):
            return np.rint(args[0])
        if name in _ARRAYS and not isinstance(args[0], TracedArray) and set(kwargs) <= {"dtype"} and len(args) <= 2:
            found = numbers(args[0], *args[1:], **kwargs)
            return function(*map(_left, args), **kwargs) if found is None else found
        args = tuple(numbers(arg) if _are_numbers(arg) else arg if has_arrays(arg) else _left(arg) for arg in args)
        return function(*args, **{key: _left(value) for key, value in kwargs.items()})

    return call


class _Numpy(types.ModuleType):
    """``numpy`` whose functions keep the memory of traced numbers; or by which the graph is bound to them."""

    def __init__(self, follow: bool) -> None:
        super().__init__("numpy")
        self._follow = follow

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        if isinstance(value, (type, types.ModuleType, np.ufunc)) or not callable(value):
            return value
        return _following(name, value, self._follow)


FOLLOWED, BOUND = _Numpy(True), _Numpy(False)
