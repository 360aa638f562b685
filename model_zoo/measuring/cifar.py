"""ResNets with trained weights, every method to prune them, and one run of one method."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import nn

import fxprune
from fxprune.errors import BudgetError, InputError
from fxprune.methods import GSM, Scratch, Slimming
from fxprune.methods.scratch import scratch_b_epochs
from model_zoo import data
from model_zoo.comparison import (
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
from model_zoo.measuring.dhp_quality import dhp
from model_zoo.papers import resnet
from model_zoo.papers.initial import he
from model_zoo.peers import torch_pruning, torch_pruning_in_steps
from model_zoo.pictures import Batches, Pictures, TimeUpError
from model_zoo.recipes.common import Run, Settings, Sgd, rates, split
from model_zoo.records import Record
from model_zoo.study import Options
from model_zoo.weights import take_weights

RATIOS = (0.5, 0.25)
PAPERS = 160  # epochs that the papers train a network for: ``--epochs`` stand for so many, others in proportion
BATCH = 128
SEEN = 2048  # training images that criteria read: of one image at a time they take as long as an epoch
HELD = 0.1  # of the training images, to choose gates by
EXPAND = 1.25  # width of the network in which gates are learned


class Timed(Run):
    """With pictures on the device, and a time after which nothing goes on. ``until``: of the options."""

    progress = False

    def batches(self, batch: int, images: Any = None, others: Any = None) -> tuple[Any, Any]:
        until, seed = getattr(self.options, "until", None), self.options.seed
        layout = torch.channels_last if getattr(self.options, "channels_last", False) else torch.contiguous_format
        train, test = images or self.images, others or self.test
        return Batches(train, batch, seed, until, layout), Batches(test, batch, None, until, layout)


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
    def adapted(self) -> float:
        """Accuracy of the dense network."""
        return self.run.quality(self.dense)

    @cached_property
    def macs(self) -> int:
        return fxprune.analyze(self.random(), self.run.example).macs()

    def seen(self) -> Batches:
        images: Any = self.run.images
        return Batches(images.plain().part(range(min(SEEN, len(images)))), BATCH)


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
    method, search = replace(dhp(study, ratio), every=50, classifier="kept"), study.searching
    return learned(study, f"dhp-{ratio:g}", method, ratio, search.epochs, usual(search), study.random())


def _peer(prune: Callable[[Trained, nn.Module, int, list[str]], nn.Module]) -> Method:
    """``prune(study, model, macs, ignored)``: the layers ignored are those of the stream."""

    def cut(study: Trained, ratio: float) -> nn.Module:
        model = study.modules
        stream = [name for name, _ in model.named_modules() if name == "stem.0" or name.endswith(".conv2")]
        return prune(study, model, int(ratio * study.macs), stream)

    return _cut_of_dense(cut, peer=True)


def _at_once(importance: Any) -> Method:
    return _peer(
        lambda study, model, macs, ignored: torch_pruning(
            model, study.run.example, macs, importance, study.seen(), ignored=ignored
        )
    )


def _in_steps() -> Method:
    return _peer(lambda study, model, macs, ignored: torch_pruning_in_steps(model, study.run.example, macs, ignored))


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
    "obs, refitted": _cut_of_dense(criterion("obs", reconstruct=True).cut, first=True),
    "dense, tuned": Method(unchanged().cut, _tuned, ("dense",), ratios=(1.0,)),
    "Torch-Pruning group norm": _at_once("group_norm"),
    "Torch-Pruning group norm, in steps": _in_steps(),
    "Torch-Pruning Taylor": _at_once("taylor"),
    **{
        name: _cut_of_dense(criterion(name).cut)
        for name in ("random", "l1", "bn_scale", "lamp", "fisher", "activation", "wanda")
    },
}


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
    if "dense" in how.needs:
        figures["dense"] = study.adapted  # before the clock is read: to adapt it is no time of this run
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


def images_of(options: Options) -> tuple[Pictures, Pictures]:
    """Normalised as the published weights want it."""
    parts: Any = data.load("cifar10", options.data)
    some = (part.part(range(min(options.images or len(part), len(part)))) for part in parts)
    train, test = (replace(part, statistics=IMAGENET_STATISTICS) for part in some)
    return train, test
