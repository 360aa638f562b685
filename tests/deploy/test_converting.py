"""Programs of torch.export have the user's lines, and what converters refuse is told with them."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.deploy.converting import lines_named
from fxprune.errors import ExportError, InputError
from fxprune.recording.sources import line_of


@torch.library.custom_op("fxprune_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.body(x))
        return twice(y).mean((2, 3))


class Around(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


HERE = Path(__file__)
CODE = HERE.read_text().splitlines()


def line(text: str) -> int:
    return next(number for number, each in enumerate(CODE, 1) if text in each)


LINES = {
    "conv2d": line("torch.relu(self.a("),
    "relu": line("torch.relu(self.a("),
    "conv2d_1": line("self.b(self.body("),
    "twice": line("twice(y).mean"),
    "mean": line("twice(y).mean"),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    return Net().eval()


@pytest.fixture
def small(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return fxprune.prune(model, x, channels=0.5, progress=False)


def pickled(small: fx.GraphModule) -> nn.Module:
    return pickle.loads(pickle.dumps(small))  # type: ignore[no-any-return]


def saved(small: fx.GraphModule) -> nn.Module:
    fxprune.save(small, "small.safetensors")
    return fxprune.load("small.safetensors", Net())


def again(small: fx.GraphModule) -> nn.Module:
    return fxprune.record(small, torch.randn(2, 3, 8, 8))


def found(program: torch.export.ExportedProgram) -> dict[str, str]:
    return {node.name: line_of(node) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("way", [lambda small: small, copy.deepcopy, pickled, saved, again])
def test_a_program_has_the_lines_that_the_nodes_come_from(
    way: Callable[[fx.GraphModule], nn.Module], small: fx.GraphModule, x: Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    program = torch.export.export(way(small), (x,))
    functions = {name: "body" if name in ("conv2d", "relu") else "forward" for name in LINES}
    assert found(program) == {name: f"{HERE}:{number} in {functions[name]}" for name, number in LINES.items()}
    relu = next(node for node in program.graph.nodes if node.name == "relu")
    assert [*map(int, re.findall(r"line (\d+)", relu.meta["stack_trace"]))] == [LINES["conv2d_1"], LINES["relu"]]


def test_a_file_of_a_program_has_them(small: fx.GraphModule, x: Tensor, tmp_path: Path) -> None:
    fxprune.save(small, tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2")
    assert found(loaded)["relu"] == f"{HERE}:{LINES['relu']} in body"


def test_a_graph_inside_another_module_tells_them_in_its_code(small: fx.GraphModule, x: Tensor) -> None:
    lines = found(torch.export.export(Around(small), (x,)))
    assert {name: text.partition(" ")[0] for name, text in lines.items()} == {
        name: f"{Path(*HERE.parts[-3:])}:{number}" for name, number in LINES.items()
    }


def test_the_code_of_a_graph_tells_any_line(small: fx.GraphModule, x: Tensor) -> None:
    relu = next(node for node in small.graph.nodes if node.name == "relu")
    relu.meta["source"] = "a\nraise ValueError\udcff.py:1 in forward"
    small.recompile()
    assert "  # a raise ValueError\\udcff.py:1 in forward\n" in small.code
    assert small(x).shape == (2, 6)


REFUSALS = {
    "with its overload": "No rule for fxprune_tests.twice.default",
    "without": "Missing out variants: {'fxprune_tests::twice'}",
    "as torch writes a node": "While executing %twice : [num_users=1] = call_function[...](args = (%relu,))",
}


@pytest.mark.parametrize("text", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("module", [False, True])
def test_what_a_converter_refuses_is_told_with_its_line(
    text: str, module: bool, small: fx.GraphModule, x: Tensor
) -> None:
    exported = torch.export.export(small, (x,))
    expected = f"fxprune_tests.twice.default comes from {HERE}:{LINES['twice']} in forward.\nKeyError: "
    program = exported.module() if module else exported
    with pytest.raises(ExportError, match="^" + re.escape(expected)) as raised, fxprune.converting(program):
        raise KeyError(text)
    assert text in str(raised.value)
    assert isinstance(raised.value.__cause__, KeyError)


class Silu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x)


def test_so_is_an_op_that_one_of_the_program_is_taken_apart_into(x: Tensor) -> None:
    program = torch.export.export(fxprune.record(Silu(), x), (x,))
    told = lines_named(ValueError("aten.sigmoid.default"), program)
    assert told == f"aten.sigmoid.default comes from {HERE}:{line('functional.silu(x)')} in forward"


def test_what_fails_while_a_program_runs_is_told_with_the_line_that_ran(small: fx.GraphModule, x: Tensor) -> None:
    module = torch.export.export(small, (x,)).module()
    told = rf"^aten.conv2d.default comes from {HERE}:{LINES['conv2d']} in body\.\n"
    with pytest.raises(ExportError, match=told), fxprune.converting(module):
        type(module).forward(module, x.double())


def test_other_errors_pass_as_they_are(small: fx.GraphModule, x: Tensor) -> None:
    exported = torch.export.export(small, (x,))
    for text in ("out of memory", "aten.add.Tensor", "fxprune_tests.twice.out", "fxprune_tests::twice_more"):
        with pytest.raises(OSError, match=text), fxprune.converting(exported):
            raise OSError(text)


def test_only_programs_are_converted(small: fx.GraphModule) -> None:
    net: Any = Net()
    with pytest.raises(InputError, match=r"program is Net; pass what torch\.export\.export returned"):
        fxprune.converting(net).__enter__()


@pytest.mark.parametrize("pruned", [False, True])
def test_an_export_to_onnx_names_the_line(
    pruned: bool, model: nn.Module, small: fx.GraphModule, x: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    place = rf"{HERE.name}:{LINES['twice']} in forward"
    with pytest.raises(ExportError, match=rf"No ONNX .*\(fxprune_tests\.twice\.default comes from .*{place}\)"):
        fxprune.export(small if pruned else model, tmp_path / "net.onnx", x)
