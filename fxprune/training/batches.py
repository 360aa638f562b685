"""What a data loader yields, checked: batches of (inputs, target), and the loss on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.arguments import check_loader, without_batches
from fxprune.errors import FxpruneError, InputError, first_line
from fxprune.recording.inputs import device_of, make_inputs, map_tensors, tensors_of


class Inputs(NamedTuple):
    """Positional and keyword inputs of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_ROWS = 32  # of a tensor that is all of the data, in one batch
Batch = tuple[tuple[Any, ...], dict[str, Any], Any]
Loss = Callable[[Any, Any], Tensor]


def unpack(batch: Any, number: int, device: torch.device | str, what: str = "data", with_target: bool = True) -> Batch:
    """A batch as ``(args, kwargs, target)`` on a device.

    ``with_target``: it has to have one. Otherwise a tensor, a dict, ``Inputs`` and a tuple of one are inputs by
    themselves; two are a pair all the same.

    Raises:
        InputError: it is no pair of inputs and target, nor inputs where these are enough.
    """
    if not with_target and (
        isinstance(batch, (Tensor, Mapping, Inputs)) or (isinstance(batch, (tuple, list)) and len(batch) == 1)
    ):
        batch = (batch, None)
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        kind = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
        raise InputError(
            f"Batch {number} of {what} is {kind}; the loader must yield (inputs, target), where inputs is a tensor, a "
            "tuple of positional inputs, or a dict of keyword inputs."
        )
    inputs, target = map_tensors(lambda tensor: tensor.to(device), tuple(batch))
    if not tensors_of(inputs):
        raise InputError(f"The inputs of batch {number} of {what} hold no tensor.")
    if isinstance(inputs, Inputs):
        return *inputs, target
    if isinstance(inputs, Mapping):
        return (), dict(inputs), target
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}, target


def parts_of(loader: Any) -> list[Any]:
    """A loader, its samplers, its data set and what this is put together from."""
    found: dict[int, Any] = {}
    ahead = [loader]
    while ahead:
        part = ahead.pop(0)
        if id(part) not in found:
            found[id(part)] = part
            ahead += [below for name in _PARTS if (below := getattr(part, name, None)) is not None]
            several = getattr(part, "datasets", None)  # of a ConcatDataset
            ahead += several if isinstance(several, (list, tuple)) else ()
    return [*found.values()]


_PARTS = ("sampler", "batch_sampler", "dataset")


def begin_epoch(loader: Any, epoch: int) -> None:
    """Tell the parts of a loader that take turns by epoch (``DistributedSampler``) which one begins, from 0."""
    for part in parts_of(loader):
        tell = getattr(part, "set_epoch", None)
        if callable(tell):
            tell(epoch)


def examples(data: Any, device: torch.device | str, what: str = "data", with_target: bool = True) -> Iterator[Batch]:
    """The batches of a loader; where no targets are needed, also those of a loader of inputs, or of a tensor of them.

    Raises:
        InputError: it cannot be iterated over, yields nothing, or something else.
    """
    check_loader(data, what)
    if not with_target and isinstance(data, Tensor):
        if not data.ndim:
            raise InputError(f"{what}= is a tensor of shape []: pass [N, ...], N samples.")
        data = data.split(_ROWS)
    empty = True
    for number, batch in enumerate(data):
        empty = False
        yield unpack(batch, number, device, what, with_target)
    if empty:
        raise InputError(without_batches(what))


def output_of(model: nn.Module, batch: Batch, number: int, what: str = "data") -> Any:
    """What the model makes of a batch.

    Raises:
        InputError: it does not run on it.
    """
    args, kwargs = fitting(model, *batch[:2])
    try:
        return model.forward(*args, **kwargs)  # not __call__, in which torch.fx prints what fails
    except FxpruneError:
        raise
    except Exception as error:
        raise InputError(does_not_run(error, number, what)) from error


