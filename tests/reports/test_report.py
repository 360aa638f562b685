"""The report: figures that can be recounted, the table, what is locked and why, and where."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Attentive, Shuffled, Small, image, make
from torch import Tensor, nn

import fxprune
from model_zoo.checks.counts import count_macs


class Frozen(nn.Module):
    """One layer of each kind: cut, held by a softmax, held by the output, a bare parameter, ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.held, self.ignored = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.matrix = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.free(x)
        x = self.held(x).cumsum(1)
        x = self.ignored(x).mean((2, 3))
        return F.linear(x, self.matrix)


def line(text: str) -> str:
    lines, first = inspect.getsourcelines(Frozen.forward)
    return f"{Path(__file__).name}:{first + next(i for i, each in enumerate(lines) if text in each)} in forward"


def report_of(model: nn.Module, **options: Any) -> fxprune.Report:
    report: fxprune.Report = fxprune.prune(model, image(), progress=False, **options).meta["fxprune"]
    return report


def test_rows_say_what_is_frozen_why_and_where() -> None:
    report = report_of(make(Frozen), channels=0.5, ignore=["ignored"])
    rows = {row.name: row for row in report.rows}
    assert set(rows) == {"free", "held", "ignored", "matrix"}
    assert (rows["free"].kind, rows["free"].before, rows["free"].after) == ("Conv2d", (8, 3, 1, 1), (4, 3, 1, 1))
    assert rows["free"].locked == ""
    assert rows["free"].source.endswith(line("self.free"))
    assert rows["held"].after == (8, 4, 1, 1)
    assert rows["held"].locked.startswith("cumsum across channels (")
    assert rows["held"].locked.endswith(f"{line('cumsum')})")
    assert rows["ignored"].locked.startswith("ignored by the caller (")
    assert rows["ignored"].locked.endswith(f"{line('self.ignored')})")
    assert rows["matrix"].kind == "Frozen"  # the module that holds it
    assert rows["matrix"].locked.startswith("network output (")
    assert rows["matrix"].source.endswith(line("F.linear"))


