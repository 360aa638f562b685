"""``method="obs"``: what a refit leaves, computed the long way; channels that others stand in for go first."""

from __future__ import annotations

import itertools

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


def measured_on(model: nn.Module, data: Tensor) -> tuple[fxprune.ChannelGraph, tuple[Read | Gate, ...], Trial]:
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
    graph, scores = scores_of(model, data, methods.OBS(per_mac=False))
    (group,) = graph.prunable
    (found,) = (s for s in scores if s is not None)
    with torch.no_grad():
        hidden = F.relu(model.make(data))
        one, other = model(data)
    patches = F.unfold(hidden, 2).transpose(1, 2).reshape(-1, 24)  # 4 places of the kernel to a channel
    pixels = hidden.permute(0, 2, 3, 1).reshape(-1, 6)
    rows = [one.permute(0, 2, 3, 1).reshape(-1, 2), other.detach().permute(0, 2, 3, 1).reshape(-1, 3)]
    rows[1] = rows[1] - 3 * model.other.bias.detach()

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
        before = readers(images)
        readers.other.weight *= 0.5
        wanted = sum(float((a - b).square().sum()) for a, b in zip(readers(images), before, strict=True)) / 10
        readers.other.weight *= 2
    assert trial({read.node: read.weight / 2}, {}) == pytest.approx(wanted, rel=1e-4)
    assert trial({}, {}) == 0, "the weight is put back"


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
    graph, scores = scores_of(model, data, methods.OBS(per_mac=False))
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
    small = fxprune.prune(model, data[:1], method=methods.OBS(per_mac=False), **given)
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
