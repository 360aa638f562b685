"""What is contracted is joined; counted as MACs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxprune.labels.contract import Operand, contract, operand
from fxprune.labels.factors import Factor, Labels
from fxprune.labels.positions import join_positions
from fxprune.labels.propagation import Propagation
from fxprune.labels.records import channels_of
from fxprune.ops.call import Call
from fxprune.ops.convolution import with_bias
from fxprune.ops.meta import empty, fits, is_plain, is_within
from fxprune.ops.refit import product
from fxprune.ops.repair import Repair, UnrepairableError, origin
from fxprune.ops.table import Shape, adder, argument, layer


def _note(run: Propagation, first: Tensor, second: Tensor) -> None:
    """For the mask oracle: what the dropped channels hold must not enter a product of two activations.

    A parameter's slices are zero there already.
    """
    cut = () if run.is_parameter(second) else tuple(f for f in run.labels(first) if f.dim == first.ndim - 1)
    run.statistic("product", cut)


def _matmul(run: Propagation, call: Call) -> Labels:
    first, second = call.tensors
    _note(run, first, second)
    a, b, out = {
        "mm": ("ik", "kj", "ij"), "bmm": ("bik", "bkj", "bij"), "mv": ("ik", "k", "i"),
    }.get(call.name, ("k", "k", ""))  # fmt: skip
    return contract(run, [operand(run, first, a), operand(run, second, b)], out, counted=call.name in ("mm", "bmm"))


def _add_matmul(run: Propagation, call: Call) -> Labels:
    bias, first, second = call.tensors
    _note(run, first, second)
    a, b, out = {
        "addmm": ("ik", "kj", "ij"), "baddbmm": ("bik", "bkj", "bij"), "addmv": ("ik", "k", "i"),
    }[call.name]  # fmt: skip
    labels = contract(run, [operand(run, first, a), operand(run, second, b)], out, counted=call.name != "addmv")
    shape = tuple(call.out.shape)
    return join_positions(run, [(shape, labels), (tuple(bias.shape), run.labels(bias))], shape)


def _distances(run: Propagation, call: Call) -> Labels:
    """``x1 [*, i, k]``, ``x2 [*, j, k]`` -> ``[*, i, j]``: over the channels that both keep."""
    first, second = call["x1"], call["x2"]
    cut = tuple(f for f in run.labels(first) if f.dim == first.ndim - 1)
    run.statistic("distance", cut)
    if first.shape[:-2] != second.shape[:-2]:
        run.lock_all((*run.labels(first), *run.labels(second)), "distances between batches of two sizes")
        return ()
    lead = "abcdefgh"[: first.ndim - 2]
    operands = [operand(run, first, lead + "ik"), operand(run, second, lead + "jk")]
    labels = contract(run, operands, lead + "ij", counted=False)
    for factor in cut:
        run.approximate(factor.ids, "a distance over channels")
    return labels


def _linear(run: Propagation, call: Call) -> Labels:
    x, weight = call["input"], call["weight"]
    _note(run, x, weight)
    lead = "abcdefgh"[: x.ndim - 1]
    labels = contract(run, [operand(run, x, lead + "i"), operand(run, weight, "oi")], lead + "o")
    return with_bias(run, call, labels, call.out.ndim - 1)


def _trilinear(run: Propagation, call: Call) -> Labels:
    """Of ``nn.Bilinear``: three tensors multiplied and summed, when ``expand`` has given each the dims that it lacks.

    ``i1 [n, i]``, a weight ``i2 [o, i, j]``, ``i3 [n, j]`` -> ``[n, o]``, say. A weight's slices are zero where one of
    the others lost a channel; of three that are none nothing would be.
    """
    tensors = call["i1"], call["i2"], call["i3"]
    if not run.is_parameter(tensors[1]):
        run.lock_all([f for tensor in tensors for f in run.labels(tensor)], "a product of three without a weight")
        return ()
    dims = "abcdefgh"[: tensors[0].ndim + len(call["expand1"])]
    a, b, c = ("".join(d for n, d in enumerate(dims) if n not in call[f"expand{place}"]) for place in (1, 2, 3))
    out = "".join(d for n, d in enumerate(dims) if n not in call["sumdim"])
    first, weight, last = (operand(run, tensor, letters) for tensor, letters in zip(tensors, (a, b, c), strict=True))
    between = "".join(d for d in dims if d in a + b and d in out + c)
    sizes = dict(zip(a + b, first.shape + weight.shape, strict=True))
    labels = contract(run, [first, weight], between, counted=False)
    return contract(run, [Operand(tuple(sizes[d] for d in between), labels, between), last], out, counted=False)


def _embedding(run: Propagation, call: Call) -> Labels:
    """Rows are looked up by value: the vocabulary stays."""
    weight, extra = call["weight"], call["indices"].ndim
    run.unread(call.name, call["indices"])
    run.produces(weight, 1)
    result = []
    for factor in run.labels(weight):
        if factor.dim == 0 or factor.ids.shape[0] > 1:
            run.lock(factor.ids, "vocabulary of an embedding")
        else:
            result.append(Factor(factor.ids.reshape([1] * extra + [-1]), extra))
    return tuple(result)


def _embedding_bag(run: Propagation, call: Call) -> list[Labels]:
    """Rows are looked up and summed, or the largest entries taken, channel by channel."""
    run.unread(call.name, call["indices"], call["offsets"], call["per_sample_weights"])
    passed = []
    run.produces(call["weight"], 1)
    for factor in run.labels(call["weight"]):
        if factor.dim == 0 or factor.ids.shape[0] > 1:
            run.lock(factor.ids, "vocabulary of an embedding")
        else:
            passed.append(factor)
            run.lock_if_used(call.outputs[3], factor.ids, "the index of the largest entry")
    return [tuple(passed), *[()] * (len(call.outputs) - 1)]


_CHOSEN = "the data choose among these matrices"


def _grouped_mm(run: Propagation, call: Call) -> Labels:
    return grouped_product(run, call["self"], call["mat2"], call.out, call.get("offs"))


def grouped_product(run: Propagation, x: Tensor, experts: Tensor, out: Tensor, offs: Tensor | None = None) -> Labels:
    """The experts of a mixture, ``[m, k] x [g, k, n] -> [m, n]``: every row is multiplied with one of ``g`` matrices.

    Which one, ``offs [g]`` decides: where that counts how often each matrix was chosen, whole ones may go, else all
    stay. ``[g, m, k] x [g, k, n]`` is a ``bmm``.
    """
    if experts.ndim != 3:
        run.lock_all(
            (*run.labels(x), *run.labels(experts), *run.labels(offs)), "a product whose blocks the data decide"
        )
        run.term(float(x.shape[-1] * out.numel()) / (out.shape[0] if out.ndim == 3 else 1), ())
        return ()
    _note(run, x, experts)
    dims = _dims_of(run, experts)
    if x.ndim == 3:
        run.unread("grouped_mm", offs)
        return contract(
            run, [operand(run, x, "gmk"), Operand(tuple(experts.shape), run.labels(experts), "gkn", dims)], "gmn"
        )
    ends, counted, matrices = run.counted_chosen(offs, ends=True), run.labels(offs), []
    whole = [f for f in run.labels(experts) if f.varying == (0,)]
    if ends is None or not whole:
        run.lock_all((*counted, *whole), _CHOSEN)
    for factor in run.labels(experts):
        if factor.varying == (0,) and ends is not None:
            run.route(factor.ids, ends)
        elif factor.dim == 0:
            run.lock(factor.ids, _CHOSEN)
        else:
            one = run.collapse(factor, [0])
            matrices.append(one.laid(one.ids.reshape(one.ids.shape[1:]), one.dim - 1))
    shared = None if dims is None else (dims[0], dims[1][1:])
    matrix = Operand(tuple(experts.shape[1:]), tuple(matrices), "kn", shared)
    return contract(run, [operand(run, x, "mk"), matrix], "mn")


def _dims_of(run: Propagation, weight: Tensor) -> tuple[str, tuple[int, ...]] | None:
    """See ``parameter_dims``; of ``[g, n, k]`` with its last two dims exchanged too."""
    known = run.parameter_dims(weight)
    return known if known is None or weight._base is None or known[1][0] == 0 else (known[0], (0, 2, 1))


# -- repairs -----------------------------------------------------------------------------------------------------------


def _repair_grouped_mm(repair: Repair, node: fx.Node) -> None:
    """Rows must be multiples of 16 bytes: what is left of them is filled up with zeros, which are cut off again."""
    a, b = argument(node, 0, "self"), argument(node, 1, "mat2")
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        raise UnrepairableError(node, "the operands are given by name", channels_of(repair.dense(node)))
    x, weight = repair.value(a), repair.value(b)
    step = 16 // x.dtype.itemsize
    inner, outer = -weight.shape[-2] % step, -weight.shape[-1] % step
    known = repair.dense(b)
    if not (inner or outer) or not any(repair.is_cut(known, weight.ndim - place) for place in (1, 2)):
        return
    with repair.code.inserting_before(node):
        wide = repair.code.call_function(nn.functional.pad, (a, (0, inner)))
        filled = repair.code.call_function(nn.functional.pad, (b, (0, outer, 0, inner)))
        product = repair.code.call_function(cast(Any, node.target), (wide, filled, *node.args[2:]), dict(node.kwargs))
    promised = repair.promised(node)
    for made in (wide, filled, product):
        made.meta = origin(node)
    repair.values[wide] = nn.functional.pad(x, (0, inner))
    repair.values[filled] = nn.functional.pad(weight, (0, outer, 0, inner))
    repair.values[product] = torch.empty((*promised[:-1], promised[-1] + outer), dtype=x.dtype, device="meta")
    node.target, node.args, node.kwargs = torch.narrow, (product, -1, 0, promised[-1]), {}


# -- on meta tensors --------------------------------------------------------------------------------------------------


def _meta_addmm(bias: Tensor, a: Tensor, b: Tensor, **factors: Any) -> Tensor | None:
    """``bias [n]``, ``a [m, k]``, ``b [k, n]`` -> ``[m, n]``."""
    if a.ndim != 2 or not is_plain(a) or not fits(b, (a.shape[1], b.shape[-1]), a) or not fits(bias, (b.shape[-1],), a):
        return None
    return empty((a.shape[0], b.shape[1]), a)


def _meta_grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor | None:
    """``[m, k] x [g, k, n]``, ``[g, m, k] x [g, k, n]``, ``[g, m, k] x [k, n]`` or ``[m, k] x [k, n]`` with g offsets.

    Which widths and dtypes a device can is a question to the device.
    """
    if not a.is_meta or a.shape[-1] != b.shape[-2] or a.dtype != b.dtype or bias is not None:
        return None
    lead = list(a.shape[:1]) if a.ndim == b.ndim == 3 else []
    if a.ndim == b.ndim == 2:
        lead = [] if offs is None else [offs.shape[0]]
    return torch.empty((*lead, a.shape[-2], b.shape[-1]), dtype=out_dtype or a.dtype, device="meta")


def _add_is_refused(bias: Tensor, *_: Any) -> bool:
    return bias.ndim > 2


def _lookup_is_refused(weight: Tensor, index: Tensor, *_: Any) -> bool:
    return not is_within(index, weight.shape[0])


# -- layers -----------------------------------------------------------------------------------------------------------


@layer(nn.Linear)
def _linear_layer(module: nn.Linear, before: Shape, after: Shape) -> None:
    module.out_features, module.in_features = module.weight.shape


@layer(nn.Embedding, nn.EmbeddingBag)
def _embedding_layer(module: nn.Embedding | nn.EmbeddingBag, before: Shape, after: Shape) -> None:
    module.embedding_dim = module.weight.shape[1]


@layer(nn.RNNBase)
def _recurrent(module: Any, before: Shape, after: Shape) -> None:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.input_size = module.weight_ih_l0.shape[1]
    module.hidden_size = module.weight_ih_l0.shape[0] // gates
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]


@layer(nn.RNNCellBase)
def _recurrent_cell(module: Any, before: Shape, after: Shape) -> None:
    module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]


@layer(nn.Bilinear)
def _bilinear(module: nn.Bilinear, before: Shape, after: Shape) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


# -- the oracle's counterparts, which share no code with what is above ------------------------------------------------


def _masked_product(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    return func(args[0].masked_fill(~on, 0), *args[1:], **kwargs)


def _masked_sum(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    bias, first, *rest = args
    return func(bias, first.masked_fill(~on, 0), *rest, **kwargs)


def _masked_distance(func: Any, on: Tensor, args: Any, kwargs: Any) -> Any:
    """Zeros on both sides add nothing to a distance."""
    x1, x2, *rest = args
    stays = on.any(-2, keepdim=True)  # the same channels of every row
    return func(x1.masked_fill(~stays, 0), x2.masked_fill(~stays, 0), *rest, **kwargs)


def _double_grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """As PyTorch's, which has no kernel for double."""
    if offs is None:
        return a @ b
    ends = offs.tolist()
    spans = [*zip([0, *ends[:-1]], ends, strict=True)]
    if a.ndim == 2 and b.ndim == 3:
        parts = [a[i:j] @ matrix for (i, j), matrix in zip(spans, b, strict=True)]
        return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[-1])])
    if a.ndim == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in spans])
    return torch.cat([matrix @ b[:, i:j] for (i, j), matrix in zip(spans, a, strict=True)], 1)


