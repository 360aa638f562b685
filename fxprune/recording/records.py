"""Example inputs as plain data, a *record*: described, made again with other sizes and values, and asked about."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.recording import near
from fxprune.recording.spec import TensorSpec
from fxprune.recording.structure import leaves_of, map_leaves, path_text, paths

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

RECORD_KEY = "fxprune_inputs"
"""Where a recorded ``GraphModule`` keeps ``describe_inputs`` of what it was recorded with, in its ``meta``."""

DIMS_KEY = "fxprune_input_dims"
"""Where it keeps which dims of its inputs are free: a list of dicts with the keys ``tensor`` (index in the order of
``specs_of``), ``dim``, ``size``, ``free`` and ``why``. What is not listed may be free."""


def describe_inputs(args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """Plain data that says how to make such inputs again: the same structure with a :class:`TensorSpec` per tensor.

    The first floating-point tensor is taken for data, whatever its values; others that are all ones or all zeros for
    masks and the like, which stay as they are.
    """
    data: list[Tensor] = []

    def describe(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_floating_point():
            data.append(leaf)
        return TensorSpec.of(leaf, may_be_constant=len(data) > 1)

    return {"args": map_leaves(describe, tuple(args)), "kwargs": map_leaves(describe, dict(kwargs))}


def make_inputs(
    record: Mapping[str, Any],
    device: torch.device | str = "cpu",
    batch: int | None = None,
    seed: int = 0,
    permute: bool = True,
) -> tuple[Args, Kwargs]:
    """Fresh ``(args, kwargs)`` near those that a record of :func:`describe_inputs` describes; the same for a seed.

    Args:
        record: of inputs.
        device: where the tensors go.
        batch: takes the place of dim 0 of every tensor whose dim 0 is the recorded batch size, which is dim 0 of the
            first tensor.
        seed: of the random numbers.
        permute: False for the example's own integers, for networks that refuse others. See :meth:`TensorSpec.make`.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(leaf: Any) -> Any:
        if not isinstance(leaf, TensorSpec):
            return leaf
        return leaf.make(generator, device, batch if is_batched(leaf, record) else None, permute)

    made = map_leaves(make, {"args": record["args"], "kwargs": record["kwargs"]})
    return made["args"], made["kwargs"]


