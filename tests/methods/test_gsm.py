"""Global Sparse Momentum as a method: what becomes zero, which channels that frees, and whole channels by its rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import Attentive, Shuffled, Small, Unchanged, chain, image, make
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import optim
from fxprune.errors import BudgetError, InputError
from fxprune.methods import GSM, Outcome
from fxprune.training import Training

pytestmark = pytest.mark.usefixtures("one_thread")


class Dense(nn.Module):
    """Concatenations: every convolution reads all that were made before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.two = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 3, padding=1)
        self.head = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([x, self.one(x).relu()], 1)
        x = torch.cat([x, self.two(self.norm(x)).relu()], 1)
        return self.head(x.mean((2, 3)))


def begun(model: nn.Module, x: Tensor | None = None, attention: Any = "head_dim", **options: Any) -> Training:
    given = image() if x is None else x
    return fxprune.attach(model, given, method=GSM(**options), attention=attention, progress=False)


def cut(
    model: nn.Module, x: Tensor | None = None, compression: float = 1.0, attention: Any = "head_dim"
) -> tuple[fx.GraphModule, nn.Module]:
    """What the method makes of a model that is not trained, and the model after the same cut of weights."""
    zeroed = copy.deepcopy(model)
    optim.magnitude_cut(zeroed.parameters(), compression)
    return begun(model, x, attention, compression=compression).finish(), zeroed


def check(small: fx.GraphModule, zeroed: nn.Module, x: Tensor) -> None:
    """The network computes what the one with the same zeros does."""
    with torch.no_grad():
        found, expected = small.eval()(x), zeroed.eval()(x)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert float(expected.std(0).max()) > 1e-3, "the outputs do not depend on the input"


def zero(model: nn.Module, name: str, dim: int, *indices: int) -> None:
    """Small enough for a cut to take them: the other weights are larger."""
    with torch.no_grad():
        model.get_parameter(name).index_fill_(dim, torch.tensor(indices), 0)


