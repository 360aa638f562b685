"""What criteria need of data, collected for all channels at once: gradients and activations.

The model runs in eval mode. With several processes every one reads its share of the data, and the sums are reduced.
They are kept in double precision, so that the scores hardly depend on the order of the data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxprune.errors import FxpruneError, GuardError, InputError, ModelError
from fxprune.groups import ValueInterpreter, placeholder_values
from fxprune.groups.channels import ChannelGraph
from fxprune.groups.flow import channels_in, flows, node_labels, reading_parameters
from fxprune.methods.registry import WITH_TARGET, Need
from fxprune.methods.state import Activation, Measured, Saliency, first_order, places_of, sums_in_places
from fxprune.recording.inputs import device_of, map_leaves, tensors_of
from fxprune.training.batches import Batch, Loss, does_not_run, examples, loss_of, output_of
from fxprune.training.distributed import in_step, process_count, summed


def measure(
    module: fx.GraphModule, graph: ChannelGraph, needs: Collection[Need], data: Any, loss_fn: Loss | None
) -> Measured:
    """Run ``module`` over ``data`` and collect what a criterion ``needs``; the module is left in eval mode.

    Raises:
        InputError: the data cannot be used; or batches are one sum over all processes, which have not equally many.
        ModelError: a loss is not finite.
    """
    module.eval()
    device = device_of(module)
    batches = _Gradients(module, graph, whole=True) if "gradients" in needs else None
    samples = _Gradients(module, graph, whole=False) if "sample_gradients" in needs else None
    activations = _Activations(module, graph) if "activations" in needs else None
    given = examples(data, device, with_target=not WITH_TARGET.isdisjoint(needs))
    for number, batch in enumerate(given if batches is None else in_step(given)):
        if batches is not None:
            batches.add(batch, loss_fn, number)
        if samples is not None:
            for sample in _samples(batch, number):
                try:
                    samples.add(sample, loss_fn, number)
                except GuardError as error:
                    told = (
                        f"The method runs every sample of data by itself, and one of batch {number} is refused: {error}"
                    )
                    raise GuardError(told, error.source) from error
        if activations is not None:
            activations.add(batch, number)
    return Measured(
        None if batches is None else batches.result(),
        None if samples is None else samples.result(),
        () if activations is None else activations.result(),
    )


class _Gradients:
    """Sums of ``T^2``, ``T`` the sum of gradient times weight over a slice.

    ``whole``: a batch is one ``T``; with several processes each has a part of the batch, and ``T`` is their mean.
    Otherwise every ``T`` stands for itself.
    """

    def __init__(self, module: fx.GraphModule, graph: ChannelGraph, whole: bool):
        self._module, self._whole = module, whole
        named = dict(module.named_parameters(remove_duplicate=False))
        parameters = [p for p in graph.parameters if p.trainable and p.labels and p.name in named]
        self._tensors = [named[p.name].requires_grad_(True) for p in parameters]
        self._places = [places_of(p) for p in parameters]
        self._all = [place for places in self._places for place in places]
        self._joint = np.zeros(graph.channel_count)
        self._sums = [np.zeros(len(place.channels)) for place in self._all]
        self._count = 0

    def add(self, batch: Batch, loss_fn: Loss | None, number: int) -> None:
        with torch.enable_grad():
            output = output_of(self._module, batch, number)
            loss = loss_of(loss_fn, output, batch[-1], number, alone=not self._whole)
        if not bool(torch.isfinite(loss)):
            raise ModelError(f"The loss of batch {number} of data is {float(loss.detach())}, so nothing can be scored.")
        gradients = torch.autograd.grad(loss, self._tensors, allow_unused=True)
        products = (
            (first_order(weight.detach(), None if gradient is None else gradient.to_dense()), places)
            for places, weight, gradient in zip(self._places, self._tensors, gradients, strict=True)
        )
        found = sums_in_places(products)
        if self._whole:
            found = [total / process_count() for total in summed(found)]
        joint = np.zeros(len(self._joint))
        for place, total, sums in zip(self._all, self._sums, found, strict=True):
            joint[place.channels] += sums
            total += sums**2
        self._joint += joint**2
        self._count += 1

    def result(self) -> Saliency:
        count, joint, *sums = [np.array([float(self._count)]), self._joint, *self._sums]
        if not self._whole:
            count, joint, *sums = summed([count, joint, *sums])
        places = [(place.channels, total / count) for place, total in zip(self._all, sums, strict=True)]
        return Saliency(joint / count, places)


class _Activations(ValueInterpreter):
    """Sums over every tensor whose channels a node reads."""

    def __init__(self, module: fx.GraphModule, graph: ChannelGraph):
        super().__init__(module)
        self.extra_traceback = False  # it would be added to the text of our own errors
        self._recorded = module
        self._read: dict[fx.Node, list[tuple[fx.Node, _Read]]] = {}
        for node, flow in flows(module, graph).items():
            names = tuple(reading_parameters(module, graph, node))
            for source, channels in flow.inputs.items():
                known = node_labels(graph, source)
                if channels & flow.reads and len(known) == 1:
                    reads = [_Read(f.ids, names) for f in known[0].labels if channels_in((f,)) <= flow.reads]
                    self._read.setdefault(node, []).extend((source, read) for read in reads)

    def add(self, batch: Batch, number: int) -> None:
        args, kwargs, _ = batch
        try:
            with torch.no_grad():
                self.run(*placeholder_values(self._recorded, args, kwargs))
        except FxpruneError:
            raise
        except Exception as error:
            raise InputError(does_not_run(error, number)) from error

    def run_node(self, n: fx.Node) -> Any:
        for source, read in self._read.get(n, ()):
            value = self.env[source]
            if isinstance(value, Tensor):
                read.add(value)
        return super().run_node(n)

    def result(self) -> tuple[Activation, ...]:
        found = []
        for node, reads in self._read.items():
            for _, read in reads:
                count, *sums = summed([read.count, *read.sums])
                absolute, square, nonzero = (total / np.maximum(count, 1) for total in sums)
                found.append(Activation(node.name, read.parameters, read.channels, absolute, square, nonzero))
        return tuple(found)


class _Read:
    """Sums over one tensor, channel by channel."""

    def __init__(self, ids: npt.NDArray[np.int64], parameters: tuple[str, ...]):
        self.parameters = parameters
        self._ids = ids
        self.channels, position = np.unique(ids.reshape(-1), return_inverse=True)
        self._position = position.reshape(-1)
        self.count = np.zeros(len(self.channels))
        self.sums = [np.zeros(len(self.channels)) for _ in range(3)]

    def add(self, value: Tensor) -> None:
        ids = self._ids
        if ids.ndim != value.ndim or any(i not in (1, s) for i, s in zip(ids.shape, value.shape, strict=True)):
            raise InputError(
                f"A tensor of shape {list(value.shape)} has other channels than in the recorded run. Activations are "
                "measured on inputs of the example's size (the batch may differ)."
            )
        over = [d for d, size in enumerate(ids.shape) if size == 1]
        entries = value.numel() / ids.size
        self.count += np.bincount(self._position, minlength=len(self.channels)) * entries
        x = value.detach().abs() if value.is_complex() else value.detach()
        x = x.float()
        for total, part in zip(self.sums, (x.abs(), x**2, x != 0), strict=True):
            sums = part.sum(dim=over, keepdim=True, dtype=torch.float64) if over else part.double()
            total += np.bincount(self._position, sums.cpu().numpy().reshape(-1), len(self.channels))


def _samples(batch: Batch, number: int) -> Iterator[Batch]:
    """A batch taken apart into batches of one; tensors of another length belong to every sample.

    Raises:
        InputError: the target has not as many rows as the inputs.
    """
    size = next((len(tensor) for tensor in tensors_of(batch[:2]) if tensor.ndim), 1)
    of_target: list[int] = []
    map_leaves(lambda leaf: of_target.append(len(leaf)) if _has_rows(leaf) else None, batch[-1])
    if of_target and size not in of_target:
        raise InputError(
            f"Batch {number} of data cannot be taken apart into samples: the first tensor of its inputs has {size} "
            f"rows, and the target {' and '.join(map(str, of_target))}. The batch is dim 0 of both; put an input that "
            "has it first, or pass batches of one sample."
        )
    for index in range(size):

        def one(leaf: Any, index: int = index) -> Any:
            return leaf[index : index + 1] if _has_rows(leaf) and len(leaf) == size else leaf

        args, kwargs, target = map_leaves(one, tuple(batch))
        yield args, kwargs, target


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0
