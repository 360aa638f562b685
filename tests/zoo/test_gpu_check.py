import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.deploy.runtime import CPU
from fxprune.errors import ExportError
from model_zoo.records import begin
from model_zoo.runner import main
from model_zoo.studies import gpu_check
from model_zoo.studies.gpu_check import LAYOUT

pytestmark = pytest.mark.usefixtures("ops_read_once")

NET = """
from torch import nn

def make():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )
    net.pretrained_cfg = {"input_size": (3, 12, 12)}
    return net
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:make"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "gpu.json"


def run(out: Path, *words: str, batches: tuple[str, ...] = ("1",)) -> int:
    """On the processor."""
    where = ["--out", str(out), "--device", "cpu", "--provider", CPU, "--batches", *batches]
    return main(["run", "gpu_check", *words, *where])


def refused(words: list[str]) -> object:
    with pytest.raises(SystemExit) as stopped:
        main(["run", "gpu_check", *words])
    return stopped.value.code


def test_without_a_gpu_it_says_so_and_writes_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(["--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "error: nothing can be checked here, and nothing was written: torch finds no CUDA device\n" in said.err
    assert not out.parent.exists()


def test_a_provider_that_does_not_work(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["any", "--out", str(out), "--device", "cpu", "--provider", "Abacus"]) == 2
    assert "this onnxruntime has no execution provider 'Abacus'; it has " in capsys.readouterr().err
    assert not out.parent.exists()


def check_file(out: Path, spec: str, device: str) -> None:
    data = json.loads(out.read_text())
    assert data["device"] == device
    assert data["torch"] == torch.__version__.partition("+")[0]
    (entry,) = data["networks"]
    assert entry["name"] == spec
    assert set(entry["checks"]) == {
        "prune",
        *(f"{kind} {dtype}" for dtype in ("float32", "float16") for kind in ("dense", "pruned")),
        *(f"latency {dtype} {batch}" for dtype in ("float32", "float16") for batch in (1, 2)),
    }
    assert not any(entry["checks"].values()), entry["checks"]
    figures = entry["figures"]
    assert figures["ratio"] <= 0.5
    assert figures["onnx"]["float32"]["pruned"] < 1e-5 < figures["onnx"]["float16"]["pruned"]
    for dtype in ("float32", "float16"):
        for batch in ("1", "2"):
            assert all(ms > 0 for ms in figures["latency_ms"][dtype][batch].values())
    page = out.with_suffix(".md").read_text()
    assert "1 of 1 networks pass every check" in page
    assert "float16, batch 2: dense → pruned ms" in page


def test_the_same_code_on_the_cpu(out: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LEAST", 1)
    monkeypatch.setattr(gpu_check, "SECONDS", 0)
    assert run(out, spec, batches=("1", "2")) == 0
    check_file(out, spec, "cpu")
    monkeypatch.setattr(gpu_check, "_networks", lambda *_: pytest.fail("it has passed"))
    assert run(out, spec, "--resume", batches=("1", "2")) == 0


def test_some_at_a_time(out: Path, spec: str) -> None:
    assert run(out, spec, "timm:no_such", "--jobs", "2") == 1
    found = {entry["name"]: entry for entry in json.loads(out.read_text())["networks"]}
    good, bad = found[spec], found["timm:no_such"]
    assert not any(good["checks"].values()), good["checks"]
    assert "latency float32 1" in good["checks"]
    assert [*bad["checks"]] == ["prune"]
    assert "no_such" in bad["checks"]["prune"]


def test_what_fails_is_told_and_run_again(out: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fxprune.export

    def export(network: Any, path: Path, *rest: Any, half: bool = False, **options: Any) -> Any:
        if half:
            raise ExportError("off | by far")
        return real(network, path, *rest, **options)

    monkeypatch.setattr(fxprune, "export", export, raising=False)
    monkeypatch.setattr(gpu_check, "LEAST", 1)
    monkeypatch.setattr(gpu_check, "SECONDS", 0)
    assert run(out, spec) == 1
    (entry,) = json.loads(out.read_text())["networks"]
    assert entry["checks"]["pruned float16"] == "ExportError: off | by far"
    assert "latency float16 1" not in entry["checks"], "nothing wrong is timed"
    assert "**fails** dense float16: ExportError: off \\| by far" in out.with_suffix(".md").read_text()
    measured = []
    monkeypatch.setattr(gpu_check, "_networks", lambda *given: measured.append(given[0]) or {})
    run(out, spec, "--resume")
    assert measured == [spec]


def test_a_file_of_another_device_is_not_mixed_in(out: Path, spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    begin(out, "command", LAYOUT, device="NVIDIA H100")
    assert refused([spec, "--out", str(out), "--device", "cpu", "--provider", CPU, "--resume"]) == 2
    assert f"error: {out} is of another device, NVIDIA H100; give another --out\n" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_the_gpu(out: Path, spec: str) -> None:
    assert main(["run", "gpu_check", spec, "--out", str(out), "--batches", "1", "2"]) == 0
    check_file(out, spec, torch.cuda.get_device_name())
