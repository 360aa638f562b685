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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
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
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from fxprune.errors import RecordError
from fxprune.ops.meta import OpMode
from fxprune.ops.table import find_call, load
from fxprune.recording import boundary, patches, state, structure, trees
from fxprune.recording.calls import Call, FunctionApply, property_name, setter_name, written_as
from fxprune.recording.copies import Copier, forget
from fxprune.recording.forms import form_of
from fxprune.recording.guards import NUMBER, fits
from fxprune.recording.leaves import is_leaf, is_only_torch
from fxprune.recording.module import TrainingFlag, have_their_own_modes
from fxprune.recording.parts import Parts
from fxprune.recording.randomness import drawn, draws
from fxprune.recording.rehearsal import Rehearsal
from fxprune.recording.sources import caller_is_user_code, current_source, defined_at
from fxprune.recording.traced import Lazy, TracedFlag, TracedFloat, TracedInt, plain, traced_call
from fxprune.recording.writer import GraphWriter

# Calls that take values out of a tensor without such an op.
_READS = {"tolist", "numpy", "__array__"}
# What libraries ask to find out whether they must take their general branch.
_EXPORTING = [
    (torch.compiler, "is_exporting"),
    (torch.compiler, "is_compiling"),
    (torch.compiler, "is_dynamo_compiling"),
    (torch.jit, "is_tracing"),
]
_FAST_PATH = (torch.backends.mha, "get_fastpath_enabled")  # of nn.MultiheadAttention and nn.TransformerEncoder
_SEEDS = [(torch, "manual_seed"), (torch.random, "manual_seed"), (torch, "seed"), (torch, "set_rng_state"),
          (torch.random, "set_rng_state")]  # fmt: skip
# What a graph cannot follow, as it is no part of any value.
_LAYOUT = "how a tensor lies in memory"
_ASKED = {"requires_grad": "whether a tensor requires a gradient", "is_contiguous": _LAYOUT}
# What holds where equal numbers count as unequal in a comparison, and the answer is the other one.
_OR_EQUAL = {"<": "<=", "<=": ">=", ">": ">=", ">=": "<="}
# Calls that change how autograd treats a tensor, or a mode of torch, and compute nothing.
_NO_OPS = {"requires_grad_", "retain_grad", "register_hook", "_set_grad_enabled", "set_grad_enabled"}


@dataclass(frozen=True)
class Options:
    """What a second attempt gives up when the first one fails.

    ``clear_caches``: empty the dicts in which the model keeps tensors it computed earlier. ``traced_flags``: let
    functional dropout follow train and eval. ``traced_builtins``: let sizes keep their memory through ``int()`` and
    ``len()``. ``own_hashes``: a size is found in a dict or set only under its own expression, so that functions that
    memoise by sizes are run.

    The others are other ways to record the same model, of which the one that agrees with it is taken (see
    ``fxprune.verification.probes``). ``exporting``: the model is told that it is being exported, where most libraries
    take their general branch. ``flipped``: source lines where a branch on a tensor's value goes the other way.
    ``unequal``: source lines where sizes that are equal count as unequal, so that what is done for unequal ones is
    recorded: a padding by nothing, a resize to the same size. ``cleared``: (name of a module, attribute) that the model
    keeps for one size, as good as never set.
    """

    clear_caches: bool = True
    traced_flags: bool = True
    traced_builtins: bool = True
    own_hashes: bool = True
    exporting: bool = False
    flipped: frozenset[str] = frozenset()
    unequal: frozenset[str] = frozenset()
    cleared: frozenset[tuple[str, str]] = frozenset()


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
    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.recorder.seen_op(func, args, kwargs or {})