def batches(classes: int = 4, count: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return DataLoader(TensorDataset(images, labels), 16)


# -- which channels go -------------------------------------------------------------------------------------------------


def test_a_channel_that_no_weight_reads_goes_exactly() -> None:
    model = make()
    zero(model, "down.0.weight", 1, 3, 5, 7)
    small, zeroed = cut(model)
    assert small.meta["fxprune"].plan.kept["up.0.weight"] == {0: [i for i in range(24) if i not in (3, 5, 7)]}
    assert set(small.meta["fxprune"].plan.kept) == {
        "up.0.weight", "up.0.bias", "up.1.weight", "up.1.bias", "up.1.running_mean", "up.1.running_var",
        "down.0.weight",
    }  # fmt: skip
    check(small, zeroed, image(5))


def test_a_channel_that_is_read_stays_even_if_it_is_constant() -> None:
    """Nothing but its bias and shift is left of it, and that counts for later layers."""
    model = make()
    zero(model, "up.0.weight", 0, 3, 5)
    small, zeroed = cut(model)
    assert small.meta["fxprune"].plan.kept == {}
    check(small, zeroed, image(5))
    zero(model, "down.0.weight", 1, 3)
    small, zeroed = cut(model)
    assert small.get_parameter("up.0.weight").shape[0] == 23
    check(small, zeroed, image(5))


def test_what_only_such_channels_read_goes_with_them() -> None:
    model = randomise(chain(6, 8, 8, 8, 4)).eval()
    x = torch.randn(7, 6)
    zero(model, "6.weight", 1, 0, 1)  # nothing reads 0 and 1 of the third layer,
    with torch.no_grad():
        model[4].weight[2:, 5] = 0  # and nothing but these reads 5 of the second,
        model[2].weight[:5, 7] = 0  # and nothing but that
        model[2].weight[6:, 7] = 0  # reads 7 of the first
    small, zeroed = cut(model, x)
    assert [small.get_parameter(f"{i}.weight").shape[0] for i in (0, 2, 4, 6)] == [7, 7, 6, 4]
    check(small, zeroed, x)


def test_a_residual_stream_needs_every_reader_at_zero() -> None:
    model = make()
    zero(model, "up.0.weight", 1, 4)
    small, _ = cut(model)
    assert "stem.0.weight" not in small.meta["fxprune"].plan.kept, "the head still reads it"
    zero(model, "head.weight", 1, 4)
    small, zeroed = cut(model)
    assert small.meta["fxprune"].plan.kept["stem.0.weight"] == {0: [i for i in range(16) if i != 4]}
    check(small, zeroed, image(5))


def test_at_least_one_channel_stays() -> None:
    model = make()
    zero(model, "down.0.weight", 1, *range(24))
    small, zeroed = cut(model)
    assert small.get_parameter("up.0.weight").shape[0] == 1
    check(small, zeroed, image(5))


def test_groups_lose_as_many_each() -> None:
    model = make(Shuffled)
    zero(model, "one.weight", 1, 2, 5)  # channels 2, 5 of the first group, and 10, 13
    with torch.no_grad():
        model.one.weight[8:, 5] = 1.0  # 13 is read
    small, zeroed = cut(model)
    assert small.meta["fxprune"].plan.kept["stem.weight"][0] in (
        [i for i in range(16) if i not in (2, 10)],
        [i for i in range(16) if i not in (5, 10)],
    )
    check(small, zeroed, image(5))


class Strange(nn.Module):
    """Channels that a layer reads, and something else: ``how`` names what."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).relu()
        if self.how == "sum":
            return self.head(y) + y.sum(-1, keepdim=True)
        if self.how == "product":
            return self.head(y) + (y @ y.transpose(-1, -2)).mean(-1, keepdim=True)
        if self.how == "self product":
            return self.head(y @ y.transpose(-1, -2) @ y)
        if self.how == "norm":
            return self.head(self.norm(y))
        if self.how == "softmax":
            return self.head(y.softmax(-1))
        if self.how == "centred weight":
            return F.linear(y, self.head.weight - self.head.weight.mean(1, keepdim=True))
        if self.how == "residual centred weight":
            return self.head(y + F.linear(y, self.two.weight - self.two.weight.mean(1, keepdim=True)))
        if self.how == "recurrent":
            return self.head(self.recurrent(y)[0])
        if self.how == "residual":
            return self.head(y + self.two(y))
        return self.head(y)


HOWS = ["sum", "product", "self product", "norm", "softmax", "centred weight", "residual centred weight", "recurrent"]


@pytest.mark.parametrize("how", HOWS)
def test_what_something_else_takes_up_stays(how: str) -> None:
    model = randomise(Strange(how)).eval()
    zero(model, "head.weight", 1, 2, 3)
    x = torch.randn(3, 5, 6)
    small, zeroed = cut(model, x)
    assert small.get_parameter("head.weight").shape == (4, 8)
    check(small, zeroed, x)


def test_what_nothing_else_takes_up_goes() -> None:
    """The nets of the test above lose channels but for what is strange in them."""
    x = torch.randn(3, 5, 6)
    for how, names in (("", ["head.weight"]), ("residual", ["head.weight", "two.weight"])):
        model = randomise(Strange(how)).eval()
        for name in names:
            zero(model, name, 1, 2, 3)
        if how:
            zero(model, "two.weight", 0, 2, 3)  # a layer that both reads and makes a channel counts whole
        small, zeroed = cut(model, x)
        assert small.get_parameter("head.weight").shape == (4, 6)
        check(small, zeroed, x)


class Separate(nn.Module):
    """Attention of two heads with a projection each for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.proj = (nn.Linear(6, 8) for _ in range(4))
        self.proj = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, 2, 4).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 8))


def test_values_of_attention_go_and_queries_stay() -> None:
    model, x = randomise(Separate()).eval(), torch.randn(3, 5, 6)
    zero(model, "proj.weight", 1, 0, 4)  # the first channel of every head
    zero(model, "query.weight", 0, 1, 5)
    for attention, value in (("uneven", 6), ("head_dim", 8)):  # as wide as queries where a head has one width
        small, zeroed = cut(model, x, attention=attention)
        widths = [small.get_parameter(f"{name}.weight").shape[0] for name in ("query", "key", "value")]
        assert widths == [8, 8, value]
        check(small, zeroed, x)
    packed = make(Attentive)  # where values are cut with the queries that lie beside them
    zero(packed, "proj.weight", 1, 0, 4, 8, 12)
    small, zeroed = cut(packed)
    assert small.get_parameter("qkv.weight").shape == (48, 16)
    check(small, zeroed, image(5))


