"""``reconstruct`` without data: noise in place of inputs, and norms that are told apart from it afterwards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import Ascending, Perceptron
from torch import Tensor, nn
from twins import LastStay, settled, with_twins

import fxprune
from fxprune.errors import InputError
from fxprune.reconstruction.noise import noise_for
from fxprune.recording.inputs import RECORD_KEY, describe_inputs
from fxprune.verification import relative_error

CPU = torch.device("cpu")


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.stats = nn.Embedding(11, 8), nn.LayerNorm(8), nn.BatchNorm1d(24)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids) * mask.unsqueeze(-1)
        return self.down(F.gelu(self.stats(self.up(self.norm(x)).transpose(1, 2)).transpose(1, 2)))


class Deep(nn.Module):
    """Its statistics are those of data that are nothing like noise of mean 0 and variance 1."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (3, 24, 24, 24):
            layers += [nn.Conv2d(inputs, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def real(count: int, seed: int = 0) -> Tensor:
    """Smooth images, bright and of low contrast."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return 5 + 0.3 * F.interpolate(coarse, size=(12, 12), mode="bilinear")


@pytest.fixture(scope="module")
def deep() -> nn.Module:
    torch.manual_seed(0)
    model = Deep()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.normal_(module.bias, 0, 0.5)
    with torch.no_grad():
        for seed in range(8):
            model(real(16, seed))
    return model.eval()


def cut(model: nn.Module, *inputs: Tensor, method: object = "l2", **options: object) -> nn.Module:
    return fxprune.prune(model, inputs, method=method, flops=0.5, round_to=1, progress=False, **options)


@torch.no_grad()
def lacking(small: nn.Module, model: nn.Module, x: Tensor) -> float:
    """``|small - model|^2 / |model - its mean|^2``."""
    wanted = model(x)
    return float((small(x) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def statistics(model: nn.Module, which: str) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if name.endswith(which)}


def test_what_is_linear_in_what_stays_is_exact_on_any_data() -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 12, 12)
    model = with_twins(settled(Deep()), example)
    small = cut(model, example, method=LastStay())
    fitted = fxprune.reconstruct(small, model)
    x = 3 * torch.randn(9, 3, 12, 12) - 1
    assert relative_error(small(x), model(x)) > 0.01
    assert relative_error(fitted(x), model(x)) < 1e-4


def test_norms_make_up_for_what_noise_is_not(deep: nn.Module) -> None:
    x = real(64, seed=99)
    small = cut(deep, x[:1])
    fitted = fxprune.reconstruct(small, deep)
    blind = fxprune.reconstruct(small, deep, torch.randn(256, 3, 12, 12))
    cut_only, without, with_them = (lacking(net, deep, x) for net in (small, blind, fitted))
    assert with_them < 0.5 * cut_only
    assert with_them < 0.5 * without
    told = fitted.meta["fxprune"].reconstruction
    assert told.of_noise
    assert told.samples + told.held_out >= 256
    assert "samples of noise" in told.summary


@pytest.mark.parametrize("noise", [True, False])
def test_instance_norms_with_measured_statistics_are_batch_norms(deep: nn.Module, noise: bool) -> None:
    """In eval they compute the same: so do their refits, whatever the size of a batch."""
    other = copy.deepcopy(deep)
    for name, module in deep.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            norm = nn.InstanceNorm2d(24, affine=True, track_running_stats=True)
            norm.load_state_dict(module.state_dict())
            other.set_submodule(name, norm.eval())
    data = None if noise else [real(3 + index % 4, index) for index in range(12)]
    small, twin = (cut(model, real(1)) for model in (deep, other))
    fitted, again = (fxprune.reconstruct(s, m, data) for s, m in ((small, deep), (twin, other)))
    torch.testing.assert_close(again.state_dict(), fitted.state_dict(), rtol=1e-3, atol=1e-4)
    assert lacking(again, other, real(64, seed=99)) < 0.5 * lacking(twin, other, real(64, seed=99))


class Streamed(nn.Module):
    """A norm that follows no product: its mean follows what the stream lacks."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.make, self.norm, self.head = nn.Conv2d(3, 16, 3), norm, nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.make(x))
        return self.head(F.relu(self.norm(torch.cat([x, x.square()], 1))))


def test_the_mean_of_an_instance_norm_follows_as_that_of_a_batch_norm() -> None:
    torch.manual_seed(0)
    models = [Streamed(nn.BatchNorm2d(32)).eval()]
    models += [Streamed(nn.InstanceNorm2d(32, affine=True, track_running_stats=True)).eval()]
    models[1].load_state_dict(models[0].state_dict())
    data = [torch.randn(3 + index % 4, 3, 8, 8) for index in range(12)]
    smaller = [cut(model, data[0]) for model in models]
    for small in smaller:
        with torch.no_grad():
            small.get_parameter("make.bias").add_(1)
    fitted = [fxprune.reconstruct(small, model, data, ridge=1e6) for small, model in zip(smaller, models, strict=True)]
    torch.testing.assert_close(fitted[1].state_dict(), fitted[0].state_dict(), rtol=1e-3, atol=1e-4)


def test_statistics_of_real_data_come_back(deep: nn.Module) -> None:
    small = cut(deep, real(1))
    fitted, before = fxprune.reconstruct(small, deep), copy.deepcopy(small.state_dict())
    for name, value in statistics(small, "running_var").items():
        assert torch.equal(value, statistics(fitted, "running_var")[name])
    means = statistics(small, "running_mean")
    moved = [name for name, value in statistics(fitted, "running_mean").items() if not torch.equal(value, means[name])]
    assert moved, "norms take up the shift of convolutions without a bias"
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in before.items())


def test_what_was_tuned_after_the_cut_stays(deep: nn.Module) -> None:
    small = cut(deep, real(1))
    tuned = copy.deepcopy(small)
    for value in statistics(tuned, "running_mean").values():
        value += 0.01
    for value in statistics(tuned, "running_var").values():
        value *= 1.1
    fitted = fxprune.reconstruct(tuned, deep)
    for name, value in statistics(tuned, "running_var").items():
        torch.testing.assert_close(value, statistics(fitted, "running_var")[name])
    x = real(32, seed=98)
    assert lacking(fitted, deep, x) < lacking(tuned, deep, x)


def test_prune_does_so_in_one_call_and_the_same_again(deep: nn.Module) -> None:
    x = real(1)
    one, two = (cut(deep, x, reconstruct=True).state_dict() for _ in range(2))
    again = fxprune.reconstruct(cut(deep, x), deep).state_dict()
    for name, value in one.items():
        assert torch.equal(value, two[name])
        assert torch.equal(value, again[name])


def test_integers_and_masks_are_like_the_examples() -> None:
    torch.manual_seed(0)
    model = Tokens()
    model.stats.momentum = None
    with torch.no_grad():
        for _ in range(8):
            model(torch.randint(0, 11, (16, 6)), torch.ones(16, 6))
    model.eval()
    ids, mask = torch.randint(0, 11, (2, 6)), torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2])
    small = cut(model, ids, mask)
    pieces = noise_for(small, None, 0, CPU)
    assert all(int(piece.args[0].max()) < 11 for piece in pieces)
    assert {tuple(row) for piece in pieces for row in piece.args[1].tolist()} == {tuple(row) for row in mask.tolist()}
    fitted = fxprune.reconstruct(small, model)
    assert relative_error(fitted(ids, mask), model(ids, mask)) < relative_error(small(ids, mask), model(ids, mask))


