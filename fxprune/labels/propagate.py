"""Run a recorded graph on meta tensors with labels: abstract interpretation at the level of aten ops.

``Propagation`` is a ``TorchDispatchMode``: every aten op runs on meta tensors (integer constants stay real, so that
index values are known), then the op's rule in ``labels.rules`` says what the outputs' labels are and what must be
joined or locked. Facts that a later op reveals about an earlier one (whole heads, the layout of a grouped
convolution's weight, channels that must align) are kept in ``Facts``, and the run is repeated with them until none
is new.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from fxprune.errors import FxpruneError, ModelError
from fxprune.inputs import map_leaves, tensors_of
from fxprune.labels.classes import Classes, Ids, Reason, distinct_rows, same
from fxprune.labels.factors import Factor, Labels, narrow, vector
from fxprune.labels.unknown import result_without_values
from fxprune.labels.usage import Usage
from fxprune.meta import MetaKernels, OpMode, tensors_in
from fxprune.options import Attention as Attention  # noqa: PLC0414 - for those who read it here
from fxprune.randomness import draws
from fxprune.recording.guards import NUMBER, is_guard

_LABELS = "_fxprune_labels"
Watch = Callable[["Propagation", Any, Any, Any, Any], None]
_SHARED_FROM = 4096  # atoms
_NAME = "_fxprune_name"
_DEMANDS = "_fxprune_demands"


@dataclass(frozen=True)
class TensorLabels:
    """What is known of one tensor: its shape, dtype and labels."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    labels: Labels


@dataclass(frozen=True)
class Term:
    """MACs of one contraction: ``constant`` times the product of the sizes of ``factors``' cut dimensions."""

    node: str
    constant: float
    factors: Labels


@dataclass(frozen=True)
class Statistic:
    """The ``index``-th ``op`` of ``node``, which mixes channels of its input; ``labels`` are those it mixes."""

    node: str
    index: int
    op: str
    labels: Labels


@dataclass(frozen=True)
class Family:
    """Rows of atoms ``[rows, n]`` that must keep equal counts. ``node``: where; ``movable``: only moved there.

    ``factor``: whose rows they are, where that may change: joins can leave fewer rows, or none, by the end of the run.
    """

    rows: Ids
    node: str
    reason: Reason
    movable: bool = False
    factor: Factor | None = None


@dataclass(frozen=True)
class Interleaved:
    """A view in ``node`` lays the carrier rows of ``before`` side by side, position by position."""

    before: Factor
    node: str
    reason: Reason
    inside: bool


@dataclass
class Facts:
    """What earlier runs found out. ``layouts``: weight name -> groups. ``joins``: pairs of parameter atoms."""

    layouts: dict[str, int] = field(default_factory=dict)
    joins: list[tuple[Ids, Ids]] = field(default_factory=list)


@dataclass(frozen=True)
class Owner:
    """The dimension of a parameter or buffer that a range of atoms labels."""

    name: str
    dim: int
    first: int
    count: int


