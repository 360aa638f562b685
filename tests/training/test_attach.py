"""Learners in a loop of one's own, on models of every kind; the caller's model stays as it is whatever happens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import Unchanged, image, make
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fxprune
from fxprune import Loop
from fxprune.errors import InputError, ModelError
from fxprune.methods import GSM, Hooks, Outcome, Scratch, Site, Slimming
from fxprune.training import Training
from model_zoo import papers

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 2
BATCHES = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 10) for i in (1, 2)]
METHODS: dict[str, Any] = {"scratch": Scratch(sparsity=1.0), "slimming": Slimming(strength=1e-2, gamma=0.5)}
QUIET: Any = {"flops": 0.5, "progress": False}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def own_loop(learner: Training, data: Any, criterion: Any, epochs: int = EPOCHS, told: bool = False) -> None:
    """The loop of the documentation; ``told``: with the accuracy of every epoch."""
    model, optimizer = learner.model, sgd(p for p in learner.model.parameters() if p.requires_grad)
    for _ in range(epochs):
        right = []
        for x, y in data:
            output = model(x)
            loss = learner.loss(criterion(output, y))
            optimizer.zero_grad()
            loss.backward()
            learner.after_backward()
            optimizer.step()
            learner.after_step()
            right.append((output.argmax(1) == y).float())
        if told:
            learner.after_epoch(float(torch.cat(right).mean()))


@pytest.mark.parametrize(
    ("method", "told"),
    [("slimming", False), ("scratch", False), (Slimming(1e-2, gamma=0.5), False), (Scratch(sparsity=1.0), True)],
    ids=["slimming", "scratch", "slimming with options", "scratch with the best epoch"],
)
def test_a_loop_of_ones_own_gives_what_prune_gives(method: Any, told: bool) -> None:
    model, options = make(), {**QUIET, "method": method}
    with Unchanged(model):
        loop = fxprune.Options(loop=Loop(optimizer=sgd))
        expected = fxprune.prune(model, image(), data=BATCHES, epochs=EPOCHS, options=loop, **options)
        learner = fxprune.attach(model, image(), **options)
        torch.manual_seed(0)  # prune's seed: the network has a dropout
        own_loop(learner, BATCHES, F.cross_entropy, told=told)
        own = learner.finish()
    ours, theirs = own.meta["fxprune"], expected.meta["fxprune"]
    assert ours.plan == theirs.plan
    assert ours.notes == theirs.notes
    assert any("best epoch" in note for note in ours.notes) == told
    assert ours.oracle_error < 1e-5
    assert all(torch.equal(v, expected.state_dict()[n]) for n, v in own.state_dict().items())


# -- models of every kind


class Named(nn.Module):
    """Keyword inputs, a dict as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 12), nn.LayerNorm(12)
        self.one, self.two = nn.Linear(12, 20), nn.Linear(20, 4)

    def forward(self, tokens: Tensor, *, weight: Tensor | None = None) -> dict[str, Tensor]:
        x = self.norm(self.table(tokens))
        if weight is not None:
            x = x * weight[..., None]
        return {"scores": self.two(self.one(x).relu().mean(1))}