def test_a_part_of_a_model(deep: nn.Module) -> None:
    whole = nn.Sequential(nn.AvgPool2d(1), deep)
    x = real(32, seed=97)
    given = {"flops": 0.5, "round_to": 1, "progress": False}
    small = fxprune.prune_submodule(whole, "1", x[:1], **given)
    for data in (None, real(40)):
        fitted = fxprune.prune_submodule(whole, "1", x[:1], reconstruct=True, data=data, **given)
        assert lacking(fitted, whole, x) < lacking(small, whole, x)
        assert fitted[1].meta["fxprune"].reconstruction.of_noise == (data is None)


def test_planes_are_smooth_and_all_else_is_white() -> None:
    module = fxprune.record(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.randn(2, 3, 16, 16))
    assert RECORD_KEY in module.meta
    plane, again = (noise_for(module, 64, 3, CPU)[0].args[0] for _ in range(2))
    assert torch.equal(plane, again)
    assert not torch.equal(plane, noise_for(module, 64, 4, CPU)[0].args[0])
    assert float(plane.square().mean()) == pytest.approx(1, rel=1e-3)
    for dim in (2, 3):
        assert float(plane.diff(dim=dim).square().mean()) < 1, "of white noise it is 2"
    module.meta[RECORD_KEY] = describe_inputs((torch.randn(2, 3, 50),), {})
    line = noise_for(module, 64, 3, CPU)[0].args[0]
    assert float(line.diff(dim=2).square().mean()) == pytest.approx(2, rel=0.2)


