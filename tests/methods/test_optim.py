"""Global Sparse Momentum as an optimizer: who is active, what moves the others, and that it is SGD otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Small, image, make
from torch import Tensor, nn

import fxprune
from fxprune import optim
from fxprune.errors import InputError
from fxprune.methods.optim import GSM, active_count, hold_zero, is_kernel, magnitude_cut
from fxprune.methods.patterns import Pattern
from model_zoo import papers

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = torch.tensor([1, 2])


def backward(model: nn.Module, x: Tensor | None = None) -> None:
    F.cross_entropy(model(image() if x is None else x), TARGET).backward()


def kernels(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim > 1]


def active(optimizer: GSM) -> list[Tensor]:
    """Where the gradients that a step would take are not zero, of kernels."""
    return [g != 0 for p, g in optimizer.gradients().items() if is_kernel(p)]


def joined(parts: list[Any]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts])


def single(value: float, gradient: float, **options: Any) -> tuple[nn.Parameter, GSM]:
    """One passive weight of this value beside a weight that is always active."""
    weight = nn.Parameter(torch.tensor([[value, 1.0]], dtype=torch.float64))
    weight.grad = torch.tensor([[gradient, 1e9]], dtype=torch.float64)
    return weight, GSM([weight], compression=2, **options)


# -- which weights are active ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [1.5, 4, 10, 60.0, 1000])
def test_exactly_so_many_are_active_over_the_whole_model(compression: float) -> None:
    model = make()
    backward(model)
    optimizer = GSM(model.parameters(), compression=compression)
    marks = joined(active(optimizer))
    count = active_count(len(marks), compression)
    assert int(marks.sum()) == count == int(len(marks) / compression)
    products = joined([p * p.grad for p in kernels(model)]).abs()
    assert set(products.topk(count).indices.tolist()) == set(marks.nonzero().flatten().tolist())
    shares = {round(float(part.float().mean()), 3) for part in active(optimizer)}
    assert len(shares) > 1, "every layer has the same share: the ranking is not global"


@pytest.mark.parametrize(
    ("weights", "compression", "count"),
    [(266_200, 60, 4436), (430_500, 125, 3444), (430_500, 300, 1435), (851_504, 10, 85_150), (5, 1, 5)],
)
def test_the_papers_counts(weights: int, compression: float, count: int) -> None:
    assert active_count(weights, compression) == count


def test_the_papers_networks_have_these_weights() -> None:
    networks = (papers.lenet_300_100(), papers.lenet_5(), papers.PAPERS["resnet_56"]())
    assert [sum(p.numel() for p in kernels(net)) for net in networks] == [266_200, 430_500, 851_504]


def test_equal_products_are_taken_from_the_first_on() -> None:
    first, second = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    first.grad, second.grad = torch.ones(2, 3), torch.ones(2, 3)
    second.grad[1, 2] = 2
    one, two = active(GSM([first, second], compression=3))  # 4 of 12
    assert one.flatten().tolist() == [True, True, True, False, False, False]
    assert two.flatten().tolist() == [False] * 5 + [True]


def test_zeros_fill_up_what_is_missing() -> None:
    """Fewer products than are to be active: a threshold of zero would let every weight be active."""
    weight = nn.Parameter(torch.tensor([[0.0, 0, 0, 0, 2, 0]]))
    weight.grad = torch.tensor([[1.0, 2, 3, 4, 5, 6]])
    (found,) = GSM([weight], compression=2).gradients().values()
    assert found.tolist() == [[1, 2, 0, 0, 5, 0]]


def test_weights_without_a_gradient_are_counted_but_not_ranked() -> None:
    model = make()
    backward(model)
    model.get_parameter("up.0.weight").grad = None
    total = sum(p.numel() for p in kernels(model))
    optimizer = GSM(model.parameters(), compression=10)
    assert int(joined(active(optimizer)).sum()) == total // 10
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert torch.equal(model.get_parameter("up.0.weight"), before["up.0.weight"])


def test_halves_are_ranked_by_products_that_do_not_underflow() -> None:
    weight = nn.Parameter(torch.tensor([[1e-3, 2e-3, 3e-3, 4e-3]], dtype=torch.float16))
    weight.grad = torch.full((1, 4), 1e-6, dtype=torch.float16)
    (found,) = GSM([weight], compression=2).gradients().values()
    assert found.dtype == torch.float16
    assert (found != 0).tolist() == [[False, False, True, True]]


def scores(kind: str, n: int = 3001) -> Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(0)).abs()
    match kind:
        case "sorted":
            return values.sort().values
        case "rounded":
            return values.mul(5).round()
        case "zeros":
            return values * (values > 2)
        case "equal":
            return torch.ones(n)
        case "periodic":  # the sample sees nothing else
            return values + 10 * (torch.arange(n) % optim.stride(n) == 0)
    return values


@pytest.mark.parametrize("count", [1, 5, 300, 1500, 2999, 3000])
@pytest.mark.parametrize("kind", ["normal", "sorted", "rounded", "zeros", "equal", "periodic"])
def test_the_largest_that_is_left_out_is_found_from_a_sample(
    kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = scores(kind)
    order = values.sort(descending=True).values
    monkeypatch.setattr(optim, "MANY", 64)
    found, equal = optim.largest_left_out(values, count)
    assert found == order[count]
    assert equal == int((order[:count] == order[count]).sum())


def test_a_sample_leaves_few_scores_to_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_ones: list[int] = []
    topk = torch.topk

    def noted(values: Tensor, *args: Any, **options: Any) -> Any:
        sorted_ones.append(len(values))
        return topk(values, *args, **options)

    monkeypatch.setattr(torch, "topk", noted)
    size = optim.MANY + 1
    for kind in ("normal", "periodic"):
        optim.largest_left_out(scores(kind, size), size // 4)
    assert sorted_ones[0] < size // 4
    assert sorted_ones[1] == size, "the sample is unlike the others: all are looked at"


@pytest.mark.parametrize("cached", [1, 500, 10**9])
def test_how_many_tensors_are_updated_at_a_time_changes_nothing(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make(), make()]
    for model, limit in zip(models, (optim.CACHED, cached), strict=True):
        monkeypatch.setattr(optim, "CACHED", limit)
        optimizer = GSM(model.parameters(), 0.1, 0.9, 0.01, compression=10)
        for step in range(3):
            optimizer.zero_grad()
            backward(model, image() + step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))


def test_groups_of_equal_compression_are_ranked_together() -> None:
    a, b, c = (nn.Parameter(torch.full((1, 4), value)) for value in (1.0, 2.0, 1e-6))
    for parameter in (a, b, c):
        parameter.grad = torch.ones(1, 4)
    groups = [{"params": [a]}, {"params": [b], "lr": 0.5}, {"params": [c], "compression": 1}]
    marks = active(GSM(groups, compression=2))
    assert [int(mark.sum()) for mark in marks] == [0, 4, 4]


def test_a_gradient_is_left_as_it_is_and_channels_last_is_no_matter() -> None:
    plain, last = make(), make().to(memory_format=torch.channels_last)
    optimizers = []
    for model in (plain, last):
        backward(model)
        optimizers.append(GSM(model.parameters(), compression=10))
    last.up[0].weight.grad = plain.up[0].weight.grad.clone(memory_format=torch.preserve_format)
    for p, q in zip(plain.parameters(), last.parameters(), strict=True):
        q.grad = p.grad.clone() if p.ndim < 4 else p.grad.to(memory_format=torch.channels_last)
    before = [p.grad.clone() for p in plain.parameters()]
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(plain.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), last.parameters(), strict=True))


# -- a pattern ---------------------------------------------------------------------------------------------------------


def rows(*values: list[float]) -> nn.Parameter:
    weight = nn.Parameter(torch.tensor(values, dtype=torch.float32))
    weight.grad = torch.ones_like(weight)
    return weight


@pytest.mark.parametrize(
    ("compression", "expected"),
    [
        (1, [[1, 0, 3, 0, 5, 5, 0, 0], [0, 0, 9, 8, 0, 1, 2, 0]]),
        (2.28, [[1, 0, 3, 0, 5, 5, 0, 0], [0, 0, 9, 8, 0, 0, 2, 0]]),  # 7 of 16
        (3.2, [[0, 0, 3, 0, 5, 5, 0, 0], [0, 0, 9, 8, 0, 0, 0, 0]]),
    ],
)
def test_the_largest_of_the_model_among_two_of_every_four(compression: float, expected: list[list[float]]) -> None:
    """Of equal ones the first, in a four as in the model."""
    weight = rows([1, 1, 3, 0, 5, 5, 5, 5], [1, 7, 9, 8, 0, 1, 2, 1])
    optimizer = GSM([weight], compression=compression, pattern="2:4")
    before = weight.detach().clone()
    (found,) = optimizer.gradients().values()
    assert (found * weight).tolist() == expected
    optimizer.freeze()
    weight.detach().zero_()
    (found,) = optimizer.gradients().values()
    assert (found * before).tolist() == expected
    weight.detach().copy_(-before)
    (mask,) = magnitude_cut([weight], compression, "2:4")
    assert (-weight).tolist() == expected
    assert torch.equal(mask, weight != 0)


def test_a_pattern_lies_along_what_a_layer_reads() -> None:
    linear, conv, odd, transposed = (torch.randn(shape) for shape in ((3, 8), (5, 4, 3, 3), (4, 6), (8, 3, 2)))
    bias = torch.randn(8)
    masks = magnitude_cut([linear, conv, odd, transposed, bias], 1, "2:4")
    assert [int(mask.sum()) for mask in masks] == [12, 90, 24, 48, 8]
    assert (masks[0].view(3, 2, 4).sum(2) == 2).all()
    assert (masks[1].sum(1) == 2).all()
    (mask,) = magnitude_cut([transposed], 1, [Pattern.parse("1:4", dim=0)])
    assert (mask.view(2, 4, 3, 2).sum(1) == 1).all()


def test_groups_have_patterns_of_their_own() -> None:
    one, other, free = (rows([1, 2, 3, 4, 5, 6, 7, 8]) for _ in range(3))
    turned = nn.Parameter(torch.arange(1.0, 9).view(8, 1))
    turned.grad = torch.ones(8, 1)
    groups = [
        {"params": [one], "pattern": "1:4"},
        {"params": [turned], "pattern": "2:4", "input_dim": 0},
        {"params": [other], "pattern": "3:8", "compression": 8},
        {"params": [free]},
    ]
    marks = [mark.flatten().nonzero().flatten().tolist() for mark in active(GSM(groups, compression=1))]
    assert marks == [[3, 7], [2, 3, 6, 7], [7], [*range(8)]]


def test_patterns_that_cannot_be() -> None:
    for text in ("4:2", "2:2", "0:4", "2", "2:4:8", "2:40000", "", 24, True, "٢:٤"):
        with pytest.raises(InputError, match=rf"^pattern={text!r} must be like '2:4': at most 2 of every 4 weights"):
            GSM([rows([1, 2, 3, 4])], pattern=text)
    bias, odd = nn.Parameter(torch.ones(4)), rows([1, 2, 3])
    message = r"^pattern='2:4' fits no kernel: of none dim 1 is there and a multiple of 4\.$"
    for refused in (
        lambda: GSM([bias, odd], compression=1, pattern="2:4"),
        lambda: GSM([{"params": [rows([1, 2, 3, 4])]}, {"params": [odd], "pattern": "2:4"}], compression=1),
        lambda: magnitude_cut([bias, odd], 1, "2:4"),
    ):
        with pytest.raises(InputError, match=message):
            refused()
    with pytest.raises(InputError, match=r"^input_dim=-1 must be a whole number of at least 0"):
        GSM([odd], input_dim=-1)


# -- a set that is held ------------------------------------------------------------------------------------------------


def test_the_set_that_is_held_has_the_largest_weights_of_the_whole_model_whatever_their_gradients() -> None:
    model = make()
    optimizer = GSM(model.parameters(), lr=0.0, compression=10)
    optimizer.freeze()
    with torch.no_grad():
        expected = [w.clone() for w in kernels(model)]
        cut = copy.deepcopy(model)
        magnitude_cut(cut.parameters(), 10)
    for factor in (1.0, -3.0):
        optimizer.zero_grad()
        backward(model, factor * image())
        gradients = optimizer.gradients()
        for weight, left, before in zip(kernels(model), kernels(cut), expected, strict=True):
            assert weight.grad is not None
            assert torch.equal(gradients[weight], weight.grad * (left != 0))
            assert torch.equal(weight, before)
        assert all(gradients[p] is p.grad for p in model.parameters() if p.ndim < 2)


@pytest.mark.parametrize("held", [False, True])
def test_the_cut_is_free_once_the_set_was_held_for_long_enough(held: bool) -> None:
    """Weights that would take turns in the set: random gradients let every one of them be active now and then."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(20, 20, generator=generator))
    optimizer = GSM([weight], lr=0.01, momentum=0.9, weight_decay=0.1, compression=10)
    if held:
        optimizer.freeze()
    for _ in range(1500):  # exp(-1500 * 0.01 * 0.1 / 0.1) = 3e-7
        weight.grad = torch.randn(20, 20, generator=generator)
        optimizer.step()
    assert (optim.support([weight]) == 40) == held


