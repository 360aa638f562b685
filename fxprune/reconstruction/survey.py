"""One run of a graph to learn where parameters meet activations, and what becomes of the products."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.ops.meta import OpMode, tensors_in
from fxprune.ops.refit import Addition, Affine, Contraction, Product, Statistics
from fxprune.ops.table import op_name, record_of
from fxprune.reconstruction.entries import Entries, Numbers
from fxprune.reconstruction.lanes import Env, Lane, size_of
from fxprune.recording.shards import is_gathered, without_values

Place = tuple[str, int]
"""A node, and which of the contractions or norms inside it."""


@dataclass(frozen=True)
class Call:
    """One contraction with a parameter. ``numbers [g, K, O]``, ``vector [g, O]``: of entries.

    ``weight``: the argument that is the weight. ``whole``: what it computed is what the node returns, but for a view.
    """

    place: Place
    op: str
    weight: str
    rows: int
    numbers: Numbers
    vector: Tensor | None
    whole: bool = False

    @property
    def matrix(self) -> Tensor:
        """Numbers of entries, ``[g, K, O]``."""
        return self.numbers.tensor

    @property
    def outputs(self) -> int:
        """Of all groups together."""
        return self.numbers.shape[0] * self.numbers.shape[2]


@dataclass(frozen=True)
class Norm:
    """One norm with measured statistics. ``mean``, ``var``, ``scale``: numbers of their entries, ``[C]``.

    Its input may be ``[1, N * C, *]``, with the statistics once for every sample, as that of an instance norm is.
    """

    place: Place
    mean: Tensor
    var: Tensor
    scale: Tensor | None
    eps: float
    whole: bool = False


@dataclass
class Facts:
    """``ops``: of every node, by name. ``elsewhere``: name of a tensor -> an op that reads it and is no contraction.

    ``odd``: contractions that cannot be solved for: the op, and why. ``sizes``: position -> bytes alive there.
    ``writes``: whether any op writes to an activation. ``same``: nodes that return what they are given. ``adds``: nodes
    in which something is added. ``vectors``: names of tensors that scale or shift channels: biases, and what norms,
    multiplications and additions read as such. ``weights``: of every contraction of a node where its weight lies, if it
    has one.
    """

    calls: dict[Place, Call] = field(default_factory=dict)
    norms: dict[Place, Norm] = field(default_factory=dict)
    ops: dict[str, list[str]] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    odd: dict[Place, tuple[str, str]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    writes: bool = False
    same: set[str] = field(default_factory=set)
    adds: set[str] = field(default_factory=set)
    vectors: set[str] = field(default_factory=set)
    weights: dict[str, list[int | None]] = field(default_factory=lambda: defaultdict(list))


class _Survey(OpMode):
    def __init__(self, entries: Entries, facts: Facts):
        super().__init__()
        self._entries, self._facts = entries, facts
        self.node = ""
        self.counts = [0, 0]
        self.last: tuple[Place, Tensor] | None = None

    def enter(self, node: str) -> None:
        self.node, self.counts, self.last = node, [0, 0], None
        self._facts.ops[node] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, tensors_in((out,)))
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        entries, facts = self._entries, self._facts
        moved = entries.follow(func, args, kwargs, outputs)
        if moved or not outputs:
            return
        given = tensors_in((*args, *kwargs.values()))
        if not given:
            return
        facts.ops[self.node].append(op_name(func))
        if func._schema.is_mutable and not entries.holds(given[0]):
            facts.writes = True
        read: list[Tensor | None] = []
        known, arguments = refit_of(func), arguments_of(func, args, kwargs)
        if isinstance(known, Contraction):
            place = (self.node, self.counts[0])
            self.counts[0] += 1
            weights = [name for name in known.operands if entries.made(arguments[name])]
            facts.weights[self.node].append(arguments[weights[0]].data_ptr() if len(weights) == 1 else None)
            product = known.read(arguments, outputs[0], weights[0]) if len(weights) == 1 else None
            call = None if product is None else self._call(op_name(func), place, weights[0], product)
            if call is not None and product is not None:
                facts.calls[place], self.last = call, (place, outputs[0])
                read = [product.weight, product.bias if call.vector is not None else None]
            self._scales(None if product is None else product.bias)
        elif isinstance(known, Statistics):
            self._norm(known, arguments, outputs[0])
        elif isinstance(known, Addition):
            facts.adds.add(self.node)
        if isinstance(known, Statistics | Affine | Addition):
            self._scales(*(arguments.get(name) for name in known.vectors))
        taken = [id(t) for t in read if t is not None]
        for tensor in given:
            if id(tensor) not in taken and entries.holds(tensor):
                numbers = entries.of(tensor)
                for name in entries.names_of(numbers.reshape(-1)) if numbers is not None else ():
                    facts.elsewhere.setdefault(name, op_name(func))

    def _scales(self, *vectors: Any) -> None:
        """Note the parameters among these, which scale or shift channels."""
        for vector in vectors:
            numbers = self._entries.of(vector) if isinstance(vector, Tensor) else None
            if numbers is not None:
                self._facts.vectors.update(self._entries.names_of(numbers.reshape(-1)))

    def _call(self, op: str, place: Place, weight: str, product: Product) -> Call | None:
        numbers = self._entries.of(product.weight)
        if numbers is None:
            self._facts.odd[place] = op, "its weight is computed from parameters"
            return None
        vector = None
        if product.bias is not None:
            own = self._entries.of(product.bias)
            vector = None if own is None else product.vector(own)
            if vector is not None and own is not None and own.unique().numel() != vector.numel():
                vector = None  # it differs from row to row
        return Call(place, op, weight, product.rows, Numbers.of(product.matrix(numbers)), vector)

    def _norm(self, known: Statistics, a: dict[str, Any], out: Tensor) -> None:
        place = (self.node, self.counts[1])
        self.counts[1] += 1
        mean, var = a.get(known.mean), a.get(known.var)
        if mean is None or var is None or a.get(known.training):
            return
        numbers, scale = (self._entries.of(mean), self._entries.of(var)), a.get(known.scale)
        own = None if scale is None else self._entries.of(scale)
        if numbers[0] is not None and numbers[1] is not None and (scale is None or own is not None):
            found = (once(numbers[0]), once(numbers[1]), None if own is None else once(own))
            self._facts.norms[place] = Norm(place, *found, float(a[known.eps]))
            self.last = (place, out)


def survey(lane: Lane, env: Env) -> tuple[Facts, Env]:
    """Run the whole graph on ``env``; also returns the values at its end."""
    facts = Facts()
    mode = _Survey(Entries(lane.module), facts)

    def after(node: fx.Node, now: Env) -> None:
        facts.sizes.append(size_of(now))
        value = now[node]
        if not facts.ops[node.name] and any(now[i] is value for i in node.all_input_nodes if i in now):
            facts.same.add(node.name)
        if mode.last is not None and isinstance(value, Tensor) and _is_view(value, mode.last[1]):
            place = mode.last[0]
            table: Any = facts.calls if mode.counts[0] else facts.norms
            if sum(mode.counts) == 1 and place in table:
                table[place] = _as_whole(table[place])

    for place, node in enumerate(lane.nodes):
        mode.enter("")
        lane.prepare(node, mode)
        mode.enter(node.name)
        lane.advance(env, place, place + 1, mode, after)
    return facts, env


def _as_whole(found: Any) -> Any:
    return type(found)(**{**vars(found), "whole": True})


def _is_view(value: Tensor, out: Tensor) -> bool:
    if value is out:
        return True
    same = value.data_ptr() == out.data_ptr() and value.numel() == out.numel()
    return same and value.is_contiguous() and out.is_contiguous()


def once(numbers: Tensor) -> Tensor:
    """What ``numbers [n]`` repeat, all of them if they repeat nothing."""
    count = numbers.unique().numel()
    times = len(numbers) // count if count else 0
    return numbers[:count] if times > 1 and torch.equal(numbers[:count].repeat(times), numbers) else numbers


def by_channel(x: Tensor, count: int) -> Tensor:
    """``[1, N * C, *]`` as ``[N, C, *]``, ``C = count``; other inputs of a norm as they are."""
    return x if x.shape[1] == count else x.unflatten(1, (-1, count)).flatten(0, 1)


@dataclass(frozen=True)
class Seen:
    """A call of an op: the ``number``-th contraction (or norm) of a node, with its arguments by name."""

    number: int
    known: Any
    arguments: dict[str, Any]
    out: Tensor

    def product(self, weight: str) -> Product:
        """Of a contraction that the survey could read: the product with this argument."""
        product: Product | None = self.known.read(self.arguments, self.out, weight)
        assert product is not None, "the survey read it"
        return product

    @property
    def input(self) -> Tensor:
        """Of a norm."""
        given: Tensor = self.arguments[self.known.input]
        return given


class Observed(OpMode):
    """Keeps every contraction in ``calls`` and every norm in ``norms``, in their order.

    Of the weight of a contraction in ``known`` at ``node`` that was gathered, only the shape is kept.
    """

    def __init__(self, node: str = "", known: Mapping[Place, Call] | None = None) -> None:
        super().__init__()
        self.calls: list[Seen] = []
        self.norms: list[Seen] = []
        self._node, self._known = node, known or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        known = refit_of(func)
        if isinstance(known, (Contraction, Statistics)):
            kept, arguments = self.norms, arguments_of(func, args, kwargs)
            if isinstance(known, Contraction):
                kept, call = self.calls, self._known.get((self._node, len(self.calls)))
                if call is not None and is_gathered(arguments[call.weight]):
                    arguments[call.weight] = without_values(arguments[call.weight])
            kept.append(Seen(len(kept), known, arguments, tensors_in((out,))[0]))
        return out


def numbered(calls: list[Seen], weights: Sequence[int | None]) -> list[Seen | None]:
    """The contractions of a node by their numbers in the survey, which found ``weights``; None: not this time.

    A recurrent layer makes one for every step, so that on other lengths another one has the number. The first, second,
    ... with one weight is the first, second, ... with it then.
    """
    if len(calls) == len(weights):
        return [*calls]
    found: dict[int, list[Seen]] = {weight: [] for weight in weights if weight is not None}
    for seen in calls:
        operands = {seen.arguments[name].data_ptr() for name in seen.known.operands}
        for weight in operands & found.keys():
            found[weight].append(seen)
    return [found[weight].pop(0) if weight is not None and found[weight] else None for weight in weights]


def refit_of(func: Any) -> Any:
    """What the table of ops says that an op is for the refit."""
    record = record_of(func)
    return None if record is None else record.refit


def arguments_of(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by the names of the op's schema, with defaults."""
    schema = func._schema.arguments
    known = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**known, **{a.name: v for a, v in zip(schema, args, strict=False)}, **kwargs}
