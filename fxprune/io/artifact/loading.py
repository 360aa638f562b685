"""``load``: what ``save`` wrote, read and put into a fresh instance of the class."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.api import applied
from fxprune.deploy.program import read_program, read_program_notes
from fxprune.errors import ArtifactError, ExampleInputsError, InputError, PlanError, check_flags
from fxprune.io.artifact.header import KEY, Artifact, digest_of, existing, parsed
from fxprune.io.artifact.packing import PLACES, VALUES, unpacked
from fxprune.io.artifact.sample import check_outputs
from fxprune.io.forms import json_of
from fxprune.io.specs import misfits
from fxprune.reconstruction.result import Reconstruction
from fxprune.recording import replace_tensors
from fxprune.recording.checks import checked_inputs
from fxprune.recording.inputs import device_of, from_json, like_parameters, make_inputs
from fxprune.recording.together import called, joined
from fxprune.rewriting.into import into

_POINTER = b"version https://git-lfs.github.com/"


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
        What was saved: a ``GraphModule``, a copy of the model with one as the part that was pruned, or an instance of
        its class (see ``fxprune.into``); of a ``.pt2`` file a module for inference.

    Raises:
        ArtifactError: the file is damaged, of another kind, or does not fit the model (names what).
        PlanError: the plan in it belongs to another model.
        InputError: ``path`` or ``model`` cannot be used.
        ExampleInputsError: example inputs are needed, or do not fit.
        ConversionError: the class that was saved is not what it was, and cannot hold the cuts.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> fxprune.save(small, "small.safetensors")
        >>> loaded = fxprune.load("small.safetensors", model)  # as a rule a fresh instance, in another process
        >>> bool(torch.equal(loaded.eval()(x), small.eval()(x)))
        True
    """
    check_flags(verify=verify)
    path = existing(path)
    if path.suffix == ".pt2":
        if model is not None:
            raise InputError(f"{str(path)!r} is a program that needs no class: leave out the model.")
        artifact = read_artifact(path)
        program: nn.Module = read_program(path)
        if verify:
            check_outputs(program, artifact, path)
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
    if artifact.calls and example_inputs is None:
        part = called(part, artifact.calls)
    part, example_inputs, example_kwargs = joined(part, example_inputs, example_kwargs)
    args, kwargs = _inputs(part, artifact, example_inputs, example_kwargs)
    refitted = artifact.reconstruction and Reconstruction.of_data(artifact.reconstruction)
    known = {"oracle_error": artifact.oracle_error, "budget": artifact.budget, "reconstruction": refitted}

    def put(before: nn.Module, pruned: fx.GraphModule) -> nn.Module:
        pruned.meta[KEY] = replace(pruned.meta[KEY], **known)
        return into(before, pruned) if artifact.own_class else pruned

    with _fitting(part, artifact, path):
        result: nn.Module = applied(part, artifact.plan, args, kwargs, artifact.method, verify=False, put=put)
    if artifact.part:
        pruned, result = result, copy.deepcopy(model)
        result.set_submodule(artifact.part, pruned)
    _put(result, artifact, tensors, path)
    if verify:
        check_outputs(result.get_submodule(artifact.part), artifact, path)
    return result


@contextmanager
def _fitting(part: nn.Module, artifact: Artifact, path: Path) -> Iterator[None]:
    """Where the model is of another class than what was saved, an error says so: mostly that is why."""
    try:
        yield
    except (PlanError, ExampleInputsError) as error:
        if (given := type(part).__name__) == artifact.model:
            raise
        told = f"{str(path)!r} holds a pruned {artifact.model}, and model is a {given}"
        raise type(error)(f"{told}. {error}") from error


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """What a file says of itself.

    Raises:
        ArtifactError: it is damaged or of another kind.
        InputError: there is no such file, or its name says another kind.
    """
    path = existing(path)
    if path.suffix == ".pt2":
        return parsed(read_program_notes(path), path)
    return _read(path)[0]


def _begins(path: Path, text: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(text)) == text


def _read(path: Path) -> tuple[Artifact, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        if _begins(path, _POINTER):
            raise ArtifactError(f"{str(path)!r} is a pointer of Git LFS, not the file: run git lfs pull.") from error
        raise ArtifactError(
            f"{str(path)!r} is damaged or no safetensors file ({error}). Save or copy it again."
        ) from error
    if KEY not in metadata:
        raise ArtifactError(
            f"{str(path)!r} holds tensors, but no plan: fxprune.save did not write it. Load plain weights into the "
            "model before fxprune.prune."
        )
    text = metadata[KEY]
    artifact = parsed(text, path, digest=str)
    data = json_of(text)
    if data.pop("digest", None) != digest_of(data, tensors):
        raise ArtifactError(
            f"{str(path)!r} was changed after it was saved (its digest differs). Save or copy it again."
        )
    dims = {name: tensor.ndim for name, tensor in tensors.items()}
    dims |= {name: len(note["shape"]) for name, note in artifact.packed.items()}
    for name, order in artifact.orders.items():
        if name in dims and sorted(order) != list(range(dims[name])):
            raise ArtifactError(
                f"{str(path)!r} is damaged: {order} is no order of the {dims[name]} dimensions of {name!r}. "
                "Save it again."
            )
    return artifact, tensors


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

    def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, **{name: tensors[first] for name, first in artifact.tied.items() if first in tensors}}

    own = result.state_dict(keep_vars=True)
    parts = {name + end for name in artifact.packed for end in (VALUES, PLACES)}
    plain = {name: tensor for name, tensor in tensors.items() if name not in parts}
    # Not unpacked yet: a few digits can claim any size, which has to be the model's first.
    given = named(plain | {name: _claimed(note) for name, note in artifact.packed.items()})
    reasons = misfits(own, given)
    if reasons:
        raise ArtifactError(f"the weights in {str(path)!r} are not those of this {type(result).__name__}; {reasons}")
    for name, tensor in own.items():
        if tensor.requires_grad and not (given[name].is_floating_point() or given[name].is_complex()):
            raise ArtifactError(
                f"the weights in {str(path)!r} are not those of this {type(result).__name__}; {name} is "
                f"{given[name].dtype} in the file, and cannot be trained in that"
            )
    try:
        given = named(plain | {name: unpacked(name, note, tensors) for name, note in artifact.packed.items()})
    except ValueError as error:
        raise ArtifactError(f"{str(path)!r} is damaged: {error}. Save it again.") from error
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


def _claimed(note: Mapping[str, Any]) -> Tensor:
    """Shape and dtype of a packed tensor, without memory."""
    return torch.empty(note["shape"], dtype=getattr(torch, note["dtype"]), device="meta")


def _ordered(tensor: Tensor, order: list[int] | None) -> Tensor:
    """A copy with its dimensions in this order in memory."""
    if order is None:
        return tensor.clone()
    back = sorted(range(tensor.ndim), key=lambda d: order[d])
    return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
