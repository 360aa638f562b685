"""Example inputs: checked when given, inferred where the model says enough, and made afresh for another batch size."""

import dataclasses
import inspect
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import ExampleInputsError
from fxprune.recording import near
from fxprune.recording.structure import StandIn, path_text, paths
from fxprune.recording.structure import leaves_of as leaves_of  # noqa: PLC0414
from fxprune.recording.structure import map_leaves as map_leaves  # noqa: PLC0414
from fxprune.recording.structure import tensors_of as tensors_of  # noqa: PLC0414

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

RECORD_KEY = "fxprune_inputs"
"""Where a recorded ``GraphModule`` keeps ``describe_inputs`` of what it was recorded with, in its ``meta``."""

DIMS_KEY = "fxprune_input_dims"
"""Where it keeps which dims of its inputs are free: a list of dicts with the keys ``tensor`` (index in the order of
``specs_of``), ``dim``, ``size``, ``free`` and ``why``. What is not listed may be free."""

# torchvision's classification models take any size from about 32 up, but are defined and measured at these.
_TORCHVISION_SIZE = 224
_TORCHVISION_SIZES = {"Inception3": 299}
# Models of these packages take lists of images, clips or pairs of frames: no single tensor fits them.
_TORCHVISION_OTHER_TASKS = ("detection", "video", "optical_flow")

# As many integers as a few thousand sentences have, and a square mask of a few thousand tokens, if it has few runs.
_MOST_VALUES = 2**16
_LARGEST_MASK = 2**24


