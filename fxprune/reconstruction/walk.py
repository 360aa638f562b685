"""The dense and the pruned graph side by side, over all pieces of data, within what memory there is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fxprune.reconstruction.data import Piece, on_item
from fxprune.reconstruction.lanes import Env, Lane, copied
from fxprune.reconstruction.survey import Observed, Seen, numbered, survey
from fxprune.recording.inputs import device_of, tensors_of
from fxprune.recording.shards import from_all, is_sharded


@dataclass
class _State:
    """Where a piece of data is: values in both graphs, before the nodes at these positions."""

    dense: Env
    pruned: Env
    at: tuple[int, int]
    size: float


@dataclass(frozen=True)
class Stop:
    """One piece at a node: the values alive in both graphs, and what was called there.

    ``calls``: the contractions of the dense and of the pruned graph by their numbers in the survey, see ``numbered``.
    """

    dense: Env
    pruned: Env
    of_dense: Observed
    of_pruned: Observed
    calls: tuple[list[Seen | None], list[Seen | None]]


class OutputsError(NamedTuple):
    """``varying``: outputs whose shapes depend on values, which are not compared. None: there are no others."""

    before: float | None
    after: float | None
    varying: int


class Walk:
    """Brings pieces from node to node. What fails on the way did so on an item of the data.

    ``dense_facts``, ``facts``: of both graphs, learned on the first piece.

    Raises:
        InputError: a graph does not run on the data.
    """

    def __init__(self, dense: fx.GraphModule, pruned: fx.GraphModule, pieces: Sequence[Piece], memory: int | None):
        """``memory``: bytes of activations to keep at most; half of what is free if None."""
        self.dense, self.pruned, self._pieces = Lane(dense), Lane(pruned), pieces
        self._memory = room(pruned) if memory is None else memory
        first = pieces[0]
        with on_item(first.item):
            self.facts, _ = survey(self.pruned, self.pruned.begin(first.args, first.kwargs))
            self.dense_facts, _ = survey(self.dense, self.dense.begin(first.args, first.kwargs))
        self.pruned.forget()
        self.dense.forget()
        self._states: list[_State | None] = [None] * len(pieces)

    def position(self, name: str) -> int:
        """The place of a node in the order of the pruned graph."""
        return self.pruned.position[self.pruned.named[name]]

    def stop(self, index: int, name: str) -> Stop:
        """A piece at a node that both graphs have: run there, but in the pruned graph not passed.

        Its weight is about to change.
        """
        nodes = self.dense.named[name], self.pruned.named[name]
        at = self.dense.position[nodes[0]], self.pruned.position[nodes[1]]
        with on_item(self._pieces[index].item):
            state = self._state(index, at)
            of_dense, of_pruned = (Observed(name, facts.calls) for facts in (self.dense_facts, self.facts))
            self.dense.advance(state.dense, state.at[0], at[0])
            self.dense.advance(state.dense, at[0], at[0] + 1, of_dense)
            self.pruned.advance(state.pruned, state.at[1], at[1])
            self.pruned.value(nodes[1], state.pruned, of_pruned)
        state.at = at[0] + 1, at[1]
        calls = (
            numbered(of_dense.calls, self.dense_facts.weights[name]),
            numbered(of_pruned.calls, self.facts.weights[name]),
        )
        return Stop(state.dense, state.pruned, of_dense, of_pruned, calls)

    def ahead(self, stop: Stop, name: str, wanted: Sequence[str]) -> dict[str, Tensor]:
        """What dense nodes give that come after ``name``, where the piece is; it stays there."""
        lane, found = self.dense, dict[str, Tensor]()
        env = copied(stop.dense, self.dense_facts.writes)
        start, end = lane.position[lane.named[name]] + 1, max(lane.position[lane.named[w]] for w in wanted) + 1
        for w in wanted:  # the product itself may be one
            if lane.named[w] in env:
                found[w] = env[lane.named[w]]

        def keep(node: fx.Node, now: Env) -> None:
            if node.name in wanted:
                found[node.name] = now[node].clone() if self.dense_facts.writes else now[node]

        lane.advance(env, start, end, after=keep)
        return found

    def changed(self, passed: bool = False) -> None:
        """A weight of the pruned graph is another now. ``passed``: nodes that the pieces are past read it."""
        self.pruned.forget()
        if passed:
            self._states = [None] * len(self._pieces)

    def outputs_error(self, reference: fx.GraphModule) -> OutputsError:
        """``|pruned - dense|^2 / |dense|^2`` on held-out data: of ``reference``, and of what is now."""
        cut = Lane(reference)
        sums: dict[int, list[float]] = {}
        varying: set[int] = set()
        for index, piece in enumerate(self._pieces):
            if not piece.held:
                continue
            with on_item(piece.item):
                state = self._state(index)
                self.dense.advance(state.dense, state.at[0], len(self.dense.nodes))
                self.pruned.advance(state.pruned, state.at[1], len(self.pruned.nodes))
                env = cut.begin(piece.args, piece.kwargs)
                cut.advance(env, 0, len(cut.nodes))
            lanes = (self.dense, state.dense), (self.pruned, state.pruned), (cut, env)
            outputs = [floating(lane.output(e)) for lane, e in lanes]
            for number, (y, now, then) in enumerate(zip(*outputs, strict=True)):
                if not y.shape == now.shape == then.shape:
                    varying.add(number)
                    continue
                found = [float(square(other, y)) for other in (torch.zeros_like(y), now, then)]
                sums[number] = [a + b for a, b in zip(sums.get(number, [0.0] * 3), found, strict=True)]
            self._states[index] = None
        compared = [own for number, own in sums.items() if number not in varying]
        if not compared:
            return OutputsError(None, None, len(varying))
        whole, after, before = (sum(column) for column in zip(*compared, strict=True))
        return OutputsError(before / max(whole, 1e-300), after / max(whole, 1e-300), len(varying))

    def _state(self, index: int, to: tuple[int, int] | None = None) -> _State:
        """The piece where it is now, to be moved on. If its values at ``to`` are too large to keep, a copy."""
        piece, kept = self._pieces[index], self._states[index]
        if kept is None:
            kept = _State(
                self.dense.begin(piece.args, piece.kwargs), self.pruned.begin(piece.args, piece.kwargs), (0, 0), 0.0
            )
        size = 0.0 if to is None else self._size(piece, to)
        others = sum(s.size for i, s in enumerate(self._states) if s is not None and i != index)
        if to is None or others + size <= self._memory:
            kept.size = size
            self._states[index] = kept
            return kept
        if self._states[index] is None:
            return kept
        deeply = self.facts.writes or self.dense_facts.writes
        return replace(kept, dense=copied(kept.dense, deeply), pruned=copied(kept.pruned, deeply))

    def _size(self, piece: Piece, at: tuple[int, int]) -> float:
        sizes = [f.sizes[max(p - 1, 0)] for f, p in zip((self.dense_facts, self.facts), at, strict=True)]
        return sum(sizes) * piece.samples / self._pieces[0].samples


def floating(outputs: Any) -> list[Tensor]:
    """The outputs whose errors count; of complex ones real and imaginary parts, ``[*, 2]``."""
    found = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors_of(outputs)]
    return [t for t in found if t.is_floating_point()]


def square(now: Tensor, wanted: Tensor) -> Tensor:
    """``|now - wanted|^2``, a scalar in double; what should be infinite, as masked logits, is not compared."""
    gap = now.double() - wanted.double()
    return torch.where(wanted.isinf(), torch.zeros_like(gap), gap).square().sum()


def room(module: nn.Module) -> int:
    """Half of the bytes that are free where a module is; of one that processes share the same in each of them."""
    device = device_of(module)
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if is_sharded(module):
        found = from_all(free)
        free = min(found) // (1 if device.type == "cuda" else len(found))  # they may be of one machine
    return free // 2
