"""How alike the structures are that Pruning from Scratch finds: from random weights, and from weights in training.

    python -m model_zoo.similarity             12 structures of VGG16, about 20 minutes on one core
    python -m model_zoo.similarity --resume    those without a line in the file
    python -m model_zoo.similarity --page      the page and the plot from the file as it is

The paper (Wang et al., AAAI 2020, figure 2) says that structures from random weights are diverse and differ from those
of pretrained weights, which become homogeneous after about ten epochs of training.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import TensorDataset

import fxprune
from fxprune.io.files import replacing
from fxprune.methods import Scratch
from fxprune.reports.study import Similarity
from model_zoo.data import glyphs, loaders
from model_zoo.papers import vgg16_bn
from model_zoo.records import RESULTS, Record, append, begin, heading, markdown, read

Weights = Mapping[str, Tensor]

FLOPS = 0.5
METHOD = Scratch(strength=0.5, sparsity=0.2)  # of the paper's code, for CIFAR
PAPER_EPOCHS = 10  # of training, after which the paper calls structures homogeneous
TEST_SEED = 1_000_003


@dataclass(frozen=True)
class Study:
    """Sizes of the study. ``epochs``: of the first training, those whose weights are pruned; the last one of all."""

    width: float = 0.25
    side: int = 32
    images: int = 1500
    batch: int = 64
    gate_epochs: int = 10
    random_seeds: int = 5
    trainings: int = 3
    epochs: tuple[int, ...] = (1, 3, 5, 10, 15)

    def names(self) -> Iterator[str]:
        """The structures: of random weights, of one training, of the ends of others."""
        yield from (_random(seed) for seed in range(self.random_seeds))
        yield from (_trained(0, epoch) for epoch in self.epochs)
        yield from (_trained(seed, self.epochs[-1]) for seed in range(1, self.trainings))


SMALL = Study(width=0.0625, side=16, images=64, gate_epochs=1, random_seeds=2, trainings=2, epochs=(1, 2))


def _random(seed: int) -> str:
    return f"random weights {seed}"


def _trained(training: int, epoch: int) -> str:
    return f"training {training}, epoch {epoch}"


# -- what is run -------------------------------------------------------------------------------------------------------


def run(study: Study, path: Path) -> None:
    """Every structure without a line in the file."""
    images = glyphs(study.images, study.side)
    held = glyphs(max(study.images // 5, 1), study.side, seed=TEST_SEED)
    done = set(read(path)[1])
    for seed in range(max(study.random_seeds, study.trainings)):
        first = _network(study, seed)
        if _random(seed) in study.names() and _random(seed) not in done:
            append(path, _pruned(study, _random(seed), first, seed, images, held))
        wanted = {_trained(seed, epoch): epoch for epoch in study.epochs}
        wanted = {name: epoch for name, epoch in wanted.items() if name in study.names() and name not in done}
        if not wanted:
            continue
        weights = _training(study, seed, first, images, path.with_suffix(f".{seed}.pt"))
        for name, epoch in wanted.items():
            model = copy.deepcopy(first)
            model.load_state_dict(weights[epoch])
            append(path, _pruned(study, name, model, seed, images, held))


def _network(study: Study, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return vgg16_bn(width=study.width, gamma=0.5)


def _training(study: Study, seed: int, first: nn.Module, images: TensorDataset, kept: Path) -> dict[int, Weights]:
    """The weights after each of the study's epochs, from the file ``kept`` where it is there."""
    if kept.exists():
        loaded: dict[int, Weights] = torch.load(kept)
        return loaded
    model = copy.deepcopy(first).train()
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    last = study.epochs[-1]
    schedule = MultiStepLR(optimizer, sorted({max(last // 2, 1), max(last * 3 // 4, 1)}))
    batches, _ = loaders(images, images, study.batch, seed)
    found = {}
    for epoch in range(1, last + 1):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
        if epoch in study.epochs:
            found[epoch] = copy.deepcopy(model.state_dict())
    with replacing(kept) as draft:
        torch.save(found, draft)
    return found


def _pruned(study: Study, name: str, model: nn.Module, seed: int, images: TensorDataset, held: TensorDataset) -> Record:
    begun = time.perf_counter()
    batches, tests = loaders(images, held, study.batch, seed)
    small = fxprune.prune(
        model, images[0][0][None], method=METHOD, flops=FLOPS, round_to=1, data=batches, epochs=study.gate_epochs,
        options=fxprune.Options(loop=fxprune.Loop(validation=tests)), seed=seed, progress=False,
    )  # fmt: skip
    report = small.meta["fxprune"]
    figures = {
        "accuracy": _accuracy(model, tests),
        "ratio": report.macs_after / report.macs_before,
        "kept": {layer: list(counts) for layer, counts in report.plan.widths.items()},
        "notes": list(report.notes),
    }
    print(f"{name}: {report.notes}", flush=True)
    return Record(name, figures, {"gates": round(time.perf_counter() - begun, 1)})


def _accuracy(model: nn.Module, batches: Any) -> float:
    right = count = 0
    model.eval()
    with torch.no_grad():
        for x, y in batches:
            right, count = right + int((model(x).argmax(1) == y).sum()), count + len(y)
    return right / count


# -- what is left of it ------------------------------------------------------------------------------------------------


def compared(records: Mapping[str, Record], names: Sequence[str]) -> Similarity:
    """The structures side by side."""
    layers = [*records[names[0]].figures["kept"]]
    counts = np.array([[records[name].figures["kept"][layer] for layer in layers] for name in names], dtype=float)
    return Similarity.of(names, layers, counts[..., 0] / counts[..., 1])


def findings(study: Study, found: Similarity) -> list[tuple[str, float, int]]:
    """(of what, mean correlation, number of pairs)."""
    place = {name: index for index, name in enumerate(found.names)}

    def mean(what: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, float, int]:
        return what, float(np.mean([found.correlation[place[a], place[b]] for a, b in pairs])), len(pairs)

    random = [_random(seed) for seed in range(study.random_seeds)]
    path = [_trained(0, epoch) for epoch in study.epochs]
    ends = [_trained(seed, study.epochs[-1]) for seed in range(study.trainings)]
    late = [_trained(0, epoch) for epoch in study.epochs if epoch >= PAPER_EPOCHS] or path[-2:]
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


def write_page(study: Study, path: Path) -> None:
    """The result file as a page and a plot beside it."""
    head, records = read(path)
    names = [name for name in study.names() if name in records]
    found = compared(records, names)
    found.plot(path.with_suffix(".png"))
    parts = heading(head)
    if missing := [name for name in study.names() if name not in records]:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    parts.append(
        f"VGG16-BN at {study.width:g} of its width, {study.images} drawn images of {study.side} x {study.side} pixels "
        f"(`model_zoo.data.glyphs`), {study.epochs[-1]} epochs of training; gates learned for {study.gate_epochs} "
        f"epochs in batches of {study.batch} with {METHOD.strength:g} (mean |gate| - {METHOD.sparsity:g})^2, Adam at "
        f"{METHOD.lr:g}; {FLOPS:.0%} of the MACs stay. This is far smaller than the paper's CIFAR-10 study: it says "
        "whether the effect shows here, not that it does there."
    )
    if not missing:
        rows = findings(study, found)
        parts.append("\n".join(f"- {line}" for line in verdicts(rows)))
        lines = ["| structures | mean correlation | pairs |", "|---|---:|---:|"]
        parts.append("\n".join([*lines, *(f"| {what} | {value:.3f} | {pairs} |" for what, value, pairs in rows)]))
    parts += [f"![correlation]({path.with_suffix('.png').name})", _structures(found, records)]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def _structures(found: Similarity, records: Mapping[str, Record]) -> str:
    head = ["structure", "accuracy before pruning", "seconds", *found.layers]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, kept in zip(found.names, found.kept, strict=True):
        record = records[name]
        figures = [f"{record.figures['accuracy']:.1%}", f"{record.seconds['gates']:.0f}"]
        rows.append([name, *figures, *(f"{share:.2f}" for share in kept)])
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m model_zoo.similarity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "similarity.jsonl", help="result file")
    parser.add_argument("--resume", action="store_true", help="keep the file, run what has no line in it")
    parser.add_argument("--page", action="store_true", help="write the page and the plot, run nothing")
    parser.add_argument("--smoke", action="store_true", help="the same code in seconds, on tiny sizes")
    options = parser.parse_args(argv)
    study = SMALL if options.smoke else Study()
    command = "python -m model_zoo.similarity" + (" --smoke" if options.smoke else "")
    if not options.page:
        if not (options.resume and options.out.exists()):
            for kept in options.out.parent.glob(f"{options.out.stem}.*.pt"):
                kept.unlink()
            begin(options.out, command)
        elif read(options.out)[0]["command"] != command:
            parser.error(f"{options.out} was made by another command: {read(options.out)[0]['command']}")
        run(study, options.out)
    write_page(study, options.out)


if __name__ == "__main__":
    main()
