"""DHP, by the letter of the paper and its code: hypernetworks, soft threshold, masks, the stop rule, conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import Attentive, Shuffled, Small, Unchanged, chain, image, make, outputs, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import Loop, Options
from fxprune.errors import BudgetError, InputError, ModelError
from fxprune.methods import DHP
from fxprune.methods.dhp import counted, soft_threshold
from fxprune.rewriting.hypernetworks import Hypernetwork, Hypernetworks, generate
from fxprune.training import Training
from model_zoo import papers

pytestmark = pytest.mark.usefixtures("one_thread")

BANK = "_fxprune_hypernetworks"


def begun(model: nn.Module | None = None, x: Tensor | None = None, flops: float = 0.5, **options: Any) -> Training:
    """With a classifier whose weight is generated like all others, unless another is asked for."""
    method = DHP(**{"classifier": "generated"} | options)
    return fxprune.attach(
        make() if model is None else model, image() if x is None else x, method=method, flops=flops, progress=False
    )


def bank_of(training: Training) -> Hypernetworks:
    found = training.model.get_submodule(BANK)
    assert isinstance(found, Hypernetworks)
    return found


def part_of(training: Training, name: str) -> Hypernetwork:
    (part,) = (p for p in bank_of(training).children() if isinstance(p, Hypernetwork) and name in p.names)
    return part


def latents_of(training: Training, name: str, dim: int) -> list[int]:
    """Places in the latents of every position of a parameter's dim."""
    (factor,) = (f for f in training.graph.by_name[name].labels if f.dim == dim)
    return [int(i) for i in factor.ids.reshape(-1)]


def shuffle_biases(training: Training) -> None:
    """The hypernetworks' biases, which start at zero, as after a training."""
    with torch.no_grad():
        for name, parameter in bank_of(training).named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.1)


def step(training: Training, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    loss = training.loss(training.model(x).square().mean())
    optimizer.zero_grad()
    loss.backward()
    training.after_backward()
    optimizer.step()
    training.after_step(optimizer)


def labelled(count: int = 32, batch: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 10, (count,), generator=generator)), batch)


# -- soft threshold and masks ------------------------------------------------------------------------------------------


def test_the_soft_threshold() -> None:
    z, other = torch.randn(200), torch.randn(200)
    for amount in (0.0, 0.3, 1.0):
        shrunk = soft_threshold(z, amount)
        expected = torch.where(z > amount, z - amount, torch.where(z < -amount, z + amount, torch.zeros(())))
        torch.testing.assert_close(shrunk, expected, rtol=0, atol=0)
        assert bool((shrunk[z.abs() <= amount] == 0).all())
        assert bool(((shrunk - soft_threshold(other, amount)).abs() <= (z - other).abs() + 1e-6).all())
    assert torch.equal(soft_threshold(z, 0.0), z)


def test_masks_keep_what_is_large_and_the_minimum() -> None:
    z = np.array([[0.5, -0.001, 0.2, 0.003, -0.3, 0.002]])
    assert counted(z, 0.1, 1).tolist() == [[True, False, True, False, True, False]]
    assert counted(z, 0.1, 4).tolist() == [[True, False, True, True, True, False]]
    assert counted(z * 1e-3, 0.1, 4).sum() == 4, "all below the threshold: the minimum"
    assert counted(z, 0.1, 8).all(), "no more than the minimum in the vector"
    assert counted(np.zeros((1, 6)), 0.1, 4).tolist() == [[True] * 4 + [False] * 2], "of equal ones the first"


def test_masks_of_blocks_keep_equal_counts() -> None:
    z = np.array([[0.9, 0.01, -0.5, 0.02], [0.01, -0.7, 0.02, 0.3]])
    mask = counted(z, 0.1, 1)
    assert mask.tolist() == [[True, False, True, False], [False, True, False, True]]
    uneven = np.array([[0.9, 0.8, 0.01, 0.01], [0.5, 0.01, 0.01, 0.01]])
    assert counted(uneven, 0.1, 1).sum(1).tolist() == [2, 2], "the mean of the second of each, 0.405, is large"


# -- generated weights -------------------------------------------------------------------------------------------------


