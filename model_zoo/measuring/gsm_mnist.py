"""MNIST: sparse momentum by the paper's rule, the same with a set that is held, and what the zeros are worth."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.io.files import replacing
from fxprune.methods import optim
from model_zoo import data
from model_zoo.measuring.gsm_digits import Case, accuracy, held
from model_zoo.papers.lenet import SIDE
from model_zoo.pictures import TimeUpError
from model_zoo.recipes.common import Sgd
from model_zoo.recipes.gsm_mnist import BASE, NETWORKS, SPARSE
from model_zoo.records import Record
from model_zoo.study import Options

EPOCH = 235  # steps: as many as batches of 256 have
TUNE = replace(BASE, epochs=SPARSE.epochs)  # of what magnitude has cut: as long as sparse momentum
WRITTEN = 10  # epochs after which a training is written to its file
LOOKS = 14  # at the weights, evenly over the training

Images = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def images_of(options: Options) -> Images:
    """Of the training and of the test, as the network takes them."""
    found: Any = data.load("mnist", options.data)
    train, test = (part.batch(torch.arange(len(part))) for part in found)
    return train, test


class Training:
    """A network in training with batches of the options; steps, rates and decay are those of ``settings``.

    What is in ``file`` is taken up, and the training is written to it as it goes.
    """

    def __init__(
        self, network: nn.Module, settings: Sgd, compression: float, file: Path, *, images: Images, options: Options,
        seed: int,
    ):  # fmt: skip
        self.network, self._file, self._images, self._options = network, file, images, options
        self.epochs = max(1, round(settings.epochs * options.epochs / SPARSE.epochs))
        self.optimizer = optim.GSM(
            network.parameters(), settings.lr, settings.momentum, settings.weight_decay, compression, settings.nesterov
        )
        self._schedule = settings.schedule(self.optimizer, self.epochs, EPOCH)
        self._generator = torch.Generator().manual_seed(seed)
        self.epoch = 0
        self.looks: list[dict[str, Any]] = []
        self._active = 0  # at least once in the epoch that was run to
        self._take_up()

    def run(self, to: int) -> None:
        """Up to this epoch.

        Raises:
            TimeUpError: there is no time for another epoch.
        """
        seen: list[Tensor] = []
        (images, labels), _ = self._images
        self.network.train()
        while self.epoch < to:
            if self._options.until is not None and time.time() > self._options.until:
                self._write()
                raise TimeUpError
            self.epoch += 1
            for batch in self._batches(len(labels)):
                self.optimizer.zero_grad()
                F.cross_entropy(self.network(images[batch]), labels[batch]).backward()
                if self.epoch == to:
                    now = [g != 0 for p, g in self.optimizer.gradients().items() if optim.is_kernel(p)]
                    seen = [a | b for a, b in zip(seen, now, strict=True)] if seen else now
                self.optimizer.step()
                self._schedule.step()
            if self.epoch == to:
                self._active = sum(int(each.sum()) for each in seen)
            if self.epoch == to or self.epoch % WRITTEN == 0:
                self._write()

    def look(self, epoch: int, compression: float) -> None:
        """At the network of this epoch: accuracy before and after the cut, and how many weights count."""
        if any(look["epoch"] == epoch for look in self.looks):
            return
        self.run(epoch)
        cut = copy.deepcopy(self.network)
        optim.magnitude_cut(cut.parameters(), compression)
        norms = [_norm(network) for network in (self.network, cut)]
        self.looks.append({
            "epoch": epoch,
            "before": accuracy(self.network, *self._images[1]),
            "after": accuracy(cut, *self._images[1]),
            "support": optim.support(self.network.parameters()),
            "active": self._active,
            "norm_cut": math.sqrt(max(0.0, 1 - (norms[1] / norms[0]) ** 2)),
        })  # fmt: skip
        self._write()

    def held(self, file: Path) -> Training:
        """A copy that goes on alone, with the set of active weights held from here on."""
        branch = copy.deepcopy(self, {id(each): each for each in (self._images, self._options)})
        branch._file, branch.looks = file, []
        branch.optimizer.freeze()
        if not branch._take_up():
            branch._write()
        return branch

    def _batches(self, count: int) -> Iterator[Tensor]:
        left = EPOCH
        while left:
            batches = torch.randperm(count, generator=self._generator).split(self._options.batch)[:left]
            left -= len(batches)
            yield from batches

    def _parts(self) -> tuple[Any, ...]:
        return self.network, self.optimizer, self._schedule

    def _write(self) -> None:
        state = {
            "parts": [part.state_dict() for part in self._parts()], "generator": self._generator.get_state(),
            "epoch": self.epoch, "looks": self.looks, "active": self._active,
        }  # fmt: skip
        with replacing(self._file) as draft:
            torch.save(state, draft)

    def _take_up(self) -> bool:
        """What was written, if anything was."""
        if not self._file.exists():
            return False
        state = torch.load(self._file)
        for part, own in zip(self._parts(), state["parts"], strict=True):
            part.load_state_dict(own)
        self._generator.set_state(state["generator"])
        self.epoch, self.looks, self._active = state["epoch"], state["looks"], state["active"]
        return True


def measured(case: Case, images: Images, options: Options) -> Record:
    """One network: dense, by the paper's rule, for every share of ``--freeze`` from there on with a set held.

    Beside these the largest of the dense weights, fine-tuned, and the first weights with the zeros of the paper's rule.
    """
    torch.manual_seed(case.seed)
    folder = options.work / f"gsm_mnist-{case.network}-seed{case.seed}-batch{options.batch}-epochs{options.epochs}"
    folder.mkdir(parents=True, exist_ok=True)

    def begin(network: nn.Module, settings: Sgd, compression: float, name: str) -> Training:
        return Training(
            network, settings, compression, folder / f"{name}.pt", images=images, options=options, seed=case.seed
        )

    network = NETWORKS[case.network].make().to(memory_format=torch.channels_last)  # a third faster on processors
    first = copy.deepcopy(network)
    dense = begin(network, BASE, 1, "dense")  # the same for every compression
    dense.run(dense.epochs)
    marks = {round(share * options.epochs): f"held after {share:.0%}" for share in options.freeze}
    whole = begin(
        copy.deepcopy(dense.network), SPARSE, case.compression, "-".join([f"{case.compression}x", *map(str, marks)])
    )
    kernels = [p for p in dense.network.parameters() if optim.is_kernel(p)]
    total = sum(p.numel() for p in kernels)
    figures: dict[str, Any] = {
        **case._asdict(), "weights": total, "kept": optim.active_count(total, case.compression),
        "epochs": whole.epochs, "batch": options.batch, "dense": accuracy(dense.network, *images[1]),
    }  # fmt: skip
    looks = {max(1, round(whole.epochs * n / LOOKS)) for n in range(1, LOOKS + 1)}
    branches: dict[int, Training] = {}
    for epoch in sorted(looks | marks.keys()):
        if epoch in looks:
            whole.look(epoch, case.compression)
        if epoch in marks:
            whole.run(epoch)
            branches[epoch] = whole.held(folder / f"{case.compression}x-held-{epoch}.pt")
    for mark, branch in branches.items():
        for epoch in sorted(look for look in looks if look > mark):
            branch.look(epoch, case.compression)

    def with_zeros(name: str, begun: nn.Module, zeros_of: nn.Module, settings: Sgd) -> dict[str, Any]:
        """With the zeros that the cut of a network leaves, which stay."""
        masks = optim.magnitude_cut(copy.deepcopy(zeros_of).parameters(), case.compression)
        network = held(begun, masks)
        cut = accuracy(network, *images[1])
        training = begin(network, settings, 1, f"{case.compression}x-{name}")
        training.run(training.epochs)
        trained = accuracy(training.network, *images[1])
        return {"cut": cut, "epochs": training.epochs, "accuracy": trained, "left": _left(training.network)}

    beside = {
        "magnitude": with_zeros("magnitude", dense.network, dense.network, TUNE),
        "ticket": with_zeros("ticket", first, whole.network, BASE),
    }
    sparse = next(iter(branches.values()), whole).network
    rules = {"the paper's": whole.looks} | {marks[mark]: branch.looks for mark, branch in branches.items()}
    record = Record(
        str(case), figures | {"rules": rules, "beside": beside, "files": _files(case, dense.network, sparse)}
    )
    for file in folder.glob(f"{case.compression}x-*"):
        file.unlink()
    return record


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
