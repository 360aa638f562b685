"""What people ask for: the records that ``prune``, ``attach``, ``prune_submodule`` and the command line share.

Every field is checked here, once, whoever fills it in. One with a ``Flag`` is an option of the command line as well,
under its own name and with the first sentence that its record's docstring has for it, so that adding one touches this
file alone. Nothing here imports torch: ``fxprune --help`` answers at once.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fxprune.errors import InputError, check_choice, check_count, check_flags, is_real
from fxprune.io.files import as_path

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler

Scope = Literal["global", "uniform", "isomorphic"]
Attention = Literal["head_dim", "heads"]
RoundTo = int | Literal["auto", "measured"]

Check = Callable[[str, Any], Any]
"""Of an argument's name and value: the value as it will be used, or an ``InputError``."""

BUDGET = "budget, one of (a ratio above 0 and at most 1)"
TIMING = "budget of latency"
CHOICE = "which channels"
TRAINING = "data and training"
PROOF = "proof"


@dataclass(frozen=True)
class Flag:
    """A field as an option of the command line.

    ``group``: the heading it stands under. ``metavar``: what the help calls its value. ``read``: a word's value, or an
    ``InputError``. ``join``: makes one value of those of many words; None where there is one. ``name``: where it is not
    the field's. ``python``: the word names something in Python, see ``fxprune.io.specs``.
    """

    group: str
    metavar: str = ""
    read: Callable[[str], Any] = str
    join: Callable[[list[Any]], Any] | None = None
    name: str = ""
    python: Literal["", "object", "function", "loss", "data"] = ""


