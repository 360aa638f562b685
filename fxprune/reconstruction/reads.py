"""What criteria that know of the refit need: of every weight that reads channels its inputs' Gram matrix.

Channels that no weight reads meet other activations: of a query and a key channel the logits hold the outer product
``q_c k_c^T``, linear in either. With ``s`` the gradient of the outputs along random signs, ``u_ic = q_ic ds/dq_ic`` is
what it adds to them at token i, ``sum_j ds/dS_ij q_ic k_jc``, whatever scales, masks or rotates it on the way. The mean
of ``sum_i u_ic^2`` over signs is ``sum_ij (q_ic k_jc)^2``, every logit weighed by what the outputs make of it.

All of that is the first order: late layers are heard less than their slopes say, a softmax that has made up its mind
more. So whoever ranks by it can measure what some change of weights and channels really does to the outputs.

Which weights are refitted, and where their bias or the norm behind them follows, ``sites`` says as for the refit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxprune.errors import InputError
from fxprune.groups.channels import ChannelGraph
from fxprune.labels.records import TensorLabels
from fxprune.methods.state import Gate, Read, Trial
from fxprune.ops.refit import Product
from fxprune.reconstruction.data import Piece, on_item
from fxprune.reconstruction.entries import Counterparts, Entries
from fxprune.reconstruction.lanes import Env, Lane
from fxprune.reconstruction.sites import Site, distinct, sites_of
from fxprune.reconstruction.survey import Call, Facts, Observed, Place, survey
from fxprune.reconstruction.walk import floating, square
from fxprune.recording import evaluated
from fxprune.rewriting.slicing import Cuts
from fxprune.training.randomness import seeded

_ROWS_PER_INPUT = 16
_LEAST_ROWS = 4096
_TRIED = 32  # samples


def measure_reads(
    module: fx.GraphModule, graph: ChannelGraph, pieces: Sequence[Piece], seed: int = 0
) -> tuple[tuple[Read | Gate, ...], Trial]:
    """Run ``module``, of which only a copy should be given, over the data, and back along random directions.

    Returns:
        A ``Read`` for every weight that reads channels, and a ``Gate`` for every group with channels that no weight
        reads, if one tensor holds every one of them once; and what measures changes of them.

    Raises:
        InputError: it does not run on the data, or what a weight reads there is not finite.
    """
    lane = Lane(module)
    with evaluated(module):
        with on_item(pieces[0].item):
            facts, _ = survey(lane, lane.begin(pieces[0].args, pieces[0].kwargs))
        lane.forget()
        entries = Entries(module)
        sums: list[_Sums] = []
        for weight in _weights(lane, facts, entries, graph):
            channels = _channels(weight.matrix, entries, graph)
            if channels is not None:
                sums.append(_Sums(weight, channels, entries))
        at = {call.place: own.calls[call.place[0]] for own in sums for call in own.weight.calls}
        gates = _gates(lane, graph, [own.channels for own in sums])
        total = sum(piece.samples for piece in pieces)
        for index, piece in enumerate(pieces):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            with on_item(piece.item), seeded(seed), torch.enable_grad():
                _run(lane, piece, at, gates, piece.samples / total, generator)
    sums = [own for own in sums if not any(call.is_odd for call in own.calls.values())]
    reads = [own.result(total) for own in sums]
    if reads and not any(bool(read.sensitivity.any()) for read in reads):
        raise InputError(
            "obs compares channels by how the outputs change with them, and no output has a gradient of them: choose "
            "another method."
        )
    told = (gate.result(total) for gate in gates.values())
    return (*reads, *(gate for gate in told if gate is not None)), _Trials(lane, entries, pieces, sums, gates)


@dataclass(frozen=True)
class _Weight:
    """A weight, and the calls that multiply with it, of which each is all that its node does.

    ``matrix [g, K, O]``: its entries. ``group``: of every group of a call the one in ``matrix``. ``shift [g * O]``: the
    entries that follow the mean of its outputs, ``sign`` times. ``refitted``: the refit does not leave it alone.
    """

    calls: tuple[Call, ...]
    matrix: Tensor
    group: Tensor | None = None
    shift: Tensor | None = None
    sign: int = 1
    refitted: bool = False

    @property
    def node(self) -> str:
        """Of its first call."""
        return self.calls[0].place[0]


def _weights(lane: Lane, facts: Facts, entries: Entries, graph: ChannelGraph) -> Iterator[_Weight]:
    itself = Counterparts(entries, entries, Cuts.of(graph, graph.everything()))
    sites, _, left_alone = sites_of(lane, facts, lane, facts, entries, itself)
    known = [_of_site(site) for site in sites]
    for first, _ in left_alone:
        same = (call for call in facts.calls.values() if torch.equal(call.matrix, first.matrix))
        known.append(_Weight(tuple(call for call in same if call.whole), *distinct(first.numbers)))
    known = [weight for weight in known if weight.calls]
    yield from sorted(known, key=lambda weight: lane.position[lane.named[weight.node]])


def _of_site(site: Site) -> _Weight:
    shift, sign = site.vector, 1
    if shift is None and site.norm is not None:
        shift, sign = site.norm.mean, -1
    calls = tuple(call for call in site.calls if call.whole)
    return _Weight(calls, site.matrix, site.group, None if shift is None else shift.reshape(-1), sign, True)


def _run(
    lane: Lane,
    piece: Piece,
    at: dict[Place, _CallSums],
    gates: dict[str, _Energy],
    share: float,
    generator: torch.Generator,
) -> None:
    env = lane.begin(piece.args, piece.kwargs)
    lane.module.requires_grad_(False)  # gradients of activations are all that is asked for
    watched = {node: (number, own) for (node, number), own in at.items()}  # a call is all that its node does
    with ExitStack() as hooks:  # what a hook refers to may refer to its tensor, a circle that no collector sees
        for place, node in enumerate(lane.nodes):
            (number, own), gate = watched.get(node.name, (0, None)), gates.get(node.name)
            if own is None:
                lane.advance(env, place, place + 1)
                if gate is not None:
                    gate.watch(_differentiable(env, node))
                continue
            seen = Observed()
            lane.advance(env, place, place + 1, seen)
            (call,) = (c for c in seen.calls if c.number == number)
            product = call.product(own.argument)
            own.add(product, call.out, piece.samples, share, generator)
            value = _differentiable(env, node)
            if value is not None:
                hook = value.register_hook(own.gradients(product, tuple(call.out.shape), piece.samples))
                hooks.callback(hook.remove)
            if gate is not None:
                gate.watch(value)
        outputs = [t for t in floating(lane.output(env)) if t.requires_grad]
        if outputs:
            signs = [torch.randint(0, 2, t.shape, generator=generator).to(t) * 2 - 1 for t in outputs]
            torch.autograd.backward(outputs, signs)


def _differentiable(env: Env, node: fx.Node) -> Tensor | None:
    """What a node gave, with a gradient to come from here on, whether or not anything before it has one."""
    value = env.get(node)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if not value.requires_grad:
        value = env[node] = value.requires_grad_().clone()  # what comes later may write to it
    return value


class _Trials:
    """``fxprune.methods.state.Trial``, on a few samples."""

    def __init__(
        self,
        lane: Lane,
        entries: Entries,
        pieces: Sequence[Piece],
        sums: Sequence[_Sums],
        gates: Mapping[str, _Energy],
    ):
        self._lane, self._entries, self._gates = lane, entries, gates
        self._sums = {own.weight.node: own for own in sums}
        count = next((n for n, s in enumerate(accumulate(p.samples for p in pieces), 1) if s >= _TRIED), len(pieces))
        self._pieces = pieces[:count]
        self._samples = sum(piece.samples for piece in self._pieces)
        self._wanted: list[list[Tensor]] = []

    def __call__(self, weights: Mapping[str, Tensor], closed: Mapping[str, npt.NDArray[np.int64]]) -> float:
        self._wanted = self._wanted or self._outputs({})
        changes = [change for node, weight in weights.items() for change in self._sums[node].changes(weight)]
        before = [(numbers, self._entries.read(numbers)) for numbers, _ in changes]
        try:
            for numbers, by in changes:
                self._entries.write(numbers, self._entries.read(numbers).double() + by)
            found = self._outputs(closed)
        finally:
            for numbers, values in reversed(before):
                self._entries.write(numbers, values)
        pairs = [pair for both in zip(found, self._wanted, strict=True) for pair in zip(*both, strict=True)]
        if any(now.shape != wanted.shape for now, wanted in pairs):
            return 0.0  # of which shape they are depends on values
        error = sum(float(square(now, wanted)) for now, wanted in pairs) / self._samples
        return error if math.isfinite(error) else 0.0

    def _outputs(self, closed: Mapping[str, npt.NDArray[np.int64]]) -> list[list[Tensor]]:
        lane, found = self._lane, []
        lane.forget()

        def close(node: fx.Node, env: Env) -> None:
            if node.name in closed:
                env[node] = self._gates[node.name].without(closed[node.name], env[node])

        with evaluated(lane.module):
            for piece in self._pieces:
                with on_item(piece.item), seeded(0):
                    env = lane.begin(piece.args, piece.kwargs)
                    lane.advance(env, 0, len(lane.nodes), after=close)
                    found.append(floating(lane.output(env)))
        return found


class _Sums:
    """Of one weight. ``channels [g, K]``: of its inputs. ``calls``: node -> sums over that call."""

    def __init__(self, weight: _Weight, channels: npt.NDArray[np.int64], entries: Entries):
        self.weight, self.channels = weight, channels
        self._values = entries.read(weight.matrix.reshape(-1)).view(weight.matrix.shape).detach().clone()
        self.calls = {call.place[0]: _CallSums(call, weight, self._values) for call in weight.calls}
        self._mean = self._values.new_zeros(self._values.shape[:2], dtype=torch.float64)

    def result(self, samples: int) -> Read:
        """Of several calls each counts as much as the outputs depend on it.

        Raises:
            InputError: something is not finite.
        """
        calls = list(self.calls.values())
        if not all(call.is_finite for call in calls):
            raise InputError(
                f"What {self.weight.node} reads or what the outputs make of it is not finite on data=, so no error can "
                "be told. Look for inputs that are infinite or too large for the model's dtype."
            )
        found = [call.sensitivity / samples for call in calls]
        sensitivity = torch.stack(found).sum(0)
        shares = [float(own.mean()) / max(float(sensitivity.mean()), 1e-300) for own in found]
        if not any(shares):
            shares = [1 / len(calls)] * len(calls)
        gram = torch.stack([share * call.gram for share, call in zip(shares, calls, strict=True)]).sum(0)
        if self.weight.shift is not None:
            self._mean += torch.stack([share * call.mean for share, call in zip(shares, calls, strict=True)]).sum(0)
            gram = gram - self._mean.unsqueeze(2) * self._mean.unsqueeze(1)
        worth = sum(call.worth for call in calls)
        return Read(self.weight.node, self.channels, gram, self._values, sensitivity, worth, self.weight.refitted)

    def changes(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Entries ``[n]`` and what is added to them, ``[n]``, where the weight has these values ``[g, K, O]``."""
        change = values.double() - self._values.double()
        here = change.reshape(-1) != 0  # others may be entries of another weight that changes as well
        if not bool(here.any()):
            return
        yield self.weight.matrix.reshape(-1)[here.cpu()], change.reshape(-1)[here]
        if self.weight.shift is not None:
            yield self.weight.shift, -self.weight.sign * (self._mean.unsqueeze(1) @ change).reshape(-1)


