"""``method="obs"``: what a refit leaves, computed the long way; channels that others stand in for go first."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune import methods
from fxprune.methods import obs
from fxprune.methods.state import Gate, Measured, Read, Trial
from fxprune.reconstruction import measure_reads, pieces_of


class TwoReaders(nn.Module):
    """A group that two layers read; outputs are theirs, so an error of these is an error of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.one, self.other = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 2, bias=False), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.make(x))
        return self.one(x), 3 * self.other(x)


def measured_on(model: nn.Module, data: Any) -> tuple[fxprune.ChannelGraph, tuple[Read | Gate, ...], Trial]:
    graph, module = fxprune.analyze(model, data[:1]), fxprune.record(model, data[:1])
    record = {"args": (data[:1],), "kwargs": {}}
    return graph, *measure_reads(module, graph, pieces_of(data, record, None, torch.device("cpu")))


def scores_of(model: nn.Module, data: Tensor, method: methods.OBS) -> tuple[fxprune.ChannelGraph, list]:
    graph, reads, _ = measured_on(model, data)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    state = methods.ModelState(graph, tensors, 0, Measured(reads=reads))
    return graph, [None if g.locked else method.score(g, state) for g in graph.groups]


def left_after(x: Tensor, y: Tensor, inputs: list[int]) -> float:
    """``|X W - Y|^2`` per row, of the best W over these inputs. x [R, K], y [R, O]."""
    fitted = x[:, inputs] @ torch.linalg.lstsq(x[:, inputs], y).solution
    return float((fitted - y).square().sum())


def test_the_score_is_what_the_best_refit_leaves() -> None:
    torch.manual_seed(0)
    model, data = TwoReaders().eval().double(), torch.randn(40, 3, 6, 6).double()
    graph, scores = scores_of(model, data, methods.OBS(by_cost=False))
    (group,) = graph.prunable
    (found,) = (s for s in scores if s is not None)
    with torch.no_grad():
        hidden = F.relu(model.make(data))
        one, other = model(data)
    patches = F.unfold(hidden, 2).transpose(1, 2).reshape(-1, 24)  # 4 places of the kernel to a channel
    pixels = hidden.permute(0, 2, 3, 1).reshape(-1, 6)
    rows = [one.permute(0, 2, 3, 1).reshape(-1, 2), other.detach().permute(0, 2, 3, 1).reshape(-1, 3)]
    pixels, rows[1] = ((t - t.mean(0)) for t in (pixels, rows[1]))  # a bias takes up the means

    def left(gone: tuple[int, ...]) -> float:
        stay = [c for c in range(6) if c not in gone]
        columns = [4 * c + k for c in stay for k in range(4)]
        return (left_after(patches, rows[0], columns) + left_after(pixels, rows[1], stay)) / len(data)

    losses = [left((c,)) for c in range(6)]
    channels = group.channels.reshape(-1).tolist()
    order = np.argsort(found.reshape(-1))
    (rows_of,) = (f.rows()[0].tolist() for f in graph.by_name["make.weight"].labels if f.dim == 0)
    first, second = (rows_of.index(channels[i]) for i in order[:2])
    assert first == int(np.argmin(losses))
    # An error that is the same at every position counts with its sign, others do not: hence a factor, the same for all.
    factor = found.reshape(-1)[order[0]] / losses[first]
    assert 0.9 < factor < 3
    pairs = {c: left((first, c)) - losses[first] for c in range(6) if c != first}
    assert second == min(pairs, key=pairs.__getitem__)


def test_a_twin_goes_and_the_other_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    with torch.no_grad():
        for twin, of in ((1, 0), (3, 2), (5, 4)):
            model[0].weight[twin], model[0].bias[twin] = 20 * model[0].weight[of], 20 * model[0].bias[of]
    data = torch.randn(4000, 5)
    given = {"channels": 0.75, "round_to": 1, "progress": False}
    small = fxprune.prune(model, data[:1], method="obs", data=data, reconstruct=True, **given)
    kept = small.meta["fxprune"].plan.kept["0.weight"][0]
    assert all(len({a, b} & set(kept)) == 1 for a, b in ((0, 1), (2, 3), (4, 5)))
    with torch.no_grad():
        torch.testing.assert_close(small(data), model(data), rtol=1e-4, atol=1e-4)
        other = fxprune.prune(model, data[:1], method="l2", data=data, reconstruct=True, **given)
        assert float((other(data) - model(data)).abs().max()) > 1e-2


