"""The comparison of accuracies, on networks and data that are tiny: its rules, resuming, and the page."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import fxprune
from fxprune.methods import Criterion, available, resolve
from model_zoo.comparison import Job, criterion, noisy
from model_zoo.papers import resnet
from model_zoo.peers import torch_pruning, torch_pruning_in_steps
from model_zoo.recipes.common import Run
from model_zoo.records import Record, append, begin, read
from model_zoo.runner import main
from model_zoo.studies.accuracy import METHODS, NETWORKS

OURS = ("dense", "uniform, new weights", "l2", "taylor", "slimming", "scratch")
tiny = partial(resnet, 8, in_channels=1, width=0.5)


def small_vit() -> VisionTransformer:
    return VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=24, depth=2, num_heads=3,
        class_token=False, global_pool="avg",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "resnet_20", NETWORKS["resnet_20"]._replace(make=tiny))
    for name, method in METHODS.items():
        if method.ratios != (1.0,):
            monkeypatch.setitem(METHODS, name, method._replace(ratios=(0.5,)))


def run(folder: Path, *methods: str, resume: bool = False) -> dict[str, Record]:
    size = ["--images", "24", "--train", "2", "--tune", "1", "--gates", "1", "--seeds", "1"]
    where = ["--out", str(folder / "accuracy.jsonl"), "--work", str(folder / "runs"), "--networks", "resnet_20"]
    main(["run", "accuracy", *size, *where, *(["--resume"] if resume else []), "--methods", *methods])
    return read(folder / "accuracy.jsonl")[1]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Stage and epochs of every plain training that was asked for."""
    found: list[tuple[str, int]] = []
    train = Run.train

    def noted(self: Run, stage: str, model: Any, settings: Any) -> Any:
        found.append((stage.partition(" ")[0], settings.epochs))
        return train(self, stage, model, settings)

    monkeypatch.setattr(Run, "train", noted)
    return found


def test_every_method_trains_for_what_the_rules_say(tmp_path: Path, trained: list[tuple[str, int]]) -> None:
    records = run(tmp_path, *OURS)
    assert [r.figures["method"] for r in records.values()] == list(OURS)
    assert trained == [("dense", 2), ("run", 1), ("run", 3), ("run", 1), ("run", 1), ("run", 1), ("run", 3)]
    for record in records.values():
        figures = record.figures
        assert record.passed
        assert figures["macs_ratio"] <= figures["ratio"]
        assert (figures["before"] is None) == (figures["method"] in ("uniform, new weights", "scratch"))
        assert figures["macs_ratio"] > 0.9 * figures["ratio"]
    assert (
        (tmp_path / "accuracy.md")
        .read_text()
        .startswith("# python -m model_zoo run accuracy --networks resnet_20 --methods ")
    )


def test_a_run_goes_on_with_what_is_missing(tmp_path: Path, trained: list[tuple[str, int]]) -> None:
    whole = run(tmp_path, "dense", "l2", "slimming")
    file = tmp_path / "accuracy.jsonl"
    lines = file.read_text().splitlines()
    trained.clear()
    assert run(tmp_path, "dense", "l2", "slimming", resume=True) == whole
    assert not trained
    file.write_text("\n".join(lines[:-1]) + "\n")
    again = run(tmp_path, "dense", "l2", "slimming", resume=True)
    assert [stage for stage, _ in trained] == ["dense", "run"], "dense is read back"
    assert [r.figures for r in again.values()] == [r.figures for r in whole.values()]
    assert file.read_text().splitlines()[:-1] == lines[:-1], "it only grows"


def test_criteria_cut_the_same_dense_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    prune = fxprune.prune

    def noted(model: Any, *args: Any, **options: Any) -> Any:
        if options["method"] in ("l2", "taylor"):
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return prune(model, *args, **options)

    monkeypatch.setattr(fxprune, "prune", noted)
    run(tmp_path, "l2", "taylor")
    one, other = seen
    assert all(torch.equal(one[name], other[name]) for name in one)
    first = tiny().state_dict()
    assert not torch.equal(first["head.weight"], one["head.weight"])


def test_a_budget_out_of_reach_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "l2", criterion("l2", options=fxprune.Options(max_ratio=0.1))._replace(ratios=(0.1,)))
    (record,) = run(tmp_path, "l2").values()
    assert "cannot be reached: the smallest reachable ratio is" in record.checks["budget"]
    assert "accuracy" not in record.figures
    assert "| l2 | – | – | not reached | – |" in (tmp_path / "accuracy.md").read_text()


def test_without_the_peer_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    records = run(tmp_path, "l2", "Torch-Pruning Taylor")
    assert [r.figures["method"] for r in records.values()] == ["l2"]
    assert "torch-pruning is not installed (pip install '.[bench]'): no Torch-Pruning Taylor" in capsys.readouterr().out


