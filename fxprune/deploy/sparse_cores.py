"""Linear layers whose weights are 2:4 on the sparse tensor cores of a CUDA GPU, by ``torch.sparse``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxprune.errors import ExportError, InputError, first_line
from fxprune.methods.patterns import Pattern
from fxprune.recording.checks import check_module

PATTERN = Pattern(2, 4)
CAPABILITY = (8, 0)  # the first with sparse tensor cores


class SemiStructured(NamedTuple):
    """``network``: the copy. ``layers``: names of the linear layers that run sparsely; ``left``: why others do not."""

    network: nn.Module
    layers: tuple[str, ...]
    left: Mapping[str, str]


def semi_structured(network: nn.Module) -> SemiStructured:
    """A copy for inference in which every ``nn.Linear`` whose weight is 2:4 multiplies sparsely.

    Its weight is a ``torch.sparse.to_sparse_semi_structured``, a prototype of PyTorch's; the warning that says so is
    left out. PyTorch takes weights of some dtypes and sizes only: halves whose two sizes are multiples of 32 and 64 are
    taken everywhere. The copy can no longer be trained or saved; save the network.

    Args:
        network: any module on a CUDA GPU of compute capability 8.0 or later, in the dtype that it is to run in.

    Returns:
        The copy, which layers of it run sparsely, and why PyTorch takes others not.

    Raises:
        InputError: no linear layer has a 2:4 weight, or those that do are not on such a GPU.
        ExportError: PyTorch takes none of them.

    Examples:
        >>> layer = torch.nn.Linear(64, 32)
        >>> _ = fxprune.optim.magnitude_cut(layer.parameters(), compression=1, pattern="2:4")
        >>> try:
        ...     fast = fxprune.semi_structured(layer.half()).network
        ... except fxprune.FxpruneError as error:
        ...     print(error)
        weight is on cpu: sparse tensor cores are a CUDA GPU's. Move the network there first.
    """
    check_module("network", network)
    copied = copy.deepcopy(network)
    linear = {name: m for name, m in copied.named_modules(remove_duplicate=False) if type(m) is nn.Linear}
    chosen = {name: m for name, m in linear.items() if PATTERN.fits(m.weight) and PATTERN.holds(m.weight)}
    if not chosen:
        raise InputError(
            f"No weight of {len(linear)} linear layers is {PATTERN}: train with GSM(pattern='{PATTERN}'), or "
            f"fxprune.optim.magnitude_cut(model.parameters(), 1, '{PATTERN}')."
        )
    for name, layer in chosen.items():
        _check_device(f"{name}.weight".removeprefix("."), layer.weight.device)
    made: dict[Tensor, nn.Parameter] = {}
    left: dict[str, str] = {}
    for name, layer in chosen.items():
        weight = layer.weight
        try:
            if weight not in made:
                made[weight] = _sparse(weight)
            layer.weight = made[weight]
        except (RuntimeError, NotImplementedError) as error:
            left[name] = first_line(error)
    if len(left) == len(chosen):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise ExportError(f"PyTorch takes none of the {PATTERN} weights. {reasons}")
    return SemiStructured(copied, tuple(name for name in chosen if name not in left), left)


def _check_device(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise InputError(f"{name} is on {device}: sparse tensor cores are a CUDA GPU's. Move the network there first.")
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise InputError(
            f"{name} is on {torch.cuda.get_device_name(device)}, of compute capability {found[0]}.{found[1]}: sparse "
            f"tensor cores are there from {CAPABILITY[0]}.{CAPABILITY[1]} on."
        )


def _sparse(weight: Tensor) -> nn.Parameter:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor.*prototype", category=UserWarning)
        return nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.detach()), requires_grad=False)
