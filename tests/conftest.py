"""What every test shares: fixed seeds, the ``gpu`` marker, and weights that hide nothing."""

import functools
import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress

import pytest

# Idle threads sleep instead of spinning: where cores are shared, a run is several times faster. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Nobody's measurements but these tests' own; the folder of the first process is that of all.
os.environ.setdefault("FXPRUNE_CACHE", tempfile.mkdtemp(prefix="fxprune-tests-"))

import torch
from torch import Tensor, nn


def pytest_configure() -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    torch.set_warn_always(True)  # else a warning fails only the first test that meets it


def pytest_collection_finish() -> None:
    gc.freeze()  # thousands of tests and all of torch, which every collection would go through


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and there is none"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny networks: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ops_read_once() -> None:
    """For modules that export much: torch.onnx reads onnxscript's ops anew for every file, a second each time."""
    with suppress(ImportError, AttributeError):  # names of torch's own: without them it takes longer, and no more
        from torch.onnx._internal.exporter import _registration

        apis = _registration.onnxscript_apis
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_plans_everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks are cut channel by channel; with the marker ``aligned`` as by default, in multiples of up to 16.

    Nothing is measured while all tests run, and what is timed is run as few times as may be.
    """
    steps = 16 if request.node.get_closest_marker("aligned") else 1
    monkeypatch.setattr("fxprune.request.COARSEST", steps)
    monkeypatch.setattr("fxprune.request.alignment", lambda provider: steps)
    monkeypatch.setattr("fxprune.deploy.stopwatch._SECONDS", 0.0)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and every running statistic of ``model`` random values of a sane scale, in place.

    A fresh network hides mistakes: its biases are zeros, its norms do nothing, its layer scales are 1e-6. Here every
    index differs from every other, and activations neither vanish nor explode.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    def uniform(tensor: Tensor) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            if name.endswith("bias"):
                normal(parameter, 0.2)
            elif parameter.dim() < 2:  # the weights of norms, layer scales
                uniform(parameter)
            elif isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)) or name.endswith("weight"):
                normal(parameter, (parameter.shape[0] / parameter.numel()) ** 0.5)
            else:  # tokens, position embeddings, tables
                normal(parameter, 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                normal(buffer, 0.2)
            elif name.endswith("running_var"):
                uniform(buffer)
    return model
