"""A sample of what a network returns, kept to tell whether it still does."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import ArtifactError, ExampleInputsError, GuardError, first_line
from fxprune.io.artifact.header import Artifact
from fxprune.recording import evaluated
from fxprune.recording.inputs import device_of, from_json, like_parameters, make_inputs, tensors_of
from fxprune.recording.randomness import repeatable

SAMPLE_TOLERANCE = 1e-2
"""Largest accepted difference between the outputs when saved and when loaded, relative to the largest: enough for
another machine's rounding, not for another activation or a changed forward."""

_SAMPLE = 16  # values of every output
_SAMPLE_SEED = 0


def sample_of(module: nn.Module, record: Mapping[str, Any]) -> list[list[float]]:
    """Per output tensor on inputs made from the record: largest magnitude, then values evenly spaced over it.

    Raises:
        GuardError: a recorded graph does not cover them.
        ExampleInputsError: the network does not run on such inputs, as where floats are indices.
    """
    device = device_of(module)

    def outputs_of(permute: bool) -> list[Tensor]:
        args, kwargs = make_inputs(like_parameters(record, module), device, seed=_SAMPLE_SEED, permute=permute)
        with evaluated(module), repeatable(_SAMPLE_SEED):
            return tensors_of(module(*args, **kwargs))

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints what fails before it raises
            outputs = outputs_of(permute=True)
    except Exception:  # integers in another order may be out of its domain
        try:
            outputs = outputs_of(permute=False)
        except GuardError:
            raise
        except Exception as error:
            raise ExampleInputsError(
                f"{type(module).__name__} fails on random inputs like the example's: {first_line(error)}; a file "
                "cannot be checked without such inputs. Save its plan (report.plan.save) and its state_dict, and apply "
                "the plan again"
            ) from error
    result = []
    for output in outputs:
        flat = output.detach().reshape(-1)
        flat = flat.abs() if flat.is_complex() else flat
        values = flat[torch.linspace(0, len(flat) - 1, min(_SAMPLE, len(flat))).long().to(flat.device)].double()
        finite = flat[flat.isfinite()]
        result.append([float(finite.abs().max()) if len(finite) else 0.0, *values.tolist()])
    return result


def check_outputs(module: nn.Module, artifact: Artifact, path: Path) -> None:
    """Whether the network computes what it did when it was saved.

    Raises:
        ArtifactError: it does not.
        ExampleInputsError: it does not run on its own inputs.
    """
    if artifact.outputs is None:
        return
    try:
        found = sample_of(module, from_json(artifact.inputs))
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