def parts(n: int, c: int, k: int, m: int = 8) -> tuple[Tensor, Tensor, list[Tensor]]:
    weights = torch.randn(n, c, m), torch.randn(n, c, k, m)
    return *weights, [torch.randn(n, c), torch.randn(n, c, m), torch.randn(n, c, k)]


def test_the_formula_pair_by_pair() -> None:
    z_out, z_in = torch.randn(5), torch.randn(3)
    w1, w2, (b0, b1, b2) = parts(5, 3, 9)
    made = generate([z_out[:, None], z_in[None]], w1, w2, b0, b1, b2)
    for j in range(5):
        for i in range(3):
            alone = w2[j, i] @ ((z_in[i] * z_out[j] + b0[j, i]) * w1[j, i] + b1[j, i]) + b2[j, i]
            torch.testing.assert_close(made[j, i], alone)


def test_without_biases_a_masked_latent_masks_the_weight() -> None:
    z_out, z_in = torch.randn(5), torch.randn(3)
    out, into = torch.tensor([1.0, 0, 1, 1, 0]), torch.tensor([0.0, 1, 1])
    w1, w2, biases = parts(5, 3, 4)
    zeros = [torch.zeros_like(b) for b in biases]

    def agree(biases: list[Tensor]) -> bool:
        masked = generate([(out * z_out)[:, None], (into * z_in)[None]], w1, w2, *biases)
        whole = generate([z_out[:, None], z_in[None]], w1, w2, *biases)
        return torch.allclose(masked, out[:, None, None] * into[None, :, None] * whole)

    assert agree(zeros)
    assert not agree(biases), "with biases only slicing prunes"


def test_slicing_before_and_after_are_one() -> None:
    z_out, z_in = torch.randn(6), torch.randn(5)
    out, into = torch.tensor([0, 2, 5]), torch.tensor([1, 3])
    w1, w2, (b0, b1, b2) = parts(6, 5, 9)
    small = generate(
        [z_out[out][:, None], z_in[into][None]], *(t[out][:, into] for t in (w1, w2, b0, b1, b2))
    )  # fmt: skip
    whole = generate([z_out[:, None], z_in[None]], w1, w2, b0, b1, b2)
    torch.testing.assert_close(small, whole[out][:, into])


@pytest.mark.parametrize("kind", [Shuffled, Attentive])
def test_every_position_has_the_latents_of_its_channels(kind: type[nn.Module]) -> None:
    training = begun(make(kind))
    shuffle_biases(training)
    bank = bank_of(training)
    z = bank.latents.detach()
    for name, weight in bank.weights().items():
        part = part_of(training, name)
        labels = {
            f.dim: f.tensor().expand(*weight.shape[:2], *[1] * (weight.ndim - 2))
            for f in training.graph.by_name[name].labels
        }
        for j in range(weight.shape[0]):
            for i in range(0, weight.shape[1], 3):
                product = z[labels[0][j, i].item()] * z[labels[1][j, i].item()]
                inner = (product + part.bias0[j, i]) * part.weight1[j, i] + part.bias1[j, i]
                expected = part.weight2[j, i] @ inner + part.bias2[j, i]
                torch.testing.assert_close(weight[j, i].flatten(), expected.detach())


def test_a_latent_changes_its_own_filter_only() -> None:
    training = begun()
    before = bank_of(training).weights()
    places = latents_of(training, "up.0.weight", 0)
    with torch.no_grad():
        bank_of(training).latents[places[5]] += 1
    after = bank_of(training).weights()
    changed = (after["up.0.weight"] != before["up.0.weight"]).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [5]
    changed = (after["down.0.weight"] != before["down.0.weight"]).flatten(2).any(2).any(0)
    assert changed.nonzero().flatten().tolist() == [5], "and what reads that filter"
    assert torch.equal(after["stem.0.weight"], before["stem.0.weight"])