def test_a_held_set_is_part_of_the_state() -> None:
    model = make()
    optimizer = GSM(model.parameters(), compression=10)
    optimizer.freeze()
    backward(model)
    expected = active(optimizer)
    with torch.no_grad():
        for weight in kernels(model):
            weight.copy_(weight.flip(0))
    again = GSM(model.parameters(), compression=10)
    assert any(not torch.equal(one, other) for one, other in zip(active(again), expected, strict=True))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(torch.equal(one, other) for one, other in zip(active(again), expected, strict=True))
    again.step()
    again.freeze()
    assert any(not torch.equal(one, other) for one, other in zip(active(again), expected, strict=True))


def test_weights_that_come_later_are_not_held() -> None:
    first, later = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = GSM([first], compression=3)
    optimizer.freeze()
    optimizer.add_param_group({"params": [later]})
    first.grad, later.grad = torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(InputError, match=r"added after freeze\(\). Call freeze\(\) again"):
        optimizer.step()
    optimizer.freeze()
    assert sum(int(mask.sum()) for mask in active(optimizer)) == 4
    whole = GSM([first], compression=1)
    whole.freeze()
    assert whole.gradients()[first] is first.grad


# -- what a step does --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
def test_without_compression_it_is_sgd_bit_by_bit(momentum: float, nesterov: bool, foreach: bool) -> None:
    ours, theirs = make(), make()
    one = GSM(ours.parameters(), 0.1, momentum, 0.01, compression=1, nesterov=nesterov, foreach=foreach)
    groups = [
        {"params": kernels(theirs)},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    other = torch.optim.SGD(groups, 0.1, momentum, weight_decay=0.01, nesterov=nesterov, foreach=foreach)
    for step in range(4):
        for model, optimizer in ((ours, one), (theirs, other)):
            optimizer.zero_grad()
            backward(model, image() + step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_passive_weight_is_moved_by_its_momentum_and_decays() -> None:
    weight, optimizer = single(1.0, gradient=0.5, lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizer.state[weight]["momentum_buffer"] = torch.tensor([[2.0, 0.0]], dtype=torch.float64)  # was active before
    optimizer.step()
    moved = 0.9 * 2.0 + 0.01 * 1.0
    assert float(optimizer.state[weight]["momentum_buffer"][0, 0]) == pytest.approx(moved)
    assert weight[0, 0].item() == pytest.approx(1 - 0.1 * moved)


@pytest.mark.parametrize(("momentum", "left"), [(0.0, 0.9753), (0.9, 0.7789), (0.98, 0.2860), (0.99, 0.0789)])
def test_how_far_a_passive_weight_has_decayed(momentum: float, left: float) -> None:
    weight, optimizer = single(1.0, gradient=1e-9, lr=5e-3, momentum=momentum, weight_decay=5e-4)
    weight.grad[0, 1] = 1.0  # type: ignore[index]
    w, z = 1.0, 0.0
    for step in range(10_000):
        z = momentum * z + 5e-4 * w
        w -= 5e-3 * z
        if step < 100:
            optimizer.step()
            assert weight[0, 0].item() == pytest.approx(w, rel=1e-9)
    assert w == pytest.approx(left, abs=1e-4)


def test_a_passive_weight_comes_back() -> None:
    weight, optimizer = single(1e-3, gradient=0.0, lr=0.1, momentum=0.9, weight_decay=0.0)
    optimizer.step()
    assert weight[0, 0].item() == 1e-3
    weight.grad = torch.tensor([[1e15, 1.0]], dtype=torch.float64)
    optimizer.step()
    assert weight[0, 0].item() < -1e13


def test_biases_and_norms_get_their_whole_gradient_and_no_decay() -> None:
    model, plain = make(), make()
    backward(model)
    backward(plain)
    GSM(model.parameters(), 0.1, 0.9, 0.5, compression=100).step()
    torch.optim.SGD(plain.parameters(), 0.1, 0.9).step()
    checked = 0
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if p.ndim < 2:
            assert torch.equal(p, q)
            checked += 1
    assert checked > 5
    decayed = make()
    backward(decayed)
    GSM(decayed.parameters(), 0.1, 0.9, 0.5, compression=100, vector_decay=0.5).step()
    assert not torch.equal(decayed.head.bias, plain.head.bias)


def test_accumulated_gradients_are_ranked_as_one() -> None:
    together, apart = make(), make()
    x = torch.cat([image(), image() + 1])
    (F.cross_entropy(together(x), TARGET.repeat(2)) * 2).backward()
    backward(apart, x[:2])
    backward(apart, x[2:])
    one, other = (joined(active(GSM(model.parameters(), compression=20))) for model in (together, apart))
    assert int((one != other).sum()) <= 2  # the sums differ in the last bit


def test_clipping_before_the_step_scales_what_active_weights_get() -> None:
    model = make()
    backward(model)
    optimizer = GSM(model.parameters(), compression=10)
    before = optimizer.gradients()
    whole = {p: g.clone() for p, g in before.items()}
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    assert float(norm) > 1e-2
    for parameter, gradient in optimizer.gradients().items():
        torch.testing.assert_close(gradient, whole[parameter] * 1e-2 / (float(norm) + 1e-6))


def test_a_scaler_unscales_before_the_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled, plain = make(), make()
    optimizers = [GSM(model.parameters(), 0.1, 0.9, compression=10) for model in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen: list[float] = []
    gradients = GSM.gradients

    def noted(self: GSM) -> Any:
        seen.append(float(scaled.head.weight.grad.abs().max()))
        return gradients(self)

    monkeypatch.setattr(GSM, "gradients", noted)
    scaler.scale(F.cross_entropy(scaled(image()), TARGET)).backward()
    scaler.step(optimizers[0])
    backward(plain)
    optimizers[1].step()
    assert seen[0] == pytest.approx(float(plain.head.weight.grad.abs().max()), rel=1e-5)
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    scaler.update()
    before = copy.deepcopy(scaled.state_dict())
    scaled.head.weight.grad.fill_(torch.inf)
    scaler.step(optimizers[0])
    assert all(torch.equal(value, before[name]) for name, value in scaled.state_dict().items())


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model = make()
    optimizer = GSM(model.parameters(), compression=10)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(image()), TARGET)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert len(calls) == 1
    assert loss.item() > 0
    assert "momentum_buffer" in optimizer.state[model.head.weight]


@pytest.mark.parametrize("again", [lambda o, m: None, lambda o, m: copy.deepcopy(o.state_dict())])
def test_a_state_goes_on_in_a_fresh_optimizer(again: Callable[[Any, Any], Any]) -> None:
    """With the options of the groups; steps after it are those without the interruption."""
    straight, broken = make(), make()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "compression": 10, "nesterov": True}
    one, other = GSM(straight.parameters(), **options), GSM(broken.parameters(), **options)
    for step in range(4):
        state = again(other, broken)
        if state is not None:
            other = GSM(broken.parameters(), lr=7, compression=3)
            other.load_state_dict(state)
        for model, optimizer in ((straight, one), (broken, other)):
            optimizer.zero_grad()
            backward(model, image() + step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), broken.parameters(), strict=True))


