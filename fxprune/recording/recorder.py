"""Tracing by running: the hooks that see one run of the model.

A ``TorchFunctionMode`` sees every torch function and tensor method as the user wrote it; ``nn.Module.__call__`` is
intercepted for leaf modules; a ``TorchDispatchMode`` below sees the aten ops of calls that no torch function
announced (scripted functions, C++ ops). Ops that run inside a recorded call belong to that call: ``_depth`` counts
such calls.
"""

from __future__ import annotations

import inspect
import operator
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._C import (
    _get_function_stack_at,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode

from fxprune.errors import RecordError
from fxprune.meta import OpMode
from fxprune.recording import boundary, patches, state, trees
from fxprune.recording.calls import Call, FunctionApply, property_name, setter_name, written_as
from fxprune.recording.leaves import is_leaf, is_only_torch
from fxprune.recording.module import TrainingFlag, have_their_own_modes
from fxprune.recording.parts import Parts
from fxprune.recording.rehearsal import Rehearsal
from fxprune.recording.sources import caller_is_user_code, current_source, defined_at
from fxprune.recording.traced import Lazy, TracedFlag, TracedFloat, TracedInt, plain
from fxprune.recording.writer import GraphWriter

_VALUE_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}
# Calls that change how autograd treats a tensor, or a mode of torch, and compute nothing.
_NO_OPS = {"requires_grad_", "retain_grad", "register_hook", "_set_grad_enabled", "set_grad_enabled"}


@dataclass(frozen=True)
class Options:
    """What a second attempt gives up when the first one fails.

    ``clear_caches``: empty the dicts in which the model keeps tensors it computed earlier. ``traced_flags``: let
    functional dropout follow train and eval. ``traced_builtins``: let sizes keep their memory through ``int()`` and
    ``len()``. ``own_hashes``: a size is found in a dict or set only under its own expression, so that functions that
    memoise by sizes are run.
    """

    clear_caches: bool = True
    traced_flags: bool = True
    traced_builtins: bool = True
    own_hashes: bool = True


