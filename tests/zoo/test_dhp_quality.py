"""DHP beside other methods, on networks and data that are tiny: equal epochs, the search, the page."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.methods import DHP
from model_zoo.comparison import Case, Job
from model_zoo.measuring import dhp_quality
from model_zoo.measuring.dhp_quality import METHODS, NETWORKS
from model_zoo.papers import dncnn, resnet, srresnet
from model_zoo.recipes.common import Run
from model_zoo.records import Record, append, begin, read
from model_zoo.runner import main
from model_zoo.studies.dhp_quality import COMPARISON

TINY: dict[str, Any] = {
    "resnet_20": partial(resnet, 8, in_channels=1, width=0.5),
    "dncnn": partial(dncnn, 1, width=0.25, blocks=1),
    "srresnet": partial(srresnet, 3, width=0.25, blocks=1, scale=2),
}
SIZE = ["--images", "32", "--train", "4", "--tune", "1", "--gates", "1", "--search", "3", "--seeds", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in TINY.items():
        monkeypatch.setitem(NETWORKS, name, NETWORKS[name]._replace(make=make))
    for name, method in METHODS.items():
        if method.ratios is None:
            monkeypatch.setitem(METHODS, name, method._replace(ratios=(0.5,)))


def run(folder: Path, network: str, *methods: str) -> list[Record]:
    where = ["--out", str(folder / "found.jsonl"), "--work", str(folder / "runs"), "--networks", network]
    main(["run", "dhp_quality", *SIZE, *where, "--methods", *methods])
    return [*read(folder / "found.jsonl")[1].values()]


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every plain training that was asked for."""
    found: list[int] = []
    train = Run.train

    def noted(self: Run, stage: str, model: Any, settings: Any) -> Any:
        found.append(settings.epochs)
        return train(self, stage, model, settings)

    monkeypatch.setattr(Run, "train", noted)
    return found


@pytest.mark.parametrize(
    ("network", "metric", "methods", "trained"),
    [
        ("dncnn", "psnr", [*METHODS], [4, 1, 5, 1, 1, 5, 2]),
        ("srresnet", "psnr", ["l2", "dhp"], [4, 1, 2]),
        ("resnet_20", "accuracy", ["dhp"], [4, 2]),
    ],
)
def test_all_train_for_as_many_epochs(
    network: str, metric: str, methods: list[str], trained: list[int], tmp_path: Path, epochs: list[int]
) -> None:
    """``trained``: the dense network; then what follows every cut."""
    records = run(tmp_path, network, *methods)
    assert [r.figures["method"] for r in records] == methods
    assert epochs == trained
    for record in records:
        assert record.passed
        assert 0.9 * record.figures["ratio"] < record.figures["macs_ratio"] <= record.figures["ratio"]
        assert record.figures[metric] > 0
        assert ("search" in record.figures) == (record.figures["method"] == "dhp")
    assert not [*tmp_path.glob("runs/*/dhp*")], "hypernetworks are large"


def test_the_strength_shrinks_latents_by_what_the_ratio_needs(tmp_path: Path) -> None:
    """Applied step by step with the rates of the search, on normal latents: a share of 1 - sqrt(ratio) vanishes."""
    arguments = argparse.ArgumentParser()
    COMPARISON.options(arguments.add_argument)
    options = arguments.parse_args(["--work", str(tmp_path)])
    options.resume = False
    case = Case("test", "dncnn", NETWORKS["dncnn"], 0, options)
    latents = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs()
    for ratio in (0.5, 0.25):
        method = dhp_quality.dhp(case, ratio)
        assert isinstance(method, DHP)
        search = case.searching
        optimizer = search.optimizer([nn.Parameter(torch.zeros(1))])
        schedule, shrunk = search.schedule(optimizer, search.epochs), 0.0
        for _ in range(search.epochs):
            shrunk += method.strength * optimizer.param_groups[0]["lr"] * len(case.batches())
            optimizer.step()
            schedule.step()
        gone = float((latents < shrunk / dhp_quality.MARGIN).float().mean())
        assert gone == pytest.approx(1 - ratio**0.5, abs=0.01)
    assert search.lr == pytest.approx(case.training.lr / 10)


def test_pairs_of_spoiled_and_clean_pieces() -> None:
    (noisy, clean), (low, high) = (NETWORKS[name].images(0, 4)[0][0] for name in ("dncnn", "srresnet"))
    assert noisy.shape == clean.shape == (1, 24, 24)
    assert float((noisy - clean).std()) == pytest.approx(70 / 255, rel=0.1)
    assert (low.shape, high.shape) == ((3, 16, 16), (3, 32, 32))
    held = NETWORKS["dncnn"].images(0, 4)[1]
    assert torch.equal(held[0][0], held[0][0]), "spoiled the same way every time"


def test_the_page_compares_seed_by_seed(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    begin(file, "python -m model_zoo run dhp_quality")
    for network, metric, method, seed, found in (
        ("resnet_20", "accuracy", "l2", 0, 0.90), ("resnet_20", "accuracy", "l2", 1, 0.92),
        ("resnet_20", "accuracy", "dhp", 0, 0.89), ("resnet_20", "accuracy", "dhp", 1, 0.89),
        ("dncnn", "psnr", "l2", 0, 27.5), ("dncnn", "psnr", "dhp", 0, 27.25),
        ("dncnn", "psnr", "uniform, new weights", 0, 26.5),
    ):  # fmt: skip
        figures = {"network": network, "method": method, "seed": seed, "ratio": 0.5, "macs_ratio": 0.499}
        figures |= {metric: found, "before": found / 2}
        if method == "dhp":
            figures["search"] = "search stopped by its rule after 9 steps" if seed else "search not stopped by its rule"
        append(file, Record(str(Job(network, seed, method, 0.5)), figures, {}, {"budget": ""}))
    main(["page", "dhp_quality", "--out", str(file)])
    page = file.with_suffix(".md").read_text()
    assert "| dhp | 89.00 ± 0.00 (cut: 44.5) | – | 99.8% to 99.8% |" in page
    assert "- 50% of the MACs, seed by seed: dhp loses to l2 by 2.00 ± 1.00.\n" in page
    assert "- 1 of 2 searches of dhp ended because the budget was met." in page
    assert "| l2 | 27.50 (cut: 13.8) | – | 99.8% to 99.8% |" in page
    assert "- 50% of the MACs, seed by seed: dhp beats uniform, new weights by 0.75; it loses to l2 by 0.25.\n" in page
    assert (
        "12 of training, 3 of tuning; 6 at most for the search of dhp, 3 for the gates of scratch. Seeds: 1.\n" in page
    )
    assert "MARGIN" not in page