def test_groups_compare_by_the_outputs_and_by_macs() -> None:
    """Two branches of which one hardly counts; then one that costs more."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + 1e-2 * self.b(x)

    torch.manual_seed(0)
    data = torch.randn(300, 6)
    small = fxprune.prune(
        Branches().eval(), data[:1], method="obs", data=data, channels=0.6, round_to=1, progress=False
    )
    widths = {row.name: row.width for row in small.meta["fxprune"].rows}
    assert widths["b.0"][1] < 0.3 * widths["a.0"][1]


class Saturated(nn.Module):
    """Where one branch has made up its mind it has no slope; the other has one everywhere, and hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2))
        for layer in (*self.a, *self.b):
            nn.init.eye_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(20 * self.a(x)) + 0.1 * self.b(x)


@pytest.mark.parametrize("measured", [True, False])
def test_what_slopes_do_not_tell_is_measured(measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not measured:
        monkeypatch.setattr(obs, "_measured", lambda parts, state: 0.0)
    torch.manual_seed(0)
    data = torch.randn(300, 6).sign()
    small = fxprune.prune(
        Saturated().eval(), data[:1], method="obs", data=data, channels=0.6, round_to=1, progress=False
    )
    widths = {row.name: row.width[1] for row in small.meta["fxprune"].rows}
    assert (widths["a.0"] > widths["b.0"]) == measured


def test_trials_are_what_the_network_does() -> None:
    """Another weight of a reader and channels of a gate at zero: as if somebody had written them."""
    torch.manual_seed(0)
    model, data = Logits().eval(), torch.randn(24, 5, 8)
    _, found, trial = measured_on(model, data)
    gate = next(one for one in found if isinstance(one, Gate))
    gone = gate.channels[:5]
    closed = Logits().eval()
    closed.load_state_dict(model.state_dict())
    rows = [int(np.flatnonzero(gate.channels == c)[0]) for c in gone]
    with torch.no_grad():
        for linear in (closed.q, closed.k):
            linear.weight[rows], linear.bias[rows] = 0, 0
        wanted = float((closed(data) - model(data)).square().sum()) / len(data)
    assert trial({}, {gate.node: gone}) == pytest.approx(wanted, rel=1e-4)
    assert trial({}, {}) == 0

    torch.manual_seed(0)
    readers, images = TwoReaders().eval(), torch.randn(10, 3, 6, 6)
    _, found, trial = measured_on(readers, images)
    read = next(r for r in found if r.node == "other")
    with torch.no_grad():
        before, kept = readers(images), copy.deepcopy(readers.other)
        mean = F.relu(readers.make(images)).mean((0, 2, 3))
        readers.other.bias += 0.5 * readers.other.weight[:, :, 0, 0] @ mean
        readers.other.weight *= 0.5
        wanted = sum(float((a - b).square().sum()) for a, b in zip(readers(images), before, strict=True)) / 10
        readers.other = kept
    assert trial({read.node: read.weight / 2}, {}) == pytest.approx(wanted, rel=1e-4)
    assert trial({}, {}) == 0, "the weight and its bias are put back"


@pytest.mark.parametrize("norm", [False, True])
def test_what_a_bias_or_a_norm_takes_up_is_no_error(norm: bool) -> None:
    """Channels that are large and hardly vary go before small ones that do."""
    torch.manual_seed(0)
    layers = [nn.Linear(24, 8, bias=False), nn.BatchNorm1d(8)] if norm else [nn.Linear(24, 8)]
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), *layers, nn.Tanh(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight[:12] *= 0.3
        model[0].bias[:12] += 2
    data = torch.randn(400, 6)
    keep = fxprune.Options(max_ratio={"2": 0.0})
    given = {"channels": 0.625, "round_to": 1, "progress": False, "options": keep}
    small = fxprune.prune(model, data[:2], method="obs", data=data, reconstruct=True, **given)
    assert set(small.meta["fxprune"].plan.kept["0.weight"][0]) == set(range(12, 24))
    with torch.no_grad():
        lost = (small(data) - model(data)).square().sum() / (model(data) - model(data).mean(0)).square().sum()
    assert float(lost) < 0.1


class Shared(nn.Module):
    """One weight reads the same channels in two places; what comes of one counts more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(5, 8)
        self.read = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.read(F.relu(self.a(x))), 3 * self.read(F.relu(self.b(x)))


def test_a_weight_that_is_called_twice_is_refitted_once() -> None:
    torch.manual_seed(0)
    model, data = Shared().eval().double(), torch.randn(500, 5).double()
    _, found, trial = measured_on(model, data)
    (read,) = found
    assert isinstance(read, Read)
    with torch.no_grad():
        a, b = F.relu(model.a(data)), F.relu(model.b(data))
    torch.testing.assert_close(read.gram[0], (a.T @ a + 9 * b.T @ b) / 10 / len(data), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(read.sensitivity, torch.full((1, 3), 10.0).double())
    with torch.no_grad():
        before = model(data[:32])
        model.read.weight *= 0.5
        wanted = sum(float((x - y).square().sum()) for x, y in zip(model(data[:32]), before, strict=True))
        model.read.weight *= 2
    assert 32 * trial({read.node: read.weight / 2}, {}) == pytest.approx(wanted, rel=1e-4)


class Decoder(nn.Module):
    """What the first layer makes one of two layers reads, with the first one's own weight: no refit may change that."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.other = nn.Linear(6, 12), nn.Linear(6, 12)
        self.read = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.tied(x)), self.tied.weight.t()) + self.read(F.relu(self.other(x)))


