"""What it costs to find a pruned network: Pruning from Scratch against a training with Network Slimming's penalty.

    python -m model_zoo.search_cost            VGG16 and ResNet-20, about a quarter of an hour on one core
    python -m model_zoo.search_cost --resume   what has no line in the result file yet
    python -m model_zoo.search_cost --page     the page from the result file

The search of ``scratch`` is ``GATES`` epochs of gates on random weights; that of ``slimming`` is a whole training,
``TRAIN`` epochs with the penalty: the epochs of both papers. Both end with a network of the same MACs, and both are
timed from first weights to the cut network. They take turns in one run, scratch before and after, and its time is the
mean of the two, so that a machine that gets slower favours neither. Seconds are counted twice: those of the clock, and
those that the processor worked for this command, which another program on the machine does not lengthen.

Then both networks are trained to the end: slimming's is fine-tuned for ``TUNE`` epochs, scratch's has new weights and
trains for ``TRAIN + TUNE``. Networks are narrower than the papers' and images fewer, which shortens both alike.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

import fxprune
from fxprune.methods import Learner, Scratch, Slimming
from fxprune.training import fit, seeded
from model_zoo import data
from model_zoo.papers import resnet, vgg16_bn
from model_zoo.papers.initial import he
from model_zoo.recipes.common import Run, Sgd, positive
from model_zoo.records import RESULTS, Record, append, begin, markdown, read

SIDE, IMAGES = 32, 320  # pixels; to train on, all others to test on
RATIO = 0.5  # MACs that stay
GATES, TRAIN, TUNE = 10, 160, 40  # epochs
SGD = Sgd(TRAIN, batch=64, lr=0.1, nesterov=True, weight_decay=1e-4, drops=(0.5, 0.75))
SCRATCH = Scratch(strength=0.5, sparsity=0.2, lr=0.01)


@dataclass(frozen=True)
class Network:
    """``gamma``: first scale of the norms. ``strength``: of slimming's penalty."""

    make: Callable[..., nn.Module]
    gamma: float
    strength: float


NETWORKS = {
    "vgg16_bn": Network(partial(vgg16_bn, in_channels=1, width=0.25), 0.5, 1e-4),
    "resnet_20": Network(partial(resnet, 20, in_channels=1, width=0.5), 1.0, 1e-5),
}


