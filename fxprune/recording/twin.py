"""The model to run for real beside its recording: a private copy in eval mode; nothing of the caller's changes."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from fxprune.ops.meta import OpMode, tensors_in
from fxprune.recording import boundary, state
from fxprune.recording.copies import Copier, keep_to_this_process
from fxprune.recording.parts import Parts
from fxprune.recording.patches import without_fast_path
from fxprune.recording.randomness import repeatable


class Twin:
    """A copy of ``model`` that is called again and again, and keeps what it keeps from call to call.

    ``writes``: the model may write to its parameters, so every op is watched. ``draws``: its forward draws random
    numbers, from generators that are seeded alike before every call; those of Python and NumPy are not. ``gradients``:
    its forward reads gradients. ``fused``: it may call the fused kernels of layers, which recordings do not.
    """

    def __init__(
        self, model: nn.Module, *, writes: bool = True, draws: bool = True, gradients: bool = True, fused: bool = True
    ) -> None:
        self._given, self._writes, self._draws, self._gradients = model, writes, draws, gradients
        self._fused = fused
        self._private = False
        self._calls = 0
        self._copy()

    @classmethod
    def of(cls, model: nn.Module, recorded: nn.Module, *, fused: bool = False) -> Twin:
        """For what its recording saw it do."""
        meta: Any = recorded.meta
        seen = {name: meta[name] for name in ("writes", "draws", "gradients")}
        return cls(model, **seen, fused=fused or not meta["fused"])

    def _copy(self) -> None:
        parts = Parts.of(self._given)
        self._memory = state.Memory(parts, self._private, self._gradients)
        self._copies = Copier(self._memory.stand_in)  # holds what is only referred to weakly
        self.model: nn.Module = self._copies(self._given)
        keep_to_this_process(self._copies.modules.values())
        self._in_eval_mode = False
        self._tensors = list(parts.tensors.values())

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the model returns, or raises, for copies of these inputs."""
        self._calls += 1
        try:
            result = self._called(args, kwargs)
        except Exception:
            if not self._memory.was_refused:  # the model's own; TorchScript, too, makes another one of a refusal
                raise
        else:
            if not self._memory.was_refused:  # nor caught by the model
                return result
        self._private = True
        self._copy()
        return self._called(args, kwargs)

    def _called(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        states = state.RandomStates(self._tensors)
        try:
            with ExitStack() as stack:
                stack.callback(self._memory.restore)
                stack.enter_context(torch.no_grad())
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(state.without_compilation())
                stack.enter_context(nullcontext() if self._fused else without_fast_path())
                if self._draws:
                    stack.enter_context(repeatable())
                if self._calls > 1:  # another draw than at the call before
                    random.seed(self._calls)
                    if "numpy" in sys.modules:
                        sys.modules["numpy"].random.seed(self._calls)
                if self._writes:
                    stack.enter_context(_Watching(self._memory))
                if not self._in_eval_mode:  # which may write to weights, too
                    self.model.eval()
                    self._in_eval_mode = True
                own_args, own_kwargs = boundary.with_fresh_tensors((list(args), dict(kwargs)))
                return self.model(*own_args, **own_kwargs)
        finally:
            states.restore()

    def changed(self) -> list[tuple[str, str]]:
        """(name of a module, attribute) of what the copy's calls have left in it: numbers, tensors, sizes."""
        mine = Parts.of(self.model).modules
        found = []
        for path, module in Parts.of(self._given).modules.items():
            own, other = module.__dict__, mine[path].__dict__ if path in mine else {}
            for name in {**own, **other}:
                if name not in _OWN and not _same(own.get(name), other.get(name)):
                    found.append((path, name))
        return found


_OWN = frozenset([*nn.Module().__dict__, "forward"])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or one.shape != other.shape:
            return False
        return bool(torch.equal(one, other)) if not one.is_meta else True
    if isinstance(one, (int, float, str, tuple, type(None))) or isinstance(other, (int, float, str, tuple)):
        return type(one) is type(other) and bool(one == other)
    return True  # containers and objects are copies of each other


class _Watching(OpMode):
    def __init__(self, memory: state.Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._memory.before_op(func, args, kwargs)
        result = func(*args, **kwargs)
        for tensor in tensors_in((result,)):
            self._memory.created(tensor)
        return result