def test_errors_are_weighed_by_what_the_budget_counts() -> None:
    """A convolution has most of the MACs, and a linear layer most of the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8),
    ).eval()  # fmt: skip
    data = torch.randn(64, 3, 16, 16)
    given: dict[str, Any] = {"method": "obs", "data": data, "round_to": 1, "progress": False}
    by_macs = fxprune.prune(model, data[:1], flops=0.7, **given)
    by_params = fxprune.prune(model, data[:1], params=0.7, **given)
    of_convolution, of_linear = "0.weight", "5.weight"
    assert by_macs.get_parameter(of_convolution).shape[0] < by_params.get_parameter(of_convolution).shape[0]
    assert by_macs.get_parameter(of_linear).shape[0] > by_params.get_parameter(of_linear).shape[0]


def test_what_the_refit_leaves_alone_is_lost_in_full() -> None:
    torch.manual_seed(0)
    model, data = Decoder().eval().double(), torch.randn(600, 6).double()
    graph, scores = scores_of(model, data, methods.OBS(by_cost=False))
    group = next(g for g in graph.prunable if g.name == "tied")
    found = scores[graph.groups.index(group)].reshape(-1)
    with torch.no_grad():
        given = F.relu(model.tied(data))
    (rows,) = (f.rows()[0].tolist() for f in graph.by_name["tied.weight"].labels if f.dim == 0)
    channels = [rows.index(c) for c in group.channels.reshape(-1).tolist()]

    def lost(gone: list[int]) -> float:
        return float((given[:, gone] @ model.tied.weight[gone]).square().sum()) / len(data)

    gone, order = [], [channels[i] for i in np.argsort(found, kind="stable")]
    for number, channel in enumerate(order[:6]):
        added = {c: lost([*gone, c]) - lost(gone) for c in channels if c not in gone}
        assert channel == min(added, key=added.__getitem__)
        gone.append(channel)
        if not number:
            assert found.min() == pytest.approx(lost(gone), rel=1e-3)
    before = copy.deepcopy(model.state_dict())
    small = fxprune.prune(model, data[:2], method="obs", data=data, channels=0.5, round_to=1, progress=False)
    assert len(small.get_parameter("tied.weight")) < 12
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_sizes_that_vary_count_by_their_positions() -> None:
    torch.manual_seed(0)
    model, data = TwoReaders().eval(), [torch.randn(4, 3, size, size) for size in (5, 6, 12)]
    counts = [
        [read.count for read in measured_on(model, pieces)[1] if isinstance(read, Read)]
        for pieces in (data, data[::-1])
    ]
    assert counts[0] == pytest.approx(counts[1])


def test_without_a_refit_the_report_asks_for_one() -> None:
    torch.manual_seed(0)
    model, data = TwoReaders().eval(), torch.randn(20, 3, 6, 6)
    given = {"method": "obs", "data": data, "channels": 0.5, "round_to": 1, "progress": False}
    note = "obs chose for what a refit leaves, which fxprune.reconstruct or reconstruct=True makes"
    assert note in fxprune.prune(model, data[:1], **given).meta["fxprune"].notes
    assert note not in fxprune.prune(model, data[:1], reconstruct=True, **given).meta["fxprune"].notes


def test_what_is_not_finite_is_refused() -> None:
    torch.manual_seed(0)
    model, data = TwoReaders().eval(), torch.randn(20, 3, 6, 6)
    data[3, 0, 0, 0] = float("inf")
    with pytest.raises(fxprune.errors.InputError, match=r"What \w+ reads .* is not finite on data="):
        fxprune.prune(model, data[:1], method="obs", data=data, channels=0.5, progress=False)


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).transpose(1, 2)


class Packed(nn.Module):
    """Heads of queries, keys and values keep equal counts here: one group, of which a weight reads the values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 6).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Attends(Logits):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(2, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_queries_and_keys_count_by_what_they_add_to_the_logits() -> None:
    torch.manual_seed(0)
    model, data = Logits().eval().double(), torch.randn(400, 5, 8).double()
    graph, scores = scores_of(model, data, methods.OBS(by_cost=False))
    (group,), (found,) = graph.prunable, (s for s in scores if s is not None)
    with torch.no_grad():
        q, k = model.q(data), model.k(data)
    (rows,) = (f.rows()[0].tolist() for f in graph.by_name["q.weight"].labels if f.dim == 0)
    channels = [rows.index(c) for c in group.channels.reshape(-1)]
    order = [channels[i] for i in np.argsort(found.reshape(-1), kind="stable")]
    alone = torch.einsum("bic,bjc->bijc", q, k).square().sum((1, 2)).mean(0)
    assert order[0] == int(alone.argmin())
    assert float(found.min()) == pytest.approx(float(alone.min()), rel=0.05)

    def gone(which: list[int]) -> float:
        return float((q[..., which] @ k[..., which].transpose(1, 2)).square().sum((1, 2)).mean())

    added = {c: gone([order[0], c]) - gone(order[:1]) for c in channels if c != order[0]}
    assert added[order[1]] < 1.1 * min(added.values())


def test_a_head_dimension_that_adds_nothing_goes_first() -> None:
    """Query channels are large where the key channel is zero, so no norm of weights tells."""
    torch.manual_seed(0)
    model, data = Attends().eval(), torch.randn(60, 5, 8)
    with torch.no_grad():
        idle = [0, 2, 3, 7, 8, 11]  # three of each head
        model.k.weight[idle], model.k.bias[idle] = 0, 0
        model.q.weight[idle] *= 100
    keep_v = fxprune.Options(max_ratio={"v": 0.0})
    given = {"data": data, "channels": 0.7, "round_to": 1, "progress": False, "options": keep_v}
    small = fxprune.prune(model, data[:1], method=methods.OBS(by_cost=False), **given)
    kept = small.meta["fxprune"].plan.kept["q.weight"][0]
    assert not set(kept) & set(idle)
    assert len(kept) == 6
    with torch.no_grad():
        torch.testing.assert_close(small(data), model(data), rtol=1e-4, atol=1e-5)


def test_queries_and_keys_that_are_packed_with_values() -> None:
    torch.manual_seed(0)
    model, data = Packed().eval(), torch.randn(100, 5, 8)
    idle = [0, 2, 7, 10]  # two of each head
    with torch.no_grad():
        for rows in (model.qkv.weight, model.qkv.bias):
            rows[12:24][idle] = 0
            rows[24:][idle] = 0
            rows[:12][idle] *= 100
    given = {"data": data, "channels": 0.7, "round_to": 1, "progress": False}
    small = fxprune.prune(model, data[:1], method="obs", **given)
    kept = small.meta["fxprune"].plan.kept["qkv.weight"][0]
    assert set(kept) == {row for row in range(36) if row % 12 not in idle}
    with torch.no_grad():
        torch.testing.assert_close(small(data), model(data), rtol=1e-4, atol=1e-5)


def test_what_gradients_tell_nothing_of_stays() -> None:
    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.b(x)) + self.a(x).sign().mean(1, keepdim=True)

    torch.manual_seed(0)
    data = torch.randn(60, 6)
    small = fxprune.prune(Signs().eval(), data[:1], method="obs", data=data, channels=0.8, round_to=1, progress=False)
    widths = {row.name: row.width for row in small.meta["fxprune"].rows}
    assert widths["a"][1] == 8
    assert widths["b"][1] < 8


