"""What criteria that know of the refit need: of every weight that reads channels its inputs' Gram matrix.

Channels that no weight reads meet other activations: of a query and a key channel the logits hold the outer product
``q_c k_c^T``, linear in either. With ``s`` the gradient of the outputs along random signs, ``u_ic = q_ic ds/dq_ic`` is
what it adds to them at token i, ``sum_j ds/dS_ij q_ic k_jc``, whatever scales, masks or rotates it on the way. The mean
of ``sum_i u_ic^2`` over signs is ``sum_ij (q_ic k_jc)^2``, every logit weighed by what the outputs make of it.

All of that is the first order: late layers are heard less than their slopes say, a softmax that has made up its mind
more. So whoever ranks by it can measure what some change of weights and channels really does to the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxprune.groups.channels import ChannelGraph
from fxprune.labels.records import TensorLabels
from fxprune.methods.state import Gate, Read, Trial
from fxprune.ops.refit import Product
from fxprune.reconstruction.data import Piece, on_item
from fxprune.reconstruction.entries import Entries
from fxprune.reconstruction.lanes import Env, Lane
from fxprune.reconstruction.survey import Call, Observed, survey
from fxprune.reconstruction.walk import floating, square
from fxprune.recording import evaluated
from fxprune.recording.inputs import tensors_of
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
        InputError: it does not run on the data.
    """
    lane = Lane(module)
    with evaluated(module):
        with on_item(pieces[0].item):
            facts, _ = survey(lane, lane.begin(pieces[0].args, pieces[0].kwargs))
        lane.forget()
        entries = Entries(module)
        sums = [_Sums(call, entries, graph) for call in facts.calls.values() if call.whole]
        at = {own.call.place[0]: own for own in sums if own.channels is not None}
        gates = _gates(lane, graph, [own.channels for own in at.values() if own.channels is not None])
        total = sum(piece.samples for piece in pieces)
        for index, piece in enumerate(pieces):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            with on_item(piece.item), seeded(seed), torch.enable_grad():
                _run(lane, piece, at, gates, piece.samples / total, generator)
    told = (gate.result(total) for gate in gates.values())
    matrices = {node: own.call.matrix.reshape(-1) for node, own in at.items()}
    trial = _Trials(lane, entries, pieces, matrices, gates)
    return (*(own.result(total) for own in at.values()), *(gate for gate in told if gate is not None)), trial


def _run(
    lane: Lane, piece: Piece, at: dict[str, _Sums], gates: dict[str, _Energy], share: float, generator: torch.Generator
) -> None:
    env = lane.begin(piece.args, piece.kwargs)
    images = {node: value for node, value in env.items() if isinstance(value, Tensor) and value.is_floating_point()}
    env.update({node: value.requires_grad_().clone() for node, value in images.items()})
    for parameter in lane.module.parameters() if images else ():
        parameter.requires_grad_(False)  # gradients of activations are all that is asked for
    for place, node in enumerate(lane.nodes):
        own, gate = at.get(node.name), gates.get(node.name)
        if own is None:
            lane.advance(env, place, place + 1)
            if gate is not None:
                gate.watch(env.get(node))
            continue
        seen = Observed()
        lane.advance(env, place, place + 1, seen)
        (call,) = (c for c in seen.calls if c.number == own.call.place[1])
        product = call.product(own.call.weight)
        own.add(product, call.out, piece.samples, share, generator)
        if isinstance(env.get(node), Tensor) and env[node].requires_grad:
            env[node].register_hook(own.gradients(product, tuple(call.out.shape), piece.samples))
        if gate is not None:
            gate.watch(env.get(node))
    outputs = [t for t in tensors_of(lane.output(env)) if t.requires_grad]
    if outputs:
        signs = [torch.randint(0, 2, t.shape, generator=generator).to(t) * 2 - 1 for t in outputs]
        torch.autograd.backward(outputs, signs)


