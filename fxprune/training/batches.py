"""What a data loader yields, checked: batches of (inputs, target), and the loss on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import InputError
from fxprune.inputs import make_inputs, map_leaves, tensors_of

Batch = tuple[tuple[Any, ...], dict[str, Any], Any]
Loss = Callable[[Any, Any], Tensor]


def unpack(batch: Any, number: int, device: torch.device | str) -> Batch:
    """A batch as ``(args, kwargs, target)`` on a device.

    Raises:
        InputError: it is no pair of inputs and target.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
        raise InputError(
            f"Batch {number} of data is {what}; the loader must yield (inputs, target), where inputs is a tensor, a "
            "tuple of positional inputs, or a dict of keyword inputs."
        )
    inputs, target = map_leaves(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tuple(batch))
    if not tensors_of(inputs):
        raise InputError(f"The inputs of batch {number} of data hold no tensor.")
    if isinstance(inputs, Mapping):
        return (), dict(inputs), target
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}, target


def examples(data: Any, device: torch.device | str, what: str = "data") -> Iterator[Batch]:
    """The batches of a loader.

    Raises:
        InputError: it cannot be iterated over, yields nothing, or something else.
    """
    if not isinstance(data, Iterable):
        raise InputError(f"{what}={data!r} is no loader: pass an iterable of (inputs, target) batches.")
    empty = True
    for number, batch in enumerate(data):
        empty = False
        yield unpack(batch, number, device)
    if empty:
        raise InputError(f"{what}= yields no batches. Is it a generator that was used up, or smaller than one batch?")


def loss_of(loss_fn: Loss | None, output: Any, target: Any, number: int) -> Tensor:
    """The loss of a batch: ``loss_fn(output, target)``, or cross entropy where the shapes say classification.

    Raises:
        InputError: no loss, a label out of range, or something that is no scalar.
    """
    if loss_fn is None or loss_fn is F.cross_entropy or type(loss_fn) is nn.CrossEntropyLoss:
        _check_labels(loss_fn, output, target, number)
    loss = (loss_fn or F.cross_entropy)(output, target)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError("loss_fn must return one number as a tensor that can be differentiated.")
    return loss


def _check_labels(loss_fn: Loss | None, output: Any, target: Any, number: int) -> None:
    labels = isinstance(target, Tensor) and not target.is_floating_point()
    scores = isinstance(output, Tensor) and output.ndim >= 2
    if not scores or not labels or target.ndim != output.ndim - 1:
        if loss_fn is None:
            raise InputError(
                "The loss is not clear from output and target; pass loss_fn=, a function of (output, target)."
            )
        return
    ignored = getattr(loss_fn, "ignore_index", -100)
    bad = target[(target != ignored) & ((target < 0) | (target >= output.shape[1]))]
    if bad.numel():
        raise InputError(
            f"Batch {number} of data has the label {int(bad[0])}; the model has {output.shape[1]} classes, "
            f"0 to {output.shape[1] - 1}."
        )


def correct(output: Any, target: Any) -> tuple[int, int] | None:
    """(correct, all) of a batch of a classification; None where it is none."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or target.is_floating_point():
        return None
    if output.ndim < 2 or target.shape != output.shape[:1] + output.shape[2:]:
        return None
    return int((output.argmax(1) == target).sum()), target.numel()


class Gaussian:
    """Random inputs like the example's, with what a reference network makes of them as the target."""

    def __init__(self, record: Mapping[str, Any], reference: nn.Module, steps: int, batch: int, seed: int):
        self._record, self._reference = record, reference
        self._steps, self._batch, self._seed = steps, batch, seed

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        device = next((p.device for p in self._reference.parameters()), torch.device("cpu"))
        for step in range(self._steps):
            args, kwargs = make_inputs(self._record, device, batch=self._batch, seed=self._seed * 1_000_003 + step)
            with torch.no_grad():
                target = self._reference(*args, **kwargs)
            yield kwargs or args, target


def distance(output: Any, target: Any) -> Tensor:
    """``|output - target|^2 / |target|^2``, the mean over all tensors of the outputs."""
    pairs = [(a, b) for a, b in zip(tensors_of(output), tensors_of(target), strict=True) if b.is_floating_point()]
    parts = [((a - b) ** 2).sum() / (b**2).sum().clamp_min(1e-12) for a, b in pairs]
    return torch.stack(parts).mean()
