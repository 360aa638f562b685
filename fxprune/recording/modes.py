"""The modes of torch that see a run, and when they look away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch._C import (
    _get_function_stack_at,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode

from fxprune.ops.meta import OpMode
from fxprune.recording.sources import caller_is_user_code


class FunctionMode(TorchFunctionMode):
    """Hands every torch function to ``seen``."""

    def __init__(self, seen: Callable[..., Any]) -> None:
        super().__init__()
        self._seen = seen
        self.paused = _Paused(self)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._seen(func, args, kwargs or {}, self)

    def is_next(self) -> bool:
        """Whether it is the first that sees what this thread calls."""
        last = _len_torch_function_stack() - 1
        return last >= 0 and _get_function_stack_at(last) is self

    def see(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Take a call as if torch had told of it; the mode is off meanwhile, as it is then."""
        _pop_torch_function_stack()
        try:
            return self._seen(func, args, {}, self)
        finally:
            _push_on_torch_function_stack(self)


class _Paused:
    """``with`` this, the mode is off, unless another one lies above it: it would only look on."""

    def __init__(self, mode: FunctionMode) -> None:
        self.mode = mode
        self.taken: list[bool] = []

    def __enter__(self) -> None:
        is_on = self.mode.is_next()
        self.taken.append(is_on)
        if is_on:
            _pop_torch_function_stack()

    def __exit__(self, *error: Any) -> None:
        if self.taken.pop():
            _push_on_torch_function_stack(self.mode)

    def lifted(self) -> AbstractContextManager[Any]:
        """``with`` this, the mode is on again, if it was before."""
        return self.mode if any(self.taken) and not self.mode.is_next() else nullcontext()


class DispatchMode(OpMode):
    """Hands every aten op to ``seen``."""

    supports_higher_order_operators = True

    def __init__(self, seen: Callable[..., Any]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._seen(func, args, kwargs or {})


class Unrecorded:
    """``with`` this, nothing is recorded, and the function mode is off; its ``paused.lifted`` is for code of the model.

    What runs inside a call that is written as a whole, or on another thread than the recording, is not recorded.
    """

    def __init__(self, mode: FunctionMode) -> None:
        self._mode = mode
        self._thread = threading.get_ident()
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1
        self._mode.paused.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._mode.paused.__exit__()
        self._depth -= 1

    def now(self) -> bool:
        """Whether what runs now is not recorded."""
        return self._depth > 0 or not self.is_here()

    def is_here(self) -> bool:
        """Whether this is the thread of the recording."""
        return threading.get_ident() == self._thread

    def is_asked_by_the_model(self) -> bool:
        """Whether code of the user's, on that thread, is what called."""
        return self.is_here() and caller_is_user_code()