# -- a training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [Attentive, Dense, Small])
def test_a_whole_run(net: type[nn.Module]) -> None:
    """On a transformer, with concatenations, on a residual network: as many weights as are to stay, proven."""
    model = make(net)
    classes = 10 if net is Small else 4
    with Unchanged(model):
        small = fxprune.prune(
            model, image(), method=GSM(compression=8, lr=0.05, momentum=0.9, weight_decay=0.05),
            data=batches(classes), epochs=4, progress=False,
        )  # fmt: skip
    report = small.meta["fxprune"]
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    left = sum(int(p.count_nonzero()) for p in small.parameters() if p.ndim > 1)
    removed = int(report.notes[-1].split("reads ")[1].split()[0])
    assert report.notes[-1] == f"{total // 8} of {total} weights are not zero; no weight reads {removed} channels"
    assert 0 < left <= total // 8
    assert (left < total // 8) <= (removed > 0)
    assert report.oracle_error < 1e-5
    assert report.zeros == sum(int((p == 0).sum()) for p in small.parameters() if p.ndim > 1)
    assert f"  ({report.zeros / report.params_after:.1%})" in str(report).partition("\nzeros ")[2]


def test_the_support_is_told_beside_the_cut() -> None:
    """Of every epoch, of those before a checkpoint too; and right before the cut."""
    training = begun(make(), compression=10)
    with torch.no_grad():
        for name, parameter in training.model.named_parameters():
            parameter.fill_(2e-4 if name == "head.weight" else -0.9e-4)
        training.after_epoch(0.5)
        training.model.get_parameter("up.0.weight").fill_(-1.0)
    head, up = 10 * 16, 24 * 16 * 9
    resumed = begun(make(), compression=10).hooks
    resumed.load_state_dict(training.hooks.state_dict())
    assert resumed.state_dict() == {"epochs": 1, "support": [head]}
    total = sum(p.numel() for p in make().parameters() if p.ndim > 1)
    assert training.hooks.outcome().notes[0] == (
        f"{head + up} of {total} weights were above 0.0001 in size before the cut ({head} after the first epoch)"
    )


def test_the_default_and_its_own_optimizer_and_schedule() -> None:
    training = fxprune.attach(make(), image(), method="gsm", progress=False)
    optimizer = training.optimizer()
    assert isinstance(optimizer, optim.GSM)
    assert {k: optimizer.defaults[k] for k in ("lr", "momentum", "weight_decay", "compression", "nesterov")} == {
        "lr": 5e-3, "momentum": 0.98, "weight_decay": 1e-4, "compression": 10.0, "nesterov": False,
    }  # fmt: skip
    schedule = training.hooks.schedule(optimizer, 600)
    rates = []
    for _ in range(600):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        assert schedule is not None
        schedule.step()
    assert rates == pytest.approx([5e-3] * 400 + [5e-4] * 100 + [5e-5] * 100), "the paper's ResNet-56"


class Interrupted:
    """A loader that stops the program in the third epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Any:
        self.epoch += 1
        if self.epoch == 3:
            raise KeyboardInterrupt
        return iter(batches(10))


@pytest.mark.parametrize("freeze", [None, 0.4])
@pytest.mark.parametrize("budget", [{}, {"flops": 0.6}])
def test_a_training_goes_on_from_its_checkpoint(tmp_path: Any, freeze: float | None, budget: dict[str, float]) -> None:
    path = tmp_path / "run.pt"
    method = GSM(compression=None if budget else 5, lr=0.05, momentum=0.9, freeze=freeze)
    settings: Any = {"method": method, "epochs": 4, "progress": False, **budget}

    def run(data: Any, **loop: Any) -> Any:
        options = fxprune.Options(loop=fxprune.Loop(checkpoint=path, **loop))
        return fxprune.prune(make(), image(), data=data, options=options, **settings)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted())
    again, whole = run(batches(10), resume=path), run(batches(10))
    one, other = whole.state_dict(), again.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_cut_changes_little_after_a_training_and_much_without() -> None:
    def spread(**options: Any) -> float:
        model = make()
        training = begun(model, compression=10, **options)
        optimizer = training.optimizer()
        for _ in range(40):
            for x, y in batches(10):
                optimizer.zero_grad()
                training.loss(F.cross_entropy(training.model(x), y)).backward()
                training.after_backward()
                optimizer.step()
                training.after_step()
        dense = copy.deepcopy(training.model).eval()
        with torch.no_grad():
            before, after = dense(image(8)), training.finish().eval()(image(8))
        return float((before - after).norm() / before.norm())

    # With momentum and decay a passive weight is multiplied by e^-6.4.
    assert spread(lr=0.02, momentum=0.95, weight_decay=0.2) < 0.5 * spread(lr=0.02, momentum=0.0, weight_decay=1e-4)


class Watched(optim.GSM):
    """Remembers after how many steps its set was held."""

    steps = 0
    held: int | None = None

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)

    def freeze(self) -> None:
        self.held = self.steps
        super().freeze()


@pytest.mark.parametrize(("freeze", "epochs"), [(0.0, 0), (0.5, 2), (0.6, 2), (0.74, 3)])
def test_the_active_set_is_held_after_a_share_of_the_epochs(freeze: float, epochs: int) -> None:
    made: list[Watched] = []

    def optimizer(parameters: Any) -> Watched:
        made.append(Watched(parameters, compression=5))
        return made[-1]

    loop = fxprune.Loop(optimizer=optimizer)
    small = fxprune.prune(
        make(), image(), method=GSM(compression=5, freeze=freeze), data=batches(10), epochs=4, progress=False,
        options=fxprune.Options(loop=loop),
    )  # fmt: skip
    assert made[0].held == 2 * epochs  # of two batches each
    assert small.meta["fxprune"].notes[-1] == f"the active set was held after {epochs} of 4 epochs"


def test_where_no_set_is_held_it_is_told() -> None:
    training = begun(make(), compression=5, freeze=0.5)
    training.after_epoch(0.5)
    note = "freeze=0.5 held nothing: it counts epochs of fxprune's own loop"
    assert training.finish().meta["fxprune"].notes[-1] == note
    for share in (-0.1, 1.0, float("nan"), "half", True):
        with pytest.raises(InputError, match=rf"freeze={share!r} is a share of the epochs"):
            GSM(freeze=share)
    late = GSM(compression=5, freeze=0.9)
    small = fxprune.prune(make(), image(), method=late, data=batches(10), epochs=2, progress=False)
    note = "the training ended before the active set was held, after 2 epochs"
    assert small.meta["fxprune"].notes[-1] == note
    with pytest.raises(InputError, match=r"freeze=0.5 holds the active set of fxprune.optim.GSM; SGD has none"):
        fxprune.prune(
            make(), image(), method=GSM(compression=5, freeze=0.5), data=batches(10), epochs=2, progress=False,
            options=fxprune.Options(loop=fxprune.Loop(optimizer=lambda p: torch.optim.SGD(p, 0.1))),
        )  # fmt: skip


# -- a pattern ---------------------------------------------------------------------------------------------------------


class Reading(nn.Module):
    """Layers that read along different dims, a number of inputs that is no multiple of four, and one table for two."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(20, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.product, self.turned = nn.Parameter(torch.randn(8, 12)), nn.ConvTranspose1d(12, 8, 3, padding=1)
        self.grouped, self.depthwise = nn.Conv1d(8, 8, 1, groups=2), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.odd, self.even = nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = (self.table(x) + self.place) @ self.product
        x = self.depthwise(self.grouped(self.turned(x.transpose(1, 2)).relu())).transpose(1, 2)
        return self.head(self.even(self.odd(x).relu()))


def test_two_of_every_four_stay_along_what_each_layer_reads() -> None:
    model, x = randomise(Reading()).eval(), torch.randint(0, 20, (2, 5))
    training = fxprune.attach(model, x, method=GSM(pattern="2:4"), progress=False)
    optimizer = training.optimizer()
    F.cross_entropy(training.model(x).flatten(0, 1), x.flatten()).backward()
    optimizer.step()
    small = training.finish()
    state = {name: value != 0 for name, value in small.state_dict().items()}
    for name, blocks in (
        ("table.weight", state["table.weight"].view(20, 2, 4).sum(2)),
        ("product", state["product"].view(2, 4, 12).sum(1)),
        ("turned.weight", state["turned.weight"].view(3, 4, 8, 3).sum(1)),
        ("grouped.weight", state["grouped.weight"].view(8, 4).sum(1)),
        ("odd.weight", state["odd.weight"].view(6, 2, 4).sum(2)),
    ):
        assert set(blocks.flatten().tolist()) == {2}, name
    for name in ("place", "depthwise.weight", "even.weight"):
        assert state[name].all()
    assert small.meta["fxprune"].notes[-1] == (
        "2:4 along the inputs of 5 kernels, of which all channels stay; without it: place (read along no dims), "
        "depthwise.weight (read along no dims), even.weight (6 inputs)"
    )


def test_a_whole_run_in_a_pattern_and_further() -> None:
    """With a compression beside it at most two of every four stay; what no weight reads stays where it is."""
    model = make()
    zero(model, "down.0.weight", 1, 3, 5, 7, 9)
    small = fxprune.prune(
        model, image(), method=GSM(compression=8, lr=1e-3, pattern="2:4", freeze=0.5), data=batches(10), epochs=2,
        progress=False,
    )  # fmt: skip
    kernels = {name: p.detach() for name, p in small.named_parameters() if optim.is_kernel(p)}
    assert {name: p.shape for name, p in kernels.items()} == {
        name: p.shape for name, p in model.named_parameters() if optim.is_kernel(p)
    }
    assert sum(int(p.count_nonzero()) for p in kernels.values()) == sum(p.numel() for p in kernels.values()) // 8
    for name, kernel in kernels.items():
        if name != "stem.0.weight":
            assert all(int(four.count_nonzero(1).max()) <= 2 for four in kernel.split(4, 1))


def test_frozen_weights_are_neither_ranked_nor_cut() -> None:
    """Nothing lets them vanish: a backbone that is not trained would lose weights all the same."""
    model = randomise(Dense())
    model.stem.weight.requires_grad_(False)
    frozen = model.stem.weight.clone()
    small = fxprune.prune(model, image(), method=GSM(4), data=batches(), epochs=1, progress=False)
    kept = small.meta["fxprune"].plan.kept.get("stem.weight", {}).get(0, range(len(frozen)))
    assert torch.equal(small.get_parameter("stem.weight"), frozen[[*kept]])
    rest = sum(p.numel() for p in model.parameters() if p.ndim > 1 and p.requires_grad)
    notes = small.meta["fxprune"].notes
    assert any(note.startswith(f"{rest // 4} of {rest} weights are not zero") for note in notes)
    assert "frozen weights stay as they are: stem.weight" in notes


class Beside(Dense):
    """With a head that training alone would use, and a graph does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Linear(18, 90)


def test_weights_that_nothing_uses_are_neither_ranked_nor_cut() -> None:
    """No gradient makes them vanish: larger than the others, they were all that the cut left."""
    model, alone = randomise(Beside()), randomise(Dense())
    with torch.no_grad():
        alone.load_state_dict({name: values for name, values in model.state_dict().items() if "beside" not in name})
        model.beside.weight.fill_(10)
    small, other = (
        fxprune.prune(net, image(), method=GSM(4), data=batches(), epochs=1, progress=False) for net in (model, alone)
    )
    assert torch.equal(small.get_parameter("beside.weight"), model.beside.weight)
    assert all(torch.equal(small.get_parameter(name), p) for name, p in other.named_parameters())
    *notes, told = small.meta["fxprune"].notes
    assert (*notes,) == other.meta["fxprune"].notes
    assert told == "weights that the network does not use stay as they are: beside.weight"


class Fixed(nn.Module):
    """A linear map that is no parameter, as of a transform or of a head that is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_buffer("weight"))


