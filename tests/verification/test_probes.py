"""The recording against the model on what the example does not show: probes, candidates, and what is said of them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import scripted
from torch import Tensor, nn

import fxprune
from fxprune import pipeline
from fxprune.errors import GuardError, VerificationError
from fxprune.recording import Options, Twin, guards
from fxprune.verification.proof import InputDim, Proof

pytestmark = pytest.mark.usefixtures("one_thread")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def prune(model: nn.Module, *args: Any, kwargs: Any = None, share: float = 0.5, **options: Any) -> Any:
    """``share`` 1.0: nothing is cut, so that outputs compare with the model's."""
    options = {"round_to": 1, "progress": False, **options}
    return fxprune.prune(randomise(model).eval(), args, example_kwargs=kwargs, channels=share, **options).eval()


def proof_of(module: Any) -> Proof:
    found: Proof = module.meta["fxprune"].proof
    return found


def equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def refusal(model: nn.Module, *args: Any) -> str:
    with pytest.raises(VerificationError) as caught:
        prune(model, *args)
    return str(caught.value)


NO_FUNCTION = (
    "{}.forward is no function of its inputs, so no graph can stand for it: a second call gives another answer ({}). "
    "Take that out of forward, or draw with torch."
)


# --- a second call ----------------------------------------------------------------------------------------------------


def test_a_counter_is_named() -> None:
    class Counting(Two):
        def __init__(self) -> None:
            super().__init__()
            self.steps = 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return super().forward(x) * self.steps

    model = Counting()
    assert refusal(model, torch.randn(2, 4)) == NO_FUNCTION.format("Counting", "calls change Counting.steps")
    assert model.steps == 0


def test_a_buffer_of_a_part_is_named() -> None:
    class Shifting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 8)
            self.register_buffer("shift", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.weight.shape
            self.shift = self.shift.detach() + 1
            return super().forward(x) + float(self.shift.sum())

    model = Two()
    model.a = Shifting()
    assert "a second call gives another answer" in refusal(model, torch.randn(2, 4))


def test_what_is_kept_in_objects_is_told_without_a_name() -> None:
    class Listing(Two):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(1)
            return super().forward(x) * len(self.seen)

    why = "something that it keeps changes from call to call"
    assert refusal(Listing(), torch.randn(2, 4)) == NO_FUNCTION.format("Listing", why)


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())], ids=["Python", "NumPy"])
def test_random_numbers_of_python_are_told(draw: Callable[[], float]) -> None:
    class Drawing(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + draw())

    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), str(np.random.get_state())
    why = "it draws random numbers from Python or NumPy"
    assert refusal(Drawing(), torch.randn(2, 4)) == NO_FUNCTION.format("Drawing", why)
    assert (random.getstate(), str(np.random.get_state())) == before


