"""Accuracy on real images at 50 %, 25 % and 10 % of the MACs, every method under the same rules, next to Torch-Pruning.

    python -m model_zoo.accuracy               all seeds, methods and ratios; about two hours on one core
    python -m model_zoo.accuracy --resume      what has no line in the result file yet
    python -m model_zoo.accuracy --page        the page from the result file

The rules, the same for all:

- scikit-learn's handwritten digits at 16 x 16 with noise, 30 % of every class to train on and the rest to test on;
  split, noise, first weights and the order of batches are those of the seed.
- Criteria and Torch-Pruning cut the same dense network, which was trained for ``TRAIN`` epochs; those that read data
  read all training images once. What is left is fine-tuned for ``TUNE`` epochs. The dense network is, too.
- Learners start from the same first weights and train for ``TRAIN`` epochs in their own way in place of plain training;
  fine-tuning is the same.
- Networks with new weights (``scratch``, and the same share of every layer's channels) train for ``TRAIN + TUNE``
  epochs. ``scratch`` finds its widths before, with gates on random weights, in ``GATES`` epochs of its own.
- Rates are those that suit the dense network, and the same for all methods; they, the noise and the epochs were chosen
  in a few trials of seed 0, by the accuracy on its test images. Accuracy is that after the last epoch.
- The budget is the largest number of MACs at or under the ratio, counted by ``fxprune.analyze`` for all.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import nn
from torch.utils.data import TensorDataset

import fxprune
from fxprune.methods import Learner, Scratch, Slimming, needs_of, resolve
from fxprune.training import fit, reset_parameters, seeded
from model_zoo import data
from model_zoo.papers import resnet
from model_zoo.papers.initial import he
from model_zoo.peers import torch_pruning
from model_zoo.recipes.common import AdamW, Run, Sgd, positive
from model_zoo.records import RESULTS, Record, append, begin, read

RATIOS = (0.5, 0.25, 0.1)
SIDE, TEST_SHARE = 16, 0.7  # pixels; of the images
TRAIN, TUNE, GATES = 40, 8, 8  # epochs
SEEDS = 3


class Network(NamedTuple):
    """How a network is made and trained.

    ``make``: with first weights. ``initial``: draws them anew. ``noise``: its deviation, where that of the images is 1;
    chosen for a dense network that is right in about nine cases of ten.
    """

    make: Callable[[], nn.Module]
    initial: Callable[[nn.Module], Any]
    train: Sgd | AdamW
    tune: Sgd | AdamW
    noise: float


def vit() -> nn.Module:
    """x [N, 1, 16, 16] in 16 patches; 4 blocks of width 64."""
    made: nn.Module = VisionTransformer(
        img_size=SIDE, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    return made


SGD = Sgd(TRAIN, batch=64, lr=0.1, nesterov=True, weight_decay=5e-4, drops=None)
ADAMW = AdamW(TRAIN, batch=64, lr=3e-3, weight_decay=0.05)
NETWORKS = {
    "resnet_20": Network(partial(resnet, 20, in_channels=1), he, SGD, replace(SGD, epochs=TUNE, lr=0.05), 1.0),
    "vit": Network(vit, lambda m: m.apply(init_weights_vit_timm), ADAMW, replace(ADAMW, epochs=TUNE), 0.3),
}


# -- one network and seed ----------------------------------------------------------------------------------------------


class Case:
    """One network and seed: its data, and the trainings that several runs share."""

    def __init__(self, name: str, seed: int, options: argparse.Namespace):
        self.network = NETWORKS[name]
        self.training = replace(self.network.train, epochs=options.train)
        self.tuning = replace(self.network.tune, epochs=options.tune)
        self.anew = replace(self.network.train, epochs=options.train + options.tune)
        self.gate_epochs = options.gates
        chosen = {"dataset": "digits", "network": name, "seed": seed, "train": options.train, "tune": options.tune}
        rest = {"out": options.out, "smoke": False, "device": "cpu", "amp": False, "workers": 0, "resume": True}
        self.run = Run(
            "accuracy", argparse.Namespace(**chosen, **rest), *noisy(self.network.noise, seed, options.images)
        )
        self.seed = seed
        if not options.resume:
            shutil.rmtree(self.run.file("."))
            self.run.file(".").mkdir()

    def initial(self) -> nn.Module:
        self.run.reseed()
        return self.network.make()

    @cached_property
    def dense(self) -> nn.Module:
        return self.run.train("dense", self.initial(), self.training)

    @cached_property
    def modules(self) -> nn.Module:
        """The dense network as its modules, for whom reads their attributes."""
        result = self.initial()
        result.load_state_dict(self.dense.state_dict())
        return result

    @cached_property
    def macs(self) -> int:
        return fxprune.analyze(self.initial(), self.run.example).macs()

    def batches(self) -> Any:
        return self.run.batches(self.training.batch)[0]

    def drawn_anew(self, model: nn.Module) -> nn.Module:
        reset_parameters(model, self.seed)
        self.run.reseed()
        self.network.initial(model)
        return model


def noisy(noise: float, seed: int, images: int | None = None) -> list[TensorDataset]:
    """Digits with noise that is drawn once, train and test; at most so many of each."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for part in data.digits(SIDE, seed, TEST_SHARE):
        clean, labels = part.tensors
        drawn = torch.randn(clean.shape, generator=generator)
        result.append(TensorDataset((clean + noise * drawn)[:images], labels[:images]))
    return result