class _CallSums:
    """Sums over samples, positions and groups that share a matrix. ``values [g, K, O]``: of the weight.

    ``argument``: the name of the one that is the weight. ``is_odd``: how many groups there are varies with the inputs.
    """

    def __init__(self, call: Call, weight: _Weight, values: Tensor):
        self.argument, self.is_odd = call.weight, False
        groups, inputs, outputs = values.shape

        def zeros(*shape: int) -> Tensor:
            return values.new_zeros(shape, dtype=torch.float64)

        self._group, self._share = weight.group, 1 / len(weight.calls)
        self._gram, self._inputs = zeros(groups, inputs, inputs), zeros(groups, inputs)
        self._alone, self._together = zeros(groups, outputs), zeros(groups, outputs)
        self._sum, self._square, self._of_means = (zeros(groups, outputs) for _ in range(3))
        self._rows, self._positions, self._samples = (zeros(groups, 1) for _ in range(3))

    def add(self, product: Product, out: Tensor, samples: int, share: float, generator: torch.Generator) -> None:
        inputs = self._gram.shape[1]
        wanted = math.ceil(max(_ROWS_PER_INPUT * inputs, _LEAST_ROWS) * share * self._share)
        rows = torch.randperm(product.rows, generator=generator)[:wanted].to(self._gram.device)
        x = product.inputs(rows).detach().double()
        y = _by_sample(product, out.detach(), samples)
        one = torch.ones_like(x[:, :1, 0])
        for total, values in (
            (self._rows, one * x.shape[1]),
            (self._gram, x.transpose(1, 2) @ x),
            (self._inputs, x.sum(1)),
            (self._samples, one * y.shape[1]),
            (self._positions, one * y.shape[1] * y.shape[2]),
            (self._sum, y.sum((1, 2))),
            (self._square, y.square().sum((1, 2))),
            (self._of_means, y.mean(2).square().sum(1)),
        ):
            self._pool(total, values)

    def gradients(self, product: Product, shape: tuple[int, ...], samples: int) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            found = _by_sample(product, gradient.reshape(shape), samples)
            self._pool(self._alone, found.square().sum((1, 2)))
            self._pool(self._together, found.sum(2).square().sum(1))

        return note

    def _pool(self, total: Tensor, values: Tensor) -> None:
        """Add ``[groups of a call, ...]`` to ``[groups of the weight, ...]``."""
        if len(total) == 1:
            total += values.sum(0, keepdim=True)
        elif self._group is None:
            total += values
        elif len(self._group) == len(values):
            total.index_add_(0, self._group.to(total.device), values)
        else:
            self.is_odd = True

    @property
    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in (self._gram, self._square, self._alone, self._together))

    @property
    def gram(self) -> Tensor:
        """Of the inputs, the mean over rows."""
        return self._gram / self._rows.clamp_min(1).unsqueeze(2)

    @property
    def mean(self) -> Tensor:
        """Of the inputs."""
        return self._inputs / self._rows.clamp_min(1)

    @property
    def sensitivity(self) -> Tensor:
        """Summed over samples."""
        return (1 - self._even) * self._alone + self._even * self._together

    @property
    def worth(self) -> float:
        """Independent positions."""
        together = 1 + (float((self._positions / self._samples.clamp_min(1)).mean()) - 1) * float(self._even.mean())
        return float(self._positions.mean()) / together

    @property
    def _even(self) -> Tensor:
        """Which share of the variance of an output is between samples, not between positions of one."""
        positions = self._positions.clamp_min(1)
        mean = self._sum / positions
        variance = self._square / positions - mean**2
        return ((self._of_means / self._samples.clamp_min(1) - mean**2) / variance.clamp_min(1e-300)).clamp(0, 1)