@pytest.mark.parametrize(
    ("layer", "shape", "fan_in"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), (2, 64, 8, 8), 576),
        (nn.Conv2d(64, 64, 3, padding=1, groups=4), (2, 64, 8, 8), 144),
        (nn.Conv2d(64, 64, 5, padding=2, groups=64), (2, 64, 8, 8), 25),
        (nn.Conv1d(64, 64, 3, padding=1), (2, 64, 8), 192),
        (nn.Conv3d(32, 64, 3, padding=1), (2, 32, 4, 4, 4), 864),
        (nn.ConvTranspose2d(64, 64, 2, stride=2), (2, 64, 4, 4), 64),  # of 2x2 products one reaches an output
        (nn.Linear(200, 100), (2, 200), 200),
    ],
    ids=["conv2d", "grouped", "depthwise", "conv1d", "conv3d", "transposed", "linear"],
)
def test_the_first_weights_have_variance_one_over_fan_in(layer: nn.Module, shape: tuple[int, ...], fan_in: int) -> None:
    around: Callable[[int, int], nn.Module] = nn.Linear
    if len(shape) > 2:
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
        around = lambda a, b: convolution(a, b, 1)  # noqa: E731
    net = nn.Sequential(around(4, shape[1]), layer, around(100 if len(shape) == 2 else 64, 8))
    training = begun(net, torch.randn(2, 4, *shape[2:]))
    # over many draws of the latents, since few latents are no sample of their distribution
    second, draws = 0.0, 200
    for _ in range(draws):
        with torch.no_grad():
            bank_of(training).latents.normal_()
            second += float(part_of(training, "1.weight")(bank_of(training).latents).square().mean()) / draws
    assert second * fan_in == pytest.approx(1, rel=0.1)
    assert all(not bool(p.any()) for n, p in bank_of(training).named_parameters() if "bias" in n)


