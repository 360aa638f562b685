"""Operands are joined position by position."""

from __future__ import annotations

import numpy as np
from torch import nn

from fxprune.labels.apply import pointwise
from fxprune.labels.factors import Factor, Labels
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation
from fxprune.ops.call import Call
from fxprune.ops.refit import EVERY_POSITION, Addition, Affine, Followed
from fxprune.ops.table import Shape, adder, layer


def _copy(run: Propagation, call: Call) -> Labels:
    target, source = call["self"], call["src"]
    shape = tuple(target.shape)
    return join_positions(run, [(shape, run.labels(target)), (tuple(source.shape), run.labels(source))], shape)


def _overwrite(run: Propagation, call: Call) -> Labels:
    return run.labels(call.input)


def _glu(run: Propagation, call: Call) -> Labels:
    """``a * sigmoid(b)`` of the two halves along ``dim``."""
    dim = call.dims()[0]
    result = []
    for factor in run.labels(call.input):
        ids = factor.ids
        if ids.shape[dim] > 1:
            first, second = np.split(ids, 2, dim)
            run.join(first, second)
            ids = first
        result.append(Factor(ids, factor.dim))
    return tuple(result)


# -- layers -----------------------------------------------------------------------------------------------------------


@layer(nn.PReLU)
def _prelu(module: nn.PReLU, before: Shape, after: Shape) -> None:
    module.num_parameters = module.weight.shape[0]


# -- the ops -----------------------------------------------------------------------------------------------------------

# What PyTorch tags as pointwise (``torch.Tag.pointwise``) needs no record, unless the recorder has to know more of it.
_op = adder(__name__, label=pointwise, mask="every position comes from the same position", refit=EVERY_POSITION)

_op(
    "hardswish", "hardsigmoid", "native_dropout", "_prelu_kernel", "log_sigmoid_forward", "poisson", "binomial",
    "_standard_gamma", "real", "imag", "rrelu_with_noise", "clamp", "isclose", "nan_to_num",
    pointwise=True,
)  # fmt: skip
_op("relu", "hardtanh", pointwise=True, idempotent=True)
_op("add", refit=Addition())
_op("mul", refit=Affine(("self", "other")))
_op("where", "masked_fill", "copy", pointwise=True, takes="anything")
_op("_to_copy", pointwise=True, takes="anything", moves=True, refit=Followed.COPIED)
_op("lift_fresh", "lift", pointwise=True, moves=True, refit=Followed.COPIED)
_op("_conj", pointwise=True, moves=True)
_op("bernoulli", "complex", "polar", pointwise=True, takes="nothing")
_op("eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "logical_xor", takes="anything")
_op(
    "bitwise_not", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift", "gcd",
    "lcm", "__lshift__", "__rshift__", "__xor__",
    takes="nothing",
)  # fmt: skip
_op("copy_", label=_copy, pointwise=True, takes="anything")
_op("fill", "zero", label=_overwrite, takes="anything")
_op("uniform", "exponential", "random", "normal_functional", "log_normal", "cauchy", "geometric", label=_overwrite)
_op("glu", label=_glu, takes="floats of one kind", mask="every position comes from one position of each half")
