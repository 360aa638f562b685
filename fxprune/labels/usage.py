"""What the recording used of the parameters: what no op consumed is not a channel, since other inputs may need it.

Parameters, and what was only moved out of them, are *unread* until an op computes with them. What was never read stays,
and so does what is cut to a size that depends on an input's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, fx

from fxprune.labels.classes import Ids, Reason
from fxprune.labels.factors import Labels

if TYPE_CHECKING:
    from fxprune.labels.propagate import Propagation

UNUSED = "not used on the example inputs"


class Usage:
    """Of one run. ``unread``: by identity, the tensors that hold parameters or parts of them, as they are."""

    def __init__(self, run: Propagation):
        self._run = run
        self.unread: dict[int, Tensor] = {}
        self._names: set[str] = set()  # of parameters that were read whole
        self._read: list[Ids] = []
        self._parted: list[tuple[Labels, Reason]] = []
        self._bounded: list[tuple[Ids, Reason]] = []
        self._inputs: Ids = np.empty(0, dtype=np.int64)
        self._follows: dict[fx.Node, bool] = {}

    def add(self, tensor: Tensor) -> None:
        """A parameter, or part of one."""
        self.unread[id(tensor)] = tensor

    def add_input(self, ids: Ids) -> None:
        """The positions of a network input."""
        self._inputs = np.concatenate([self._inputs, ids])

    def read(self, tensor: Tensor) -> None:
        """An op computes with a parameter or a part of one."""
        name = self._run.name_of(tensor)
        if name is not None:
            self._names.add(name)
        else:
            self._read += [factor.ids for factor in self._run.labels(tensor)]

    def move(self, tensor: Tensor, outputs: Sequence[Tensor]) -> None:
        """An op only moves ``outputs`` out of a parameter or a part of one."""
        for out in outputs:
            self.add(out)
        if outputs and outputs[0].numel() < tensor.numel():
            self._parted.append((self._run.labels(tensor), self._run.reason(UNUSED)))

    def part(self, tensor: Tensor, outputs: Sequence[Tensor], dim: int) -> None:
        """The node under way takes ``outputs`` out of ``tensor`` along ``dim``.

        If it takes as much as an input is long, another input takes more or less: all of it must stay.
        """
        node = self._run.node
        if node is None or not outputs:
            return
        if outputs[0].ndim == tensor.ndim and outputs[0].shape[dim] == tensor.shape[dim]:
            return
        for factor in self._run.labels(tensor):
            if dim in factor.varying and any(self._follows_input(n) for n in node.all_input_nodes):
                self._bounded.append((factor.ids, self._run.reason("cut to a size that depends on an input's")))

    def _follows_input(self, node: fx.Node) -> bool:
        """Is it a number that depends on the size of an input, as far as that is no number of channels?"""
        if node not in self._follows:
            self._follows[node] = self._finds_input(node)
        return self._follows[node]

    def _finds_input(self, node: fx.Node) -> bool:
        if self._run.known(node):
            return False
        read = [tensor for n in node.all_input_nodes for tensor in self._run.known(n)]
        if not read:
            return any(self._follows_input(n) for n in node.all_input_nodes)
        named = node.args[1] if node.target == "size" and len(node.args) == 2 else None
        for tensor in read:
            for dim in [named % len(tensor.shape)] if isinstance(named, int) else range(len(tensor.shape)):
                labels = [f for f in tensor.labels if f.dim == dim]
                if not labels or self._is_input(labels[0].ids):  # nothing of the model says how many there are
                    return True
        return False

    def _is_input(self, ids: Ids) -> bool:
        find = self._run.classes.find
        return bool(np.isin(find(ids), find(self._inputs)).any())

    def lock(self) -> None:
        """At the end of the run: what must stay, stays."""
        classes = self._run.classes
        unread = np.ones(len(classes), dtype=bool)
        unread[classes.find(np.concatenate([self._inputs, *(ids.reshape(-1) for ids in self._read)]))] = False
        left = self._atoms(whole=False)
        left = left[unread[classes.find(left)]]
        if len(left):  # of a network that uses all its parameters, all have been found by now
            unread[classes.find(self._atoms(whole=True))] = False
            for labels, reason in self._parted:
                for factor in labels:
                    part = factor.ids.reshape(-1)
                    classes.lock(part[unread[classes.find(part)]], reason)
            classes.lock(left[unread[classes.find(left)]], Reason(UNUSED))
        for ids, reason in self._bounded:
            classes.lock(ids, reason)

    def _atoms(self, whole: bool) -> Ids:
        """Of all parameters that were read as a whole, or of all others."""
        chosen = [o for o in self._run.owners if (o.name in self._names) == whole]
        return np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(o.first, o.first + o.count) for o in chosen)])