def test_a_state_of_sgd_can_be_taken_up() -> None:
    model = make()
    sgd = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    backward(model)
    sgd.step()
    optimizer = GSM(model.parameters(), compression=10)
    optimizer.load_state_dict(sgd.state_dict())
    optimizer.step()
    assert int(joined(active(optimizer)).sum()) == sum(p.numel() for p in kernels(model)) // 10


def test_schedules_and_copies() -> None:
    model = make()
    optimizer = GSM(model.parameters(), lr=0.1, compression=10)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])
    backward(model)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    copy.deepcopy(optimizer).step()


def test_replicas_with_the_same_averaged_gradients_stay_together() -> None:
    """What DistributedDataParallel leaves in .grad is the same everywhere, and so is the ranking."""
    replicas = [make() for _ in range(2)]
    optimizers = [GSM(model.parameters(), 0.1, 0.9, compression=20) for model in replicas]
    for _ in range(3):
        for rank, model in enumerate(replicas):
            model.zero_grad()
            backward(model, image() + rank)
        for p, q in zip(*(model.parameters() for model in replicas), strict=True):
            p.grad = (p.grad + q.grad) / 2
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    one, other = (model.state_dict() for model in replicas)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": 0.5}, r"^compression=0.5 must be at least 1: 10 keeps a tenth of the weights\.$"),
        ({"compression": float("nan")}, r"^compression=nan must be at least 1"),
        ({"compression": "10"}, r"^compression=10 must be at least 1"),
        ({"compression": 1e9}, r"^compression=1000000000.0 leaves none of \d+ weights\. Pass at most \d+\.$"),
        ({"lr": -1}, r"^lr=-1 must not be negative\.$"),
        ({"momentum": -0.1}, r"^momentum=-0.1 must not be negative\.$"),
        ({"momentum": 0.0, "nesterov": True}, r"^nesterov=True needs a momentum\.$"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GSM(Small().parameters(), **options)


def test_complex_kernels_are_refused_where_they_would_be_ranked() -> None:
    kernel = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    for ranked in (lambda: optim.GSM([kernel]), lambda: optim.magnitude_cut([kernel], 2.0)):
        with pytest.raises(InputError, match=r"shape \[4, 4\] is complex"):
            ranked()
    before = kernel.detach().clone()
    dense = optim.GSM([kernel], compression=1.0, lr=0.1, weight_decay=0.0)
    kernel.abs().square().sum().backward()
    dense.step()
    torch.testing.assert_close(kernel.detach(), before * 0.8)


def test_a_sparse_gradient_is_refused() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match=r"^GSM ranks dense gradients, and one is sparse\."):
        GSM(table.parameters(), compression=2).step()


