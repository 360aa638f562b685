"""The pruned layers in the model's own class: equal to the pruned graph, or a refusal that names the line."""

from __future__ import annotations

import copy
import math
import threading
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import Attentive, Shuffled, Small, Unchanged, image, make
from torch import Tensor, nn

import fxprune
from fxprune.errors import BudgetError, ConversionError, InputError, ModelError, PlanError
from fxprune.rewriting.held import whole_numbers
from fxprune.rewriting.into import _attributes, _caches

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(model: nn.Module, x: Tensor | None = None, **options: Any) -> Any:
    given = image() if x is None else x
    small = fxprune.prune(model, given, **{"channels": 0.6, "method": "random", "progress": False, **options})
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(1 + 0.1 * torch.rand_like(p))  # as fine-tuning would
    return small


def same(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(one.eval()(x), other.eval()(x), rtol=1e-5, atol=1e-6)


class Layered(nn.Module):
    """Layers of torch whose sizes are attributes, whole or used by a subclass; tied weights; a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = Last(16)
        self.group, self.act = nn.GroupNorm(16, 16), nn.PReLU(16)
        self.inner = nn.Conv2d(16, 16, 1)
        self.again = nn.Conv2d(16, 16, 1)
        self.again.weight = self.inner.weight
        self.head = nn.Linear(16, 4)

    def features(self, x: Tensor) -> Tensor:
        x = self.norm(self.depthwise(self.stem(x)))
        return self.again(self.act(self.group(self.inner(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))

    def no_weight_decay(self) -> set[str]:
        return {"stem.bias"}


class Last(nn.LayerNorm):
    """A layer norm over dim 1, which names its own size."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def test_layers_in_their_own_class() -> None:
    model = make(Layered)
    small = pruned(model)
    with Unchanged(model), Unchanged(small):
        result = fxprune.into(model, small)
    assert type(result) is Layered
    assert result.no_weight_decay() == {"stem.bias"}
    assert same(result, small, image(5))
    kept = result.stem.weight.shape[0]
    assert kept < 16
    assert result.features(image()).shape[1] == result.again.weight.shape[0]
    assert result.again.weight is result.inner.weight
    assert (result.stem.out_channels, result.depthwise.groups, result.depthwise.in_channels) == (kept, kept, kept)
    assert (result.norm.normalized_shape, result.norm.weight.shape) == ((kept,), (kept,))
    assert result.group.num_channels == result.group.num_groups == result.act.num_parameters
    assert result.head.in_features == result.again.out_channels
    assert list(result.state_dict()) == list(small.state_dict())


def test_the_result_shares_nothing_and_trains() -> None:
    model = make(Small)
    small = pruned(model)
    result = fxprune.into(model, small)
    mine = {t.data_ptr() for t in result.state_dict().values() if t.numel()}
    others = {t.data_ptr() for m in (model, small) for t in m.state_dict().values() if t.numel()}
    assert not mine & others
    result.train()(image()).sum().backward()
    assert all(p.grad is not None for p in result.parameters())


class Dicts(nn.Module):
    """One dict holds what it is made with, the other what a call computed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(4, 16), nn.Linear(16, 32), nn.Linear(32, 3)
        self.tokens, self.computed = {"default": torch.arange(4)}, dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.computed:
            self.computed["scale"] = self.table.weight.detach().norm()
        prompt = self.table(self.tokens["default"]).unsqueeze(0).expand(x.shape[0], -1, -1)
        return cast(Tensor, self.b((self.a(torch.cat([prompt, x], 1)) / self.computed["scale"]).relu()))


def test_of_dicts_of_tensors_those_stay_that_the_class_was_made_with() -> None:
    """All were emptied: its own forward raised KeyError."""
    model, x = make(Dicts), torch.randn(2, 5, 16)
    model(x)
    small = fxprune.prune(model, x, channels=0.6, for_class=True, progress=False)
    result: Any = fxprune.into(model, small)
    assert result.tokens["default"].tolist() == [0, 1, 2, 3]
    assert [list(cache) for cache in _caches(model, copy.deepcopy(model), small)] == [["scale"]]
    assert same(result, small, torch.randn(3, 5, 16))


class HeldTwice(nn.Module):
    """Forward reads parameters from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 4)
        self.scale, self.shift = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.rand(4))
        self.held = [self.scale, self.shift]

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.two(self.one(x).relu() * self.held[0]) + self.held[1])