def test_a_buffer_reads_as_any_weight_does_and_is_not_cut_itself() -> None:
    model = randomise(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Fixed(), nn.ReLU(), nn.Linear(12, 4))).eval()
    model[2].get_buffer("weight")[:, [3, 5]] = 0
    x = torch.randn(7, 6)
    small, zeroed = cut(model, x)
    assert [small.get_parameter("0.weight").shape[0], *small.get_buffer("2.weight").shape] == [14, 12, 14]
    check(small, zeroed, x)


def test_patterns_of_a_method_that_cannot_be() -> None:
    with pytest.raises(InputError, match=r"^pattern='4:2' must be like '2:4'"):
        GSM(pattern="4:2")
    with pytest.raises(InputError, match=r"^pattern='2:4' is of single weights; structured=True ranks channels"):
        GSM(pattern="2:4", structured=True)
    with pytest.raises(InputError, match=r"^GSM\(pattern='2:4'\) says itself how much goes: leave out flops=0\.5\.$"):
        fxprune.attach(make(), image(), method=GSM(pattern="2:4"), flops=0.5)
    message = r"^pattern='2:4' fits no layer, whose inputs must be a multiple of 4: 0\.weight \(6 inputs\), 2\.weight"
    with pytest.raises(InputError, match=message):
        fxprune.attach(chain(6, 10, 4), torch.randn(2, 6), method=GSM(pattern="2:4"))