# -- the cut -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "compression", "count"), [("lenet_300_100", 60, 4436), ("lenet_5", 125, 3444)])
def test_the_cut_keeps_as_many_as_are_active(network: str, compression: float, count: int) -> None:
    model = papers.PAPERS[network]()
    whole = [p.detach().clone() for p in model.parameters()]
    masks = magnitude_cut(model.parameters(), compression)
    assert sum(int(p.count_nonzero()) for p in kernels(model)) == count
    left = joined([p[m] for p, m in zip(whole, masks, strict=True) if p.ndim > 1]).abs()
    gone = joined([p[~m] for p, m in zip(whole, masks, strict=True) if p.ndim > 1]).abs()
    assert float(left.min()) >= float(gone.max())
    for p, before, mask in zip(model.parameters(), whole, masks, strict=True):
        assert torch.equal(p, before * mask)
        assert p.ndim > 1 or bool(mask.all())


def test_weights_that_are_no_numbers_are_not_ranked() -> None:
    """Not among the largest, not below: all would go, and the network would be one of zeros."""
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = optim.GSM([weight], compression=2)
    weight.detach()[1, 1] = torch.nan
    before = weight.detach().clone()
    for ranked in (lambda: magnitude_cut([weight], 2), optimizer.freeze):
        with pytest.raises(InputError, match=r"^A kernel of shape \[4, 4\] holds NaN, which cannot be ranked"):
            ranked()
    assert torch.equal(weight.nan_to_num(7), before.nan_to_num(7))


