"""``reconstruct`` and ``prune(reconstruct=True)``: what they take, refuse, keep and tell."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Ascending
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.errors import InputError, PlanError
from fxprune.verification import relative_error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.nb = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.na(self.a(x)))
        return self.head((F.relu(self.nb(self.b(x))) + x).mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(F.relu(self.a(x) + self.b(y)))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 3, 1), Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.relu(self.stem(x))).softmax(1)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def small(net: Net) -> nn.Module:
    return halved(net, torch.randn(1, 3, 8, 8))


def halved(model: nn.Module, *inputs: Tensor, **options: object) -> nn.Module:
    given = {"flops": 0.5, "round_to": 1, "progress": False, **options}
    return fxprune.prune(model, inputs if len(inputs) > 1 else inputs[0], **given)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_outputs_come_back_and_nothing_given_is_changed(net: Net, small: nn.Module, images: Tensor) -> None:
    before = copy.deepcopy(small), copy.deepcopy(net)
    fitted = fxprune.reconstruct(small, net, images)
    assert same(small, before[0])
    assert same(net, before[1])
    told = fitted.meta["fxprune"].reconstruction
    assert told.output_after < 0.2 * told.output_before
    assert (told.samples, told.held_out) == (48, 12)
    assert {layer.name for layer in told.layers if layer.kept} == {"b.weight", "head.weight"}
    assert all(layer.after <= layer.before for layer in told.layers)
    assert "weights refitted on 48 samples" in str(fitted.meta["fxprune"])
    assert small.meta["fxprune"].reconstruction is None
    assert fitted.meta["fxprune"].data()["reconstruction"]["layers"][0]["why"] == "nothing before it changed"


def test_prune_reconstructs(net: Net, small: nn.Module, images: Tensor) -> None:
    fitted = halved(net, torch.randn(1, 3, 8, 8), reconstruct=True, data=images)
    assert same(fitted, fxprune.reconstruct(small, net, images))
    labelled = [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(12)]
    fitted = halved(net, torch.randn(1, 3, 8, 8), reconstruct=True, data=iter(labelled), method="taylor")
    assert fitted.meta["fxprune"].reconstruction.output_after < 0.5


def test_prune_hands_over_what_it_recorded(net: Net, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("fxprune.reconstruction.front.recorded")
    assert halved(net, images[:1], reconstruct=True, data=images).meta["fxprune"].reconstruction.output_after < 0.5


def test_inference_mode_changes_nothing(net: Net, small: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        fitted = fxprune.reconstruct(small, net, images.clone())
    assert same(fitted, fxprune.reconstruct(small, net, images))
    assert not any(p.is_inference() for p in fitted.parameters())


def test_every_kind_of_data_is_the_same_data(net: Net, small: nn.Module, images: Tensor) -> None:
    parts = list(images.split(12))
    expected = fxprune.reconstruct(small, net, parts)
    targets = torch.zeros(len(images))
    for data in (
        DataLoader(TensorDataset(images), 12),
        DataLoader(TensorDataset(images, targets), 12),
        [{"x": part} for part in parts],
        [((part,), "no target") for part in parts],
        (part for part in parts),
    ):
        assert same(fxprune.reconstruct(small, net, data), expected)
    told = fxprune.reconstruct(small, net, parts, samples=30).meta["fxprune"].reconstruction
    assert told.samples + told.held_out == 30


def test_two_inputs_are_no_input_and_target() -> None:
    torch.manual_seed(0)
    model, x, y = TwoInputs().eval(), torch.randn(80, 4), torch.randn(80, 6)
    small = halved(model, x[:2], y[:2])
    pairs = list(zip(x.split(10), y.split(10), strict=True))
    fitted = fxprune.reconstruct(small, model, pairs)
    assert fitted.meta["fxprune"].reconstruction.output_after < 0.3
    assert same(fitted, fxprune.reconstruct(small, model, [(pair, None) for pair in pairs]))


def test_little_memory_gives_the_same_weights(net: Net, small: nn.Module, images: Tensor) -> None:
    expected = fxprune.reconstruct(small, net, images)
    for memory in (0, 100_000):
        assert same(fxprune.reconstruct(small, net, images, memory=memory), expected)


def test_a_loaded_and_a_fine_tuned_network(net: Net, small: nn.Module, images: Tensor, tmp_path: Path) -> None:
    fxprune.save(small, tmp_path / "small.safetensors")
    loaded = fxprune.load(tmp_path / "small.safetensors", copy.deepcopy(net))
    assert same(fxprune.reconstruct(loaded, net, images), fxprune.reconstruct(small, net, images))
    with torch.no_grad():
        loaded.get_parameter("head.bias").add_(1)
    fitted = fxprune.reconstruct(loaded.train(), net, images)
    assert fitted.training
    told = fitted.meta["fxprune"].reconstruction
    assert told.output_after < 0.1 * told.output_before


def test_a_part_of_a_model(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Whole().eval()
    small = fxprune.prune_submodule(model, "body", images[:1], flops=0.5, round_to=1, progress=False)
    fitted = fxprune.reconstruct(small, model, images)
    with torch.no_grad():
        errors = [relative_error(m(images), model(images)) for m in (small, fitted)]
    assert errors[1] < 0.5 * errors[0]
    assert type(fitted) is Whole


@pytest.mark.parametrize("method", ["l2", "obs", "wanda", "activation"])
def test_a_part_is_recorded_once_and_pruned_with_data_of_the_whole(
    images: Tensor, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Whole().eval()
    body = F.relu(model.stem(images)).detach()
    expected = halved(model.body, body[:1], method=method, data=body, reconstruct=True)
    monkeypatch.delattr("fxprune.reconstruction.front.recorded")
    given = {"flops": 0.5, "round_to": 1, "progress": False, "data": images, "reconstruct": True}
    small = fxprune.prune_submodule(model, "body", images[:1], method=method, **given)
    assert small.body.meta["fxprune"].plan.kept == expected.meta["fxprune"].plan.kept
    torch.testing.assert_close(small.body.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["obs", "wanda"])
def test_a_part_of_a_model_of_two_inputs(method: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TwoInputs()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(x, y=y + 1)

    torch.manual_seed(0)
    model, pairs = Outer().eval(), list(zip(torch.randn(80, 4).split(10), torch.randn(80, 6).split(10), strict=True))
    small = fxprune.prune_submodule(
        model, "inner", pairs[0], method=method, flops=0.5, round_to=1, progress=False, data=pairs, reconstruct=True
    )
    told = small.inner.meta["fxprune"].reconstruction
    assert told.output_after < 0.7 * told.output_before
    assert told.samples + told.held_out == 80


def test_a_layer_made_worse_is_put_back(net: Net, small: nn.Module, images: Tensor) -> None:
    """Data to fit that is nothing like what is held out."""
    odd = [images[:12] * (1 if i % 5 == 4 else 100) + (0 if i % 5 == 4 else 1000) for i in range(10)]
    fitted = fxprune.reconstruct(small, net, odd, ridge=1e-12)
    told = fitted.meta["fxprune"].reconstruction
    back = [layer for layer in told.layers if not layer.kept and not layer.why]
    assert back
    for layer in back:
        assert torch.equal(fitted.get_parameter(layer.name), small.get_parameter(layer.name))
        assert layer.after == layer.before
    assert "put back" in str(told)


def test_a_few_samples_do_no_harm(net: Net, small: nn.Module, images: Tensor) -> None:
    for count in (2, 3):
        told = fxprune.reconstruct(small, net, images[:count]).meta["fxprune"].reconstruction
        assert all(layer.after <= layer.before for layer in told.layers)
        assert told.samples + told.held_out == count


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.randn(1, 3, 8, 8), "needs at least two"),
        (torch.randn(0, 3, 8, 8), r"a tensor of shape \[0, 3, 8, 8\]"),
        ([], "holds no inputs"),
        (3, "data= is a int"),
        ({"x": torch.randn(4, 3, 8, 8)}, "data= is a dict"),
        ([torch.full((2, 3, 8, 8), float("nan"))] * 2, "Item 0 of data= holds NaN"),
        ([torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), float("nan"))], "Item 1 of data= holds NaN"),
        (torch.randn(10, 4, 8, 8), "does not run on batch 0 of data"),
        ([torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)], "does not run on batch 1 of data"),
        ([(torch.randn(2, 3, 8, 8),) * 3], "has 3 parts"),
        (["text"], "Item 0 of data= is a str that holds no tensor"),
        (np.zeros((4, 3, 8, 8), np.float32), r"is a ndarray that holds no tensor. Pass tensors \(torch.from_numpy"),
        ([torch.randn(2, 3, 8, 8), torch.randn(0, 3, 8, 8)], r"Item 1 of data= holds no samples: .* \[0, 3, 8, 8\]"),
    ],
)
def test_data_that_cannot_be_used(net: Net, small: nn.Module, data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxprune.reconstruct(small, net, data)


def test_other_arguments_that_cannot_be_used(net: Net, small: nn.Module, images: Tensor) -> None:
    with pytest.raises(InputError, match="ridge=-1"):
        fxprune.reconstruct(small, net, images, ridge=-1)
    with pytest.raises(InputError, match="samples=1"):
        fxprune.reconstruct(small, net, images, samples=1)
    with pytest.raises(InputError, match="no part that fxprune pruned"):
        fxprune.reconstruct(net, net, images)
    with pytest.raises(PlanError, match="another model"):
        fxprune.reconstruct(small, TwoInputs(), images)
    with pytest.raises(InputError, match="leave one out"):
        halved(copy.deepcopy(net), images[:1], reconstruct=True, data=images, options=fxprune.Options(consume=True))


def test_an_interruption_changes_nothing(net: Net, small: nn.Module, images: Tensor) -> None:
    before = copy.deepcopy(small)

    def data():  # type: ignore[no-untyped-def]
        yield from images.split(12)[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxprune.reconstruct(small, net, data())
    assert same(small, before)


def test_an_interruption_between_layers_changes_nothing(
    net: Net, small: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy.deepcopy(small), copy.deepcopy(net)
    solved = []

    def solve(*args: object) -> object:
        solved.append(args)
        if len(solved) == 2:
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    refit = importlib.import_module("fxprune.reconstruction.refit")  # the package has a function of that name
    original = refit.solve
    monkeypatch.setattr(refit, "solve", solve)
    small.train()
    try:
        with pytest.raises(KeyboardInterrupt):
            fxprune.reconstruct(small, net, images)
        assert len(solved) == 2
        assert same(small, before[0])
        assert same(net, before[1])
        assert small.training
        assert not net.training
        assert not any(module._forward_pre_hooks for module in net.modules())
    finally:
        small.eval()


def test_a_weight_that_something_else_reads_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(20, 12), nn.Linear(12, 24), nn.Linear(24, 12)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return F.linear(x + self.down(F.relu(self.up(x))), self.embed.weight)

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.randint(0, 20, (60, 7))
    fitted = fxprune.reconstruct(halved(model, ids[:2]), model, ids)
    told = {layer.name: layer for layer in fitted.meta["fxprune"].reconstruction.layers}
    assert told["embed.weight"].why == "its weight is also read by embedding"
    assert told["down.weight"].kept


def test_what_was_told_is_saved(net: Net, small: nn.Module, images: Tensor, tmp_path: Path) -> None:
    fitted = fxprune.reconstruct(small, net, images)
    fxprune.save(fitted, tmp_path / "fitted.safetensors")
    loaded = fxprune.load(tmp_path / "fitted.safetensors", copy.deepcopy(net))
    assert same(loaded, fitted)
    assert loaded.meta["fxprune"].reconstruction == fitted.meta["fxprune"].reconstruction


def test_nothing_that_has_a_weight_reads_channels() -> None:
    class Lone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.outer(self.a(x).square().mean(1), torch.ones(2))

    model, data = Lone().eval(), torch.randn(40, 5)
    told = fxprune.reconstruct(halved(model, data[:2]), model, data).meta["fxprune"].reconstruction
    assert [layer.why for layer in told.layers] == ["nothing before it changed"]
    told = fxprune.reconstruction.Reconstruction((), 1.0, 1.0, 2, 1, 0.0, "no weight can be solved for")
    assert str(told) == "not applicable: no weight can be solved for"


def test_a_model_that_tells_data_from_noise() -> None:
    torch.manual_seed(0)
    model, data = Ascending().eval(), torch.rand(60, 8).sort().values
    small = halved(model, data[:2], verify=False)
    with torch.no_grad():
        fitted = fxprune.reconstruct(small, model, data)
        assert relative_error(fitted(data), model(data)) < relative_error(small(data), model(data))
    with pytest.raises(InputError, match="inputs are noise"):
        fxprune.reconstruct(small, model)


class Found(Net):
    """What is above the mean; with ``mean`` that of every row as well."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = super().forward(x)
        found = y[y > y.mean()]
        return (found, y.mean(1)) if self.mean else (found,)