# -- methods -----------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """``cut``: the network to train on. ``anew``: its weights are new. ``peer``: of another project."""

    cut: Callable[[Case, float], nn.Module]
    anew: bool = False
    peer: bool = False
    ratios: tuple[float, ...] = RATIOS


def criterion(method: str, **options: Any) -> Method:
    def cut(case: Case, ratio: float) -> nn.Module:
        seen = case.batches() if needs_of(resolve(method)) else None  # type: ignore[arg-type]
        pruned: nn.Module = fxprune.prune(
            case.dense,
            case.run.example,
            method=method,
            flops=ratio,
            data=seen,
            seed=case.seed,
            progress=False,
            **options,
        )
        return pruned

    return Method(cut)


def learner(name: str, method: Learner, anew: bool = False, once: bool = True) -> Method:
    """``anew``: it finds widths with an optimizer of its own. ``once``: its training does not depend on the budget."""

    def cut(case: Case, ratio: float) -> nn.Module:
        stage = name if once else f"{name}-{ratio:g}"
        own = {"optimizer": case.training.optimizer, "schedule": case.training.schedule}
        loop = case.run.loop(stage, **({} if anew else own))
        training = fxprune.attach(
            case.initial(), case.run.example, method=method, flops=ratio, seed=case.seed, progress=False
        )
        epochs = case.gate_epochs if anew else case.training.epochs
        with seeded(case.seed):
            fit(training, case.batches(), None, epochs, **loop, progress=False)
        pruned = training.finish()
        return case.drawn_anew(pruned) if anew else pruned

    return Method(cut, anew)


def peer(importance: Any, isomorphic: bool = False) -> Method:
    def cut(case: Case, ratio: float) -> nn.Module:
        macs = int(ratio * case.macs)
        return torch_pruning(case.modules, case.run.example, macs, importance, case.batches(), isomorphic)

    return Method(cut, peer=True)


def uniform(case: Case, ratio: float) -> nn.Module:
    pruned = fxprune.prune(
        case.initial(), case.run.example, method="random", scope="uniform", flops=ratio, seed=case.seed, progress=False
    )
    return case.drawn_anew(pruned)


METHODS = {
    "dense": Method(lambda case, _: case.dense, ratios=(1.0,)),
    "uniform, new weights": Method(uniform, anew=True),
    "random": criterion("random"),
    "l1": criterion("l1"),
    "l2": criterion("l2"),
    "bn_scale": criterion("bn_scale"),
    "fpgm": criterion("fpgm"),
    "lamp": criterion("lamp"),
    "taylor": criterion("taylor"),
    "fisher": criterion("fisher"),
    "activation": criterion("activation"),
    "wanda": criterion("wanda"),
    "l2, isomorphic": criterion("l2", scope="isomorphic"),
    "taylor, isomorphic": criterion("taylor", scope="isomorphic"),
    "slimming": learner("slimming", Slimming(strength=1e-3)),
    "scratch": learner("scratch", Scratch(), anew=True),
    "Torch-Pruning group norm": peer("group_norm"),
    "Torch-Pruning Taylor": peer("taylor"),
    "Torch-Pruning group norm, isomorphic": peer("group_norm", isomorphic=True),
    "Torch-Pruning Taylor, isomorphic": peer("taylor", isomorphic=True),
}
BASELINES = ("dense", "uniform, new weights", "random")


# -- runs --------------------------------------------------------------------------------------------------------------