def test_the_first_complex_weights_have_both_parts() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.back = nn.Linear(4, 80), nn.Linear(60, 4)
            self.weight = nn.Parameter(torch.randn(80, 60, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return self.back(torch.einsum("bi,io->bo", self.front(x).to(torch.complex64), self.weight).abs())

    training = begun(Product(), torch.randn(2, 4))
    parts = torch.zeros(2)
    for _ in range(100):
        with torch.no_grad():
            bank_of(training).latents.normal_()
            made = part_of(training, "weight")(bank_of(training).latents)
            parts += torch.view_as_real(made).square().mean((0, 1)) / 100
    assert parts.tolist() == pytest.approx([1 / 160, 1 / 160], rel=0.15)


def test_hypernetworks_take_the_place_of_weights() -> None:
    model = make()
    with Unchanged(model):
        training = begun(model)
        names = dict(training.model.named_parameters())
        trained = {id(p) for p in training.hooks.trained()}
        assert {n for n in names if not n.startswith(BANK)} == {
            n for n, p in model.named_parameters() if p.ndim == 1
        }, "biases and norms stay"
        assert trained == {id(p) for p in names.values()}
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                assert torch.equal(names[name], parameter)
        conv = part_of(training, "up.0.weight")
        assert sum(p.numel() for p in conv.parameters()) == 24 * 16 * (1 + 2 * 8 + 9 * 9)  # 10.9 times 3x3


def test_a_weight_is_generated_once_however_often_it_is_used() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.tied = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied.weight = self.again.weight
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.again(self.again(self.first(x)).relu())
            return self.last(F.linear(self.tied(x).relu(), self.again.weight))

    x = torch.randn(4, 6)
    training = begun(randomise(Twice()).eval(), x, flops=0.6, minimum=1)
    calls: list[str] = []
    for part in bank_of(training).children():
        if isinstance(part, Hypernetwork):
            part.register_forward_hook(lambda part, *_: calls.append(part.names[0]))
    training.model(x).sum().backward()
    assert sorted(calls) == ["again.weight", "first.weight", "last.weight"]
    clone = copy.deepcopy(training.model)
    with torch.no_grad():
        bank_of(training).latents.mul_(2)
    assert not same(outputs(clone, x), outputs(training.model, x)), "a copy has latents of its own"
    small = training.finish()
    assert small.again.weight is small.tied.weight
    assert small.meta["fxprune"].oracle_error < 1e-5


def test_weights_that_pass_through_other_ops() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.randn(12, 3, 3, 3))
            self.gain = nn.Parameter(torch.ones(12, 1, 1, 1))
            self.two = nn.Parameter(torch.randn(16, 12))
            self.rnn, self.last = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            mean, std = self.one.mean((1, 2, 3), keepdim=True), self.one.std((1, 2, 3), keepdim=True)
            x = F.conv2d(x, (self.one - mean) / std * self.gain).relu().mean((2, 3)) @ self.two.t()
            return self.last(self.rnn(x[:, None])[0][:, 0])

    training = begun(Standardised().eval(), flops=0.9)
    assert set(bank_of(training).weights()) == {"one", "two", "last.weight"}
    assert training.hooks.outcome().notes[-1] == "weights that are not generated: rnn.weight_ih_l0, rnn.weight_hh_l0"
    assert training.finish().meta["fxprune"].oracle_error < 1e-5


def test_recomputing_changes_memory_and_nothing_else() -> None:
    gradients: list[list[Tensor]] = []
    sizes = []
    for recompute in (True, False):
        training = begun()
        torch.manual_seed(5)
        shuffle_biases(training)
        for part in bank_of(training).children():
            if isinstance(part, Hypernetwork):
                part.recompute = recompute
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        training.model.eval()  # no dropout
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = training.model(image()).square().sum()
        loss.backward()
        gradients.append([p.grad for p in bank_of(training).parameters() if p.grad is not None])
        sizes.append(sum(kept.values()))
    assert len(gradients[0]) == len([*bank_of(training).parameters()])
    assert same(*gradients)
    assert sizes[0] < 0.7 * sizes[1]


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_step_shrinks_by_the_live_rate() -> None:
    training = begun(strength=0.5, minimum=1)
    latents = bank_of(training).latents
    optimizer = torch.optim.SGD(
        [{"params": [p for p in training.model.parameters() if p is not latents]}, {"params": [latents], "lr": 0.2}],
        lr=0.1,
    )
    free = training.graph.everything()
    for group in training.graph.groups:
        free[group.channels] = group.locked is None
    shrunk = torch.tensor(free)
    assert 0 < int(shrunk.sum()) < len(latents)
    for rate in (0.2, 0.02):
        optimizer.param_groups[1]["lr"] = rate
        before = latents.detach().clone()
        training.after_step(optimizer)  # no gradients: nothing but the soft threshold
        expected = torch.where(shrunk, soft_threshold(before, 0.5 * rate), before)
        torch.testing.assert_close(latents.detach(), expected, rtol=0, atol=1e-7)
    assert bool((latents[shrunk] == 0).any())


def test_a_vector_with_no_more_than_the_minimum_is_not_shrunk() -> None:
    training = begun(strength=0.1, threshold=0.5, minimum=4)
    latents = bank_of(training).latents
    few, many = latents_of(training, "up.0.weight", 0), latents_of(training, "stem.0.weight", 0)
    with torch.no_grad():
        latents[few] = 0.1
        latents[few[:4]] = 2.0
        latents[many] = 0.1
        latents[many[:5]] = 2.0
    training.after_step(torch.optim.SGD(training.model.parameters(), lr=1.0))
    assert latents[few].tolist() == pytest.approx([2.0] * 4 + [0.1] * 20)
    assert latents[many].tolist() == pytest.approx([1.9] * 5 + [0.0] * 11)


@pytest.mark.parametrize(
    ("excess", "limit", "stops"), [(0.019, 0.02, True), (0.021, 0.02, False), (0.3, None, False), (-0.4, 0.02, True)]
)
def test_the_search_stops_when_little_more_than_the_budget_is_left(
    excess: float, limit: float | None, stops: bool
) -> None:
    training = begun(limit=limit, every=3, strength=0.0, minimum=1)
    latents = bank_of(training).latents
    with torch.no_grad():
        latents.fill_(1.0)
        latents[latents_of(training, "up.0.weight", 0)[8:]] = 0.0
    alive = training.hooks.alive()
    assert alive is not None
    left = training.graph.macs(alive) / training.graph.macs()
    assert left < 0.7
    training = begun(flops=left - excess, limit=limit, every=3, strength=0.0, minimum=1)
    latents = bank_of(training).latents
    with torch.no_grad():
        latents.fill_(1.0)
        latents[latents_of(training, "up.0.weight", 0)[8:]] = 0.0
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    told = []
    for _ in range(3):
        training.after_step(optimizer)
        told.append(training.done)
    assert told == [False, False, stops], "looked at after every third step"


def test_what_may_not_be_cut_is_never_masked_nor_shrunk() -> None:
    training = begun(strength=10.0, minimum=1)
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    latents = bank_of(training).latents
    into, out = latents_of(training, "stem.0.weight", 1), latents_of(training, "head.weight", 0)
    before = latents.detach()[into + out].clone()
    with torch.no_grad():
        latents[into + out] = before * 1e-4
    for _ in range(3):
        training.after_step(optimizer)
    assert torch.equal(latents.detach()[into + out], before * 1e-4)
    alive = training.hooks.alive()
    assert alive is not None
    assert alive[into + out].all()
    assert alive[latents_of(training, "up.0.weight", 0)].sum() == 1


def test_the_loop_stops_early_and_goes_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    method = DHP(strength=2.0, every=3, minimum=2)
    seen: list[int] = []

    def run(resume: Path | None = None) -> Any:
        loop = Loop(checkpoint=path, resume=resume, optimizer=lambda p: torch.optim.SGD(p, lr=0.02))
        return fxprune.prune(
            make(), image(), method=method, flops=0.5, data=Counted(seen), epochs=50, progress=False,
            options=Options(loop=loop),
        )  # fmt: skip

    small = run()
    assert 0 < len(seen) < 200
    assert len(seen) % 3 == 0
    report = small.meta["fxprune"]
    assert any(n.startswith(f"search stopped by its rule after {len(seen)} steps: ") for n in report.notes)
    assert not any("larger latents" in n for n in report.notes)
    assert report.macs_after <= 0.5 * report.macs_before
    steps = len(seen)
    again = run(resume=path)
    assert len(seen) == steps, "a search that has stopped stays so"
    assert again.meta["fxprune"].plan == report.plan


class Counted:
    """Batches, noting each that is read."""

    def __init__(self, seen: list[int]):
        self._seen = seen

    def __iter__(self) -> Any:
        for batch in labelled():
            self._seen.append(1)
            yield batch


def test_resumed_after_an_interruption(tmp_path: Path) -> None:
    class Interrupted:
        """Batches of three epochs, the second of which does not end."""

        def __init__(self) -> None:
            self.epochs = 0

        def __iter__(self) -> Any:
            self.epochs += 1
            for number, batch in enumerate(labelled()):
                if self.epochs == 2 and number == 2:
                    raise KeyboardInterrupt
                yield batch

    def run(data: Any, resume: Path | None = None) -> Any:
        loop = Loop(
            resume=resume,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            schedule=lambda o, _: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
            checkpoint=tmp_path / "run.pt",
        )
        return fxprune.prune(
            make(), image(), method=DHP(strength=0.1, every=5, limit=None), flops=0.5, data=data, epochs=3,
            options=Options(loop=loop), progress=False,
        )  # fmt: skip

    whole = run(labelled())
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted())
    resumed = run(labelled(), resume=tmp_path / "run.pt")
    assert resumed.meta["fxprune"].plan == whole.meta["fxprune"].plan
    assert same([*whole.state_dict().values()], [*resumed.state_dict().values()])
    (steps,) = (n for n in resumed.meta["fxprune"].notes if n.startswith("search"))
    assert "after 12 steps" in steps