class Case:
    """One network: its data, how both searches and both trainings go."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.network, self.options = NETWORKS[name], options
        chosen = {"dataset": "digits", "network": name, "seed": options.seed}
        rest = {"out": options.out, "smoke": False, "device": "cpu", "amp": False, "workers": 0, "resume": False}
        self.run = Run("search_cost", argparse.Namespace(**chosen, **rest), *images(options.seed, options.images))
        self.settings = replace(SGD, epochs=options.train)
        self.seconds: dict[str, list[float]] = {}

    def initial(self) -> nn.Module:
        self.run.reseed()
        return self.network.make(gamma=self.network.gamma)

    def search(self, method: Learner, epochs: int, **settings: Any) -> nn.Module:
        training = fxprune.attach(
            self.initial(), self.run.example, method=method, flops=RATIO, round_to=1, seed=self.options.seed,
            progress=False,
        )  # fmt: skip
        with seeded(self.options.seed):
            batches = self.run.batches(self.settings.batch)[0]
            fit(training, batches, None, epochs, fxprune.Loop(**settings), progress=False)
        pruned: nn.Module = training.finish()
        return pruned

    def scratch(self) -> nn.Module:
        with self.timed("scratch"):
            return self.search(SCRATCH, self.options.gates)

    def slimming(self) -> nn.Module:
        with self.timed("slimming"):
            return self.search(
                Slimming(self.network.strength, gamma=self.network.gamma), self.settings.epochs,
                optimizer=self.settings.optimizer, schedule=self.settings.schedule,
            )  # fmt: skip

    def trained(self, stage: str, model: nn.Module, epochs: int, **changed: Any) -> dict[str, Any]:
        result = self.run.train(stage, model, replace(self.settings, epochs=epochs, **changed))
        return {"before": self.run.accuracy(model), **self.run.figures(result), "epochs": epochs}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        wall, worked = time.perf_counter(), time.process_time()
        yield
        for clock, seconds in (("wall", time.perf_counter() - wall), ("cpu", time.process_time() - worked)):
            self.seconds.setdefault(f"{what} {clock}", []).append(seconds)


def images(seed: int, count: int) -> tuple[Dataset[Any], Dataset[Any]]:
    train, test = data.digits(SIDE, seed, test=0.5)
    return Subset(train, range(min(count, len(train)))), test


def measured(name: str, options: argparse.Namespace) -> Record:
    case, epochs = Case(name, options), options.train + options.tune
    found, slim = case.scratch(), case.slimming()
    case.scratch()
    seconds = {what: mean(taken) for what, taken in case.seconds.items()}
    case.run.reseed()
    he(found, case.network.gamma)
    figures = {
        "dense_macs": fxprune.analyze(case.initial(), case.run.example).macs(),
        "scratch": case.trained("scratch", found, epochs),
        "slimming": case.trained("slimming", slim, options.tune, lr=SGD.lr / 10),
        "gates": options.gates,
        "train": options.train,
        **{f"times_{clock}": seconds[f"slimming {clock}"] / seconds[f"scratch {clock}"] for clock in ("wall", "cpu")},
    }
    shutil.rmtree(case.run.file("."))
    return Record(name, figures, {what: round(taken, 2) for what, taken in seconds.items()})


def arguments() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--results", type=Path, default=RESULTS / "search_cost.jsonl", metavar="FILE", help="one line per network")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="for checkpoints (default: runs)")
    add("--resume", action="store_true", help="leave out what has a line in the result file")
    add("--page", action="store_true", help="only make the page of the result file")
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--seed", type=int, default=0)
    add("--images", type=positive, default=IMAGES, help="to train on")
    add("--gates", type=positive, default=GATES, help="epochs of scratch's search")
    add("--train", type=positive, default=TRAIN, help="epochs of slimming's search")
    add("--tune", type=positive, default=TUNE, help="epochs of fine-tuning")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    if not options.page:
        torch.set_num_threads(1)
        if not (options.resume and options.results.exists()):
            begin(options.results, "python -m model_zoo.search_cost")
        known = read(options.results)[1]
        for name in options.networks:
            if name not in known:
                append(options.results, measured(name, options))
    write_page(options.results)


def write_page(results: Path) -> None:
    """The result file as a page beside it."""
    head, known = read(results)
    made = ", ".join(f"{key} {value}" for key, value in head.items() if key != "command")
    _, _, rules = (__doc__ or "").partition("from the result file\n\n")
    for figures in [record.figures for record in known.values()][:1]:
        whole, tune = (figures[method]["epochs"] for method in ("scratch", "slimming"))
        epochs = {"TRAIN + TUNE": whole, "GATES": figures["gates"], "TRAIN": figures["train"], "TUNE": tune}
        for name, value in epochs.items():
            rules = rules.replace(f"``{name}``", str(value))
    parts = [f"# {head['command']}", made, rules.strip(), table(list(known.values())), *map(sentence, known.values())]
    results.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def table(records: Sequence[Record]) -> str:
    heads = ("network", "search", "epochs", "seconds", "processor seconds", "MACs", "epochs to train", "accuracy")
    rows: list[Sequence[str]] = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for record in records:
        f, s = record.figures, record.seconds
        for method, epochs in (("scratch", f["gates"]), ("slimming", f["train"])):
            of = f[method]
            rows.append(
                [
                    record.name, method, str(epochs), f"{s[f'{method} wall']:.1f}", f"{s[f'{method} cpu']:.1f}",
                    f"{of['macs'] / f['dense_macs']:.2%}", str(of["epochs"]), f"{of['accuracy']:.2%}",
                ]
            )  # fmt: skip
    return markdown(rows)


def sentence(record: Record) -> str:
    f = record.figures
    return (
        f"{record.name}: the search of slimming takes {f['times_wall']:.1f} times as long as that of scratch by the "
        f"clock, {f['times_cpu']:.1f} times by processor seconds."
    )


if __name__ == "__main__":
    main()