def with_values(record: Mapping[str, Any], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Copies of inputs with the values that a record keeps in the place of theirs: integers, booleans and masks.

    Floats stay those of the inputs, which have the structure and the shapes of the record.
    """
    specs = iter(specs_of(record))

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        spec = next(specs)
        return leaf if spec.values is None else spec.example().to(device=leaf.device, dtype=leaf.dtype)

    made = map_leaves(put, {"args": args, "kwargs": kwargs})
    return made["args"], made["kwargs"]


def other_values(record: Mapping[str, Any], positional: Sequence[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """At most three variations of the integers, booleans and masks of a record, near its own values.

    They tell what a network makes of its masks and ids beyond the example: all masks with what hides (zeros, of
    attention masks) over the last quarter of the last row, all masks with it over the first quarter, and all ids
    permuted along the last dim. A row never loses all that it shows. A variation that would change nothing is left out.

    Args:
        record: of inputs.
        positional: the names of the positional parameters of ``forward``, for the texts.

    Returns:
        Pairs of a text, such as "attention_mask with zeros at its end", and the varied record. Inputs come of it by
        :func:`with_values` on the example, or by ``make_inputs(record, permute=False)``, which draws the floats anew.
    """
    specs, names = specs_of(record), input_names(record, positional)
    masks = [n for n, spec in enumerate(specs) if spec.is_mask and spec.shape[-1:] > (1,) and 0 not in spec.shape]
    result = []
    for at_end, where in ((True, "end"), (False, "start")):
        changed = {n: specs[n].with_values(near.hiding_more(specs[n].example(), at_end)) for n in masks}
        changed = {n: spec for n, spec in changed.items() if spec != specs[n]}
        texts = [f"{names[n]} with {_hiding_text(specs[n])} at its {where}" for n in changed]
        result.append((", ".join(texts), changed))
    generator = torch.Generator().manual_seed(0)
    changed = {
        n: spec.with_values(_reordered(spec.example(), generator)) for n, spec in enumerate(specs) if spec.is_ids
    }
    changed = {n: spec for n, spec in changed.items() if spec != specs[n]}
    result.append((f"{', '.join(names[n] for n in changed)} permuted", changed))
    return [(text, _with_specs(record, changed)) for text, changed in result if changed]


def _reordered(values: Tensor, generator: torch.Generator) -> Tensor:
    """Permuted, and not by chance as before."""
    new = near.permuted(values, generator)
    return new.roll(1, -1) if new.ndim and torch.equal(new, values) else new


def _hiding_text(spec: TensorSpec) -> str:
    value = near.hiding(spec.example())
    if isinstance(value, bool):
        return str(value)
    return {0.0: "zeros", 1.0: "ones"}.get(value, f"{value:.3g}")


def like_parameters(record: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The record with its floating-point tensors in the dtype of the module's first floating-point parameter."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)

    def cast(leaf: Any) -> Any:
        if dtype is None or not isinstance(leaf, TensorSpec) or not leaf.dtype.is_floating_point:
            return leaf
        return dataclasses.replace(leaf, dtype=dtype)

    return {"args": map_leaves(cast, record["args"]), "kwargs": map_leaves(cast, record["kwargs"])}


def batch_size(record: Mapping[str, Any]) -> int | None:
    """Dim 0 of the first tensor of a record; None without a tensor that has one."""
    return next((spec.shape[0] for spec in specs_of(record) if spec.shape), None)


def is_batched(spec: TensorSpec, record: Mapping[str, Any]) -> bool:
    """Whether dim 0 of this tensor of the record is the batch: whether it is as long as the first tensor's."""
    return bool(spec.shape) and spec.shape[0] == batch_size(record)


def image_size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width, the last two dims, of the first tensor with four dims or more; None without one."""
    return next((spec.shape[-2:] for spec in specs_of(record) if len(spec.shape) >= 4), None)  # type: ignore[return-value]


def is_image(spec: TensorSpec, record: Mapping[str, Any]) -> bool:
    """Whether the last two dims of this tensor of the record are the height and width of ``image_size``."""
    return len(spec.shape) >= 4 and spec.shape[-2:] == image_size(record)


def resized(record: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The record with its images at another height and width."""
    images = [n for n, spec in enumerate(specs_of(record)) if is_image(spec, record)]
    return with_sizes(record, {(n, dim): length for n in images for dim, length in zip((-2, -1), size, strict=True)})


def with_sizes(record: Mapping[str, Any], sizes: Mapping[tuple[int, int], int]) -> dict[str, Any]:
    """The record with other sizes of some dims; everything else stays.

    Kept values follow: along the batch the example's rows are taken in turn, along other dims ids start again, a mask
    goes on with its last value, and what is too long is cut (see ``fxprune.recording.near.fitted``).

    Args:
        record: of inputs.
        sizes: (index of the tensor in the order of :func:`specs_of`, dim) -> new size; dims count from the end where
            negative.

    Raises:
        IndexError: there is no such tensor or dim.
    """
    specs = specs_of(record)
    shapes: dict[int, list[int]] = {}
    for (index, dim), size in sizes.items():
        if not 0 <= index < len(specs) or not -len(specs[index].shape) <= dim < len(specs[index].shape):
            raise IndexError(f"the inputs have no dim {dim} of a tensor {index}")
        shapes.setdefault(index, list(specs[index].shape))[dim] = size
    changed = {n: specs[n].with_shape(shape, is_batched(specs[n], record)) for n, shape in shapes.items()}
    return _with_specs(record, changed)


def fixed_dims(module: nn.Module) -> dict[tuple[int, int], str]:
    """The dims of its inputs for which a recorded graph says that they are fixed, and why.

    Returns:
        (index of the tensor in the order of :func:`specs_of`, dim) -> why.
    """
    rows = module.meta.get(DIMS_KEY, ()) if isinstance(module, torch.fx.GraphModule) else ()
    return {(row["tensor"], row["dim"]): str(row["why"]) for row in rows if not row["free"]}


def fixed_batch(module: nn.Module, record: Mapping[str, Any]) -> str | None:
    """Why a recorded graph runs at its example's batch size only; None where it does not say so."""
    fixed = fixed_dims(module)
    batched = ((n, 0) for n, spec in enumerate(specs_of(record)) if is_batched(spec, record))
    return next((fixed[dim] for dim in batched if dim in fixed), None)


def only_batch(module: nn.Module, record: Mapping[str, Any]) -> int | None:
    """The batch size that a recorded graph runs at alone; None where it does not say so."""
    return None if fixed_batch(module, record) is None else batch_size(record)


def _with_specs(record: Mapping[str, Any], changed: Mapping[int, TensorSpec]) -> dict[str, Any]:
    """The record with some of ``specs_of`` replaced."""
    numbers = itertools.count()

    def replace(leaf: Any) -> Any:
        return changed.get(next(numbers), leaf) if isinstance(leaf, TensorSpec) else leaf

    made: dict[str, Any] = map_leaves(replace, {"args": record["args"], "kwargs": record["kwargs"]})
    return made


def specs_of(record: Mapping[str, Any]) -> list[TensorSpec]:
    """The tensors of a record, in the order of :func:`tensors_of` on what :func:`make_inputs` makes of it."""
    return [leaf for leaf in leaves_of((record["args"], record["kwargs"])) if isinstance(leaf, TensorSpec)]


def input_names(record: Mapping[str, Any], positional: Sequence[str] = ()) -> list[str]:
    """Of every tensor of a record what Python calls it: ``x``, ``batch['ids']``, ``cache.layers[0].keys``.

    Args:
        record: of inputs.
        positional: the names of the positional parameters of ``forward``; ``input_0`` and so on for those not given.
    """
    args, kwargs = record["args"], record["kwargs"]
    prefixes = [positional[n] if n < len(positional) else f"input_{n}" for n in range(len(args))] + list(kwargs)
    values = (*args, *kwargs.values())
    return [
        prefixes[first.key] + path_text(values[first.key], path)
        for (first, *path), leaf in paths(values)
        if isinstance(leaf, TensorSpec)
    ]