def test_same_seed_same_result() -> None:
    def run(seed: int) -> Any:
        return fxprune.prune(
            make(), image(), method="dhp", flops=0.5, data=labelled(16), epochs=1, seed=seed, progress=False
        )

    first = run(0)
    torch.randn(3)
    assert same([*first.state_dict().values()], [*run(0).state_dict().values()])
    assert first.meta["fxprune"].plan != run(1).meta["fxprune"].plan


def test_mixed_precision() -> None:
    small = fxprune.prune(
        make(), image(), method="dhp", flops=0.5, data=labelled(16), epochs=1, options=Options(loop=Loop(amp=True)),
        progress=False,
    )  # fmt: skip
    assert all(v.dtype in (torch.float32, torch.int64) for v in small.state_dict().values())
    assert small.meta["fxprune"].oracle_error < 1e-5


def test_the_papers_optimizer_and_schedule() -> None:
    training = begun()
    optimizer = training.hooks.optimizer()
    schedule = training.hooks.schedule(optimizer, 100)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.1
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.9, 1e-4)
    assert len(optimizer.param_groups) == 1, "latents decay like everything else"
    assert schedule is not None
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1] * 50 + [0.01] * 50)


# -- conversion --------------------------------------------------------------------------------------------------------


def test_what_is_not_cut_computes_what_was_trained() -> None:
    training = begun(flops=1.0)
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.01)
    for _ in range(2):
        step(training, optimizer, image())
    training.model.eval()
    with torch.no_grad():
        before = training.model(image())
    weights = bank_of(training).weights()
    small = training.finish().eval()
    torch.testing.assert_close(small(image()), before)
    assert list(small.state_dict()) == list(make().state_dict())
    for name, weight in weights.items():
        assert torch.equal(small.state_dict()[name], weight), "trained weights are kept"


