"""Methods under the same rules: what the comparisons ``accuracy`` and ``dhp_quality`` share.

A comparison is data: networks, methods and ratios of MACs. Every network is trained as it is; every method cuts it to
every ratio in its own way, and what is left is trained on. Each run is a line in the result file. The page has a table
and a panel of the figure per network.
"""

from __future__ import annotations

import copy
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fxprune
from fxprune.methods import Learner, needs_of, resolve
from fxprune.training import fit, reset_parameters, seeded
from model_zoo import data
from model_zoo.peers import is_here
from model_zoo.recipes.common import Images, Run, Settings, positive
from model_zoo.records import Record, Results, mean_and_error, table
from model_zoo.study import Add, Measure, Options, Study

SIDE, TEST_SHARE = 16, 0.7  # of digits: pixels; of the images
RECALIBRATED = 50  # batches that norm statistics are taken from
Then = Literal["tune", "anew", "converge"]


class Network(NamedTuple):
    """How a network is made, trained and measured.

    ``make``: with first weights. ``initial``: draws them anew. ``images(seed, count)``: to train on and to test on, at
    most so many of each (None: all). ``train``: of the dense network. ``tune``: of what was cut. ``gates``: epochs of
    gates on random weights. ``search``: for methods that search until the budget is met, for so many epochs at most.
    ``kind``: what it is trained for and measured by. ``about``: for the page.
    """

    make: Callable[[], nn.Module]
    initial: Callable[[nn.Module], Any]
    images: Callable[[int, int | None], tuple[Images, Images]]
    train: Settings
    tune: Settings
    gates: int
    search: Settings | None = None
    kind: type[Run] = Run
    about: str = ""


