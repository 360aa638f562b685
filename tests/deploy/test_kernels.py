"""Kernels as graphs of their own, and what is kept of their timings."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from torch import nn

import fxprune
from fxprune.deploy import kernels, runtime, store
from fxprune.deploy.engines import EAGER, INDUCTOR, OPENVINO
from fxprune.deploy.kernel_graph import KernelGraph
from fxprune.deploy.kernels import COPIES, Kernel, alignment, kernel_ms
from fxprune.deploy.runtime import CPU
from fxprune.errors import ExampleInputsError, ExportError, InputError

OPTIONS = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "transposed": False, "output_padding": (0, 0),
           "groups": 1}  # fmt: skip


def convolution(x: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Kernel:
    return Kernel("convolution", (x, weight), True, tuple({**OPTIONS, **options}.items()))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))
    store.store.cache_clear()
    yield tmp_path / "cache"
    store.store.cache_clear()


def run(kernel: Kernel, on: str = CPU) -> torch.Tensor:
    graph = kernels._graph(kernel)
    if on == EAGER:
        computed: torch.Tensor = graph.as_module()(*graph.inputs())
        return computed
    (result,) = runtime.Session(graph.as_onnx(), CPU).run(graph.inputs())
    return result


@pytest.mark.parametrize("on", [CPU, EAGER])
@pytest.mark.parametrize(
    "kernel",
    [
        convolution((2, 3, 9, 8), (5, 3, 3, 3)),
        convolution((1, 6, 9, 8), (6, 1, 3, 5), stride=(2, 1), padding=(1, 2), groups=6),
        convolution((1, 6, 9, 9), (4, 3, 3, 3), padding=(2, 2), dilation=(2, 2), groups=2),
        convolution((1, 4, 5, 5), (4, 3, 3, 3), transposed=True, stride=(2, 2), padding=(1, 1), output_padding=(1, 1)),
        Kernel("convolution", ((1, 3, 9), (4, 3, 3)), True,
               tuple({**OPTIONS, "stride": (2,), "padding": (1,), "dilation": (1,), "output_padding": (0,)}.items())),
    ],
)  # fmt: skip
def test_a_timed_convolution_is_that_of_torch(kernel: Kernel, on: str) -> None:
    x, weight = (torch.ones(shape) for shape in kernel.shapes)
    expected = torch.ops.aten.convolution(x, weight, None, **dict(kernel.options))
    torch.testing.assert_close(run(kernel, on), expected * sum(range(1, COPIES + 1)))


@pytest.mark.parametrize("on", [CPU, EAGER])
def test_a_timed_product_is_that_of_torch(on: str) -> None:
    given, constant = (Kernel("product", ((2, 5, 3), (2, 3, 4)), flag) for flag in (False, True))
    torch.testing.assert_close(run(given, on), torch.full((2, 5, 4), 3.0 * COPIES))
    torch.testing.assert_close(run(constant, on), torch.full((2, 5, 4), 3.0 * sum(range(1, COPIES + 1))))


def test_half_precision_is_timed_in_half_precision() -> None:
    assert run(Kernel("product", ((2, 3), (3, 4)), True, dtype="float16")).dtype == torch.float16


def test_a_kernel_is_timed_once_per_device(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, other = (Kernel("product", ((8, 8), (8, size))) for size in (8, 9))
    (first,) = kernel_ms([kernel], CPU, 1)
    assert first >= 0
    store.store.cache_clear()  # as a new process would begin
    timed: list[Any] = []
    monkeypatch.setattr(kernels, "_time", lambda *args: timed.append(args) or 5.0)
    monkeypatch.setattr(kernels, "_idle_ms", lambda *_: 1.0)
    assert kernel_ms([kernel, other, other], CPU, 1) == [first, 4.0 / COPIES, 4.0 / COPIES]
    assert len(timed) == 1
    assert kernel_ms([kernel], CPU, 2) == [4.0 / COPIES], "with more threads it is another time"


def test_what_was_timed_before_an_interruption_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0])

    def time(*_: Any) -> float:
        for value in times:
            return value
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "_time", time)
    monkeypatch.setattr(kernels, "_idle_ms", lambda *_: 0.0)
    some = [Kernel("product", ((8, 8), (8, size))) for size in (8, 9)]
    with pytest.raises(KeyboardInterrupt):
        kernel_ms(some, CPU, 1)
    assert kernel_ms(some[:1], CPU, 1) == [3.0 / COPIES]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"values": 3}', '{"values": {"a": "b"}}'])
def test_a_damaged_file_is_measured_anew(cache: Path, damage: str) -> None:
    kept = store.Store(CPU, 1)
    kept.add({"one": 1.0})
    kept.path.write_text(damage)
    assert "one" not in store.Store(CPU, 1)
    store.Store(CPU, 1).add({"two": 2.0})
    assert json.loads(kept.path.read_text())["values"] == {"two": 2.0}


def test_two_processes_keep_what_both_measured(cache: Path) -> None:
    one, two = store.Store(CPU, 1), store.Store(CPU, 1)
    one.add({"a": 1.0})
    two.add({"b": 2.0})
    assert set(json.loads(one.path.read_text())["values"]) == {"a", "b"}


def test_other_versions_and_devices_have_files_of_their_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {store.Store(CPU, threads).path for threads in (0, 1)}
    monkeypatch.setattr(runtime, "version", lambda: "0.0")
    paths.add(store.Store(CPU, 1).path)
    monkeypatch.setattr(store, "_processor", lambda: "another")
    paths.add(store.Store(CPU, 1).path)
    assert len(paths) == 4


def test_a_folder_that_takes_no_files_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "file" / "below"))
    kept = store.Store(CPU, 1)
    with pytest.warns(UserWarning, match="Measurements cannot be kept in .*; they are made anew"):
        kept.add({"one": 1.0})
    assert kept["one"] == 1.0


@pytest.mark.parametrize(
    ("readings", "expected", "taken"), [([16, 16], 16, 2), ([4, 16, 16], 16, 3), ([1, 2, 4, 1, 2], 4, 5)]
)
def test_an_alignment_counts_when_two_readings_agree(
    cache: Path, monkeypatch: pytest.MonkeyPatch, readings: list[int], expected: int, taken: int
) -> None:
    left = list(readings)
    monkeypatch.setattr(kernels, "_measure_alignment", lambda provider: left.pop(0))
    assert alignment(CPU) == expected
    assert len(readings) - len(left) == taken
    assert alignment(CPU) == expected, "kept"


def test_the_finest_alignment_that_is_as_fast_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that works on blocks of 8 channels."""

    def timer(graph: KernelGraph, provider: str) -> Any:
        channels = graph.given[0][1]
        cost = -(-channels // 8) * 8  # as if padded to whole blocks
        return lambda: float(cost * channels)

    monkeypatch.setattr(kernels, "_timer", timer)
    for name in ("_inverted", "_plain", "_products"):
        monkeypatch.setattr(kernels, name, lambda channels, images: (KernelGraph(given=[(1, channels)]), channels**2))
    monkeypatch.setattr(kernels, "_WORTH", 1.01)
    assert kernels._measure_alignment(CPU) == 8


def test_the_chains_that_decide_the_alignment_run(cache: Path) -> None:
    assert alignment(CPU) in kernels.ALIGNMENTS


# -- two networks beside each other ------------------------------------------------------------------------------------


def test_a_bench_runs_both_networks_at_the_batch_size_of_the_example() -> None:
    dense = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))).eval()
    x = torch.randn(5, 3, 8, 8)
    pruned = fxprune.prune(dense, x, flops=0.6, progress=False)
    found = fxprune.bench(dense, pruned, x, threads=1, runs=4)
    assert found.batch == 5
    assert found.provider == CPU
    assert found.threads == 1
    assert found.runs >= 4
    assert found.dense_ms > 0
    assert found.pruned_ms > 0
    assert found.ratio == found.pruned_ms / found.dense_ms
    assert "1 thread" in str(found)
    assert "batch size 5" in str(found)


