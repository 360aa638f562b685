"""What the recipes share: arguments, data, stages of training, and what a run leaves behind.

A recipe is a sequence of stages. Each runs in fxprune's own loop, which writes a checkpoint after every epoch; with
``--resume`` the stages that were finished are read back, and the one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR
from torch.utils.data import Subset

import fxprune
from fxprune.errors import InputError, first_line
from fxprune.io.files import check_writable, replacing
from fxprune.io.text import quantity
from fxprune.methods import Hooks, Outcome, Site
from model_zoo import data
from model_zoo.data import Loader
from model_zoo.pictures import Pictures
from model_zoo.records import header
from model_zoo.weights import take_weights

T = TypeVar("T")
Images = Any  # data sets with a length, of pairs

CLASSES = {"cifar10": 10, "cifar100": 100, "mnist": 10, "tiny_imagenet": 200, "imagenet": 1000}
SMOKE_SIDES = {"cifar10": 16, "cifar100": 16, "mnist": 28, "tiny_imagenet": 32, "imagenet": 32}  # pixels
SMOKE_CLASSES = 10
SMOKE_TRAIN, SMOKE_TEST = 512, 64  # images


class Settings(Protocol):
    """How a network is trained."""

    @property
    def epochs(self) -> int: ...

    @property
    def batch(self) -> int: ...

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer: ...

    def schedule(self, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler: ...


S = TypeVar("S", bound=Settings)


def rates(settings: Settings) -> list[float]:
    """The learning rate of every epoch."""
    optimizer = settings.optimizer([nn.Parameter(torch.zeros(1))])
    schedule, found = settings.schedule(optimizer, settings.epochs), []
    for _ in range(settings.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def vector(parameter: Tensor) -> bool:
    """Biases, and the parameters of norms."""
    return parameter.ndim < 2


def vector_or_depthwise(parameter: Tensor) -> bool:
    """These, and depthwise convolutions of images with several channels; optimizers do not know their layers."""
    return vector(parameter) or (parameter.ndim == 4 and parameter.shape[1] == 1 and parameter.shape[2] > 1)


@dataclass(frozen=True)
class Sgd:
    """How a paper trains.

    ``drops``: after which shares of the epochs the rate is divided by ten; None: it falls to zero along a cosine.
    ``spared``: whether a parameter has no weight decay; None: all have. ``warmup``: so many epochs in which the rate
    rises linearly from 0, step by step.
    """

    epochs: int
    batch: int
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    drops: tuple[float, ...] | None = (0.5, 0.75)
    spared: Callable[[Tensor], bool] | None = None
    warmup: int = 0

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        decayed: list[Tensor] = []
        others: list[Tensor] = []
        for parameter in parameters:
            (others if self.spared is not None and self.spared(parameter) else decayed).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decayed}]
        if others:
            groups.append({"params": others, "weight_decay": 0.0})
        return torch.optim.SGD(
            groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )

    def schedule(self, optimizer: torch.optim.Optimizer, epochs: int, steps: int = 1) -> LRScheduler:
        """The rate, stepped once per epoch; with a warm-up so many times."""
        if self.drops is None:
            return CosineAnnealingLR(optimizer, epochs)
        ends = sorted({max(1, round(epochs * share)) for share in self.drops})
        if not self.warmup:
            return MultiStepLR(optimizer, ends)
        whole = self.warmup * steps
        return LambdaLR(optimizer, lambda n: min(1, n / whole) / 10 ** sum(n >= end * steps for end in ends))


def scheduled(settings: Settings, batches: Loader) -> dict[str, Any]:
    """The schedule of a loop over these batches, stepped after each where there is a warm-up, else after an epoch."""
    if isinstance(settings, Sgd) and settings.warmup:
        return {"schedule": partial(settings.schedule, steps=len(batches)), "per_step": True}
    return {"schedule": settings.schedule}


@dataclass(frozen=True)
class AdamW:
    """How vision transformers train: the rate falls to zero along a cosine, epoch by epoch."""

    epochs: int
    batch: int
    lr: float = 1e-3
    weight_decay: float = 0.05

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def schedule(self, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler:
        return CosineAnnealingLR(optimizer, epochs)


@dataclass(frozen=True)
class Plain:
    """A method that trains and cuts nothing: fxprune's loop, with its checkpoints, for networks as they are."""

    def attach(self, site: Site) -> Hooks:
        return _Plain(site)