def noisy(noise: float, seed: int, count: int | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Digits with noise that is drawn once, train and test; at most so many of each.

    ``noise``: its deviation, where that of the images is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    result = []
    for part in data.digits(SIDE, seed, TEST_SHARE):
        clean, labels = part.tensors
        drawn = torch.randn(clean.shape, generator=generator)
        result.append(TensorDataset((clean + noise * drawn)[:count], labels[:count]))
    train, test = result
    return train, test


# -- one network and seed ----------------------------------------------------------------------------------------------


class Case:
    """One network and seed: its data, its trainings, and the networks that several runs share."""

    def __init__(self, command: str, name: str, network: Network, seed: int, options: Options):
        self.network, self.seed, self._options = network, seed, options
        self.training = _lasting(network.train, options.train)
        self.gate_epochs = options.gates or network.gates
        chosen = {"network": name, "seed": seed, "train": self.training.epochs, "tune": self.after("tune").epochs}
        rest = {"out": options.work, "smoke": False, "device": "cpu", "amp": False, "workers": 0, "resume": True}
        given = ("device", "until", "channels_last")
        rest |= {name: value for name in given if (value := getattr(options, name, None)) is not None}
        namespace = Options(**chosen, **rest)
        self.run = network.kind(command, namespace, *network.images(seed, options.images))
        if not options.resume:
            shutil.rmtree(self.run.file("."))
            self.run.file(".").mkdir()

    @property
    def searching(self) -> Settings:
        return _lasting(self.network.search, self._options.search)

    def after(self, then: Then) -> Settings:
        """The training that follows a cut.

        *tune*: of weights that were trained before. *anew*: of new weights, for as many epochs as those had with it.
        *converge*: the rest of these epochs after a search.
        """
        tuning = _lasting(self.network.tune, self._options.tune)
        match then:
            case "tune":
                return tuning
            case "anew":
                return _lasting(self.network.train, self.training.epochs + tuning.epochs)
            case "converge":
                return _lasting(self.network.train, self.training.epochs + tuning.epochs - self.searching.epochs)

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

    def budget(self, ratio: float) -> dict[str, Any]:
        """What is common to all cuts; channels are not aligned, since accuracy is compared, and networks are small."""
        return {"flops": ratio, "round_to": 1, "seed": self.seed, "progress": False}

    def batches(self) -> Any:
        return self.run.batches(self.training.batch)[0]

    def seen(self) -> Any:
        """The batches for criteria that read data: those of one epoch."""
        return self.batches()

    def drawn_anew(self, model: nn.Module) -> nn.Module:
        reset_parameters(model, self.seed)
        self.run.reseed()
        self.network.initial(model)
        return model


def _lasting(settings: Any, epochs: int | None) -> Settings:
    """The settings, with another number of epochs if there is one."""
    result: Settings = replace(settings, epochs=epochs or settings.epochs)
    return result


def recalibrated(model: nn.Module, batches: Iterable[tuple[Tensor, Any]]) -> nn.Module:
    """A copy whose norms have their statistics from ``RECALIBRATED`` batches, all of equal weight."""
    result = copy.deepcopy(model).train()
    for norm in result.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean
    with torch.no_grad():
        for _, (images, _) in zip(range(RECALIBRATED), batches, strict=False):
            result(images)
    return result


# -- methods -----------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """``cut``: the network to train on. ``then``: how, see ``Case``. ``peer``: of another project."""

    cut: Callable[[Case, float], nn.Module]
    then: Then = "tune"
    peer: bool = False
    ratios: tuple[float, ...] | None = None  # None: those of the comparison


def unchanged() -> Method:
    """The dense network."""
    return Method(lambda case, _: case.dense, ratios=(1.0,))


def criterion(method: str, **options: Any) -> Method:
    """Cuts the dense network."""

    def cut(case: Case, ratio: float) -> nn.Module:
        if needs_of(resolve(method)):  # type: ignore[arg-type]
            seen = {"data": case.seen(), "loss_fn": case.run.loss}
        else:
            seen = {}
        budget = case.budget(ratio)
        pruned: nn.Module = fxprune.prune(case.dense, case.run.example, method=method, **budget, **seen, **options)
        return pruned

    return Method(cut)


def learner(name: str, method: Callable[[Case], Learner]) -> Method:
    """Trains in place of plain training, for as many epochs; its training does not depend on the budget."""

    def cut(case: Case, ratio: float) -> nn.Module:
        return learned(case, name, method(case), ratio, case.training.epochs, usual(case.training))

    return Method(cut)


def searcher(name: str, method: Callable[[Case, float], Learner]) -> Method:
    """Searches until the budget is met; what is left trains on. ``method``: for a ratio."""

    def cut(case: Case, ratio: float) -> nn.Module:
        stage = f"{name}-{ratio:g}"
        pruned = learned(case, stage, method(case, ratio), ratio, case.searching.epochs, usual(case.searching))
        case.run.file(f"{stage}.checkpoint.pt").unlink()
        return pruned

    return Method(cut, then="converge")


def gated(name: str, method: Callable[[Case], Learner]) -> Method:
    """Finds widths on random weights with an optimizer of its own; the weights are then drawn anew."""

    def cut(case: Case, ratio: float) -> nn.Module:
        return case.drawn_anew(learned(case, name, method(case), ratio, case.gate_epochs, {}))

    return Method(cut, then="anew")


def usual(settings: Settings) -> dict[str, Any]:
    return {"optimizer": settings.optimizer, "schedule": settings.schedule}


def learned(
    case: Case,
    stage: str,
    method: Learner,
    ratio: float,
    epochs: int,
    settings: Mapping[str, Any],
    model: nn.Module | None = None,
) -> nn.Module:
    """What a learner leaves of ``model``, of the first weights if it is None."""
    model = case.initial() if model is None else model
    training = fxprune.attach(model, case.run.example, method=method, **case.budget(ratio))
    with seeded(case.seed):
        fit(training, case.batches(), case.run.loss, epochs, case.run.loop(stage, **settings), progress=False)
    pruned: nn.Module = training.finish()
    return pruned


def uniform() -> Method:
    """The same share of every layer's channels, with new weights."""

    def cut(case: Case, ratio: float) -> nn.Module:
        options: Any = {"method": "random", "scope": "uniform"}
        return case.drawn_anew(fxprune.prune(case.initial(), case.run.example, **case.budget(ratio), **options))

    return Method(cut, then="anew")


# -- a comparison ------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One run."""

    network: str
    seed: int
    method: str
    ratio: float

    def __str__(self) -> str:
        return f"{self.network}, {self.method}, seed {self.seed}, {self.ratio:g}"


def there(methods: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Those that can be run here; says which cannot."""
    peers = [name for name in methods if known[name].peer]
    if not peers or is_here():
        return [*methods]
    print(f"torch-pruning is not installed (pip install '.[bench]'): no {'; no '.join(peers)}")
    return [name for name in methods if name not in peers]


@dataclass(frozen=True)
class Comparison:
    """What a study compares, and how its page reads.

    Args:
        name: of the study.
        rules: for the page.
        networks: by name.
        methods: by name.
        ratios: of the MACs.
        seeds: how many, unless the command is given another number.
        baselines: names of methods that are dotted in the figure.
        verdict: what is said below the table of a network, from its name and records.
    """

    name: str
    rules: str
    networks: Mapping[str, Network]
    methods: Mapping[str, Method]
    ratios: tuple[float, ...]
    seeds: int
    baselines: tuple[str, ...]
    verdict: Callable[[str, Sequence[Record]], list[str]]

    def study(self, about: str, doc: str | None, **others: Any) -> Study:
        given: Any = {"plot": self.plot, "options": self.options, "told": self.told, "doc": doc, **others}
        return Study(self.name, about, self.jobs, self.worker, self.page, **given)

    def ratios_of(self, method: str) -> tuple[float, ...]:
        return self.methods[method].ratios or self.ratios

    def options(self, add: Add) -> None:
        add("--work", type=Path, default=Path("runs"), metavar="DIR", help="for checkpoints (default: runs)")
        add("--networks", nargs="+", choices=self.networks, default=list(self.networks))
        add("--methods", nargs="+", choices=self.methods, default=list(self.methods))
        add("--seeds", type=positive, default=self.seeds, help="how many")
        add("--train", type=positive, help="epochs of the dense network")
        add("--tune", type=positive, help="epochs of fine-tuning")
        add("--gates", type=positive, help="epochs of gates on random weights")
        add("--search", type=positive, help="epochs, at most, of a search that ends at the budget")
        add("--images", type=positive, help="use only so many, to train on and to test on")

    def jobs(self, options: Options) -> list[Job]:
        """Seed by seed, and ratio by ratio, so that what is complete is complete for all methods."""
        methods = there(options.methods, self.methods)
        wanted = sorted(((m, r) for m in methods for r in self.ratios_of(m)), key=lambda run: -run[1])
        return [Job(n, seed, m, r) for seed in range(options.seeds) for n in options.networks for m, r in wanted]

    def worker(self, options: Options) -> Measure:
        @lru_cache(maxsize=1)
        def case(network: str, seed: int) -> Case:
            return Case(self.name, network, self.networks[network], seed, options)

        return lambda job: self.measured(job, case(job.network, job.seed))

    def measured(self, job: Job, case: Case) -> Record:
        """One method at one ratio; a budget that it cannot reach is what its record says then."""
        method, ratio, run = job.method, job.ratio, case.run
        how = self.methods[method]
        record = Record(str(job), {"network": job.network, "method": method, "seed": job.seed, "ratio": ratio})
        case.dense  # noqa: B018  the time it takes is nobody's in particular
        begun = time.perf_counter()
        try:
            pruned: Any = how.cut(case, ratio)
        except (fxprune.FxpruneError, ValueError) as error:
            record.checks["budget"] = str(error)
            return record
        record.seconds["cut"] = round(time.perf_counter() - begun, 1)
        graph = fxprune.analyze(pruned, run.example)
        record.figures |= {"macs": graph.macs(), "macs_ratio": graph.macs() / case.macs, "params": graph.params()}
        record.figures["before"] = None if how.then == "anew" else run.quality(pruned)
        if how.then == "converge":
            record.figures["search"] = next(n for n in pruned.meta["fxprune"].notes if n.startswith("search"))
        begun = time.perf_counter()
        trained = run.train(stage := f"run {method} {ratio:g}", pruned, case.after(how.then))
        record.seconds["train"] = round(time.perf_counter() - begun, 1)
        run.file(f"{stage}.checkpoint.pt").unlink()
        record.figures[run.metric] = run.quality(trained)
        record.checks["budget"] = over(record)
        return record

    def told(self, record: Record) -> str:
        f, kind = record.figures, self.networks[record.figures["network"]].kind
        if kind.metric not in f:
            return f"{record.name}: {record.checks['budget']}"
        before = "" if f["before"] is None else f"{kind.scale * f['before']:.2f} -> "
        after = f"{kind.scale * f[kind.metric]:.2f} ({kind.axis})"
        return f"{record.name}: {before}{after} at {f['macs_ratio']:.4f}, {sum(record.seconds.values()):.0f} s"

    # -- the page ------------------------------------------------------------------------------------------------------

    def _shown(self, results: Results) -> dict[str, list[Record]]:
        """The records of every network that has some."""
        found = {name: [r for r in results.lines if r.figures["network"] == name] for name in self.networks}
        return {name: records for name, records in found.items() if records}

    def page(self, results: Results) -> Sequence[str]:
        """Rules, tables, verdicts."""
        shown = self._shown(results)
        what = " or ".join(dict.fromkeys(self.networks[name].kind.axis.partition(",")[0] for name in shown))
        parts = [self.rules, results.image(f"{what} over the MACs that stay")]
        for name, of in shown.items():
            about = f"{self.networks[name].about} Seeds: {len({r.figures['seed'] for r in of})}.".strip()
            parts += [f"## {name}", about, self._table(self.networks[name].kind, of), "\n".join(self.verdict(name, of))]
        return parts

    def plot(self, results: Results) -> None:
        """The mean over the MACs that stay, a panel per network: baselines dotted, the peer dashed."""
        from matplotlib.figure import Figure

        networks = self._shown(results)
        across = min(len(networks), 2)
        down = -(-len(networks) // across)
        figure = Figure(figsize=(4.5 * across + 2, 5 * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for panel, (network, records) in zip(panels, networks.items(), strict=False):
            kind = self.networks[network].kind
            for number, (method, how) in enumerate(self.methods.items()):
                of = [r for r in records if r.figures["method"] == method]
                found = {r: qualities(kind, at(of, r)) for r in self.ratios_of(method)}
                means = {ratio: statistics.mean(values) for ratio, values in found.items() if values}
                style = ":" if method in self.baselines else "--" if how.peer else "-"
                panel.plot([*means], [*means.values()], style, marker="o", ms=3, color=f"C{number}", label=method)
            panel.set(title=network, xlabel="MACs that stay, ratio", ylabel=kind.axis, xscale="log")
            panel.set_xticks([*self.ratios, 1.0], [f"{ratio:g}" for ratio in (*self.ratios, 1.0)], minor=False)
            panel.set_xticks([], minor=True)
        for panel in panels[len(networks) :]:
            panel.set_axis_off()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
        figure.savefig(results.plot, dpi=80)

    def _table(self, kind: type[Run], records: Sequence[Record]) -> str:
        """Mean and standard error over seeds, and in brackets what it was before it was trained on."""
        seeds = len({r.figures["seed"] for r in records})
        rows = []
        for method in self.methods:
            if of := [r for r in records if r.figures["method"] == method]:
                used = [r.figures["macs_ratio"] / r.figures["ratio"] for r in of if "macs_ratio" in r.figures]
                share = f"{min(used):.1%} to {max(used):.1%}" if used else "–"
                rows.append([method, *(cell(kind, at(of, r) or at(of, 1.0), seeds) for r in self.ratios), share])
        return table(["method", *(f"{r:.0%} of the MACs" for r in self.ratios), "MACs used of the budget"], rows)


def over(record: Record) -> str:
    """Whether a record's network has more MACs than it should: why it fails, or ""."""
    return "" if record.figures["macs_ratio"] <= record.figures["ratio"] else "more MACs than the budget"


def at(records: Iterable[Record], ratio: float) -> list[Record]:
    return [r for r in records if r.figures["ratio"] == ratio]


def qualities(kind: type[Run], records: Iterable[Record], key: str | None = None) -> list[float]:
    """The metric, in the units of the page; or another figure that is one."""
    key = key or kind.metric
    return [kind.scale * r.figures[key] for r in records if r.figures.get(key) is not None]


def cell(kind: type[Run], records: Sequence[Record], seeds: int) -> str:
    found = qualities(kind, records)
    if not found:
        return "not reached" if records else "–"
    before = qualities(kind, records, "before")
    cut = f" (cut: {statistics.mean(before):.1f})" if before else ""
    return mean_and_error(found) + cut + ("" if len(found) == seeds else f", {len(found)} of {seeds} seeds")


def by_seed(kind: type[Run], records: Iterable[Record]) -> dict[int, float]:
    """The metric of every seed, in the units of the page."""
    return {r.figures["seed"]: kind.scale * r.figures[kind.metric] for r in records if kind.metric in r.figures}