# -- whole channels ----------------------------------------------------------------------------------------------------


def structured(model: nn.Module, **options: Any) -> Training:
    budget = {"flops": 0.5} | options.pop("budget", {})
    return fxprune.attach(model, image(), method=GSM(structured=True, **options), progress=False, **budget)


def test_channels_are_ranked_by_what_they_own_within_the_budget() -> None:
    training = structured(make(), lr=0.1, momentum=0.9, weight_decay=0.0)
    graph, optimizer = training.graph, training.optimizer()
    F.cross_entropy(training.model(image()), torch.tensor([1, 2])).backward()
    named = dict(training.model.named_parameters())
    score = {n: (p.grad * p).detach().double() for n, p in named.items()}  # type: ignore[operator]
    group = next(g for g in graph.prunable if g.name == "up.0")
    by_hand = sum(
        score[name].transpose(0, dim).flatten(1 if score[name].ndim > 1 else 0).reshape(24, -1).sum(1)
        for name, dim in [("up.0.weight", 0), ("up.0.bias", 0), ("up.1.weight", 0), ("up.1.bias", 0),
                          ("down.0.weight", 1)]
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer.step()
    active = training.hooks.alive()
    assert active is not None
    ratio = graph.macs(active) / graph.macs()
    assert 0.45 < ratio <= 0.5
    marks = torch.from_numpy(active[sorted(group.channels.reshape(-1))])
    assert isinstance(by_hand, Tensor)
    assert 0 < int(marks.sum()) < 24
    assert float(by_hand.abs()[marks].min()) >= float(by_hand.abs()[~marks].max())
    moved = {name: p.detach() != before[name] for name, p in named.items()}
    for name in ("up.0.weight", "up.0.bias", "up.1.weight", "up.1.bias"):
        assert moved[name][marks].any()
        assert not moved[name][~marks].any()
    assert not moved["down.0.weight"][:, ~marks].any()


def test_channels_with_the_largest_norms_are_held() -> None:
    training = structured(make(), freeze=0.0, lr=1e-3, momentum=0.0, weight_decay=0.0)
    training.hooks.begins(optimizer := training.optimizer(), 3)
    kept = training.hooks.alive()
    assert kept is not None
    before = copy.deepcopy(dict(training.model.named_parameters()))
    for factor in (1, -2, 3):
        optimizer.zero_grad()
        F.cross_entropy(training.model(factor * image()), torch.tensor([1, 2])).backward()
        optimizer.step()
        assert training.hooks.alive() is kept
    group = next(g for g in training.graph.prunable if g.name == "up.0")
    marks = torch.from_numpy(kept[sorted(group.channels.reshape(-1))])
    moved = training.model.get_parameter("up.0.weight") != before["up.0.weight"]
    assert moved[marks].flatten(1).any(1).all()
    assert not moved[~marks].any()
    plan = training.finish().meta["fxprune"].plan
    assert plan.kept["up.0.weight"][0] == marks.nonzero().flatten().tolist()


def test_passive_channels_decay_whole_and_go() -> None:
    training = structured(make(), lr=0.02, momentum=0.95, weight_decay=0.1)
    optimizer = training.optimizer()
    for _ in range(20):
        for x, y in batches(10):
            optimizer.zero_grad()
            F.cross_entropy(training.model(x), y).backward()
            optimizer.step()
    small = training.finish()
    report = small.meta["fxprune"]
    assert 0.45 < report.macs_after / report.macs_before <= 0.5
    assert report.oracle_error < 1e-5
    trained = dict(training.model.named_parameters())
    kept = report.plan.kept["up.1.weight"][0]
    gone = [i for i in range(24) if i not in kept]
    for name in ("up.1.weight", "up.1.bias"):
        assert float(trained[name].detach()[gone].abs().mean()) < 0.8 * float(trained[name].detach()[kept].abs().mean())


def test_a_copy_of_a_learner_and_its_optimizer_goes_on_alike() -> None:
    training = structured(make(), lr=0.02, momentum=0.9, weight_decay=0.01)
    optimizer = training.optimizer()

    def step(training: Training, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        optimizer.zero_grad()
        F.cross_entropy(training.model.eval()(image()), torch.tensor([1, 2])).backward()
        optimizer.step()
        return [p.detach().clone() for p in training.model.parameters()]

    step(training, optimizer)
    other = copy.deepcopy((training, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(step(*other), step(training, optimizer), strict=True))
    assert other[0].hooks.alive() is not training.hooks.alive()


@pytest.mark.parametrize("net", [Attentive, Dense])
def test_a_whole_structured_run(net: type[nn.Module]) -> None:
    small = fxprune.prune(
        make(net), image(), method=GSM(structured=True, lr=0.05, momentum=0.9), flops=0.6, data=batches(), epochs=1,
        progress=False,
    )  # fmt: skip
    report = small.meta["fxprune"]
    assert 0.5 < report.macs_after / report.macs_before <= 0.6
    assert report.oracle_error < 1e-5


def test_a_budget_asks_for_whole_channels() -> None:
    """One call for all methods; without a budget the method's own compression counts."""
    options: Any = {"data": batches(), "epochs": 1, "progress": False}
    asked, said, neither = (
        fxprune.prune(make(), image(), method=method, **options, **budget)
        for method, budget in (("gsm", {"flops": 0.5}), (GSM(structured=True), {"flops": 0.5}), ("gsm", {}))
    )
    report = asked.meta["fxprune"]
    assert report.method == "GSM(structured=True)"
    assert report.budget == ("flops", 0.5)
    assert report.macs_after <= 0.5 * report.macs_before
    assert report.plan == said.meta["fxprune"].plan
    kernels = [p.detach() for p in neither.parameters() if optim.is_kernel(p)]
    whole = sum(p.numel() for p in make().parameters() if optim.is_kernel(p))
    assert sum(int(p.count_nonzero()) for p in kernels) <= whole // 10
    assert neither.meta["fxprune"].budget is None


def test_a_budget_that_cannot_be_reached_is_told_in_the_first_step() -> None:
    training = structured(make(), budget={"flops": 1e-6})
    F.cross_entropy(training.model(image()), torch.tensor([1, 2])).backward()
    with pytest.raises(BudgetError, match=r"^flops=1e-06 cannot be reached"):
        training.optimizer().step()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_compression_takes_no_budget_and_channels_do() -> None:
    with pytest.raises(InputError, match=r"^GSM\(compression=8\) says itself how much goes: leave out flops=0\.5\.$"):
        fxprune.attach(make(), image(), method=GSM(compression=8), flops=0.5)
    with pytest.raises(InputError, match=r"^compression=8 counts single weights; structured=True ranks channels"):
        GSM(compression=8, structured=True)
    with pytest.raises(InputError, match=r"^No budget: pass one of flops="):
        fxprune.attach(make(), image(), method=GSM(structured=True))
    with pytest.raises(InputError, match=r"^compression=0 must be at least 1"):
        GSM(compression=0)
    with pytest.raises(InputError, match=r"^gsm trains: pass data="):
        fxprune.prune(make(), image(), method="gsm", progress=False)


def test_scores_of_everything() -> None:
    outcome = begun(make(), compression=10).hooks.outcome()
    assert isinstance(outcome, Outcome)
    assert outcome.threshold == 0.0
    assert all(s is not None and set(s.reshape(-1)) <= {0.0, 1.0} for s in outcome.scores)