class Propagation(OpMode):
    """One run. Rules get this object and call its verbs: ``join``, ``lock``, ``fresh``, ``collapse`` ..."""

    def __init__(
        self,
        attention: Attention = "head_dim",
        facts: Facts | None = None,
        seeded: bool = False,
        ignore: Sequence[str] = (),
        watch: Watch | None = None,
        kernels: MetaKernels | None = None,
        may_fail: Set[str] | None = None,
        lone: npt.NDArray[np.bool_] | None = None,
    ):
        """``seeded``: parameters carry the channels of an earlier run; groups that shrank to one channel stay groups.

        ``ignore``: names of modules and parameters whose outputs stay. ``watch``: called after every aten op, when its
        outputs have their labels, with this run and the op, its arguments and what it returned. ``kernels``: of an
        earlier run of this graph. ``may_fail``: the only nodes that need not be interpretable; None: all.
        ``lone``: per channel of an earlier run, is it the only one left of its block?
        """
        super().__init__()
        from fxprune.labels.rules import apply_rule  # the table imports this module for its types

        self._apply_rule = apply_rule
        self.watch = watch
        self.may_fail = may_fail
        self._lone = lone
        self.failed: set[str] = set()  # nodes that could not be interpreted
        self.kernels = kernels or MetaKernels()
        self.attention = attention
        self.ignore = tuple(ignore)
        self.facts = facts or Facts()
        self.seeded = seeded
        self.classes = Classes()
        self.owners: list[Owner] = []
        self.node_labels: dict[str, Any] = {}
        self.terms: list[Term] = []
        self.statistics: list[Statistic] = []
        self.families: list[Family] = []
        self.interleaved: list[Interleaved] = []
        self.norm_scales: set[str] = set()
        self.consumed: set[tuple[str, int]] = set()
        self.usage = Usage(self)
        self.asked: set[int] = set()  # identities of the tensors whose labels the rule under way looked at
        self.new_layouts: dict[str, int] = {}
        self.fixed: list[Ids] = []
        self.rows_joined = False
        self._factors: dict[Any, Factor] = {}
        self.made = 0  # atoms from here on belong to no parameter and no input
        self.notes: list[str] = []
        self.node: fx.Node | None = None
        self._statistic_counts: dict[str, int] = {}
        self._scale = 1

    # -- where we are -------------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        return str(self.node.meta.get("source", "")) if self.node is not None else ""

    @property
    def node_name(self) -> str:
        return self.node.name if self.node is not None else ""

    def reason(self, text: str) -> Reason:
        return Reason(text, self.source)

    def enter(self, node: fx.Node) -> None:
        """What follows is ``node``'s doing, until ``leave``."""
        self.node, self._statistic_counts = node, {}

    def leave(self) -> None:
        self.node = None

    @contextmanager
    def at(self, node: fx.Node) -> Iterator[None]:
        self.enter(node)
        try:
            yield
        finally:
            self.leave()

    # -- labels of tensors --------------------------------------------------------------------------------------

    def labels(self, tensor: object) -> Labels:
        found: Labels = getattr(tensor, _LABELS, ()) if isinstance(tensor, Tensor) else ()
        if found:
            self.asked.add(id(tensor))
        return found

    def attach(self, tensor: Tensor, labels: Sequence[Factor]) -> None:
        """Give ``tensor`` its labels: canonical, compact, at most one factor per cut dimension."""
        filled = [self.canonical(f) for f in labels if f.ids.size]  # along a dimension of size 0 there are no channels
        alive = [f for f in filled if not self._rigid(f)]
        settled = tuple([self._shared(f) for f in self._settle(alive, tuple(tensor.shape))]) if alive else ()
        setattr(tensor, _LABELS, settled)
        for factor in settled:
            if len(factor.varying) > 1:
                self._record_rows(factor)

    def _shared(self, factor: Factor) -> Factor:
        """The same factor, once in memory however many tensors carry it: the rows of a grouped weight are millions."""
        if factor.ids.size < _SHARED_FROM:
            return factor
        key = (factor.dim, factor.ids.shape, hash(factor.ids.tobytes()))
        known = self._factors.setdefault(key, factor)
        return known if same(known.ids, factor.ids) else factor

    def _rigid(self, factor: Factor) -> bool:
        """Sizes that the model makes itself and that met something fixed are no channels any more, but fixed too."""
        return self._is_made(factor) and self.all_locked(factor)

    def _is_made(self, factor: Factor) -> bool:
        """Does none of its atoms belong to a parameter or an input?"""
        return factor.ids.item(0) >= self.made and int(factor.ids.min()) >= self.made

    def canonical(self, factor: Factor) -> Factor:
        """Roots instead of atoms, compact, cut dimension along which they vary.

        A factor that is so already is given back itself: what tensors share is known by its identity later on.
        """
        state = self.classes.state
        if factor.roots_in is not state:
            roots = self.classes.find(factor.ids)
            factor = (factor if roots is factor.ids else Factor(roots, factor.dim)).settled()
            factor.roots_in = state
        return factor

    def _settle(self, factors: list[Factor], shape: tuple[int, ...]) -> Labels:
        kept: dict[int, Factor] = {}
        for factor in factors:
            if not factor.varying:
                if shape[factor.dim] > 1:
                    self.lock(factor.ids, "one channel fills a whole dimension")
                continue
            rival = kept.get(factor.dim)
            if rival is None:
                kept[factor.dim] = factor
            elif not same(rival.ids, factor.ids):
                outer, inner = (rival, factor) if self.all_locked(rival) else (factor, rival)
                self.lock(outer.ids, "two kinds of channels meet in one dimension")
                kept[factor.dim] = inner
        return self._separate(kept, shape)

    def _separate(self, kept: dict[int, Factor], shape: tuple[int, ...]) -> Labels:
        """A dimension that one factor cuts and another is carried by: whole heads, groups of a weight, or a lock."""
        if len(kept) < 2:
            return tuple(kept.values())
        changed = False
        for factor in list(kept.values()):
            for other in list(kept.values()):
                if other is factor or factor.dim not in other.carriers or self.all_locked(factor):
                    continue
                if self.repeats(factor):  # a row goes with all its copies, and how many copies there are stays
                    self.lock(factor.ids, "copies of whole rows")
                    kept.pop(factor.dim, None)
                    continue
                runs = _runs(np.moveaxis(other.ids, factor.dim, 0))
                if runs and len(factor.varying) == 1:
                    self.family(factor.ids.reshape(runs, -1), "groups of a weight")
                elif self.attention == "heads":
                    self.join(factor.ids, other.ids)
                    self.rows_joined = changed = True
                else:
                    self.lock(factor.ids, "whole blocks of channels, where channels are pruned inside blocks")
        if changed:
            return self._settle([self.canonical(f) for f in kept.values()], shape)
        return tuple(kept[d] for d in sorted(kept))

    def _record_rows(self, factor: Factor) -> None:
        rows, _ = distinct_rows(factor.rows())
        if len(rows) > 1 and not self.classes.locked(rows).all():
            reason = self.reason("blocks of equal size")
            self.families.append(Family(rows, self.node_name, reason, is_movement(self.node), factor))

    # -- verbs of the rules -------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Ids:
        return self.classes.allocate(count)

    def join(self, a: Ids, b: Ids) -> None:
        self.classes.join(a, b)

    def lock(self, ids: Ids, text: str) -> None:
        self.classes.lock(ids, self.reason(text))

    def fix(self, ids: Ids, text: str) -> None:
        """These sizes are no channels at all: kernel sizes. Locked, and left out of every list."""
        self.lock(ids, text)
        self.fixed.append(ids.reshape(-1))

    def lock_all(self, labels: Sequence[Factor], text: str) -> None:
        for factor in labels:
            self.lock(factor.ids, text)

    def lock_if_used(self, tensor: Tensor, ids: Ids, text: str) -> None:
        """These channels must stay if anything reads ``tensor``, an output that is seldom read."""
        setattr(tensor, _DEMANDS, (ids, self.reason(text)))

    def used(self, tensor: Tensor) -> None:
        """Something reads ``tensor``."""
        ids, reason = getattr(tensor, _DEMANDS, (None, None))
        if ids is not None and reason is not None:
            self.classes.lock(ids, reason)

    def all_locked(self, factor: Factor) -> bool:
        return bool(self.classes.locked(factor.ids).all())

    def are_lone(self, factor: Factor) -> bool:
        """Blocks of one channel each: along a dimension of size 1, though they seem to lie along that of the blocks."""
        lone, ids = self._lone, factor.ids
        return lone is not None and int(ids.max()) < len(lone) and bool(lone[ids].all())

    def repeats(self, factor: Factor) -> bool:
        """Copies that the model makes of every row, ``[rows, copies]`` in one dimension: no row is any copy's own."""
        return self._is_made(factor) and len(np.unique(factor.ids)) < factor.ids.size

    def approximate(self, ids: Ids, text: str) -> None:
        self.classes.approximate(ids, self.reason(text))

    def family(self, rows: Ids, text: str) -> None:
        if len(rows) > 1:
            self.families.append(Family(distinct_rows(rows)[0], self.node_name, self.reason(text)))

    def statistic(self, op: str, labels: Labels) -> None:
        """Note an op that mixes channels, for the mask oracle. Called by a rule exactly once per op of its kind."""
        index = self._statistic_counts.get(op, 0)
        self._statistic_counts[op] = index + 1
        if labels:
            self.statistics.append(Statistic(self.node_name, index, op, labels))

    def note_norm_scale(self, scale: Tensor | None) -> None:
        """``scale`` multiplies normalised channels: criteria on norm layers read it."""
        if scale is not None and hasattr(scale, _NAME):
            self.norm_scales.add(getattr(scale, _NAME))

    @contextmanager
    def scaled(self, factor: int) -> Iterator[None]:
        """Inside, the terms of contractions count ``factor`` times: kernel positions and pixels of a convolution."""
        before, self._scale = self._scale, self._scale * factor
        try:
            yield
        finally:
            self._scale = before

    def term(self, constant: float, factors: Labels) -> None:
        """MACs of a contraction: ``constant`` times the sizes the ``factors`` cut."""
        self.terms.append(Term(self.node_name, constant * self._scale, factors))

    def uncounted(self, tensors: Sequence[Tensor], what: str) -> None:
        """Say which parameters among ``tensors`` take part in work that nobody counts."""
        for tensor in tensors:
            name = getattr(tensor, _NAME, None) or getattr(tensor._base, _NAME, None)
            if name is not None and tensor.ndim > 1:
                count = (tensor if tensor._base is None else tensor._base).numel()
                note = f"not counted: {count} parameters of {name} in {what} ({self.source})"
                if note not in self.notes:
                    self.notes.append(note)

    def request_layout(self, ids: Ids, groups: int) -> bool:
        """Ask for the weight that owns ``ids`` along dim 1 to be labelled per group in the next run."""
        atom = int(ids.min())
        owner = next((o for o in self.owners if o.first <= atom < o.first + o.count), None)
        if owner is None or owner.dim != 1 or self.facts.layouts.get(owner.name) == groups:
            return False
        self.new_layouts[owner.name] = groups
        return True

    def is_parameter(self, tensor: Tensor) -> bool:
        """Is this a parameter or buffer, or a view of one?"""
        return hasattr(tensor, _NAME) or hasattr(tensor._base, _NAME)

    def known(self, node: fx.Node) -> list[TensorLabels]:
        """The tensors that an earlier node made."""
        return labels_in(self.node_labels.get(node.name))

    def name_of(self, tensor: Tensor) -> str | None:
        """Of the parameter or buffer that this is, itself."""
        return getattr(tensor, _NAME, None)

    def parameter_dims(self, tensor: Tensor) -> tuple[str, tuple[int, ...]] | None:
        """The name of the parameter or buffer that this is, itself or transposed, and its dims in this order."""
        name, straight = getattr(tensor, _NAME, None), tuple(range(tensor.ndim))
        if name is not None:
            return name, straight
        owner = tensor._base
        if owner is None or not hasattr(owner, _NAME) or owner.ndim != tensor.ndim:
            return None
        order = straight if tensor.stride() == owner.stride() and tensor.shape == owner.shape else straight[::-1]
        return getattr(owner, _NAME), order

    def collapse(self, factor: Factor, dims: Sequence[int]) -> Factor:
        """Join along ``dims``: positions that differ only there become one channel."""
        ids = factor.ids
        for d in dims:
            if ids.shape[d] > 1:
                first = narrow(ids, d, 0, 1)
                self.join(ids, first)
                ids = first
        return self.canonical(factor if ids is factor.ids else Factor(ids, factor.dim))

    def mix(self, factor: Factor, dims: Sequence[int], text: str, *, ordered: bool = False) -> Factor | None:
        """An op that combines positions along ``dims``: carriers there are joined, a cut there is locked.

        Unless ``ordered``, a factor that also varies elsewhere is cut there (sub-pixels of a channel, say).
        """
        if not any(factor.ids.shape[d] > 1 for d in dims):
            return factor
        if all(d in dims for d in factor.varying) or (ordered and factor.dim in dims):
            self.lock(factor.ids, text)
            return None
        return self.collapse(factor, dims)

    def interleave(self, before: Factor) -> None:
        """See ``Interleaved``."""
        reason = self.reason("channels of several blocks are interleaved")
        self.interleaved.append(Interleaved(before, self.node_name, reason, not is_movement(self.node)))

    # -- running ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = args
        if torch.Tag.inplace_view in func.tags:  # the rule must see the shape before the op
            before = torch.empty_like(args[0], device="meta")
            setattr(before, _LABELS, self.labels(args[0]))
            given = (before, *args[1:])
        out = _execute(self.kernels, func, args, kwargs, self.node)
        self._apply_rule(self, func, given, kwargs, out)
        if self.watch is not None:
            self.watch(self, func, given, kwargs, out)
        return out


