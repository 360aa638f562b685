"""``save`` and ``load``: a pruned network as one file.

``.safetensors`` holds data only: the tensors under their names in the state_dict, and in the header's metadata, as
JSON, the plan, what the network is called with, a sample of what it returns, versions and a digest over all of it.
Loading records a fresh instance of the class, applies the plan and puts the tensors in. ``.pt2`` is a program of
torch.export with the same metadata beside it: it needs no class.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.api import applied
from fxprune.deploy.program import read_program, read_program_notes, write_program
from fxprune.errors import ArtifactError, ExampleInputsError, InputError, check_flags
from fxprune.io.files import as_path, check_writable, replacing
from fxprune.io.forms import Either, FormError, Map, Real, Such, Whole, anything, check, json_of
from fxprune.io.specs import misfits
from fxprune.reconstruction.result import FORM as RECONSTRUCTION
from fxprune.reconstruction.result import Reconstruction
from fxprune.recording import evaluated, replace_tensors
from fxprune.recording.checks import checked_inputs
from fxprune.recording.inputs import (
    RECORD_KEY,
    device_of,
    from_json,
    like_parameters,
    make_inputs,
    specs_of,
    tensors_of,
    to_json,
)
from fxprune.recording.randomness import repeatable
from fxprune.reports.report import Report, pruned_part
from fxprune.selection.plan import PruningPlan
from fxprune.version import __version__

KEY = "fxprune"
"""Where the header's metadata is, in the safetensors file."""

SAMPLE_TOLERANCE = 1e-2
"""Largest accepted difference between the outputs when saved and when loaded, relative to the largest: enough for
another machine's rounding, not for another activation or a changed forward."""

_FORMAT = 1
_SUFFIXES = (".safetensors", ".pt2")
_SAMPLE = 16  # values of every output
_SAMPLE_SEED = 0
_MOST_ENTRIES = 2**28
"""Of all example inputs together. A few digits in a file can claim any size, so larger ones are passed to ``load``."""

_DTYPE_NAMES = re.compile(r"bool|u?int(8|16|32|64)|b?float(16|32|64)|float8_\w+|complex(32|64|128)")
_DTYPES = {n for n, t in vars(torch).items() if isinstance(t, torch.dtype) and _DTYPE_NAMES.fullmatch(n)}
_DTYPE = Such(str, lambda name: name in _DTYPES, "the name of a dtype")
_INT64 = Whole(-(2**63), 2**63 - 2)
_SHAPE = Such([Whole()], lambda shape: len(shape) <= 25, "a shape of at most 25 dimensions")
_SPEC = (_SHAPE, _DTYPE, _INT64, _INT64)
_VALUES = [Either(bool, Whole(-(2**63)), Real(), "inf", "-inf")]
_TENSOR = Such(
    Either(_SPEC, (*_SPEC, _VALUES), (*_SPEC, _VALUES, [Whole(1)])),
    lambda spec: spec[2] <= spec[3],
    "shape, dtype, least and largest value, then values and how often each comes in a row, where they are kept",
)
_COUNTS = (Whole(), Whole())


def _input() -> Either:
    """What ``fxprune.recording.inputs.to_json`` makes of a part of a record."""
    plain = (None, bool, Whole(-(2**63)), Real(finite=False), str)
    return Either(*plain, {"tensor": _TENSOR}, {"list": [_input]}, {"dict": Map(_input)}, {"tuple": [_input]})


_INPUTS = Such(
    {"dict": {"args": {"tuple": [_input]}, "kwargs": {"dict": Map(_input)}}},
    lambda inputs: _entries(inputs) <= _MOST_ENTRIES,
    f"example inputs of at most {_MOST_ENTRIES} entries; larger ones have to be passed",
)
_FORM = {
    "format": _FORMAT,
    "model": str,
    "part": str,
    "method": str,
    "macs": _COUNTS,
    "params": _COUNTS,
    "oracle_error": Either(None, Real(finite=False)),
    "plan": Map(anything),  # see there
    "inputs": Either(None, _INPUTS),
    "outputs": Either(None, [Such([Real(False)], lambda row: row and math.isfinite(row[0]), "a magnitude and values")]),
    "tied": Map(str),
    "orders": Map([Whole()]),
    "buffers": Map(_DTYPE),
    "versions": Map(str),
    "budget": Either(None, (Either("flops", "params", "channels", "latency"), Real())),
    "reconstruction": Either(None, RECONSTRUCTION),
}


