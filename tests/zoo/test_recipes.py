"""The recipes run, have the papers' settings, and leave what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image

import fxprune
from fxprune.methods.optim import GSM
from fxprune.training import Loop, Training
from fxprune.training import loop as loop_module
from model_zoo import data
from model_zoo.data import digits, glyphs
from model_zoo.papers import mlp_784_500_300_10, vgg19_bn, vgg_a_bn
from model_zoo.papers.vit import vit_32
from model_zoo.recipes import (
    dhp_cifar,
    dhp_mobilenet,
    dhp_restoration,
    gsm,
    gsm_cifar,
    scratch_cifar,
    scratch_imagenet,
    slimming,
    slimming_cifar,
    slimming_imagenet,
)
from model_zoo.recipes.common import SMOKE_CLASSES, SMOKE_SIDES, SMOKE_TEST, Run, split, transformed
from model_zoo.weights import take_weights

pytestmark = pytest.mark.usefixtures("one_thread")

Line = dict[str, Any]
SCRATCH = [
    *(("scratch_cifar", name) for name in scratch_cifar.NETWORKS),
    *(("scratch_imagenet", name) for name in scratch_imagenet.NETWORKS),
]


def run(recipe: str, out: Path, *arguments: str) -> list[Line]:
    """The result lines of a run."""
    import_module(f"model_zoo.recipes.{recipe}").main([*arguments, "--out", str(out)])
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def folder(out: Path) -> Path:
    (found,) = (path for path in out.iterdir() if path.is_dir())
    return found


def weights(out: Path, name: str = "pruned") -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(folder(out) / f"{name}.pt")
    return loaded


def norms(state: dict[str, Tensor]) -> list[int]:
    """How many channels every norm has."""
    return [len(value) for name, value in state.items() if name.endswith("running_mean")]


def check(line: Line, dense: nn.Module, image: Tensor) -> None:
    """A result line of this dense network, all of whose figures are there."""
    graph = fxprune.analyze(dense, image)
    assert (line["dense"]["macs"], line["dense"]["params"]) == (graph.macs(), graph.params())
    assert line["pruned"]["macs"] < line["dense"]["macs"]
    assert line["pruned"]["params"] < line["dense"]["params"]
    assert 0 <= line["dense"]["accuracy"] <= 1
    assert 0 <= line["pruned"]["accuracy"] <= 1
    assert line["versions"]["torch"] == metadata.version("torch")
    assert line["smoke"] is True
    assert all(seconds >= 0 for seconds in line["seconds"].values())


# -- smoke runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "name"), SCRATCH)
def test_scratch(tmp_path: Path, recipe: str, name: str) -> None:
    (line,) = run(recipe, tmp_path, "--smoke", "--network", name, "--ratio", "0.4", "--seed", "3")
    network = import_module(f"model_zoo.recipes.{recipe}").NETWORKS[name]
    image = torch.zeros(1, 3, 16, 16) if recipe == "scratch_cifar" else torch.zeros(1, 3, 32, 32)
    check(line, network.make(num_classes=10, **network.narrow), image)
    assert 0.38 < line["pruned"]["macs"] / line["dense"]["macs"] <= 0.4
    assert (line["recipe"], line["network"], line["ratio"], line["seed"]) == (recipe, name, 0.4, 3)
    assert list(line["seconds"]) == ["gates", "train", "baseline"]

    wide = network.make(num_classes=10, **network.narrow | {"width": 1.25 * network.narrow["width"]})
    plan = fxprune.PruningPlan.load(folder(tmp_path) / "pruned.plan.json")
    pruned = fxprune.apply(wide, plan, image)
    pruned.load_state_dict(weights(tmp_path))
    assert fxprune.analyze(pruned, image).macs() == line["pruned"]["macs"]


def test_a_vision_transformer_for_studies(tmp_path: Path) -> None:
    file = tmp_path / "vit.pt"
    (line,) = run("vit_cifar", tmp_path, "--smoke", "--save", str(file))
    model = vit_32(size=16, depth=1, width=32)
    take_weights(model, file, "")
    assert line["dense"]["params"] == sum(p.numel() for p in model.parameters())
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize("recipe", ["gsm_cifar", "slimming_cifar", "dhp_cifar", "scratch_cifar"])
def test_trained_weights_take_the_place_of_the_training_of_the_dense_network(tmp_path: Path, recipe: str) -> None:
    file, network = tmp_path / "mine.pt", import_module(f"model_zoo.recipes.{recipe}").NETWORKS
    name = "resnet_56" if "resnet_56" in network else next(iter(network))
    dense = randomise(network[name].make(num_classes=10, **network[name].narrow))
    torch.save({f"module.{key}": value for key, value in dense.state_dict().items()}, file)
    chosen = ["--smoke", "--network", name, "--weights", str(file)]
    (line,) = run(recipe, tmp_path / "out", *chosen)
    assert not {"base", "baseline"} & set(line["seconds"])
    assert line["weights"] == "mine"
    images, labels = zip(*glyphs(SMOKE_TEST, SMOKE_SIDES["cifar10"], SMOKE_CLASSES, seed=1), strict=True)
    right = dense.eval()(torch.stack(images)).argmax(1) == torch.tensor(labels)
    assert line["dense"]["accuracy"] == pytest.approx(float(right.float().mean()))
    torch.save(nn.Linear(2, 2).state_dict(), file)
    with pytest.raises(SystemExit, match=r"^--weights: .*mine.pt does not fit: its tensor 1, weight, is \[2, 2\]"):
        run(recipe, tmp_path / "other", *chosen)


@pytest.mark.parametrize("name", slimming_cifar.NETWORKS)
def test_slimming(tmp_path: Path, name: str) -> None:
    dataset = "cifar100" if name == "vgg19_bn" else "cifar10"  # of which only the percentage is another
    (line,) = run("slimming_cifar", tmp_path, "--smoke", "--network", name, "--dataset", dataset)
    network = slimming_cifar.NETWORKS[name]
    dense = network.make(num_classes=10, **network.narrow)
    check(line, dense, torch.zeros(1, 3, 16, 16))
    percent = network.percents[dataset][0]
    assert (line["dataset"], line["percent"], line["pass"]) == (dataset, percent, 1)
    assert 0 <= line["sparse_accuracy"] <= 1
    assert 0 <= line["cut_accuracy"] <= 1
    assert list(line["seconds"]) == ["pass1-sparse", "baseline", "pass1-tuned"]


def test_slimming_by_one_threshold(tmp_path: Path) -> None:
    (line,) = run("slimming_cifar", tmp_path, "--smoke", "--no-baseline", "--percent", "0.3")
    every = sum(norms(vgg19_bn(width=0.25).state_dict()))
    left = norms(weights(tmp_path, "pass1"))
    assert sum(left) == every - int(every * 0.3) - 1
    assert line["dense"]["accuracy"] is None


def test_slimming_in_passes(tmp_path: Path) -> None:
    first, second = run("slimming_cifar", tmp_path, "--smoke", "--passes", "2", "--no-baseline")
    assert [first["pass"], second["pass"]] == [1, 2]
    assert first["percent"] == second["percent"] == 0.5
    assert first["dense"] == second["dense"]
    assert second["pruned"]["macs"] < first["pruned"]["macs"]
    before = norms(vgg19_bn(width=0.25).state_dict())
    for name in ("pass1", "pass2"):
        after = norms(weights(tmp_path, name))
        assert all(2 * b >= a for a, b in zip(before, after, strict=True)), "more than half of a layer went"
        assert sum(after) < 0.7 * sum(before)
        before = after

    image, pruned = torch.zeros(1, 3, 16, 16), vgg19_bn(width=0.25)
    for name in ("pass1", "pass2"):
        pruned = fxprune.apply(pruned, fxprune.PruningPlan.load(folder(tmp_path) / f"{name}.plan.json"), image)
        pruned.load_state_dict(weights(tmp_path, name))
    assert fxprune.analyze(pruned, image).macs() == second["pruned"]["macs"]


def test_slimming_mnist(tmp_path: Path) -> None:
    (line,) = run("slimming_mnist", tmp_path, "--smoke")
    image = torch.zeros(1, 1, 28, 28)
    check(line, mlp_784_500_300_10(width=0.2), image)
    assert norms(weights(tmp_path, "pass1")) == [20, 12], "80 % of each of 100 and 60"

    plan = fxprune.PruningPlan.load(folder(tmp_path) / "pass1.plan.json")
    pruned = fxprune.apply(mlp_784_500_300_10(width=0.2), plan, image)
    pruned.load_state_dict(weights(tmp_path, "pass1"))
    images, labels = digits(28)[1].tensors
    accuracy = float((pruned.eval()(images).argmax(1) == labels).float().mean())
    assert accuracy == pytest.approx(line["pruned"]["accuracy"])
    assert accuracy > 0.3, "digits are learned even in one epoch"


def test_slimming_imagenet(tmp_path: Path) -> None:
    (line,) = run("slimming_imagenet", tmp_path, "--smoke")
    check(line, vgg_a_bn(num_classes=10, width=0.0625), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["resnet_20", "resnet_164", "densenet_40_12"])
def test_dhp_cifar(tmp_path: Path, name: str) -> None:
    (line,) = run("dhp_cifar", tmp_path, "--smoke", "--network", name, "--ratio", "0.6")
    network = dhp_cifar.NETWORKS[name]
    dense, image = network.make(num_classes=10, **network.narrow), torch.zeros(1, 3, 16, 16)
    check(line, dense, image)
    assert 0.55 < line["pruned"]["macs"] / line["dense"]["macs"] <= 0.6
    assert line["search"].startswith("search not stopped by its rule after 8 steps")
    assert 0 <= line["cut_accuracy"] <= 1
    assert list(line["seconds"]) == ["search", "baseline", "converging"]
    pruned = fxprune.apply(dense, fxprune.PruningPlan.load(folder(tmp_path) / "pruned.plan.json"), image)
    pruned.load_state_dict(weights(tmp_path))


@pytest.mark.parametrize(("name", "width"), [("mobilenet_v1", 1), ("mobilenet_v2", 2)])
def test_dhp_mobilenet(tmp_path: Path, name: str, width: int) -> None:
    given = ("--smoke", "--network", name, "--width", str(width), "--ratio", "0.6", "--no-baseline")
    (line,) = run("dhp_mobilenet", tmp_path, *given)
    dense, image = dhp_mobilenet.NETWORKS[name].make(num_classes=10, width=0.25 * width), torch.zeros(1, 3, 32, 32)
    graph = fxprune.analyze(dense, image)
    assert (line["dense"]["macs"], line["dense"]["params"]) == (graph.macs(), graph.params())
    assert 0.55 < line["pruned"]["macs"] / line["dense"]["macs"] <= 0.6
    plan = fxprune.PruningPlan.load(folder(tmp_path) / "pruned.plan.json")
    assert 1 in plan.kept["classifier.1.weight"], "the classifier reads less"


def test_upsamplers_that_share_the_latents_of_the_stream(tmp_path: Path) -> None:
    given = ("--smoke", "--no-baseline", "--share-upsampler", "--network")
    run("dhp_restoration", tmp_path, *given, "srresnet")
    kept = fxprune.PruningPlan.load(folder(tmp_path) / "pruned.plan.json").kept
    stream, *others = (kept[f"{name}.weight"][0] for name in ("head.0", "tail.0", "tail.3"))
    for rows in others:
        assert len({*stream} ^ {row // 4 for row in rows}) <= 1, "but for the edge of the budget"
    with pytest.raises(SystemExit):
        run("dhp_restoration", tmp_path / "other", *given, "dncnn")


@pytest.mark.parametrize("name", dhp_restoration.NETWORKS)
def test_dhp_restoration(tmp_path: Path, name: str) -> None:
    (line,) = run("dhp_restoration", tmp_path, "--smoke", "--network", name, "--no-baseline")
    network = dhp_restoration.NETWORKS[name]
    image = torch.zeros(1, network.channels, 32, 32) if network.channels == 1 else torch.zeros(1, 3, 8, 8)
    graph = fxprune.analyze(network.make(**network.narrow), image)
    assert (line["dense"]["macs"], line["dense"]["params"]) == (graph.macs(), graph.params())
    assert 0.55 < line["pruned"]["macs"] / line["dense"]["macs"] <= 0.6
    assert line["dense"]["psnr"] is None
    assert 0 < line["pruned"]["psnr"] < 40
    assert 0 < line["cut_psnr"] < 40


@pytest.mark.parametrize(
    ("recipe", "name", "compression"),
    [("gsm_mnist", "lenet_300_100", 60), ("gsm_cifar", "resnet_56", 10), ("gsm_cifar", "densenet_40_12", 20 / 3)],
)
def test_gsm(tmp_path: Path, recipe: str, name: str, compression: float) -> None:
    (line,) = run(recipe, tmp_path, "--smoke", "--ticket", "--network", name)
    check_gsm(line, tmp_path, compression)
    assert list(line["seconds"]) == ["base", "gsm", "ticket"]
    assert 0 <= line["ticket_accuracy"] <= 1
    ticket = weights(tmp_path, "ticket")
    kept = sum(int(value.count_nonzero()) for value in ticket.values() if value.ndim > 1)
    assert 0 < kept <= line["weights_kept"], "the ticket has weights that GSM has not"


def test_gsm_of_lenet_5_and_imagenet(tmp_path: Path) -> None:
    (line,) = run("gsm_imagenet", tmp_path / "one", "--smoke")
    check_gsm(line, tmp_path / "one", 4)
    (line,) = run("gsm_mnist", tmp_path / "two", "--smoke", "--network", "lenet_5", "--compression", "20")
    check_gsm(line, tmp_path / "two", 20)
    assert "ticket_accuracy" not in line
    assert "freeze" not in line, "the paper's rule"


def check_gsm(line: Line, out: Path, compression: float) -> None:
    pruned = weights(out)
    left = sum(int(value.count_nonzero()) for value in pruned.values() if value.ndim > 1)
    zeros = sum(int((value == 0).sum()) for value in pruned.values() if value.ndim > 1)
    assert line["pruned"]["zeros"] == zeros
    assert 0 < left <= line["weights_kept"], "what was removed may have read something"
    assert line["weights_kept"] <= line["dense"]["params"] / compression
    assert line["weights_kept"] > 0.8 * line["dense"]["params"] / compression
    assert line["pruned"]["macs"] <= line["dense"]["macs"]
    assert line["compression"] == pytest.approx(compression)
    assert line["weights_kept"] <= line["support"] <= line["dense"]["params"]
    assert all(0 <= accuracy <= 1 for accuracy in (line["gsm_accuracy"], line["pruned"]["accuracy"]))


# -- the papers' settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """One training that was asked for.

    ``rates``: of every epoch. ``gammas``: first scales of the norms. ``spread``: deviation of the largest convolution's
    first weights, relative to that of the papers' code.
    """

    training: Training
    data: Any
    loop: Loop
    epochs: int
    optimizer: torch.optim.Optimizer
    rates: list[float]
    gammas: set[float]
    spread: float

    @property
    def method(self) -> str:
        return type(self.training.hooks).__module__.rpartition(".")[2]

    def has(self, **settings: Any) -> bool:
        return all(group[name] == value for group in self.optimizer.param_groups for name, value in settings.items())


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Fit]:
    """The trainings of a whole recipe, none of which is done: its networks, with few drawn images for every data set.

    The scales of the norms are random instead, since Network Slimming cuts equal ones together.
    """
    found: list[Fit] = []

    def fit(training: Training, batches: Any, loss: Any, epochs: int, loop: Loop, **_: Any) -> None:
        parameters = [p for p in training.hooks.trained() if p.requires_grad]
        optimizer = training.hooks.optimizer() if loop.optimizer is None else loop.optimizer(parameters)
        schedule = None if loop.schedule is None else loop.schedule(optimizer, epochs)
        rates = []
        for _epoch in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            for _ in range(len(batches) if loop.per_step else 1):
                if schedule is not None:
                    schedule.step()
        modules = [*training.model.modules()]
        scales = [m.weight.detach() for m in modules if isinstance(m, NORMS)]
        gammas = {round(value, 6) for scale in scales for value in scale.tolist()}
        weights = [m.weight.detach() for m in modules if isinstance(m, nn.Conv2d) and hasattr(m, "weight")]
        largest = max(weights, key=Tensor.numel, default=torch.zeros(2, 1))
        spread = float(largest.std() * (largest.numel() / largest.shape[1] / 2) ** 0.5)
        found.append(Fit(training, batches, loop, epochs, optimizer, rates, gammas, spread))
        for scale in scales:
            scale.uniform_()

    def load(name: str, directory: Path) -> tuple[Dataset[Any], Dataset[Any]]:
        if name == "mnist":
            return digits(28)
        side = 32 if name == "imagenet" else 16
        return glyphs(1000 if name == "imagenet" else 5100, side), glyphs(4, side)

    monkeypatch.setattr("fxprune.api.fit", fit)
    monkeypatch.setattr(slimming, "fit", fit)
    monkeypatch.setattr(gsm, "fit", fit)
    monkeypatch.setattr(data, "load", load)
    return found


def steps(rate: float, *lengths: int) -> Any:
    """A rate that is divided by ten after so many epochs, and again."""
    return pytest.approx([rate / 10**drop for drop, length in enumerate(lengths) for _ in range(length)])


def narrowed(monkeypatch: pytest.MonkeyPatch, recipe: Any, name: str) -> None:
    """A recipe's network as narrow as in a smoke run: its settings are those of the whole network."""
    network = recipe.NETWORKS[name]
    monkeypatch.setitem(recipe.NETWORKS, name, network._replace(make=partial(network.make, **network.narrow)))