def test_what_is_cut_is_what_has_small_latents() -> None:
    training = begun(minimum=1)
    shuffle_biases(training)
    latents = bank_of(training).latents
    places = latents_of(training, "up.0.weight", 0)
    gone = list(range(0, 24, 2))
    with torch.no_grad():
        latents.copy_(1 + torch.rand_like(latents))
        latents[[places[i] for i in gone]] = -0.01
        weights = bank_of(training).weights()
    alive = training.hooks.alive()
    assert alive is not None
    assert alive.all(), "still larger than the threshold"
    left = training.graph.everything()
    left[[places[i] for i in gone]] = False
    small = begun(minimum=1, flops=training.graph.macs(left) / training.graph.macs())
    bank_of(small).load_state_dict(bank_of(training).state_dict())
    pruned = small.finish()
    kept = [i for i in range(24) if i not in gone]
    assert pruned.meta["fxprune"].plan.kept["up.0.weight"] == {0: kept}
    assert torch.equal(pruned.get_parameter("up.0.weight"), weights["up.0.weight"][kept])
    assert torch.equal(pruned.get_parameter("down.0.weight"), weights["down.0.weight"][:, kept])
    assert pruned.meta["fxprune"].oracle_error < 1e-5


@pytest.mark.parametrize(("channels", "minimum", "left"), [(0.45, 1, 2), (0.45, 4, 4), (0.1, 4, 1)])
def test_the_minimum_goes_last(channels: float, minimum: int, left: int) -> None:
    """Of 16 + 24 channels 18 stay, or 4; the 24 have small latents."""
    method = DHP(minimum=minimum, classifier="cut")
    training = fxprune.attach(make(), image(), method=method, channels=channels, progress=False)
    with torch.no_grad():
        bank_of(training).latents[latents_of(training, "up.0.weight", 0)] *= 1e-5
    small = training.finish()
    assert small.get_submodule("up.0").out_channels == left
    assert small.get_submodule("stem.0").out_channels == int(40 * channels) - left


def kept(report: Any, name: str, dim: int, size: int) -> Any:
    return report.plan.kept.get(name, {}).get(dim, [*range(size)])


def test_shared_latents_of_a_residual_stream() -> None:
    net = papers.resnet(14)
    report = begun(net, torch.randn(1, 3, 16, 16)).finish().meta["fxprune"]
    stage = {
        tuple(kept(report, name, 0, 32))
        for name in dict(net.named_parameters())
        if name.startswith("stages.") and name.endswith(("conv2.weight", "shortcut.0.weight"))
        if net.get_parameter(name).shape[0] == 32
    }
    assert len(stage) == 1, "both blocks of a stage and its shortcut"
    streams = [kept(report, "stem.0.weight", 0, 16)]
    first = [n for n, p in net.named_parameters() if n.endswith("conv2.weight") and p.shape[0] == 16]
    assert len(first) == 2
    assert all(kept(report, name, 0, 16) == streams[0] for name in first)
    assert len(streams[0]) < 16


