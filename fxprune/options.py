"""What people ask for: the records that ``prune``, ``attach``, ``prune_submodule`` and the command line share.

Every field is checked once, whoever fills it in (see ``arguments``). One with a ``Flag`` is an option of the command
line as well, under its own name and with the first sentence that its record's docstring has for it, so that adding one
touches this file alone. Nothing here imports torch: ``fxprune --help`` answers at once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fxprune.arguments import (
    OPTIMIZER,
    SCHEDULE,
    Checked,
    Flag,
    anything,
    as_checkpoint,
    as_depth,
    as_device,
    as_file,
    as_flag,
    as_loader,
    as_loss,
    as_maker,
    as_multiple,
    as_positive,
    as_provider,
    as_shares,
    as_whole,
    by_pattern,
    check_ratio,
    multiple_in,
    one_of,
    option,
    or_none,
    share_in,
)
from fxprune.errors import InputError, suggestion

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler

Scope = Literal["global", "uniform", "isomorphic"]
Attention = Literal["head_dim", "uneven", "heads"]
RoundTo = int | Literal["auto", "measured"]

BUDGET = "budget, one of (a ratio above 0 and at most 1)"
TIMING = "budget of latency"
CHOICE = "which channels"
TRAINING = "data and training"
PROOF = "proof"


def _settings(name: str, value: Any) -> Loop:
    if not isinstance(value, Loop):
        raise InputError(f"loop= is a {type(value).__name__}; pass settings such as fxprune.Loop(amp=True).")
    return value


def _latency(name: str, value: Any) -> LatencyBudget:
    return value if isinstance(value, LatencyBudget) else LatencyBudget(value)


# -- records -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatencyBudget(Checked):
    """A budget of latency, and how it is measured.

    Args:
        ratio: the time of a run that stays, as a ratio of the dense model's in (0, 1].
        provider: onnxruntime's execution provider (CUDA if that works here, else the CPU), or openvino, or PyTorch
            itself where the model is: eager, or compiled by inductor.
        threads: of the processor (as many as the library takes if not given: onnxruntime one for every core).
        batch: batch size of the runs (that of the example inputs if not given).
        joins: let layers choose what they read of a stream that several others add to, where the measured kernels say
            that the copy costs less than it saves, and more of the scores stays than without.

    Raises:
        InputError: a setting that cannot be used.

    Examples:
        >>> budget = fxprune.LatencyBudget(0.5, provider="CPUExecutionProvider", threads=4, batch=8)
        >>> how = {"latency": budget}  # fxprune.prune(model, x, latency=budget)
    """

    ratio: float = field(metadata=option(lambda name, value: check_ratio("latency", value)))
    provider: str | None = field(default=None, metadata=option(or_none(as_provider), Flag(TIMING, "NAME")))
    threads: int | None = field(default=None, metadata=option(or_none(as_whole(1)), Flag(TIMING, "N", int)))
    batch: int | None = field(default=None, metadata=option(or_none(as_whole(1)), Flag(TIMING, "N", int)))
    joins: bool = field(default=False, metadata=option(as_flag, Flag(TIMING)))


@dataclass(frozen=True)
class Loop(Checked):
    """Settings of the built-in training loop.

    Args:
        optimizer: makes the optimizer from the parameters that the method trains. None: that of the method's paper.
        schedule: makes the schedule from the optimizer and the number of epochs. It is stepped once per epoch. None:
            that of the method's paper for the method's own optimizer, a constant rate for yours.
        per_step: step your schedule after every step of the optimizer instead, as a warm-up wants it.
        validation: batches ``(inputs, target)`` to evaluate on after every epoch.
        device: where to train (where the model is if not given).
        amp: automatic mixed precision, float16 with loss scaling on CUDA, bfloat16 elsewhere.
        clip: largest norm of all gradients together.
        checkpoint: written after every epoch, for ``resume``.
        resume: a checkpoint to continue from, with the same result as without the interruption. Another budget is an
            error where the method trains for one, as DHP and GSM do.

    A run that is resumed gives the same result, bit for bit, as one without an interruption, wherever that was: the
    epoch that was cut short is trained again from its beginning. For that the checkpoint holds the random numbers of
    torch, Python, NumPy, and of the loader's own generator; what keeps random numbers elsewhere (persistent workers, a
    data set with a generator that is no ``torch.Generator`` in an attribute ``generator``) is not followed.

    With ``torch.distributed`` every process is given its share of the data, equally many batches. All start from the
    first process's weights; gradients are averaged, so that the weights stay the same in all of them, and the plan is
    the first one's. It is that of one process with the whole batches, as far as the order in which float sums are
    taken does not decide between two scores, and no layer takes statistics over the batch: a batch norm sees its own
    process's share, and its running statistics are the first one's after every epoch, as in
    ``DistributedDataParallel``.

    Raises:
        InputError: a setting that cannot be used.

    Examples:
        >>> loop = fxprune.Loop(validation=loader, clip=1.0)
        >>> small = fxprune.prune(
        ...     model, x, method="slimming", flops=0.5, data=loader, epochs=1, progress=False,
        ...     options=fxprune.Options(loop=loop),
        ... )
    """

    optimizer: Callable[[Any], torch.optim.Optimizer] | None = field(
        default=None, metadata=option(or_none(as_maker(OPTIMIZER)), Flag(TRAINING, "FILE:NAME", python="function"))
    )
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler | None] | None = field(
        default=None, metadata=option(or_none(as_maker(SCHEDULE)), Flag(TRAINING, "FILE:NAME", python="function"))
    )
    validation: Any = field(
        default=None, metadata=option(or_none(as_loader), Flag(TRAINING, "FILE:NAME", python="object"))
    )
    device: torch.device | str | None = field(default=None, metadata=option(or_none(as_device), Flag(TRAINING, "NAME")))
    amp: bool = field(default=False, metadata=option(as_flag, Flag(TRAINING)))
    clip: float | None = field(default=None, metadata=option(or_none(as_positive), Flag(TRAINING, "NORM", float)))
    checkpoint: str | Path | None = field(default=None, metadata=option(or_none(as_file), Flag(TRAINING, "PATH")))
    resume: str | os.PathLike[str] | None = field(
        default=None, metadata=option(or_none(as_checkpoint), Flag(TRAINING, "PATH"))
    )
    per_step: bool = field(default=False, metadata=option(as_flag, Flag(TRAINING)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_step and self.schedule is None:
            raise InputError("per_step=True steps your schedule after every step: pass schedule= as well.")


@dataclass(frozen=True)
class Options(Checked):
    """What ``prune`` and ``attach`` can be told beyond their keywords.

    Args:
        steps: reach the budget in so many steps, scoring what is left before each; refitted first, on the same data,
            for ``obs`` and with ``reconstruct=True``.
        min_channels: at least so many channels stay along every dimension of every tensor.
        max_ratio: at most this share of a group's channels may go, or of those that some layers make: ``layer4.*=0.5``.
            That is how the command line has it; in Python patterns of names are a dict, ``{"layer4.*": 0.5}``.
        consume: empty the parameters and buffers of the model one by one as they are cut. So the dense and the pruned
            weights are never in memory together, and the model cannot be used afterwards. The oracle needs the dense
            weights, so it is not run, and the report says so; that the recorded graph computes what the model computes
            is still checked.
        loop: settings of the built-in training loop, for methods that train.
        tune: after the refit of ``reconstruct=True`` train the scales and shifts of norms and the biases for so many
            steps on the same data, to the dense outputs; no targets are read.

    Raises:
        InputError: an option that cannot be used.

    Examples:
        >>> careful = fxprune.Options(steps=3, max_ratio={"*": 0.8, "3": 0.5})
        >>> small = fxprune.prune(model, x, flops=0.6, options=careful, progress=False)
    """

    steps: int = field(default=1, metadata=option(as_whole(1), Flag(CHOICE, "N", int)))
    min_channels: int = field(default=1, metadata=option(as_whole(1), Flag(CHOICE, "N", int)))
    max_ratio: float | Mapping[str, float] | None = field(
        default=None, metadata=option(as_shares, Flag(CHOICE, "SHARE", share_in, dict))
    )
    consume: bool = field(default=False, metadata=option(as_flag, Flag(PROOF)))
    loop: Loop | None = field(default=None, metadata=option(or_none(_settings)))
    tune: int = field(default=0, metadata=option(as_whole(0), Flag(TRAINING, "N", int)))

    @property
    def limits(self) -> dict[str, float]:
        """``max_ratio`` by name pattern."""
        return {pattern: float(share) for pattern, share in by_pattern(self.max_ratio).items()}


@dataclass(frozen=True)
class Keywords(Checked):
    """The keywords of ``prune`` that say what is wanted; what each means is written there.

    Args:
        method: a name of those that `fxprune methods` lists.
        flops: multiply-accumulates that stay.
        macs: the same.
        params: parameters that stay.
        channels: prunable channels that stay.
        latency: time of a run that stays, measured, on onnxruntime if nothing else is said.
        data: a folder of images, or a loader of (inputs, target) or a function that makes one, in a Python file.
        loss_fn: a function of torch.nn.functional such as cross_entropy, or one of (output, target) in a Python file.
        epochs: how long a method that trains does.
        ignore: modules whose output channels stay, by name or pattern: ``layer4.*``.
        keep: modules that stay entirely, what they read too, by name or pattern.
        exact: cut only channels whose removal changes no statistics.
        attention: cut inside heads (head_dim), there queries and values apart (uneven), or whole heads (heads).
        scope: rank all channels together (global), cut every group by the same share (uniform), or every structure of
            groups (isomorphic).
        round_to: keep channels in multiples of this (auto: the largest power of two up to 16 that leaves at most 1 % of
            the budget unused and loses little more by the scores; measured: up to what the execution provider likes).
        depth: remove whole residual branches too, at most this share of them (1: as many as serve).
        for_class: cut only what the model's own class can hold, so that ``into`` gives it back.
        verify: compare with the masked original.
        reconstruct: refit the weights to the dense network's activations on the data, or on noise without.
        seed: same seed, same plan.
    """

    method: Any = field(default="l2", metadata=option(anything, Flag(CHOICE, "NAME")))
    flops: float | None = field(default=None, metadata=option(or_none(check_ratio), Flag(BUDGET, "R", float)))
    macs: float | None = field(default=None, metadata=option(or_none(check_ratio), Flag(BUDGET, "R", float)))
    params: float | None = field(default=None, metadata=option(or_none(check_ratio), Flag(BUDGET, "R", float)))
    channels: float | None = field(default=None, metadata=option(or_none(check_ratio), Flag(BUDGET, "R", float)))
    latency: LatencyBudget | None = field(default=None, metadata=option(or_none(_latency), Flag(BUDGET, "R", float)))
    data: Any = field(default=None, metadata=option(or_none(as_loader), Flag(TRAINING, "DATA", python="data")))
    loss_fn: Any = field(
        default=None, metadata=option(or_none(as_loss), Flag(TRAINING, "NAME", name="loss", python="loss"))
    )
    epochs: int | None = field(default=None, metadata=option(or_none(as_whole(1)), Flag(TRAINING, "N", int)))
    ignore: Any = field(default=(), metadata=option(anything, Flag(CHOICE, "MODULE", join=tuple)))
    keep: Any = field(default=(), metadata=option(anything, Flag(CHOICE, "MODULE", join=tuple)))
    exact: bool = field(default=False, metadata=option(as_flag, Flag(CHOICE)))
    attention: Attention = field(default="head_dim", metadata=option(one_of(Attention), Flag(CHOICE, "MODE")))
    scope: Scope = field(default="global", metadata=option(one_of(Scope), Flag(CHOICE, "MODE")))
    round_to: RoundTo = field(default="auto", metadata=option(as_multiple, Flag(CHOICE, "K", multiple_in)))
    depth: float | bool | None = field(default=False, metadata=option(as_depth, Flag(CHOICE, "SHARE", float)))
    for_class: bool = field(default=False, metadata=option(as_flag, Flag(CHOICE)))
    verify: bool = field(default=True, metadata=option(as_flag, Flag(PROOF)))
    reconstruct: bool = field(default=False, metadata=option(as_flag, Flag(TRAINING)))
    seed: int = field(default=0, metadata=option(as_whole(0), Flag(CHOICE, "N", int)))
    progress: bool = field(default=True, metadata=option(as_flag))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.macs is not None and self.flops is not None:
            raise InputError(f"macs={self.macs} and flops={self.flops} are budgets of the same: pass one of them.")
        object.__setattr__(self, "flops", self.macs if self.flops is None else self.flops)
        object.__setattr__(self, "macs", None)

    @property
    def budgets(self) -> dict[str, float | None]:
        """Kind -> ratio, as far as given."""
        latency = None if self.latency is None else self.latency.ratio
        return {"flops": self.flops, "params": self.params, "channels": self.channels, "latency": latency}


# -- names of earlier releases -----------------------------------------------------------------------------------------

MOVED = {
    "steps": "options=fxprune.Options(steps=...)",
    "min_channels": "options=fxprune.Options(min_channels=...)",
    "max_ratio": "options=fxprune.Options(max_ratio=...)",
    "consume": "options=fxprune.Options(consume=...)",
    "loop": "options=fxprune.Options(loop=...)",
    "resume": "options=fxprune.Options(loop=fxprune.Loop(resume=...))",
    "provider": "latency=fxprune.LatencyBudget(..., provider=...)",
    "threads": "latency=fxprune.LatencyBudget(..., threads=...)",
    "submodule": "fxprune.prune_submodule(model, name, ...)",
    "optimizer": "fxprune.carry_over(optimizer, model, small) with what comes out",
}
"""A keyword of ``prune`` in 0.1 -> what takes its place. They still work, with a warning, until 0.3."""


def asked(function: str, given: Mapping[str, Any]) -> tuple[Keywords, Options, dict[str, Any]]:
    """The arguments of a public function, checked.

    Args:
        function: its name.
        given: its arguments by name: those of ``Keywords`` that it has, ``options``, and ``old`` with what else came.

    Returns:
        Keywords and options, old names put where they are now; and of the old ones that no record holds, the values.

    Raises:
        InputError: an argument that cannot be used.
        TypeError: a keyword that never was one.
    """
    keywords = {each.name: given[each.name] for each in fields(Keywords) if each.name in given}
    options, old = Options() if given["options"] is None else given["options"], dict(given["old"])
    if not isinstance(options, Options):
        raise InputError(f"options={options!r} must be made by fxprune.Options(...).")
    for name in old:
        if name not in MOVED:
            known = [*given.keys() - {"old"}, *(each.name for each in fields(Options))]
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}.{suggestion(name, known)}")
        text = f"{name}= of fxprune.{function} has moved and will be gone in 0.3: use {MOVED[name]} instead."
        warnings.warn(text, DeprecationWarning, stacklevel=3)
    timing = {name: old.pop(name) for name in ("provider", "threads") if name in old}
    if any(value is not None for value in timing.values()):
        asked_for = keywords["latency"]
        budget = replace(_latency("latency", 1.0 if asked_for is None else asked_for), **timing)  # checked in any case
        keywords["latency"] = None if asked_for is None else budget
    resume = old.pop("resume", None)
    options = replace(options, **{each.name: old.pop(each.name) for each in fields(Options) if each.name in old})
    if resume is not None:
        options = replace(options, loop=replace(options.loop or Loop(), resume=resume))
    return Keywords(**keywords), options, {name: value for name, value in old.items() if value is not None}
