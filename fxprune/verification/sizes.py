"""Other sizes of a recording's inputs: which are tried, what it computes with them, and which guards that clears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import fx

from fxprune.recording import guards
from fxprune.recording.inputs import describe_inputs, is_batched, make_inputs, specs_of, with_sizes
from fxprune.rewriting import MetaRun, OnMeta, is_equal
from fxprune.verification.oracle import Inputs

Place = tuple[int, int]
"""A dim of an input tensor: (tensor, dim)."""

TRIES, TRIES_ALONE = 4, 2  # sizes that are tried: of dims together, of one alone or where the recording takes none
_IMAGE = 64  # positions along a dim, from where on other sizes are tried in steps of 32


class SizeRuns:
    """Runs of a recording on meta, with other sizes of its inputs; each is made once."""

    def __init__(self, module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.record = describe_inputs(tuple(args), dict(kwargs))
        self.module = module
        self._made: dict[Any, MetaRun] = {}

    @cached_property
    def _on_meta(self) -> OnMeta:
        return OnMeta(self.module)

    def __call__(self, sizes: Mapping[Place, int]) -> MetaRun:
        specs = specs_of(self.record)
        sizes = {(n, dim): size for (n, dim), size in sizes.items() if size != specs[n].shape[dim]}
        key = tuple(sorted(sizes.items()))
        if key not in self._made:
            self._made[key] = self._on_meta.run(*self._inputs(sizes), example=(lambda: self({})) if key else None)
        return self._made[key]

    def _inputs(self, sizes: Mapping[Place, int]) -> Inputs:
        return make_inputs(with_sizes(self.record, sizes), permute=False)

    def other_batch(self, module: fx.GraphModule | None = None) -> MetaRun:
        """The run with another batch size, or that of the example where no input has one.

        ``module``: runs in place of the recording; nothing is remembered of it.
        """
        batch = next(filter(is_batch, dims_together(self.record)), None)
        sizes = {} if batch is None else next(other_sizes(self.record, batch))
        return self(sizes) if module is None else OnMeta(module).run(*self._inputs(sizes))


def settled(runs: SizeRuns) -> None:
    """Drop the guards on sizes that no input decides, from runs with every size that may vary."""
    graph = runs.module.graph
    if not any(map(guards.is_of_sizes, guards.guards_of(graph))):
        return
    groups = reversed(dims_together(runs.record))  # that of an image, of which most guards are, before its batch
    guards.settle(graph, runs({}).numbers, (found for group in groups for found in _evidence(runs, group)))


def _evidence(runs: SizeRuns, group: Sequence[Place]) -> list[guards.Evidence]:
    """What other sizes of these dims change, together and, where none gets through, of each alone.

    Beside the first that gets through, one of double size, since strides swallow small differences, and 1, since what
    is cut to a length is the same from there on.
    """
    tried: list[MetaRun] = []
    for sizes in [*other_sizes(runs.record, group)][:TRIES]:
        tried.append(runs(sizes))
        if tried[-1].failed is None:
            specs = specs_of(runs.record)
            extremes = [{(n, dim): 2 * specs[n].shape[dim] for n, dim in group}, dict.fromkeys(group, 1)]
            seen = [run.numbers for run in (*tried[:-1], *map(runs, extremes))]
            return [guards.Evidence((tried[-1].numbers,), seen)]
    if len(group) > 1:
        alone = [found for place in group for found in _evidence(runs, [place])]
        return [guards.Evidence((), [run.numbers for run in tried]), *alone]
    return [guards.Evidence([_and_what_follows(runs, run) for run in tried], ())]


def _and_what_follows(runs: SizeRuns, run: MetaRun) -> Mapping[str, Any]:
    """The numbers of a run that failed, and those after it that are the example's at every size that gets further.

    These are computed from nothing else than what has the example's sizes already: of all that ran, and of the node
    that failed if these are the only ones that it gives.
    """
    example, numbers = runs({}), dict(run.numbers)
    same: set[fx.Node] = set()
    is_after = False
    for node in runs.module.graph.nodes:
        if is_after or node is run.failed:
            is_same = run.is_fixed if node is run.failed else same.issuperset(node.all_input_nodes)
            is_after = True
        else:
            is_same = is_equal(run.of(node), example.of(node))
        if is_same:
            same.add(node)
            if node.name in example.numbers:
                numbers[node.name] = example.numbers[node.name]
    return numbers


def is_batch(group: Sequence[Place]) -> bool:
    return all(dim == 0 for _, dim in group)


def dims_together(record: Mapping[str, Any]) -> list[list[Place]]:
    """Input dims that vary together: the batch, then those of one size in all tensors; of size 1 each alone."""
    specs = specs_of(record)
    batch = [(n, 0) for n, spec in enumerate(specs) if is_batched(spec, record)]
    others: dict[Any, list[Place]] = {}
    for n, spec in enumerate(specs):
        for dim, size in enumerate(spec.shape):
            if (n, dim) not in batch:
                others.setdefault((n, dim) if size == 1 else size, []).append((n, dim))
    return [group for group in (batch, *others.values()) if group]


def other_sizes(record: Mapping[str, Any], group: Sequence[Place]) -> Iterator[dict[Place, int]]:
    """Other sizes to try, the most telling first: an image that is no square, what strides divide, any number."""
    specs = specs_of(record)
    size = specs[group[0][0]].shape[group[0][1]]
    if is_batch(group) and len({n for n, _ in group}) == len(group) and is_batched(specs[group[0][0]], record):
        for other in dict.fromkeys((2 if size != 2 else 3, 2 * size, 1)):
            if other != size:
                yield dict.fromkeys(group, other)
        return
    step = 32 if size >= _IMAGE else 8 if size >= 16 else 1
    smaller, larger = size - step, size + step
    is_plane = len(group) == 2 and group[0][0] == group[1][0] and group[0][1] + 1 == group[1][1]
    if is_plane and smaller > 0:
        yield {group[0]: smaller, group[1]: larger}
    for other in dict.fromkeys((smaller, larger, 2 * size, size // 2, size + 1)):
        if other > 0 and other != size:
            yield dict.fromkeys(group, other)