@pytest.mark.parametrize("as_pairs", [False, True])
def test_targets_are_not_read(as_pairs: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    batches = list(torch.randn(60, 5).split(10))
    data = [(batch, None) for batch in batches] if as_pairs else batches
    small = fxprune.prune(model, batches[0], method="obs", data=data, flops=0.5, round_to=1, progress=False)
    plan = small.meta["fxprune"].plan
    assert plan.kept == fxprune.prune(
        model, batches[0], method="obs", data=list(itertools.chain(batches)), flops=0.5, round_to=1, progress=False
    ).meta["fxprune"].plan.kept  # fmt: skip


def net(end: str) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5))

        def forward(self, x: Tensor) -> Tensor:
            if end == "drawn":
                return self.body(F.dropout(x, 0.5, True))
            out = self.body(x)
            if end == "masked":
                return out.masked_fill(torch.tensor([True, False, False, False, False]), float("-inf"))
            return out[out > 0] if end == "picked" else out

    torch.manual_seed(0)
    return Net().eval()


def trial_of(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[float]:
    """What was measured while the network was cut."""
    found: list[float] = []
    measured = obs._measured
    monkeypatch.setattr(obs, "_measured", lambda *given: found.append(measured(*given)) or found[-1])
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    small = fxprune.prune(model, data[:2], method="obs", data=data, flops=0.5, round_to=1, progress=False)
    assert len(small.get_parameter("body.0.weight")) < 32
    return found


def test_masked_outputs_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < trial_of(monkeypatch, net("masked"))[0] <= trial_of(monkeypatch, net("plain"))[0]


def test_outputs_of_another_shape_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(trial_of(monkeypatch, net("picked"))) == {0.0}


def test_what_forward_draws_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in (1, 2):
        model = net("drawn")
        torch.manual_seed(seed)
        found += trial_of(monkeypatch, model)[:1]
    assert found[0] == found[1]


def test_where_half_is_dead_it_is_measured_among_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net("plain")
    with torch.no_grad():
        model.body[0].bias[:20] = -1000
    found = trial_of(monkeypatch, model)
    assert found[0] == 0.0
    assert found[-1] > 0


class Lookup(nn.Module):
    """Two ways to the output: of numbers that are looked up, which have no gradient, and of others."""

    def __init__(self, floats: bool) -> None:
        super().__init__()
        self.floats = floats
        self.table, self.a, self.b = nn.Embedding(10, 8), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, ids: Tensor, bias: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(self.table(ids))))
        return y + bias if self.floats else y