def test_random_numbers_of_torch_are_a_function_of_the_generator() -> None:
    class Noisy(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(x.shape[0], 4)

    small = prune(Noisy(), torch.randn(2, 4))
    x = torch.randn(5, 4)
    assert not torch.equal(small(x), small(x))
    assert proof_of(small).error == 0.0


def test_a_state_that_changes_no_answer_is_no_matter() -> None:
    class Kept(Two):
        steps = 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            self.last = x
            return super().forward(x)

    assert "input sizes free x[0]" in str(prune(Kept(), torch.randn(2, 4)).meta["fxprune"])


def test_what_a_call_with_another_size_leaves_is_no_matter_for_the_next() -> None:
    class Shifting(Convs):
        shift = 1

        def forward(self, x: Tensor) -> Tensor:
            if min(x.shape[2:]) <= 4:
                self.shift = 0  # for good
            return super().forward(x.roll(self.shift, 2) + x)

    small = prune(Shifting(), torch.randn(2, 3, 5, 5), share=1.0)
    first, *_, height, width = small.meta["fxprune"].inputs
    assert (first.free, height.free, width.free) == (True, False, False)


def test_a_twin_keeps_what_its_calls_leave_and_tells() -> None:
    model: Any = Convs()
    model.a.count, model.a.forward = 0, lambda x: (setattr(model.a, "count", model.a.count + 1), F.relu(x))[1]
    model.b = nn.Identity()
    twin = Twin(model)
    assert twin.changed() == []
    twin((torch.randn(1, 3, 4, 4),), {})
    twin((torch.randn(1, 3, 4, 4),), {})
    assert twin.changed() == [("a", "count")]
    assert twin.model.a.count == 2  # type: ignore[union-attr]
    assert model.a.count == 0


# --- other sizes ------------------------------------------------------------------------------------------------------


def test_free_and_fixed_sizes_are_told() -> None:
    small = prune(Convs(), torch.randn(2, 3, 16, 16))
    report = small.meta["fxprune"]
    assert [(dim.name, dim.dim, dim.size, dim.free) for dim in report.inputs] == [
        ("x", 0, 2, True), ("x", 1, 3, False), ("x", 2, 16, True), ("x", 3, 16, True)
    ]  # fmt: skip
    assert [dim.why for dim in report.inputs] == [
        "3 was tried", "the model takes no other size that was tried (2, 4)", "8 was tried", "24 was tried"
    ]  # fmt: skip
    assert report.inputs == proof_of(small).inputs
    text = str(report)
    assert "model and recording agree to 0.0e+00: the example, batch 3, x of 8 along dim 2 and 24 along dim 3" in text
    fixed = "x[1] = 3 (the model takes no other size that was tried (2, 4))"
    assert f"input sizes free x[0], x[2], x[3]; fixed {fixed}" in text


def test_a_size_that_the_model_does_not_take_is_guarded() -> None:
    class Checked(Two):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(torch.tensor(int(x.shape[1]) == 6), "six steps, please")
            return super().forward(x)

    small = prune(Checked(), torch.randn(2, 6, 4))
    (dim,) = [dim for dim in small.meta["fxprune"].inputs if dim.dim == 1]
    assert not dim.free
    assert small(torch.randn(5, 6, 4)).shape == (5, 6, 4)
    with pytest.raises(GuardError):
        small.forward(torch.randn(2, 7, 4))


def test_a_branch_on_a_size_is_told_with_its_line() -> None:
    class Branching(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if x.shape[0] < 3 else y - y.mean(0)

    small = prune(Branching(), torch.randn(2, 4), share=1.0)
    line = f"test_probes.py:{Branching.forward.__code__.co_firstlineno + 2} in forward"
    first = small.meta["fxprune"].inputs[0]
    assert (first.free, first.why.endswith(line)) == (False, True)
    (refused,) = proof_of(small).refused
    assert refused.startswith("batch 3: ")
    assert refused.endswith(line)
    assert f"guarded     {refused}" in str(small.meta["fxprune"])


BRANCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "padded": lambda x: F.pad(x, (0, 4 - x.shape[3] % 4)) if x.shape[3] % 4 != 0 else x,
    "resized": lambda x: y if (y := F.max_pool2d(x, 2).repeat(1, 1, 2, 2)).shape == x.shape
    else F.interpolate(y, x.shape[2:]) + x[:, :, :1, :1],
    "filled up": lambda x: F.pad(y, (0, 0, 0, x.shape[2] - y.shape[2]))
    if (y := F.max_pool2d(x, 2).repeat(1, 1, 2, 2)).shape[2] < x.shape[2] else y,
}  # fmt: skip


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_unequal_sizes_that_does_nothing_for_equal_ones(name: str) -> None:
    class Branching(Convs):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(BRANCHES[name](x)).mean((2, 3))

    model = Branching()
    small = prune(model, torch.randn(2, 3, 8, 8), share=1.0)
    for shape in ((2, 3, 8, 8), (1, 3, 9, 8), (2, 3, 10, 7)):
        try:
            assert equal(small(x := torch.randn(shape)), model(x))
        except GuardError:
            assert name == "resized" or shape[2] % 2 == 0, shape


def test_a_loop_over_a_size_of_two_inputs_is_told_with_its_line() -> None:
    class Scanning(Two):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = x * mask[..., None]
            return super().forward(torch.stack([x[:, i] for i in range(x.shape[1])], 1) + x)

    small = prune(Scanning(), torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.long))
    line = f"tests/verification/test_probes.py:{Scanning.forward.__code__.co_firstlineno + 2} in forward"
    with pytest.raises(GuardError, match=re.escape(f"{line}: forward goes another way")):
        small(torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.long))