@dataclass(frozen=True)
class TensorSpec(StandIn):
    """What it takes to make a tensor like one that was seen: its shape and dtype, and for integers, booleans and masks
    (see ``fxprune.recording.near``) its values.

    Values matter because integers are indices as a rule (tokens, positions, classes): an embedding refuses those
    outside its table. On meta there are none, and integers count as zeros.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        low, high: the range of an integer tensor.
        values: of integers, booleans and masks, in order; None for other tensors, and for those too large to keep:
            such integers are drawn from their range.
        counts: how often each of ``values`` comes in a row, for large masks; None for once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    low: int = 0
    high: int = 0
    values: tuple[float, ...] | None = field(default=None, repr=False)
    counts: tuple[int, ...] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, tensor: Tensor, may_be_constant: bool = False) -> "TensorSpec":
        """Of this tensor. ``may_be_constant``: only ones, or only zeros, are a mask too."""
        low = high = 0
        shape = tuple(int(size) for size in tensor.shape)
        if tensor.is_meta:
            return cls(shape, tensor.dtype)
        tensor = tensor.detach()
        if _is_integer(tensor.dtype) and tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
        return cls(shape, tensor.dtype, low, high, *_values_to_keep(tensor, may_be_constant))

    @property
    def is_mask(self) -> bool:
        """Whether the values are kept and are those of a mask."""
        return self.values is not None and (self.dtype.is_floating_point or near.is_mask(self._distinct()))

    @property
    def is_ids(self) -> bool:
        """Whether the values are kept and are integers, but no mask."""
        return self.values is not None and not self.is_mask

    def example(self) -> Tensor:
        """The values that were kept, on the CPU, as booleans, int64 or float64."""
        assert self.values is not None
        values = torch.tensor(self.values, dtype=_wide(self.dtype))
        if self.counts is not None:
            values = values.repeat_interleave(torch.tensor(self.counts))
        return values.reshape(self.shape)

    def with_values(self, values: Tensor) -> "TensorSpec":
        """The same with other values, of any shape."""
        fresh = dataclasses.replace(self, shape=tuple(values.shape), values=None, counts=None)
        if values.numel() <= _MOST_VALUES:
            return dataclasses.replace(fresh, values=tuple(values.reshape(-1).tolist()))
        runs, counts = values.reshape(-1).unique_consecutive(return_counts=True)
        return dataclasses.replace(fresh, values=tuple(runs.tolist()), counts=tuple(counts.tolist()))

    def with_shape(self, shape: Sequence[int], batched: bool = True) -> "TensorSpec":
        """The same at another size of any dim; for the values see ``fxprune.recording.near.fitted``."""
        if self.values is None or 0 in self.shape:
            return dataclasses.replace(self, shape=tuple(shape), values=None, counts=None)
        return self.with_values(near.fitted(self.example(), shape, self.is_mask, batched))

    def make(
        self,
        generator: torch.Generator,
        device: torch.device | str,
        batch: int | None = None,
        permute: bool = True,
    ) -> Tensor:
        """A tensor of this shape and dtype.

        Floats are standard normal. Masks are the example's. Integers are the example's, permuted along the last dim
        within each row; where they were not kept, random within their range, and booleans coin flips.

        Args:
            generator: of the random numbers.
            device: where the tensor goes.
            batch: in the place of dim 0; the example's rows are taken in turn.
            permute: False leaves the integers in the example's order.
        """
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        if self.values is not None and 0 not in self.shape:
            values = near.fitted(self.example(), shape, self.is_mask, batched=True)
            if permute and self.is_ids:
                values = near.permuted(values, generator)
        elif self.dtype == torch.bool:
            values = torch.randint(0, 2, shape, generator=generator).bool()
        elif _is_integer(self.dtype):
            values = torch.randint(self.low, self.high + 1, shape, generator=generator, dtype=torch.int64)
        elif self.dtype.is_complex:
            values = torch.randn(shape, generator=generator, dtype=torch.complex64)
        else:
            values = torch.randn(shape, generator=generator)
        return values.to(device=device, dtype=self.dtype)

    def _distinct(self) -> Tensor:
        return torch.tensor(sorted(set(self.values or ())), dtype=_wide(self.dtype))


def _values_to_keep(tensor: Tensor, may_be_constant: bool) -> tuple[tuple[float, ...] | None, tuple[int, ...] | None]:
    """``values`` and ``counts`` of a ``TensorSpec``."""
    if tensor.dtype.is_complex or tensor.numel() > _LARGEST_MASK:
        return None, None
    kept = tensor.numel() <= _MOST_VALUES
    integer = not tensor.dtype.is_floating_point
    constant = may_be_constant and tensor.ndim > 0 and near.is_constant(tensor)
    if not (integer and kept) and not constant and not near.is_mask(tensor):
        return None, None
    spec = TensorSpec((), tensor.dtype).with_values(tensor)
    return (spec.values, spec.counts) if len(spec.values or ()) <= _MOST_VALUES else (None, None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.bool:
        return dtype
    return torch.float64 if dtype.is_floating_point else torch.int64


def normalise_inputs(example_inputs: Any, example_kwargs: Any = None) -> tuple[Args, Kwargs]:
    """What the user passed, as ``(args, kwargs)``: a tensor is one argument, a tuple or a list is all of them.

    Raises:
        ExampleInputsError: something that cannot be spread over the arguments of ``forward``, or no tensor in it.
    """
    args = _as_args(example_inputs)
    if example_kwargs is None:
        kwargs: Kwargs = {}
    elif isinstance(example_kwargs, Mapping) and all(isinstance(name, str) for name in example_kwargs):
        kwargs = dict(example_kwargs)
    else:
        raise ExampleInputsError(
            f"example_kwargs is {_a(example_kwargs)}; pass a dict from argument names of forward to values"
        )
    if not tensors_of((args, kwargs)):
        raise ExampleInputsError(
            "the example inputs hold no tensor; pass the tensors that the model's forward takes, "
            "as example_inputs=(x, ...) or example_kwargs={'x': ...}"
        )
    return args, kwargs


def infer_inputs(model: nn.Module) -> tuple[Args, Kwargs]:
    """Example inputs ``(args, kwargs)``, batch size 1, for a model that says what it takes; the same at every call.

    A graph that fxprune recorded knows what it was recorded with, with the values of integers and masks. timm's models
    carry their input size in ``pretrained_cfg``. torchvision's classification models are taken at 224 x 224 (Inception
    v3 at 299), and so are its segmentation models: these are fully convolutional, every MAC ratio is that of any other
    size, and 224 is a multiple of their stride of 8 to 32. The tensors are standard normal, on the device and of the
    dtype of the first parameter.

    Raises:
        ExampleInputsError: the model is none of these; says what to pass.
    """
    recorded = model.meta.get(RECORD_KEY) if isinstance(model, torch.fx.GraphModule) else None
    if recorded is not None:
        return make_inputs(recorded, next(model.parameters(), torch.empty(0)).device, permute=False)
    shape = _timm_shape(model) or _torchvision_shape(model)
    if shape is None:
        raise ExampleInputsError(_cannot_infer(model))
    return (image_like(model, shape),), {}


def infer_example_inputs(model: nn.Module) -> Args:
    """The positional half of :func:`infer_inputs`."""
    return infer_inputs(model)[0]


def image_like(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """A standard normal tensor [1, *shape] on the device and of the dtype of the first parameter; always the same."""
    parameter = next(model.parameters(), torch.empty(0))
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    return TensorSpec((1, *shape), dtype).make(torch.Generator().manual_seed(0), parameter.device)


def resolve_inputs(model: nn.Module, example_inputs: Any = None, example_kwargs: Any = None) -> tuple[Args, Kwargs]:
    """What the user passed, checked; inferred from the model where nothing was passed.

    Raises:
        ExampleInputsError: see :func:`normalise_inputs` and :func:`infer_inputs`.
    """
    if example_inputs is None and not example_kwargs:
        return infer_inputs(model)
    return normalise_inputs(example_inputs, example_kwargs)


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


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter is; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def like_parameters(record: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The record with its floating-point tensors in the dtype of the module's first floating-point parameter."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)

    def cast(leaf: Any) -> Any:
        if dtype is None or not isinstance(leaf, TensorSpec) or not leaf.dtype.is_floating_point:
            return leaf
        return dataclasses.replace(leaf, dtype=dtype)

    return {"args": map_leaves(cast, record["args"]), "kwargs": map_leaves(cast, record["kwargs"])}


def to_json(record: Any) -> Any:
    """A record as what JSON can hold: every structure as an object with its kind as the key.

    Raises:
        TypeError: it holds something else than tensors, numbers, strings, None, tuples, lists and dicts.
    """
    if isinstance(record, TensorSpec):
        name = str(record.dtype).removeprefix("torch.")
        content: list[Any] = [list(record.shape), name, record.low, record.high]
        if record.values is not None:
            # JSON has no infinity.
            content.append([str(value) if math.isinf(value) else value for value in record.values])
            content += [list(record.counts)] if record.counts is not None else []
        return {"tensor": content}
    if type(record) in (tuple, list):
        return {type(record).__name__: [to_json(item) for item in record]}
    if type(record) is dict and all(isinstance(key, str) for key in record):
        return {"dict": {key: to_json(item) for key, item in record.items()}}
    if record is None or type(record) in (bool, int, float, str):
        return record
    raise TypeError(f"a {type(record).__name__} among the example inputs")


def from_json(value: Any) -> Any:
    """The record that ``to_json`` was given.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        shape, name, low, high, *kept = content  # older files keep no values
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name!r} is no dtype")
        return _checked(TensorSpec(tuple(shape), dtype, low, high, *_kept_from_json(*kept)))
    if kind == "dict":
        return {key: from_json(item) for key, item in content.items()}
    items = [from_json(item) for item in content]
    return tuple(items) if kind == "tuple" else items


