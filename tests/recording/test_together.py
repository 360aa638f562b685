"""Several calls of one model, recorded as one: channels joined, each call taken out again, the class in all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ExampleInputsError, InputError, RecordError


class TwoHeads(nn.Module):
    """[N, 3, H, W] -> logits [N, 8]; with ``mode="aux"`` a dict of those of a head that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 8)
        self.side, self.side_head = nn.Conv2d(16, 24, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor, mode: str = "logits", scale: float = 1.0, *, extra: Tensor | None = None) -> Any:
        h = torch.relu(self.norm(self.stem(x)))
        if mode == "aux":
            side = torch.relu(self.side(h)).mean((2, 3))
            return {"side": self.side_head(side) * scale, "zeros": side.new_zeros(x.shape[0])}
        h = torch.relu(self.body(h) + h).mean((2, 3))
        return self.head(h if extra is None else h + extra.mean())


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = TwoHeads().eval()
    nn.init.normal_(made.norm.running_mean)
    nn.init.uniform_(made.norm.running_var, 0.5, 2)
    return made


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CALLS = {"logits": {"x": X}, "aux": {"x": X, "mode": "aux", "scale": 2.0}, "more": {"x": X, "extra": X[0, 0]}}


def pruned(model: nn.Module, **more: Any) -> Any:
    return fxprune.prune(model, CALLS, channels=0.5, scope="uniform", progress=False, **more).eval()


def test_the_channels_of_all_calls_are_cut_together_and_each_call_is_that_of_the_class(model: nn.Module) -> None:
    small = pruned(model)
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert shapes["stem.weight"][0] == shapes["side.weight"][1] == shapes["body.weight"][1] == 8
    assert shapes["side.weight"][0] == shapes["side_head.weight"][1] == 12
    same_class = fxprune.into(model, small)
    assert type(same_class) is TwoHeads
    y = torch.randn(5, 3, 10, 12)
    logits, aux, more = (fxprune.one_call(small, name) for name in CALLS)
    with torch.no_grad():
        torch.testing.assert_close(logits(y), same_class(y))
        torch.testing.assert_close(aux(y, "aux", 3.0), same_class(y, "aux", 3.0))
        torch.testing.assert_close(more(y, extra=y[0, 0]), same_class(y, extra=y[0, 0]))
        torch.testing.assert_close(small(**CALLS)["aux"], aux(X, mode="aux", scale=2.0))
    assert list(logits.state_dict()) == list(model.state_dict())
    assert "body" not in str(aux.graph)
    assert "side" not in str(logits.graph)


def test_a_call_taken_out_shares_its_weights_and_says_what_it_was_recorded_with(model: nn.Module) -> None:
    small = pruned(model)
    aux = fxprune.one_call(small, "aux")
    assert aux.get_parameter("side.weight") is small.get_parameter("side.weight")
    again = fxprune.analyze(aux)  # by its own inputs
    assert again.macs() == fxprune.analyze(aux, (X, "aux", 2.0)).macs()
    with pytest.raises(fxprune.FxpruneError, match=r"mode .* it is 'logits', where 'aux' was recorded"):
        aux(X, "logits", 2.0)


def test_what_is_done_to_a_graph_is_done_to_all_calls(model: nn.Module, tmp_path: Path) -> None:
    small = pruned(model)
    fxprune.save(small, tmp_path / "small.safetensors")
    fresh = copy.deepcopy(model)
    loaded = fxprune.load(tmp_path / "small.safetensors", fresh)
    applied = fxprune.apply(model, small.meta["fxprune"].plan, CALLS)
    refitted = fxprune.reconstruct(small, model, [CALLS] * 6)
    assert refitted.meta["fxprune"].reconstruction.output_after <= refitted.meta["fxprune"].reconstruction.output_before
    for other in (loaded, applied):
        for name in CALLS:
            given = small(**CALLS)[name]
            torch.testing.assert_close(other.eval()(**CALLS)[name], given)
    fxprune.save(fxprune.one_call(small, "more"), tmp_path / "more.pt2")
    program = fxprune.load(tmp_path / "more.pt2")
    torch.testing.assert_close(program(X, extra=X[0, 0]), fxprune.one_call(small, "more")(X, extra=X[0, 0]))


def test_a_method_that_trains_sees_all_calls(model: nn.Module) -> None:
    learner = fxprune.attach(model, CALLS, method="gsm", channels=0.5, progress=False)
    outputs = learner.model(**CALLS)
    learner.loss(outputs["logits"].square().mean() + outputs["aux"]["side"].square().mean()).backward()
    assert learner.model.get_parameter("side.weight").grad is not None
    assert fxprune.one_call(learner.finish(), "aux")(X, "aux", 2.0)["side"].shape == (2, 5)