class _Energy:
    """``varying``: the dims of the node's tensor along which its ``channels`` lie."""

    def __init__(self, node: str, channels: npt.NDArray[np.int64], varying: tuple[int, ...]):
        self._node, self._channels, self._varying = node, channels, varying
        self._last = tuple(range(-len(varying), 0))
        self._energy: Tensor | None = None

    def watch(self, value: Tensor | None) -> None:
        if value is None:
            return
        kept = value.detach().clone()  # what comes later may write to it

        def note(gradient: Tensor) -> None:
            change = (kept * gradient).double().movedim(self._varying, self._last).reshape(-1, len(self._channels))
            energy = change.transpose(0, 1) @ change
            self._energy = energy if self._energy is None else self._energy + energy

        value.register_hook(note)

    def without(self, channels: npt.NDArray[np.int64], value: Tensor) -> Tensor:
        """The node's tensor with zeros in these channels."""
        places = torch.from_numpy(np.flatnonzero(np.isin(self._channels, channels))).to(value.device)
        moved = value.movedim(self._varying, self._last)
        flat = moved.flatten(-len(self._varying)).index_fill(-1, places, 0)
        return flat.reshape(moved.shape).movedim(self._last, self._varying)

    def result(self, samples: int) -> Gate | None:
        """None where the outputs do not change with it, as far as gradients tell."""
        if self._energy is None or not bool(self._energy.diagonal().any()):
            return None
        return Gate(self._node, self._channels, self._energy / samples)


