"""What a file of ``save`` says of itself, and what it may be called."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxprune.errors import ArtifactError, InputError
from fxprune.io.artifact.packing import MOST_LOW
from fxprune.io.files import as_path, check_writable
from fxprune.io.forms import Either, FormError, Map, Real, Such, Whole, anything, check, json_of
from fxprune.reconstruction.result import FORM as RECONSTRUCTION
from fxprune.recording.inputs import from_json, specs_of
from fxprune.selection.plan import PruningPlan
from fxprune.version import __version__

KEY = "fxprune"
"""Where the header's metadata is, in the safetensors file."""

_FORMAT = 1
_SUFFIXES = (".safetensors", ".pt2")
_MOST_ENTRIES = 2**28
"""Of all example inputs together. A few digits in a file can claim any size, so larger ones are passed to ``load``."""

_DTYPE_NAMES = re.compile(r"bool|u?int(8|16|32|64)|b?float(16|32|64)|float8_\w+|complex(32|64|128)")
_DTYPES = {n for n, t in vars(torch).items() if isinstance(t, torch.dtype) and _DTYPE_NAMES.fullmatch(n)}
_DTYPE = Such(str, lambda name: name in _DTYPES, "the name of a dtype")
_INT64 = Whole(-(2**63), 2**63 - 2)
_SHAPE = Such([Whole()], lambda shape: len(shape) <= 25, "a shape of at most 25 dimensions")
_SIZED = Such(_SHAPE, lambda shape: math.prod(max(size, 1) for size in shape) < 2**48, "a shape of fewer entries")
_RANGE = Either(_INT64, Real())
_SPEC = (_SHAPE, _DTYPE, _RANGE, _RANGE)
_COLUMNS = [(Whole(), Whole(-(2**31)), Whole(-(2**31)))]
_VALUES = [Either(bool, Whole(-(2**63)), Real(), "inf", "-inf")]
_TENSOR = Such(
    Either(_SPEC, (*_SPEC, _VALUES), (*_SPEC, _VALUES, [Whole(1)]), (*_SPEC, None, None, _COLUMNS)),
    lambda spec: spec[2] <= spec[3],
    "shape, dtype, least and largest value, then values and how often each comes in a row, where they are kept, or the "
    "columns of whole numbers",
)
_COUNTS = (Whole(), Whole())


def _input() -> Either:
    """What ``fxprune.recording.inputs.to_json`` makes of a part of a record."""
    plain = (None, bool, Whole(-(2**63)), Real(finite=False), str)
    return Either(*plain, {"tensor": _TENSOR}, {"list": [_input]}, {"dict": Map(_input)}, {"tuple": [_input]})


INPUTS = Such(
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
    "inputs": Either(None, INPUTS),
    "outputs": Either(None, [Such([Real(False)], lambda row: row and math.isfinite(row[0]), "a magnitude and values")]),
    "tied": Map(str),
    "orders": Map([Whole()]),
    "buffers": Map(_DTYPE),
    "versions": Map(str),
    "budget": Either(None, (Either("flops", "params", "channels", "latency"), Real())),
    "reconstruction": Either(None, RECONSTRUCTION),
    "calls": [str],
    "own_class": bool,
    "packed": Map({"shape": _SIZED, "dtype": _DTYPE, "low": Whole(0, MOST_LOW)}),
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
    refit did, as data. ``calls``: the names of several, of which ``inputs`` are.
    ``packed``: name -> shape, dtype and ``low`` of tensors that are not stored as they are, see ``packing``.
    ``own_class``: the tensors are those of the model's own class (``fxprune.into``), not of the graph.
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
    calls: Sequence[str] = ()
    own_class: bool = False
    packed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        return {**vars(self), "format": _FORMAT, "plan": self.plan.data(), "calls": list(self.calls)}


def parsed(text: str | bytes, path: Path, **more: Any) -> Artifact:
    """The metadata. ``more``: the form of what is there beside an ``Artifact``.

    Raises:
        ArtifactError: it is not what ``save`` writes.
    """
    try:
        data = json_of(text)
        check(data, Map(anything))
        if data.get("format") != _FORMAT:
            raise ArtifactError(
                f"{str(path)!r} has format {data.get('format')!r}; fxprune {__version__} reads {_FORMAT}."
            )
        data.setdefault("budget", None)  # version 0.1 did not write these
        data.setdefault("calls", [])
        data.setdefault("own_class", False)
        data.setdefault("packed", {})
        told = data.setdefault("reconstruction", None)
        if isinstance(told, dict):
            told.setdefault("tuning", None)
            told.setdefault("of_noise", False)
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


def digest_of(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Over the metadata, and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def existing(path: str | os.PathLike[str]) -> Path:
    """The path of a file that ``save`` could have written.

    Raises:
        InputError: there is none, or its name says another kind.
    """
    path = as_path(path)
    _check_suffix(path)
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}")
    return path