def test_parameters_that_a_list_holds_too_are_the_ones_that_train() -> None:
    model, x = make(HeldTwice), torch.randn(2, 6)
    small = pruned(model, x)
    assert small.scale.shape[0] < 16
    result: Any = fxprune.into(model, small)
    assert same(result, small, x)
    assert result.held[0] is result.scale
    assert result.held[1] is result.shift
    result.train()(x).sum().backward()
    assert all(p.grad is not None for p in result.parameters())


class Short(nn.Module):
    """Functions over its layers, by a variable, by a default, through another function, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = (nn.Conv2d(i, o, 1) for i, o in ((3, 8), (8, 24), (24, 8), (8, 4)))
        up, seen = self.up, self.seen
        self.wide = lambda x, head=self.head: head(self.narrow(up.forward(x).relu()))
        self.narrow = lambda x: seen(self.down(x))
        self.steps = [lambda x: self.wide(x * 2)]
        self.act = relu
        self.down.register_forward_hook(lambda module, args, output: calls.append(module))

    def seen(self, x: Tensor) -> Tensor:
        return x * self.head.weight.mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.steps[0](self.act(self.stem(x)))


calls: list[nn.Module] = []


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    return F.relu(x, inplace)


def test_functions_that_the_class_holds_run_its_own_layers() -> None:
    dense = make(Short)
    small = pruned(dense)
    result = fxprune.into(dense, small)
    assert same(result, small, image())
    calls.clear()
    result(image()).mean().backward()
    assert all(p.grad is not None for p in result.parameters())
    assert all(p.grad is None for p in dense.parameters())
    assert calls == [result.down], "a hook runs on what the caller gave it"
    assert result.act is relu, "what leads to no layer stays what it is"


def test_a_loaded_network_goes_in_too(tmp_path: Any) -> None:
    small = pruned(make(Small))
    fxprune.save(small, tmp_path / "s.safetensors")
    loaded: Any = fxprune.load(tmp_path / "s.safetensors", make(Small, 1))
    assert same(fxprune.into(make(Small, 2), loaded), small, image(3))


def test_a_library_model_keeps_its_methods() -> None:
    model = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), 10, channels=(16, 16, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32)
    small = pruned(model, x)
    result: Any = fxprune.into(model, small)
    features = result.forward_features(x)
    assert features.shape[1] == result.fc.in_features < 32
    assert torch.allclose(result.forward_head(features), small(x), atol=1e-5)


# -- what prevents it


def refused(model: nn.Module, small: Any) -> str:
    with Unchanged(model), pytest.raises(ConversionError) as caught:
        fxprune.into(model, small)
    return str(caught.value)


def line_of(kind: type, text: str) -> int:
    import inspect

    lines, first = inspect.getsourcelines(kind)
    return first + next(i for i, line in enumerate(lines) if text in line)


@pytest.mark.parametrize(
    ("kind", "text"),
    [(Shuffled, "x.view(n, 2, c // 2, h, w)"), (Attentive, "F.scaled_dot_product_attention")],
)
def test_the_line_that_names_a_size(kind: type[nn.Module], text: str) -> None:
    model = make(kind)
    said = refused(model, pruned(model))
    assert said.startswith(f"{kind.__name__} cannot hold the pruned layers: its code names sizes that were cut, at ")
    assert f"nets.py:{line_of(kind, text)} in forward" in said
    assert said.endswith("Prune with for_class=True, or use the pruned GraphModule itself.")


def test_what_no_cut_touches_is_no_obstacle() -> None:
    model = make(Attentive)
    small = pruned(model, ignore=("qkv", "norm", "embed"))
    assert any("qkv" not in name for name in small.meta["fxprune"].plan.kept)
    assert same(fxprune.into(model, small), small, image(3))


class Scaled(nn.Module):
    """A number of the dense width, which the graph keeps and the class computes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.relu(self.one(x)))
        x = x * x.shape[1] ** -0.5
        return self.head(x)