def test_a_number_that_left_unseen_is_found_and_guarded() -> None:
    """A place in a list is read by C code, which asks nobody: only the comparison tells."""

    class Tabled(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * [1.0, 2.0, 3.0, 4.0, 5.0][x.shape[0]]

    model = Tabled()
    small = prune(model, torch.randn(2, 4), share=1.0)
    first = small.meta["fxprune"].inputs[0]
    assert first.why.startswith("at 3 the recorded graph and the model differ (relative error ")
    assert not first.free
    assert equal(small(torch.ones(2, 4)), model(torch.ones(2, 4)))
    with pytest.raises(GuardError, match=r"^dim 0 of x is fixed at 2: at 3 the recorded graph and the model differ"):
        small.forward(torch.randn(4, 4))


def test_without_comparison_there_are_no_probes() -> None:
    RUNS.clear()
    small = prune(Seen(), torch.randn(2, 4), verify=False)
    bare = len(RUNS)
    report = small.meta["fxprune"]
    assert (report.proof, report.inputs) == (None, ())
    assert "input sizes" not in str(report)
    RUNS.clear()
    prune(Seen(), torch.randn(2, 4))
    assert len(RUNS) > bare


RUNS: list[tuple[int, ...]] = []


class Seen(Two):
    def forward(self, x: Tensor) -> Tensor:
        RUNS.append(tuple(int(size) for size in x.size()) if type(x.shape[0]) is int else (0, 0))
        return super().forward(x)


def test_the_model_runs_on_the_example_and_on_another_batch() -> None:
    RUNS.clear()
    prune(Seen(), torch.randn(2, 4))
    assert [shape for shape in RUNS if shape[1] == 4] == [(2, 4), (3, 4)]


# --- other values -----------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Drops a mask that hides nothing, as most libraries do, unless it is being exported."""

    def __init__(self, general: str) -> None:
        super().__init__()
        self.a, self.b, self.general = nn.Linear(8, 16), nn.Linear(16, 8), general

    def _is_general(self) -> bool:
        if self.general == "exporting":
            return torch.compiler.is_exporting()
        return self.general == "tracing" and torch.jit.is_tracing()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and not self._is_general() and mask.all():
            mask = None
        h = self.a(x).relu()
        return self.b(h if mask is None else h * mask[..., None])


def _padded() -> Tensor:
    mask = torch.ones(2, 4)
    mask[1, 2:] = 0
    return mask


@pytest.mark.parametrize("general", ["exporting", "tracing", "flipped"])
def test_a_mask_that_hides_nothing_in_the_example_still_hides(general: str) -> None:
    model, x = Masked(general), torch.randn(2, 4, 8)
    small = prune(model, x, kwargs={"mask": torch.ones(2, 4)}, share=1.0)
    for mask in (torch.ones(2, 4), _padded()):
        assert equal(small(x, mask=mask), model(x, mask=mask))
    assert "mask with zeros at its end" in proof_of(small).probes
    assert "mask with zeros at its start" in proof_of(small).probes
    assert not proof_of(small).refused
    assert not torch.compiler.is_exporting()


@scripted
def tokens(x: Tensor) -> Tensor:
    """[batch, channels, ...] -> [batch, positions, channels]."""
    batch, channels = x.shape[0], x.shape[1]
    return x.view(batch, channels, -1).transpose(1, 2)


@scripted
def doubled(x: Tensor) -> Tensor:
    if torch.jit.is_scripting():
        return x * 2
    return x * 3


def times(x: Tensor) -> Tensor:
    return x * 2


@scripted
def several_times(x: Tensor) -> Tensor:
    return times(x)


def test_what_a_scripted_function_reads_of_sizes_is_followed() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(tokens(self.a(x)).relu())

    model = Tokens().eval()
    recorded = fxprune.record(model, torch.randn(2, 3, 8, 8))
    y = torch.randn(5, 3, 9, 12)
    torch.testing.assert_close(recorded(y), model(y), rtol=0, atol=0)


class Scripted(Two):
    """Calls a function of this file."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = globals()[self.function](super().forward(x))
        return found


def test_a_scripted_function_that_asks_is_told_so() -> None:
    model, x = Scripted("doubled").eval(), torch.randn(3, 4)
    torch.testing.assert_close(fxprune.record(model, torch.randn(2, 4))(x), model(x))
    assert not torch.jit.is_scripting()


def test_a_scripted_function_that_does_something_else_in_python_is_recorded_as_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "times", lambda x: x * 3)  # what is compiled calls what it did
    model, x = Scripted("several_times").eval(), torch.randn(3, 4)
    small = prune(model, torch.randn(2, 4), share=1.0)
    torch.testing.assert_close(small(x), model(x))


def test_values_that_no_candidate_follows_are_guarded() -> None:
    class Longest(Two):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x) * (1 + [3.0, 1.0, 2.0, 4.0, 5.0][mask.sum(-1).min().item()])

    model, x, mask = Longest(), torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.long)
    small = prune(model, x, mask, share=1.0)
    assert equal(small(x, mask), model(x, mask))
    other = mask.clone()
    other[1, 2:] = 0
    with pytest.raises(GuardError, match=r"^mask is fixed at the example's values: forward goes another way"):
        small.forward(x, other)


# --- candidates -------------------------------------------------------------------------------------------------------


class Anchored(Convs):
    """Keeps a grid for the last size."""

    shape: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.shape != x.shape:
            self.grid = torch.arange(x.shape[2] * x.shape[3]).float().view(1, 1, *x.shape[2:])
            self.shape = x.shape
        return y + self.grid


@pytest.mark.parametrize("has_run", [False, True])
def test_what_is_kept_for_one_size_does_not_bind_the_graph(has_run: bool) -> None:
    model, x = Anchored().eval(), torch.randn(1, 3, 8, 8)
    if has_run:
        model(x)
    kept = model.shape
    small = prune(model, x, share=1.0)
    assert model.shape is kept
    assert equal(small(torch.ones(2, 3, 12, 10)), model(torch.ones(2, 3, 12, 10)))
    assert [dim.free for dim in small.meta["fxprune"].inputs] == [True, False, True, True]


def test_a_type_that_is_asked_for_exactly_is_int() -> None:
    class Typed(Two):
        k = 2

        def forward(self, x: Tensor) -> Tensor:
            k = int(self.k)
            return super().forward(x) * (3 if type(k) is int else 1) * (2 if isinstance(x.shape[0], int) else 1)

    model, x = Typed(), torch.randn(3, 4)
    assert equal(prune(model, torch.randn(2, 4), share=1.0)(x), model(x))


def test_a_candidate_is_recorded_only_where_the_first_one_falls_short(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = pipeline.recorded

    def counted(*args: Any) -> Any:
        made.append(args[3:] and args[3])
        return real(*args)

    monkeypatch.setattr(pipeline, "recorded", counted)
    prune(Two(), torch.randn(2, 4))
    assert made == [Options()]
    prune(Masked("exporting"), torch.randn(2, 4, 8), kwargs={"mask": torch.ones(2, 4)})
    assert made[1] == Options()
    assert made[-1].exporting


# --- objects in and out -----------------------------------------------------------------------------------------------


class Cache:
    """A plain object that holds tensors, a number, and whatever is hung on it."""

    def __init__(self, keys: Tensor | None = None) -> None:
        self.keys, self.length, self.layers = keys, 0, []  # type: ignore[var-annotated]


@dataclass
class Found:
    y: Tensor
    cache: Any
    extra: dict[str, Any] = field(default_factory=dict)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, cache: Cache) -> Found:
        y = self.b(self.a(x).relu()) + cache.keys
        cache.keys = torch.cat([cache.keys, y], 0)[-x.shape[0] :]
        cache.length = cache.length + x.shape[0]
        cache.layers.append(y * 2)
        return Found(y, cache, {"again": cache})


def test_an_object_that_is_written_to_is_the_callers() -> None:
    model = Caching()
    small = prune(model, torch.randn(2, 8), Cache(torch.randn(2, 8)), share=1.0)
    for n in (2, 3):
        x, keys = torch.randn(n, 8), torch.randn(n, 8)
        own, other = Cache(keys.clone()), Cache(keys.clone())
        layers = own.layers
        found, expected = small(x, own), model(x, other)
        assert type(found) is Found
        assert found.cache is found.extra["again"] is own
        assert own.layers is layers
        assert own.length == other.length == n
        assert equal(found.y, expected.y)
        assert equal(own.keys, other.keys)  # type: ignore[arg-type]
        assert len(layers) == 1
        assert equal(layers[0], other.layers[0])


def test_objects_out_are_new_at_every_call() -> None:
    class Making(Two):
        def forward(self, x: Tensor) -> dict[str, Any]:
            kept = Cache(super().forward(x))
            kept.length = x.shape[0] * 2
            kept.layers = [kept.keys * 2, {"deep": (kept.keys, 3)}]
            return {"kept": kept, "list": [kept, kept.keys]}

    model = Making()
    small = prune(model, torch.randn(2, 4), share=1.0)
    x = torch.randn(3, 4)
    first, second, expected = small(x), small(x), model(x)
    assert type(first["kept"]) is Cache
    assert first["kept"] is first["list"][0]
    assert first["kept"] is not second["kept"]
    assert first["kept"].layers is not second["kept"].layers
    assert first["kept"].layers[1]["deep"][1] == 3
    assert (first["kept"].length, type(first["kept"].length)) == (6, int)
    assert equal(first["kept"].layers[1]["deep"][0], expected["kept"].keys)


def test_an_object_that_holds_itself_comes_in() -> None:
    class Ring(Two):
        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            return super().forward(x) + cache.itself.itself.keys  # type: ignore[attr-defined]

    def ring(n: int) -> Any:
        cache: Any = Cache(torch.randn(n, 4))
        cache.itself = cache
        return cache

    model = Ring()
    small = prune(model, torch.randn(2, 4), ring(2), share=1.0)
    x, cache = torch.randn(3, 4), ring(3)
    assert equal(small(x, cache), model(x, cache))


def test_one_object_at_two_places_stays_one() -> None:
    class Shared(Two):
        def forward(self, x: Tensor, caches: list[Cache]) -> Any:
            caches[0].keys = super().forward(x)
            return caches[1].keys * 2  # type: ignore[operator]

    model, cache, x = Shared(), Cache(torch.zeros(2, 4)), torch.randn(2, 4)
    small = prune(model, x, [cache, cache], share=1.0)
    mine, other = Cache(torch.zeros(2, 4)), Cache(torch.zeros(2, 4))
    assert equal(small(x, [mine, mine]), model(x, [other, other]))
    assert equal(mine.keys, other.keys)  # type: ignore[arg-type]
    assert cache.keys.tolist() == torch.zeros(2, 4).tolist()  # type: ignore[union-attr]


def test_dicts_and_lists_that_are_written_to_are_the_callers() -> None:
    class Writing(Two):
        def forward(self, batch: dict[str, Any], seen: list[Tensor]) -> Tensor:
            y = super().forward(batch.pop("x"))
            batch["y"] = y
            seen.append(y + 1)
            return y

    model = Writing()
    small = prune(model, {"x": torch.randn(2, 4), "n": 3}, [torch.ones(1)], share=1.0)
    x = torch.randn(3, 4)
    batch, seen, other = {"x": x, "n": 3}, [torch.ones(1)], {"x": x, "n": 3}
    y = small(batch, seen)
    expected = model(other, [torch.ones(1)])
    assert equal(y, expected)
    assert sorted(batch) == sorted(other) == ["n", "y"]
    assert batch["y"] is y
    assert [tuple(each.shape) for each in seen] == [(1,), (3, 4)]


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_proof_in_words() -> None:
    dims = (InputDim(0, "x", 0, 2, True, "3 was tried"), InputDim(0, "x", 1, 3, False, "no other size was tried"))
    proof = Proof(1.5e-7, "numbers", ("the example", "batch 3"), ("x of 7: a.py:3 in forward",), dims)
    assert proof.lines() == [
        "probed      model and recording agree to 1.5e-07: the example, batch 3",
        "input sizes free x[0]; fixed x[1] = 3 (no other size was tried)",
        "guarded     x of 7: a.py:3 in forward",
    ]
    assert "farthest" not in proof.data()
    assert Proof(0.0, "flags", ("the example",), (), ()).lines() == [
        "probed      model and recording give the same flags: the example"
    ]


def test_the_farthest_probe_is_what_the_oracle_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    real = pipeline.mask_oracle

    def seen(*args: Any) -> Any:
        given.append(args[-1])
        return real(*args)

    monkeypatch.setattr(pipeline, "mask_oracle", seen)
    prune(Convs(), torch.randn(2, 3, 16, 16))
    assert [tuple(x.shape) for x in given[0][0]] == [(3, 3, 8, 24)]


def test_a_size_of_which_the_model_says_no_number_is_not_what_the_oracle_runs_on() -> None:
    """As optical flow looks up a pyramid of grids, the last of which has one column at half of the example's size."""

    class Sampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.avg_pool2d(self.a(x), 8)
            side = h.new_ones(1) * (h.shape[-2] - 1)
            return self.b(h.relu() / side * side)  # type: ignore[no-any-return]

    small = prune(Sampled(), torch.randn(2, 3, 16, 16))
    assert small.meta["fxprune"].oracle_error < 1e-5
    assert not small(torch.randn(2, 3, 8, 16)).isfinite().any()


def test_a_size_that_only_the_model_refuses_is_fixed_also_where_dims_move_together() -> None:
    """The graph takes any square, and no other image; the model looks its side up in a list, unseen."""

    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            return self.b(h + h.transpose(2, 3)) * [1.0][abs(x.shape[2] - 8)]

    small = prune(Sides(), torch.randn(2, 3, 8, 8))
    small(torch.randn(5, 3, 8, 8))
    for side in (9, 12):
        with pytest.raises(GuardError, match=rf"is fixed at 8: .*, where {side} == 8 would have held"):
            small(torch.randn(2, 3, side, side))


@pytest.mark.parametrize("fold", ["into rows for a layer", "into rows that are summed", "one channel a row"])
def test_sizes_for_which_channels_are_folded_into_the_batch_are_fixed(fold: str) -> None:
    """The model takes images of twice the side, and makes four rows of each, of other channels each."""

    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.b = nn.Linear({"into rows for a layer": 8 * 16, "one channel a row": 8}.get(fold, 16), 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            if self.b.in_features == 8 * 16:
                return self.b(h.view(-1, 8 * 16))
            h = h.view(-1, 8, 16)
            return self.b(h.mean(2)) if self.b.in_features == 8 else self.b(h).sum(1)

    small = prune(Folding(), torch.randn(2, 3, 4, 4))
    assert small.a.weight.shape[0] == 4
    assert [(dim.dim, dim.why) for dim in proof_of(small).inputs if dim.dim > 1] == [
        (2, "at 8 channels lie elsewhere"),
        (3, "at 8 channels lie elsewhere"),
    ]
    assert small(torch.randn(5, 3, 4, 4)).shape == (5, 4)
    with pytest.raises(GuardError, match="is fixed at 4: at 8 channels lie elsewhere"):
        small(torch.randn(2, 3, 8, 8))


def test_a_branch_behind_an_op_that_takes_few_sizes_is_guarded() -> None:
    """None of the sizes that are tried comes to the branch; that says nothing of those that do."""

    class Grouped(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(F.pad(x, (0, 0, 0, 2)).view(x.shape[0], -1, 5, 4))  # 8, 13, 18 ... of length
            return y * 2 if y.shape[1] > 2 else y

    model = Grouped().eval()
    small = prune(model, torch.randn(2, 8, 4), share=1.0)
    x = torch.randn(3, 8, 4)
    assert torch.equal(small(x), model(x))
    with pytest.raises(GuardError, match="forward goes another way"):
        small(torch.randn(2, 13, 4))


def test_a_branch_far_from_all_sizes_that_are_tried_is_guarded() -> None:
    class Long(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if x.shape[1] > 1000 else y

    small = prune(Long(), torch.randn(2, 8, 4))
    assert small(torch.randn(3, 900, 4)).shape == (3, 900, 4)
    with pytest.raises(GuardError, match="where 1001 <= 1000 would have held"):
        small(torch.randn(2, 1001, 4))


def test_a_branch_on_what_is_cut_to_a_length_is_guarded() -> None:
    class Cropped(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = x[:, :100]
            y = super().forward(x)
            return y * 2 if x.shape[1] < 100 else y

    small = prune(Cropped(), torch.randn(2, 256, 4))
    assert small(torch.randn(3, 150, 4)).shape == (3, 100, 4)
    with pytest.raises(GuardError, match="where 40 >= 100 would have held"):
        small(torch.randn(2, 40, 4))


def test_a_branch_on_what_an_op_fixes_is_dropped_and_on_what_goes_past_it_is_not() -> None:
    """Positions are of one length only; the length before them is what the inputs say."""

    class Positions(Two):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            tokens = x[:, ::2]
            y = super().forward(tokens + self.positions)
            y = y * 3 if y.shape[1] > 7 else y
            return y * 2 if x.shape[1] > 11 else y

    model = Positions()
    small = prune(model, torch.randn(2, 11, 4), share=1.0)
    assert [node.args[1:3] for node in guards.guards_of(small.graph) if node.args[2] != 7] == [("<=", 11)]
    assert not [node for node in guards.guards_of(small.graph) if node.args[2] == 7]
    with pytest.raises(GuardError, match="where 12 <= 11 would have held"):
        small(torch.randn(2, 12, 4))


def test_a_branch_behind_an_op_that_fixes_one_side_of_an_image_is_dropped() -> None:
    """No other square gets through; the sides one by one tell that the height behind the op is always 8."""

    class Rows(Convs):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x) + self.rows
            return y * 2 if y.shape[2] > 10 else y

    small = prune(Rows(), torch.randn(2, 3, 8, 8), share=1.0)
    assert not [node for node in guards.guards_of(small.graph) if node.args[2] == 10]
    assert small(torch.randn(2, 3, 8, 20)).shape == (2, 4, 8, 20)


def test_a_branch_on_a_size_that_only_1_gets_past_an_op_is_guarded() -> None:
    """None of the sizes that are tried meets the positions; one token does, and goes the other way."""

    class Positions(Two):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([x, super().forward(x + self.positions)], 1)
            return y * 2 if y.shape[1] > 9 else y

    small = prune(Positions(), torch.randn(2, 6, 4))
    with pytest.raises(GuardError, match="where 7 > 9 would have held"):
        small(torch.randn(2, 1, 4))


def test_a_branch_on_channels_behind_an_op_that_takes_squares_only_is_dropped() -> None:
    class Turned(Convs):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x + x.transpose(2, 3))
            return y * 2 if y.shape[1] > 10 else y

    small = prune(Turned(), torch.randn(2, 3, 8, 8))
    assert not guards.guards_of(small.graph)
    assert small(torch.randn(2, 3, 9, 9)).shape == (2, 4, 9, 9)


def test_a_branch_on_values_before_an_op_that_takes_one_size_only_is_guarded_too() -> None:
    class Gated(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = x if x.shape[1] > 3 else x * 2
            y = x * 2 if x.sum() > 0 else x
            return super().forward(y)

    model = Gated()
    small = prune(model, torch.ones(2, 4), share=1.0)
    assert equal(small(torch.ones(3, 4)), model(torch.ones(3, 4)))
    with pytest.raises(GuardError, match="forward goes another way"):
        small(-torch.ones(3, 4))


class Padded(nn.Module):
    """torch's own encoder makes nested tensors of what is padded, unless gradients are computed."""

    def __init__(self, nested: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = self.last(self.encoder(self.first(x), src_key_padding_mask=mask))
        return result


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [0, 2])
def test_what_a_fused_kernel_of_torch_answers_otherwise_is_told(padding: int) -> None:
    """The recording is compared with the layers' Python code, which runs where gradients are computed."""
    x, mask = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 5 - padding :] = True
    model, plain = Padded(), Padded(nested=False)
    small = prune(model, x, mask, share=0.7, for_class=True)
    where = "the example" if padding else "mask with True at its end"
    (note,) = (n for n in small.meta["fxprune"].notes if n.startswith("without gradients layers of torch"))
    assert re.search(rf"what a padding mask hides is 0 there; relative error \d\.\de[-+]\d\d on {where}\)", note)
    assert proof_of(small).error < 1e-5
    own = fxprune.into(model, small)
    with torch.no_grad():
        torch.testing.assert_close(own(x, mask)[~mask], small(x, mask)[~mask])
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fxprune.record(model, (x, mask))(x, mask), plain.eval()(x, mask))
    assert not any("fused" in note for note in prune(plain, x, mask, share=0.7).meta["fxprune"].notes)
    assert torch.backends.mha.get_fastpath_enabled()
