"""Accuracy against milliseconds, of a tiny network: what is cut, timed and told, a peer that fails, and the page."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.errors import BudgetError
from model_zoo.measuring import frontier as measuring
from model_zoo.pages.frontier import beaten, behind
from model_zoo.records import read
from model_zoo.runner import main
from model_zoo.studies import frontier
from model_zoo.trained import Trained

pytestmark = pytest.mark.usefixtures("one_thread", "ops_read_once")


@cache
def tiny(folder: Path) -> Trained:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).eval()
    images = torch.randn(48, 3, 16, 16)
    with torch.no_grad():
        wanted = model(images)

    def quality(network: nn.Module) -> float:
        with torch.no_grad():
            return 1 - float((network(images) - wanted).square().mean())

    return Trained(model, lambda seed: images, quality, "% top-1")


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(frontier.NETWORKS, "resnet20", (tiny, (0.5,)))
    return tmp_path / "frontier.jsonl"


def test_networks_are_cut_refitted_and_timed_beside_the_dense_one(out: Path) -> None:
    series = ["MACs", "MACs, aligned"]
    main(["run", "frontier", "--data", ".", "--case", "resnet20", "--series", *series, "--out", str(out)])
    found = {name: record.figures for name, record in read(out)[1].items()}
    names = ["resnet20, dense, seed 0", *(f"resnet20, {name}, obs, 0.5, seed 0" for name in series)]
    assert [*found] == names
    assert found[names[0]]["quality"] == 1
    for name in names[1:]:
        assert found[name]["macs_ratio"] <= 0.5
        assert found[name]["quality"] < 1
        assert [*found[name]["ms"]] == ["1", "8"]
        assert all(ms > 0 for of in ("ms", "dense_ms") for ms in found[name][of].values())
    page = out.with_suffix(".md").read_text()
    assert "## CIFAR-10" in page
    assert "| resnet20 | dense | 1 | 1.000 | 1.00 |" in page
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


class Quick:
    """In place of ``Clocks``: nothing is exported."""

    macs = 1.0

    def __init__(self, case: Trained):
        pass

    def beside(self, network: nn.Module) -> dict[str, dict[str, float]]:
        return {key: {"1": 1.0, "8": 8.0} for key in ("dense_ms", "ms")}


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "Clocks", Quick)


@pytest.mark.usefixtures("_quick")
def test_a_peer_that_fails_is_told_and_ours_is_not_excused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> nn.Module:
        raise ValueError("no network")

    monkeypatch.setattr(measuring, "cut", cut)
    asked = ["run", "frontier", "--data", ".", "--case", "resnet20", "--out", str(out), "--series"]
    main([*asked, "Torch-Pruning"])
    assert "- resnet20, Torch-Pruning, 0.5, seed 0: peer: ValueError: no network" in out.with_suffix(".md").read_text()
    with pytest.raises(ValueError, match="no network"):
        main([*asked, "MACs"])


@pytest.mark.usefixtures("_quick")
def test_a_budget_that_cannot_be_reached_ends_no_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> nn.Module:
        raise BudgetError("latency=0.5 cannot be reached", 0.6)

    monkeypatch.setattr(measuring, "cut", cut)
    main(["run", "frontier", "--data", ".", "--case", "resnet20", "--out", str(out), "--series", "MACs"])
    told = "- resnet20, MACs, obs, 0.5, seed 0: budget: BudgetError: latency=0.5 cannot be reached"
    assert told in out.with_suffix(".md").read_text()


def test_only_a_faster_and_better_network_beats_another() -> None:
    slow, fast, better = ({"ms": {"1": ms}, "quality": q} for ms, q in ((3.0, 80.0), (1.0, 70.0), (2.0, 81.0)))
    every = [slow, fast, better]
    assert [beaten(one, every, "1") for one in every] == [better, None, None]


def test_both_ways_together_are_told_where_another_cut_of_that_network_is_ahead() -> None:
    def cut(case: str, series: str, ms: float, quality: float) -> dict[str, Any]:
        both = {"1": ms, "8": 8 * ms}
        return {"case": case, "series": series, "ratio": 0.5, "ms": both, "quality": quality, "removed": ["a", "b"]}

    together = cut("resnet20", "branches and MACs, aligned", 2.0, 70.0)
    assert behind([together, cut("resnet20", "MACs", 1.0, 60.0), cut("resnet56", "MACs", 1.0, 80.0)]) == []
    (told,) = behind([together, cut("resnet20", "branches", 1.0, 71.0)])
    assert told.startswith("resnet20, branches and MACs, aligned, 0.5 (branches gone: 2): 70.00; batch 1: 2.00 ms, and")
    assert "branches, 0.5 has 71.00 in 8.00" in told
