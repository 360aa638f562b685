"""What ``prune`` and ``attach`` are asked for, as the pipeline needs it, and whether it goes together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprune.deploy import alignment, check_engine, placed, provider_at_hand
from fxprune.errors import InputError
from fxprune.io.files import check_writable
from fxprune.methods import Learner, Method, name_of, needs_of, resolve
from fxprune.methods.registry import WITH_TARGET
from fxprune.options import Attention, Keywords, LatencyBudget, Options
from fxprune.pipeline import COARSEST, Cut
from fxprune.recording.checks import check_model, chosen_names
from fxprune.selection.budget import Budget
from fxprune.training.distributed import from_first, is_first


@dataclass(frozen=True)
class Request:
    """What ``prune`` and ``attach`` are asked for, as the pipeline needs it."""

    method: Method
    name: str
    cut: Cut
    attention: Attention
    ignore: tuple[str, ...]
    keep: tuple[str, ...]
    for_class: bool
    latency: LatencyBudget | None
    depth: float | None = None


def requested(model: nn.Module, keywords: Keywords, options: Options) -> Request:
    """What the keywords say, and which method it is.

    Raises:
        InputError: they do not go together.
    """
    method, name = resolve(keywords.method), name_of(keywords.method)
    if any(ratio is not None for ratio in keywords.budgets.values()) and hasattr(method, "within_budget"):
        variant = method.within_budget()
        method, name = (method, name) if variant is None else (variant, name_of(variant))
    budget, latency = _budget(method, keywords), keywords.latency
    check_model(model, shares=True)
    ignored, kept = chosen_names(model, "ignore", keywords.ignore), chosen_names(model, "keep", keywords.keep)
    if latency is not None or keywords.round_to == "measured":
        check_engine(None if latency is None else latency.provider)
    cut = Cut(
        budget, scope=keywords.scope, exact=keywords.exact, round_to=_multiples(method, keywords, model),
        min_channels=options.min_channels, max_ratio=options.limits, verify=keywords.verify,
        consume=options.consume, seed=keywords.seed,
    )  # fmt: skip
    depth = None if keywords.depth is None else float(keywords.depth)
    request = Request(method, name, cut, keywords.attention, ignored, kept, keywords.for_class, latency, depth)
    if depth is not None:
        _check_depth(request)
    if latency is not None and latency.joins:
        _check_joins(request)
    return request


def _check_joins(request: Request) -> None:
    """Whether layers can choose what they read of a stream."""
    if isinstance(request.method, Learner):
        raise InputError(f"{request.name} trains the channels; joins=True is for criteria. Leave one of them out.")
    if request.depth is not None:
        raise InputError("depth= and joins=True both choose by what the budget leaves: leave one of them out.")
    if request.for_class:
        raise InputError("joins=True adds gathers, for which no class has a place: leave out for_class=True.")


def _check_depth(request: Request) -> None:
    """Whether branches can be chosen, which is done by what is measured."""
    depth = f"depth={request.depth:g}"
    if isinstance(request.method, Learner):
        raise InputError(f"{request.name} trains the channels; {depth} is for criteria. Leave one of them out.")
    if request.cut.consume:
        raise InputError(f"{depth} compares with the dense weights, which consume=True empties: leave one of them out.")
    if request.for_class:
        raise InputError(f"{depth} removes branches that the class's own forward has: leave out for_class=True.")


def _multiples(method: Method, keywords: Keywords, model: nn.Module) -> tuple[int, ...]:
    """Of how many channels to try, coarse to fine; measured ones in several processes are those of the first."""
    round_to = keywords.round_to
    if isinstance(round_to, int):
        return (round_to,)
    if round_to == "auto" and getattr(method, "decides", False):
        return (1,)
    if round_to == "auto" and keywords.latency is None:
        coarsest = COARSEST
    else:
        provider = None if keywords.latency is None else keywords.latency.provider
        coarsest = from_first(alignment(placed(provider or provider_at_hand(), model)))
    return tuple(2**power for power in reversed(range(coarsest.bit_length())))


def _budget(method: Method, keywords: Keywords) -> Budget:
    """The one that was given; of a method that says itself how much goes, none."""
    if not getattr(method, "decides", False):
        return Budget.of(**keywords.budgets)
    given = [f"{kind}={ratio}" for kind, ratio in keywords.budgets.items() if ratio is not None]
    if given:
        raise InputError(f"{name_of(method)} says itself how much goes: leave out {' and '.join(given)}.")
    if keywords.scope != "global":
        raise InputError(
            f"{name_of(method)} says itself which channels go, of all by one threshold, and scope={keywords.scope!r} "
            "ranks them otherwise: leave it out, or ask for a budget."
        )
    return Budget("channels", 1.0)


def facts_of(request: Request, keywords: Keywords, options: Options) -> dict[str, Any]:
    """What decides which channels go, by the names of the arguments: for processes to compare."""
    budgets = {f"{kind}=": ratio for kind, ratio in keywords.budgets.items()}
    same = ("exact", "attention", "scope", "round_to", "verify", "seed", "reconstruct")
    return {
        "method=": request.name,
        **budgets,
        "ignore=": request.ignore,
        "keep=": request.keep,
        **{f"{name}=": getattr(keywords, name) for name in same},
        "min_channels=": options.min_channels,
        "limits=": options.limits,
        "steps=": options.steps,
    }


def check_shardable(request: Request, keywords: Keywords, options: Options, optimizer: Any) -> None:
    """Whether all that is asked for can be done where every process holds a share of the parameters.

    Raises:
        InputError: something cannot.
    """
    method = request.method
    asked = {
        f"method={request.name!r}": isinstance(method, Learner) or bool(needs_of(method)),
        "latency=": request.latency is not None,
        "depth=": request.depth is not None,
        "for_class=True": request.for_class,
        "reconstruct=True without data=": keywords.reconstruct and keywords.data is None,
        "tune=": bool(options.tune),
        "consume=True": options.consume,
        "optimizer=": optimizer is not None,
    }
    for name, given in asked.items():
        if given:
            raise InputError(
                f"{name} needs all of the model in one process, and of this one every process holds a share. Leave it "
                "out: what reads only weights (l1, l2, lamp, fpgm, random, ...) works on shares."
            )


def check_steps(request: Request, options: Options) -> None:
    """Whether there is something to do in steps."""
    if options.steps != 1 and isinstance(request.method, Learner):
        raise InputError(f"{request.name} trains once; steps= is for criteria.")


def check_data(request: Request, keywords: Keywords, options: Options) -> None:
    """Whether the method makes use of what is given, and is given what it needs."""
    method, name, data, loop = request.method, request.name, keywords.data, options.loop
    if data is None and keywords.loss_fn is not None:
        raise InputError("loss_fn= compares outputs with targets: pass data=, a loader of (inputs, target), as well.")
    check_steps(request, options)
    if options.tune and not keywords.reconstruct:
        raise InputError(f"tune={options.tune} follows a refit: pass reconstruct=True as well.")
    if isinstance(method, Learner):
        if data is None and not getattr(method, "label_free", False):
            raise InputError(f"{name} trains: pass data=, a loader of (inputs, target), and epochs=.")
        if data is None and loop is not None and loop.validation is not None:
            raise InputError(
                f"{name} learns without labels where there are no data, and validation= has some: pass data=, a loader "
                "of (inputs, target), as well."
            )
        if data is not None and keywords.epochs is None:
            raise InputError(f"{name} trains: pass epochs=.")
        if loop is not None and loop.checkpoint is not None and is_first():
            check_writable(loop.checkpoint)
        if loop is not None and loop.resume is not None and not os.path.exists(loop.resume):
            raise InputError(f"The checkpoint {os.fspath(loop.resume)} cannot be read: No such file or directory.")
        return
    given = [n for n, v in (("epochs", keywords.epochs), ("loop", loop)) if v is not None]
    if given:
        raise InputError(f"{name} does not train, so {given[0]}= has no meaning. Fine-tune what prune returns.")
    needs = sorted(needs_of(method))
    if needs and data is None:
        if WITH_TARGET.isdisjoint(needs):
            what = "what weights read" if needs == ["reads"] else " and ".join(needs)
            raise InputError(
                f"{name} measures {what}: pass data=, a tensor, a list of inputs or a loader. It reads no targets."
            )
        raise InputError(f"{name} measures {' and '.join(needs)}: pass data=, a loader of (inputs, target).")


def check_consumable(request: Request, optimizer: Any) -> None:
    """Whether the dense weights are read no more once they are cut."""
    reader = (
        f"{request.name} trains a copy" if isinstance(request.method, Learner)
        else "latency= measures the dense model" if request.latency is not None
        else "for_class=True compares with the class" if request.for_class
        else "optimizer= compares its state with the dense parameters" if optimizer is not None
        else ""
    )  # fmt: skip
    if reader:
        raise InputError(f"consume=True empties the model, and {reader}: leave one of them out.")


def check_reconstructible(request: Request, keywords: Keywords, options: Options) -> Any:
    """The data, to be read more than once; None for noise."""
    if options.consume:
        raise InputError("reconstruct=True compares with the dense weights, which consume=True empties: leave one out.")
    if isinstance(request.method, Learner):
        raise InputError(
            f"{request.name} trains the weights; reconstruct=True is for criteria. To refit what a training gave, call "
            "fxprune.reconstruct with the trained model."
        )
    data = keywords.data
    if options.tune and data is None:
        raise InputError(f"tune={options.tune} trains on data, of which there are none: pass data= as well.")
    return list(data) if isinstance(data, Iterator) else data