class _Plain(Hooks):
    for_any_budget = True

    def __init__(self, site: Site):
        self._site = site

    def trained(self) -> Iterable[nn.Parameter]:
        return self._site.model.parameters()

    def outcome(self) -> Outcome:
        return Outcome([np.zeros(group.channels.shape) for group in self._site.graph.groups])


PLAIN = Plain()


# -- arguments ---------------------------------------------------------------------------------------------------------


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of all recipes; the description is the recipe's docstring."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--data", type=Path, metavar="DIR", help="the data set, as torchvision has it, or folders train/CLASS/*.jpg")
    add("--weights", type=readable, metavar="FILE", help="of the dense network, trained: they take the place of that")
    add("--smoke", action="store_true", help="the same code in seconds: a narrow network, two batches of drawn images")
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="for results and checkpoints (default: runs)")
    add("--resume", action="store_true", help="continue from the checkpoints of the same run")
    add("--seed", type=whole, default=0)
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action="store_true", help="train in mixed precision; the papers did not")
    add("--workers", type=whole, default=0, help="processes that read images")
    add("--baseline", action=argparse.BooleanOptionalAction, default=True, help="train the dense network, too")
    return result


def share(text: str) -> float:
    """An argument between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive(text: str) -> int:
    """An argument that counts, from 1."""
    return _at_least(1, text)


def whole(text: str) -> int:
    """An argument that counts, from 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
    return value


def readable(text: str) -> Path:
    """An argument that names a file."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def writable(text: str) -> Path:
    """An argument that names a file to be written."""
    try:
        return check_writable(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device(text: str) -> str:
    """An argument that names a device of this machine."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # no such name; no such device, or torch was built without
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {first_line(error)}") from error
    return text


def start(recipe: str, arguments: argparse.ArgumentParser, options: argparse.Namespace, held: int = 0) -> Run:
    """The run with these options, which name the ``dataset``; what cannot be used ends the program with exit code 2.

    ``held``: so many training images are to be held out.
    """
    if options.smoke:
        train, test = _drawn(options.dataset)
    elif options.data is None:
        arguments.error(f"pass --data DIR, where {options.dataset} is, or --smoke for a run of seconds without it")
    else:
        try:
            train, test = data.load(options.dataset, options.data)
        except (OSError, ValueError) as error:
            arguments.error(str(error))
        if (count := len(train)) <= held:  # type: ignore[arg-type]
            arguments.error(f"{options.data} has {count} training images, of which {held} are to be held out")
    try:
        return Run(recipe, options, train, test)
    except OSError as error:
        arguments.error(f"nothing can be written to --out {options.out}: {error.strerror or error}")


def _drawn(dataset: str) -> tuple[Images, Images]:
    side = SMOKE_SIDES[dataset]
    if dataset == "mnist":
        return data.digits(side)
    return data.glyphs(SMOKE_TRAIN, side, SMOKE_CLASSES), data.glyphs(SMOKE_TEST, side, SMOKE_CLASSES, seed=1)


# -- images ------------------------------------------------------------------------------------------------------------


def transformed(images: Images, transform: Any) -> Images:
    """The same images, given by ``transform``; drawn ones are as they are."""
    result: Any = copy.copy(images)
    if hasattr(result, "transform"):
        result.transform = transform
    return result


