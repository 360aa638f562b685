"""Random numbers drawn by the ops of a network: the same in every run, and nobody's generator is touched.

``repeatable`` seeds nothing by itself. Every op that draws (``torch.Tag.nondeterministic_seeded``) is given a generator
of its own, seeded by its place among the ops that draw. An op that takes none draws from the default generator of the
device it runs on, and of no other, which is seeded for this op alone and put back. A network that draws nothing
leaves all generators of all devices alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from fxprune.ops.meta import OpMode, tensors_in

_SEED = 0x5EED


class Repeatable(OpMode):
    """The n-th random op draws the same numbers in every run under a mode like this."""

    supports_higher_order_operators = True

    def __init__(self, seed: int = 0):
        super().__init__()
        self._seed = seed
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not draws(func, args, kwargs):
            return func(*args, **kwargs)
        self._count += 1
        return drawn(func, args, kwargs, self._seed + self._count)


@contextmanager
def repeatable(seed: int = 0) -> Iterator[None]:
    """Inside, the ops of a network draw the same random numbers whenever they are run in the same order.

    >>> net = torch.nn.Dropout()
    >>> results = []
    >>> for _ in range(2):
    ...     with repeatable():
    ...         results.append(net(torch.ones(8)))
    >>> torch.equal(*results)
    True
    """
    with Repeatable(seed):
        yield


def draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Does this call of an aten op draw random numbers? (On meta there are none, but it would elsewhere.)"""
    if not isinstance(func, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" in names:  # attention, which draws only where it has a dropout
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return float(given.get("dropout_p") or 0.0) > 0.0
    return True


def drawn(func: Any, args: Any, kwargs: Any, seed: int) -> Any:
    """What the random op gives with numbers from ``seed``; generators, given ones too, stay where they are."""
    device, seed = _device(args, kwargs), _SEED + 7919 * seed
    if device.type == "meta":
        return func(*args, **kwargs)
    own = _with_generator(func)
    if own is None:
        with _default_seeded(device, seed):
            return func(*args, **kwargs)
    if own is func:  # where one was given by position, it came last
        args = args[: [a.name for a in func._schema.arguments].index("generator")]
    return own(*args, **{**kwargs, "generator": torch.Generator(device).manual_seed(seed)})


def _device(args: Any, kwargs: Any) -> torch.device:
    """Where an op runs."""
    tensors = tensors_in((*args, *kwargs.values()))
    given = kwargs.get("device")
    if given is None:
        return tensors[0].device if tensors else torch.get_default_device()
    return torch.device(given)


@cache
def _with_generator(func: Any) -> Any:
    """The overload with the same arguments and a generator, itself if it has one, or None."""
    names = [a.name for a in func._schema.arguments]
    if "generator" in names:
        return func
    for overload in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, overload)
        arguments = [a for a in other._schema.arguments if a.name != "generator"]
        if len(arguments) < len(other._schema.arguments) and [a.name for a in arguments] == names:
            generator = next(a for a in other._schema.arguments if a.name == "generator")
            if generator.kwarg_only:
                return other
    return None


@contextmanager
def _default_seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The default generator of one device from ``seed``, and afterwards as it was."""
    generator = _default_generator(device)
    if generator is None:  # a device whose generator cannot be reached
        yield
        return
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def _default_generator(device: torch.device) -> torch.Generator | None:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    if device.type == "mps":
        own: torch.Generator = module._get_default_mps_generator()
        return own
    generators = getattr(module, "default_generators", ())
    index = module.current_device() if device.index is None else device.index
    return generators[index] if index < len(generators) else None