def is_movement(node: fx.Node | None) -> bool:
    """Does the node only move positions about? (Set by the rules' table of names.)"""
    return node is not None and node.op in ("call_method", "call_function") and _base_name(node) in MOVEMENT_NAMES


MOVEMENT_NAMES = frozenset(
    [
        "view",
        "reshape",
        "permute",
        "transpose",
        "flatten",
        "unflatten",
        "contiguous",
        "unsqueeze",
        "squeeze",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "t",
        "T",
        "mT",
        "clone",
        "channel_shuffle",
        "view_as",
        "reshape_as",
    ]
)


def _base_name(node: fx.Node) -> str:
    target: Any = node.target
    if target is getattr and len(node.args) > 1:
        return str(node.args[1])
    return target if isinstance(target, str) else str(getattr(target, "__name__", target)).split(".")[0]


def _runs(ids: Ids) -> int:
    """The number of equal runs of identical rows along dim 0, if runs are longer than 1, else 0."""
    flat = ids.reshape(len(ids), -1)
    new = np.concatenate([[True], (flat[1:] != flat[:-1]).any(1)])
    starts = np.flatnonzero(new)
    length, rest = divmod(len(ids), len(starts))
    if rest or length == 1 or not np.array_equal(starts, np.arange(len(starts)) * length):
        return 0
    return len(starts)