# of the released code, in its expanded networks: 5280, 21 x 20, 63 x 20, 118 x 80, 7480, 10520
GATES = {"vgg16_bn": 5280, "resnet_20": 420, "resnet_56": 1260}
GATES |= {"resnet_50": 9440, "mobilenet_v1": 7480, "mobilenet_v2": 10520}


def check_gates(fit: Fit, name: str, strength: float, sparsity: float) -> None:
    (values,) = fit.training.hooks.trained()
    assert values.numel() == GATES[name]
    assert isinstance(fit.optimizer, torch.optim.Adam)
    assert fit.has(lr=0.01, weight_decay=0, betas=(0.9, 0.999))
    assert fit.rates == steps(0.01, fit.epochs)
    assert float(fit.training.loss(torch.tensor(0.0)).detach()) == pytest.approx(strength * (1 - sparsity) ** 2)


@pytest.mark.parametrize("name", scratch_cifar.NETWORKS)
def test_settings_of_scratch_cifar(tmp_path: Path, fits: list[Fit], name: str) -> None:
    (line,) = run("scratch_cifar", tmp_path, "--data", ".", "--network", name, "--ratio", "0.3")
    gates, train, dense = fits
    check_gates(gates, name, strength=0.5, sparsity=0.2)
    assert (gates.epochs, gates.data.batch_size, len(gates.data.dataset)) == (10, 128, 100)
    assert gates.loop.validation.dataset.indices == range(100, 5100), "the last 5000 of 5100"
    for fit in (train, dense):
        assert (fit.data.batch_size, len(fit.data.dataset)) == (128, 5100)
        assert fit.has(momentum=0.9, weight_decay=1e-4, nesterov=False)
        assert fit.gammas == {0.5 if name == "vgg16_bn" else 1.0}
        assert fit.spread == pytest.approx(1, rel=0.02)
    assert dense.rates == steps(0.1, 80, 40, 40)
    assert train.epochs == line["epochs"] == 533, "160 / 0.3"
    assert train.rates == steps(0.1, 266, 134, 133)


