"""A name is only a name: what modules, parameters and inputs are called is never code, and stays as it is."""

from __future__ import annotations

import copy
import keyword
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.errors import ExampleInputsError, FxpruneError
from fxprune.recording import record

pytestmark = pytest.mark.usefixtures("one_thread")
EXECUTED: list[int] = []
_BYTES = [*f"import sys; sys.modules[{__name__!r}].EXECUTED.append(1)".encode()]
_CALL = f"exec(bytes({_BYTES}))"  # without a dot, which parts names

NAMES = [
    "class", "def", "None", "True", "lambda", "self", "x", "print", "torch", "getattr", "a b", " ", "a\nb", "a\rb",
    "tab\t", "tail\\", "\\", "\\n", "'", '"', "a'b", 'a"b', '"""', "'''", "a'\"b", "{}", "{0}", "%s", "%", "#", "a#b",
    "a;b", "a,b", "(", ")", "[0]", "a-b", "0", "01", "1a", "é", "naïve", "层", "𝒳", "ª", "\u2028", "\u200b", "😀",
    "_constant_0", "_training_flag", "fxprune_recording_guards_holds",
    f'" if {_CALL} else "', f"' if {_CALL} else '", f'") or {_CALL} or ("', f"\\') or {_CALL} or (\\'",
    f"a\n    {_CALL}\n", f"weight); {_CALL}; (", f"{{{_CALL}}}", f"a = {_CALL}", f"a\n{_CALL} #",
]  # fmt: skip


class Net(nn.Module):
    """A layer, a bare parameter, a buffer and a deeper layer under one name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.layers._modules[name] = nn.Linear(4, 8)
        self.held = nn.Module()
        self.held._parameters[name] = nn.Parameter(torch.rand(8))
        self.held._modules["inside"] = nn.Module()
        self.held.inside._buffers[name] = torch.rand(8)
        self.held._modules[f"{name}2"] = nn.Sequential(nn.ReLU(), nn.Linear(8, 2))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers._modules[self.name](x) * self.held._parameters[self.name]  # type: ignore[misc]
        h = h + self.held.inside._buffers[self.name]  # type: ignore[union-attr,index,operator]
        return self.held._modules[f"{self.name}2"](h)  # type: ignore[misc]


def _check(name: str) -> None:
    EXECUTED.clear()
    net, x = Net(name).eval(), torch.randn(3, 4)
    module = record(net, torch.randn(2, 4))
    assert list(module.state_dict()) == list(net.state_dict())
    for run in (module, copy.deepcopy(module)):
        assert torch.equal(run(x), net(x))
    assert not EXECUTED


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_only_a_name(name: str) -> None:
    _check(name)


_TEXT = st.text(min_size=1, max_size=12).filter(lambda text: "." not in text)
_QUOTED = st.text(alphabet="'\"\\{}()[]\n\r \t;#%,=ab_0", min_size=1, max_size=12)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(st.one_of(_TEXT, _QUOTED, st.sampled_from(keyword.kwlist)))
def test_any_name_is_only_a_name(name: str) -> None:
    _check(name)


@pytest.mark.parametrize("name", ["class", "a b", 'a"b', "tail\\", "a\nb", NAMES[-5]])
def test_names_last_through_pruning(name: str, tmp_path: Path) -> None:
    EXECUTED.clear()
    net, x = Net(name), torch.randn(3, 4)
    small = fxprune.prune(net, torch.randn(2, 4), channels=0.5, round_to=1, progress=False).eval()
    assert list(small.state_dict()) == list(net.state_dict())
    assert small.state_dict()[f"layers.{name}.weight"].shape == (4, 4)
    torch.save(small, tmp_path / "small.pt")
    again = torch.load(tmp_path / "small.pt", weights_only=False)
    assert torch.equal(again(x), small(x))
    assert not EXECUTED


def test_names_that_differ_in_what_code_drops_stay_apart() -> None:
    net = nn.ModuleDict()
    for number, name in enumerate(["a b", "a_b", "a-b", "a  b", "A_b", "class", "_class", "class_"]):
        net._modules[name] = nn.Linear(2, 2, bias=False)
        nn.init.constant_(net._modules[name].weight, number + 1.0)  # type: ignore[union-attr,arg-type]

    def forward(x: Tensor) -> Any:
        return [layer(x) for layer in net.values()]

    net.forward = forward  # type: ignore[method-assign]
    found = record(net, torch.ones(1, 2))(torch.ones(1, 2))
    assert [float(y.detach()[0, 0]) for y in found] == [2.0 * (number + 1) for number in range(8)]


# --- inputs -----------------------------------------------------------------------------------------------------------


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        y: Tensor = self.a(x)
        return y * sum(more.values())


@pytest.mark.parametrize("name", ["class", "a b", "a-b", "1", "", "a=1", f"x={_CALL}", "a\nb", "a.b", "ª"])
def test_keyword_inputs_that_are_no_names_are_refused(name: str) -> None:
    EXECUTED.clear()
    for call in (record, fxprune.record):
        with pytest.raises(ExampleInputsError) as caught:
            call(Keywords(), torch.ones(2, 4), {name: torch.ones(1)})
        assert str(caught.value) == f"{name!r} is no name that a graph can give to an input. Pass it in a dict."
    assert not EXECUTED


def test_keyword_inputs_in_a_dict_have_any_name() -> None:
    class Dicts(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {f"{name}'\"": value * 2 for name, value in batch.items()}

    names = ["class", "a b", f'" if {_CALL} else "']
    EXECUTED.clear()
    found = record(Dicts(), ({name: torch.ones(1) for name in names},))({name: torch.ones(2) for name in names})
    assert {name: value.tolist() for name, value in found.items()} == {f"{name}'\"": [2.0, 2.0] for name in names}
    assert not EXECUTED


@pytest.mark.parametrize("name", ["self_", "print", "torch", "getattr", "device", "inf", "é", "x1"])
def test_keyword_inputs_may_have_the_names_of_what_code_uses(name: str) -> None:
    net = Keywords()
    module = record(net, torch.ones(2, 4), {name: torch.ones(1)})
    x = torch.randn(3, 4)
    assert torch.equal(module(x, **{name: torch.ones(1) * 3}), net(x, **{name: torch.ones(1) * 3}))


@pytest.mark.parametrize("name", ["graph", "code", "recompile", "meta", "_graph", "_code"])
def test_names_that_a_graph_module_uses_are_refused(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._modules[name] = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return self._modules[name](x)  # type: ignore[misc]

    with pytest.raises(FxpruneError, match=f"has an attribute named '{name}', which torch.fx.GraphModule uses itself"):
        record(Named(), torch.ones(1, 2))


def test_the_payload_would_be_seen() -> None:
    EXECUTED.clear()
    exec(_CALL)
    assert EXECUTED == [1]