class Two(nn.Module):
    """Two classifiers on one stream, one of them behind a hidden layer, and a map that is returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 10, 3, padding=1)
        self.hidden, self.first, self.second = nn.Linear(10, 8), nn.Linear(8, 4), nn.Linear(10, 5)
        self.map = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        pooled = self.body(x).relu().mean((2, 3))
        return self.first(self.hidden(pooled).relu()).softmax(1), {"second": self.second(pooled), "map": self.map(x)}


def test_by_default_the_classifiers_are_ordinary_layers_and_what_they_read_stays() -> None:
    net = randomise(Two())
    for kept, classifier in (({"body", "hidden"}, "kept"), (set(), "cut")):
        training = begun(net, classifier=classifier, flops=0.6)
        names = {name for part in bank_of(training).children() if isinstance(part, Hypernetwork) for name in part.names}
        assert names == {"stem.weight", "body.weight", "hidden.weight", "map.weight"}, "a map is no classifier"
        for name in ("first.weight", "second.weight"):
            assert torch.equal(training.model.get_parameter(name), net.get_parameter(name))
            assert any(p is training.model.get_parameter(name) for p in training.hooks.trained())
        with torch.no_grad():
            bank_of(training).latents.zero_()
        alive = training.hooks.alive()
        assert alive is not None
        whole = {g.name for g in training.graph.prunable if alive[g.channels].all()}
        assert whole == kept
        report = training.finish().meta["fxprune"]
        assert report.oracle_error < 1e-5
        assert not any(0 in report.plan.kept.get(f"{name}.weight", {}) for name in kept)
        stays = "and what it reads stays" if classifier == "kept" else "and what it reads may go"
        note = f"the classifier is an ordinary layer, {stays}: first.weight, second.weight"
        assert note in report.notes
    assert DHP().classifier == "kept"


def test_what_a_classifier_keeps_is_told_before_the_training() -> None:
    with pytest.raises(BudgetError, match=r"flops=0.1 cannot be reached"):
        begun(make(), classifier="kept", flops=0.1)
    with pytest.raises(ModelError, match=r"are those that 2.weight reads, .* DHP\(classifier=\"cut\"\) lets it go"):
        begun(chain(4, 8, 2), torch.randn(2, 4), classifier="kept")


def test_upsamplers_share_the_latents_of_the_stream_where_asked() -> None:
    net, x = papers.edsr(width=0.125, blocks=1, scale=4), torch.randn(1, 3, 16, 16)
    names = ("head", "tail.0", "tail.2")
    alone, together = begun(net, x), begun(net, x, shared=[names], minimum=1)
    assert len({tuple(latents_of(alone, f"{name}.weight", 0)) for name in names}) == 3
    places = part_of(together, "head.weight").index_0.flatten()
    for name in names[1:]:
        part = part_of(together, f"{name}.weight")
        assert torch.equal(part.index_0.flatten(), places.repeat_interleave(4)), "a latent for its four sub-pixels"
    assert torch.equal(part_of(together, "tail.4.weight").index_1.flatten(), places)
    latents = bank_of(together).latents
    optimizer = torch.optim.SGD(together.model.parameters(), lr=1.0)
    with torch.no_grad():
        before = latents.fill_(0.5).clone()
    together.after_step(optimizer)
    torch.testing.assert_close((before - latents)[places], torch.full((16,), 2e-4)), "shrunk once, not three times"
    with torch.no_grad():
        latents[places[[1, 5, 9]]] = 0.0
    plan = together.finish().meta["fxprune"].plan
    rows = [plan.kept[f"{name}.weight"][0] for name in names]
    wide = [sorted({row // 4 for row in found}) for found in rows[1:]]
    assert rows[0] == wide[0] == wide[1], "the budget is met without an edge here"
    assert not {1, 5, 9} & set(rows[0])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("stem.0", "up.0"), r"shared: layers of one latent vector have equally many channels, .* stem.0 1 x 16, up.0"),
        (("stem.0", "nothing"), r"shared: 'nothing' is no layer whose output channels are one group .* There are: "),
        (("stem.0", "head"), r"shared: 'head' is no layer"),
    ],
)
def test_what_cannot_share_a_latent_vector(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        begun(shared=[names])


def test_depthwise_concat_and_sub_pixels() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.depth = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.side, self.up = nn.Conv2d(3, 12, 1), nn.Conv2d(28, 64, 1)
            self.shuffle, self.last = nn.PixelShuffle(2), nn.Conv2d(16, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(torch.cat((self.depth(self.stem(x).relu()), self.side(x)), 1))
            return self.last(self.shuffle(x).relu())

    small = begun(randomise(Mixed()).eval(), minimum=2).finish()
    report = small.meta["fxprune"]
    stem, side = kept(report, "stem.weight", 0, 16), kept(report, "side.weight", 0, 12)
    assert small.depth.groups == len(stem) < 16
    assert kept(report, "depth.weight", 0, 16) == stem
    assert kept(report, "up.weight", 1, 28) == stem + [16 + i for i in side]
    last = kept(report, "last.weight", 1, 16)
    assert kept(report, "up.weight", 0, 64) == [4 * i + s for i in last for s in range(4)]
    assert small.up.out_channels == 4 * len(last) < 64
    assert report.oracle_error < 1e-5


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10
        ),
        (2, 3, 16, 16),
    ),
    "densenet": (lambda: papers.densenet_40_12(depth=10), (2, 3, 8, 8)),
    "unet": (lambda: papers.unet(3, width=0.25, depth=3), (2, 3, 8, 8)),
    "dncnn": (lambda: papers.dncnn(3, width=0.25, blocks=2), (2, 3, 8, 8)),
    "srresnet": (lambda: papers.srresnet(3, width=0.25, blocks=1, scale=2), (2, 3, 8, 8)),
    "edsr": (lambda: papers.edsr(3, width=0.25, blocks=1, scale=2), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_are_trained_cut_and_proven(name: str) -> None:
    """Transformers, concatenations, restoration: the mask oracle on trained weights; L1 against random images."""
    factory, shape = NETWORKS[name]
    model, x = randomise(factory()).eval(), torch.randn(shape)
    target = torch.rand_like(model(x).detach())
    data = [(x, target)] * 3
    small = fxprune.prune(
        model, x, method=DHP(strength=0.1, every=2, minimum=2), flops=0.5, data=data, loss_fn=F.l1_loss, epochs=1,
        options=Options(loop=Loop(optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))), progress=False,
    )  # fmt: skip
    report = small.meta["fxprune"]
    assert report.oracle_error < 1e-5
    assert 0.4 < report.macs_after / report.macs_before <= 0.5
    result = small.eval()(x)
    assert float(result.detach().std()) > 0
    assert result.shape == target.shape
    assert not any("not generated" in note for note in report.notes)
    assert "channels with larger latents had to go, too: search for longer, or with a larger strength" in report.notes


# -- what cannot be used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1}, "strength=-1 must not be negative."),
        ({"limit": float("nan")}, "limit=nan must not be negative."),
        ({"threshold": 0}, "threshold=0 must be positive: latents are compared with it."),
        ({"minimum": 0}, "minimum=0 must be a whole number of at least 1."),
        ({"every": 1.5}, "every=1.5 must be a whole number of at least 1."),
        ({"embedding": True}, "embedding=True must be a whole number of at least 1."),
        ({"classifier": "whole"}, "classifier='whole' is unknown. Known: kept, cut, generated."),
        ({"strength": "2e-4"}, "strength='2e-4' must be a number."),
        ({"limit": float("inf")}, "limit=inf must be finite."),
        ({"shared": [[]]}, "shared=[[]] must be a list of lists of layers: [['head', 'tail.0']]."),
        ({"shared": ["a", "b"]}, "shared=['a', 'b'] must be a list of lists of layers: [['head', 'tail.0']]."),
        ({"shared": None}, "shared=None must be a list of lists of layers: [['head', 'tail.0']]."),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        DHP(**options)
    assert str(caught.value) == message


def test_what_cannot_be_trained() -> None:
    with pytest.raises(InputError, match=r"^dhp trains: pass data="):
        fxprune.prune(make(), image(), method="dhp", flops=0.5, progress=False)
    frozen = make(Small).requires_grad_(False)
    with pytest.raises(ModelError, match=r"^DHP generates the weights .* Are they frozen \(requires_grad=False\)\?$"):
        begun(frozen)
    training = begun(chain(4, 8, 2), torch.randn(2, 4))
    with pytest.raises(InputError, match=r"^DHP shrinks by the learning rate: call after_step\(optimizer\) with your"):
        training.after_step()
    others = torch.optim.SGD([p for n, p in training.model.named_parameters() if "latents" not in n], lr=0.1)
    with pytest.raises(InputError, match=r"^The optimizer does not train the latents: give it all of training\.model"):
        training.after_step(others)