def fitting(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs; a dict whose keys are no inputs of ``forward``, which takes one thing, is that itself."""
    if args or not kwargs:
        return args, kwargs
    signature = inspect.signature(model.forward)
    return (args, kwargs) if _binds(signature, **kwargs) or not _binds(signature, kwargs) else ((kwargs,), {})


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def does_not_run(error: Exception, number: int, what: str = "data") -> str:
    """The message for a batch that a model does not take."""
    reason = first_line(error)
    return f"The model does not run on batch {number} of {what}: {reason}. Batches must be like the example inputs."


def loss_of(
    loss_fn: Loss | None,
    output: Any,
    target: Any,
    number: int,
    what: str = "data",
    late: list[LateLabels] | None = None,
    alone: bool = False,
) -> Tensor:
    """The loss of a batch: ``loss_fn(output, target)``, or cross entropy where the shapes say classification.

    ``late``: where to put labels that are to be looked at later, since a look waits for a GPU; those out of range count
    as 0 until then. ``alone``: the batch is a single sample of one, which a loss that compares samples may not take.

    Raises:
        InputError: no loss, labels that cross entropy does not take, a loss function that fails on a single sample, or
            returns something that is no scalar, or cannot be differentiated.
    """
    if loss_fn is None or loss_fn is F.cross_entropy or type(loss_fn) is nn.CrossEntropyLoss:
        target = _checked_labels(loss_fn, output, target, number, what, late)
        try:
            loss = (loss_fn or F.cross_entropy)(output, target)
        except Exception as error:
            raise InputError(
                f"Cross entropy does not take batch {number} of {what}: {first_line(error)}. Another loss is loss_fn=."
            ) from error
    else:
        try:
            loss = loss_fn(output, target)
        except Exception as error:
            if not alone or isinstance(error, FxpruneError):
                raise  # what the user's own code raises is theirs to catch
            raise InputError(
                f"loss_fn fails on a single sample of batch {number} of {what}, which this method runs by itself: "
                f"{first_line(error)}. A loss that compares the samples of a batch needs another method."
            ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise InputError(f"loss_fn returned {kind}; it must return one number as a tensor, such as a mean.")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise InputError("What loss_fn returned cannot be differentiated: compute it from output, without detaching.")
    return loss


class LateLabels(NamedTuple):
    """Whether labels of a batch are out of range, and the first that is, or any label."""

    any: Tensor
    first: Tensor
    classes: int
    number: int
    what: str

    def check(self, any_: bool, first: int) -> None:
        """Refuse them, with what was read of the tensors.

        Raises:
            InputError: a label is out of range.
        """
        if any_:
            raise InputError(
                f"Batch {self.number} of {self.what} has the label {first}; the model has {self.classes} "
                f"classes, 0 to {self.classes - 1}."
            )


def _checked_labels(
    loss_fn: Loss | None, output: Any, target: Any, number: int, what: str, late: list[LateLabels] | None
) -> Any:
    """The target, labels as int64; with ``late`` they are looked at later."""
    labels = isinstance(target, Tensor) and not target.is_floating_point()
    scores = isinstance(output, Tensor) and output.ndim >= 2
    if not scores or not labels or target.ndim != output.ndim - 1:
        if loss_fn is None:
            raise InputError(
                "The loss is not clear from output and target; pass loss_fn=, a function of (output, target)."
            )
        return target
    target = target.long()
    if not target.numel():
        return target
    ignored, classes = getattr(loss_fn, "ignore_index", -100), output.shape[1]
    bad = (target != ignored) & ((target < 0) | (target >= classes))
    found = LateLabels(bad.any(), target.take(bad.reshape(-1).byte().argmax()), classes, number, what)
    if late is None:
        if found.any:
            found.check(True, int(found.first))
        return target
    late.append(found)
    return target.masked_fill(bad, 0)


def correct(output: Any, target: Any) -> tuple[Tensor, int] | None:
    """(how many are correct, all) of a batch of a classification; None where it is none."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or target.is_floating_point():
        return None
    if output.ndim < 2 or target.shape != output.shape[:1] + output.shape[2:]:
        return None
    return (output.argmax(1) == target).sum(), target.numel()


class Gaussian:
    """Random inputs like the example's, with what a reference network makes of them as the target."""

    def __init__(self, record: Mapping[str, Any], reference: nn.Module, steps: int, batch: int, seed: int):
        self._record, self._reference = record, reference
        self._steps, self._batch, self._seed = steps, batch, seed

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        device = device_of(self._reference)
        for step in range(self._steps):
            args, kwargs = make_inputs(self._record, device, batch=self._batch, seed=self._seed * 1_000_003 + step)
            with torch.no_grad():
                target = self._reference(*args, **kwargs)
            yield Inputs(args, kwargs), target


def distance(output: Any, target: Any) -> Tensor:
    """``|output - target|^2 / |target|^2``, the mean over all tensors of the outputs."""
    pairs = [(a, b) for a, b in zip(tensors_of(output), tensors_of(target), strict=True) if b.is_floating_point()]
    parts = [((a - b) ** 2).sum() / (b**2).sum().clamp_min(1e-12) for a, b in pairs]
    return torch.stack(parts).mean()