class _FunctionMode(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.paused = _Paused(self)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.recorder.seen_function(func, args, kwargs or {}, self)


class _Paused:
    """``with`` this, the mode is off, unless another one lies above it: it would only look on."""

    def __init__(self, mode: TorchFunctionMode) -> None:
        self.mode = mode
        self.taken: list[bool] = []

    def _is_on(self) -> bool:
        last = _len_torch_function_stack() - 1
        return last >= 0 and _get_function_stack_at(last) is self.mode

    def __enter__(self) -> None:
        is_on = self._is_on()
        self.taken.append(is_on)
        if is_on:
            _pop_torch_function_stack()

    def __exit__(self, *error: Any) -> None:
        if self.taken.pop():
            _push_on_torch_function_stack(self.mode)

    def lifted(self) -> AbstractContextManager[Any]:
        """``with`` this, the mode is on again, if it was before."""
        return self.mode if any(self.taken) and not self._is_on() else nullcontext()


class _DispatchMode(OpMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.recorder.seen_op(func, args, kwargs or {})


class Recorder:
    """One run of ``model``, written down by ``writer``."""

    def __init__(self, model: nn.Module, parts: Parts, options: Options, rehearsal: Rehearsal | None = None) -> None:
        self.model = model
        self.parts = parts
        self.options = options
        self.rehearsal = rehearsal
        seen = parts if rehearsal is None else rehearsal.parts(parts)
        self.writer = GraphWriter(seen, options.own_hashes)
        self._written_storages = state.Storages()
        self._thread = threading.get_ident()
        self._depth = 0
        self._value_read = False
        self._written_tensors: set[int] = set()
        self._function_mode = _FunctionMode(self)
        self._module_names = {id(module): name for name, module in parts.modules.items()}
        self._buffers = [
            (
                module,
                name,
                f"{path}.{name}" if path else name,
                buffer if rehearsal is None else rehearsal.stand_in(buffer),
            )
            for path, module in parts.modules.items()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self, bound: inspect.BoundArguments) -> Any:
        """Run the model on copies of the example inputs, write the graph, and return the output."""
        with self._surroundings(), ExitStack() as hooks:
            hooks.enter_context(torch.enable_grad())
            hooks.enter_context(patches.without_fast_path())
            hooks.enter_context(patches.intercepted_modules(self.seen_module))
            namespaces = patches.defining_namespaces(self.parts.modules.values())
            hooks.enter_context(patches.intercepted_apply(namespaces, self.seen_apply))
            hooks.enter_context(patches.intercepted_autocast(self.entered_autocast, self.left_autocast))
            if self.options.traced_builtins:
                hooks.enter_context(patches.size_preserving_builtins(namespaces, self._builtins()))
            hooks.enter_context(self._function_mode)
            with self._unrecorded():
                if self.rehearsal is not None:
                    self.rehearsal.install(self.parts.modules.values())
                self._put_in_eval_mode()
                args, kwargs = self._place_inputs(bound)
                self._written_tensors.clear()
                if self.rehearsal is not None:
                    self.rehearsal.begin()
            output = self.model(*args, **kwargs)
            with self._unrecorded():
                self._write_back_buffers()
                self._place_output(output)
        self.writer.finish()
        return output

    def run_unrecorded(self, bound: inspect.BoundArguments) -> Any:
        """The model's own output in eval mode, without a graph; everything is put back all the same."""
        with self._surroundings(), torch.no_grad(), self._unrecorded():
            self.model.eval()
            fresh = {name: boundary.with_fresh_tensors(value) for name, value in bound.arguments.items()}
            inputs = inspect.BoundArguments(bound.signature, OrderedDict(fresh))
            return self.model(*inputs.args, **inputs.kwargs)

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """What is put back after any run, and the dispatch mode that sees what there is to put back."""
        with ExitStack() as stack:
            stack.callback(self._written_storages.restore)
            stack.enter_context(state.preserved(self.parts))
            stack.enter_context(state.forked_random_state(self.parts))
            stack.enter_context(state.without_compilation())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(_DispatchMode(self))
            yield

    def _unrecorded(self) -> Recorder:
        """``with`` this, nothing is recorded, and the function mode is off; ``lifted`` is for code of the model."""
        return self

    def __enter__(self) -> None:
        self._depth += 1
        self._function_mode.paused.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._function_mode.paused.__exit__()
        self._depth -= 1

    def _is_inner(self) -> bool:
        """Whether what runs now belongs to a call that is recorded as a whole, or to another thread."""
        return self._depth > 0 or threading.get_ident() != self._thread

    def _put_in_eval_mode(self) -> None:
        """Through train mode, so that models which drop their caches in ``train()`` do."""
        modules = self.parts.modules.values()
        if have_their_own_modes(modules):
            with self._function_mode.paused.lifted():
                self.model.train(True)
                self.model.eval()
        else:
            for module in modules:
                module.__dict__["training"] = False
        if self.options.clear_caches:
            for cache in state.cached_tensor_dicts(modules):
                cache.clear()
        if not self.options.traced_flags:
            return
        for name, module in self.parts.modules.items():
            if not isinstance(module, torch.jit.ScriptModule) and (not name or not is_leaf(module)):
                module.__dict__["training"] = self.writer.flag(name, self._branched_on_flag)

    def _branched_on_flag(self) -> None:
        if caller_is_user_code():
            self.writer.note("a branch on self.training was recorded as it goes in eval mode")

    # --- inputs and outputs -------------------------------------------------------------------------------------------

    def _place_inputs(self, bound: inspect.BoundArguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
        fresh = {name: boundary.with_fresh_tensors(value) for name, value in bound.arguments.items()}
        bound = inspect.BoundArguments(bound.signature, OrderedDict(fresh))
        for placeholder, value in boundary.placeholders(self.writer.graph, bound):
            self.writer.describe(placeholder, value if isinstance(value, Tensor) else None)
            for path in boundary.leaf_paths(value):
                node = placeholder
                for part in path:
                    node = self.writer.create(Call("call_function", part.target, (node, part.key), {}))
                tensor = path[-1].value if path else value
                self.writer.describe(node, tensor)
                self.writer.map(tensor, node, lasting=True)
        for node in self.writer.graph.nodes:
            node.meta["source"] = defined_at(self.model.forward)
            self.writer.inputs_end = node
        return bound.args, bound.kwargs

    def _place_output(self, output: Any) -> None:
        node = self.writer.graph.output(self.writer.argument(boundary.taken_apart(output)))
        self.writer.describe(node, output if isinstance(output, Tensor) else None)
        node.meta["source"] = defined_at(self.model.forward)

    def _write_back_buffers(self) -> None:
        """``self.steps = self.steps + 1`` replaces a buffer object; the graph writes the new value into the buffer."""
        for module, name, path, before in self._buffers:
            after = module._buffers.get(name)
            if after is None or after is before or not self.writer.computed(after):
                continue
            if after.shape == before.shape:
                call = Call("call_method", "copy_", (self.writer.node_of(before), self.writer.node_of(after)), {})
                self.writer.mark_writes(self.writer.create(call), [before])
            else:
                self.writer.note(f"the buffer {path} is replaced by one of another shape, which is not recorded")

    # --- the hooks ----------------------------------------------------------------------------------------------------

    def seen_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: TorchFunctionMode) -> Any:
        """A torch function or tensor method; ``mode`` is off while it is handled."""
        if self._is_inner():
            return self._run(func)(*args, **kwargs)
        getter = property_name(func)
        if getter == "device":
            with self._unrecorded():
                return self.writer.device(args[0], self._run(func)(*args))
        special = _SPECIAL.get(func) or _SPECIAL.get(getter)
        if special is not None:
            with self._unrecorded():
                return special(self.writer, args, kwargs)
        if func is F.multi_head_attention_forward:
            with mode:
                return _attention_body(self.writer, *args, **kwargs)
        if getattr(func, "__name__", "") in _NO_OPS:
            return func(*args, **kwargs)
        if setter_name(func) is not None:
            return self._assigned(setter_name(func), args[0], args[1])
        return self._record(lambda: written_as(func, args, kwargs), self._run(func), args, kwargs)

    def _run(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """How a torch function is run."""
        return func if self.rehearsal is None else partial(self.rehearsal.function, func)

    def _assigned(self, name: str | None, tensor: Tensor, value: Any) -> None:
        """``tensor.data = value``: everything that held the tensor sees it change; other attributes are autograd's."""
        with self._unrecorded():
            self._needs_data()
            before = tensor.detach()
            call = Call("call_function", setattr, (tensor, name, value), {})
            if name == "data":
                self.writer.mark_writes(self.writer.create(call), [before, value])
            setattr(tensor, str(name), value)

    def seen_module(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A module that is called: a leaf becomes one node, any other runs on under its name."""
        if self._is_inner():
            return call(module, *args, **kwargs)
        name = self._module_names.get(id(module))
        if isinstance(module, TrainingFlag) and name is not None and self.options.traced_flags:
            return self.writer.flag(name.rpartition(".")[0], self._branched_on_flag)
        self.writer.path.append(self.writer.path[-1] if name is None else name)
        try:
            with self._function_mode.paused:
                if name and is_leaf(module) and self._has_its_own_tensors(module):
                    try:
                        return self._leaf(call, module, name, args, kwargs)
                    except _NotTensorsError:
                        pass
            return call(module, *args, **kwargs)
        finally:
            self.writer.path.pop()

    def _has_its_own_tensors(self, module: nn.Module) -> bool:
        """Not so if the model put computed tensors in the place of the layer's parameters for this call."""
        own = (*module._parameters.values(), *module._buffers.values())
        if not all(tensor is None or self.writer.knows(tensor) for tensor in own):
            return False
        return all(self._has_its_own_tensors(child) for child in module._modules.values() if child is not None)

    def _leaf(
        self, call: Callable[..., Any], module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        def checked(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if is_only_torch(module) else self._function_mode.paused.lifted():
                result = call(module, *args, **kwargs)
            if not trees.is_only_tensors(result):
                raise _NotTensorsError
            return result

        return self._record(lambda: Call("call_module", name, args, kwargs), checked, args, kwargs)

    def seen_apply(self, cls: type, args: tuple[Any, ...]) -> Any:
        """``cls.apply`` is one node, so that its custom backward survives; checkpointing is looked through."""
        if self._is_inner():
            return patches.apply_function(cls, args)
        if cls is torch.utils.checkpoint.CheckpointFunction:
            return args[0](*args[2:])
        call = Call("call_function", FunctionApply(cls), args, {})

        def run(*args: Any) -> Any:
            with self._function_mode.paused.lifted():
                return patches.apply_function(cls, args)

        return self._record(lambda: call, run, args, {})

    def seen_op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An aten op, inside a recorded call or called where no torch function announced it."""
        if func in _VALUE_READS:
            self._value_read = True
        is_inner = self._is_inner()
        run = func if self.rehearsal is None else partial(self.rehearsal.op, func)
        with self._unrecorded():
            if func._schema.is_mutable:
                self._save_before_write(func, args, kwargs)
            if is_inner:
                result = run(*args, **kwargs)
            else:
                self._needs_data()  # what calls an op that no torch function announced cannot be watched
                result = self._record(lambda: Call("call_function", func, args, kwargs), run, args, kwargs)
            for tensor in trees.tensors(result):
                self._written_storages.created(tensor)
        return result

    def _save_before_write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in trees.tensors(value):
                self._written_storages.before_write(tensor)
                self._written_tensors.add(id(tensor))

    def _needs_data(self) -> None:
        if self.rehearsal is not None:
            self.rehearsal.ask()

    def entered_autocast(self, context: torch.autocast) -> None:
        if context._enabled:
            self._needs_data()  # it concerns one kind of device
        if not self._is_inner():
            args = (context.device, context.fast_dtype, context._enabled, context._cache_enabled)
            enter = self.writer.create(Call("call_function", torch.amp.autocast_mode._enter_autocast, args, {}))
            context.__dict__["_recorded_as"] = enter

    def left_autocast(self, context: torch.autocast) -> None:
        enter = context.__dict__.pop("_recorded_as", None)
        if enter is not None:
            leave = self.writer.create(Call("call_function", torch.amp.autocast_mode._exit_autocast, (enter,), {}))
            self.writer.region(enter, leave)

    def _record(
        self, written: Callable[[], Call], run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one call, then write it down unless it computed no tensor and changed none."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RecordError(
                f"{current_source()}: code inside torch.vmap, torch.func.grad and the like cannot be recorded. "
                "Write the batch dimension out."
            )
        with self._unrecorded():
            self._value_read = False
            before = [(tensor, _version(tensor)) for tensor in trees.tensors(*args, *kwargs.values())]
            result = run(*trees.map_tree(plain, args), **(trees.map_tree(plain, kwargs) if kwargs else {}))
            changed = [t for t, version in before if _version(t) != version or id(t) in self._written_tensors]
            self._written_tensors.clear()
            if not changed and not trees.has_tensors(result):
                if self._value_read:
                    self.writer.note("a value read from a tensor is kept as a constant")
                return result
            return self.writer.write(written(), result, changed)

    def _builtins(self) -> dict[str, Any]:
        return {"int": patches.Int, "float": patches.Float, "len": self._length, "range": self._range}

    def _range(self, *bounds: Any) -> range:
        if any(isinstance(bound, TracedInt) for bound in bounds) and not self._is_inner():
            self.writer.note(f"a loop over range{bounds}, which depends on the shape of a tensor, is unrolled")
        return range(*bounds)

    def _length(self, value: Any) -> int:
        """``len(value)`` that keeps the memory of a tensor's first size."""
        if not isinstance(value, Tensor) or self._is_inner():
            return len(value)
        with self._unrecorded():
            return self.writer.size(value, 0) if value.ndim else len(value)


class _NotTensorsError(Exception):
    """A leaf module returned something that a graph cannot take apart."""


def _sizes(writer: GraphWriter, tensor: Tensor) -> torch.Size:
    return torch.Size([writer.size(tensor, dim) for dim in range(tensor.ndim)])


def _size(writer: GraphWriter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return _sizes(writer, args[0]) if dim is None else writer.size(args[0], dim)


def _count(writer: GraphWriter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    total: int = 1
    for size in _sizes(writer, args[0]):
        total = total * size
    return total


# Reads of sizes: a method or function, or the name of a property.
_SPECIAL: dict[Any, Callable[[GraphWriter, tuple[Any, ...], dict[str, Any]], Any]] = {
    "shape": lambda writer, args, kwargs: _sizes(writer, args[0]),
    Tensor.size: _size,
    Tensor.numel: _count,
    Tensor.nelement: _count,
    torch.numel: _count,
}


def _attention_body(writer: GraphWriter, *args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward`` op by op instead of as one node.

    In train mode its dropout must come back: the probability becomes ``p * training``, which is 0 while recording.
    """
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    training = bound.arguments["training"]
    if isinstance(training, TracedFlag) and bound.arguments["dropout_p"] > 0.0:
        lazy = Lazy(writer, "call_function", operator.mul, (training, bound.arguments["dropout_p"]))
        bound.arguments.update(training=True, dropout_p=TracedFloat(0.0, lazy))
    return _multi_head_attention(*bound.args, **bound.kwargs)


_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