class OneDict(nn.Module):
    """Takes one dict, as networks of tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.one, self.two = nn.Embedding(11, 8), nn.Linear(4, 16), nn.Linear(24, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.two(torch.cat([self.one(batch["numbers"]).relu(), self.table(batch["kinds"])], -1))


def test_a_dict_that_forward_takes_itself_is_no_keyword_inputs() -> None:
    def batch(seed: int) -> tuple[dict[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        kinds = torch.randint(0, 11, (6,), generator=generator)
        return {"numbers": torch.randn(6, 4, generator=generator), "kinds": kinds}, torch.arange(6) % 4

    model, example, data = randomise(OneDict()).eval(), (batch(0)[0],), [batch(seed) for seed in range(1, 6)]
    for method in ("taylor", "obs", "gsm"):
        trained: Any = {"epochs": 1} if method == "gsm" else {}
        small = fxprune.prune(model, example, params=0.8, method=method, data=data, progress=False, **trained)
        assert small(batch(6)[0]).shape == (6, 4)
    assert fxprune.reconstruct(small, model, data)(batch(6)[0]).shape == (6, 4)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_by_keyword_and_a_loss_of_ones_own(method: str) -> None:
    def batch(seed: int) -> tuple[dict[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 11, (6, 5), generator=generator)
        return {"tokens": tokens, "weight": torch.rand(6, 5, generator=generator)}, torch.arange(6) % 4

    def loss_fn(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output["scores"], target)

    model, example = randomise(Named()).eval(), batch(0)[0]
    options: Any = {"example_kwargs": example, "method": METHODS[method], **QUIET}
    with Unchanged(model):
        small = fxprune.prune(model, (), data=[batch(1), batch(2)], loss_fn=loss_fn, epochs=2, **options)
        learner = fxprune.attach(model, (), **options)
        for x, y in (batch(1), batch(2)):
            learner.loss(loss_fn(learner.model(**x), y)).backward()
            learner.after_backward()
            learner.after_step()
        own = learner.finish()
    for result in (small, own):
        assert result.meta["fxprune"].oracle_error < 1e-5
        assert result(**example)["scores"].shape == (6, 4)
    for criterion in ("taylor", "wanda"):
        pruned = fxprune.prune(
            model, (), example_kwargs=example, method=criterion, data=[batch(1)], loss_fn=loss_fn, **QUIET
        )
        assert pruned.meta["fxprune"].oracle_error < 1e-5


def vit() -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=16, patch_size=2, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4, num_classes=5
    )


def resnet() -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 12, 16, 24), stem_width=8)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "swin": swin,
    "resnet": resnet,
    "densenet": lambda: papers.densenet_40_12(num_classes=5, depth=10, width=0.5),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_learners_on_every_kind_of_network(name: str, method: str) -> None:
    """After the training the cut network is what the trained one computes with the same channels masked."""
    model = randomise(NETWORKS[name]()).eval()
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    learner = fxprune.attach(model, x, method=METHODS[method], **QUIET)
    own_loop(learner, [(x, y)], F.cross_entropy)
    small = learner.finish()
    report = small.meta["fxprune"]
    assert report.oracle_error < 1e-5 or (report.oracle_error_in_double or 1) < 1e-9
    assert 0.4 < report.macs_after / report.macs_before <= 0.5
    cut = {n for n, dims in report.plan.kept.items() if 0 in dims}
    assert len(cut) > 4  # not one layer alone
    small.train()(x).sum().backward()
    trained = learner.model.state_dict()
    if method == "slimming":  # slices of the trained weights
        for key in cut & {n for n, _ in small.named_parameters()}:
            dims = report.plan.kept[key]
            expected = trained[key]
            if isinstance(dims.get(1, [0])[0], int):
                for dim, indices in dims.items():
                    expected = expected.index_select(dim, torch.tensor(indices))
                assert torch.equal(small.get_parameter(key), expected)


# -- whatever happens, the caller's model stays


class Broken(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(method: str) -> None:
    model = make()

    def fails(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise Broken
        return F.cross_entropy(output, target)

    options: Any = {"method": METHODS[method], **QUIET}
    with Unchanged(model):
        calls: list[int] = []
        with pytest.raises(Broken):
            fxprune.prune(model, image(), data=BATCHES, epochs=2, loss_fn=fails, **options)
        calls = []
        learner = fxprune.attach(model, image(), **options)
        with pytest.raises(Broken):
            own_loop(learner, BATCHES, fails)
        # The learner itself is where the exception left it, and can be finished.
        assert learner.finish().meta["fxprune"].oracle_error < 1e-5


def test_a_learner_is_finished_once() -> None:
    learner = fxprune.attach(make(), image(), method="slimming", **QUIET)
    own_loop(learner, BATCHES[:1], F.cross_entropy, epochs=1)
    learner.finish()
    with pytest.raises(InputError) as caught:
        learner.finish()
    assert str(caught.value) == "finish() was called before. Attach again to train once more."


def test_a_learner_whose_end_failed_can_be_finished_again() -> None:
    """A weight or a gate that is not finite is no part of what comes out, nor is it ranked."""
    diverged = r"holds NaN or inf\. The training diverged: lower the learning rate, or clip the gradients\.$"
    for method, name in ((Slimming(), "head.weight"), (Scratch(), "_fxprune_gates.values")):
        learner = fxprune.attach(make(), image(), method=method, channels=0.5, progress=False)
        weight = learner.model.get_parameter(name)
        before = weight.detach().clone()
        weight.detach()[0] = float("nan")
        with pytest.raises(ModelError, match=f"^{name} {diverged}"):
            learner.finish()
        weight.detach().copy_(before)
        assert learner.finish().meta["fxprune"].oracle_error < 1e-5


class Saying:
    """A learner of one's own, which says at its end what it is told to."""

    def __init__(self, says: Callable[[Site], Any]):
        self._says = says

    def attach(self, site: Site) -> Hooks:
        hooks = Hooks()
        hooks.outcome = lambda: self._says(site)  # type: ignore[method-assign]
        return hooks