# -- the ops -----------------------------------------------------------------------------------------------------------

_UNCOUNTED = "PyTorch's counter leaves it out, too"
_COUNTED = "counted where its labels are contracted"
_FACTORS = ("alpha", "beta")
_op = adder(__name__, cost=_COUNTED)
_product = adder(__name__, mask=_masked_product, counted="product")
_sum = adder(__name__, mask=_masked_sum, counted="product", operand=1)

_product("mm", label=_matmul, cost=_COUNTED, multiplies=("self", "mat2"), takes="floats of one kind",
         refit=product("self", "mat2", "ik,kj->ij"))  # fmt: skip
_product("bmm", label=_matmul, cost=_COUNTED, multiplies=("self", "mat2"), takes="floats of one kind",
         refit=product("self", "mat2", "bik,bkj->bij"))  # fmt: skip
_product("mv", label=_matmul, cost=_UNCOUNTED, takes="floats of one kind", refit=product("self", "vec", "ik,k->i"))
_product("dot", label=_matmul, cost=_UNCOUNTED, takes="floats of one kind", refit=product("self", "tensor", "k,k->"))
_product("vdot", label=_matmul, cost=_UNCOUNTED, refit="of complex numbers it conjugates one operand")
_product("linear", label=_linear, cost=_COUNTED, refit=product("input", "weight", "...k,ok->...o", "bias"))
_product(
    "_grouped_mm", label=_grouped_mm, cost=_COUNTED, repair=_repair_grouped_mm, meta={"default": _meta_grouped_mm},
    double=_double_grouped_mm, refit="the data decide which matrix a row meets",
)  # fmt: skip
_sum("addmm", label=_add_matmul, cost=_COUNTED, multiplies=("mat1", "mat2"), takes="floats of one kind",
     refuses=_add_is_refused, meta={"default": _meta_addmm},
     refit=product("mat1", "mat2", "ik,kj->ij", "self", _FACTORS))  # fmt: skip