class Recorder:
    """One run of ``model``, written down by ``writer``."""

    def __init__(self, model: nn.Module, parts: Parts, options: Options, private: bool = False,
                 rehearse: bool = False) -> None:  # fmt: skip
        """``parts``: of the caller's ``model``, a copy of which is run. ``private``: its parameters are copied too."""
        self.memory = state.Memory(parts, private)
        self.rehearsal = Rehearsal(self.memory) if rehearse else None
        load("aten")  # before anything is patched
        if self.rehearsal is not None:
            self.rehearsal.expect(parts)
        copier = Copier(self.memory.stand_in if self.rehearsal is None else self.rehearsal.stand_in)
        self.model = copier(model)
        self._copies = copier
        self.parts = Parts.of(self.model)
        self.options = options
        self.foreign_randomness = self.draws = self.writes = False
        self.draws_seeded = self._is_seeded = False
        self._begin = _begin_of(self.model)
        self._objects: dict[int, tuple[Any, Node]] = {}  # that came in, by identity
        self._as_given: dict[int, dict[Any, Any]] = {}
        self.writer = GraphWriter(self.parts, options.own_hashes, self.decided, self.compared, copier.original)
        for name, tensor in parts.tensors.items():
            self.writer.also_named(name, tensor)
        self._thread = threading.get_ident()
        self._depth = 0
        self._value_read = False
        self._written_tensors: set[int] = set()
        self._told_unequal: set[tuple[str, str]] = set()
        self._function_mode = _FunctionMode(self)
        self._module_names = {id(module): name for name, module in self.parts.modules.items()}
        self._buffers = [
            (module, name, f"{path}.{name}" if path else name, buffer)
            for path, module in self.parts.modules.items()
            if not isinstance(module, torch.jit.ScriptModule)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self, bound: inspect.BoundArguments) -> Any:
        """Run the copy on copies of the example inputs, write the graph, and return the output."""
        namespaces = patches.defining_namespaces(self.parts.modules.values())
        with patches.exclusively(), self._surroundings(), ExitStack() as hooks:
            hooks.enter_context(torch.enable_grad())
            hooks.enter_context(patches.answered({_FAST_PATH: lambda: False}, self._is_here))
            if self.options.exporting:
                answers = dict.fromkeys(_EXPORTING, lambda: True)
                hooks.enter_context(patches.answered(answers, self._is_asked_by_the_model))
            hooks.enter_context(patches.watched(_SEEDS, self._seeded))
            hooks.enter_context(patches.watched([(torch, "is_grad_enabled")], self._asked_for_grad))
            hooks.enter_context(patches.intercepted_modules(self.seen_module))
            hooks.enter_context(patches.intercepted_apply(namespaces, self.seen_apply))
            hooks.enter_context(patches.intercepted_autocast(self.entered_autocast, self.left_autocast))
            if self.options.traced_builtins:
                hooks.enter_context(patches.size_preserving_builtins(namespaces, self._builtins()))
            hooks.enter_context(self._function_mode)
            with self._unrecorded():
                self._put_in_eval_mode()
                args, kwargs = self._place_inputs(bound)
                self._written_tensors.clear()
                if self.rehearsal is not None:
                    self.rehearsal.begin()
            output = self.model(*args, **kwargs)
            with self._unrecorded():
                self.writes = self.memory.was_written or bool(self.writer.written_for_good())
                self._write_back_buffers()
                self._place_output(output)
        self.writer.finish()
        return output

    def run_unrecorded(self, bound: inspect.BoundArguments) -> Any:
        """The model's own output in eval mode, without a graph."""
        with self._surroundings(), torch.no_grad(), self._unrecorded():
            self.model.eval()
            fresh = boundary.with_fresh_tensors(dict(bound.arguments))
            inputs = inspect.BoundArguments(bound.signature, OrderedDict(fresh))
            return self.model(*inputs.args, **inputs.kwargs)

    def constants(self) -> dict[str, Tensor]:
        """The tensors that the run did not compute, by the name of their buffer: the caller's own, not their copies."""
        return {name: self._copies.original(tensor) for name, tensor in self.writer.constants.items()}

    def forget(self) -> None:
        """Let go of the copy."""
        forget(self.model)

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """What is put back after any run, and the dispatch mode that sees what there is to put back."""
        states = state.RandomStates(self.parts.tensors.values())
        try:
            with ExitStack() as stack:
                stack.callback(self.memory.restore)
                stack.enter_context(state.without_compilation())
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(_DispatchMode(self))
                yield
        finally:
            states.restore()
            self.foreign_randomness = states.foreign

    def _seeded(self) -> None:
        if self._is_here() and not self._is_inner():
            self._needs_data()
            self._is_seeded = True

    def _asked_for_grad(self) -> None:
        if self._is_asked_by_the_model() and not self._is_inner():
            self.writer.note("forward asks whether gradients are computed; recorded as it goes where they are")

    def _is_here(self) -> bool:
        return threading.get_ident() == self._thread

    def _is_asked_by_the_model(self) -> bool:
        return self._is_here() and caller_is_user_code()

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
        return self._depth > 0 or not self._is_here()

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
        for path, name in self.options.cleared:
            unset(self.parts.modules[path], name)
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
        arguments = OrderedDict(boundary.with_fresh_tensors(dict(bound.arguments)))
        found = boundary.placeholders(self.writer.graph, bound)
        self._guard_forms(found, bound)
        for placeholder, (name, *keys) in found:
            owner, key = (arguments[name], keys[0]) if keys else (arguments, name)
            if key in owner:
                owner[key] = self._placed(placeholder, owner[key])
            else:  # forward has its own default
                self.writer.describe(placeholder, None)
        for node in self.writer.graph.nodes:
            node.meta["source"] = self._begin
            self.writer.inputs_end = node
        bound = inspect.BoundArguments(bound.signature, arguments)
        return bound.args, bound.kwargs

    def _guard_forms(self, found: Sequence[tuple[Node, tuple[str, ...]]], bound: inspect.BoundArguments) -> None:
        names, recorded = [], []
        for node, (name, *keys) in found:
            owner: Mapping[str, Any] = bound.arguments[name] if keys else bound.arguments
            key = keys[0] if keys else name
            names.append(str(node.target))
            if key in owner:
                recorded.append(form_of(owner[key]))
            else:
                form = form_of(bound.signature.parameters[name].default, numbers=False)
                recorded.append(("absent", form) if node.args == (None,) else form)
        if found:
            nodes = tuple(node for node, _ in found)
            self.writer.effect(Call("call_function", fits, (nodes, tuple(names), tuple(recorded), self._begin), {}))

    def _placed(self, node: Node, value: Any) -> Any:
        """``node`` gives ``value``, an input or a part of one; returns it with numbers that know their node.

        ``value`` is a copy; what can be written to is changed in place, so that objects stay the objects they are.
        """
        writer = self.writer
        writer.describe(node, value if isinstance(value, Tensor) else None)
        if isinstance(value, Tensor):
            writer.map(value, node, lasting=True)
            return value
        if id(value) in self._objects:
            return value
        found = structure.parts(value)
        if found is None:
            return self._placed_leaf(node, value)
        if not isinstance(value, tuple) and not (found and found[0].kind == "leaf"):
            self._objects[id(value)] = (value, node)
        new = [
            part.holding(
                self._placed(
                    writer.create(Call("call_function", boundary.GETTERS[part.kind], (node, part.key), {})), part.value
                )
            )
            for part in found
        ]
        changed = [part for part, old in zip(new, found, strict=True) if part.value is not old.value]
        if changed and id(value) not in self._objects:
            return structure.rebuilt(value, new)
        for part in changed:
            _set(value, part.key, part.value)
        self._as_given[id(value)] = _contents(value)
        return value

    def _placed_leaf(self, node: Node, value: Any) -> Any:
        """A plain value among the inputs: a number becomes one that knows its node, another value stays as it is."""
        if type(value) in (int, float):
            lazy = Lazy(self.writer, "placeholder", "", ())
            lazy.node = node
            return TracedInt(value, lazy) if type(value) is int else TracedFloat(value, lazy)
        if isinstance(value, torch.Generator):
            self.writer.given_generator(value, node)
        return value

    def _place_output(self, output: Any) -> None:
        known = {key: node for key, (_, node) in self._objects.items()}
        apart = boundary.Apart(known)
        for key, (value, node) in self._objects.items():
            self._write_back(node, value, self._as_given.get(key, {}), apart)
        node = self.writer.graph.output(self.writer.argument(apart(output)))
        self.writer.describe(node, output if isinstance(output, Tensor) else None)
        node.meta["source"] = self._begin

    def _write_back(self, node: Node, value: Any, before: dict[Any, Any], apart: boundary.Apart) -> None:
        """What forward did to an object that came in, the graph does to the one it gets."""
        after, effect = _contents(value), self.writer.effect
        if isinstance(value, list):
            if len(after) != len(before) or any(after[i] is not before[i] for i in after):
                effect(Call("call_function", operator.setitem, (node, slice(None), [apart(v) for v in value]), {}))
            return
        is_mapping = isinstance(value, Mapping)
        put, drop = (operator.setitem, operator.delitem) if is_mapping else (setattr, delattr)
        for name, item in after.items():
            if name not in before or item is not before[name]:
                effect(Call("call_function", put, (node, name, apart(item)), {}))
        for name in before.keys() - after.keys():
            effect(Call("call_function", drop, (node, name), {}))

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
        asked = _ASKED.get(str(getter or getattr(func, "__name__", "")))
        if asked is not None and caller_is_user_code():
            self.writer.note(f"forward asks {asked}; recorded as it is for the example")
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
        name = str(getattr(func, "__name__", ""))
        args = self._with_numbers(name, args)
        return self._record(lambda: written_as(func, args, kwargs), self._run(func), args, kwargs, name)

    def _with_numbers(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with numbers where tensors stand for numbers: bounds of slices, sizes among others."""
        if name in ("__getitem__", "__setitem__"):
            index = args[1]
            parts = index if isinstance(index, tuple) else (index,)
            if any(isinstance(part, slice) and trees.has_tensors([part.start, part.stop, part.step]) for part in parts):
                new = [self._number_slice(part) if isinstance(part, slice) else part for part in parts]
                return (args[0], tuple(new) if isinstance(index, tuple) else new[0], *args[2:])
            return args
        record = find_call(name)
        if record is not None and record.sizes is not None:
            given = [self._number(arg) if isinstance(arg, Tensor) and place >= record.sizes else arg
                     for place, arg in enumerate(args)]  # fmt: skip
            args = tuple(given)
        if any(type(arg) in (tuple, list) and _is_mixed(arg) for arg in args):
            return tuple([*map(self._number, arg)] if type(arg) in (tuple, list) and _is_mixed(arg) else arg
                         for arg in args)  # fmt: skip
        return args

    def _number_slice(self, part: slice) -> slice:
        return slice(*(self._number(bound) for bound in (part.start, part.stop, part.step)))

    def _number(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        item = self.seen_function(Tensor.item, (value,), {}, self._function_mode)
        return patches.Int(item) if isinstance(item, float) else item

    def _run(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """How a torch function is run."""
        return func if self.rehearsal is None else partial(self.rehearsal.function, func)

    def _assigned(self, name: str | None, tensor: Tensor, value: Any) -> None:
        """``tensor.data = value``: everything that held the tensor sees it change; other attributes are autograd's."""
        with self._unrecorded():
            self._needs_data()
            if name == "data" and isinstance(tensor, nn.Parameter) and self.writer.knows(tensor):
                tensor.data = value
                self.writer.take_the_place(tensor, value)
                return
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
        module = self._copies.modules.get(id(module), module)  # of the caller's own, reached by a closure
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
        """``cls.apply`` is one node, so that its custom backward survives.

        Checkpointing is looked through, and what is given modules, which belong in the graph.
        """
        if self._is_inner():
            return patches.apply_function(cls, args)
        if cls is torch.utils.checkpoint.CheckpointFunction:
            return args[0](*args[2:])
        if any(isinstance(leaf, nn.Module) for leaf in structure.leaves_of(args)):
            self.writer.note(f"{cls.__name__} runs modules, so its own backward is not kept")
            return patches.apply_forward(cls, args)
        call = Call("call_function", FunctionApply(cls), args, {})

        def run(*args: Any) -> Any:
            with self._function_mode.paused.lifted():
                return patches.apply_function(cls, args)

        return self._record(lambda: call, run, args, {})

    def seen_op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An aten op, inside a recorded call or called where no torch function announced it."""
        if isinstance(func, torch._ops.HigherOrderOperator):
            raise RecordError(
                f"{current_source()}: torch's operator {func.name()} takes functions as arguments, which no graph "
                "holds. Write it in Python: a branch, a loop."
            )
        if _gives_a_value(func):
            self._value_read = True
        is_inner = self._is_inner()
        run = func if self.rehearsal is None else partial(self.rehearsal.op, func)
        if draws(func, args, kwargs):
            self.draws = True
            self.draws_seeded = self.draws_seeded or self._is_seeded
            if self.rehearsal is None or not any(t.is_meta for t in trees.tensors(*args, *kwargs.values())):
                # nobody's generator moves
                run = lambda *args, **kwargs: drawn(func, args, kwargs, 0)  # noqa: E731
        with self._unrecorded():
            if func._schema.is_mutable:
                self._written_tensors.update(map(id, self.memory.before_op(func, args, kwargs)))
            if is_inner:
                result = run(*args, **kwargs)
            else:
                self._needs_data()  # what calls an op that no torch function announced cannot be watched
                result = self._record(lambda: Call("call_function", func, args, kwargs), run, args, kwargs)
            for tensor in trees.tensors(result):
                self.memory.created(tensor)
        return result

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
        self,
        written: Callable[[], Call],
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str = "",
    ) -> Any:
        """Run one call, then write it down unless it computed no tensor and changed none. ``name``: of the function."""
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
                return self._read(written(), result) if self._value_read or name in _READS else result
            return self.writer.write(written(), result, changed)

    def _read(self, call: Call, result: Any) -> Any:
        """A value was read from a tensor. It goes on as a node where it is a number, else the graph is bound to it."""
        if isinstance(result, str):  # what a message says of a tensor, as a rule; what else it may be, probes tell
            return result
        name = str(getattr(call.target, "__name__", call.target))
        operand = call.args[0]
        is_truth = name in ("__bool__", "is_nonzero") and isinstance(operand, Tensor)
        node = self.writer.node_of(operand) if is_truth else self.writer.create(call)
        if not self.writer.depends_on_inputs(node):
            self.writer.note("a value read from a tensor is kept as a constant")
            return result
        if isinstance(result, bool):
            line = current_source()
            if line in self.options.flipped:
                return not result
        if not is_truth:
            node.meta[NUMBER] = result
        if name == "item" and type(result) in (int, float):
            lazy = Lazy(self.writer, "call_method", "item", (operand,))
            lazy.node = node
            return TracedInt(result, lazy) if type(result) is int else TracedFloat(result, lazy)
        if name == "tolist" and isinstance(result, list) and _is_of_numbers(result):
            self.writer.guard(self.writer.size(operand, 0), "==", len(result))
            return [_entry(self.writer, node, place, item) for place, item in enumerate(result)]
        if isinstance(result, np.ndarray):
            node, result_known = self.writer.node_of(operand), result.tolist()
        else:
            result_known = result
        if not _is_plain(result_known):
            raise RecordError(
                f"{current_source()}: {name} takes values out of a tensor that depends on the inputs, as a "
                f"{type(result).__name__}, which no graph can follow. Express what follows with torch functions."
            )
        self.writer.guard(node, "==", result_known)
        return result

    def decided(self, value: Any, relation: str, other: Any, outcome: bool) -> None:
        """The model took a number that it got from sizes or values out of the graph, or branched on it."""
        if not self._is_inner():
            with self._unrecorded():
                if _is_of_strides(value) or _is_of_strides(other):
                    self.writer.note(f"forward asks {_LAYOUT}; recorded as it is for the example")
                else:
                    self.writer.guard(value, relation, other, outcome)

    def compared(self, value: Any, relation: str, other: Any, outcome: bool) -> bool:
        """The model compares such a number; of equal ones it may be told that they are not, see ``Options``."""
        if self.options.unequal and plain(value) == plain(other) and not self._is_inner():
            place = current_source(), self.writer.path[-1]
            if place[0] in self.options.unequal and place not in self._told_unequal:
                self._told_unequal.add(place)  # once, or a loop may never end
                if relation in _OR_EQUAL:
                    self.decided(value, _OR_EQUAL[relation], other, True)
                return not outcome
        self.decided(value, relation, other, outcome)
        return outcome

    def _builtins(self) -> dict[str, Any]:
        return {"int": patches.Int, "float": patches.Float, "len": self._length, "range": self._range,
                "max": traced_call(max), "min": traced_call(min)}  # fmt: skip

    def _range(self, *bounds: Any) -> range:
        if not self._is_here():
            return range(*bounds)
        traced = [bound for bound in bounds if isinstance(bound, TracedInt)]
        if traced and not self._is_inner():
            self.writer.note(f"a loop over range{bounds}, which depends on the shape of a tensor, is unrolled")
            for bound in traced:
                self.decided(bound, "==", plain(bound), True)
        return range(*map(plain, bounds))

    def _length(self, value: Any) -> int:
        """``len(value)`` that keeps the memory of a tensor's first size."""
        if not isinstance(value, Tensor) or self._is_inner():
            return len(value)
        with self._unrecorded():
            return self.writer.size(value, 0) if value.ndim else len(value)


def _begin_of(model: nn.Module) -> str:
    """Where forward begins; of a graph that was recorded, where that of its model did."""
    nodes = model.graph.nodes if isinstance(model, torch.fx.GraphModule) else ()
    known = (str(node.meta.get("source", "")) for node in nodes if node.op == "output")
    return next(known, "") or defined_at(model.forward)


def _contents(value: Any) -> dict[Any, Any]:
    """What an object that may be written to holds now."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list):
        return dict(enumerate(value))
    return {part.key: part.value for part in structure.parts(value) or []}


def _set(value: Any, key: Any, item: Any) -> None:
    if isinstance(value, (Mapping, list)):
        value[key] = item  # type: ignore[index]
    else:
        object.__setattr__(value, key, item)


def _is_of_strides(value: Any) -> bool:
    if not isinstance(value, (TracedInt, TracedFloat)):
        return False
    return value.lazy.target == "stride" or any(map(_is_of_strides, value.lazy.args))


def _is_mixed(sequence: Sequence[Any]) -> bool:
    """Numbers, and tensors that stand for numbers."""
    kinds = [isinstance(item, Tensor) for item in sequence]
    return any(kinds) and any(isinstance(item, int) for item in sequence)


def _is_of_numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) for value in values)


def _entry(writer: GraphWriter, node: Node, place: int, value: float) -> Any:
    """A number of the list that ``node`` gives."""
    lazy = Lazy(writer, "call_function", operator.getitem, (node, place))
    return TracedInt(value, lazy) if type(value) is int else TracedFloat(value, lazy)


def _is_plain(value: Any) -> bool:
    """A number or a nested list of numbers."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float))


def unset(module: nn.Module, name: str) -> None:
    """As if nobody had set the attribute yet: what its class says, else None."""
    if name in module.__dict__:
        if any(name in vars(cls) for cls in type(module).__mro__):
            del module.__dict__[name]
        else:
            module.__dict__[name] = None
    elif name in module._buffers:
        module._buffers[name] = None


class _NotTensorsError(Exception):
    """A leaf module returned something that a graph cannot take apart."""


def _sizes(writer: GraphWriter, tensor: Tensor) -> torch.Size:
    return torch.Size([writer.size(tensor, dim) for dim in range(tensor.ndim)])


def _size(writer: GraphWriter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return _sizes(writer, args[0]) if dim is None else writer.size(args[0], dim)


def _stride(writer: GraphWriter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if dim is not None:
        return writer.stride(args[0], dim)
    return tuple(writer.stride(args[0], each) for each in range(args[0].ndim))


def _count(writer: GraphWriter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    total: int = 1
    for size in _sizes(writer, args[0]):
        total = total * size
    return total


def _told_length(writer: GraphWriter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """``len(x)`` in code whose ``len`` is Python's own, which gives plain numbers."""
    length = len(args[0])
    writer.guard(writer.size(args[0], 0), "==", length)
    return length


# Reads of sizes: a method or function, or the name of a property.
_SPECIAL: dict[Any, Callable[[GraphWriter, tuple[Any, ...], dict[str, Any]], Any]] = {
    "shape": lambda writer, args, kwargs: _sizes(writer, args[0]),
    Tensor.size: _size,
    Tensor.stride: _stride,
    Tensor.numel: _count,
    Tensor.nelement: _count,
    Tensor.__len__: _told_length,
    torch.numel: _count,
}


class _Rate(TracedFloat):
    """A dropout's probability, 0 in eval mode: what is done where it is above 0 is recorded all the same."""

    def __gt__(self, other: Any) -> bool:
        return True


def _attention_body(writer: GraphWriter, *args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward`` op by op instead of as one node.

    In train mode its dropout must come back: the probability becomes ``p * training``, which is 0 while recording.
    """
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    training = bound.arguments["training"]
    if isinstance(training, TracedFlag) and bound.arguments["dropout_p"] > 0.0:
        lazy = Lazy(writer, "call_function", operator.mul, (training, bound.arguments["dropout_p"]))
        bound.arguments.update(training=True, dropout_p=_Rate(0.0, lazy))
    return _multi_head_attention(*bound.args, **bound.kwargs)


_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


@lru_cache(maxsize=4096)
def _gives_a_value(func: Any) -> bool:
    """Does the op give Python a number that a tensor holds?"""
    return torch.Tag.data_dependent_output in func.tags and not any(
        "Tensor" in str(r.type) for r in func._schema.returns
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