class _Trials:
    """``fxprune.methods.state.Trial``, on a few samples. ``matrices``: node -> the entries of its weight, ``[n]``."""

    def __init__(
        self,
        lane: Lane,
        entries: Entries,
        pieces: Sequence[Piece],
        matrices: Mapping[str, Tensor],
        gates: Mapping[str, _Energy],
    ):
        self._lane, self._entries, self._matrices, self._gates = lane, entries, matrices, gates
        count = next((n for n, s in enumerate(accumulate(p.samples for p in pieces), 1) if s >= _TRIED), len(pieces))
        self._pieces = pieces[:count]
        self._samples = sum(piece.samples for piece in self._pieces)
        self._wanted: list[list[Tensor]] = []

    def __call__(self, weights: Mapping[str, Tensor], closed: Mapping[str, npt.NDArray[np.int64]]) -> float:
        self._wanted = self._wanted or self._outputs({})
        changed = {self._matrices[node]: weight.reshape(-1) for node, weight in weights.items()}
        before = {numbers: self._entries.read(numbers) for numbers in changed}
        try:
            for numbers, values in changed.items():
                self._entries.write(numbers, values)
            found = self._outputs(closed)
        finally:
            for numbers, values in before.items():
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
    def __init__(self, call: Call, entries: Entries, graph: ChannelGraph):
        self.call = call
        self.channels = _channels(call, entries, graph)
        self._weight = entries.read(call.matrix.reshape(-1)).view(call.matrix.shape).detach().clone()
        groups, inputs, outputs = call.matrix.shape
        self._gram = self._weight.new_zeros(groups, inputs, inputs, dtype=torch.float64)
        self._alone, self._together, self._sum, self._square, self._of_means = (
            self._weight.new_zeros(groups, outputs, dtype=torch.float64) for _ in range(5)
        )
        self._positions = 0
        self._rows = 0

    def add(self, product: Product, out: Tensor, samples: int, share: float, generator: torch.Generator) -> None:
        inputs = self._gram.shape[1]
        wanted = math.ceil(max(_ROWS_PER_INPUT * inputs, _LEAST_ROWS) * share)
        rows = torch.randperm(product.rows, generator=generator)[:wanted].to(self._gram.device)
        x = product.inputs(rows).detach().double()
        self._rows += x.shape[1]
        self._gram += x.transpose(1, 2) @ x
        y = _by_sample(product, out.detach(), samples)
        self._positions = y.shape[2]
        self._sum += y.sum((1, 2))
        self._square += y.square().sum((1, 2))
        self._of_means += y.mean(2).square().sum(1)

    def gradients(self, product: Product, shape: tuple[int, ...], samples: int) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            found = _by_sample(product, gradient.reshape(shape), samples)
            self._alone += found.square().sum((1, 2))
            self._together += found.sum(2).square().sum(1)

        return note

    def result(self, samples: int) -> Read:
        assert self.channels is not None
        mean = self._sum / (samples * self._positions)
        variance = self._square / (samples * self._positions) - mean**2
        even = ((self._of_means / samples - mean**2) / variance.clamp_min(1e-300)).clamp(0, 1)
        sensitivity = ((1 - even) * self._alone + even * self._together) / samples
        worth = samples * self._positions / (1 + (self._positions - 1) * float(even.mean()))
        return Read(
            self.call.place[0], self.channels, self._gram / max(self._rows, 1), self._weight, sensitivity, worth
        )


class _Energy:
    """``varying``: the dims of the node's tensor along which its ``channels`` lie."""

    def __init__(self, node: str, channels: npt.NDArray[np.int64], varying: tuple[int, ...]):
        self._node, self._channels, self._varying = node, channels, varying
        self._last = tuple(range(-len(varying), 0))
        self._energy: Tensor | None = None

    def watch(self, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.requires_grad:
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


def _channels(call: Call, entries: Entries, graph: ChannelGraph) -> npt.NDArray[np.int64] | None:
    """The channel that every input of the product is of, ``[g, K]``; -1 where it is of none that a weight reads."""
    read = {(m.name, m.dim) for group in graph.groups for m in group.members if m.read}
    numbers, found = call.matrix[:, :, 0], None
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