def test_the_cut_takes_the_first_of_equal_weights() -> None:
    weight = nn.Parameter(torch.ones(2, 4))
    (mask,) = magnitude_cut([weight], 4)
    assert mask.flatten().tolist() == [True] * 2 + [False] * 6
    assert magnitude_cut([weight], 1)[0].all()
    with pytest.raises(InputError, match=r"^compression=9 leaves none of 8 weights"):
        magnitude_cut([weight], 9)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    ],
)
def test_what_is_held_at_zero_stays_there_in_any_training(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    first = make()
    trained = copy.deepcopy(first)
    masks = magnitude_cut(trained.parameters(), 10)
    handles = hold_zero(first.parameters(), masks)
    moving = optimizer(first.parameters())
    before = [p.detach().clone() for p in first.parameters()]
    for step in range(3):
        moving.zero_grad()
        backward(first, image() + step)
        moving.step()
    for p, start, mask in zip(first.parameters(), before, masks, strict=True):
        assert not p[~mask].any()
        assert bool((p[mask] != start[mask]).any())
    for handle in handles:
        handle.remove()
    moving.zero_grad()
    backward(first)
    moving.step()
    assert sum(int(p.count_nonzero()) for p in kernels(first)) > sum(int(m.sum()) for m in masks if m.ndim > 1)


def test_the_names_are_public() -> None:
    assert fxprune.optim.GSM is GSM


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([], "There are 0 masks for 1 parameters: give one for each."),
        (
            [torch.zeros(4, 3, dtype=torch.bool)],
            "Mask 0 is [4, 3] of torch.bool; its parameter is [3, 4], and masks are boolean.",
        ),
        ([torch.zeros(3, 4)], "Mask 0 is [3, 4] of torch.float32; its parameter is [3, 4], and masks are boolean."),
    ],
)
def test_masks_that_hold_nothing(masks: list[Tensor], message: str) -> None:
    with pytest.raises(InputError) as caught:
        optim.hold_zero([nn.Parameter(torch.ones(3, 4))], masks)
    assert str(caught.value) == message
