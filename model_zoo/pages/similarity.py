"""How alike the structures are, and what that says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np

from fxprune.reports.study import Similarity
from model_zoo.measuring.similarity import FLOPS, METHOD, PAPER, Sizes, Structure
from model_zoo.records import Record, Results, bullets, table

PAPER_EPOCHS = 10  # of training, after which the paper calls structures homogeneous


def compared(records: Mapping[str, Record], names: Sequence[str]) -> Similarity:
    """The structures side by side."""
    layers = [*records[names[0]].figures["kept"]]
    counts = np.array([[records[name].figures["kept"][layer] for layer in layers] for name in names], dtype=float)
    return Similarity.of(names, layers, counts[..., 0] / counts[..., 1])


def findings(sizes: Sizes, found: Similarity) -> list[tuple[str, float, int]]:
    """(of what, mean correlation, number of pairs)."""
    place = {name: index for index, name in enumerate(found.names)}

    def mean(what: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, float, int]:
        return what, float(np.mean([found.correlation[place[a], place[b]] for a, b in pairs])), len(pairs)

    random = [str(Structure(seed)) for seed in range(sizes.random_seeds)]
    path = [str(Structure(0, epoch)) for epoch in sizes.epochs]
    ends = [str(Structure(seed, sizes.epochs[-1])) for seed in range(sizes.trainings)]
    late = [str(Structure(0, epoch)) for epoch in sizes.epochs if epoch >= PAPER_EPOCHS]
    if len(late) < 2:
        late = path[-2:]
    early = [name for name in path if name not in late]
    result = [
        mean("random weights, among each other", [*combinations(random, 2)]),
        mean("ends of trainings, among each other", [*combinations(ends, 2)]),
        mean("random weights with ends of trainings", [(a, b) for a in random for b in ends]),
        mean("neighbouring epochs of one training", [*pairwise(path)]),
        mean(f"epochs of one training from {PAPER_EPOCHS} on, among each other", [*combinations(late, 2)]),
    ]
    if early:
        result.append(mean("those with earlier epochs of it", [(a, b) for a in early for b in late]))
    return result


def verdicts(found: Sequence[tuple[str, float, int]]) -> list[str]:
    """The paper's statements, and whether these figures show them."""
    random, ends, between, _, late, *early = (value for _, value, _ in found)
    shown = {
        "Structures from random weights are more diverse than those from trained ones": random < ends,
        "Structures from random weights differ from trained ones more than these do from each other": between < ends,
    }
    if early:
        shown[f"After about {PAPER_EPOCHS} epochs structures are more alike than before"] = late > early[0]
    return [f"{statement}: {'shown' if holds else 'not shown'} here." for statement, holds in shown.items()]


def _found(results: Results) -> tuple[Sizes, list[str], Similarity]:
    """The sizes of the study, what is not run yet, and the rest side by side."""
    sizes = Sizes.of(results.head)
    names = [name for name in sizes.names() if name in results.records]
    missing = [name for name in sizes.names() if name not in names]
    return sizes, missing, compared(results.records, names)


def page(results: Results) -> Sequence[str]:
    sizes, missing, found = _found(results)
    parts = [f"Not run yet: {', '.join(missing)}." if missing else ""]
    images = {
        "glyphs": f"{sizes.images} drawn images of {sizes.side} x {sizes.side} pixels (`model_zoo.data.glyphs`)",
        "cifar10": f"{sizes.images} images of CIFAR-10",
    }
    parts.append(
        f"VGG16-BN at {sizes.width:g} of its width, {images[sizes.dataset]}, {sizes.epochs[-1]} epochs of training; "
        f"gates learned for {sizes.gate_epochs} epochs in batches of {sizes.batch} with {METHOD.strength:g} (mean "
        f"|gate| - {METHOD.sparsity:g})^2, Adam at {METHOD.lr:g}; {FLOPS:.0%} of the MACs stay. {_beside(sizes)}"
    )
    if not missing:
        rows = findings(sizes, found)
        means = ([what, f"{value:.3f}", str(pairs)] for what, value, pairs in rows)
        parts += [bullets(verdicts(rows)), table(["structures", "mean correlation", "pairs"], means)]
        parts.append(_spread(sizes, found))
    return [*parts, results.image("correlation"), _structures(found, results.records)]


def _spread(sizes: Sizes, found: Similarity) -> str:
    """How much there is to correlate."""
    deviations = dict(zip(found.names, found.kept.std(1), strict=True))
    random, ends = (
        float(np.mean([deviations[str(Structure(seed, epoch))] for seed in range(count)]))
        for epoch, count in ((0, sizes.random_seeds), (sizes.epochs[-1], sizes.trainings))
    )
    return (
        f"Within a structure the shares of the layers deviate by {random:.2f} from their mean (random weights) and by "
        f"{ends:.2f} (ends of trainings): the less they do, the more a small difference counts in a correlation."
    )


def _beside(sizes: Sizes) -> str:
    """How the sizes compare to the paper's."""
    if sizes == PAPER:
        return ""
    return (
        f"This is smaller than the paper's study, which has the whole network, the {PAPER.images} images of CIFAR-10 "
        f"and {PAPER.epochs[-1]} epochs: it says whether the effect shows here, not that it does there."
    )


def plot(results: Results) -> None:
    _found(results)[2].plot(results.plot)


def _structures(found: Similarity, records: Mapping[str, Record]) -> str:
    rows = []
    for name, kept in zip(found.names, found.kept, strict=True):
        figures = [f"{records[name].figures['accuracy']:.1%}", f"{records[name].seconds['gates']:.0f}"]
        rows.append([name, *figures, *(f"{share:.2f}" for share in kept)])
    return table(["structure", "accuracy before pruning", "seconds", *found.layers], rows)