def _kept_from_json(
    values: Sequence[float | str] | None = None, counts: Sequence[int] | None = None
) -> tuple[tuple[float, ...] | None, tuple[int, ...] | None]:
    return (
        None if values is None else tuple(float(value) if isinstance(value, str) else value for value in values),
        None if counts is None else tuple(counts),
    )


def _checked(spec: TensorSpec) -> TensorSpec:
    if spec.values is not None:
        length = len(spec.values) if spec.counts is None else sum(spec.counts)
        numbers = all(isinstance(value, (bool, int, float)) for value in (*spec.values, *(spec.counts or ())))
        if not numbers or length != math.prod(spec.shape) or len(spec.counts or spec.values) != len(spec.values):
            raise ValueError(f"the values of a tensor {list(spec.shape)} are not its own")
    return spec


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


def _as_args(example_inputs: Any) -> Args:
    if example_inputs is None:
        return ()
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    # A named tuple is one structured argument to most models, yet it is a tuple; the user can always wrap it.
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, (str, bytes)):
        return tuple(example_inputs)
    if isinstance(example_inputs, Mapping):
        raise ExampleInputsError(
            "example_inputs is a dict; pass keyword arguments as example_kwargs=..., "
            "or, if forward takes the dict itself, wrap it: example_inputs=(the_dict,)"
        )
    if hasattr(example_inputs, "__array__"):
        raise ExampleInputsError(
            f"example_inputs is {_a(example_inputs)}; pass a torch tensor, for instance torch.as_tensor(example_inputs)"
        )
    raise ExampleInputsError(
        f"example_inputs is {_a(example_inputs)}; pass a tensor, or a tuple of all positional arguments of forward"
    )


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeio" else f"a {name}"


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _timm_shape(model: nn.Module) -> tuple[int, ...] | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if config is None:
        return None
    read = config.get if isinstance(config, Mapping) else lambda key: getattr(config, key, None)
    declared = read("input_size")
    if not isinstance(declared, Sequence) or len(declared) != 3:
        return None
    channels, height, width = declared
    # The configuration is that of the published weights; create_model(in_chans=1, img_size=96) does not change it.
    first = read("first_conv")
    if isinstance(first, str):
        seen = getattr(_submodule(model, first), "in_channels", channels)
        # Space-to-depth before the first convolution multiplies what the network is given.
        channels = seen if seen < 2 * channels else channels
        size = getattr(_submodule(model, first.rpartition(".")[0]), "img_size", None)
        if isinstance(size, Sequence) and len(size) == 2:
            height, width = size
    return int(channels), int(height), int(width)


