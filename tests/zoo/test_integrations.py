"""The study of quantisers and runtimes: what it compares, and what it tells, on a network that is made up."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from model_zoo.measuring import integrations as measuring
from model_zoo.measuring import trainers
from model_zoo.measuring.integrations import Prepared, Ran, Way
from model_zoo.measuring.trainers import TRAINERS
from model_zoo.pages import integrations as pages
from model_zoo.records import Results
from model_zoo.studies import integrations as study

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        return self.head(torch.relu(x + self.b(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(1, 3, 8, 8),) for _ in range(9)]
    monkeypatch.setattr(measuring, "made", lambda spec: (Net().eval(), batches))
    monkeypatch.setattr(measuring, "RUNS", 1)
    monkeypatch.setattr(measuring, "SECONDS", 0.0)


def measured(way: str) -> study.Record:
    return study.measure(study.Case("net", way), measuring.prepared)


@pytest.mark.parametrize("way", ["FX graph mode int8", "onnxruntime", "onnxruntime int8 QDQ"])
def test_a_way_is_gone_by_the_real_library(way: str) -> None:
    record = measured(way)
    for name in ("dense", "pruned", "class"):
        found = record.figures[name]
        assert found["error"] < 0.1
        assert found["ms"] > 0
        assert found["ops"]
    assert record.figures["pruned"]["bytes"] < record.figures["dense"]["bytes"]
    assert (record.checks["pruned"], record.checks["ops"]) == ("", "")
    assert ("milliseconds" in record.checks) == ("int8" in way)


@pytest.mark.parametrize("way", TRAINERS)
def test_a_trainer_is_held_to_a_plain_loop(way: str) -> None:
    for module in study.WAYS[way].modules:
        pytest.importorskip(module)
    record = measured(way)
    assert "dense fails" not in record.figures, record.figures
    for name in ("dense", "pruned", "class"):
        assert record.figures[name]["error"] < 1e-5
        assert record.figures[name]["moved"] > 1e-3
    assert record.checks == {"pruned": "", "ops": "", "trained": ""}


def test_a_trainer_that_trains_otherwise_or_nothing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(net: nn.Module, batches: Sequence[tuple[Tensor]], folder: Path) -> Ran:
        return Ran(net, 1, Counter())

    for plain, why in ((trainers.plain, "dense: .*, trained by "), (lambda net, batches: net, "trained by 0.0e.00")):
        monkeypatch.setitem(study.WAYS, "own", Way(run, False, False, "", (), plain))
        assert re.search(why, measured("own").checks["trained"])


def entered(monkeypatch: pytest.MonkeyPatch, run: object, *modules: str) -> None:
    monkeypatch.setitem(study.WAYS, "own", Way(run, False, False, "openvino", modules))  # type: ignore[arg-type]


def test_a_recording_stands_for_a_class_that_does_not_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(net: nn.Module, batches: Sequence[tuple[Tensor]], folder: Path) -> Ran:
        if not isinstance(net, fx.GraphModule):
            raise ValueError("a class")
        return Ran(net, 1, Counter())

    entered(monkeypatch, run)
    record = measured("own")
    assert record.figures["dense fails"] == "ValueError: a class"
    assert record.figures["dense"]["error"] == record.figures["pruned"]["error"] == 0
    assert "class" not in record.figures
    assert record.passed
    text = "\n\n".join(pages.page(Results({}, {record.name: record}, Path("none")), []))
    assert "its recording stands for it in the table:\n\n- own: ValueError: a class" in text


def test_what_the_dense_network_does_not_do_is_not_asked_of_the_pruned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(net: nn.Module, batches: Sequence[tuple[Tensor]], folder: Path) -> Ran:
        raise ValueError("no such op")

    entered(monkeypatch, run)
    record = measured("own")
    assert record.figures["dense fails"] == "ValueError: no such op"
    assert record.checks == {}


def test_a_library_that_is_not_installed_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    entered(monkeypatch, None, "no_such_module")
    text = measured("own").figures["dense fails"]
    assert text == "This needs no_such_module: pip install 'fxprune[openvino]'."


def test_a_graph_that_fails_alone_or_fuses_elsewhere_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(net: nn.Module, batches: Sequence[tuple[Tensor]], folder: Path) -> Ran:
        if isinstance(net, fx.GraphModule):
            raise ValueError("a graph")
        return Ran(net, 1, Counter())

    entered(monkeypatch, refused)
    assert measured("own").checks["pruned"] == "pruned: ValueError: a graph"

    def fused(net: nn.Module, batches: Sequence[tuple[Tensor]], folder: Path) -> Ran:
        return Ran(net, 1, Counter({"Conv": 2 + isinstance(net, fx.GraphModule), "Shape": int(len(batches) > 1)}))

    entered(monkeypatch, fused)
    assert measured("own").checks["ops"] == "Conv: 2 in dense, 3 in pruned"


def test_the_page_tells_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = measured("FX graph mode int8")
    slow, refused = copy.deepcopy(fine), copy.deepcopy(fine)
    slow.name, slow.checks["milliseconds"] = "net, slow", "0.90 of the dense network's"
    refused.name, refused.figures, refused.checks = "net, other", {"way": "other", "dense fails": "why"}, {}
    fine.checks["milliseconds"] = ""
    records = {record.name: record for record in (fine, slow, refused)}
    text = "\n\n".join(pages.page(Results({}, records, Path("none")), ["net, slow", "net, later"]))
    assert text.startswith("Dense, 2 of 3 go; of these 2 do pruned, as graph and as class, and 1 pass every check.")
    assert "milliseconds: 0.90 of the dense network's" in text
    assert "- other: why" in text
    assert "Not run yet: net, later." in text


def test_what_a_class_cannot_hold_is_pruned_for_it() -> None:
    networks, batches, ratio = measuring.prepared("net")
    assert isinstance(networks["class"], Net)
    assert 0 < ratio <= measuring.FLOPS
    report = networks["pruned"].meta["fxprune"]
    assert isinstance(report, fxprune.Report)
    assert Prepared(networks, batches, ratio).networks["dense"] is networks["dense"]
