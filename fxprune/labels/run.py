"""Run a recorded graph on meta tensors with labels: abstract interpretation at the level of aten ops.

Every aten op runs on meta tensors (integer constants stay real, so that index values are known); what it does to the
labels, its record in the table of ops says (``labels.apply``).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_is_leaf, tree_map

from fxprune.errors import FxpruneError, ModelError, first_line
from fxprune.labels.apply import apply
from fxprune.labels.factors import Factor, vector
from fxprune.labels.propagation import Propagation, describe, set_labels
from fxprune.ops.meta import MetaKernels, OpMode, tensors_in, without_real
from fxprune.ops.table import argument, record_at, record_of
from fxprune.recording import named_tensors
from fxprune.recording.checks import is_within
from fxprune.recording.guards import NUMBER, is_guard
from fxprune.recording.inputs import map_tensors, tensors_of
from fxprune.recording.leaf_functions import ValuesNeededError
from fxprune.recording.randomness import draws

Watch = Callable[[Propagation, Any, Any, Any, Any], None]
"""Called after every aten op, when its outputs have their labels, with the propagation, the op, its arguments and what
it returned."""


@dataclass(frozen=True)
class Settings:
    """Of one run. ``ignore``: names of modules and parameters whose outputs stay. ``keep``: of those that stay whole.

    ``kernels``: of an earlier run. ``may_fail``: the only nodes that need not be interpretable; None: all.
    """

    ignore: Set[str] = frozenset()
    keep: Set[str] = frozenset()
    watch: Watch | None = None
    kernels: MetaKernels | None = None
    may_fail: Set[str] | None = None


class Labelling(OpMode):
    """Inside, ops run on meta, and what they make is labelled."""

    def __init__(self, run: Propagation, settings: Settings = Settings()):
        super().__init__()
        self._run, self._watch = run, settings.watch
        self._kernels = settings.kernels or MetaKernels()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, run = dict(kwargs or {}), self._run
        given = args
        if torch.Tag.inplace_view in func.tags:  # the rule must see the shape before the op
            before = torch.empty_like(args[0], device="meta")
            set_labels(before, run.labels(args[0]))
            given = (before, *args[1:])
        out = _execute(self._kernels, func, args, kwargs, run.node)
        apply(run, func, given, kwargs, out)
        if self._watch is not None:
            self._watch(run, func, given, kwargs, out)
        return out


def _execute(kernels: MetaKernels, func: Any, args: Any, kwargs: dict[str, Any], node: fx.Node | None) -> Any:
    """Run on meta where any operand is meta; integer constants made by factories are real, float ones meta."""
    tensors = tensors_in((*args, *kwargs.values()))
    are_meta = [t.is_meta for t in tensors]
    on_meta = any(are_meta)
    record = record_of(func)
    fills, sized = (False, False) if record is None else (record.fills, record.sizes is not None)
    if "device" in kwargs or not tensors or (fills and sized):
        if any(a.name == "device" for a in func._schema.arguments):
            return _made(func, args, kwargs, on_meta if tensors and not fills else None)
        return func(*args, **kwargs)
    if on_meta and not all(are_meta):
        args, kwargs = without_real(args, kwargs)
    if not on_meta:
        return func(*args, **kwargs)
    if record is None or record.without_values is None:
        return kernels(func, args, kwargs)
    try:
        return kernels(func, args, kwargs)
    except (NotImplementedError, RuntimeError):
        known = record.without_values(node, *args, **kwargs)
        if known is None:
            raise
        return known


def _made(func: Any, args: Any, kwargs: dict[str, Any], on_meta: bool | None) -> Any:
    """What an op makes where it is told: on meta, or real if it is of integers that nobody draws.

    ``on_meta``: of a copy, whether the original is there; else None.
    """
    kwargs.pop("pin_memory", None)
    made: Tensor = func(*args, **{**kwargs, "device": torch.device("meta")})
    unknown = made.is_floating_point() if on_meta is None else on_meta
    if unknown or made.is_complex() or draws(func, args, kwargs):  # no number that is drawn is known
        return made
    return func(*args, **{**kwargs, "device": torch.device("cpu")})


class _Runner:
    """``fx.Interpreter`` without what it offers for other uses. A value is freed after its last use, as there."""

    def __init__(self, modules: nn.Module, graph: fx.Graph, run: Propagation, settings: Settings):
        self.module, self.graph, self.propagation, self.settings = modules, graph, run, settings
        self._modules: dict[str, nn.Module] = {"": modules}
        self._values: dict[fx.Node, Any] = {}
        self._last_uses: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        seen: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            for used in node.all_input_nodes:
                if used not in seen:
                    seen.add(used)
                    self._last_uses[node].append(used)

    def run(self, inputs: Sequence[Any]) -> Any:
        """What the graph returns for ``inputs``, one value per placeholder."""
        self._values.update(zip((n for n in self.graph.nodes if n.op == "placeholder"), inputs, strict=True))
        for node in self.graph.nodes:
            self._values[node] = self.run_node(node)
            if node.op == "output":
                return self._values[node]
            for used in self._last_uses[node]:
                del self._values[used]
        return None

    def run_node(self, n: fx.Node) -> Any:
        run = self.propagation
        run.enter(n)
        try:
            result = self._result(n)
        except FxpruneError:
            raise
        except Exception as error:  # an op without a meta kernel: never a guess, so everything it sees is locked
            result = self._locked_result(n, error)
        finally:
            run.leave()
        self._attend(n)
        if self.settings.ignore:
            self._lock_by_name(n, [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)])
        run.node_labels[n.name] = _described(run, result)
        return result

    def _result(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return self._values[n]
        if is_guard(n):
            return None
        if NUMBER in n.meta:  # read from a tensor, of which only the recorded run knows it
            return n.meta[NUMBER]
        args, kwargs = self._arguments(n)
        target: Any = n.target
        if n.op == "output":
            return args[0]
        if n.op == "call_function":
            return target(*args, **kwargs)
        if n.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        owner, _, name = target.rpartition(".")
        held = getattr(self._module(owner), name)
        return held if n.op == "get_attr" else held(*args, **kwargs)

    def _module(self, path: str) -> nn.Module:
        """What ``get_submodule`` finds, looked up once: its path is shared by many."""
        if path not in self._modules:
            owner, _, name = path.rpartition(".")
            self._modules[path] = getattr(self._module(owner), name)
        return self._modules[path]

    def _arguments(self, n: fx.Node) -> Any:
        return fx.map_arg((n.args, n.kwargs), self._values.__getitem__)

    def _attend(self, n: fx.Node) -> None:
        record = record_at(n)
        if record is not None and record.attends is not None:
            tensors = [self._values[argument(n, place, name)] for place, name in record.attends]
            with self.propagation.at(n):
                self.propagation.attend(*tensors)

    def _lock_by_name(self, n: fx.Node, results: list[Tensor]) -> None:
        run = self.propagation
        owners = [n] if n.op == "call_module" else [m for m in n.all_input_nodes if m.op == "get_attr"]
        own = [str(m.target) for m in owners]
        if n.op != "call_module":  # where a weight is computed from parameters, not all its dims are what they make
            given = [t for m in n.all_input_nodes for t in tree_flatten(self._values[m])[0] if isinstance(t, Tensor)]
            own += [name for tensor in given for name in run.usage.sources(tensor) or ()]
            results = [tensor for tensor in results if run.usage.sources(tensor) is None]
        if n.op == "call_module":
            layer = self.module.get_submodule(str(n.target))
            own += [f"{n.target}.{name}" for name, _ in layer.named_parameters()]
        with run.at(n):
            if any(is_within(name, self.settings.ignore) for name in own):
                for tensor in results:
                    run.lock_all(run.labels(tensor), "ignored by the caller")

    def _locked_result(self, n: fx.Node, error: Exception) -> Any:
        like, run, may_fail = _recorded_result(n), self.propagation, self.settings.may_fail
        why = first_line(error).partition(". ")[0]
        if not isinstance(error, ValuesNeededError):
            why = f"{type(error).__name__}: {why}"
        if like is None or (may_fail is not None and n.name not in may_fail):
            if may_fail is None and not isinstance(error, ModelError):
                raise ModelError(
                    f"{n.meta.get('source') or 'the model'}: {getattr(n.target, '__name__', n.target)} gives no "
                    f"tensor and cannot be interpreted ({why}). "
                    "Prune a part of the model without it: fxprune.prune_submodule."
                ) from error
            raise error
        run.failed.add(n.name)
        name = getattr(n.target, "__name__", n.target)
        what = f"{name} cannot be interpreted: {why}"
        args, kwargs = self._arguments(n)
        reached = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if n.op == "call_module":
            reached += self.module.get_submodule(str(n.target)).parameters()
        for tensor in reached:
            run.lock_all(run.labels(tensor), what)
        run.uncounted(reached, str(name))
        run.notes.append(f"{what}; what reaches it is locked ({n.meta.get('source', '')})")
        return like


def _described(run: Propagation, value: Any) -> Any:
    """The labels of a tensor; of anything with tensors in it the same with labels in their place."""
    if isinstance(value, tuple):  # a named one may look at its parts
        return tuple(_described(run, part) for part in value)
    if tree_is_leaf(value):
        return describe(run, value)
    return tree_map(partial(_described, run), value, is_leaf=lambda part: isinstance(part, tuple))


def _recorded_result(n: fx.Node) -> Any:
    """Unlabelled tensors like those that the node gave when recorded, as far as they are read; None if it gave others.

    Of a sequence, what its parts were, the nodes know that take them.
    """
    if n.meta.get("shape") is not None:
        with _disable_current_modes():  # which would make integers real, as what a model makes of numbers that it knows
            return torch.empty(n.meta["shape"], dtype=n.meta.get("dtype", torch.float32), device="meta")
    if not n.users or any(user.target is not operator.getitem for user in n.users):
        return None
    parts: dict[Any, Any] = {user.args[1]: _recorded_result(user) for user in n.users}
    if any(part is None for part in parts.values()):
        return None
    if all(isinstance(key, int) for key in parts):
        return tuple(parts.get(key) for key in range(max(parts) + 1))
    return parts


def propagate(
    shadow: nn.Module,
    graph: fx.Graph,
    inputs: Sequence[Any],
    run: Propagation,
    input_lock: str,
    settings: Settings = Settings(),
) -> None:
    """Run ``graph`` (parameters already on meta and labelled) on ``inputs``, one value per placeholder.

    Args:
        shadow: the graph's modules; float parameters and buffers are labelled meta tensors.
        graph: that was recorded.
        inputs: one value per placeholder, in order.
        run: the propagation that collects what is found.
        input_lock: the reason given for the dimensions of network inputs.
        settings: of the run.
    """
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    outputs = next(n for n in graph.nodes if n.op == "output")
    values = [map_tensors(lambda tensor: torch.empty_like(tensor, device="meta"), v) for v in inputs]
    for node, value in zip(placeholders, values, strict=True):
        with run.at(node):
            for tensor in tensors_of(value):
                if tensor.ndim > 1 and tensor.shape[1] > 1:
                    ids = run.fresh(tensor.shape[1])
                    run.usage.add_input(ids)
                    run.lock(ids, input_lock)
                    set_labels(tensor, (Factor(vector(ids, 1, tensor.ndim), 1),))
    if settings.keep:
        for name, tensor in named_tensors(shadow).items():
            if is_within(name, settings.keep):
                run.lock_all(run.labels(tensor), "kept by keep=")
    run.made = len(run.classes)
    with torch.no_grad(), Labelling(run, settings):
        result = _Runner(shadow, graph, run, settings).run(values)
    with run.at(outputs):
        for tensor in tensors_of(result):
            run.used(tensor)
            run.lock_all(run.labels(tensor), "network output")
            if (chosen := run.chosen(tensor)) is not None:
                run.lock(chosen, "network output")
