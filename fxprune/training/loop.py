"""The built-in training loop: for people who have none, and for ``fxprune.prune``."""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.arguments import check_loader, length_of
from fxprune.errors import FxpruneError, InputError, ModelError, first_line
from fxprune.io.files import check_writable
from fxprune.options import Loop
from fxprune.recording.inputs import device_of
from fxprune.training import checkpoint
from fxprune.training.batches import (
    LateLabels,
    Loss,
    begin_epoch,
    correct,
    examples,
    loss_of,
    output_of,
)
from fxprune.training.distributed import average, gathered, in_step, is_first, process_count, rank, share, summed
from fxprune.training.learner import Training
from fxprune.training.randomness import random_state, set_random_state


@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    training: Training,
    data: Any,
    loss_fn: Loss | None,
    epochs: int,
    loop: Loop,
    *,
    progress: bool = True,
) -> None:
    """Train to the end of the last epoch, or until the method is done.

    See ``Loop`` for what is promised of interruptions and several processes.

    Raises:
        InputError: data, loss or checkpoint cannot be used.
        ModelError: the loss or a weight is not finite; the checkpoint of the last good epoch is kept.
    """
    check_loader(data)
    if loop.checkpoint is not None and is_first():
        check_writable(loop.checkpoint)
    run = _Run(training, data, loss_fn, epochs, loop)
    if loop.resume is not None:
        run.resume(Path(loop.resume))
    with _Bar(epochs, progress and is_first()) as bar:
        run.train(bar)


