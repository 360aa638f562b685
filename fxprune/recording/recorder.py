"""Tracing by running: the hooks that see one run of the model.

A ``TorchFunctionMode`` sees every torch function and tensor method as the user wrote it; ``nn.Module.__call__`` is
intercepted for leaf modules; a ``TorchDispatchMode`` below sees the aten ops of calls that no torch function
announced (scripted functions, C++ ops). Ops that run inside a recorded call belong to that call.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxprune.errors import RecordError
from fxprune.ops.table import find_call, load
from fxprune.recording import boundary, patches, state, structure, together, trees
from fxprune.recording.arrays import BOUND, FOLLOWED, has_arrays, to_torch
from fxprune.recording.calls import Call, FunctionApply, property_name, setter_name, written_as
from fxprune.recording.constants import constants_in
from fxprune.recording.copies import Copier, forget, keep_to_this_process, leads_to_module
from fxprune.recording.decisions import LAYOUT, Decisions
from fxprune.recording.either import BRANCH
from fxprune.recording.leaf_functions import LeafFunction, form_of, intercepted_functions, is_plain
from fxprune.recording.leaves import is_leaf, is_only_torch
from fxprune.recording.modes import DispatchMode, FunctionMode, Unrecorded
from fxprune.recording.module import TrainingFlag, have_their_own_modes
from fxprune.recording.options import Options
from fxprune.recording.parts import Parts
from fxprune.recording.placing import Placing
from fxprune.recording.randomness import drawn, draws
from fxprune.recording.rehearsal import Rehearsal
from fxprune.recording.sources import caller_is_user_code, caller_makes_weights, current_source, defined_at
from fxprune.recording.special import SPECIAL, attention_body
from fxprune.recording.traced import plain
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
_SEEDS = [(torch, "manual_seed"), (torch.random, "manual_seed"), (torch, "seed"), (torch, "set_rng_state"),
          (torch.random, "set_rng_state")]  # fmt: skip
# What a graph cannot follow, as it is no part of any value.
_ASKED = {"requires_grad": "whether a tensor requires a gradient", "is_contiguous": LAYOUT}
# Calls that change how autograd treats a tensor, or a mode of torch, and compute nothing.
_NO_OPS = {"requires_grad_", "retain_grad", "register_hook", "_set_grad_enabled", "set_grad_enabled"}


class Recorder:
    """One run of ``model``, written down by ``writer``."""

    def __init__(self, model: nn.Module, parts: Parts, options: Options, private: bool = False,
                 rehearse: bool = False, gradients: bool = False,
                 widths: Mapping[torch.dtype, torch.dtype] = MappingProxyType({})) -> None:  # fmt: skip
        """``parts``: of the caller's ``model``, a copy of which is run. ``private``: its parameters are copied too.

        ``widths``: dtypes of floats that have other ones in this run.
        """
        self.memory = state.Memory(parts, private, gradients)
        self.rehearsal = Rehearsal(self.memory, narrow=bool(widths)) if rehearse else None
        load("aten")  # before anything is patched
        if self.rehearsal is not None:
            self.rehearsal.expect(parts)
        self._widths, stand_in = widths, (self.rehearsal or self.memory).stand_in
        copier = Copier(lambda tensor: self._of_width(stand_in(tensor)))
        self.model = copier(model)
        self._copies = copier
        self.parts = Parts.of(self.model)
        keep_to_this_process(self.parts.modules.values())
        self.options = options
        self.foreign_randomness = self.draws = self.writes = self.gradients = False
        self.draws_seeded = self._is_seeded = False
        self.writer = GraphWriter(self.parts, options.own_hashes, copier.original)
        self.writer.call = 0 if together.is_together(model) else None
        for name, tensor in parts.tensors.items():
            self.writer.tensors.name(tensor, name)
        self._value_read = False
        self._in_leaf_function = False
        self.fused = False  # would another kernel have run without gradients?
        self._written_tensors: set[int] = set()
        self._function_mode = FunctionMode(self.seen_function)
        self._unrecorded = Unrecorded(self._function_mode)
        self._placing = Placing(self.writer, self.parts, _begin_of(self.model))
        self._decisions = Decisions(self.writer, self._unrecorded, options)
        self._module_names = {id(module): name for name, module in self.parts.modules.items()}

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self, bound: inspect.BoundArguments) -> Any:
        """Run the copy on copies of the example inputs, write the graph, and return the output."""
        if self._widths:
            own = structure.map_tensors(self._of_width, dict(bound.arguments))
            bound = inspect.BoundArguments(bound.signature, OrderedDict(own))
        namespaces = patches.defining_namespaces(self.parts.modules.values())
        with patches.exclusively(), self._surroundings(), ExitStack() as hooks:
            if self.options.traced_builtins:
                hooks.enter_context(constants_in(namespaces))  # first, while Python modules hold what they always do
                self._copies.hold_constants()
            hooks.enter_context(torch.enable_grad())
            hooks.enter_context(patches.answered({patches.FAST_PATH: self._refuse_fast_path}, self._unrecorded.is_here))
            if self.options.exporting:
                answers = dict.fromkeys(_EXPORTING, lambda: True)
                hooks.enter_context(patches.answered(answers, self._unrecorded.is_asked_by_the_model))
            hooks.enter_context(patches.watched(_SEEDS, self._seeded))
            hooks.enter_context(patches.watched([(torch, "is_grad_enabled")], self._asked_for_grad))
            hooks.enter_context(patches.intercepted_modules(self.seen_module))
            hooks.enter_context(patches.intercepted_apply(namespaces, self.seen_apply))
            attributes = [*namespaces, *map(vars, self.parts.modules.values())]
            hooks.enter_context(intercepted_functions(self.options.leaf_functions, attributes, self.seen_leaf_function))
            if self.options.inlined_scripts:
                asked = self._unrecorded.is_asked_by_the_model
                hooks.enter_context(patches.inlined_scripts(lambda: not self._unrecorded.now(), asked))
            hooks.enter_context(patches.intercepted_operators(self._function_mode))
            hooks.enter_context(patches.intercepted_autocast(self.entered_autocast, self.left_autocast))
            if self.options.traced_builtins:
                hooks.enter_context(patches.size_preserving_builtins(namespaces, self._decisions.builtins()))
            hooks.enter_context(patches.seen_numpy(namespaces, FOLLOWED if self.options.traced_numpy else BOUND))
            hooks.enter_context(self._function_mode)
            with self._unrecorded:
                self._put_in_eval_mode()
                args, kwargs = self._placing.place_inputs(bound)
                self._written_tensors.clear()
                if self.rehearsal is not None:
                    self.rehearsal.begin()
            output = self.model(*args, **kwargs)
            with self._unrecorded:
                self.writes = self.memory.was_written or bool(self.writer.tensors.written_for_good())
                self._placing.place_output(output)
        self.writer.finish()
        return output

    def _of_width(self, tensor: Tensor) -> Tensor:
        other = self._widths.get(tensor.dtype)
        if other is None:
            return tensor
        result = tensor.detach().to(other)
        return nn.Parameter(result, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else result

    def run_unrecorded(self, bound: inspect.BoundArguments) -> Any:
        """The model's own output in eval mode, without a graph."""
        with self._surroundings(), torch.no_grad(), self._unrecorded:
            self.model.eval()
            fresh = boundary.with_fresh_tensors(dict(bound.arguments))
            inputs = inspect.BoundArguments(bound.signature, OrderedDict(fresh))
            return self.model(*inputs.args, **inputs.kwargs)

    def constants(self) -> dict[str, Tensor]:
        """The tensors that the run did not compute, by the name of their buffer: the caller's own, not their copies.

        One that a gradient of the caller's runs through is taken out of that.
        """
        found = {name: self._copies.original(tensor) for name, tensor in self.writer.constants.items()}
        return {name: tensor if tensor.grad_fn is None else tensor.detach() for name, tensor in found.items()}

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
                stack.enter_context(DispatchMode(self.seen_op))
                yield
        finally:
            states.restore()
            self.foreign_randomness = states.foreign

    def _seeded(self) -> None:
        if self._unrecorded.is_here() and not self._unrecorded.now():
            self._needs_data()
            self._is_seeded = True

    def _refuse_fast_path(self) -> bool:
        self.fused = True
        return False

    def _asked_for_grad(self) -> None:
        if self._unrecorded.is_asked_by_the_model() and not self._unrecorded.now():
            self.writer.note("forward asks whether gradients are computed; recorded as it goes where they are")

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
                module.__dict__["training"] = self.writer.flag(
                    name, name in self.options.training, self._branched_on_flag
                )

    def _branched_on_flag(self) -> None:
        if caller_is_user_code() or caller_makes_weights():
            self.writer.note(BRANCH)

    # --- the hooks ----------------------------------------------------------------------------------------------------

    def seen_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: TorchFunctionMode) -> Any:
        """A torch function or tensor method; ``mode`` is off while it is handled."""
        if self._unrecorded.now():
            return self._run(func)(*args, **kwargs)
        getter = property_name(func)
        if getter == "device":
            with self._unrecorded:
                return self.writer.device(args[0], self._run(func)(*args))
        if getter == "dtype" and type(args[0]) in (Tensor, nn.Parameter):
            with self._unrecorded:
                return self.writer.asked_dtype(args[0])
        if getter == "grad":
            self.gradients = True
            self.memory.take_gradient(args[0])
        asked = _ASKED.get(str(getter or getattr(func, "__name__", "")))
        if asked is not None and caller_is_user_code():
            self.writer.note(f"forward asks {asked}; recorded as it is for the example")
        special = SPECIAL.get(func) or SPECIAL.get(getter)
        if special is not None:
            with self._unrecorded:
                return special(self.writer, args, kwargs)
        if func is F.multi_head_attention_forward:
            with mode:
                return attention_body(self.writer, *args, **kwargs)
        if getattr(func, "__name__", "") in _NO_OPS:
            return func(*args, **kwargs)
        if setter_name(func) is not None:
            return self._assigned(setter_name(func), args[0], args[1])
        name = str(getattr(func, "__name__", ""))
        if has_arrays([*args, *kwargs.values()]):
            args, kwargs = to_torch(args), {key: to_torch(value) for key, value in kwargs.items()}
            if func is torch.tensor and isinstance(args[0], Tensor):
                func, kwargs = Tensor.to, {**kwargs, "copy": True}
        args = self._with_numbers(name, args)
        return self._record(lambda: written_as(func, args, kwargs), self._run(func), args, kwargs, name)

    def _with_numbers(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with numbers where tensors stand for numbers: bounds of slices, sizes among others.

        Listed places become the tensor that torch makes of them anyway, out of sight.
        """
        if name in ("__getitem__", "__setitem__"):
            index = args[1]
            parts = index if isinstance(index, tuple) else (index,)
            if any(map(_lists_places, parts)):
                parts = tuple(self._places(part, args[0]) if _lists_places(part) else part for part in parts)
                index = parts if isinstance(index, tuple) else parts[0]
                args = (args[0], index, *args[2:])
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

    def _places(self, listed: Any, indexed: Tensor) -> Tensor:
        with self._unrecorded:
            return torch.tensor(listed, device="cpu" if indexed.is_meta else indexed.device)

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
        with self._unrecorded:
            self._needs_data()
            if name == "data" and isinstance(tensor, nn.Parameter) and self.writer.tensors.is_own(tensor):
                self.writer.take_the_place(tensor, value)
                return
            before = tensor.detach()
            call = Call("call_function", setattr, (tensor, name, value), {})
            if name == "data":
                self.writer.tensors.mark_writes(self.writer.create(call), [before, value])
            setattr(tensor, str(name), value)

    def seen_module(
        self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A module that is called: a leaf becomes one node, any other runs on under its name."""
        if self._unrecorded.now():
            return call(module, *args, **kwargs)
        module = self._copies.modules.get(id(module), module)  # of the caller's own, reached by a closure
        name = self._module_names.get(id(module))
        if module is self.model and self.writer.call is not None and len(self.writer.path) == 1:
            self.writer.call += 1
        if isinstance(module, TrainingFlag) and name is not None and self.options.traced_flags:
            owner = name.rpartition(".")[0]
            return self.writer.flag(owner, owner in self.options.training, self._branched_on_flag)
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
        path = self._module_names.get(id(module))
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not self.writer.tensors.is_own(tensor, f"{path}.{key}" if path else key):
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

        Checkpointing is looked through, and what is given modules, or functions over some, which belong in the graph:
        gradients are those of its forward, as of checkpointing and reversible layers of the user's own.
        """
        if self._unrecorded.now():
            return patches.apply_function(cls, args)
        if cls is torch.utils.checkpoint.CheckpointFunction:
            return args[0](*args[2:])
        if any(leads_to_module(leaf) for leaf in structure.leaves_of(args)):
            self.writer.note(f"{cls.__name__} runs modules, so its own backward is not kept")
            outside, self.writer.in_autograd_function = self.writer.in_autograd_function, True
            try:
                return patches.apply_forward(cls, args)
            finally:
                self.writer.in_autograd_function = outside
        call = Call("call_function", FunctionApply(cls), args, {})

        def run(*args: Any) -> Any:
            with self._function_mode.paused.lifted():
                return patches.apply_function(cls, args)

        return self._record(lambda: call, run, args, {})

    def seen_leaf_function(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One of ``Options.leaf_functions``: a node, unless a weight or more than tensors and numbers goes into it."""
        given = trees.tensors(args, kwargs)
        if self._unrecorded.now() or not is_plain([args, kwargs]) or any(map(self.writer.tensors.is_own, given)):
            return NotImplemented
        self._needs_data()
        form, before = None, [(tensor, _version(tensor), tensor.detach().clone()) for tensor in given]

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal form
            self._in_leaf_function = True
            try:
                with self._function_mode.paused.lifted():
                    result = function(*args, **kwargs)
            finally:
                self._in_leaf_function = False
            if not trees.is_only_tensors(result):
                raise _NotTensorsError
            form = form_of(result)
            return result

        try:
            return self._record(
                lambda: Call("call_function", LeafFunction(name, function, form), args, kwargs), run, args, kwargs
            )
        except _NotTensorsError:
            with self._unrecorded, torch.no_grad():
                for tensor, version, values in before:
                    if _version(tensor) != version:  # what it wrote, it writes again
                        tensor.copy_(values)
                self._written_tensors.clear()
            return function(*args, **kwargs)

    def seen_op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An aten op, inside a recorded call or called where no torch function announced it."""
        if isinstance(func, torch._ops.HigherOrderOperator):
            raise RecordError(
                f"{current_source()}: torch's operator {func.name()} takes functions as arguments, which no graph "
                "holds. Write it in Python: a branch, a loop."
            )
        if _gives_a_value(func):
            self._value_read = True
        is_inner = self._unrecorded.now()
        if self._in_leaf_function and any(map(self.writer.tensors.is_own, trees.tensors(args, kwargs))):
            raise RecordError(f"{current_source()}: a function that reads weights is no leaf of a graph.")
        run = func if self.rehearsal is None else partial(self.rehearsal.op, func)
        if draws(func, args, kwargs):
            self.draws = True
            self.draws_seeded = self.draws_seeded or self._is_seeded
            if self.rehearsal is None or not any(t.is_meta for t in trees.tensors(*args, *kwargs.values())):
                # nobody's generator moves
                run = lambda *args, **kwargs: drawn(func, args, kwargs, 0)  # noqa: E731
        with self._unrecorded:
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
        if not self._unrecorded.now():
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
        with self._unrecorded:
            self._value_read = False
            before = [(tensor, _version(tensor)) for tensor in trees.tensors(*args, *kwargs.values())]
            result = run(*trees.map_tree(plain, args), **(trees.map_tree(plain, kwargs) if kwargs else {}))
            changed = [t for t, version in before if _version(t) != version or id(t) in self._written_tensors]
            self._written_tensors.clear()
            if not changed and not trees.has_tensors(result):
                return self._decisions.read(written(), result) if self._value_read or name in _READS else result
            return self.writer.write(written(), result, changed)


def _begin_of(model: nn.Module) -> str:
    """Where forward begins; of a graph that was recorded, where that of its model did."""
    nodes = model.graph.nodes if isinstance(model, torch.fx.GraphModule) else ()
    known = (str(node.meta.get("source", "")) for node in nodes if node.op == "output")
    return next(known, "") or defined_at(model.forward)


def _lists_places(index: Any) -> bool:
    """Numbers or booleans in a list, a range or an array, of which torch makes a tensor."""
    if isinstance(index, np.ndarray):
        return index.dtype.kind in "bi"
    if type(index) not in (list, range):
        return False
    kinds = {type(item) for item in index}
    return kinds in ({int}, {bool}) or (kinds == {list} and all(map(_lists_places, index)))


def _is_mixed(sequence: Sequence[Any]) -> bool:
    """Numbers, and tensors that stand for numbers."""
    kinds = [isinstance(item, Tensor) for item in sequence]
    return any(kinds) and any(isinstance(item, int) for item in sequence)


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


@lru_cache(maxsize=4096)
def _gives_a_value(func: Any) -> bool:
    """Does the op give Python a number that a tensor holds?"""
    return torch.Tag.data_dependent_output in func.tags and not any(
        "Tensor" in str(r.type) for r in func._schema.returns
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