def test_scratch_without_more_epochs(tmp_path: Path, fits: list[Fit]) -> None:
    (line,) = run("scratch_cifar", tmp_path, "--data", ".", "--network", "resnet_20", "--no-scratch-b", "--no-baseline")
    assert [fit.epochs for fit in fits] == [10, 160]
    assert line["epochs"] == 160
    assert line["dense"]["accuracy"] is None


@pytest.mark.parametrize(
    ("name", "epochs", "lengths"),
    [("resnet_50", 200, (60, 60, 60, 20)), ("mobilenet_v1", 300, None), ("mobilenet_v2", 300, None)],
)
def test_settings_of_scratch_imagenet(
    tmp_path: Path,
    fits: list[Fit],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    epochs: int,
    lengths: tuple[int, ...] | None,
) -> None:
    monkeypatch.setattr(scratch_imagenet, "EVALUATE_EVERY", 1)
    (line,) = run("scratch_imagenet", tmp_path, "--data", ".", "--network", name)
    gates, train, dense = fits
    check_gates(gates, name, strength=0.05, sparsity=0.5)
    assert len(gates.data.dataset) == len(gates.loop.validation.dataset) == 500, "50 of each of 10 classes"
    assert (gates.epochs, len(gates.data), gates.data.batch_size) == (5, 1, 100), "one pass over 500 images"
    assert train.epochs == line["epochs"] == epochs
    assert dense.epochs == 150
    for fit in (train, dense):
        assert (fit.data.batch_size, len(fit.data.dataset)) == (256, 1000)
        assert fit.has(momentum=0.9, nesterov=True)
        assert fit.gammas == {1.0}
        assert fit.spread == pytest.approx(1, rel=0.02)
        check_decay(fit)
    if lengths is not None:
        assert train.rates == steps(0.05, *lengths)
        assert dense.rates == steps(0.05, 45, 45, 45, 15)
    else:
        assert train.rates[::150] == pytest.approx([0.05, 0.025])
        assert train.rates[-1] < 1e-5


