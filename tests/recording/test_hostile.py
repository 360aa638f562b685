"""Calls that the example did not show: other kinds, items, keys and plain values of inputs; and what comes out."""

import enum
import functools
import re
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import GuardError, ModelError, RecordError
from fxprune.recording.forms import difference, form_of


class Mode(enum.Enum):
    SUM = 1
    MEAN = 2


@dataclass
class Batch:
    x: Tensor
    name: str = "a"
    more: Any = None


class Options:
    def __init__(self, k: float) -> None:
        self.k = k


def _net(follow: Callable[..., Any]) -> nn.Module:
    class Net(nn.Module):
        forward = follow

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def both(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    return Net().eval()


def _pruned(net: nn.Module, *inputs: Any, channels: float = 1.0, **kwargs: Any) -> Any:
    return fxprune.prune(net, inputs, example_kwargs=kwargs, channels=channels, round_to=1, progress=False)


def _x(rows: int = 2) -> Tensor:
    return torch.randn(rows, 4)


_WEIGHT = torch.ones(2)

# What forward does, the example, and calls that go another way, with what is said of them.
OTHERS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[tuple[tuple[Any, ...], str]]]] = {
    "items": (
        lambda self, xs: sum(self.both(x) for x in xs), ([_x(), _x()],),
        [(([_x(), _x(), _x()],), "xs of .*: it has 3 items, where 2 were recorded"), ((_x(),), "is a tensor")],
    ),
    "keys": (
        lambda self, xs: {key: self.both(x) for key, x in xs.items()}, ({"a": _x()},),
        [(({"a": _x(), "b": _x()},), "it has the keys 'a', 'b', where 'a' were recorded"), (({"b": _x()},), "keys")],
    ),
    "star": (
        lambda self, *xs: sum(self.both(x) for x in xs), (_x(), _x()),
        [((_x(),), r"\*xs of .*: it has 1 items, where 2 were recorded")],
    ),
    "dims": (
        lambda self, x: self.both(x).sum(tuple(range(x.ndim - 1))), (_x(),),
        [((torch.randn(2, 3, 4),), "x of .*: it has 3 dims, where 2 were recorded"), (([_x()],), "where a tensor")],
    ),
    "kinds": (
        lambda self, x: self.both(x.float() / 255 if x.dtype == torch.uint8 else x), (_x(),),
        [((torch.ones(2, 4, dtype=torch.uint8),), "it is a tensor of torch.uint8, where one of floats was recorded")],
    ),
    "an enum": (
        lambda self, x, mode: self.both(x).sum(0) if mode is Mode.SUM else self.both(x).mean(0), (_x(), Mode.SUM),
        [((_x(), Mode.MEAN), "mode of .*: it is <Mode.MEAN: 2>, where <Mode.SUM: 1> was recorded")],
    ),
    "a function": (
        lambda self, x, act: act(self.both(x)), (_x(), torch.relu),
        [((_x(), torch.tanh), "act of .*: it is .*tanh, where .*relu was recorded")],
    ),
    "a dtype": (
        lambda self, x, dtype: self.both(x).to(dtype), (_x(), torch.float64),
        [((_x(), torch.float16), "it is torch.float16, where torch.float64 was recorded")],
    ),
    "a slice": (
        lambda self, x, rows: self.both(x)[rows], (_x(), slice(0, 1)),
        [((_x(), slice(1, 2)), r"it is slice\(1, 2, None\)")],
    ),
    "an array": (
        lambda self, x, shift: self.both(x) + torch.from_numpy(shift), (_x(), np.ones(2, np.float32)),
        [((_x(), np.zeros(2, np.float32)), "it is an array of float32")],
    ),
    "an object without tensors": (
        lambda self, x, options: self.both(x) * options.k, (_x(), Options(2.0)),
        [((_x(), Options(3.0)), r"Options \{'k': 3.0\}, where .*Options \{'k': 2.0\} was recorded")],
    ),
    "a part of a dataclass": (
        lambda self, batch: self.both(batch.x) * (2 if batch.name == "a" else 3) + (batch.more or 0), (Batch(_x()),),
        [((Batch(_x(), "b"),), r"batch\.name of .*: it is 'b', where 'a' was recorded"),
         ((Batch(_x(), more=1),), r"batch\.more of .*: it is 1.0, where None was recorded")],
    ),
    "a number's place": (
        lambda self, x, k: self.both(x)[:k] * (2 if isinstance(k, int) else 3), (_x(), 1),
        [((_x(), torch.tensor(1)), "k of .*: it is a tensor .*, where a number was recorded")],
    ),
    "defaults": (
        lambda self, x, scale=1.0, weight=_WEIGHT, pair=(1.0, 2.0): self.both(x) * scale * weight * pair[1], (_x(),),
        [((_x(), 3.0), "scale of .*: it is 3.0, where 1.0 was recorded"), ((_x(), 1.0, _WEIGHT * 2), "weight of"),
         ((_x(), 1.0, _WEIGHT, (1.0, 5.0)), r"pair\[1\] of .*: it is 5.0, where 2.0 was recorded")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_inputs_of_another_form_are_refused(name: str) -> None:
    follow, example, others = OTHERS[name]
    net = _net(follow)
    small = _pruned(net, *example)
    torch.testing.assert_close(small(*example), net(*example))
    for call, said in others:
        with pytest.raises(GuardError, match=said) as caught:
            small(*call)
        assert str(caught.value).startswith(f"{caught.value.source}: it ")


def test_what_is_as_good_as_the_example_passes() -> None:
    net = _net(lambda self, x, how, scale=1.0, weight=_WEIGHT: self.both(x) * how["k"][0] * scale * weight)
    small = _pruned(net, _x(), {"k": [2, Options(1.0)]})
    for call in (
        (_x(3), {"k": (5.5, Options(1))}),
        (_x(3), {"k": [5, Options(1.0)]}, 1),
        (_x(3), {"k": [5, Options(1.0)]}, 1.0, torch.ones(2)),
    ):
        torch.testing.assert_close(small(*call), net(*call))


def test_defaults_stay_as_they_are() -> None:
    def follow(self: Any, x: Tensor, scales: Any = [1.0, 2.0]) -> Any:  # noqa: B006
        return self.both(x) * scales[1]

    _pruned(_net(follow), _x())
    assert follow.__defaults__ == ([1.0, 2.0],)
    assert [type(scale) for scale in follow.__defaults__[0]] == [float, float]


def test_forms_outlive_the_process() -> None:
    """No address is in them, and what has no equality of its own is compared by what it holds."""
    values = (Options(1.0), torch.relu, len, Mode.SUM, object(), functools.partial(len), np.ones(3), nn.Linear(1, 1))
    assert not re.search("0x[0-9a-f]{6}", str([form_of(value) for value in values]))
    ring = Batch(_x())
    ring.more = [ring]
    assert difference(ring, form_of(ring)) is None
    assert form_of(Options(1.0)) == form_of(Options(1)) != form_of(Options(2.0))


def test_a_guard_on_the_form_survives_compiling() -> None:
    small = _pruned(_net(OTHERS["items"][0]), [_x(), _x()])
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    given = [_x(3), _x(3)]
    torch.testing.assert_close(compiled(given), small(given))
    with pytest.raises(GuardError, match="3 items"):
        torch.compile(small, backend="eager")([_x(), _x(), _x()])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("value", "other"), [(True, False), ("a", "b"), (None, True), (Mode.SUM, Mode.MEAN)])
def test_plain_values_of_another_call_are_refused_by_a_compiled_graph(whole: bool, value: Any, other: Any) -> None:
    net = _net(lambda self, x, how: self.both(x) * (2 if how == value else 3))
    small, x = _pruned(net, _x(), value), _x(3)
    torch.compiler.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=whole)
    torch.testing.assert_close(compiled(x, value), net(x, value))
    with pytest.raises(RuntimeError if whole else GuardError, match=r"Message: how of .* was recorded|^how of"):
        compiled(x, other)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_words_and_numbers_that_come_out_are_compared() -> None:
    small = _pruned(_net(lambda self, x: (self.both(x), f"batch {x.shape[0]}")), _x())
    assert small(_x())[1] == "batch 2"
    with pytest.raises(GuardError, match=r"dim 0 of x is fixed at 2: .*'batch 2' comes out instead of 'batch 3'"):
        small(_x(3))
    assert any("a size becomes text" in note for note in small.meta["fxprune"].notes)


@pytest.mark.parametrize(
    "returned",
    [lambda y: iter([y]), lambda y: (part for part in [y]), lambda y: map(len, [y]), lambda y: {y}, lambda y: lambda: y,
     lambda y: nn.Linear(2, 2)],
)  # fmt: skip
def test_outputs_that_lead_elsewhere_are_refused(returned: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RecordError, match=r"The output holds a .*Return what it leads to, in a list or dict"):
        fxprune.record(_net(lambda self, x: [returned(self.both(x))]), _x())


def test_containers_and_constants_come_out_as_they_are() -> None:
    def follow(self: Any, x: Tensor) -> Any:
        y = self.both(x)
        return defaultdict(list, y=[y]), deque([y]), range(3), int, y.to_sparse()

    net = _net(follow)
    x = _x(3)
    found, wanted = _pruned(net, _x(), channels=0.5), net(x)
    given = found(x)
    assert [type(value) for value in given] == [type(value) for value in wanted]
    assert given[0].default_factory is list
    assert given[2:4] == (range(3), int)
    torch.testing.assert_close(_pruned(net, _x())(x)[4].to_dense(), wanted[4].to_dense())


# --- what forward does ------------------------------------------------------------------------------------------------


def test_generators_made_in_forward_begin_anew_at_every_call() -> None:
    def follow(self: Any, x: Tensor) -> Any:
        own = torch.Generator().manual_seed(3)
        first = torch.rand(2, generator=own) * torch.rand(2, generator=own)
        own.manual_seed(5)
        return self.both(x) + first + torch.rand(2, generator=own)

    net = _net(follow)
    small, x = _pruned(net, _x()), _x(3)
    before = torch.get_rng_state()
    for _ in range(2):
        torch.testing.assert_close(small(x), net(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_among_the_inputs_is_drawn_from() -> None:
    net = _net(lambda self, x, own: self.both(x) + torch.rand(2, generator=own))
    small, x = _pruned(net, _x(), torch.Generator()), _x()
    for seed in (1, 2):
        found, wanted = (model(x, torch.Generator().manual_seed(seed)) for model in (small, net))
        torch.testing.assert_close(found, wanted)


def test_a_forward_that_seeds_and_draws_is_refused() -> None:
    def follow(self: Any, x: Tensor) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return self.both(x) + torch.rand(2)

    net, x = _net(follow), _x()
    before = torch.get_rng_state()
    with pytest.raises(RecordError, match="seeds torch's random numbers"):
        _pruned(net, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_functions_of_higher_order_are_named() -> None:
    def follow(self: Any, x: Tensor) -> Any:
        y = self.both(x)
        return torch.cond(y.sum() > 0, lambda t: t * 2, lambda t: t - 1, (y,))

    with pytest.raises(RecordError, match="cond takes functions as arguments"):
        fxprune.record(_net(follow), _x())


@pytest.mark.parametrize(
    ("follow", "said"),
    [(lambda self, x: self.both(x) * (1 + torch.is_grad_enabled()), "whether gradients are computed"),
     (lambda self, x: self.both(x) * (1 + x.requires_grad), "whether a tensor requires a gradient"),
     (lambda self, x: self.both(x) * (1 + x.is_contiguous()), "how a tensor lies in memory")],
)  # fmt: skip
def test_questions_that_no_graph_can_follow_are_noted(follow: Callable[..., Any], said: str) -> None:
    assert any(said in note for note in fxprune.record(_net(follow), _x()).meta["notes"])


def test_a_branch_on_values_that_pruning_changes_names_its_line() -> None:
    def follow(self: Any, x: Tensor) -> Any:
        y = self.both(x)
        while y.abs().max() > 0.05:
            y = y * 0.5
        return y

    net = _net(follow)
    with torch.no_grad():
        net.b.weight.mul_(20)
        net.b.bias.zero_()
    with pytest.raises(ModelError, match=r"test_hostile.py:.*branches on a value here.*ignore="):
        _pruned(net, 9 * _x(), channels=0.2)


def test_named_tuples_that_look_at_their_parts_are_made_in_the_graph() -> None:
    def follow(self: Any, x: Tensor) -> Any:
        return self.both(nn.utils.rnn.pack_padded_sequence(x[None], [len(x)], batch_first=True).data)

    net = _net(follow)
    assert _pruned(net, _x()).meta["fxprune"].notes == ()
    torch.testing.assert_close(fxprune.record(net, _x())(_x() * 0), net(_x() * 0))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_values_that_cannot_be_compared_are_compared_with_themselves() -> None:
    """A layer that was quantised keeps its weight in such an object; what is around it is pruned."""
    weight = torch.quantize_per_tensor(torch.randn(3, 2), 0.1, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    with pytest.raises(NotImplementedError):
        assert packed != packed  # noqa: PLR0124

    def follow(self: Any, x: Tensor) -> Any:
        result: Tensor = torch.ops.quantized.linear_dynamic(self.both(x), packed)
        return result

    small = _pruned(_net(follow), _x())
    (note,) = small.meta["fxprune"].notes
    assert re.match(
        r"linear_dynamic cannot be interpreted: NotImplementedError: [^.]*; what reaches it is locked", note
    )