def _entries(inputs: Any) -> int:
    """Of all tensors; a dimension of none counts as one, since sizes are multiplied nevertheless. Where values are not
    those of their tensor, more than there may be."""
    try:
        specs = specs_of(from_json(inputs))
    except ValueError:
        return _MOST_ENTRIES + 1
    return sum(math.prod(max(size, 1) for size in spec.shape) for spec in specs)


@dataclass(frozen=True)
class Artifact:
    """What a file of ``save`` says of itself.

    ``model``: class name. ``part``: the submodule that was pruned, "" for all of it. ``macs``, ``params``: dense and
    pruned. ``inputs``: a record (see ``fxprune.recording.inputs``), or None. ``outputs``: per tensor its largest
    magnitude and a sample of its values on inputs made from the record, or None. ``tied``: name -> the name that its
    tensor is stored under. ``orders``: name -> dimensions from the outermost in memory. ``buffers``: name -> dtype of
    those that a state_dict leaves out. ``budget``: (kind, ratio) that was asked for. ``reconstruction``: what a
    refit did, as data.
    """

    model: str
    part: str
    method: str
    macs: tuple[int, int]
    params: tuple[int, int]
    oracle_error: float | None
    plan: PruningPlan
    inputs: Any
    outputs: Any
    tied: Mapping[str, str]
    orders: Mapping[str, list[int]]
    buffers: Mapping[str, str]
    versions: Mapping[str, str]
    budget: tuple[str, float] | None = None
    reconstruction: Mapping[str, Any] | None = None

    def data(self) -> dict[str, Any]:
        return {**vars(self), "format": _FORMAT, "plan": self.plan.data()}


