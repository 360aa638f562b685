"""Every net has the groups that were written down for it, and pruned it computes what it should."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from labels.nets import CASES, Case, Expected, members_of
from labels.nets.usage import UNUSED
from torch import nn
from torch.utils._pytree import tree_flatten

import fxprune
from fxprune.errors import ModelError
from fxprune.groups.channels import ChannelGraph, ChannelGroup
from fxprune.recording.inputs import resolve_inputs
from fxprune.verification import TOLERANCE, mask_oracle
from model_zoo.checks.counts import count_macs

Row = tuple[int, int, str, frozenset[tuple[str, int]]]


def state_of(group: ChannelGroup) -> str:
    return "locked" if group.locked else "exact" if group.exact else "approximate"


def row_of(group: ChannelGroup) -> Row:
    return group.size, group.blocks, state_of(group), frozenset((m.name, m.dim) for m in group.members)


def row_wanted(model: nn.Module, group: Expected) -> Row:
    return group.size, group.blocks, group.state, members_of(model, group.members)


def difference(found: Counter[Row], wanted: Counter[Row]) -> str:
    return f"found only:\n{shown((found - wanted).elements())}\nexpected only:\n{shown((wanted - found).elements())}"


def shown(rows: Any) -> str:
    lines = [f"{n} x {b} {s}: {' '.join(sorted(f'{m}[{d}]' for m, d in members))}" for n, b, s, members in rows]
    return "\n".join(sorted(lines)) or "nothing"


@cache
def analysed(name: str) -> tuple[nn.Module, ChannelGraph]:
    case = CASES[name]
    model = randomise(case.build()).eval()
    return model, fxprune.analyze(model, case.inputs(2), attention=case.attention)


def macs_counted(module: nn.Module, inputs: Any) -> int:
    return count_macs(module, inputs if isinstance(inputs, tuple) else (inputs,), {})


def left_alone(report: fxprune.Report, case: Case) -> list[str]:
    """What the rewriting gave up, other than what it may for this net."""
    notes = [note for note in report.notes if note.startswith("locked")]
    return [note for note in notes if not case.left_alone or case.left_alone not in note]


names = pytest.mark.parametrize("name", CASES)
prunable = pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.frozen])


@names
def test_groups(name: str) -> None:
    model, graph = analysed(name)
    graph.check()
    assert not [note for note in graph.notes if "cannot be interpreted" in note], "a rule failed"
    expected = CASES[name].groups
    found, wanted = Counter(map(row_of, graph.groups)), Counter(row_wanted(model, g) for g in expected)
    assert found == wanted, difference(found, wanted)
    left = list(graph.groups)
    for group in expected:
        same = [g for g in left if row_of(g) == row_wanted(model, group)]
        match = [g for g in same if group.reason in str(g.locked or g.approximate)]
        assert match, f"no group {group} has this reason; found: {[str(g) for g in same]}"
        left.remove(match[0])
    assert len(graph.gathers) == CASES[name].gathers


@names
def test_reasons_carry_the_line(name: str) -> None:
    """The reason of a lock names the line of the net that is marked as its cause."""
    model, graph = analysed(name)
    file = Path(inspect.getfile(type(model)))
    mark = f"# line: {type(model).__name__}"
    lines = [number for number, line in enumerate(file.read_text().splitlines(), 1) if line.endswith(mark)]
    for group in graph.groups:
        reason = group.locked or group.approximate
        if reason is not None and str(reason) != UNUSED:  # which no line is to blame for
            assert re.search(r"\w+\.py:\d+ in ", reason.source), f"{group} does not say where"
    for line in lines:
        place = f"{file.name}:{line} "
        assert any(g.locked and place in g.locked.source for g in graph.groups), f"no lock at {place}\n{graph}"


@names
def test_cost_of_the_dense_net(name: str) -> None:
    model, graph = analysed(name)
    inputs = CASES[name].inputs(2)
    if CASES[name].counted:
        assert graph.macs() == macs_counted(fxprune.record(model, inputs), inputs)
    assert graph.params() == sum(p.numel() for p in model.parameters())


@prunable
def test_pruned(name: str) -> None:
    """Random channels go: the result is proven, also with another batch size, and costs what was promised."""
    case = CASES[name]
    model, inputs = randomise(case.build()).eval(), case.inputs(2)
    pruned = fxprune.prune(
        model,
        inputs,
        method="random",
        attention=case.attention,
        channels=0.5,
        options=fxprune.Options(min_channels=case.least),
        progress=False,
    )
    report = pruned.meta["fxprune"]
    assert not left_alone(report, case), report.notes
    assert report.oracle_error < TOLERANCE
    assert report.macs_after < report.macs_before
    if case.counted:
        assert report.macs_after == macs_counted(pruned.eval(), inputs)
    assert report.params_after == sum(p.numel() for p in pruned.parameters()) < report.params_before
    assert set(pruned.state_dict()) == set(model.state_dict())

    others = case.inputs(5)
    dense, graph = fxprune.record(model, inputs), analysed(name)[1]
    args, kwargs = resolve_inputs(model, others, None)
    keep = report.plan.channels(graph)
    assert mask_oracle(dense, pruned, graph, report.plan, keep, (args, kwargs)).error < TOLERANCE
    with torch.no_grad():
        shapes = [[t.shape for t in tree_flatten(m(*args, **kwargs))[0] if t is not None] for m in (model, pruned)]
    assert shapes[0] == shapes[1]


@prunable
def test_pruned_net_has_the_same_groups(name: str) -> None:
    """The analysis of the pruned net finds the same groups, smaller: as many channels as the plan keeps."""
    case = CASES[name]
    model, inputs = randomise(case.build()).eval(), case.inputs(2)
    graph = analysed(name)[1]
    pruned = fxprune.prune(
        model,
        inputs,
        method="random",
        attention=case.attention,
        channels=0.8,
        options=fxprune.Options(min_channels=2),
        seed=1,
        verify=False,
        progress=False,
    )
    report = pruned.meta["fxprune"]
    assert not left_alone(report, case), report.notes
    again = fxprune.analyze(pruned, inputs, attention=case.attention)
    again.check()
    keep = report.plan.channels(graph)
    wanted: Counter[Row] = Counter()
    for group in graph.groups:
        kept = keep[group.channels].sum(1)
        assert len(set(kept.tolist())) == 1, f"the blocks of {group} keep {kept}"
        wanted[(int(kept[0]), *row_of(group)[1:])] += 1
    found = Counter(row_of(group) for group in again.groups if group.members)  # what was filled up has none
    assert found == wanted, difference(found, wanted)


def test_a_net_of_which_nothing_can_be_cut_is_refused() -> None:
    for case in CASES.values():
        if case.frozen:
            with pytest.raises(ModelError, match="no prunable channels"):
                fxprune.prune(case.build(), case.inputs(2), channels=0.5, progress=False)


def test_grouped_convolutions_read_their_inputs() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=2), nn.ConvTranspose2d(12, 8, 3, groups=4), nn.Conv2d(8, 2, 1)
    )
    members = {m for g in fxprune.analyze(model, torch.randn(1, 3, 8, 8)).groups for m in g.members}
    read = {(m.name, m.dim) for m in members if m.read}
    assert read == {("0.weight", 1), ("1.weight", 1), ("2.weight", 0), ("3.weight", 1)}