class Keeps(nn.Module):
    def __init__(self, of_inputs: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.kept: Tensor | None = None
        self.of_inputs = of_inputs

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        if self.kept is None:
            self.kept = x.mean() if self.of_inputs else self.layers[0].bias.mean()
        return self.layers(x) + self.kept if other else self.layers(x) * self.kept


def test_what_a_model_keeps_from_one_call_for_the_next() -> None:
    x = torch.randn(3, 4)
    calls = {"one": x, "two": {"x": x, "other": True}}
    small = fxprune.prune(Keeps(of_inputs=False).eval(), calls, channels=0.5, progress=False)
    assert fxprune.one_call(small, "two")(x, True).shape == (3, 4)
    with pytest.raises(RecordError, match=r"'two' .* from the inputs of 'one' too: .* keeps something .*test_together"):
        fxprune.prune(Keeps(of_inputs=True).eval(), calls, channels=0.5, progress=False)


class Counts(nn.Module):
    """With a hook of the whole, an in-place op, a buffer that is written to, and parameters without names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 6)
        self.register_buffer("calls", torch.zeros(()))
        self.register_forward_hook(lambda module, inputs, output: output * 3)

    def forward(self, *tensors: Tensor, **more: Tensor) -> Tensor:
        self.calls += 1
        h = self.norm(torch.stack([self.first(x) for x in tensors]).sum(0))
        result: Tensor = self.last(h.relu_())
        return result + more["extra"].mean() if "extra" in more else result


def test_state_hooks_and_parameters_without_names() -> None:
    x, y = torch.randn(2, 4, 6)
    model = Counts().eval()
    calls = {"one": x, "two": (x, y), "more": {"extra": y}}
    with pytest.raises(ExampleInputsError):
        fxprune.prune(model, calls, channels=0.5, progress=False)  # stacks nothing
    calls = {"one": x, "two": (x, y)}
    small = fxprune.prune(model, calls, channels=0.5, progress=False).eval()
    assert small.get_buffer("calls") == 0
    same_class = fxprune.into(model, small)
    two = fxprune.one_call(small, "two").eval()
    for number, inputs in enumerate(torch.randn(3, 2, 5, 6)):
        torch.testing.assert_close(two(*inputs), same_class(*inputs))
        assert two.get_buffer("calls") == number + 1
    live = fxprune.one_call(copy.deepcopy(small).train(), "one").train()
    before = live.get_buffer("norm.running_mean").clone()
    live(x).sum().backward()
    assert live.get_parameter("first.weight").grad is not None
    assert not torch.equal(live.get_buffer("norm.running_mean"), before)


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ({"a": X, "not a name": X}, "names a call 'not a name': pass a name such as 'features'"),
        ({"a": X, "class": X}, "names a call 'class'"),
        ({"a": X, "b": {"y": X}}, r"do not fit TwoHeads.forward.*missing a required argument: 'x'"),
        ({"a": X, "b": 3}, "example_inputs is an int; pass a tensor"),
        ({"a": X, "self": X}, "names a call 'self'"),
        ({"x": X, "aux": X}, "names several calls, and forward has an input 'x' too: give the call another name"),
        ({"a": X, "b": {"x": X[0, 0]}}, r"The dict was taken for the calls a and b; one that forward takes itself"),
        ({"x": X, "mode": "aux"}, "example_inputs is a dict; pass keyword arguments as example_kwargs"),
        ({"only": X}, "example_inputs is a dict; pass keyword arguments as example_kwargs"),
    ],
)
def test_calls_that_are_none(model: nn.Module, calls: Any, text: str) -> None:
    with pytest.raises(ExampleInputsError, match=text):
        fxprune.prune(model, calls, flops=0.5, progress=False)


def test_more_that_cannot_be(model: nn.Module, tmp_path: Path) -> None:
    small = pruned(model)
    with pytest.raises(InputError, match=r"no call 'logit'. It has logits, aux, more. Did you mean logits"):
        fxprune.one_call(small, "logit")
    with pytest.raises(InputError, match="It is a graph of one"):
        fxprune.one_call(fxprune.prune(model, X, channels=0.5, progress=False), "logits")
    with pytest.raises(ExampleInputsError, match="a graph has one: pass the model it is of"):
        fxprune.prune(fxprune.one_call(small, "logits"), CALLS, flops=0.5, progress=False)
    with pytest.raises(ExampleInputsError, match=r"a graph of the calls logits, aux, more. Pass the class .*into"):
        fxprune.prune(small, CALLS, flops=0.5, progress=False)
    with pytest.raises(InputError, match="module is TwoHeads; pass a graph of several calls"):
        fxprune.one_call(model, "logits")  # type: ignore[arg-type]
    with pytest.raises(ExampleInputsError, match="example_kwargs= belongs to none of them"):
        fxprune.prune(model, CALLS, example_kwargs={"scale": 1.0}, flops=0.5, progress=False)
    alone = fxprune.one_call(small, "logits")
    with pytest.raises(InputError, match="the call 'logits' alone"):
        fxprune.into(model, alone)
    with pytest.raises(InputError, match="the call 'logits' alone"):
        fxprune.save(alone, tmp_path / "alone.safetensors")


class Own(nn.Module):
    """Asks which class it is of, and keeps a register of those made from it."""

    register: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        Own.register.append(cls.__name__)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = self.up(x) * scale
        return self.down(h.relu() if type(self) is Own else h)


def test_in_every_call_a_model_is_of_its_own_class() -> None:
    model, x = Own().eval(), torch.randn(3, 8)
    graph = fxprune.record(model, {"once": x, "twice": (x, 2.0)})
    assert torch.equal(fxprune.one_call(graph, "twice")(x, 2.0), model(x, 2.0))
    assert Own.register == []