def save(pruned: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a pruned network, with the weights that it has now, as one file; nothing appears at ``path`` on an error.

    Args:
        pruned: what ``fxprune.prune``, ``apply`` or ``load`` returned, fine-tuned or not.
        path: ``.safetensors`` for data only, loaded into a fresh instance of the class; ``.pt2`` for a program that
            runs without the class, at any batch size, for inference.

    Raises:
        InputError: ``pruned`` is no pruned network, holds something that the format cannot, or ``path`` is unwritable.
        WriteError: writing failed on the way, on a full disk for instance.
        ExportError: torch.export cannot capture the network (``.pt2``).

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> fxprune.save(small, "small.safetensors")
    """
    path = check_path(path)
    if not isinstance(pruned, nn.Module):
        raise InputError(f"pruned is {pruned!r}; pass what fxprune.prune, apply or load returned.")
    artifact = _described(pruned)
    with replacing(path) as draft:
        if path.suffix == ".pt2":
            if artifact.part:
                raise InputError(
                    f"A program is written of a whole network: save {type(pruned).__name__} as .safetensors, or "
                    f"its {artifact.part} as .pt2."
                )
            module: Any = pruned
            write_program(pruned, draft, like_parameters(module.meta[RECORD_KEY], pruned), json.dumps(artifact.data()))
            return
        from safetensors.torch import save as to_bytes

        tensors = _to_store(pruned, artifact)
        text = json.dumps({**artifact.data(), "digest": _digest(artifact.data(), tensors)})
        # Not its save_file, which writes through a memory map: on a full disk that ends the process.
        draft.write_bytes(to_bytes(tensors, {KEY: text}))


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
) -> nn.Module:
    """Read what ``save`` wrote.

    Of a ``.safetensors`` file nothing is executed, whoever wrote it. A ``.pt2`` file is read by ``torch.export.load``,
    which evaluates what the file says: load those of people you trust only.

    Args:
        path: the file.
        model: for ``.safetensors`` a fresh, unpruned instance of the class, with any weights; not changed. The result
            is on its device, in the saved dtype.
        example_inputs: as for ``fxprune.prune``; those of the file if not given.
        example_kwargs: the same, keyword inputs.
        verify: compare the outputs on the file's own sample with those when it was saved.

    Returns:
        What was saved: a ``GraphModule``, or a copy of the model with one as the part that was pruned; of a ``.pt2``
        file a module for inference.

    Raises:
        ArtifactError: the file is damaged, of another kind, or does not fit the model (names what).
        PlanError: the plan in it belongs to another model.
        InputError: ``path`` or ``model`` cannot be used.
        ExampleInputsError: example inputs are needed, or do not fit.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> fxprune.save(small, "small.safetensors")
        >>> loaded = fxprune.load("small.safetensors", model)  # as a rule a fresh instance, in another process
        >>> bool(torch.equal(loaded.eval()(x), small.eval()(x)))
        True
    """
    check_flags(verify=verify)
    path = _existing(path)
    if path.suffix == ".pt2":
        if model is not None:
            raise InputError(f"{str(path)!r} is a program that needs no class: leave out the model.")
        artifact = read_artifact(path)
        program: nn.Module = read_program(path)
        if verify:
            _check_outputs(program, artifact, path)
        return program
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{str(path)!r} holds weights and a plan: pass a fresh, unpruned instance of {_read(path)[0].model} as "
            "model."
        )
    artifact, tensors = _read(path)
    part = _part(model, artifact, path)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise InputError("The model is on the meta device; make it on a real one: what it computes is not in the file.")
    args, kwargs = _inputs(part, artifact, example_inputs, example_kwargs)
    pruned = applied(part, artifact.plan, args, kwargs, artifact.method, verify=False)
    report: Report = pruned.meta[KEY]
    told = artifact.reconstruction and Reconstruction.of_data(artifact.reconstruction)
    pruned.meta[KEY] = replace(report, oracle_error=artifact.oracle_error, budget=artifact.budget, reconstruction=told)
    result: nn.Module = pruned
    if artifact.part:
        result = copy.deepcopy(model)
        result.set_submodule(artifact.part, pruned)
    _put(result, artifact, tensors, path)
    if verify:
        _check_outputs(result.get_submodule(artifact.part), artifact, path)
    return result


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """What a file says of itself.

    Raises:
        ArtifactError: it is damaged or of another kind.
        InputError: there is no such file, or its name says another kind.
    """
    path = _existing(path)
    if path.suffix == ".pt2":
        return _parsed(read_program_notes(path), path)
    return _read(path)[0]


def check_path(path: str | os.PathLike[str]) -> Path:
    """Refuse a path that ``save`` could not write.

    Raises:
        InputError: an unknown suffix, or see ``fxprune.io.files.check_writable``.
    """
    _check_suffix(as_path(path))
    return check_writable(path)


def _check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise InputError(
            f"{str(path)!r} must end in .safetensors (data, for a fresh instance of the class) or .pt2 (a program)"
        )


def _existing(path: str | os.PathLike[str]) -> Path:
    path = as_path(path)
    _check_suffix(path)
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}")
    return path


# -- writing --------------------------------------------------------------------------------------------------------


def _described(pruned: nn.Module) -> Artifact:
    name, part = pruned_part(pruned)
    report: Report = part.meta[KEY]
    state = pruned.state_dict(keep_vars=True)
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise InputError(f"{odd[0]} in the state_dict is no tensor, and a safetensors file holds nothing else.")
    empty = [key for key, value in state.items() if value.is_meta]
    if empty:
        raise InputError(f"{empty[0]} is on the meta device and has no values to save.")
    first = {id(tensor): key for key, tensor in reversed(state.items())}
    try:
        inputs = to_json(dict(part.meta[RECORD_KEY]))
        check(inputs, _INPUTS)
    except (TypeError, FormError):
        inputs = None  # such inputs have to be passed to load
    return Artifact(
        model=report.model if not name else type(pruned).__name__,
        part=name,
        method=report.method,
        macs=(report.macs_before, report.macs_after),
        params=(report.params_before, report.params_after),
        oracle_error=report.oracle_error,
        plan=report.plan,
        inputs=inputs,
        outputs=None if inputs is None else _sample(part, from_json(inputs)),
        tied={key: first[id(tensor)] for key, tensor in state.items() if first[id(tensor)] != key},
        orders={key: order for key, tensor in state.items() if (order := _order(tensor)) is not None},
        buffers={
            key: str(buffer.dtype).removeprefix("torch.")
            for key, buffer in pruned.named_buffers(remove_duplicate=False)
            if key not in state
        },
        budget=report.budget,
        reconstruction=report.reconstruction and report.reconstruction.data(),
        versions={"fxprune": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )


def _order(tensor: Tensor) -> list[int] | None:
    """The dimensions from the outermost in memory, where that is not their own order and there are no gaps."""
    strides: tuple[int, ...] = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda d: (-strides[d], d))
    dense = tensor.permute(order).is_contiguous()
    # Not is_contiguous(): kernels choose by the strides, also where a size of 1 leaves them open.
    return order if dense and strides != torch.empty(tensor.shape, device="meta").stride() else None


def _to_store(pruned: nn.Module, artifact: Artifact) -> dict[str, Tensor]:
    """Every tensor once, contiguous, on the CPU, in memory of its own."""
    result, memory = {}, set()
    for name, tensor in pruned.state_dict().items():
        if name in artifact.tied:
            continue
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in memory or storage.nbytes() != value.nbytes:
            value = value.clone()
        memory.add(storage.data_ptr())
        result[name] = value
    return result


def _digest(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Over the metadata, and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sample(module: nn.Module, record: Mapping[str, Any]) -> list[list[float]]:
    """Per output tensor: largest magnitude, then values evenly spaced over it."""
    device = device_of(module)

    def outputs_of(permute: bool) -> list[Tensor]:
        args, kwargs = make_inputs(like_parameters(record, module), device, seed=_SAMPLE_SEED, permute=permute)
        with evaluated(module), torch.no_grad(), repeatable(_SAMPLE_SEED):
            return tensors_of(module(*args, **kwargs))

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints what fails before it raises
            outputs = outputs_of(permute=True)
    except Exception:  # integers in another order may be out of its domain
        outputs = outputs_of(permute=False)
    result = []
    for output in outputs:
        flat = output.detach().reshape(-1)
        flat = flat.abs() if flat.is_complex() else flat
        values = flat[torch.linspace(0, len(flat) - 1, min(_SAMPLE, len(flat))).long().to(flat.device)].double()
        finite = flat[flat.isfinite()]
        result.append([float(finite.abs().max()) if len(finite) else 0.0, *values.tolist()])
    return result


# -- reading --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Artifact, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{str(path)!r} is damaged or no safetensors file ({error}). Save or copy it again."
        ) from error
    if KEY not in metadata:
        raise ArtifactError(
            f"{str(path)!r} holds tensors, but no plan: fxprune.save did not write it. Load plain weights into the "
            "model before fxprune.prune."
        )
    text = metadata[KEY]
    artifact = _parsed(text, path, digest=str)
    data = json_of(text)
    if data.pop("digest", None) != _digest(data, tensors):
        raise ArtifactError(
            f"{str(path)!r} was changed after it was saved (its digest differs). Save or copy it again."
        )
    for name, order in artifact.orders.items():
        if name in tensors and sorted(order) != list(range(tensors[name].ndim)):
            raise ArtifactError(
                f"{str(path)!r} is damaged: {order} is no order of the {tensors[name].ndim} dimensions of {name!r}. "
                "Save it again."
            )
    return artifact, tensors


def _parsed(text: str | bytes, path: Path, **more: Any) -> Artifact:
    """The metadata. ``more``: the form of what is there beside an ``Artifact``."""
    try:
        data = json_of(text)
        check(data, Map(anything))
        if data.get("format") != _FORMAT:
            raise ArtifactError(
                f"{str(path)!r} has format {data.get('format')!r}; fxprune {__version__} reads {_FORMAT}."
            )
        data.setdefault("budget", None)  # version 0.1 did not write these
        data.setdefault("reconstruction", None)
        check(data, {**_FORM, **more})
    except FormError as error:
        raise ArtifactError(
            f"{str(path)!r} is damaged: its metadata cannot be read ({error}). Save it again."
        ) from error
    if data["budget"] is not None:
        kind, ratio = data["budget"]
        data["budget"] = (kind, float(ratio))
    data["plan"] = PruningPlan.of_data(data["plan"], path)
    return Artifact(**{name: data[name] for name in Artifact.__dataclass_fields__})


def _part(model: nn.Module, artifact: Artifact, path: Path) -> nn.Module:
    try:
        return model.get_submodule(artifact.part)
    except AttributeError as error:
        raise ArtifactError(
            f"{str(path)!r} holds a {artifact.model} of which {artifact.part!r} was pruned; "
            f"this {type(model).__name__} has no such part."
        ) from error


def _inputs(part: nn.Module, artifact: Artifact, example_inputs: Any, example_kwargs: Any) -> Any:
    given = example_inputs is not None or example_kwargs is not None
    if given or artifact.inputs is None:
        return checked_inputs(part, example_inputs, example_kwargs)
    device = device_of(part)
    return make_inputs(like_parameters(from_json(artifact.inputs), part), device, permute=False)


def _put(result: nn.Module, artifact: Artifact, tensors: Mapping[str, Tensor], path: Path) -> None:
    """The file's tensors into the module, in their dtype and memory order, on the module's device."""
    given = {**tensors, **{name: tensors[first] for name, first in artifact.tied.items() if first in tensors}}
    own = result.state_dict(keep_vars=True)
    reasons = misfits(own, given)
    if reasons:
        raise ArtifactError(f"the weights in {str(path)!r} are not those of this {type(result).__name__}; {reasons}")
    for name, tensor in own.items():
        if tensor.requires_grad and not (given[name].is_floating_point() or given[name].is_complex()):
            raise ArtifactError(
                f"the weights in {str(path)!r} are not those of this {type(result).__name__}; {name} is "
                f"{given[name].dtype} in the file, and cannot be trained in that"
            )
    names = {id(tensor): name for name, tensor in own.items()}
    dtypes = {id(b): artifact.buffers.get(n) for n, b in result.named_buffers(remove_duplicate=False)}
    made: dict[int, Tensor] = {}

    def put(tensor: Tensor) -> Tensor:
        key = id(tensor)
        if key not in names:
            dtype = dtypes.get(key)
            return tensor if dtype is None else tensor.to(getattr(torch, dtype))
        if key not in made:
            name = names[key]
            new = _ordered(given[name], artifact.orders.get(artifact.tied.get(name, name))).to(tensor.device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                new.__dict__.update(tensor.__dict__)
            made[key] = new
        return made[key]

    replace_tensors(result, put)


def _ordered(tensor: Tensor, order: list[int] | None) -> Tensor:
    """A copy with its dimensions in this order in memory."""
    if order is None:
        return tensor.clone()
    back = sorted(range(tensor.ndim), key=lambda d: order[d])
    return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def _check_outputs(module: nn.Module, artifact: Artifact, path: Path) -> None:
    if artifact.outputs is None:
        return
    try:
        found = _sample(module, from_json(artifact.inputs))
    except Exception as error:
        raise ExampleInputsError(f"the network in {str(path)!r} does not run on its own inputs: {error}") from error
    worst = 0.0
    for now, then in zip(found, artifact.outputs, strict=False):
        one, other = torch.tensor(now, dtype=torch.double), torch.tensor(then, dtype=torch.double)
        same = one.shape == other.shape and torch.equal(one.isfinite(), other.isfinite())
        finite = other.isfinite()
        worst = max(worst, float((one - other)[finite].abs().max()) / (then[0] or 1.0) if same else float("inf"))
    if len(found) != len(artifact.outputs) or worst > SAMPLE_TOLERANCE:
        raise ArtifactError(
            f"the network in {str(path)!r} does not compute what it did when it was saved (relative difference "
            f"{worst:.1e}): the code of {artifact.model} is another one. Saved with {_versions(artifact)}."
        )


def _versions(artifact: Artifact) -> str:
    return ", ".join(f"{name} {version}" for name, version in artifact.versions.items())