def documented(record: type) -> dict[str, str]:
    """Of every field that the record's docstring lists under ``Args``: the first sentence, without its full stop."""
    text = re.split(r"^\S", inspect.cleandoc(record.__doc__ or "").partition("Args:\n")[2], flags=re.MULTILINE)[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", text, re.MULTILINE | re.DOTALL)
    return {name: re.split(r"\.\s", " ".join(said.split()) + " ")[0].strip() for name, said in entries}


def _option(check: Check, flag: Flag | None = None) -> dict[str, Any]:
    """What is known of a field: how it is checked, and how it is given on the command line, if it can be."""
    return {"check": check, "flag": flag}


@dataclass(frozen=True)
class _Checked:
    def __post_init__(self) -> None:
        for each in fields(self):
            value = each.metadata["check"](each.name, getattr(self, each.name))
            object.__setattr__(self, each.name, value)


# -- checks ------------------------------------------------------------------------------------------------------------


def check_ratio(kind: str, value: Any) -> float:
    """A budget as a float.

    Raises:
        InputError: it is no ratio in (0, 1].
    """
    if not is_real(value) or not 0 < value <= 1:
        raise InputError(f"{kind}={value} is no budget: pass a ratio of the dense model in (0, 1], such as {kind}=0.5.")
    return float(value)


def check_loader(data: Any, what: str = "data") -> None:
    """Refuse what cannot be a loader; nothing is drawn from it.

    Raises:
        InputError: it cannot be iterated over, or says itself that it is empty.
    """
    if not isinstance(data, Iterable):
        kind = type(data).__name__
        raise InputError(f"{what}= is a {kind}, which is no loader: pass an iterable of (inputs, target) batches.")
    if length_of(data) == 0:
        raise InputError(without_batches(what))


def length_of(data: Any) -> int | None:
    """How many batches a loader has; None where it does not know."""
    try:
        return len(data)
    except TypeError:
        return None


def without_batches(what: str) -> str:
    """What is said of a loader that yields nothing."""
    return f"{what}= yields no batches. Is it a generator that was used up, or smaller than one batch?"


def _anything(name: str, value: Any) -> Any:
    return value


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _one_of(kind: Any) -> Check:
    def check(name: str, value: Any) -> Any:
        check_choice(name, value, get_args(kind))
        return value

    return check


def _flag(name: str, value: Any) -> bool:
    check_flags(**{name: value})
    return bool(value)


def _whole(least: int) -> Check:
    return lambda name, value: check_count(name, value, least)


def _multiple(name: str, value: Any) -> Any:
    return value if isinstance(value, str) and value in ("auto", "measured") else check_count(name, value)


def _loader(name: str, value: Any) -> Any:
    check_loader(value, name)
    return value


_OPTIMIZER = "lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
_SCHEDULE = "lambda optimizer, epochs: CosineAnnealingLR(optimizer, epochs)"


def _makes(example: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if not callable(value):
            raise InputError(f"{name}= is a {type(value).__name__}; pass a function that makes it: {example}.")
        return value

    return check


def _loss(name: str, value: Any) -> Any:
    if not callable(value):
        raise InputError(f"loss_fn= is a {type(value).__name__}; pass a function of (output, target).")
    return value


def _device(name: str, value: Any) -> Any:
    import torch

    try:
        torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"device={value!r} is no device: pass one such as 'cpu' or 'cuda'.") from error
    return value


def _positive(name: str, value: Any) -> Any:
    if not (is_real(value) and value > 0):
        raise InputError(f"{name}={value} must be positive.")
    return value


def _path(name: str, value: Any) -> Path:
    return as_path(value)


def _checkpoint(name: str, value: Any) -> Any:
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{name}= is a {type(value).__name__}; pass the path of a checkpoint.")
    return value


def _provider(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"provider={value!r} is no name of an execution provider of onnxruntime.")
    return value


def _by_pattern(value: Any) -> Mapping[Any, Any]:
    return {} if value is None else value if isinstance(value, Mapping) else {"*": value}


def _shares(name: str, value: Any) -> Any:
    for pattern, share in _by_pattern(value).items():
        if not isinstance(pattern, str):
            raise InputError(f"max_ratio has the pattern {pattern!r}: pass names of layers, such as 'layer4.*'.")
        if not is_real(share) or not 0 <= share <= 1:
            raise InputError(f"max_ratio of {pattern!r} is {share!r}: pass the share that may go, in [0, 1].")
    return value


def _settings(name: str, value: Any) -> Loop:
    if not isinstance(value, Loop):
        raise InputError(f"loop= is a {type(value).__name__}; pass settings such as fxprune.Loop(amp=True).")
    return value


def _latency(name: str, value: Any) -> LatencyBudget:
    return value if isinstance(value, LatencyBudget) else LatencyBudget(value)


# -- words of the command line -----------------------------------------------------------------------------------------


def _multiple_in(word: str) -> Any:
    try:
        return word if word in ("auto", "measured") else int(word)
    except ValueError:
        raise InputError(f"{word!r} is no number of channels, nor auto, nor measured") from None


def _share_in(word: str) -> tuple[str, float]:
    pattern, equals, share = word.rpartition("=")
    try:
        return (pattern if equals else "*"), float(share)
    except ValueError:
        raise InputError(f"{word!r} is no share: write 0.5, or 'layer4.*=0.5' for some layers") from None


# -- records -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatencyBudget(_Checked):
    """A budget of latency, and how it is measured.

    Args:
        ratio: the time of a run on onnxruntime that stays, as a ratio of the dense model's in (0, 1].
        provider: onnxruntime's execution provider (CUDA if that works here, else the CPU).
        threads: of the processor (as many as it has cores if not given, as onnxruntime does).
        batch: batch size of the runs (that of the example inputs if not given).

    Raises:
        InputError: a setting that cannot be used.

    Examples:
        >>> budget = fxprune.LatencyBudget(0.5, provider="CPUExecutionProvider", threads=4, batch=8)
        >>> how = {"latency": budget}  # fxprune.prune(model, x, latency=budget)
    """

    ratio: float = field(metadata=_option(lambda name, value: check_ratio("latency", value)))
    provider: str | None = field(default=None, metadata=_option(_or_none(_provider), Flag(TIMING, "NAME")))
    threads: int | None = field(default=None, metadata=_option(_or_none(_whole(1)), Flag(TIMING, "N", int)))
    batch: int | None = field(default=None, metadata=_option(_or_none(_whole(1)), Flag(TIMING, "N", int)))


@dataclass(frozen=True)
class Loop(_Checked):
    """Settings of the built-in training loop.

    Args:
        optimizer: makes the optimizer from the parameters that the method trains. None: that of the method's paper.
        schedule: makes the schedule from the optimizer and the number of epochs. It is stepped once per epoch. None:
            that of the method's paper for the method's own optimizer, a constant rate for yours.
        validation: batches ``(inputs, target)`` to evaluate on after every epoch.
        device: where to train (where the model is if not given).
        amp: automatic mixed precision, float16 with loss scaling on CUDA, bfloat16 elsewhere.
        clip: largest norm of all gradients together.
        checkpoint: written after every epoch, for ``resume``.
        resume: a checkpoint to continue from, with the same result as without the interruption.

    A run that is resumed gives the same result, bit for bit, as one without an interruption, wherever that was: the
    epoch that was cut short is trained again from its beginning. For that the checkpoint holds the random numbers of
    torch, Python, NumPy, and of the loader's own generator; what keeps random numbers elsewhere (persistent workers, a
    data set with a generator that is no attribute ``generator``) is not followed.

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
        default=None, metadata=_option(_or_none(_makes(_OPTIMIZER)), Flag(TRAINING, "FILE:NAME", python="function"))
    )
    schedule: Callable[[torch.optim.Optimizer, int], LRScheduler | None] | None = field(
        default=None, metadata=_option(_or_none(_makes(_SCHEDULE)), Flag(TRAINING, "FILE:NAME", python="function"))
    )
    validation: Any = field(
        default=None, metadata=_option(_or_none(_loader), Flag(TRAINING, "FILE:NAME", python="object"))
    )
    device: torch.device | str | None = field(default=None, metadata=_option(_or_none(_device), Flag(TRAINING, "NAME")))
    amp: bool = field(default=False, metadata=_option(_flag, Flag(TRAINING)))
    clip: float | None = field(default=None, metadata=_option(_or_none(_positive), Flag(TRAINING, "NORM", float)))
    checkpoint: str | Path | None = field(default=None, metadata=_option(_or_none(_path), Flag(TRAINING, "PATH")))
    resume: str | os.PathLike[str] | None = field(
        default=None, metadata=_option(_or_none(_checkpoint), Flag(TRAINING, "PATH"))
    )


@dataclass(frozen=True)
class Options(_Checked):
    """What ``prune`` and ``attach`` can be told beyond their keywords.

    Args:
        steps: reach the budget in so many steps, scoring what is left before each.
        min_channels: at least so many channels stay along every dimension of every tensor.
        max_ratio: at most this share of a group's channels may go, or of those that some layers make: ``layer4.*=0.5``.
            That is how the command line has it; in Python patterns of names are a dict, ``{"layer4.*": 0.5}``.
        consume: empty the parameters and buffers of the model one by one as they are cut. So the dense and the pruned
            weights are never in memory together, and the model cannot be used afterwards. The oracle needs the dense
            weights, so it is not run, and the report says so; that the recorded graph computes what the model computes
            is still checked.
        loop: settings of the built-in training loop, for methods that train.

    Raises:
        InputError: an option that cannot be used.

    Examples:
        >>> careful = fxprune.Options(steps=3, max_ratio={"*": 0.8, "3": 0.5})
        >>> small = fxprune.prune(model, x, flops=0.6, options=careful, progress=False)
    """

    steps: int = field(default=1, metadata=_option(_whole(1), Flag(CHOICE, "N", int)))
    min_channels: int = field(default=1, metadata=_option(_whole(1), Flag(CHOICE, "N", int)))
    max_ratio: float | Mapping[str, float] | None = field(
        default=None, metadata=_option(_shares, Flag(CHOICE, "SHARE", _share_in, dict))
    )
    consume: bool = field(default=False, metadata=_option(_flag, Flag(PROOF)))
    loop: Loop | None = field(default=None, metadata=_option(_or_none(_settings)))

    @property
    def limits(self) -> dict[str, float]:
        """``max_ratio`` by name pattern."""
        return {pattern: float(share) for pattern, share in _by_pattern(self.max_ratio).items()}


@dataclass(frozen=True)
class Keywords(_Checked):
    """The keywords of ``prune`` that say what is wanted; what each means is written there.

    Args:
        method: a name of those that `fxprune methods` lists.
        flops: multiply-accumulates that stay.
        macs: the same.
        params: parameters that stay.
        channels: prunable channels that stay.
        latency: time of a run on onnxruntime that stays, measured.
        data: a folder of images, or a loader of (inputs, target) or a function that makes one, in a Python file.
        loss_fn: a function of torch.nn.functional such as cross_entropy, or one of (output, target) in a Python file.
        epochs: how long a method that trains does.
        ignore: modules whose output channels stay.
        exact: cut only channels whose removal changes no statistics.
        attention: cut inside heads (head_dim) or whole heads (heads).
        scope: rank all channels together (global), cut every group by the same share (uniform), or every structure of
            groups (isomorphic).
        round_to: keep channels in multiples of this (auto: the largest power of two up to 16 that leaves at most 1 % of
            the budget unused; measured: up to what the execution provider likes).
        verify: compare with the masked original.
        reconstruct: refit the weights to the dense network's activations on the data.
        seed: same seed, same plan.
    """

    method: Any = field(default="l2", metadata=_option(_anything, Flag(CHOICE, "NAME")))
    flops: float | None = field(default=None, metadata=_option(_or_none(check_ratio), Flag(BUDGET, "R", float)))
    macs: float | None = field(default=None, metadata=_option(_or_none(check_ratio), Flag(BUDGET, "R", float)))
    params: float | None = field(default=None, metadata=_option(_or_none(check_ratio), Flag(BUDGET, "R", float)))
    channels: float | None = field(default=None, metadata=_option(_or_none(check_ratio), Flag(BUDGET, "R", float)))
    latency: LatencyBudget | None = field(default=None, metadata=_option(_or_none(_latency), Flag(BUDGET, "R", float)))
    data: Any = field(default=None, metadata=_option(_or_none(_loader), Flag(TRAINING, "DATA", python="data")))
    loss_fn: Any = field(
        default=None, metadata=_option(_or_none(_loss), Flag(TRAINING, "NAME", name="loss", python="loss"))
    )
    epochs: int | None = field(default=None, metadata=_option(_or_none(_whole(1)), Flag(TRAINING, "N", int)))
    ignore: Any = field(default=(), metadata=_option(_anything, Flag(CHOICE, "MODULE", join=tuple)))
    exact: bool = field(default=False, metadata=_option(_flag, Flag(CHOICE)))
    attention: Attention = field(default="head_dim", metadata=_option(_one_of(Attention), Flag(CHOICE, "MODE")))
    scope: Scope = field(default="global", metadata=_option(_one_of(Scope), Flag(CHOICE, "MODE")))
    round_to: RoundTo = field(default="auto", metadata=_option(_multiple, Flag(CHOICE, "K", _multiple_in)))
    verify: bool = field(default=True, metadata=_option(_flag, Flag(PROOF)))
    reconstruct: bool = field(default=False, metadata=_option(_flag, Flag(TRAINING)))
    seed: int = field(default=0, metadata=_option(_whole(0), Flag(CHOICE, "N", int)))
    progress: bool = field(default=True, metadata=_option(_flag))

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


def suggestion(name: str, known: Iterable[str]) -> str:
    """Names that look like this one, as the end of a message; "" if there are none."""
    close: Sequence[str] = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {', '.join(close)}?" if close else ""
