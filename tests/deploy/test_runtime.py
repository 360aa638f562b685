import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fxprune.deploy import export
from fxprune.deploy.runtime import CPU, Session, available_providers, check_provider, open_session
from fxprune.errors import ExportError, InputError, first_line


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export(nn.Linear(3, 2), path, torch.randn(1, 3), provider=CPU)
    return path


def test_a_session_runs_and_is_timed(net: Path) -> None:
    session = open_session(net, CPU)
    assert session.provider == CPU
    (output,) = session.run([torch.randn(5, 3)])
    assert output.shape == (5, 2)
    start = time.perf_counter()
    latency = session.latency_ms([torch.randn(1, 3)], seconds=0.0, least=3)
    assert 0 < latency < 1000 * (time.perf_counter() - start)


def test_without_a_gpu_the_cpu_is_chosen(net: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = "CUDAExecutionProvider" if torch.cuda.is_available() else CPU
    assert open_session(net, None).provider == expected
    assert capfd.readouterr() == ("", "")


def test_files_and_inputs_that_onnxruntime_refuses(net: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.onnx").write_bytes(net.read_bytes()[:40])
    with pytest.raises(ExportError, match=r"^onnxruntime cannot load the exported file: "):
        Session(tmp_path / "damaged.onnx", CPU)
    with pytest.raises(ExportError, match=r"^onnxruntime cannot run the exported file: "):
        Session(net, CPU).run([torch.randn(5, 4)])


def test_unknown_providers_list_the_known_ones() -> None:
    check_provider(None)
    check_provider(CPU)
    with pytest.raises(InputError) as caught:
        check_provider("Abacus")
    assert str(caught.value) == (
        f"this onnxruntime has no execution provider 'Abacus'; it has {', '.join(available_providers())}"
    )


def test_first_line() -> None:
    assert first_line(ValueError("\n  what is wrong.\nand pages more")) == "what is wrong"
    assert first_line(ValueError()) == "ValueError"