def test_a_bench_without_inputs_takes_those_of_the_pruned_network() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * scale

    dense = Scaled(4, 4)
    pruned = fxprune.record(dense, torch.randn(5, 4), {"scale": torch.randn(5, 4)})
    assert fxprune.bench(dense, pruned, provider=EAGER, threads=1, runs=1).batch == 5
    with pytest.raises(ExampleInputsError, match=r"cannot tell what Scaled.forward\(input, scale\) takes"):
        fxprune.bench(dense, dense, provider=EAGER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": 0}, "runs=0 must be a whole number of at least 1"),
        ({"threads": True}, "threads=True must be a whole number of at least 1"),
        (
            {"provider": "Nobody"},
            r"provider 'Nobody'; it has .*\. Besides there are eager, inductor, openvino",
        ),
    ],
)
def test_a_bench_refuses_what_it_cannot_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxprune.bench(nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2), **options)


def test_a_bench_is_of_modules() -> None:
    net: Any = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"^pruned is <function .*; pass a torch\.nn\.Module\.$"):
        fxprune.bench(net, run, torch.ones(1, 2), provider=EAGER)
    with pytest.raises(InputError, match=r"^dense is None; pass a torch\.nn\.Module\.$"):
        fxprune.bench(None, net, torch.ones(1, 2), provider=EAGER)


@pytest.mark.parametrize("provider", [EAGER, INDUCTOR, OPENVINO])
def test_a_bench_on_another_engine(provider: str) -> None:
    if provider == OPENVINO:
        pytest.importorskip("openvino")
    if provider == INDUCTOR and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no compiler")
    dense, x = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)), torch.ones(64, 512)
    before = torch.get_num_threads()
    found = fxprune.bench(dense, nn.Sequential(nn.Linear(512, 1)), x, provider=provider, threads=1, runs=4)
    assert found.provider == provider
    assert found.version.split()[0] == {OPENVINO: "openvino"}.get(provider, "torch")
    assert 0 < found.pruned_ms < found.dense_ms
    assert dense.training
    assert torch.get_num_threads() == before


def test_every_network_of_a_class_is_compiled_for_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        shapes.append([p.meta["example_value"].shape[0] for p in graph.graph.find_nodes(op="placeholder")][-1])
        return graph.forward

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch in (2, 3, 4):
            fxprune.bench(Doubled(4, 4), Doubled(4, 2), torch.ones(batch, 4), provider=INDUCTOR, threads=1, runs=1)
    assert shapes == [2, 2, 3, 3, 4, 4]  # and none of them a symbol


def test_kernels_of_engines_are_kept_apart(cache: Path) -> None:
    kernel = Kernel("product", ((8, 8), (8, 8)))
    kernel_ms([kernel], CPU, 1)
    assert kernel_ms([kernel], INDUCTOR, 1) == kernel_ms([kernel], EAGER, 1), "compiled networks run those of PyTorch"
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == [CPU, EAGER]


def test_what_an_engine_does_not_run_is_told() -> None:
    class Grown(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_ones(x.shape[0], 2**60) + x

    with pytest.raises(ExportError, match=r"^eager does not run the network: "):
        fxprune.bench(Grown(), Grown(), torch.ones(2, 1), provider=EAGER)


def test_the_provider_at_hand_is_the_processor_where_there_is_no_card() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert kernels.provider_at_hand() == CPU