def _execute(kernels: MetaKernels, func: Any, args: Any, kwargs: dict[str, Any], node: fx.Node | None) -> Any:
    """Run on meta where any operand is meta; integer constants made by factories are real, float ones meta."""
    tensors = tensors_in((*args, *kwargs.values()))
    are_meta = [t.is_meta for t in tensors]
    on_meta = any(are_meta)
    if "device" in kwargs or not tensors or func.overloadpacket in _FACTORIES:
        if any(a.name == "device" for a in func._schema.arguments):
            dtype = kwargs.get("dtype") or _factory_dtype(func, args, tensors)
            meta = on_meta if func.overloadpacket is torch.ops.aten._to_copy else dtype.is_floating_point
            meta |= draws(func, args, kwargs)  # no number that is drawn is known
            kwargs["device"] = torch.device("meta" if meta or dtype.is_complex else "cpu")
            kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)
    if on_meta and not all(are_meta):
        args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
    if not on_meta:
        return func(*args, **kwargs)
    if _UNKNOWN_SIZE.isdisjoint(func.tags):
        return kernels(func, args, kwargs)
    try:
        return kernels(func, args, kwargs)
    except (NotImplementedError, RuntimeError):
        known = result_without_values(node, func, args, kwargs)
        if known is None:
            raise
        return known


