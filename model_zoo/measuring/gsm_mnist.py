"""MNIST: sparse momentum by the paper's rule, the same with a set that is held, and what the zeros are worth."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.methods import optim
from model_zoo import data
from model_zoo.measuring.gsm_digits import Case, accuracy, held
from model_zoo.papers.lenet import SIDE
from model_zoo.recipes.common import Sgd
from model_zoo.recipes.gsm_mnist import BASE, NETWORKS, SPARSE
from model_zoo.records import Record
from model_zoo.study import Options

EPOCH = 235  # steps: as many as batches of 256 have
TUNE = replace(BASE, epochs=SPARSE.epochs)  # of what magnitude has cut: as long as sparse momentum
LOOKS = 14  # at the weights, evenly over the training

Images = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def images_of(options: Options) -> Images:
    """Of the training and of the test, as the network takes them."""
    found: Any = data.load("mnist", options.data)
    train, test = (part.batch(torch.arange(len(part))) for part in found)
    return train, test


class Training:
    """A network in training with batches of the options; steps, rates and decay are those of ``settings``."""

    def __init__(
        self, network: nn.Module, settings: Sgd, compression: float, images: Images, options: Options, seed: int
    ):
        self.network, self._options = network, options
        self._images, self._labels = images[0]
        self.epochs = max(1, round(settings.epochs * options.epochs / SPARSE.epochs))
        self.optimizer = optim.GSM(
            network.parameters(), settings.lr, settings.momentum, settings.weight_decay, compression, settings.nesterov
        )
        self._schedule = settings.schedule(self.optimizer, self.epochs, EPOCH)
        self._generator = torch.Generator().manual_seed(seed)
        self.epoch = 0

    def run(self, to: int) -> int:
        """Up to this epoch; how many weights were active at least once in the last."""
        seen: list[Tensor] = []
        self.network.train()
        while self.epoch < to:
            self.epoch += 1
            for batch in self._batches():
                self.optimizer.zero_grad()
                F.cross_entropy(self.network(self._images[batch]), self._labels[batch]).backward()
                if self.epoch == to:
                    now = [g != 0 for p, g in self.optimizer.gradients().items() if optim.is_kernel(p)]
                    seen = [a | b for a, b in zip(seen, now, strict=True)] if seen else now
                self.optimizer.step()
                self._schedule.step()
        return sum(int(each.sum()) for each in seen)

    def _batches(self) -> Iterator[Tensor]:
        left = EPOCH
        while left:
            order = torch.randperm(len(self._labels), generator=self._generator)
            batches = order.split(self._options.batch)[:left]
            left -= len(batches)
            yield from batches

    def branched(self) -> Training:
        """A copy that goes on alone."""
        return copy.deepcopy(self, {id(each): each for each in (self._images, self._labels, self._options)})


def measured(case: Case, images: Images, options: Options) -> Record:
    """One network: dense, by the paper's rule, for every share of ``--freeze`` from there on with a set held.

    Beside these the largest of the dense weights, fine-tuned, and the first weights with the zeros of the paper's rule.
    """
    torch.manual_seed(case.seed)
    begin = partial(Training, images=images, options=options, seed=case.seed)
    network = NETWORKS[case.network].make().to(memory_format=torch.channels_last)  # a third faster on processors
    first = copy.deepcopy(network)
    dense = begin(network, BASE, 1)
    dense.run(dense.epochs)
    whole = begin(copy.deepcopy(dense.network), SPARSE, case.compression)
    kernels = [p for p in dense.network.parameters() if optim.is_kernel(p)]
    total = sum(p.numel() for p in kernels)
    figures: dict[str, Any] = {
        **case._asdict(), "weights": total, "kept": optim.active_count(total, case.compression),
        "epochs": whole.epochs, "batch": options.batch, "dense": accuracy(dense.network, *images[1]),
    }  # fmt: skip
    marks = {round(share * whole.epochs): share for share in options.freeze}
    looks = {max(1, round(whole.epochs * n / LOOKS)) for n in range(1, LOOKS + 1)}
    rules: dict[str, list[dict[str, Any]]] = {"the paper's": []}
    branches = {}
    for epoch in sorted(looks | marks.keys()):
        active = whole.run(epoch)
        if epoch in looks:
            rules["the paper's"].append(_look(whole, active, case, images))
        if epoch in marks:
            branches[f"held after {marks[epoch]:.0%}"] = branch = whole.branched()
            branch.optimizer.freeze()
    for name, branch in branches.items():
        rules[name] = [
            _look(branch, branch.run(epoch), case, images) for epoch in sorted(looks) if epoch > branch.epoch
        ]  # fmt: skip

    def with_zeros(begun: nn.Module, zeros_of: nn.Module, settings: Sgd) -> dict[str, Any]:
        """With the zeros that the cut of a network leaves, which stay."""
        masks = optim.magnitude_cut(copy.deepcopy(zeros_of).parameters(), case.compression)
        training = begin(held(begun, masks), settings, 1)
        cut = accuracy(training.network, *images[1])
        training.run(training.epochs)
        trained = accuracy(training.network, *images[1])
        return {"cut": cut, "epochs": training.epochs, "accuracy": trained, "left": _left(training.network)}

    beside = {
        "magnitude": with_zeros(dense.network, dense.network, TUNE),
        "ticket": with_zeros(first, whole.network, BASE),
    }
    sparse = next(iter(branches.values()), whole).network
    return Record(str(case), figures | {"rules": rules, "beside": beside, "files": _files(case, dense.network, sparse)})


def _look(training: Training, active: int, case: Case, images: Images) -> dict[str, Any]:
    """Accuracy before and after the cut, and how many weights count."""
    cut = copy.deepcopy(training.network)
    optim.magnitude_cut(cut.parameters(), case.compression)
    norms = [_norm(network) for network in (training.network, cut)]
    return {
        "epoch": training.epoch,
        "before": accuracy(training.network, *images[1]),
        "after": accuracy(cut, *images[1]),
        "support": optim.support(training.network.parameters()),
        "active": active,
        "norm_cut": math.sqrt(max(0.0, 1 - (norms[1] / norms[0]) ** 2)),
    }


def _norm(network: nn.Module) -> float:
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in network.parameters() if optim.is_kernel(p)))


def _left(network: nn.Module) -> int:
    """Weights that are not zero."""
    return sum(int(p.count_nonzero()) for p in network.parameters() if optim.is_kernel(p))


def _files(case: Case, dense: nn.Module, sparse: nn.Module) -> dict[str, Any]:
    """Bytes of files, and milliseconds of onnxruntime for one image."""
    example = torch.zeros(1, 1, SIDE, SIDE)
    method = fxprune.methods.GSM(case.compression)
    networks = {
        "dense": fxprune.prune(dense, example, channels=1.0, progress=False),
        "sparse": fxprune.attach(sparse, example, method=method, progress=False).finish(),
    }
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for name, network in networks.items():
            path = Path(folder) / name
            fxprune.save(network, saved := path.with_suffix(".safetensors"))
            found |= {f"{name}, save": saved.stat().st_size}
            for sparsely in {False, name == "sparse"}:
                to = path.with_suffix(".onnx")
                validation = fxprune.export(network, to, example, sparse=sparsely)
                what = f"{name}, export" + (" (sparse=True)" if sparsely else "")
                found |= {what: to.stat().st_size, f"{what}, ms": validation.latency_ms}
    nonzero = _left(networks["sparse"])
    entries = sum(p.numel() for p in networks["sparse"].parameters() if optim.is_kernel(p))
    share = nonzero / entries
    entropy = -entries / 8 * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    vectors = sum(p.nbytes for p in networks["sparse"].parameters() if not optim.is_kernel(p))
    return found | {"left": nonzero, "entropy": round(4 * nonzero + entropy + vectors)}