_sum("baddbmm", label=_add_matmul, cost=_COUNTED, multiplies=("batch1", "batch2"), takes="floats of one kind",
     refit=product("batch1", "batch2", "bik,bkj->bij", "self", _FACTORS))  # fmt: skip
_sum("addmv", label=_add_matmul, cost=_UNCOUNTED, refit=product("mat", "vec", "ik,k->i", "self", _FACTORS))
_op("_cdist_forward", "_euclidean_dist", label=_distances, mask=_masked_distance, counted="distance", cost=_UNCOUNTED,
    refit="a distance is not linear in a weight")  # fmt: skip
_op(
    "_trilinear", label=_trilinear, cost=_UNCOUNTED, mask="the weight's slices are zero where a channel goes",
    repair="it names dims, not sizes", refit="a product of three is not refitted",
)  # fmt: skip
_op(
    "embedding", label=_embedding, takes="anything", refuses=_lookup_is_refused, cost="it multiplies nothing",
    mask="rows are looked up: what a channel holds stays its own", repair="the vocabulary stays",
    refit="its rows are looked up: there is nothing to solve for",
)  # fmt: skip
_op(
    "_embedding_bag", "_embedding_bag_forward_only", label=_embedding_bag, cost="it multiplies nothing",
    mask="rows are summed: what a channel holds stays its own", repair="the vocabulary and the bags stay",
    refit="its rows are looked up: there is nothing to solve for",
)  # fmt: skip

# Made of other ops; a recorded graph calls it.
_call = adder(__name__)
_call("python::grouped_mm", repair=_repair_grouped_mm)
