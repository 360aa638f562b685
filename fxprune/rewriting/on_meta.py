"""A recorded graph without data: its sizes and numbers for inputs of any size, from the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.groups import ValueInterpreter, placeholder_values
from fxprune.ops.meta import MetaKernels, OpMode, tensors_in, without_real
from fxprune.recording import clone_modules, put_in_eval_mode, replace_tensors
from fxprune.recording.guards import NUMBER, holds, is_guard
from fxprune.recording.inputs import map_tensors, tensors_of
from fxprune.recording.randomness import drawn, draws
from fxprune.recording.shards import without_values

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MetaRun:
    """A run without data.

    ``numbers``: the values of nodes that hold no tensor, of a guard what it compares. ``sizes``: of the tensors of
    every node that ran. ``shapes``: of the outputs. ``failed``: the node that did not run, or None. ``is_fixed``: it
    gives one size only, that of the example, whatever it takes.
    """

    numbers: Mapping[str, Any]
    sizes: Mapping[str, Shapes]
    shapes: Shapes
    failed: fx.Node | None
    is_fixed: bool = False

    def of(self, node: fx.Node) -> Any:
        """The sizes or the number of a node, None if it did not run."""
        return self.sizes.get(node.name, self.numbers.get(node.name))


def is_equal(one: Any, other: Any) -> bool:
    """Of values that nodes give, which may be any objects. What cannot say counts as different from all but itself."""
    try:
        return one is other or bool(one == other)
    except Exception:
        return False


class _Fast(OpMode):
    """Ops on meta tensors take the fast way."""

    def __init__(self, kernels: MetaKernels) -> None:
        super().__init__()
        self._kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_meta = [t.is_meta for t in tensors_in((args, kwargs))]
        if draws(func, args, kwargs) and not any(on_meta):
            return drawn(func, args, kwargs, 0)  # real numbers, but nobody's generator moves
        if any(on_meta) and not all(on_meta):
            args, kwargs = without_real(args, kwargs)
        return self._kernels(func, args, kwargs)


class _Sized(ValueInterpreter):
    """Remembers the sizes and numbers of what ran."""

    def __init__(self, module: torch.nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.numbers: dict[str, Any] = {}
        self.sizes: dict[str, Shapes] = {}
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        if is_guard(n):
            compared = tuple(self.fetch_args_kwargs_from_env(n)[0][:3])
            if n.target is holds and not tensors_of(compared):
                self.numbers[n.name] = compared
            return None
        value = n.meta[NUMBER] if NUMBER in n.meta else super().run_node(n)
        tensors = tensors_of(value)
        if tensors:
            self.sizes[n.name] = _shapes(tensors)
        else:
            self.numbers[n.name] = value
        return value

    def is_fixed(self, node: fx.Node, so_far: MetaRun, example: MetaRun) -> bool:
        """Whether a node that failed gives what has the example's sizes for whatever it takes.

        So it is where one size of one input is another than the example's, and the node fails for all of the others
        here, or gives the same. They tell: what ops take is one size, that or 1, its multiples, or all up to it.
        """
        other = [n for n in node.all_input_nodes if not is_equal(so_far.of(n), example.of(n))]
        tensor = self.env[other[0]] if len(other) == 1 else None
        if not isinstance(tensor, Tensor):
            return False
        (shape,) = example.sizes[other[0].name]
        dims = [dim for dim, (a, b) in enumerate(zip(tensor.shape, shape, strict=False)) if a != b]
        if len(dims) != 1 or tensor.dim() != len(shape):
            return False
        size = shape[dims[0]]
        for another in {1, size - 1, size + 1, 2 * size} - {size}:
            self.env[other[0]] = tensor.new_empty([*shape[: dims[0]], another, *shape[dims[0] + 1 :]])
            try:
                value = super().run_node(node)
            except Exception:  # which is what this asks
                continue
            if _shapes(tensors_of(value)) != example.sizes.get(node.name):
                return False
        return True


class OnMeta:
    """A graph in eval mode, parameters and all on the meta device, to be run on inputs of any size."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._module = graph_module
        self._shadow = clone_modules(graph_module)
        put_in_eval_mode(self._shadow)
        replace_tensors(self._shadow, lambda t: t if t.is_meta else without_values(t))
        self._kernels = MetaKernels()

    def run(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], example: Callable[[], MetaRun] | None = None
    ) -> MetaRun:
        """A run on inputs of these shapes.

        ``example``: gives the run with the sizes that the graph was recorded with; without it no ``is_fixed`` is found.
        """
        run = _Sized(self._shadow, self._module.graph)
        values = placeholder_values(self._module, args, kwargs)
        values = [map_tensors(lambda tensor: tensor.to("meta"), v) for v in values]
        try:
            with torch.no_grad(), _Fast(self._kernels):
                result = run.run(*values)
        except Exception:  # bound to its example's batch size, or an op without a meta kernel: the caller compares
            so_far = MetaRun(run.numbers, run.sizes, (), run.current)
            if example is None or run.current is None:
                return so_far
            recorded = example()
            with torch.no_grad(), _Fast(self._kernels):
                return replace(so_far, is_fixed=run.is_fixed(run.current, so_far, recorded))
        return MetaRun(run.numbers, run.sizes, _shapes(tensors_of(result)), None)


def _shapes(tensors: Sequence[Tensor]) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in tensors)