_UNKNOWN_SIZE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


_FACTORIES = {
    getattr(torch.ops.aten, n) for n in ("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")
}


def _factory_dtype(func: Any, args: Any, tensors: list[Tensor]) -> torch.dtype:
    if tensors:
        return tensors[0].dtype
    name = func.overloadpacket.__name__
    if name in ("arange", "full", "scalar_tensor", "range", "linspace"):
        numbers = [a for a in tree_flatten(args)[0] if isinstance(a, (int, float, bool))]
        values = numbers if name == "arange" else numbers[-1:]
        if name != "linspace" and all(isinstance(v, int) for v in values):
            return torch.bool if isinstance(values[-1], bool) else torch.int64
    if name in ("tril_indices", "triu_indices", "randint", "randperm"):
        return torch.int64
    return torch.get_default_dtype()


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


class _Runner:
    """``fx.Interpreter`` without what it offers for other uses. A value is freed after its last use, as there."""

    def __init__(self, modules: nn.Module, graph: fx.Graph, run: Propagation):
        self.module, self.graph, self.propagation = modules, graph, run
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
        if run.ignore:
            self._lock_by_name(n, [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)])
        one = isinstance(result, Tensor)
        run.node_labels[n.name] = describe(run, result) if one else tree_map(lambda t: describe(run, t), result)
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

    def _lock_by_name(self, n: fx.Node, results: list[Tensor]) -> None:
        run = self.propagation
        owners = [n] if n.op == "call_module" else [m for m in n.all_input_nodes if m.op == "get_attr"]
        own = [str(m.target) for m in owners]
        if n.op == "call_module":
            layer = self.module.get_submodule(str(n.target))
            own += [f"{n.target}.{name}" for name, _ in layer.named_parameters()]
        with run.at(n):
            if any(name == i or name.startswith(i + ".") for name in own for i in run.ignore):
                for tensor in results:
                    run.lock_all(run.labels(tensor), "ignored by the caller")

    def _locked_result(self, n: fx.Node, error: Exception) -> Any:
        shape, run = n.meta.get("shape"), self.propagation
        if shape is None or (run.may_fail is not None and n.name not in run.may_fail):
            if run.may_fail is None and not isinstance(error, ModelError):
                raise ModelError(
                    f"{n.meta.get('source') or 'the model'}: {getattr(n.target, '__name__', n.target)} gives no single "
                    f"tensor and cannot be interpreted ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
                    "Prune a part of the model without it: fxprune.prune_submodule."
                ) from error
            raise error
        run.failed.add(n.name)
        name = getattr(n.target, "__name__", n.target)
        what = f"{name} cannot be interpreted: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        args, kwargs = self._arguments(n)
        reached = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if n.op == "call_module":
            reached += self.module.get_submodule(str(n.target)).parameters()
        for tensor in reached:
            run.lock_all(run.labels(tensor), what)
        run.uncounted(reached, str(name))
        run.notes.append(f"{what}; what reaches it is locked ({n.meta.get('source', '')})")
        return torch.empty(shape, dtype=n.meta.get("dtype", torch.float32), device="meta")