def ones(site: Site) -> list[Any]:
    return [None if group.locked else np.ones(group.channels.shape) for group in site.graph.groups]


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (ones, r"^outcome\(\) of Saying gave a list; it gives a fxprune\.methods\.Outcome\.$"),
        (
            lambda site: Outcome(ones(site)[1:]),
            r"^Saying scores \d groups, and there are \d: ",
        ),
        (
            lambda site: Outcome([None if s is None else s[:, 1:] for s in ones(site)]),
            r"^Saying scores \S+ with float64 \[1, \d+\]; a method gives one number per channel",
        ),
        (
            lambda site: Outcome(ones(site), threshold=0.5),
            r"gives a threshold, which takes the place of the budget that was asked for: .* decides = True\.$",
        ),
    ],
    ids=["no outcome", "a group too few", "a channel too few", "a threshold beside a budget"],
)
def test_what_a_learner_cannot_say(says: Any, told: str) -> None:
    learner = fxprune.attach(make(), image(), method=Saying(says), **QUIET)
    with pytest.raises(InputError, match=told):
        learner.finish()


def test_a_learner_that_decides_may_give_a_threshold() -> None:
    method = Saying(lambda site: Outcome([None if s is None else s.cumsum(1) for s in ones(site)], threshold=2.0))
    method.decides = True  # type: ignore[attr-defined]
    small = fxprune.attach(make(), image(), method=method, progress=False).finish()
    assert small.get_parameter("up.0.weight").shape[0] == 22


@pytest.mark.parametrize("method", [*METHODS.values(), GSM(compression=4)], ids=[*METHODS, "gsm"])
def test_a_copy_of_a_learner_is_one_of_its_own(method: Any) -> None:
    """The best of several epochs can be kept so: the copy ends with its weights, whatever becomes of the original."""
    budget = {} if isinstance(method, GSM) else {"flops": 0.5}

    def trained(learner: Training) -> Training:
        torch.manual_seed(0)
        own_loop(learner, BATCHES, F.cross_entropy)
        return learner

    learner, same = (fxprune.attach(make(), image(), method=method, progress=False, **budget) for _ in range(2))
    kept = copy.deepcopy(trained(learner))
    trained(learner)
    ours, theirs = kept.finish(), trained(same).finish()
    assert ours.meta["fxprune"].plan == theirs.meta["fxprune"].plan
    assert all(torch.equal(v, theirs.state_dict()[n]) for n, v in ours.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_the_method_does_not_watch_are_refused(method: str) -> None:
    learner = fxprune.attach(make(), image(), method=METHODS[method], **QUIET)
    learner.model.load_state_dict({n: v.clone() for n, v in learner.model.state_dict().items()}, assign=True)
    refused = r"^The parameters of learner\.model are no longer those that attach\(\) made, .* train with Distri"
    with pytest.raises(InputError, match=refused):
        own_loop(learner, BATCHES, F.cross_entropy)
    with pytest.raises(InputError, match=refused):
        learner.finish()


@pytest.mark.parametrize("method", ["slimming", "taylor"])
def test_where_no_gradients_are_kept_they_are_all_the_same(method: str) -> None:
    x, y = image(), torch.tensor([0, 1])
    asked: dict[str, Any] = {"method": method, "flops": 0.5, "data": [(x, y)], "progress": False}
    asked |= {"epochs": 1} if method == "slimming" else {}
    expected = fxprune.prune(make(), x, **asked).meta["fxprune"].plan
    for context in (torch.no_grad(), torch.inference_mode()):
        model = make()
        with context:
            assert fxprune.prune(model, x, **asked).meta["fxprune"].plan == expected


def test_weights_on_the_meta_device_cannot_be_trained() -> None:
    with torch.device("meta"):
        model, x = make(), torch.empty(2, 3, 8, 8)
    for call in (
        lambda: fxprune.attach(model, x, method="slimming", **QUIET),
        lambda: fxprune.prune(model, x, method="scratch", **QUIET),
    ):
        with pytest.raises(ModelError) as caught:
            call()
        assert str(caught.value) == (
            "The weights are on the meta device, where nothing can be trained. Load them first."
        )


def test_only_learners_attach() -> None:
    with pytest.raises(InputError) as caught:
        fxprune.attach(make(), image(), method="l2", **QUIET)
    assert str(caught.value) == "l2 does not train: call fxprune.prune(..., method='l2')."