def test_outputs_whose_shapes_depend_on_values_are_not_compared(images: Tensor) -> None:
    torch.manual_seed(0)
    net = Found(mean=True).eval()
    parts = list(images.split(12))
    fitted = halved(net, images[:1], reconstruct=True, data=parts)
    told = fitted.meta["fxprune"].reconstruction
    held = parts[-1]
    wanted, now = net(held)[1].detach(), fitted(held)[1].detach()
    assert told.output_after == pytest.approx(float((now - wanted).square().sum() / wanted.square().sum()), rel=1e-4)
    assert told.notes == ("1 outputs are not compared: their shapes depend on values",)
    tuned = fxprune.reconstruct(halved(net, images[:1]), net, parts, tune=3).meta["fxprune"].reconstruction
    assert tuned.tuning.before == pytest.approx(told.output_after, rel=1e-6)


def test_where_no_output_can_be_compared_no_error_is_told(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Found(mean=False).eval()
    fitted = fxprune.reconstruct(halved(net, images[:1]), net, images, tune=3)
    told = fitted.meta["fxprune"].reconstruction
    assert told.output_before is told.output_after is told.tuning is None
    assert "weights refitted on 48 samples; " in told.summary
    assert told.notes[-1] == "not tuned: no output can be compared"
    fxprune.save(fitted, tmp_path / "small.safetensors")
    assert fxprune.load(tmp_path / "small.safetensors", net).meta["fxprune"].reconstruction == told


class SharedVector(nn.Module):
    """Two layers with one bias, or one norm behind both; half of what they read is large and hardly varies."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.make, self.head = nn.Linear(6, 24), nn.Linear(16, 4)
        self.a, self.b = (nn.Linear(24, 16, bias=not norm) for _ in range(2))
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        if not norm:
            self.b.bias = self.a.bias
        with torch.no_grad():
            self.make.bias[:12] += 3

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.make(x))
        return self.head(torch.tanh(self.norm(self.a(x)))), self.head(torch.tanh(self.norm(self.b(x))))


@pytest.mark.parametrize("norm", [False, True])
def test_a_bias_or_norm_that_others_read_stays(norm: bool) -> None:
    torch.manual_seed(0)
    model, data = SharedVector(norm).eval(), torch.randn(240, 6)
    small = halved(model, data[:2], flops=None, channels=0.5, scope="uniform")
    fitted = fxprune.reconstruct(small, model, data)
    name = "norm.running_mean" if norm else "a.bias"
    assert torch.equal(fitted.state_dict()[name], small.state_dict()[name])
    told = fitted.meta["fxprune"].reconstruction
    assert {layer.name for layer in told.layers if layer.kept} == {"a.weight", "b.weight", "head.weight"}
    assert told.output_after < 0.3 * told.output_before


class NormTwice(nn.Module):
    """A norm that reads the stream in two places: its mean cannot follow both."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.make(x))
        x = x + F.relu(self.a(self.norm(x)))
        return self.head(x + F.relu(self.b(self.norm(x))))


def test_the_mean_of_a_norm_that_is_called_twice_stays() -> None:
    torch.manual_seed(0)
    model, data = NormTwice().eval(), torch.randn(240, 6)
    small = halved(model, data[:2])
    fitted = fxprune.reconstruct(small, model, data)
    assert torch.equal(fitted.get_buffer("norm.running_mean"), small.get_buffer("norm.running_mean"))
    told = fitted.meta["fxprune"].reconstruction
    assert told.output_after < 0.5 * told.output_before


class Kernel(nn.Module):
    """One small kernel for every channel, many of which go."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.kernel, self.head = (
            nn.Conv2d(3, 16, 3),
            nn.Parameter(torch.randn(1, 1, 3, 3)),
            nn.Conv2d(16, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.make(x))
        return self.head(F.relu(F.conv2d(x, self.kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])))


def test_where_groups_that_share_a_weight_went_it_is_left_alone() -> None:
    torch.manual_seed(0)
    model, data = Kernel().eval(), torch.randn(60, 3, 9, 9)
    small = halved(model, data[:2])
    fitted = fxprune.reconstruct(small, model, data)
    told = {layer.name: layer for layer in fitted.meta["fxprune"].reconstruction.layers}
    assert told["kernel"].why == "which of the groups that share its weight went, the weight does not tell"
    assert torch.equal(fitted.get_parameter("kernel"), small.get_parameter("kernel"))
    assert told["head.weight"].kept
    assert fitted.meta["fxprune"].reconstruction.output_after < fitted.meta["fxprune"].reconstruction.output_before


class Batched(nn.Module):
    """Weights that are given to a batch of products: once for every sample, or for every head of every sample."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.make, self.head = nn.Linear(6, 16), nn.Linear(12, 3)
        self.weight = nn.Parameter(torch.randn(heads, 16, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.make(x)).repeat_interleave(self.heads, 0)
        x = torch.bmm(x, self.weight.repeat(len(x) // self.heads, 1, 1))
        return self.head(F.relu(x))


@pytest.mark.parametrize("method", ["l2", "obs"])
@pytest.mark.parametrize("heads", [1, 2])
def test_batches_of_any_size_for_products_in_batches(heads: int, method: str) -> None:
    torch.manual_seed(0)
    model, data = Batched(heads).eval(), [torch.randn(3 + i % 7, 5, 6) for i in range(20)]
    given = {"data": data} if method == "obs" else {}
    small = halved(model, torch.randn(2, 5, 6), method=method, **given)
    fitted = fxprune.reconstruct(small, model, data)
    told = fitted.meta["fxprune"].reconstruction
    (layer,) = (layer for layer in told.layers if layer.name == "weight")
    if heads == 1:
        assert layer.after < 0.5 * layer.before
    else:
        assert layer.why == "how many groups share its weights varies with the inputs"
        assert torch.equal(fitted.get_parameter("weight"), small.get_parameter("weight"))
    assert told.output_after < 0.7 * told.output_before


@pytest.mark.parametrize("lengths", [(9, 12), (9, 7, 12)])
@pytest.mark.parametrize(("width", "options"), [(20, {"bidirectional": True}), (12, {"num_layers": 2})])
def test_recurrent_layers_on_sequences_of_several_lengths(
    width: int, options: dict[str, int], lengths: tuple[int, ...]
) -> None:
    """One product for every step: on another length other products have the same numbers."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rnn = nn.Linear(8, width), nn.GRU(width, 12, batch_first=True, **options)
            self.b = nn.Linear(24 if "bidirectional" in options else 12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.rnn(self.a(x).relu())[0])

    torch.manual_seed(0)
    model = Recurrent().eval()
    small = fxprune.prune(model, torch.randn(2, 9, 8), flops=0.6, round_to=1, progress=False)
    data = [torch.randn(16, length, 8) for length in lengths]
    told = fxprune.reconstruct(small, model, data).meta["fxprune"].reconstruction
    equal = fxprune.reconstruct(small, model, [x[:, :7] for x in data]).meta["fxprune"].reconstruction
    assert {layer.name for layer in told.layers if layer.kept} == {layer.name for layer in equal.layers if layer.kept}
    assert sum(layer.kept and layer.name.startswith("rnn.weight") for layer in told.layers) >= 2
    assert told.output_after < 0.5 * told.output_before


def test_a_weight_that_is_computed_is_told() -> None:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(12, 8))
    model, data = (
        nn.Sequential(nn.Linear(5, 12), nn.ReLU(), normed, nn.ReLU(), nn.Linear(8, 3)).eval(),
        torch.randn(60, 5),
    )
    told = fxprune.reconstruct(halved(model, data[:2]), model, data).meta["fxprune"].reconstruction
    assert [layer.why for layer in told.layers if not layer.kept][-1] == "its weight is computed from parameters"


class Uneven(nn.Module):
    """Of two outputs the weight of one is large, and what comes of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 2)
        with torch.no_grad():
            self.b.weight[0] *= 20

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) * torch.tensor([0.01, 10.0])


def test_layers_that_got_better_and_made_the_outputs_worse_are_put_back() -> None:
    notes = []
    for seed in range(8):
        torch.manual_seed(seed)
        model, data = Uneven().eval(), torch.randn(6, 4)
        small = halved(model, data)
        fitted = fxprune.reconstruct(small, model, data)
        told = fitted.meta["fxprune"].reconstruction
        assert told.output_after <= told.output_before
        if told.notes:
            notes += told.notes
            assert same(fitted, small)
            assert not any(layer.kept for layer in told.layers)
    assert notes
    assert notes[0].startswith("all is as it was cut: refitted, the error of the outputs was")


def test_complex_outputs_are_compared(images: Tensor) -> None:
    class Waves(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(super().forward(x)).conj()

    torch.manual_seed(0)
    model = Waves().eval()
    small = halved(model, images[:1])
    told = fxprune.reconstruct(small, model, images).meta["fxprune"].reconstruction
    held = images[[i for i in range(60) if i // 6 % 5 == 4]]
    with torch.no_grad():
        wanted, given = model(held), small(held)
    assert told.output_before == pytest.approx(
        float((given - wanted).abs().square().sum() / wanted.abs().square().sum()), rel=1e-4
    )
    assert told.output_after < 0.5 * told.output_before


class Pairs(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(2, 5)


@pytest.mark.parametrize("method", ["l2", "obs"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_data_for_a_network_with_one_batch_size(images: Tensor, method: str, as_tensor: bool) -> None:
    """A tensor is split into such batches, and few batches are not split to have more to judge by."""
    torch.manual_seed(0)
    model, data = Pairs().eval(), images[:6] if as_tensor else [*images[:6].split(2)]
    small = fxprune.prune(
        model, images[:2], method=method, data=data, channels=0.5, reconstruct=True, round_to=1, progress=False
    )
    told = small.meta["fxprune"].reconstruction
    assert (told.samples, told.held_out) == (4, 2)
    again = fxprune.reconstruct(fxprune.prune(model, images[:2], channels=0.5, progress=False), model, data, samples=4)
    told = again.meta["fxprune"].reconstruction
    assert (told.samples, told.held_out) == (2, 2)
    with pytest.raises(InputError, match="holds inputs of a single call"):
        fxprune.reconstruct(again, model, data[:2] if as_tensor else data[:1])
