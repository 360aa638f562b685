"""``save``: a pruned network written as one file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.deploy.program import write_program
from fxprune.errors import InputError
from fxprune.io.artifact.header import INPUTS, KEY, Artifact, check_path, digest_of
from fxprune.io.artifact.packing import stored
from fxprune.io.artifact.sample import sample_of
from fxprune.io.files import replacing
from fxprune.io.forms import FormError, check
from fxprune.recording import named_tensors
from fxprune.recording.checks import check_module
from fxprune.recording.inputs import RECORD_KEY, from_json, like_parameters, to_json
from fxprune.recording.together import CALLS_KEY, ONE_OF_KEY
from fxprune.reports.report import ORIGIN_KEY, Report, pruned_part
from fxprune.version import __version__


def save(pruned: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a pruned network, with the weights that it has now, as one file; nothing appears at ``path`` on an error.

    A ``.safetensors`` file keeps tensors under their names in the state_dict, but for those of which half or more are
    exact zeros: where that takes at most 5/8 of the bytes, the other values and their places are kept, which is close
    to the entropy of what is left. ``load`` gives them back bit by bit.

    Args:
        pruned: what ``fxprune.prune``, ``apply``, ``load`` or ``into`` returned, fine-tuned or not.
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
    check_module("pruned", pruned, "what fxprune.prune, apply or load returned")
    artifact = described(pruned, data=path.suffix != ".pt2")
    with replacing(path) as draft:
        if path.suffix == ".pt2":
            if artifact.own_class:
                raise InputError(
                    f"A program is written of a graph: save {type(pruned).__name__} as .safetensors, or the pruned "
                    "GraphModule as .pt2."
                )
            if artifact.part:
                raise InputError(
                    f"A program is written of a whole network: save {type(pruned).__name__} as .safetensors, or "
                    f"its {artifact.part} as .pt2."
                )
            module: Any = pruned
            write_program(pruned, draft, like_parameters(module.meta[RECORD_KEY], pruned), json.dumps(artifact.data()))
            return
        from safetensors.torch import save as to_bytes

        tensors, packed = stored(_to_store(pruned, artifact))
        artifact = replace(artifact, packed=packed)
        text = json.dumps({**artifact.data(), "digest": digest_of(artifact.data(), tensors)})
        # Not its save_file, which writes through a memory map: on a full disk that ends the process.
        draft.write_bytes(to_bytes(tensors, {KEY: text}))


def described(pruned: nn.Module, data: bool = True) -> Artifact:
    """What a file of it says of itself. ``data``: of one that holds data only.

    Raises:
        InputError: it is no pruned network, or holds something that the format cannot.
    """
    name, part, meta = told(pruned)
    report: Report = meta[KEY]
    if ONE_OF_KEY in meta and data:
        raise InputError(
            f"pruned is the call {meta[ONE_OF_KEY]!r} alone, which the plan is not for: save the graph of all "
            "calls, or a program (.pt2)."
        )
    own_class = not isinstance(part, fx.GraphModule)
    if own_class and CALLS_KEY in meta:
        raise InputError(
            f"This {type(pruned).__name__} was pruned for several calls, of which a file holds the graph alone: save "
            "the pruned GraphModule."
        )
    if data:
        _check_layers(part, report)
    state = pruned.state_dict(keep_vars=True)
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise InputError(f"{odd[0]} in the state_dict is no tensor, and a safetensors file holds nothing else.")
    empty = [key for key, value in state.items() if value.is_meta]
    if empty:
        raise InputError(f"{empty[0]} is on the meta device and has no values to save.")
    first = {id(tensor): key for key, tensor in reversed(state.items())}
    try:
        inputs = to_json(dict(meta[RECORD_KEY]))
        check(inputs, INPUTS)
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
        outputs=None if inputs is None else sample_of(part, from_json(inputs)),
        tied={key: first[id(tensor)] for key, tensor in state.items() if first[id(tensor)] != key},
        orders={key: order for key, tensor in state.items() if (order := _order(tensor)) is not None},
        buffers={
            key: str(buffer.dtype).removeprefix("torch.")
            for key, buffer in pruned.named_buffers(remove_duplicate=False)
            if key not in state
        },
        budget=report.budget,
        reconstruction=report.reconstruction and report.reconstruction.data(),
        calls=tuple(meta.get(CALLS_KEY, ())),
        own_class=own_class,
        versions={"fxprune": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )


def _check_layers(part: nn.Module, report: Report) -> None:
    """Refuse what no fresh instance could take: a layer that was exchanged after the pruning.

    Raises:
        InputError: which, and what to do.
    """
    tensors = named_tensors(part)
    for row in report.rows:
        tensor = tensors.get(f"{row.name}.weight", tensors.get(row.name))
        found = "gone" if tensor is None else f"{list(tensor.shape)}"
        if row.after and (tensor is None or tuple(tensor.shape) != row.after):
            raise InputError(
                f"The weight of {row.name} is {found}, and was {list(row.after)} when the network was pruned. A file "
                "is loaded into the class of that: exchange layers before pruning, or save a program (.pt2)."
            )


def told(pruned: nn.Module) -> tuple[str, nn.Module, Mapping[str, Any]]:
    """The part of a network that was pruned, its name there, and what is known of its pruning."""
    own = vars(pruned).get(ORIGIN_KEY)
    if own is not None:
        return "", pruned, own
    name, part = pruned_part(pruned)
    return name, part, part.meta


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
