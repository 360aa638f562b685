"""What is the same everywhere adapts to what it meets; what depends on position is rigid."""

from __future__ import annotations

from torch import fx

from fxprune.labels.factors import Factor, Labels, vector
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation
from fxprune.ops.call import Call
from fxprune.ops.refit import NO_WEIGHT
from fxprune.ops.repair import LEFT_ALONE, Repair, set_argument, shape_after_self
from fxprune.ops.table import adder


def _uniform(run: Propagation, call: Call) -> Labels:
    out = call.out
    for like in call.tensors:
        run.labels(like)  # gives the dtype and the device, whatever it holds
    return tuple(Factor(vector(run.fresh(s), d, out.ndim), d) for d, s in enumerate(out.shape) if s > 1)


def _like(run: Propagation, call: Call) -> Labels:
    return run.labels(call.input)


def _by_position(run: Propagation, call: Call) -> Labels:
    return ()


def _normal(run: Propagation, call: Call) -> Labels | list[Labels]:
    """Around the numbers of a tensor, with those of another as deviations; or of a size that is given; or in place."""
    operands = [(tuple(t.shape), run.labels(t)) for t in call.tensors]
    return join_positions(run, operands, tuple(call.out.shape)) if operands else _uniform(run, call)


def _multinomial(run: Propagation, call: Call) -> Labels:
    """Draws positions along the last dimension."""
    mixed = (run.mix(f, [call.input.ndim - 1], "drawn among channels", ordered=True) for f in run.labels(call.input))
    return tuple(f for f in mixed if f is not None)


# -- repairs -----------------------------------------------------------------------------------------------------------


def _repair_sizes(repair: Repair, node: fx.Node) -> None:
    promised = repair.promised(node)
    if "size" in node.kwargs:
        node.kwargs = {**node.kwargs, "size": repair.size_list(node, node.kwargs["size"], promised)}
    elif isinstance(node.args[0], (tuple, list)) or not isinstance(repair.value(node.args[0]), int):
        node.args = (repair.size_list(node, node.args[0], promised), *node.args[1:])
    else:
        node.args = tuple(repair.sizes(node, node.args, promised))


def _repair_drawn(repair: Repair, node: fx.Node) -> None:
    """Numbers come before the size, one or two; those of ``normal`` may be tensors, and then there is none."""
    for place, argument in [*enumerate(node.args), *node.kwargs.items()]:
        if place == "size" or (isinstance(place, int) and isinstance(repair.value(argument), (tuple, list))):
            sizes = repair.size_list(node, argument, repair.promised(node))
            set_argument(node, *((place, "") if isinstance(place, int) else (len(node.args), place)), sizes)


# -- the ops -----------------------------------------------------------------------------------------------------------

_op = adder(__name__, mask="it is made without any channel", refit=NO_WEIGHT)

_op("zeros", "ones", "rand", "randn", "full", label=_uniform, repair=_repair_sizes, sizes=0)
_op("empty", label=_uniform, repair=_repair_sizes, sizes=0, takes="anything")
_op("randint", label=_uniform, repair=_repair_drawn)
_op("scalar_tensor", label=_uniform)
_op("empty_strided", "empty_permuted", label=_uniform, repair=LEFT_ALONE)
_op("new_zeros", "new_ones", "new_empty", "new_full", label=_uniform, repair=shape_after_self, sizes=1, fills=True,
    moves=True, takes="anything")  # fmt: skip
_op("new_empty_strided", label=_uniform, moves=True, fills=True, sizes=1,
    repair=LEFT_ALONE)  # fmt: skip
_op("empty_like", "zeros_like", "ones_like", "full_like", label=_like, fills=True, moves=True, takes="anything")
_op("rand_like", "randn_like", "randint_like", label=_like, fills=True, moves=True, repair="bounds of what is drawn")
_op("arange", label=_by_position, sizes=0)
_op(
    "linspace", "logspace", "eye", "range", "tril_indices", "triu_indices", "randperm",
    label=_by_position, repair="positions cannot be cut",
)  # fmt: skip
_op("normal", label=_normal, repair=_repair_drawn, takes="nothing", mask="every position is drawn by itself")
_op("multinomial", label=_multinomial, mask="across channels it locks them", repair="a number of draws")

# Made of other ops; a recorded graph calls it.
_call = adder(__name__)
_call("python::new_tensor", fills=True)
