"""The report: figures that can be recounted, the table, what is frozen and why, and where."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Attentive, Shuffled, Small, image, make
from torch import Tensor, nn

import fxprune
from model_zoo.checks import count_macs


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
    assert rows["free"].frozen == ""
    assert rows["free"].source.endswith(line("self.free"))
    assert rows["held"].after == (8, 4, 1, 1)
    assert rows["held"].frozen.startswith("cumsum across channels (")
    assert rows["held"].frozen.endswith(f"{line('cumsum')})")
    assert rows["ignored"].frozen.startswith("ignored by the caller (")
    assert rows["ignored"].frozen.endswith(f"{line('self.ignored')})")
    assert rows["matrix"].kind == "Frozen"  # the module that holds it
    assert rows["matrix"].frozen.startswith("network output (")
    assert rows["matrix"].source.endswith(line("F.linear"))


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
    assert head.split() == ["layer", "kind", "weight", "before", "after", "outputs", "frozen", "because"]
    for row in report.rows:
        shown = next(each for each in lines if each.startswith(f"{row.name} "))
        assert "x".join(map(str, row.before)) in shown
        assert "x".join(map(str, row.after)) in shown
        assert row.frozen in shown
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
    assert list(seconds) == ["recording", "analysing", "scoring", "selecting", "rewriting", "verifying"]
    assert all(value >= 0 for value in seconds.values())


def test_a_method_object_is_named_with_its_parameters() -> None:
    assert report_of(make(), flops=0.5, method=fxprune.methods.L1()).method == "L1()"
    assert report_of(make(), flops=0.5, method="l1").method == "l1"


def test_the_text_of_an_analysis() -> None:
    text = str(fxprune.analyze(make(Frozen), image()))
    assert " groups, 16 of " in text.splitlines()[0]
    assert line("cumsum") in text
    assert "frozen" in text
    assert "exact" in text


def test_zeros_are_told_where_they_are_more_than_chance() -> None:
    report = report_of(make(), flops=0.5)
    many = replace(report, zeros=report.params_after // 2)
    assert "\nzeros       " in str(many)
    assert " of these  (50.0%)" in str(many)
    assert "zeros" not in str(replace(report, zeros=report.params_after // 2000))