def name_of(network: str, method: str, seed: int, ratio: float) -> str:
    return f"{network}, {method}, seed {seed}, {ratio:g}"


def measured(case: Case, network: str, method: str, ratio: float) -> Record:
    """One method at one ratio; a budget that it cannot reach is what its record says then."""
    how, run = METHODS[method], case.run
    record = Record(
        name_of(network, method, case.seed, ratio),
        {"network": network, "method": method, "seed": case.seed, "ratio": ratio},
    )
    case.dense  # noqa: B018  the time it takes is nobody's in particular
    begun = time.perf_counter()
    try:
        pruned = how.cut(case, ratio)
    except (fxprune.FxpruneError, ValueError) as error:
        record.checks["budget"] = str(error)
        return record
    record.seconds["cut"] = round(time.perf_counter() - begun, 1)
    graph = fxprune.analyze(pruned, run.example)
    record.figures |= {"macs": graph.macs(), "macs_ratio": graph.macs() / case.macs, "params": graph.params()}
    record.figures["before"] = None if how.anew else run.accuracy(pruned)
    begun = time.perf_counter()
    trained = run.train("run", pruned, case.anew if how.anew else case.tuning)
    record.seconds["train"] = round(time.perf_counter() - begun, 1)
    run.file("run.checkpoint.pt").unlink()
    record.figures["accuracy"] = run.accuracy(trained)
    record.checks["budget"] = "" if record.figures["macs_ratio"] <= ratio else "more MACs than the budget"
    return record


def arguments() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--results", type=Path, default=RESULTS / "accuracy.jsonl", metavar="FILE", help="one line per run; only grows")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="for checkpoints (default: runs)")
    add("--resume", action="store_true", help="go on with what is there, lines and checkpoints")
    add("--page", action="store_true", help="only make the page of the result file")
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", type=positive, default=SEEDS, help="how many")
    add("--train", type=positive, default=TRAIN, help="epochs of the dense network")
    add("--tune", type=positive, default=TUNE, help="epochs of fine-tuning")
    add("--gates", type=positive, default=GATES, help="epochs of scratch's gates")
    add("--images", type=positive, help="use only so many, to train on and to test on")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    if not options.page:
        torch.set_num_threads(1)
        measure(options)
    write_page(options.results)


def measure(options: argparse.Namespace) -> None:
    """Seed by seed, so that what is complete is complete for all methods."""
    if not (options.resume and options.results.exists()):
        begin(options.results, "python -m model_zoo.accuracy")
    known = read(options.results)[1]
    if importlib.util.find_spec("torch_pruning") is None:
        left_out = [name for name in options.methods if METHODS[name].peer]
        print(f"torch-pruning is not installed (pip install '.[bench]'): no {'; no '.join(left_out)}")
        options.methods = [name for name in options.methods if name not in left_out]
    for seed in range(options.seeds):
        for network in options.networks:
            wanted = [(m, r) for m in options.methods for r in METHODS[m].ratios]
            wanted = [(m, r) for m, r in wanted if name_of(network, m, seed, r) not in known]
            case = Case(network, seed, options) if wanted else None
            for method, ratio in wanted:
                assert case is not None
                record = measured(case, network, method, ratio)
                append(options.results, record)
                print(told(record), flush=True)


def told(record: Record) -> str:
    f = record.figures
    if "accuracy" not in f:
        return f"{record.name}: {record.checks['budget']}"
    before = "" if f["before"] is None else f"{f['before']:.2%} -> "
    return f"{record.name}: {before}{f['accuracy']:.2%} at {f['macs_ratio']:.4f}, {sum(record.seconds.values()):.0f} s"


# -- the page ----------------------------------------------------------------------------------------------------------