def labels_in(value: Any) -> list[TensorLabels]:
    """What is known of the tensors in a node's value."""
    if isinstance(value, TensorLabels):
        return [value]
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, TensorLabels)]


def describe(run: Propagation, value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorLabels(tuple(value.shape), value.dtype, run.labels(value))
    return value


def propagate(shadow: nn.Module, graph: fx.Graph, inputs: Sequence[Any], run: Propagation, input_lock: str) -> None:
    """Run ``graph`` (parameters already on meta and labelled) on ``inputs``, one value per placeholder.

    Args:
        shadow: the graph's modules; float parameters and buffers are labelled meta tensors.
        graph: that was recorded.
        inputs: one value per placeholder, in order.
        run: the propagation that collects what is found.
        input_lock: the reason given for the dimensions of network inputs.
    """
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    outputs = next(n for n in graph.nodes if n.op == "output")
    values = [
        map_leaves(lambda v: torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v, v) for v in inputs
    ]
    for node, value in zip(placeholders, values, strict=True):
        with run.at(node):
            for tensor in tensors_of(value):
                if tensor.ndim > 1 and tensor.shape[1] > 1:
                    ids = run.fresh(tensor.shape[1])
                    run.usage.add_input(ids)
                    run.lock(ids, input_lock)
                    setattr(tensor, _LABELS, (Factor(vector(ids, 1, tensor.ndim), 1),))
    run.made = len(run.classes)
    with torch.no_grad(), run:
        result = _Runner(shadow, graph, run).run(values)
    with run.at(outputs):
        for tensor in tensors_of(result):
            run.used(tensor)
            run.lock_all(run.labels(tensor), "network output")


def label_parameter(run: Propagation, name: str, tensor: Tensor) -> None:
    """Fresh atoms for every dimension of size > 1. A grouped weight's dim 1 gets atoms of its own in every group."""
    factors: list[Factor] = []
    for d, size in enumerate(tensor.shape):
        if size == 1:
            continue
        groups = run.facts.layouts.get(name, 1) if d == 1 else 1
        ids = run.fresh(groups * size)
        run.owners.append(Owner(name, d, int(ids[0]), len(ids)))
        if groups == 1:
            factors.append(Factor(vector(ids, d, tensor.ndim), d))
        else:
            rows = ids.reshape(groups, size).repeat(tensor.shape[0] // groups, 0)
            factors.append(Factor(rows.reshape(rows.shape + (1,) * (tensor.ndim - 2)), d))
    set_labels(tensor, name, tuple(factors))
    run.usage.add(tensor)


def set_labels(tensor: Tensor, name: str, labels: Labels) -> None:
    """Attach the labels of the parameter or buffer ``name`` as they are."""
    setattr(tensor, _NAME, name)
    setattr(tensor, _LABELS, labels)