def test_noise_is_that_of_the_seed() -> None:
    one, same, other = (noisy(1.0, seed, 4)[0].tensors[0] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    clean = noisy(0.0, 0, 4)[0].tensors[0]
    assert float((one - clean).std()) == pytest.approx(1.0, rel=0.1)


# -- the page ----------------------------------------------------------------------------------------------------------


def write(file: Path, *runs: tuple[str, int, float, float | None]) -> str:
    """The page of runs: method, seed, ratio, accuracy."""
    begin(file, "python -m model_zoo run accuracy")
    for method, seed, ratio, found in runs:
        name = str(Job("resnet_20", seed, method, ratio))
        figures = {"network": "resnet_20", "method": method, "seed": seed, "ratio": ratio}
        if found is not None:
            figures |= {"accuracy": found, "before": 0.5, "macs_ratio": 0.99 * ratio}
        append(file, Record(name, figures, {}, {"budget": "" if found is not None else "not so small"}))
    main(["page", "accuracy", "--out", str(file)])
    return file.with_suffix(".md").read_text()


def test_the_page_has_means_and_standard_errors(tmp_path: Path) -> None:
    page = write(
        tmp_path / "runs.jsonl",
        ("dense", 0, 1.0, 0.95), ("dense", 1, 1.0, 0.97),
        ("l2", 0, 0.5, 0.90), ("l2", 1, 0.5, 0.92), ("l2", 0, 0.25, 0.8), ("l2", 0, 0.1, None),
        ("taylor", 0, 0.5, 0.93), ("taylor", 1, 0.5, 0.95), ("taylor", 2, 0.5, 0.99), ("random", 0, 0.5, 0.99),
        ("Torch-Pruning Taylor", 0, 0.5, 0.9), ("Torch-Pruning group norm", 1, 0.5, 0.92),
        ("Torch-Pruning group norm", 0, 0.5, 0.92),
    )  # fmt: skip
    l2 = "91.00 ± 1.00 (cut: 50.0), 2 of 3 seeds | 80.00 (cut: 50.0), 1 of 3 seeds | not reached"
    assert f"| l2 | {l2} | 99.0% to 99.0% |" in page
    dense = "96.00 ± 1.00 (cut: 50.0), 2 of 3 seeds"
    assert f"| dense | {dense} | {dense} | {dense} | 99.0% to 99.0% |" in page
    assert re.findall("^- .* points.*$", page, re.MULTILINE) == [
        "- 50% of the MACs: the best of 2 methods of fxprune is taylor, the best of 2 of Torch-Pruning group norm. "
        "Seed by seed it is ahead by 2.00 ± 1.00 points. The more methods, the luckier the best."
    ]
    assert "which was trained for 40 epochs" in page


def test_the_page_has_a_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure is drawn with the extra: pip install '.[bench]'")
    page = write(tmp_path / "runs.jsonl", ("dense", 0, 1.0, 0.95), ("l2", 0, 0.5, 0.9), ("l2", 0, 0.1, None))
    assert "![accuracy over the MACs that stay](runs.png)" in page
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_the_last_line_of_a_run_counts(tmp_path: Path) -> None:
    page = write(tmp_path / "runs.jsonl", ("l2", 0, 0.5, 0.1), ("l2", 0, 0.5, 0.9))
    assert "| l2 | 90.00 (cut: 50.0) | – | – |" in page


# -- the peer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("importance", "isomorphic"), [("group_norm", False), ("taylor", True)])
@pytest.mark.parametrize("make", [tiny, small_vit])
def test_the_peer_gets_what_the_budget_allows(make: Any, importance: Any, isomorphic: bool) -> None:
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is an extra: pip install '.[bench]'")
    torch.manual_seed(0)
    ratio = 0.3
    model, example = make().train(), torch.randn(1, 1, 16, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(torch.randn(8, 1, 16, 16), torch.arange(8))] * 2
    whole = fxprune.analyze(model, example).macs()
    pruned = torch_pruning(model, example, int(ratio * whole), importance, batches, isomorphic)
    assert 0.8 * ratio < fxprune.analyze(pruned, example).macs() / whole <= ratio
    assert pruned(torch.randn(3, 1, 16, 16)).shape == (3, 10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *pruned.parameters()])


def test_the_peer_in_steps_stops_where_the_budget_is_met() -> None:
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is an extra: pip install '.[bench]'")
    torch.manual_seed(0)
    model, example = tiny().train(), torch.randn(1, 1, 16, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = fxprune.analyze(model, example).macs()
    pruned = torch_pruning_in_steps(model, example, int(0.3 * whole))
    assert 0.8 * 0.3 < fxprune.analyze(pruned, example).macs() / whole <= 0.3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    seen = {name: value for name, value in pruned.state_dict().items() if "num_batches" in name}
    assert all(torch.equal(value, before[name]) for name, value in seen.items()), "to count is not to train"
    with pytest.raises(ValueError, match=r"gives no network of 10 MACs in 400 steps"):
        torch_pruning_in_steps(tiny(), example, 10)


def test_the_peer_says_when_a_budget_is_out_of_reach() -> None:
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is an extra: pip install '.[bench]'")
    with pytest.raises(ValueError, match="gives no network of 10 MACs at any ratio of channels"):
        torch_pruning(tiny(), torch.randn(1, 1, 16, 16), 10, "group_norm")


def test_all_criteria_are_compared() -> None:
    known = {name for name in available() if isinstance(resolve(name), Criterion)}
    assert len(known) > 9
    refitted = {"obs"}  # says what is left after a refit: compared there, by the study reconstruction
    assert known - refitted <= {*METHODS}, "add a line to METHODS"