def check_decay(fit: Fit) -> None:
    """Weight decay of nothing but convolutions that are not depthwise, and of linear layers."""
    decays = {id(p): group["weight_decay"] for group in fit.optimizer.param_groups for p in group["params"]}
    for module in fit.training.model.modules():
        kernel = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        for name, parameter in module.named_parameters(recurse=False):
            assert decays.pop(id(parameter)) == (4e-5 if kernel and name == "weight" else 0)
    assert not decays


def test_rate_follows_the_batch(tmp_path: Path, fits: list[Fit], monkeypatch: pytest.MonkeyPatch) -> None:
    narrowed(monkeypatch, scratch_imagenet, "mobilenet_v1")
    run("scratch_imagenet", tmp_path, "--data", ".", "--network", "mobilenet_v1", "--batch", "64", "--no-baseline")
    assert fits[1].data.batch_size == 64
    assert fits[1].rates[0] == pytest.approx(0.05 / 4)


def check_slimming(fits: list[Fit], strength: float, batch: int) -> None:
    """The training with the penalty, the baseline, and fine-tuning."""
    assert [fit.method for fit in fits] == ["slimming", "common", "common"]
    assert all(fit.data.batch_size == batch for fit in fits)
    assert all(fit.has(momentum=0.9, nesterov=True, weight_decay=1e-4) for fit in fits)
    assert fits[0].gammas == fits[1].gammas == {0.5}
    training = fits[0].training
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.after_backward()
    for module in training.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            penalty = strength if isinstance(module, NORMS) and name == "weight" else 0
            assert torch.equal(parameter.grad, torch.full_like(parameter, penalty))


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("name", slimming_cifar.NETWORKS)
def test_settings_of_slimming_cifar(
    tmp_path: Path, fits: list[Fit], monkeypatch: pytest.MonkeyPatch, name: str, dataset: str
) -> None:
    narrowed(monkeypatch, slimming_cifar, name)
    (line,) = run("slimming_cifar", tmp_path, "--data", ".", "--network", name, "--dataset", dataset)
    check_slimming(fits, strength=1e-4 if name == "vgg19_bn" else 1e-5, batch=64)
    assert all(fit.rates == steps(0.1, 80, 40, 40) for fit in fits)
    assert line["percent"] == {"vgg19_bn": {"cifar10": 0.7, "cifar100": 0.5}[dataset]}.get(name, 0.4)