def test_a_batch_that_is_fixed_stays() -> None:
    class Fixed(Deep):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[0] == 2 else x

    model = settled(Fixed())
    small = cut(model, torch.randn(2, 3, 12, 12))
    pieces = noise_for(small, 20, 0, CPU)
    assert [piece.samples for piece in pieces] == [2] * 10
    assert fxprune.reconstruct(small, model, samples=20).meta["fxprune"].reconstruction.of_noise


def test_without_batch_norms_nothing_stands_in_for_data() -> None:
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval(), torch.randn(4, 6)
    with pytest.raises(InputError, match="no batch norm of this model"):
        fxprune.reconstruct(cut(model, x), model)
    with pytest.raises(InputError, match="pass data"):
        cut(model, x, reconstruct=True)


def test_training_needs_data(deep: nn.Module) -> None:
    with pytest.raises(InputError, match="tune= trains on data"):
        fxprune.reconstruct(cut(deep, real(1)), deep, tune=10)


def test_a_file_says_that_it_was_noise(deep: nn.Module, tmp_path: Path) -> None:
    fitted = cut(deep, real(1), reconstruct=True)
    fxprune.save(fitted, tmp_path / "small.safetensors")
    loaded = fxprune.load(tmp_path / "small.safetensors", deep)
    assert loaded.meta["fxprune"].reconstruction.of_noise


def test_a_channel_without_variance_has_a_ratio_too(deep: nn.Module) -> None:
    model = copy.deepcopy(deep)
    for value in statistics(model, "running_var").values():
        value[::5] = 0
    fitted = cut(model, real(1), reconstruct=True)
    told = fitted.meta["fxprune"].reconstruction
    assert told.output_after < told.output_before


class Pooled(nn.Module):
    """A norm of a single position per sample, after a pool."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.fixed = fixed
        self.a, self.b, self.norm = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.c = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.fixed and x.shape[0] != 1:
            return x
        return self.c(self.norm(self.b(F.relu(self.a(x)).mean((2, 3), keepdim=True))).relu().flatten(1))


def test_a_batch_of_one_has_the_variance_of_all() -> None:
    torch.manual_seed(0)
    free = Pooled(False)
    free.train()
    with torch.no_grad():
        for _ in range(50):
            free(torch.randn(16, 3, 8, 8))
    fixed = Pooled(True).eval()
    fixed.load_state_dict(free.eval().state_dict())
    x = torch.randn(32, 3, 8, 8)
    errors = []
    for model, split in ((free, 32), (fixed, 1)):
        fitted = cut(model, torch.randn(split, 3, 8, 8), reconstruct=True)
        found = torch.cat([fitted(part) for part in x.split(split)])
        errors.append(float((found - free(x)).detach().square().sum()))
    assert errors[1] < 1.5 * errors[0]


def test_a_fixed_batch_is_that_of_the_first_tensor_that_has_one() -> None:
    class Scaled(Perceptron):
        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            return self.body(x) * scale if x.shape[0] == 2 else x

    small = cut(Scaled().eval(), torch.tensor(2.0), torch.randn(2, 8))
    assert {piece.samples for piece in noise_for(small, 20, 0, CPU)} == {2}


def test_statistics_in_one_tensor_stay() -> None:
    class Together(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.c = nn.BatchNorm1d(8), nn.Linear(8, 16), nn.Linear(16, 4)
            self.register_buffer("both", torch.stack([torch.zeros(16), torch.ones(16)]))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.c(F.batch_norm(self.a(x), self.both[0], self.both[1]).relu())

    told = cut(Together().eval(), torch.randn(2, 8), reconstruct=True).meta["fxprune"].reconstruction
    assert told.output_after < told.output_before


def test_what_forward_draws_is_the_same_again_and_masked_outputs_are_left_out() -> None:
    class Drawing(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            out = self.body(F.dropout(x, 0.1, True))
            return out.masked_fill(torch.tensor([True, False, False, False]), float("-inf"))

    model, data = Drawing().eval(), torch.randn(60, 8)
    small = cut(model, data[:2])
    state = torch.get_rng_state()
    one, two = (fxprune.reconstruct(small, model, data) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    told = one.meta["fxprune"].reconstruction
    assert told.output_after < told.output_before


def test_a_model_that_takes_no_noise_says_so() -> None:
    model, x = Ascending().eval(), torch.rand(2, 8).sort().values
    with pytest.raises(InputError, match=r"Without data= the inputs are noise.*pass data: .*goes another way"):
        cut(model, x, verify=False, reconstruct=True)
    with pytest.raises(InputError, match=r"Without data= the inputs are noise"):
        fxprune.reconstruct(cut(model, x, verify=False), model)