def _torchvision_shape(model: nn.Module) -> tuple[int, ...] | None:
    prefix = "torchvision.models."
    home = next((cls for cls in type(model).__mro__ if cls.__module__.startswith(prefix)), None)
    if home is None or home.__module__.removeprefix(prefix).split(".")[0] in _TORCHVISION_OTHER_TASKS:
        return None
    # Parts of a network live in the same modules: a BasicBlock takes features, not images.
    if not _is_whole_network(home):
        return None
    known = (_TORCHVISION_SIZES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _TORCHVISION_SIZES)
    size = getattr(model, "image_size", next(known, _TORCHVISION_SIZE))
    stem = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    return (stem.in_channels if stem is not None else 3), size, size


def _is_whole_network(home: type) -> bool:
    """Whether a function of its torchvision module (``resnet50``, ``vit_b_16``) says that it returns this class."""
    return any(
        inspect.isfunction(builder) and inspect.signature(builder).return_annotation in (home, home.__name__)
        for builder in vars(sys.modules[home.__module__]).values()
    )


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _cannot_infer(model: nn.Module) -> str:
    parameters = inspect.signature(model.forward).parameters
    return (
        f"cannot tell what {type(model).__name__}.forward({', '.join(parameters)}) takes: example inputs are inferred "
        "for timm models and for torchvision's classification and segmentation models only; pass example_inputs, "
        "a tensor or a tuple of tensors with the batch first, for instance example_inputs=torch.randn(1, 3, 224, 224)"
    )