def test_settings_of_slimming_mnist(tmp_path: Path, fits: list[Fit]) -> None:
    run("slimming_mnist", tmp_path, "--data", ".")
    check_slimming(fits, strength=1e-4, batch=256)
    assert all(fit.rates == steps(0.1, 10, 10, 10) for fit in fits)
    assert norms(weights(tmp_path, "pass1")) == [100, 60], "the paper's 784-100-60-10"


def test_settings_of_slimming_imagenet(tmp_path: Path, fits: list[Fit], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slimming_imagenet, "vgg_a_bn", partial(vgg_a_bn, width=0.125))
    (line,) = run("slimming_imagenet", tmp_path, "--data", ".")
    check_slimming(fits, strength=1e-5, batch=256)
    assert fits[0].rates == fits[1].rates == steps(0.1, 20, 20, 20)
    assert fits[2].rates == steps(1e-3, 5)
    every = sum(norms(vgg_a_bn(width=0.125).state_dict()))
    assert sum(norms(weights(tmp_path, "pass1"))) == every // 2 - 1
    assert line["percent"] == 0.5


def warmed(rate: float, *lengths: int) -> Any:
    """``steps``, but for the first five epochs, in which the rate rises from 0."""
    rates = [rate / 10**drop for drop, length in enumerate(lengths) for _ in range(length)]
    return pytest.approx([r * min(1, epoch / 5) for epoch, r in enumerate(rates)])


