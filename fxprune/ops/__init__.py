"""What is known of ops: one record each, which every stage asks. An op without one is never guessed.

``table`` is what a record may say; then one file per kind of PyTorch's own ops: rules for the labels, repairs, the
oracle's counterparts, and at the end of the file the records. Below that: ``call`` (a call as rules see it),
``repair`` (a node as repairs see it), ``refit`` (what an op is for the refit of weights), ``masks`` and ``meta``
(helpers of the counterparts and of kernels without data), ``registry`` (the door for other packages). ``selection``
is our own; ``torchvision`` and ``transformers`` are examples to copy.

The channels that reach an op without a record stay. With ``register`` the package that brings an op says what it does.
A worked example. The op ``mylib::centre`` takes their mean from the channels of ``x [N, C]`` and multiplies them with
``weight [C]``:

>>> import torch
>>> from fxprune import ops
>>> library = torch.library.Library("mylib", "DEF")
>>> _ = library.define("centre(Tensor x, Tensor weight) -> Tensor")
>>> library.impl("centre", lambda x, weight: (x - x.mean(1, keepdim=True)) * weight, "CompositeExplicitAutograd")
>>> def masked(func, on, args, kwargs):  # the mean of the channels that stay
...     x, weight = args
...     mean = x.masked_fill(~on, 0).sum(1, keepdim=True) / on.sum(1, keepdim=True)
...     return (x - mean) * weight
>>> @ops.register("mylib::centre", mask=masked)
... def centre(run, call):
...     x, weight = call["x"], call["weight"]
...     channels = run.labels(x)
...     run.statistic(call.name, channels)  # for the proof: ``masked`` takes it over the channels that stay
...     for factor in channels:
...         run.approximate(factor.ids, "the mean of all channels")
...     operands = [(tuple(x.shape), channels), (tuple(weight.shape), run.labels(weight))]
...     return ops.join_positions(run, operands, tuple(x.shape))  # x and weight live and die together

So that nobody has to import it, a package names its module under the entry points ``fxprune.ops``; it is loaded when
the first op of the namespace is met:

    [project.entry-points."fxprune.ops"]
    mylib = "mylib_ops"
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxprune.labels.contract import Operand, contract
    from fxprune.labels.factors import Factor, Labels
    from fxprune.labels.positions import join_positions
    from fxprune.labels.propagation import Propagation
    from fxprune.ops.call import Call
    from fxprune.ops.convolution import convolve
    from fxprune.ops.refit import Addition, Affine, Contraction, Followed, Product, Statistics, product, sliding
    from fxprune.ops.registry import lookup, register
    from fxprune.ops.table import Op

_HOMES = {
    "Addition": "ops.refit",
    "Affine": "ops.refit",
    "Call": "ops.call",
    "Contraction": "ops.refit",
    "Factor": "labels.factors",
    "Followed": "ops.refit",
    "Labels": "labels.factors",
    "Op": "ops.table",
    "Operand": "labels.contract",
    "Product": "ops.refit",
    "Propagation": "labels.propagation",
    "Statistics": "ops.refit",
    "contract": "labels.contract",
    "convolve": "ops.convolution",
    "join_positions": "labels.positions",
    "lookup": "ops.registry",
    "product": "ops.refit",
    "register": "ops.registry",
    "sliding": "ops.refit",
}
__all__ = [
    "Addition",
    "Affine",
    "Call",
    "Contraction",
    "Factor",
    "Followed",
    "Labels",
    "Op",
    "Operand",
    "Product",
    "Propagation",
    "Statistics",
    "contract",
    "convolve",
    "join_positions",
    "lookup",
    "product",
    "register",
    "sliding",
]


def __getattr__(name: str) -> Any:
    """At first use: ``table`` and ``meta`` are wanted long before labels are."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fxprune.ops' has no attribute {name!r}")
    return getattr(import_module(f"fxprune.{_HOMES[name]}"), name)