def _gates(lane: Lane, graph: ChannelGraph, read: Sequence[npt.NDArray[np.int64]]) -> dict[str, _Energy]:
    """For the channels of every group that no weight reads the first node whose tensor holds every one of them once."""
    known = np.unique(np.concatenate([channels.reshape(-1) for channels in read])) if read else np.empty(0, np.int64)
    unread = [group.channels[~np.isin(group.channels, known)] for group in graph.groups if not group.locked]
    left = [channels for channels in unread if channels.size]
    found: dict[str, _Energy] = {}
    for node in lane.nodes:
        tensor = graph.nodes.get(node.name)
        for factor in tensor.labels if isinstance(tensor, TensorLabels) else ():
            ids = factor.ids.reshape(-1)
            held = [c for c in left if np.isin(c, ids).all() and np.isin(ids, c).sum() == c.size]
            if held:
                found[node.name] = _Energy(node.name, ids, factor.varying)
                left = [c for c in left if not any(c is other for other in held)]
    return found


def _by_sample(product: Product, y: Tensor, samples: int) -> Tensor:
    """All rows, ``[g, samples, positions, O]``."""
    rows = product.outputs(y, torch.arange(product.rows, device=y.device)).double()
    samples = samples if rows.shape[1] % samples == 0 else rows.shape[1]
    return rows.reshape(len(rows), samples, -1, rows.shape[2])


def _channels(matrix: Tensor, entries: Entries, graph: ChannelGraph) -> npt.NDArray[np.int64] | None:
    """The channel that every input of a product is of, ``[g, K]``; -1 where it is of none that may go."""
    read = {(m.name, m.dim) for group in graph.groups if not group.locked for m in group.members if m.as_is}
    numbers, found = matrix[:, :, 0], None
    for name in entries.names_of(numbers.reshape(-1)):
        parameter = graph.by_name.get(name)
        factor = next((f for f in parameter.labels if (name, f.dim) in read), None) if parameter is not None else None
        if parameter is None or factor is None:
            continue
        own = entries.of(entries.tensors[name])
        assert own is not None
        ids = torch.from_numpy(np.broadcast_to(factor.ids, parameter.shape).copy())
        order = own.reshape(-1).argsort()
        place = torch.searchsorted(own.reshape(-1)[order], numbers.contiguous()).clamp_max(own.numel() - 1)
        place = order[place]
        here = torch.where(own.reshape(-1)[place] == numbers, ids.reshape(-1)[place], -1)
        found = here if found is None else torch.maximum(found, here)
    return None if found is None else found.numpy()
