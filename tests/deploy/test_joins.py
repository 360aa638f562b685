"""Joins that are freed: layers choose what they read of a stream where it pays, and the rest is as it was."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import randomise
from nets import Small, image, make
from torch import Tensor, nn

import fxprune
from fxprune.deploy import Kernel, kernels, latency
from fxprune.errors import ConversionError, InputError, ModelError, PlanError
from fxprune.groups.cost import Keep
from fxprune.pipeline import Cut, Dense, Stages, joined, record_and_analyse, rewrite_as
from fxprune.rewriting.selections import readers_of_joins
from fxprune.selection.budget import Budget, select

pytestmark = pytest.mark.usefixtures("one_thread")


class Joined(nn.Module):
    """Three blocks add to a stream; what one of them reads of it another could do without: x [N, 3, H, W] -> [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 5)
        self.first = nn.ModuleList(nn.Conv2d(32, 24, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(24) for _ in range(3))
        self.second = nn.ModuleList(nn.Conv2d(24, 32, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for first, norm, second in zip(self.first, self.norms, self.second, strict=True):
            x = (x + second(norm(first(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


class Straight(nn.Sequential):
    """Nothing is added up."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


SITES = ["first.0", "first.1", "first.2", "head"]


def uneven() -> nn.Module:
    """Every block reads another half of the stream, and the rest with weights that are next to nothing."""
    torch.manual_seed(0)
    model = randomise(Joined()).eval()
    with torch.no_grad():
        for number, conv in enumerate(model.first):
            conv.weight[:, (torch.arange(32) + 8 * number) % 32 >= 16] *= 1e-3
    return model


def recorded(model: nn.Module) -> Dense:
    return record_and_analyse(model, (image(),), {}, "head_dim", (), Stages(progress=False), verify=True)


def some_of(dense: Dense) -> Keep:
    """A random half of every group."""
    keep, rng = dense.graph.everything(), np.random.default_rng(0)
    for group in dense.graph.prunable:
        keep[group.channels[0, rng.permutation(group.size)[: group.size // 2]]] = False
    return dense.graph.closed(keep)


def test_a_layer_that_chooses_already_is_left_alone() -> None:
    """Another index would take the place of the one that it reads by."""
    dense = joined(recorded(uneven()), SITES[:2])
    cut = rewrite_as(dense, some_of(dense), Cut(Budget("flops", 1.0)), "l2")
    assert isinstance(cut, torch.fx.GraphModule)
    again = recorded(cut)
    assert readers_of_joins(again.module, again.graph) == SITES[2:]


def test_the_layers_behind_a_sum_can_choose_and_no_others() -> None:
    dense, straight = recorded(uneven()), recorded(make(Straight))
    assert readers_of_joins(dense.module, dense.graph) == SITES
    assert readers_of_joins(straight.module, straight.graph) == []


def test_a_choice_follows_its_stream_and_computes_what_the_masked_network_does() -> None:
    dense = recorded(uneven())
    wide = joined(dense, SITES)
    keep = some_of(wide)
    small = rewrite_as(wide, keep, Cut(Budget("flops", 1.0)), "mine")
    assert isinstance(small, nn.Module)
    report = small.meta["fxprune"]
    assert report.oracle_error < 1e-5
    assert report.plan.joins == tuple(SITES)
    stream = report.plan.kept["stem.weight"][0]
    for site in SITES:
        own = report.plan.kept[f"{site}_reads"][0]
        assert len(own) < len(stream)
        assert small.get_buffer(f"{site}_reads").tolist() == [stream.index(channel) for channel in own]
        assert report.plan.kept[f"{site}.weight"][1] == own


def test_what_a_layer_reads_goes_with_the_channel() -> None:
    graph = joined(recorded(uneven()), SITES).graph
    scores = [None if g.locked else np.random.default_rng(0).random(g.channels.shape) for g in graph.groups]
    reads, streams = graph.follows.T
    gone = np.zeros(graph.channel_count, dtype=bool)
    gone[streams[:8]] = True
    plain = select(graph, scores, Budget("flops", 0.5)).keep
    given = select(graph, scores, Budget("flops", 0.5), gone=gone, settled=np.isin(np.arange(len(gone)), streams)).keep
    for keep in (plain, given):
        assert not (keep[reads] & ~keep[streams]).any()
        assert 0.45 < graph.macs(keep) / graph.macs() <= 0.5
    assert (given[streams] == ~gone[streams]).all()


class Clocks:
    """A stopwatch and a table of kernels: by MACs, and a choice at a price per channel."""

    def __init__(self, dense: int, price: float):
        self.dense, self.price = dense, price

    def dense_ms(self) -> float:
        return float(self.dense)

    def ratio(self, pruned: Any) -> float:
        report = pruned.meta["fxprune"]
        chosen = sum(pruned.get_buffer(f"{site}_reads").numel() for site in report.plan.joins)
        return float((report.macs_after + self.price * chosen) / self.dense)

    def beside(self, pruned: Any, runs: int) -> fxprune.Latency:
        return fxprune.Latency(1.0, self.ratio(pruned), "FakeProvider", "fake", 0, 1, runs, "fake 1.0")

    def times(self, wanted: Sequence[Kernel], provider: str, threads: int) -> list[float]:
        return [self.price * k.shapes[1][0] if k.kind == "choice" else macs(k) for k in wanted]


def macs(kernel: Kernel) -> float:
    first, second = kernel.shapes
    if kernel.kind == "product":
        return float(first[0] * first[1] * second[1])
    return float(np.prod(first) / first[1] * np.prod(second))


def pruned_at(price: float, monkeypatch: pytest.MonkeyPatch, **how: Any) -> tuple[nn.Module, Any]:
    model = uneven()
    clocks = Clocks(fxprune.analyze(model, image()).macs(), price)
    monkeypatch.setattr(latency, "Stopwatch", lambda *_: clocks)
    monkeypatch.setattr(latency, "kernel_ms", clocks.times)
    budget = fxprune.LatencyBudget(0.5, joins=True)
    return model, fxprune.prune(model, image(), latency=budget, round_to=1, progress=False, **how)


def test_where_choices_are_free_joins_are_freed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, small = pruned_at(0.0, monkeypatch)
    report = small.meta["fxprune"]
    assert set(report.plan.joins) & {"first.0", "first.1", "first.2"}
    assert report.latency.ratio == pytest.approx(0.5, rel=latency.TOLERANCE)
    assert report.oracle_error < 1e-5
    assert "joins       " in str(report)
    (note,) = [note for note in report.notes if note.startswith("layers choose what they read of a stream")]
    kept, before = (float(word[:-1]) for word in note.split() if word.endswith("%"))
    assert kept > before
    for site in report.plan.joins:
        assert f"{site} {small.get_buffer(f'{site}_reads').numel()} of " in note

    x = image()[:1].repeat(3, 1, 1, 1)
    report.plan.save(tmp_path / "plan.json")
    plan = fxprune.PruningPlan.load(tmp_path / "plan.json")
    assert plan == report.plan
    again = fxprune.apply(model, plan, image())
    fxprune.save(small, tmp_path / "small.safetensors")
    loaded = fxprune.load(tmp_path / "small.safetensors", uneven())
    with torch.no_grad():
        expected = small.eval()(x)
        torch.testing.assert_close(again.eval()(x), expected)
        torch.testing.assert_close(loaded.eval()(x), expected)
    fxprune.export(small, tmp_path / "small.onnx")
    assert "Gather" in {node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node}
    with pytest.raises(ConversionError, match=r"choose what they read of a stream, and Joined cannot"):
        fxprune.into(copy.deepcopy(model), small)
    with pytest.raises(PlanError, match=r"layers choose what they read .*pass it to fxprune\.apply"):
        plan.channels(fxprune.analyze(model, image()))


def test_where_choices_are_dear_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, small = pruned_at(1e6, monkeypatch)
    report = small.meta["fxprune"]
    assert report.plan.joins == ()
    assert not any("_reads" in name for name, _ in small.named_buffers())
    assert "joins=True: of no layer a choice of what it reads is predicted to pay" in report.notes


def test_a_network_with_choices_can_be_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(16, *image().shape[1:], generator=torch.Generator().manual_seed(0))
    _, small = pruned_at(0.0, monkeypatch, reconstruct=True, data=data)
    report = small.meta["fxprune"]
    assert report.plan.joins
    assert report.reconstruction.output_after < report.reconstruction.output_before


def test_a_choice_is_timed_between_layers_and_without_them() -> None:
    kernel = Kernel("choice", ((1, 8, 4, 4), (4,)))
    within, without = (kernels._chosen(kernel, chooses) for chooses in (True, False))
    assert [op for op, _, _ in within.nodes] == ["Conv", "Gather", "Conv"]
    assert [op for op, _, _ in without.nodes] == ["Conv", "Conv"]
    assert within.as_module()(*within.inputs()).shape == (1, 4, 4, 4)
    assert kernels._alone_ms(kernel, "CPUExecutionProvider", 1, 0.0) >= 0


def test_bad_input() -> None:
    budget = fxprune.LatencyBudget(0.5, joins=True)
    with pytest.raises(InputError, match="joins=1 "):
        fxprune.LatencyBudget(0.5, joins=1)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"joins=True: no layer reads, along dim 1 .*Leave joins= out"):
        fxprune.prune(make(Straight), image(), latency=budget, round_to=1, progress=False)
    for how, why in (
        ({"depth": True}, "leave one"),
        ({"for_class": True}, "no class"),
        ({"method": "slimming"}, "trains"),
    ):
        with pytest.raises(InputError, match=why):
            fxprune.prune(make(Small), image(), latency=budget, round_to=1, progress=False, **how)  # type: ignore[arg-type]
