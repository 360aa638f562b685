"""The built-in training loop: for people who have none, and for ``fxprune.prune``."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fxprune.errors import InputError, ModelError
from fxprune.files import replacing
from fxprune.training.batches import Loss, correct, examples, loss_of
from fxprune.training.distributed import is_first, process_count, summed
from fxprune.training.learner import Training

_FORMAT = 1


@dataclass(frozen=True)
class Loop:
    """Settings of the built-in loop.

    Args:
        optimizer: makes the optimizer from the parameters that the method trains; None: that of the method's paper.
        schedule: makes the schedule from the optimizer and the number of epochs, stepped once per epoch; None: that of
            the method's paper for the method's own optimizer, a constant rate for yours.
        validation: batches ``(inputs, target)`` to evaluate on after every epoch.
        device: where to train; None: where the model is.
        amp: automatic mixed precision, float16 with loss scaling on CUDA, bfloat16 elsewhere.
        clip: largest norm of all gradients together.
        checkpoint: written after every epoch; ``resume=`` continues from it.
    """

    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler | None] | None = None
    validation: Any = None
    device: torch.device | str | None = None
    amp: bool = False
    clip: float | None = None
    checkpoint: str | Path | None = None


def fit(
    training: Training,
    data: Any,
    loss_fn: Loss | None,
    epochs: int,
    loop: Loop,
    *,
    resume: str | Path | None = None,
    progress: bool = True,
) -> None:
    """Train to the end of the last epoch.

    With ``torch.distributed`` gradients are averaged over the processes; give every one its share of the data.

    Raises:
        InputError: data, loss or checkpoint cannot be used.
        ModelError: the loss is not finite; the checkpoint of the last epoch is kept.
    """
    run = _Run(training, data, loss_fn, epochs, loop)
    if resume is not None:
        run.load(Path(resume))
    with _Bar(epochs, progress and is_first()) as bar:
        run.train(bar)


class _Run:
    def __init__(self, training: Training, data: Any, loss_fn: Loss | None, epochs: int, loop: Loop):
        self._training, self._data, self._loss_fn = training, data, loss_fn
        self._epochs, self._loop = epochs, loop
        self._epoch = 0
        hooks, model = training.hooks, training.model
        first = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._device = torch.device(loop.device) if loop.device is not None else first
        model.to(self._device)
        if loop.optimizer is None:
            self._optimizer = hooks.optimizer()
        else:
            self._optimizer = loop.optimizer([p for p in hooks.trained() if p.requires_grad])
        if loop.schedule is not None:
            self._schedule = loop.schedule(self._optimizer, epochs)
        else:
            self._schedule = hooks.schedule(self._optimizer, epochs) if loop.optimizer is None else None
        half = loop.amp and self._device.type == "cuda"
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=half)
        self._half = torch.float16 if half else torch.bfloat16

    def train(self, bar: _Bar) -> None:
        while self._epoch < self._epochs:
            loss, accuracy = self._train_epoch(bar)
            if self._schedule is not None:
                self._schedule.step()
            if self._loop.validation is not None:
                loss, accuracy = self._evaluate()
            self._training.hooks.after_epoch(-loss if accuracy is None else accuracy)
            self._epoch += 1
            bar.told(loss, accuracy, _remaining(self._training))
            if self._loop.checkpoint is not None and is_first():
                self._save(Path(self._loop.checkpoint))

    def _train_epoch(self, bar: _Bar) -> tuple[float, float | None]:
        training, model = self._training, self._training.model
        model.train()
        totals, batches = _Totals(), None
        with suppress(TypeError):
            batches = len(self._data)
        bar.begins(self._epoch, batches)
        for number, (args, kwargs, target) in enumerate(examples(self._data, self._device)):
            self._optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                output = model.forward(*args, **kwargs)
                loss = loss_of(self._loss_fn, output, target, number)
                total = training.loss(loss)
            if not bool(torch.isfinite(total)):
                raise ModelError(self._not_finite(float(total.detach()), number))
            self._scaler.scale(total).backward()
            self._scaler.unscale_(self._optimizer)
            self._average_gradients()
            training.after_backward()
            if self._loop.clip is not None:
                nn.utils.clip_grad_norm_(
                    [p for g in self._optimizer.param_groups for p in g["params"]], self._loop.clip
                )
            self._scaler.step(self._optimizer)
            self._scaler.update()
            training.after_step()
            totals.add(loss, output, target)
            bar.advanced(totals)
        return totals.result()

    def _evaluate(self) -> tuple[float, float | None]:
        model, totals = self._training.model, _Totals()
        model.eval()
        with torch.no_grad(), self._autocast():
            batches = examples(self._loop.validation, self._device, "validation")
            for number, (args, kwargs, target) in enumerate(batches):
                output = model.forward(*args, **kwargs)
                totals.add(loss_of(self._loss_fn, output, target, number), output, target)
        return totals.result()

    def _autocast(self) -> Any:
        return torch.autocast(self._device.type, self._half) if self._loop.amp else nullcontext()

    def _average_gradients(self) -> None:
        """One mean over all processes; the same in every one of them, so that they stay together."""
        count = process_count()
        if count == 1:
            return
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= count

    def _not_finite(self, loss: float, number: int) -> str:
        kept = "no checkpoint was asked for (Loop(checkpoint=...))"
        path = self._loop.checkpoint
        if path is not None and Path(path).exists():
            kept = f"the checkpoint of the last good epoch is {path}"
        return (
            f"The loss is {loss} at step {number + 1} of epoch {self._epoch + 1}: training stopped, and {kept}. Lower "
            "the learning rate, clip the gradients (Loop(clip=1.0)), or look at the data of that step."
        )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, path: Path) -> None:
        state = {
            "fxprune_checkpoint": _FORMAT,
            "epoch": self._epoch,
            "model": self._training.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "method": self._training.hooks.state_dict(),
            "random": _random_state(self._data),
        }
        with replacing(path) as draft:
            torch.save(state, draft)

    def load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self._device, weights_only=True)
        except OSError as error:
            raise InputError(f"The checkpoint {path} cannot be read: {error.strerror or error}.") from error
        except Exception as error:
            raise InputError(f"The checkpoint {path} is damaged or none: {error}.") from error
        if not isinstance(state, Mapping) or state.get("fxprune_checkpoint") != _FORMAT:
            raise InputError(f"{path} is no checkpoint that fxprune's training loop wrote.")
        try:
            self._training.model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"The checkpoint {path} belongs to another model or method: {error}.") from error
        if self._schedule is not None and state["schedule"] is not None:
            self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self._training.hooks.load_state_dict(state["method"])
        self._epoch = state["epoch"]
        _set_random_state(state["random"], self._data)


class _Totals:
    """Loss and accuracy over batches; with several processes over all of them."""

    def __init__(self) -> None:
        self._sums = np.zeros(4)  # loss, batches, correct, labels

    def add(self, loss: Tensor, output: Any, target: Any) -> None:
        hits = correct(output, target)
        self._sums += (float(loss.detach()), 1, *(hits or (0, 0)))

    @property
    def here(self) -> tuple[float, float | None]:
        loss, count, right, labels = self._sums
        return loss / max(count, 1), right / labels if labels else None

    def result(self) -> tuple[float, float | None]:
        (self._sums,) = summed([self._sums])
        return self.here


def _remaining(training: Training) -> float | None:
    """MACs of the channels that still count, as a ratio of the dense model's."""
    alive = training.hooks.alive()
    if alive is None:
        return None
    return training.graph.macs(alive) / max(training.graph.macs(), 1)