class _Run:
    def __init__(self, training: Training, data: Any, loss_fn: Loss | None, epochs: int, loop: Loop):
        self._training, self._data, self._loss_fn = training, data, loss_fn
        self._epochs, self._loop = epochs, loop
        self._epoch = 0
        self._kept: Path | None = None  # the checkpoint of the last epoch
        hooks, model = training.hooks, training.model
        first = device_of(model)
        self._device = torch.device(loop.device) if loop.device is not None else first
        model.to(self._device)
        if not any(p.requires_grad for p in model.parameters()):
            raise ModelError(f"{training.method} trains, and all parameters are frozen (requires_grad=False).")
        share([*model.parameters(), *model.buffers()])
        if loop.optimizer is None:
            self._optimizer = hooks.optimizer()
        else:
            made: Any = loop.optimizer([p for p in hooks.trained() if p.requires_grad])
            if not isinstance(made, torch.optim.Optimizer):
                raise InputError(f"optimizer= made a {type(made).__name__}; it must make a torch.optim.Optimizer.")
            _check_steps("optimizer", made)
            self._optimizer = made
        if loop.schedule is not None:
            self._schedule = loop.schedule(self._optimizer, epochs)
            if self._schedule is not None:
                _check_steps("schedule", self._schedule)
        else:
            self._schedule = hooks.schedule(self._optimizer, epochs) if loop.optimizer is None else None
        hooks.begins(self._optimizer, epochs)
        half = loop.amp and self._device.type == "cuda"
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=half)
        self._half = torch.float16 if half else torch.bfloat16

    def train(self, bar: _Bar) -> None:
        while self._epoch < self._epochs and not self._training.done:
            loss, accuracy = self._train_epoch(bar)
            share(self._training.model.buffers())
            if not self._loop.per_step:
                self._step_schedule()
            if self._loop.validation is not None:
                loss, accuracy = self._evaluate()
            self._training.after_epoch(-loss if accuracy is None else accuracy)
            self._epoch += 1
            bar.told(loss, accuracy, _remaining(self._training))
            if self._loop.checkpoint is not None:
                self._save(Path(self._loop.checkpoint))

    def _train_epoch(self, bar: _Bar) -> tuple[float, float | None]:
        training, model = self._training, self._training.model
        model.train()
        looks = steps_between_looks(self._device)
        totals, number = _Totals(late=looks > 1), 0
        bar.begins(self._epoch, length_of(self._data))
        begin_epoch(self._data, self._epoch)
        for number, batch in enumerate(in_step(examples(self._data, self._device))):
            self._optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                output = output_of(model, batch, number)
                loss = loss_of(self._loss_fn, output, batch[-1], number, late=totals.labels)
                total = training.loss(loss)
            totals.add(loss, output, batch[-1], total)
            if totals.waiting == looks:
                self._look(totals)
            self._scaler.scale(total).backward()
            average(p.grad for p in self._optimized() if p.grad is not None)  # then all find the same infinities
            self._scaler.unscale_(self._optimizer)
            training.after_backward()
            if self._loop.clip is not None:
                nn.utils.clip_grad_norm_(self._optimized(), self._loop.clip)
            if self._step_optimizer(number):
                if self._loop.per_step:
                    self._step_schedule()
                training.after_step(self._optimizer)
            bar.advanced(totals)
            if training.done:
                break
        self._look(totals)
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ModelError(self._stopped(f"{name} holds NaN or inf, though the loss is finite,", "step", number))
        return totals.result()

    def _evaluate(self) -> tuple[float, float | None]:
        model, totals = self._training.model, _Totals(late=steps_between_looks(self._device) > 1)
        model.eval()
        with torch.no_grad(), self._autocast():
            for number, batch in enumerate(examples(self._loop.validation, self._device, "validation")):
                output = output_of(model, batch, number, "validation")
                loss = loss_of(self._loss_fn, output, batch[-1], number, "validation", totals.labels)
                totals.add(loss, output, batch[-1])
        self._look(totals, "validation batch")
        return totals.result()

    def _step_optimizer(self, number: int) -> bool:
        """Whether it was taken: where the scaled gradients overflow it is left out, and the scale falls."""
        scale = self._scaler.get_scale()
        try:
            self._scaler.step(self._optimizer)
        except FxpruneError:
            raise
        except Exception as error:  # of any kind, such as sparse gradients where it takes dense ones
            raise InputError(
                f"{type(self._optimizer).__name__} cannot step at step {number + 1} of epoch {self._epoch + 1}: "
                f"{first_line(error)}. Another optimizer is Loop(optimizer=...)."
            ) from error
        self._scaler.update()
        return self._scaler.get_scale() >= scale

    def _step_schedule(self) -> None:
        if self._schedule is not None:
            try:
                self._schedule.step()
            except Exception as error:  # of any kind, such as a cycle that is shorter than the training
                when = "step of the optimizer" if self._loop.per_step else "epoch"
                raise InputError(
                    f"The schedule cannot be stepped at epoch {self._epoch + 1} of {self._epochs}: {error}. It is "
                    f"stepped after every {when}."
                ) from error

    def _look(self, totals: _Totals, what: str = "step") -> None:
        """Refuse what is not finite among the batches that nobody has looked at."""
        found = totals.look()
        if found is not None:
            raise ModelError(self._stopped(f"The loss is {found[1]}", what, found[0]))

    def _autocast(self) -> Any:
        return torch.autocast(self._device.type, self._half) if self._loop.amp else nullcontext()

    def _optimized(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _stopped(self, found: str, what: str, number: int) -> str:
        kept = "no checkpoint was asked for (Loop(checkpoint=...))"
        if self._kept is not None:
            kept = f"the checkpoint of the last good epoch is {self._kept}"
        elif self._loop.checkpoint is not None:
            kept = "no epoch was complete, so there is no checkpoint"
        return (
            f"{found} at {what} {number + 1} of epoch {self._epoch + 1}: training stopped, and {kept}. Lower the "
            "learning rate, clip the gradients (Loop(clip=1.0)), or look at the data of that "
            f"{what.rpartition(' ')[2]}."
        )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def _made_by(self) -> dict[str, Any]:
        return {
            "method": self._training.method,
            **self._training.settings,
            "optimizer": type(self._optimizer).__name__,
            "schedule": "none" if self._schedule is None else type(self._schedule).__name__,
            "epochs": self._epochs,
            "processes": process_count(),
        }

    def _save(self, path: Path) -> None:
        state = {
            "made_by": self._made_by,
            "epoch": self._epoch,
            "model": self._training.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "method": self._training.hooks.state_dict(),
            "random": gathered(random_state(self._data, self._loop.validation)),
        }
        if is_first():
            checkpoint.save(path, state)
        self._kept = path

    def resume(self, path: Path) -> None:
        state = checkpoint.load(path, self._device)
        model = self._training.model
        checkpoint.check_fits(path, state, self._made_by, model.state_dict())
        for what, owner in (
            ("optimizer", self._optimizer),
            ("model", model),
            ("schedule", self._schedule),
            ("scaler", self._scaler),
            ("method", self._training.hooks),
        ):
            if owner is not None:
                with checkpoint.taking_up(path, what):
                    owner.load_state_dict(state[what])
        with checkpoint.taking_up(path, "random numbers"):
            set_random_state(state["random"][rank()], self._data, self._loop.validation)
        self._epoch, self._kept = state["epoch"], path


def _check_steps(name: str, made: Any) -> None:
    """Refuse what the loop cannot step: it gives neither a closure nor a figure.

    Raises:
        InputError: says what was made.
    """
    if not callable(step := getattr(made, "step", None)):
        raise InputError(f"{name}= made a {type(made).__name__}, which has no step().")
    try:
        inspect.signature(step).bind()
    except TypeError as error:
        raise InputError(
            f"{name}= made a {type(made).__name__}, whose step() the loop cannot call: {error}. It calls it without "
            "arguments."
        ) from error


def steps_between_looks(device: torch.device) -> int:
    """How many steps go by before the figures of them are read: to read one waits for all that a GPU has to do."""
    return 1 if device.type == "cpu" else 32


class _Totals:
    """Loss and accuracy over batches; with several processes over all of them.

    ``labels``: what ``loss_of`` is to put labels into, with ``late``. ``waiting``: batches that were not looked at.
    """

    def __init__(self, late: bool) -> None:
        self._sums = np.zeros(4)  # loss, batches, correct, labels
        self._new: list[tuple[Tensor, ...]] = []  # loss, what is trained for, correct
        self._counts: list[int] = []  # labels of these
        self.labels: list[LateLabels] | None = [] if late else None

    @property
    def waiting(self) -> int:
        return len(self._new)

    def add(self, loss: Tensor, output: Any, target: Any, total: Tensor | None = None) -> None:
        """One batch; ``total``: the loss that is trained for, which must be finite."""
        hits, count = correct(output, target) or (loss.new_zeros(()), 0)
        figures = (loss, loss if total is None else total, hits)
        self._new.append(tuple(figure.detach().double().reshape(()) for figure in figures))
        self._counts.append(count)

    def look(self) -> tuple[int, float] | None:
        """Read what has been added; of the first batch whose loss is not finite the number, from 0, and the loss.

        Raises:
            InputError: a label is out of range.
        """
        labels, new = self.labels or [], self._new
        if not new:
            return None
        parts = [torch.stack([torch.stack(figures) for figures in new]).reshape(-1)]
        parts += [torch.stack([found.any.double(), found.first.double()]) for found in labels]
        values = torch.cat(parts).cpu().numpy()
        figures, pairs = np.split(values, [3 * len(new)])
        for found, (bad_label, first) in zip(labels, pairs.reshape(-1, 2), strict=True):
            found.check(bool(bad_label), int(first))
        figures = figures.reshape(-1, 3)
        bad = np.flatnonzero(~np.isfinite(figures[:, 1]))
        if len(bad):
            return int(self._sums[1] + bad[0]), float(figures[bad[0], 1])
        self._sums += (figures[:, 0].sum(), len(new), figures[:, 2].sum(), sum(self._counts))
        for read in (new, labels, self._counts):
            read.clear()
        return None

    @property
    def here(self) -> tuple[float, float | None]:
        """Of what has been looked at."""
        loss, count, right, labels = self._sums.tolist()
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


class _Bar:
    """Progress on stderr: a bar on a terminal, and a line for every epoch with loss, accuracy and remaining MACs."""

    def __init__(self, epochs: int, shown: bool):
        self._epochs, self._shown = epochs, shown
        self._epoch = self._macs = ""
        self._progress: Any = _drawn() if shown and sys.stderr.isatty() else None
        self._task = None if self._progress is None else self._progress.add_task("", figures="")

    def __enter__(self) -> _Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begins(self, epoch: int, batches: int | None) -> None:
        self._epoch = f"epoch {epoch + 1}/{self._epochs}"
        if self._progress is not None:
            self._progress.reset(self._task, total=batches, description=self._epoch)

    def advanced(self, totals: _Totals) -> None:
        if self._progress is not None:
            self._progress.update(self._task, advance=1, figures=_figures(*totals.here) + self._macs)

    def told(self, loss: float, accuracy: float | None, remaining: float | None) -> None:
        self._macs = "" if remaining is None else f", {remaining:.0%} of MACs left"
        line = f"fxprune: {self._epoch}: {_figures(loss, accuracy)}{self._macs}"
        if self._progress is not None:
            self._progress.console.print(line, soft_wrap=True)
        elif self._shown:
            print(line, file=sys.stderr, flush=True)


def _drawn() -> Any:
    """A bar for a terminal, or None where rich is not installed: the lines say the same."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        return None
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"), console=Console(stderr=True, highlight=False), transient=True,
    )  # fmt: skip


def _figures(loss: float, accuracy: float | None) -> str:
    return f"loss {loss:.4f}" + ("" if accuracy is None else f", accuracy {accuracy:.2%}")