def test_a_number_that_follows_the_width() -> None:
    model = make(Scaled)
    said = refused(model, pruned(model, torch.randn(2, 6)))
    assert f"test_into.py:{line_of(Scaled, '** -0.5')} in forward" in said


class Outside(nn.Module):
    """A tensor of the width that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.shift = [torch.linspace(-1, 1, 16)]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = x + self.shift[0]
        return self.head(x)


def test_a_tensor_kept_outside() -> None:
    model = make(Outside)
    small = pruned(model, torch.randn(2, 6))
    if small.one.weight.shape[0] == 16:
        pytest.fail("nothing was cut, so this tests nothing")
    assert "test_into.py:" in refused(model, small)


class Auxiliary(Small):
    """A head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv2d(24, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            y = y + self.extra(self.up(self.stem(x))).mean((2, 3))
        return y


def test_a_branch_that_runs_in_training_only() -> None:
    model = make(Auxiliary)
    said = refused(model, pruned(model))
    assert said.startswith(
        "Auxiliary with the pruned layers runs in eval mode only: in train mode it raised RuntimeError: "
    )
    assert f"test_into.py:{line_of(Auxiliary, 'self.extra(self.up')} in forward)" in said


class Changed(Small):
    """The names and shapes of another class, and another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(x))


def test_another_forward_is_noticed() -> None:
    said = refused(make(Changed), pruned(make(Small)))
    assert said.startswith(
        "Changed with the pruned layers does not compute what the pruned module does: relative error "
    )


def test_other_models_and_no_pruned_module() -> None:
    small = pruned(make(Small))
    with pytest.raises(
        PlanError, match=r"pruned was made from another model than this Shuffled: stem\.weight, stem\.bias, "
    ):
        fxprune.into(make(Shuffled), small)
    with pytest.raises(InputError, match=r"pruned is Small; pass the GraphModule that fxprune\.prune, apply or load"):
        fxprune.into(make(Small), make(Small))  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = Small()
    with pytest.raises(InputError, match="on the meta device, where nothing can be compared"):
        fxprune.into(empty, small)


class Headed(nn.Module):
    """Attention as libraries write it: the width of a head is an attribute, and the scale is one."""

    def __init__(self, hint: str = "hint") -> None:
        super().__init__()
        self.head_dim, self.scale = 8, 8**-0.5
        setattr(self, hint, 8)  # another number that is the same by chance
        self.q, self.k, self.v, self.o = (nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        if getattr(self, "most", 8) != 8:
            raise RuntimeError("this one is no width of a head")
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("hint", ["hint", "most"])
def test_attributes_that_name_a_cut_size_are_set(hint: str) -> None:
    model, x = make(partial(Headed, hint)), torch.randn(2, 5, 16)
    small = pruned(model, x, flops=0.6, channels=None)
    own = fxprune.into(model, small)
    assert type(own) is Headed
    assert same(own, small, x)
    width = small.get_parameter("q.weight").shape[0] // 4
    assert own.fxprune_sizes["head_dim"] == (8, width)
    assert width < 8
    assert "most" not in own.fxprune_sizes
    assert model.head_dim == 8


class _OnlyValues:
    def score(self, group: Any, state: Any) -> Any:
        return group.channels * 1.0 if group.name == "v" else None


class Unscaled(Headed):
    """The scale is left to the width of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = None  # type: ignore[assignment]


def test_a_scale_that_follows_the_width_of_a_head() -> None:
    model, x = make(Unscaled), torch.randn(2, 5, 16)
    small = pruned(model, x, flops=0.6, channels=None)
    own = fxprune.into(model, small)
    assert same(own, small, x)
    assert not torch.equal(own.q.weight, small.get_parameter("q.weight"))
    assert torch.equal(own.k.weight, small.get_parameter("k.weight"))


class _Apart:
    """Heads of values lose more than those of queries."""

    def score(self, group: Any, state: Any) -> Any:
        return group.channels % 8 * {"v": 1.0, "q": 1.5}[group.name] if group.name in ("q", "v") else None


def test_one_attribute_cannot_be_two_sizes() -> None:
    model, x = make(Headed), torch.randn(2, 5, 16)
    given: Any = {"params": 0.7, "channels": None, "round_to": 1, "attention": "uneven"}
    with pytest.raises(ConversionError, match=r"its code names sizes that were cut, at .*test_into\.py"):
        fxprune.into(model, pruned(model, x, method=_OnlyValues(), **given))
    with pytest.raises(ConversionError, match=r"test_into\.py.*: head_dim=8 became 5 and 6, hint=8 became 5 and 6"):
        fxprune.into(model, pruned(model, x, method=_Apart(), **given))


# -- a plan that the class can hold


class Merged(nn.Module):
    """Two blocks whose heads are merged to the width of the stream, which no attribute holds, and one that is free."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.o = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.25)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, c))
        return self.head(x + self.down(self.up(x).relu()))


class Unfinished(nn.Module):
    """A stream that is refined once more than anything reads, as in WaveNet: the last layer runs for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(24, 4, 1)
        self.inner = nn.ModuleList(nn.Conv2d(16, 32, 3, padding=1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv2d(32, 24, 1) for _ in range(3))
        self.back = nn.ModuleList(nn.Conv2d(32, 16, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), torch.zeros(())
        for inner, skip, back in zip(self.inner, self.skip, self.back, strict=True):
            y = F.relu(inner(x))
            total = total + skip(y)
            x = x + back(y)
        return self.head(F.relu(total))


_NO_NUMBER = "locked: no attribute of the class can say this size, at "
_PLANS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "merged": (Merged, torch.randn(2, 5, 6), {"flops": 0.8, "channels": None}, _NO_NUMBER),
    "unfinished": (Unfinished, image(), {}, "locked: read by a layer of which nothing comes"),
    "shuffled": (
        Shuffled,
        image(),
        {},
        "channels are kept in multiples of 8, without which the class did not hold them",
    ),
}


@pytest.mark.parametrize("name", _PLANS)
def test_a_plan_for_the_class(name: str) -> None:
    kind, x, given, told = _PLANS[name]
    model = make(kind)
    with pytest.raises(ConversionError, match=r"Prune with for_class=True"):
        fxprune.into(model, pruned(model, x, round_to=1, **given))
    small = pruned(model, x, round_to=1, for_class=True, **given)
    assert same(fxprune.into(model, small), small, x)
    report = small.meta["fxprune"]
    assert report.plan.kept
    assert any(note.startswith(told) for note in report.notes)


class ByFanIn(nn.Conv2d):
    """Multiplies by a number that it takes from the shape of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * math.prod(self.weight.shape[1:]) ** -0.5, self.bias)


def test_a_class_that_holds_none_of_the_plans_is_not_advised_to_ask_for_one() -> None:
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 16, 3), ByFanIn(16, 24, 3), nn.Conv2d(24, 4, 1)))
    with pytest.raises(ConversionError, match=r"^for_class=True: no plan .* shape of a weight. Leave out") as caught:
        pruned(model, for_class=True)
    assert "Prune with" not in str(caught.value)


def test_a_class_that_holds_no_cut_or_none_that_is_deep_enough() -> None:
    with pytest.raises(BudgetError, match=r"held up by: .*no attribute of the class can say this size \(.*test_into"):
        pruned(make(Merged), torch.randn(2, 5, 6), flops=0.2, channels=None, for_class=True)
    given: Any = {"params": 0.7, "channels": None, "round_to": 1, "attention": "uneven", "method": _Apart()}
    with pytest.raises(ModelError, match=r"no prunable channels.* q: no attribute of the class can say this size"):
        pruned(make(Headed), torch.randn(2, 5, 16), for_class=True, **given)


def test_what_trains_makes_a_plan_for_the_class() -> None:
    model, x = make(Merged), torch.randn(2, 5, 6)
    training = fxprune.attach(
        model, x, method=fxprune.methods.GSM(structured=True), flops=0.8, round_to=1, for_class=True, progress=False
    )
    training.loss(training.model(x).square().mean()).backward()
    training.after_backward()
    training.after_step(training.optimizer())
    small = training.finish()
    assert same(fxprune.into(model, small), small, x)


def test_for_class_reads_the_weights_that_consume_empties() -> None:
    with pytest.raises(InputError, match="consume=True empties the model, and for_class=True compares with the class"):
        pruned(make(Merged), torch.randn(2, 5, 6), for_class=True, options=fxprune.Options(consume=True))


def test_for_class_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, x = Merged().eval(), torch.randn(2, 5, 6)
    small = pruned(model, x, flops=0.8, channels=None, for_class=True)
    assert small.meta["fxprune"].plan.kept.keys() == {"up.weight", "up.bias", "down.weight"}


class Asserted(nn.Module):
    """Modules that only compare their sizes, as those of diffusers do; one number is that of inputs and of outputs."""

    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.channels = self.out_channels = 16
            self.conv = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1))

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == self.channels
            y = self.conv(x)
            assert y.shape[1] == self.out_channels
            return y

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.head = nn.Conv2d(3, 16, 1), self.Down(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.stem(x)).relu().mean((2, 3)))


def test_numbers_that_a_forward_only_compares() -> None:
    model = make(Asserted)
    small = pruned(model, round_to=1)
    own = fxprune.into(model, small)
    assert same(own, small, image())
    ins, outs = small.get_parameter("stem.weight").shape[0], small.get_parameter("head.weight").shape[1]
    assert ins != outs
    assert own.fxprune_sizes == {"down.channels": (16, ins), "down.out_channels": (16, outs)}


class Packed(nn.Module):
    """As timm writes it: one layer for all three, the scale left to the width; sums over tokens may cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.qkv, self.o = 8, nn.Linear(16, 96), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:-1], 3, 4, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Again(Packed):
    """Calls its layers twice, as networks that share theirs do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + super().forward(x).repeat(1, 1, 4))


@pytest.mark.parametrize("kind", [Packed, Again])
def test_the_queries_of_a_packed_layer_take_up_the_scale(kind: type[Packed]) -> None:
    model, x = make(kind), torch.randn(2, 64, 16)
    small = pruned(model, x, flops=0.7, channels=None)
    with torch.no_grad():
        own = fxprune.into(model, small)
    assert same(own, small, x)
    width = small.get_parameter("qkv.weight").shape[0] // 3
    for name in ("qkv.weight", "qkv.bias"):
        moved = (own.get_parameter(name) / small.get_parameter(name)).reshape(3, width, -1)
        assert torch.allclose(moved[0], torch.tensor((width / 32) ** 0.5), atol=1e-5)
        assert torch.equal(moved[1:], torch.ones_like(moved[1:]))


# -- what attributes say


class Heads(nn.Module):
    """Attention [N, T, 16]: as many heads as each is wide; sizes of the batch are read from the stream."""

    heads, width = 4, 4

    def __init__(self) -> None:
        super().__init__()
        self.inner = 16
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, self.inner))


class Stream(nn.Module):
    """[N, T, 6] -> [N, 3] by two blocks, which may be one."""

    def __init__(self, block: type[nn.Module] = Heads, shared: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList([block(), block()])
        if shared:
            self.blocks[1] = self.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def held(model: nn.Module, x: Tensor, **options: Any) -> tuple[Any, Any]:
    given: Any = {"flops": 0.5, "round_to": 1, "for_class": True, "progress": False, **options}
    small = fxprune.prune(model, x, **given)
    return small, fxprune.into(model, small)


@pytest.mark.parametrize("shared", [False, True])
def test_one_number_for_two_attributes_of_the_class_and_a_block_with_two_names(shared: bool) -> None:
    small, own = held(make(partial(Stream, shared=shared)), TOKENS)
    assert same(own, small, TOKENS)
    assert {name.rpartition(".")[2] for name in own.fxprune_sizes} == {"width", "inner"}
    assert own.blocks[0].width < 4 == own.blocks[0].heads == Heads.width
    assert (own.blocks[0] is own.blocks[1]) == shared


def test_the_scale_that_queries_take_up_may_be_rounded_in_bfloat16() -> None:
    model, x = make(Stream).bfloat16(), TOKENS.bfloat16()
    small, own = held(model, x)
    assert own.blocks[0].width < 4
    assert torch.allclose(own(x), small(x), rtol=0.1, atol=0.05)


class Literal(Heads):
    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 16))


def test_a_line_that_reads_another_size_of_the_stream_does_not_hold_its_width() -> None:
    small, own = held(make(partial(Stream, Literal)), TOKENS, flops=0.7)
    assert own.stem.out_features < 16
    assert own.blocks[0].qkv.out_features == 48
    assert same(own, small, TOKENS)


class Frozen(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.width = 4

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and type(value) is int:
            raise TypeError("made once")
        super().__setattr__(name, value)


class Keeps(Small):
    kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        self.kept = y
        return y


def test_what_the_class_itself_refuses() -> None:
    model = make(partial(Stream, Frozen))
    with pytest.raises(ConversionError, match="cannot hold the pruned layers: its code names sizes") as caught:
        fxprune.into(model, fxprune.prune(model, TOKENS, flops=0.5, round_to=1, progress=False))
    assert "test_into.py" in str(caught.value)
    keeping = make(Keeps)
    small = pruned(keeping)
    keeping.kept = threading.Lock()
    with pytest.raises(ConversionError, match=r"Keeps cannot be copied: copy.deepcopy raised .* has no copy"):
        fxprune.into(keeping, small)


class Normed(nn.Module):
    """Weights that hooks compute ahead of each call, from parameters, and keep as attributes."""

    def __init__(self) -> None:
        super().__init__()
        with pytest.warns(FutureWarning, match="weight_norm"):
            self.one = nn.utils.weight_norm(nn.Conv2d(3, 16, 3, padding=1))
        self.two = nn.utils.spectral_norm(nn.Conv2d(16, 24, 3, padding=1))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(x)))).mean((2, 3)))


@pytest.mark.parametrize("kind", [Keeps, Normed])
def test_what_a_model_keeps_of_a_call_that_a_gradient_runs_through(kind: type[nn.Module]) -> None:
    model = make(kind)
    model(image())
    small = pruned(model)
    model(image())
    own = fxprune.into(model, small)
    assert type(own) is kind
    assert same(own, small, image())
    copy.deepcopy(own)(image()).sum().backward()
    own.train()(image()).sum().backward()
    assert all(p.grad is not None for p in own.parameters())


@dataclass(frozen=True)
class Widths:
    heads: int = 4
    head_dim: int = 8
    pad_token: int = 8  # another number that is the same by chance


@dataclass(slots=True)
class WidthsSlots:
    heads: int = 4
    head_dim: int = 8


class WidthsPlain:
    __slots__ = ("head_dim", "heads")

    def __init__(self) -> None:
        self.heads, self.head_dim = 4, 8

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WidthsPlain) and (self.heads, self.head_dim) == (other.heads, other.head_dim)

    __hash__ = None  # type: ignore[assignment]


class WidthsTuple(NamedTuple):
    heads: int = 4
    head_dim: int = 8


class Configured(nn.Module):
    """Attention whose sizes are entries of what configures it; ``heads * head_dim`` is none of them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.q, self.k, self.v, self.o = (nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16))

    def sizes(self) -> tuple[int, int]:
        c = self.config.get("attention") if isinstance(self.config, dict) else self.config
        return (c["heads"], c["head_dim"]) if isinstance(c, dict) else (c.heads, c.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        heads, width = self.sizes()
        q, k, v = (f(x).view(*x.shape[:-1], heads, width).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return x + self.o(y.transpose(1, 2).reshape(*x.shape[:-1], heads * width))


@pytest.mark.parametrize(
    "config",
    [
        Widths(), WidthsSlots(), WidthsPlain(), WidthsTuple(), SimpleNamespace(heads=4, head_dim=8),
        {"attention": {"heads": 4, "head_dim": 8}},
    ],
    ids=["frozen dataclass", "dataclass with slots", "slots", "named tuple", "namespace", "dict in a dict"],
)  # fmt: skip
@pytest.mark.parametrize("attention", ["head_dim", "heads"])
def test_sizes_that_are_read_from_what_configures_the_module(config: Any, attention: str) -> None:
    model, before = make(lambda: nn.Sequential(Configured(config), Configured(config))), copy.deepcopy(config)
    x = torch.randn(2, 5, 16)
    small = fxprune.prune(
        model, x, params=0.51, attention=attention, scope="uniform", round_to=1, for_class=True, progress=False
    )
    own = fxprune.into(model, small)
    assert same(own, small, x)
    heads, width = own[0].sizes()
    assert (heads < 4, width < 8) == (attention == "heads", attention == "head_dim")
    assert own[0].config is own[1].config  # of the same numbers there is one
    assert config == before
    assert all(block.config is config for block in model)
    assert {name.rpartition(".")[2] for name in own.fxprune_sizes} == {attention}


def test_a_config_gets_one_copy_for_every_size() -> None:
    shared = SimpleNamespace(heads=4, head_dim=8)
    model, x = make(lambda: nn.Sequential(Configured(shared), Configured(shared))), torch.randn(2, 5, 16)
    with torch.no_grad():
        for layer in (model[0].q, model[0].k, model[0].v):
            layer.weight *= 3
    small = fxprune.prune(model, x, params=0.6, round_to=1, progress=False)
    own = fxprune.into(model, small)
    assert same(own, small, x)
    assert own[0].config.head_dim != own[1].config.head_dim
    assert shared.head_dim == 8


class Mode(Enum):
    WIDE = 8


class Itself:
    """A config of which every copy is the same object; or an answer to any name."""

    def __init__(self) -> None:
        self.heads, self.head_dim = 4, 8

    def __copy__(self) -> Itself:
        return self

    def __deepcopy__(self, memo: Any) -> Itself:
        return self


class Enumerated(Configured):
    def sizes(self) -> tuple[int, int]:
        return 4, self.config.value


@pytest.mark.parametrize(("block", "config"), [(Configured, Itself()), (Enumerated, Mode.WIDE)])
def test_what_every_model_shares_is_not_changed(block: type[Configured], config: Any) -> None:
    model, x = make(lambda: nn.Sequential(block(config))), torch.randn(2, 5, 16)
    small = fxprune.prune(model, x, params=0.6, round_to=1, progress=False)
    with pytest.raises(ConversionError, match="its code names sizes that were cut"):
        fxprune.into(model, small)
    assert model[0].sizes() == (4, 8)
    with pytest.raises(ModelError, match="no attribute of the class can say this size"):
        fxprune.prune(model, x, params=0.6, for_class=True, progress=False)
    assert model[0].sizes() == (4, 8)


class Answering(SimpleNamespace):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def test_a_config_may_answer_to_any_name() -> None:
    model, x = make(lambda: nn.Sequential(Configured(Answering(heads=4, head_dim=8)))), torch.randn(2, 5, 16)
    small, own = held(model, x, flops=0.7)
    assert same(own, small, x)
    assert own.fxprune_sizes.keys() == {"0.config.head_dim"}


def test_one_of_many_entries_of_the_same_number_is_set() -> None:
    config = SimpleNamespace(**{f"other{i}": 8 for i in range(9)}, heads=4, head_dim=8)
    model, x = make(lambda: nn.Sequential(Configured(config))), torch.randn(2, 5, 16)
    assert held(model, x, flops=0.7)[1].fxprune_sizes.keys() == {"0.config.head_dim"}


def test_what_an_earlier_call_told_is_no_config() -> None:
    model, x = make(lambda: nn.Sequential(Configured(SimpleNamespace(heads=4, head_dim=8)))), torch.randn(2, 5, 16)
    _, own = held(model, x, flops=0.7)
    own[0].fxprune_meta = own.fxprune_meta  # of a block that was put in by itself
    assert whole_numbers(own[0], inside=True)["fxprune_meta.fxprune.macs_after"] == (
        macs := own.fxprune_meta["fxprune"].macs_after
    )
    assert not _attributes(own, "0", macs)


class TrainsOnAll(nn.Module):
    """A line that the class cannot hold asks a tensor for a size; its other one is that of a parameter for training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.out = (nn.Linear(*s) for s in ((8, 10), (10, 32), (32, 24), (24, 4)))
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:
            x = x * self.scale
        return self.out(F.relu(self.down(F.relu(self.up(x)).view(x.size(0), 32))))


def test_a_plan_for_the_class_leaves_what_only_training_runs() -> None:
    model, x = make(TrainsOnAll), torch.randn(2, 8)
    small = fxprune.prune(model, x, params=0.8, scope="uniform", for_class=True, round_to=1, progress=False)
    own = fxprune.into(model, small)
    assert (own.stem.out_features, own.up.out_features) == (10, 32)
    assert own.down.out_features < 24
    assert own.train()(x).shape == (2, 4)