def split(images: Images, held: Sequence[int], test: Images) -> tuple[Images, Images]:
    """Those that are not held out, and those at ``held``, neither cropped nor mirrored but as the test images are."""
    if isinstance(images, Pictures):
        chosen = torch.zeros(len(images), dtype=torch.bool)
        chosen[list(held)] = True
        return images.part((~chosen).nonzero()[:, 0]), images.plain().part(list(held))
    out = set(held)
    rest = [i for i in range(len(images)) if i not in out]
    return Subset(images, rest), Subset(transformed(images, getattr(test, "transform", None)), held)


# -- a run -------------------------------------------------------------------------------------------------------------


ANYWHERE = {
    "data",
    "out",
    "resume",
    "device",
    "amp",
    "workers",
    "baseline",
    "smoke",
    "until",
    "channels_last",
}  # what results do not depend on


def _word(setting: tuple[str, Any]) -> str:
    """A setting in the name of a folder."""
    name, value = setting
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return value if isinstance(value, str) else f"{name}{value}"


class Run:
    """One run of a recipe: its options, its data, and the stages it is made of.

    Of classifiers: ``loss`` and ``metric`` say what they are trained for and measured by; in figures it is ``axis``,
    multiplied by ``scale``.
    """

    loss: Callable[[Any, Any], Tensor] | None = None
    metric = "accuracy"
    axis, scale = "accuracy, %", 100.0
    progress = True  # whether trainings are told about on stderr

    def __init__(self, recipe: str, options: argparse.Namespace, train: Images, test: Images):
        self.options, self.device = options, torch.device(options.device)
        self.images, self.test = (p.to(self.device) if isinstance(p, Pictures) else p for p in (train, test))
        self.example: Tensor = train[0][0][None].to(self.device)
        self._recipe, self._seconds = recipe, dict[str, float]()
        first = {name: value for name in ("dataset", "network") if (value := vars(options).get(name))}
        given = {name: value for name, value in vars(options).items() if value is not None}
        self._settings = first | {name: value for name, value in given.items() if name not in ANYWHERE}
        self._weights: Path | None = given.get("weights")
        if self._weights is not None:
            self._settings["weights"] = self._weights.stem
        self._folder = options.out / "-".join([recipe, *map(_word, self._settings.items()), *self.pick([], ["smoke"])])
        self._folder.mkdir(parents=True, exist_ok=True)

    def pick(self, paper: T, smoke: T) -> T:
        """What the paper has, or what a smoke run has instead."""
        return smoke if self.options.smoke else paper

    def shortened(self, settings: S) -> S:
        short: Any = settings
        return self.pick(settings, replace(short, epochs=1))

    def network(self, make: Callable[..., nn.Module], **options: Any) -> nn.Module:
        """A network with the weights of the seed."""
        self.reseed()
        classes = self.pick(CLASSES[self.options.dataset], SMOKE_CLASSES)
        return make(num_classes=classes, in_channels=self.example.shape[1], **options).to(self.device)

    def takes_weights(self, model: nn.Module) -> bool:
        """Give the network the weights of ``--weights``; False where there are none.

        Raises:
            SystemExit: they do not fit.
        """
        if self._weights is None:
            return False
        try:
            take_weights(model, self._weights, "*")
        except (OSError, ValueError) as error:
            raise SystemExit(f"--weights: {error}") from error
        return True

    def reseed(self) -> None:
        torch.manual_seed(self.options.seed)

    def batches(self, batch: int, images: Images | None = None, others: Images | None = None) -> tuple[Loader, Loader]:
        """Of the training images, in a new order in every epoch, and of the test images; or of others."""
        train, test = images or self.images, others or self.test
        return data.loaders(train, test, batch, self.options.seed, self.options.workers)

    def loop(self, stage: str, **settings: Any) -> fxprune.Loop:
        """The loop of a stage, with its checkpoint."""
        checkpoint = self.file(f"{stage}.checkpoint.pt")
        resume = checkpoint if self.options.resume and checkpoint.exists() else None
        return fxprune.Loop(device=self.device, amp=self.options.amp, checkpoint=checkpoint, resume=resume, **settings)

    def train(self, stage: str, model: nn.Module, settings: Settings, method: Any = PLAIN) -> fx.GraphModule:
        """The network after a training on all training images; ``method`` takes part in it and cuts nothing."""
        batches = self.batches(settings.batch)[0]
        loop = self.loop(stage, optimizer=settings.optimizer, **scheduled(settings, batches))
        with self.timed(stage):
            trained: fx.GraphModule = fxprune.prune(
                model, self.example, method=method, channels=1.0, data=batches,
                epochs=settings.epochs, seed=self.options.seed, verify=False, loss_fn=self.loss,
                progress=self.progress, options=fxprune.Options(loop=loop),
            )  # fmt: skip
        return trained

    def baseline(self, model: nn.Module, settings: Settings) -> dict[str, Any]:
        """The figures of the dense network, trained unless ``--no-baseline`` or ``--weights``."""
        if self.takes_weights(model):
            return self.figures(model)
        if not self.options.baseline:
            return self.figures(model) | {self.metric: None}
        return self.figures(self.train("baseline", model, settings))

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """MACs of one image, parameters, and the metric on the test images."""
        graph = fxprune.analyze(model, self.example)
        return {"macs": graph.macs(), "params": graph.params(), self.metric: self.quality(model)}

    def quality(self, model: nn.Module) -> float:
        """The metric on the test images."""
        return self.accuracy(model)

    def told(self, quality: float) -> str:
        """The metric for people."""
        return f"accuracy {quality:.2%}"

    def accuracy(self, model: nn.Module, batch: int = 256) -> float:
        """The share of test images whose class the network finds."""
        right, count = torch.zeros((), dtype=torch.int64, device=self.device), 0
        model.eval()
        with torch.no_grad():
            for images, labels in self.batches(batch)[1]:
                found = model(images.to(self.device)).argmax(1)
                right += (found == labels.to(self.device)).sum()
                count += len(labels)
        return int(right) / count

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._seconds[stage] = round(time.perf_counter() - begun, 1)

    # -- what it leaves behind -----------------------------------------------------------------------------------------

    def file(self, name: str) -> Path:
        """In the run's own folder: runs with other settings leave it alone."""
        return self._folder / name

    def keep(self, plan: fxprune.PruningPlan, trained: nn.Module, name: str = "pruned") -> None:
        """The plan, for ``fxprune.apply``, and the weights to load into what that returns."""
        plan.save(self.file(f"{name}.plan.json"))
        with replacing(self.file(f"{name}.pt")) as draft:
            torch.save({key: value.cpu() for key, value in trained.state_dict().items()}, draft)

    def result(self, dense: dict[str, Any], pruned: dict[str, Any], **others: Any) -> None:
        """One more line in ``results.jsonl``, and a summary on stdout.

        A run that is resumed comes once more to what it had found before: that is in the file already.
        """
        line = {
            "recipe": self._recipe,
            "smoke": self.options.smoke,
            **self._settings,
            "dense": dense,
            **others,
            "pruned": pruned,
            "seconds": dict(self._seconds),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "versions": header(f"python -m model_zoo.recipes.{self._recipe}"),
        }
        file = self.options.out / "results.jsonl"
        if not (self.options.resume and _found(line) in (_found(json.loads(told)) for told in _lines(file))):
            with file.open("a") as opened:
                opened.write(json.dumps(line) + "\n")
        for name, figures in (("dense", dense), ("pruned", pruned)):
            quality = "not trained" if figures[self.metric] is None else self.told(figures[self.metric])
            print(f"{name:<8}{quantity(figures['macs'])} MACs, {quantity(figures['params'])} parameters, {quality}")


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _found(line: dict[str, Any]) -> str:
    """What a line of results says, but for how long it took, where, and by which versions."""
    return json.dumps({name: value for name, value in line.items() if name not in ("seconds", "device", "versions")})