def check_sparse(fits: list[Fit], batch: int, compression: float, **settings: Any) -> None:
    base, sparse, ticket = fits
    assert [fit.method for fit in fits] == ["common", "gsm", "common"]
    assert all(fit.data.batch_size == batch for fit in fits)
    assert isinstance(sparse.optimizer, GSM)
    assert sparse.has(compression=compression, vector_decay=0.0, **settings)
    assert ticket.rates == base.rates
    for fit in (base, ticket):
        decays = {p.ndim > 1: group["weight_decay"] for group in fit.optimizer.param_groups for p in group["params"]}
        assert decays == {True: settings["weight_decay"], False: 0.0}
        assert fit.optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(("name", "compression"), [("resnet_56", 10), ("densenet_40_12", 20 / 3)])
def test_settings_of_gsm_cifar(
    tmp_path: Path, fits: list[Fit], monkeypatch: pytest.MonkeyPatch, name: str, compression: float
) -> None:
    narrowed(monkeypatch, gsm_cifar, name)
    run("gsm_cifar", tmp_path, "--data", ".", "--network", name, "--ticket")
    check_sparse(fits, 64, compression, momentum=0.98, weight_decay=1e-4, nesterov=False)
    assert fits[0].rates == warmed(0.1, 100, 100, 100, 100, 100)
    assert fits[1].rates == warmed(5e-3, 400, 100, 100)


@pytest.mark.parametrize(("name", "compression"), [("lenet_300_100", 60), ("lenet_5", 125)])
def test_settings_of_gsm_mnist(tmp_path: Path, fits: list[Fit], name: str, compression: float) -> None:
    (line,) = run("gsm_mnist", tmp_path, "--data", ".", "--network", name, "--ticket")
    check_sparse(fits, 256, compression, momentum=0.99, weight_decay=5e-4, nesterov=True)
    assert fits[0].rates == warmed(0.03, 40, 40, 40, 40, 40)
    assert fits[1].rates == warmed(1e-2, 160, 40, 40, 40)
    assert line["weights_kept"] == {"lenet_300_100": 4436, "lenet_5": 3444}[name]


def test_gsm_with_a_set_that_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(GSM, "freeze", lambda optimizer: calls.append(optimizer.defaults["momentum"]))
    (line,) = run("gsm_mnist", tmp_path, "--smoke", "--freeze", "0.35")
    assert line["freeze"] == 0.35
    assert calls == [0.99], "in the sparse training alone"


