"""The comparison with Torch-Pruning on a tiny network: what is measured, a peer that hangs or fails, the page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from model_zoo.measuring.benchmark import Bench
from model_zoo.records import Record, read
from model_zoo.runner import main
from model_zoo.studies import benchmark
from model_zoo.studies.benchmark import measured

NET = """
import torch
from torch import nn

def tiny():
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )
    return net
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    import torch

    from model_zoo import networks

    (tmp_path / "tiny.py").write_text(NET)
    monkeypatch.setattr(networks, "example_inputs", lambda model: ((torch.randn(1, 3, 16, 16),), {}))
    before = torch.get_num_threads()
    found = Bench(f"{tmp_path / 'tiny.py'}:tiny", benchmark.CHANNELS)
    torch.set_num_threads(before)
    return found


def test_ours_is_verified_only_where_asked_and_the_floor_copies_what_is_left(bench: Bench) -> None:
    figures = bench.ours()
    assert figures["macs"] <= 0.5 * figures["dense_macs"]
    assert "verifying" not in figures["stages"]
    assert figures["mib"] >= 0
    assert "verifying" in bench.ours(verify=True)["stages"]
    for other in (bench.floor(), bench.forward()):
        assert other["s"] > 0
        assert other["cpu_s"] > 0


def test_the_peers_macs_become_our_budget(bench: Bench) -> None:
    pytest.importorskip("torch_pruning")
    peer = bench.peer()
    assert peer["macs"] < bench.ours()["dense_macs"]
    ours = bench.ours()
    assert 0.95 * peer["macs"] < ours["macs"] <= peer["macs"]


def _spoken(spec: str, rounds: int, peer: bool, latency: bool, sender: Any) -> None:
    """In place of the measurements: the peer hangs if the network is called so."""
    sender.send(("started", {}))
    figures = {"s": 2.0, "cpu_s": 1.0, "mib": 3.0, "macs": 50}
    if peer:
        sender.send(("peer, first", {**figures, "mib": 9.0}))
    sender.send(("ours, first", {**figures, "s": 5.0}))
    for _ in range(rounds):
        sender.send(("ours", {**figures, "dense_macs": 100, "stages": {}}))
        if peer and spec == "hangs":
            time.sleep(60)
        if peer:
            sender.send(("peer", {"fails": "TypeError"} if spec == "fails" else {**figures, "cpu_s": 4.0}))
        for what in ("forward", "floor"):
            sender.send((what, figures))
    sender.send(("verified", {"s": 7.0}))


def test_medians_of_a_round_and_the_most_memory() -> None:
    figures = measured("network", 2, 30, work=_spoken).figures
    assert (figures["ours_cpu_s"], figures["peer_cpu_s"]) == (1.0, 4.0)
    assert figures["peer_mib"] == 9.0
    assert (figures["first_s"], figures["verified_s"], figures["runs"]) == (5.0, 7.0, 2)


def test_a_peer_that_does_not_end_is_ended_and_ours_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "START", 30)
    figures = measured("hangs", 2, 3, work=_spoken).figures
    assert figures["peer_fails"] == "no end within 3 s"
    assert figures["runs"] == 2
    assert "peer_cpu_s" not in figures


def test_the_page_names_what_was_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = {
        "timm:quick": {"ours_cpu_s": 1.0, "peer_cpu_s": 20.0},
        "timm:slow": {"ours_cpu_s": 3.0, "peer_cpu_s": 2.0},
        "timm:alone": {"ours_cpu_s": 1.0, "peer_fails": "TypeError: no"},
    }

    def said(spec: str, *_: Any) -> Record:
        figures: dict[str, Any] = {"ours_s": 1.0, "ours_macs": 1, "ours_dense_macs": 2, **spoken[spec]}
        return Record(spec, figures)

    monkeypatch.setattr(benchmark, "measured", said)
    out = tmp_path / "benchmark.jsonl"
    main(["run", "benchmark", *spoken, "--out", str(out), "--rounds", "1"])
    assert [*read(out)[1]] == [*spoken]
    text = out.with_suffix(".md").read_text()
    assert "- never above 1: missed by timm:slow (1.50);" in text
    assert "- at most 0.5 at the median: 0.78;" in text
    assert "- at most 0.1 where Torch-Pruning takes more than 10 s: timm:quick 0.05." in text
    assert "- timm:alone: TypeError: no" in text
    assert out.with_suffix(".png").exists()