def _generator(data: Any) -> torch.Generator | None:
    found = getattr(data, "generator", None)
    return found if isinstance(found, torch.Generator) else None


def _random_state(data: Any) -> dict[str, Any]:
    generator = _generator(data)
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], *rest],
        "loader": None if generator is None else generator.get_state(),
    }


def _set_random_state(state: Mapping[str, Any], data: Any) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    generator = _generator(data)
    if generator is not None and state["loader"] is not None:
        generator.set_state(state["loader"].cpu())


class _Bar:
    """Progress on stderr: epoch, loss, accuracy, remaining MACs."""

    def __init__(self, epochs: int, shown: bool):
        self._epochs = epochs
        self._macs = ""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            disable=not shown,
            transient=True,
        )
        self._task = self._progress.add_task("", figures="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begins(self, epoch: int, batches: int | None) -> None:
        self._progress.reset(self._task, total=batches, description=f"epoch {epoch + 1}/{self._epochs}")

    def advanced(self, totals: _Totals) -> None:
        self._progress.update(self._task, advance=1, figures=_figures(*totals.here) + self._macs)

    def told(self, loss: float, accuracy: float | None, remaining: float | None) -> None:
        self._macs = "" if remaining is None else f", {remaining:.0%} of MACs left"
        self._progress.update(self._task, figures=_figures(loss, accuracy) + self._macs)


def _figures(loss: float, accuracy: float | None) -> str:
    return f"loss {loss:.4f}" + ("" if accuracy is None else f", accuracy {accuracy:.2%}")