def test_later_passes_go_on_from_the_weights_that_are_there(
    tmp_path: Path, fits: list[Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrowed(monkeypatch, slimming_cifar, "vgg19_bn")
    run("slimming_cifar", tmp_path, "--data", ".", "--passes", "2", "--no-baseline")
    assert [fit.method for fit in fits] == ["slimming", "common"] * 2
    assert [fit.gammas == {0.5} for fit in fits] == [True, False, False, False]
    assert all(fit.rates == steps(0.1, 80, 40, 40) for fit in fits)


@pytest.mark.parametrize(
    ("name", "ratio", "strength", "limit", "lengths"),
    [
        ("resnet_20", None, 2e-4, 0.02, (50, 50)),
        ("resnet_56", None, 3e-4, 0.01, (20, 30, 50)),
        ("resnet_56", "0.38", 3e-4, 0.02, (25, 25, 50)),
        ("resnet_110", None, 1e-4, 0.02, (50, 50)),
        ("resnet_164", None, 1e-4, 0.02, (50, 50)),
    ],
)
def test_settings_of_dhp_cifar(
    tmp_path: Path, fits: list[Fit], monkeypatch: pytest.MonkeyPatch, name: str, ratio: str | None, strength: float,
    limit: float, lengths: tuple[int, ...],
) -> None:  # fmt: skip
    narrowed(monkeypatch, dhp_cifar, name)
    (line,) = run(
        "dhp_cifar", tmp_path, "--data", ".", "--network", name, "--no-baseline", *(["--ratio", ratio] if ratio else [])
    )
    search, converging = fits
    assert (search.method, converging.method) == ("dhp", "common")
    options = search.training.hooks._options  # type: ignore[attr-defined]
    assert (options.strength, options.threshold, options.limit) == (strength, 5e-3, limit)
    assert (options.minimum, options.every, options.embedding) == (4, 100, 8)
    assert search.rates == steps(0.1, *lengths)
    assert converging.rates == steps(0.1, 150, 75, 75)
    for fit in fits:
        assert (fit.data.batch_size, len(fit.data.dataset)) == (64, 5100)
        assert fit.has(momentum=0.9, weight_decay=1e-4, nesterov=False)
    assert line["pruned"]["macs"] <= float(ratio or 0.5) * line["dense"]["macs"]


@pytest.mark.parametrize(
    ("name", "batch", "side", "batches", "search_drops", "lengths"),
    [
        ("dncnn", 64, 64, 10_000, (10,) * 6, (40, 20)),
        ("unet", 16, 128, 10_000, (10,) * 6, (40, 20)),
        ("srresnet", 16, 96, 2013, (40, 20), (200, 100)),
        ("edsr", 16, 192, 2013, (40, 20), (200, 100)),
    ],
)
def test_settings_of_dhp_restoration(
    tmp_path: Path, fits: list[Fit], monkeypatch: pytest.MonkeyPatch, name: str, batch: int, side: int, batches: int,
    search_drops: tuple[int, ...], lengths: tuple[int, ...],
) -> None:  # fmt: skip
    for part, (height, width) in (("train", (200, 220)), ("test", (45, 50))):
        (tmp_path / part).mkdir()
        to_pil_image(torch.rand(3, height, width)).save(tmp_path / part / "one.png")
    narrowed(monkeypatch, dhp_restoration, name)
    (line,) = run("dhp_restoration", tmp_path / "out", "--data", str(tmp_path), "--network", name, "--no-baseline")
    search, converging = fits
    options = search.training.hooks._options  # type: ignore[attr-defined]
    assert (options.strength, options.threshold, options.limit) == (0.1, 5e-3, 0.02)
    assert search.rates == steps(1e-4, *search_drops)
    assert converging.rates == steps(1e-4, *lengths)
    network = dhp_restoration.NETWORKS[name]
    for fit in fits:
        assert isinstance(fit.optimizer, torch.optim.Adam)
        assert fit.has(weight_decay=0, betas=(0.9, 0.999))
        assert (fit.data.batch_size, len(fit.data)) == (batch, batches)
        spoiled, clean = fit.data.dataset[1]
        assert clean.shape == (network.channels, side, side)
        assert spoiled.shape == (clean.shape if network.channels == 1 else (3, side // 4, side // 4))
    assert (line["ratio"], line["network"]) == (0.6, name)


def test_what_restoration_is_given() -> None:
    clean = torch.full((1, 64, 64), 0.5)
    noise = dhp_restoration.noisy(clean, None) - clean
    assert float(noise.std()) == pytest.approx(70 / 255, rel=0.05)
    whole = dhp_restoration.Whole([torch.rand(1, 45, 50)], dhp_restoration.noisy)
    assert [t.shape for t in whole[0]] == [(1, 32, 48)] * 2
    assert torch.equal(whole[0][0], whole[0][0]), "the same noise every time"
    crops = dhp_restoration.Crops([torch.rand(1, 45, 50)], dhp_restoration.noisy, 32, 8)
    assert not torch.equal(crops[0][1], crops[0][1])
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    torch.testing.assert_close(dhp_restoration.small(ramp, None)[..., 2:-2], ramp.unfold(2, 4, 4).mean(3)[:, ::4, 2:-2])


def test_restoration_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "pass --data DIR, with images in DIR/train and DIR/test, or --smoke for a run of seconds without"),
        (["--data", str(tmp_path)], f"there is no PNG or JPEG file in {str(tmp_path / 'train')!r}"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run("dhp_restoration", tmp_path / "out", *arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- what goes wrong, and what is interrupted --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass --data DIR, where cifar10 is, or --smoke for a run of seconds without it"),
        (["--data", "nowhere"], "cifar10 is not complete: there is no cifar-10-batches-py/"),
        (["--smoke", "--ratio", "1.5"], "argument --ratio: 1.5 is not between 0 and 1"),
        (["--smoke", "--network", "lenet"], "argument --network: invalid choice: 'lenet'"),
        (["--smoke", "--device", "nowhere"], "argument --device: nowhere cannot be used here: Expected one of cpu, "),
        (["--smoke", "--device", "cuda:99"], "argument --device: cuda:99 cannot be used here: "),
        (["--smoke", "--seed", "-1"], "argument --seed: -1 is not at least 0"),
        (["--smoke", "--workers", "-1"], "argument --workers: -1 is not at least 0"),
    ],
)
def test_what_cannot_be_run_says_why(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("scratch_cifar", tmp_path / "out", *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compression", ["0", "0.5", "nan", "inf"])
def test_a_compression_that_is_none_is_told_before_the_base_is_trained(
    compression: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("gsm_mnist", tmp_path / "out", "--smoke", "--compression", compression)
    assert stopped.value.code == 2
    assert f"argument --compression: {compression} is not at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("gsm_mnist", ["--compression", "1e9"], r"^compression=1000000000\.0 leaves none of"),
        ("dhp_cifar", ["--ratio", "0.001"], r"^flops=0\.001 cannot be reached"),
        ("slimming_mnist", ["--percent", "0.999"], r"^channels=0\.00\d+ cannot be reached"),
    ],
)
def test_what_cannot_be_met_is_told_before_the_first_epoch(
    recipe: str, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = count_epochs(monkeypatch)
    with pytest.raises(fxprune.FxpruneError, match=message):
        run(recipe, tmp_path / "out", "--smoke", *arguments)
    assert not epochs


def test_where_nothing_can_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit) as stopped:
        run("gsm_mnist", tmp_path / "out", "--smoke")
    assert stopped.value.code == 2
    assert f"nothing can be written to --out {tmp_path / 'out'}: " in capsys.readouterr().err


def test_a_file_for_weights_that_cannot_be_written_is_told_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("vit_cifar", tmp_path / "out", "--smoke", "--save", str(tmp_path / "none" / "vit.pt"))
    assert stopped.value.code == 2
    assert f"argument --save: cannot write '{tmp_path / 'none' / 'vit.pt'}': " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_images_to_hold_out_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "test"):
        for label in range(10):
            (folder_of := tmp_path / part / str(label)).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder_of / "0.png")
    with pytest.raises(SystemExit) as stopped:
        run("scratch_cifar", tmp_path / "out", "--data", str(tmp_path))
    assert stopped.value.code == 2
    assert "has 10 training images, of which 5000 are to be held out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("recipe", "stage"), [("scratch_cifar", "train"), ("slimming_cifar", "pass1-tuned")])
def test_a_run_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, stage: str
) -> None:
    whole, name = tmp_path / "whole", "pruned" if recipe == "scratch_cifar" else "pass1"
    run(recipe, whole, "--smoke", "--no-baseline")
    train = Run.train

    def interrupted(self: Run, running: str, *others: Any) -> Any:
        if running == stage:
            raise KeyboardInterrupt
        return train(self, running, *others)

    halves = tmp_path / "halves"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, halves, "--smoke", "--no-baseline")
    with monkeypatch.context() as patch:
        epochs = count_epochs(patch)
        run(recipe, halves, "--smoke", "--no-baseline", "--resume")
    assert epochs == [stage], "the stage before was read back"
    one, other = weights(whole, name), weights(halves, name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_an_interrupted_run_had_found_is_not_told_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--smoke", "--no-baseline", "--passes", "2")
    train = Run.train

    def interrupted(self: Run, running: str, *others: Any) -> Any:
        if running == "pass2-tuned":
            raise KeyboardInterrupt
        return train(self, running, *others)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("slimming_cifar", tmp_path, *arguments)
    for _ in range(2):
        found = run("slimming_cifar", tmp_path, *arguments, "--resume")
        assert [line["pass"] for line in found] == [1, 2]
    assert [line["pass"] for line in run("slimming_cifar", tmp_path, *arguments)] == [1, 2, 1, 2]


def count_epochs(patch: pytest.MonkeyPatch) -> list[str]:
    """The stage of every epoch that is trained from now on."""
    trained: list[str] = []
    run_epoch = loop_module._Run._train_epoch

    def counted(self: Any, bar: Any) -> Any:
        trained.append(self._loop.checkpoint.name.removesuffix(".checkpoint.pt"))
        return run_epoch(self, bar)

    patch.setattr(loop_module._Run, "_train_epoch", counted)
    return trained


# -- images ------------------------------------------------------------------------------------------------------------


class Coloured(TensorDataset):
    """Images with a transform, like torchvision's."""

    def __init__(self, count: int, transform: Callable[[Tensor], Tensor]):
        super().__init__(torch.arange(float(count)))
        self.transform = transform

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(super().__getitem__(index)[0])


def test_what_is_held_out_is_given_as_in_the_test() -> None:
    train, test = Coloured(6, lambda x: -x), Coloured(2, lambda x: 10 * x)
    rest, held = split(train, [1, 4], test)
    assert [float(x) for x in rest] == [0, -2, -3, -5]
    assert [float(x) for x in held] == [10, 40]
    assert float(train[1]) == -1


def test_last_of_every_class() -> None:
    images = TensorDataset(torch.zeros(7), torch.tensor([0, 1, 0, 1, 1, 0, 0]))
    assert sorted(scratch_imagenet.last_of_every_class(images, 2)) == [3, 4, 5, 6]


def test_images_of_scratch_imagenet(tmp_path: Path) -> None:
    for label in ("n01440764", "n01443537"):
        (tmp_path / "train" / label).mkdir(parents=True)
        to_pil_image(torch.full((3, 240, 240), 0.5)).save(tmp_path / "train" / label / "one.JPEG")
    images = ImageFolder(tmp_path / "train")
    plain = transformed(images, scratch_imagenet.cropped(0.25, coloured=False))
    coloured = transformed(images, scratch_imagenet.cropped(0.25, coloured=True))
    mean, deviation = (torch.tensor(s)[:, None, None] for s in data.IMAGENET_STATISTICS)
    gray = (0.5 - mean) / deviation
    torch.testing.assert_close(plain[0][0], gray.expand(3, 224, 224), atol=0.02, rtol=0)
    changed = [(coloured[0][0] - gray) * deviation for _ in range(16)]
    assert all(float(image.flatten(1).std(1).max()) < 0.01 for image in changed), "not one colour"
    brightness = torch.stack([image.mean() for image in changed])
    assert 0.05 < float(brightness.abs().max()) < 0.3
    tint = torch.stack([image.mean((1, 2)) - image.mean() for image in changed])
    assert 1e-4 < float(tint.abs().max()) < 0.05
    assert images.transform is None