@pytest.mark.parametrize("floats", [False, True])
def test_gradients_that_the_inputs_do_not_have(floats: bool) -> None:
    """Frozen weights, and floats among the inputs that nothing else depends on, change no score."""
    torch.manual_seed(0)
    model, data = Lookup(floats).eval(), [(torch.randint(0, 10, (8, 5)), torch.randn(8, 5, 4)) for _ in range(6)]
    given = {"method": "obs", "data": data, "channels": 0.5, "round_to": 1, "progress": False}
    plan = fxprune.prune(model, data[0], **given).meta["fxprune"].plan
    frozen = fxprune.prune(model.requires_grad_(False), data[0], **given).meta["fxprune"].plan
    assert plan.kept == frozen.kept
    graph = fxprune.analyze(model, data[0])
    pieces = pieces_of(data, {"args": data[0], "kwargs": {}}, None, torch.device("cpu"))
    reads, _ = measure_reads(fxprune.record(model, data[0]), graph, pieces)
    assert all(bool((read.sensitivity > 0).all()) for read in reads if isinstance(read, Read))


def test_without_any_gradient_nothing_is_ranked() -> None:
    class Choice(TwoReaders):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0].argmax(1)

    data = torch.randn(10, 3, 6, 6)
    with pytest.raises(fxprune.errors.InputError, match="no output has a gradient of them: choose another method"):
        fxprune.prune(Choice().eval(), data[:1], method="obs", data=data, channels=0.5, progress=False)