class Normalised(nn.Module):
    """The weights of two convolutions and a linear layer are computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 12, 3)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first.weight, self.second.weight
        x = F.conv2d(x, first / first.square().sum((1, 2, 3), keepdim=True).sqrt(), self.first.bias).relu()
        x = F.conv_transpose2d(x, second.abs(), self.second.bias).relu()
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_rows_of_layers_whose_weights_are_computed_are_of_what_they_make() -> None:
    rows = {row.name: row for row in report_of(make(Normalised), channels=0.5).rows}
    assert rows["first"].width == (8, rows["first"].after[0])
    assert rows["first"].after[0] < 8
    assert rows["first"].locked == ""
    assert rows["second"].width == (12, rows["second"].after[1])
    assert rows["second"].locked == ""
    last = rows["last.parametrizations.weight.original1"]
    assert last.width == (5, 5)
    assert last.locked.startswith("network output (")
    assert last.after == (5, rows["second"].after[1])


def test_of_an_ignored_layer_whose_weight_is_computed_what_it_reads_is_cut() -> None:
    rows = {row.name: row for row in report_of(make(Normalised), channels=0.8, ignore=["second"]).rows}
    assert rows["second"].width == (12, 12)
    assert rows["second"].locked.startswith("ignored by the caller (")
    assert rows["second"].after[0] == rows["first"].after[0] < 8


def test_the_text_has_all_of_it() -> None:
    report = report_of(make(Frozen), channels=0.5, ignore=["ignored"])
    text = str(report)
    lines = text.splitlines()
    assert lines[0] == "Frozen, method l2"
    assert lines[1].startswith("MACs ")
    assert f"({report.macs_after / report.macs_before:.1%})" in lines[1]
    assert f"({report.params_after / report.params_before:.1%})" in lines[2]
    assert "masked original and pruned model agree to " in text
    assert "seconds     recording " in text
    head = next(each for each in lines if each.startswith("layer "))
    assert head.split() == ["layer", "kind", "weight", "before", "after", "outputs", "locked", "because"]
    for row in report.rows:
        shown = next(each for each in lines if each.startswith(f"{row.name} "))
        assert "x".join(map(str, row.before)) in shown
        assert "x".join(map(str, row.after)) in shown
        assert row.locked in shown
    assert line("cumsum") in text


def test_the_figures_are_those_of_the_modules() -> None:
    for kind in (Small, Shuffled, Attentive):
        model = make(kind)
        pruned = fxprune.prune(model, image(), flops=0.6, progress=False)
        report = pruned.meta["fxprune"]
        for module, macs, parameters in (
            (model, report.macs_before, report.params_before),
            (pruned, report.macs_after, report.params_after),
        ):
            assert count_macs(module, (image(),), {}) == macs
            assert sum(p.numel() for p in module.parameters()) == parameters
        state = pruned.state_dict()
        for row in report.rows:
            name = f"{row.name}.weight" if f"{row.name}.weight" in state else row.name
            assert row.after == tuple(state[name].shape)
            assert row.before == tuple(model.state_dict()[name].shape)


def test_macs_that_no_cut_can_lower_are_told_with_the_reason() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held, self.free, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.free(self.held(x).cumsum(1)))

    report = report_of(make(Held), flops=0.8)
    ((reason, share),) = report.held.items()
    assert share == pytest.approx(3 * 8 / (3 * 8 + 8 * 8 + 8 * 5))
    assert report.prunable_share == pytest.approx(1 - share)
    assert reason.startswith("cumsum across channels (")
    assert "; network input (" in reason
    assert f"{share:.1%} of the MACs cannot be lowered: {reason}" in str(report)
    assert report_of(make(), flops=0.5).held == {}


def test_stages_have_their_seconds() -> None:
    seconds = report_of(make(), flops=0.5).seconds
    assert list(seconds) == ["recording", "probing", "analysing", "scoring", "selecting", "rewriting", "verifying"]
    assert all(value >= 0 for value in seconds.values())


def test_a_method_object_is_named_with_its_parameters() -> None:
    assert report_of(make(), flops=0.5, method=fxprune.methods.L1()).method == "L1()"
    assert report_of(make(), flops=0.5, method="l1").method == "l1"


def test_the_text_of_an_analysis() -> None:
    text = str(fxprune.analyze(make(Frozen), image()))
    assert " groups, 16 of " in text.splitlines()[0]
    assert line("cumsum") in text
    assert "locked" in text
    assert "exact" in text


def test_zeros_are_told_where_they_are_more_than_chance() -> None:
    report = report_of(make(), flops=0.5)
    many = replace(report, zeros=report.params_after // 2)
    assert "\nzeros       " in str(many)
    assert " of these  (50.0%)" in str(many)
    assert "zeros" not in str(replace(report, zeros=report.params_after // 2000))


def test_rows_are_in_the_order_in_which_the_graph_runs_them() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.unused = nn.Linear(8, 4), nn.Linear(3, 3)
            self.two, self.one = nn.Conv2d(6, 8, 1), nn.Conv2d(3, 6, 1)
            self.scale = nn.Parameter(torch.ones(6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.one(x) * self.scale).mean((2, 3)))

    names = [row.name for row in report_of(make(Backwards), flops=0.7).rows]
    assert names == ["one", "scale", "two", "head", "unused"]


def test_widths_are_output_channels_whatever_dimension_they_are_in() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.stem = nn.Embedding(20, 8), nn.Conv2d(3, 8, 1)
            self.up, self.grouped = nn.ConvTranspose2d(8, 6, 2, 2), nn.ConvTranspose2d(6, 12, 2, 2, groups=2)
            self.head = nn.Conv2d(12, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            ids = torch.arange(4).expand(x.shape[0], 4)
            x = self.stem(x) + self.embed(ids).mean(1)[:, :, None, None]
            return self.head(self.grouped(self.up(x)))

    report = report_of(make(Kinds), channels=0.5)
    rows = {row.name: row for row in report.rows}
    assert {name: row.width[0] for name, row in rows.items()} == {
        "stem": 8, "embed": 8, "up": 6, "grouped": 12, "head": 5,
    }  # fmt: skip
    assert rows["embed"].width[1] == rows["embed"].after[1] == rows["stem"].after[0]
    assert rows["up"].width[1] == rows["up"].after[1] == rows["grouped"].after[0]
    assert rows["grouped"].width[1] == 2 * rows["grouped"].after[1] == rows["head"].after[1]
    assert [name for name, row in rows.items() if row.locked] == ["head"], "a vocabulary is not what an embedding makes"


def test_the_groups_of_a_report_are_those_of_the_analysis() -> None:
    model = make(Frozen)
    report = report_of(model, channels=0.5, ignore=["ignored"])
    graph = fxprune.analyze(model, image(), ignore=["ignored"])
    assert [(g.name, g.before) for g in report.groups] == [(g.name, g.channels.size) for g in graph.groups]
    (cut,) = (group for group in report.groups if group.after < group.before)
    assert (cut.name, cut.before, cut.after, cut.why) == ("free", 8, 4, "")
    assert ("free.weight", 0, False) in cut.members
    assert ("held.weight", 1, True) in cut.members
    assert sorted(g.why for g in report.groups) == sorted(str(g.locked or "") for g in graph.groups)
    plain = report.data()
    assert plain["groups"][0]["name"] == report.groups[0].name
    json.dumps(plain)


def test_the_plot_has_the_widths_in_graph_order(tmp_path: Path) -> None:
    report = report_of(make(), flops=0.5)
    figure = report.plot(tmp_path / "widths.svg")
    (axes,) = figure.axes
    dense, pruned = axes.containers
    assert [bar.get_height() for bar in dense] == [row.width[0] for row in report.rows]
    assert [bar.get_height() for bar in pruned] == [row.width[1] for row in report.rows]
    assert [label.get_text() for label in axes.get_xticklabels()] == [row.name for row in report.rows]
    assert (tmp_path / "widths.svg").read_text().startswith("<?xml")
    with pytest.raises(fxprune.FxpruneError, match=r"cannot draw 'widths.txt': matplotlib writes .*png, "):
        report.plot("widths.txt")
    rows = tuple(replace(report.rows[0], name=f"layer{n}.with.a.long.name") for n in range(150))
    replace(report, rows=rows).plot(tmp_path / "many.png")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(make(), flops=0.5)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(fxprune.FxpruneError, match=r"Plots need matplotlib: pip install 'fxprune\[plots\]'\."):
        report.plot()
