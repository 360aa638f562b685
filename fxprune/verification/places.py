"""Whether channels lie, with other sizes of the inputs, where they lie with the example's.

A view that folds what is left over into the batch (``x.view(-1, 256)``) takes images of twice the size, too, and makes
more rows of them. The recording follows the model there, but a row is of other channels: none could be cut.
"""

from __future__ import annotations

import numpy as np
from torch import fx

from fxprune.groups import replay
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.labels.factors import Factor
from fxprune.labels.propagation import Propagation
from fxprune.labels.records import labels_in
from fxprune.verification.oracle import Inputs


class Places:
    """Where the channels of a recording lie for its example, to ask whether they lie there for others.

    Args:
        module: as recorded.
        graph: of ``module``.
        example: its inputs.
    """

    def __init__(self, module: fx.GraphModule, graph: ChannelGraph, example: Inputs) -> None:
        self._module, self._graph = module, graph
        self._example = self._lie(example)

    def are_for(self, inputs: Inputs) -> bool:
        """Whether no channels meet but those that meet for the example, and none lies along another dimension.

        Only shapes and dtypes matter. Where labels of these inputs are not known at all, nothing is said against them.
        """
        found = self._lie(inputs)
        if found is None or self._example is None:
            return True
        (meet, along), (meet_here, along_here) = found, self._example
        return not (meet & ~meet_here).any() and all(
            set(varying) <= here.get(dim, frozenset())
            for name, here in along_here.items()
            for dim, varying in along.get(name, {}).items()
        )

    def _lie(self, inputs: Inputs) -> tuple[Keep, dict[tuple[str, int], dict[int, frozenset[int]]]] | None:
        """Which channels are one with others, and for every tensor of a node along which dims they lie and vary."""
        run, failed = replay(self._module, self._graph, self._graph.everything(), *inputs)
        if failed:
            return None
        roots = run.classes.find(np.arange(self._graph.channel_count))
        counts = np.bincount(roots, minlength=len(run.classes))[roots]
        along = {
            (name, place): {f.dim: frozenset(f.varying) for f in tensor.labels if self._is_free(run, f)}
            for name, known in run.node_labels.items()
            for place, tensor in enumerate(labels_in(known))
        }
        return (counts > 1) & ~self._graph.locked, along

    def _is_free(self, run: Propagation, factor: Factor) -> bool:
        """Whether a channel that can be cut is among these."""
        ids = run.classes.find(factor.ids)
        ids = ids[ids < self._graph.channel_count]
        return not bool(self._graph.locked[ids].all())
