"""Trained weights of others for the networks of the papers: tensors by their names, or in their order."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


def take_weights(model: nn.Module, path: Path, pattern: str) -> Path:
    """Load the tensors of a checkpoint into ``model``, by their names or in their order; the file they are from.

    By their names where these are the model's, but for a beginning that all have (``module.``); else in the order of
    the model's ``state_dict``, whatever the names are: other implementations have others.

    The file holds a ``state_dict``, or a dict with one under ``"state_dict"``; nothing in it is executed. How often a
    norm's statistics were updated is not compared: older files lack it, and nothing depends on it.

    Args:
        model: of the same layers, in the same order where names differ.
        path: a file, or a folder with one that matches ``pattern``.
        pattern: such as ``"resnet20-*"``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several, it cannot be read, or a tensor does not fit (the first one is named).
    """
    if path.is_dir():
        found = sorted(path.glob(pattern))
        if not found:
            raise FileNotFoundError(f"there is no {pattern} in {path}")
        if len(found) > 1:
            raise ValueError(f"{path} has several {pattern}: {', '.join(f.name for f in found)}. Pass one of them")
        (path,) = found
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zip, of pickle: whatever a damaged file leads to
        raise ValueError(f"{path} cannot be read as a checkpoint of torch") from error
    state = read.get("state_dict", read) if isinstance(read, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state_dict: a dict of tensors by name")
    ours = _compared(model.state_dict())
    theirs = _by_name(_compared(state), ours)
    for number, (one, other) in enumerate(zip(theirs, ours, strict=False), 1):
        if theirs[one].shape != ours[other].shape:
            raise ValueError(
                f"{path} does not fit: its tensor {number}, {one}, is {list(theirs[one].shape)}, and the network's, "
                f"{other}, is {list(ours[other].shape)}"
            )
    if len(theirs) != len(ours):
        more, names = ("more", [*theirs]) if len(theirs) > len(ours) else ("fewer", [*ours])
        first = names[min(len(theirs), len(ours))]
        raise ValueError(f"{path} has {len(theirs)} tensors, {more} than the network's {len(ours)}: {first} is left")
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)), strict=False)
    return path


def _by_name(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Theirs in the order of ours, if the names are the same behind a beginning that all have; else as they are."""
    first = next(iter(ours), "")
    for beginning in (name.removesuffix(first) for name in theirs if name.endswith(first)):
        if {beginning + name for name in ours} == theirs.keys():
            return {beginning + name: theirs[beginning + name] for name in ours}
    return theirs


def _compared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
