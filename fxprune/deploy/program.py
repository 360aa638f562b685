"""A network as a program of torch.export: it runs without the class, at any batch size, for inference."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.deploy.batches import at_free_batch, up_to_the_largest
from fxprune.deploy.onnx import capture_reason, quiet
from fxprune.errors import ArtifactError, ExportError, GuardError, InputError, first_line
from fxprune.recording import evaluated
from fxprune.recording.inputs import device_of, is_batched, make_inputs, specs_of, tensors_of

NOTES = "fxprune.json"


class Program(nn.Module):
    """A program of torch.export as a module for inference: ``train()`` raises, since it was captured in eval mode."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> Program:
        if mode:
            raise InputError(
                "A .pt2 program is for inference. To fine-tune, load a .safetensors file into the class, or the module "
                "that was pruned."
            )
        return self


def write_program(module: nn.Module, path: Path, record: Mapping[str, Any], notes: str) -> None:
    """Capture ``module`` in eval mode with a dynamic batch, and write it to ``path`` with ``notes`` (JSON) beside it.

    Where the recording runs at one batch size only, so does the program; where the network does something else for
    large batches, the program refuses those.

    Args:
        module: left as it was.
        path: ``.pt2``.
        record: of its inputs, see ``fxprune.recording.inputs``.
        notes: text that ``read_program_notes`` gives back.

    Raises:
        ExportError: torch.export cannot capture it with a free batch.
    """
    device = device_of(module)

    def inputs_at(batch: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = make_inputs(record, device, batch, permute=False)
        try:
            module(*args, **kwargs)
        except GuardError:
            raise
        except Exception:
            pass  # torch.export names the line
        return make_inputs(record, device, batch, permute=False)  # a cache has grown

    with evaluated(module), quiet():
        with torch.no_grad():
            (args, kwargs), why = at_free_batch(module, record, inputs_at)

        def capture(batch: Any) -> torch.export.ExportedProgram:
            shapes = torch.export.ShapesCollection()
            for tensor, spec in zip(tensors_of((args, kwargs)), specs_of(record), strict=True):
                if why is None and is_batched(spec, record):
                    shapes[tensor] = {0: batch}
            called = _by_name(module) if kwargs else module
            return torch.export.export(called, tuple(args), kwargs, dynamic_shapes=shapes, strict=False)

        try:
            exported, _ = up_to_the_largest(device, capture)
        except Exception as error:
            raise ExportError(
                f"torch.export cannot capture {type(module).__name__}{' with a dynamic batch' if why is None else ''}: "
                f"{capture_reason(error)}"
            ) from error
        buffer = io.BytesIO()  # a full disk is then an OSError, as everywhere
        torch.export.save(exported, buffer, extra_files={NOTES: notes})
    path.write_bytes(buffer.getbuffer())


def _by_name(module: nn.Module) -> nn.Module:
    """The same as no graph: to graphs torch.export hands keyword inputs in the order in which they are given."""
    forward: Any = module.forward
    cls: type[nn.Module] = type(type(module).__name__, (nn.Module,), {"forward": forward.__func__})
    result = cls.__new__(cls)
    result.__dict__.update(module.__dict__)
    return result


def read_program_notes(path: Path) -> bytes:
    """The notes of a file of ``write_program``, every byte of which was checked against its checksum.

    Raises:
        ArtifactError: it is damaged or of another kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise zipfile.BadZipFile("compressed, so of any size")
            bad = archive.testzip()
            names = [name for name in archive.namelist() if name.endswith(f"/{NOTES}")]
            text = archive.read(names[0]) if names and bad is None else b""
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{str(path)!r} is damaged or no .pt2 file ({error}). Save or copy it again.") from error
    if bad is not None:
        raise ArtifactError(f"{str(path)!r} is damaged: {bad} in it was changed. Save or copy it again.")
    if not names:
        raise ArtifactError(f"{str(path)!r} was not written by fxprune.save: it has no {NOTES}.")
    return text


def read_program(path: Path) -> Program:
    """The program as a module.

    Raises:
        ArtifactError: this version of torch cannot read it.
    """
    with quiet():
        try:
            return Program(torch.export.load(path).module())
        except Exception as error:
            raise ArtifactError(f"torch {torch.__version__} cannot read {str(path)!r}: {first_line(error)}") from error