def write_page(results: Path) -> None:
    """The result file as a page beside it: rules, tables, who is ahead."""
    head, known = read(results)
    records = list(known.values())
    made = ", ".join(f"{key} {value}" for key, value in head.items() if key != "command")
    rules = (__doc__ or "").partition("The rules, the same for all:\n\n")[2]
    for name, value in (("TRAIN", TRAIN), ("TUNE", TUNE), ("GATES", GATES), ("TRAIN + TUNE", TRAIN + TUNE)):
        rules = rules.replace(f"``{name}``", str(value))
    parts = [f"# {head['command']}", made, rules.strip()]
    for network in NETWORKS:
        of = [r for r in records if r.figures["network"] == network]
        if of:
            parts += [f"## {network}", table(of), *ahead(of)]
    if importlib.util.find_spec("matplotlib") is not None:
        draw(records, results.with_suffix(".png"))
        parts.insert(3, f"![accuracy over the MACs that stay]({results.with_suffix('.png').name})")
    results.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def draw(records: Sequence[Record], file: Path) -> None:
    """Mean accuracy over the MACs that stay, a panel per network: baselines dotted, the peer dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, len(NETWORKS), squeeze=False)[0]
    for panel, network in zip(panels, NETWORKS, strict=True):
        for number, (method, how) in enumerate(METHODS.items()):
            of = [r for r in records if r.figures["network"] == network and r.figures["method"] == method]
            found = {r: [f.figures["accuracy"] for f in at(of, r) if "accuracy" in f.figures] for r in how.ratios}
            means = {ratio: 100 * statistics.mean(values) for ratio, values in found.items() if values}
            style = ":" if method in BASELINES else "--" if how.peer else "-"
            panel.plot([*means], [*means.values()], style, marker="o", ms=3, color=f"C{number}", label=method)
        panel.set(title=network, xlabel="MACs that stay, ratio", ylabel="accuracy, %", xscale="log")
        panel.set_xticks([*RATIOS, 1.0], [f"{ratio:g}" for ratio in (*RATIOS, 1.0)], minor=False)
        panel.set_xticks([], minor=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    figure.savefig(file, dpi=80)


def table(records: Sequence[Record]) -> str:
    """Accuracy in %, mean and standard error over seeds, and in brackets what it was before fine-tuning."""
    columns = [f"{ratio:.0%} of the MACs" for ratio in RATIOS]
    rows = [["method", *columns, "MACs used of the budget"], ["---", *["---:"] * (len(columns) + 1)]]
    for method in METHODS:
        of = [r for r in records if r.figures["method"] == method]
        if of:
            used = [r.figures["macs_ratio"] / r.figures["ratio"] for r in of if "accuracy" in r.figures]
            share = f"{min(used):.1%} to {max(used):.1%}" if used else "–"
            rows.append([method, *(cell(at(of, ratio) or at(of, 1.0)) for ratio in RATIOS), share])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def at(records: Iterable[Record], ratio: float) -> list[Record]:
    return [r for r in records if r.figures["ratio"] == ratio]


def cell(records: Sequence[Record]) -> str:
    found = [r.figures for r in records if "accuracy" in r.figures]
    if not found:
        return "not reached" if records else "–"
    seeds = "" if len(found) == len(records) else f", {len(found)} of {len(records)} seeds"
    before = [f["before"] for f in found if f["before"] is not None]
    cut = f" (cut: {100 * statistics.mean(before):.1f})" if before else ""
    return mean_and_error([f["accuracy"] for f in found]) + cut + seeds


def mean_and_error(shares: Sequence[float]) -> str:
    """In %, with the standard error of the mean where there are several."""
    mean = f"{100 * statistics.mean(shares):.2f}"
    return f"{mean} ± {100 * statistics.stdev(shares) / len(shares) ** 0.5:.2f}" if len(shares) > 1 else mean


def ahead(records: Sequence[Record]) -> list[str]:
    """Of every ratio the best method of ours and the best of the peer, by their means; baselines are nobody's."""
    lines = []
    for ratio in RATIOS:
        found: dict[bool, dict[str, dict[int, float]]] = {True: {}, False: {}}
        for method, how in METHODS.items():
            runs = [r.figures for r in at(records, ratio) if r.figures["method"] == method]
            if runs and all("accuracy" in f for f in runs) and method not in BASELINES:
                found[how.peer][method] = {f["seed"]: f["accuracy"] for f in runs}
        if all(found.values()):
            (our, ours), (their, theirs) = (best(found[False]), best(found[True]))
            pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            lines.append(
                f"- {ratio:.0%} of the MACs: the best of {len(found[False])} methods of fxprune is {our}, the best of "
                f"{len(found[True])} of Torch-Pruning {their.removeprefix('Torch-Pruning ')}. Seed by seed it is ahead "
                f"by {mean_and_error(pairs)} points. The more methods, the luckier the best."
            )
    return ["\n".join(lines)] if lines else []


def best(methods: dict[str, dict[int, float]]) -> tuple[str, dict[int, float]]:
    """The method with the largest mean over seeds."""
    return max(methods.items(), key=lambda item: statistics.mean(item[1].values()))


if __name__ == "__main__":
    main()
