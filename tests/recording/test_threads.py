"""Recording in several threads: what it replaces in torch is everybody's, and nobody else notices."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomise
from torch import Tensor, nn

import fxprune
from fxprune.recording import Twin
from fxprune.recording.record import recorded
from fxprune.recording.state import without_compilation

pytestmark = pytest.mark.usefixtures("one_thread")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Net(nn.Module):
    """Uses what recording replaces: calls of modules, ``apply``, ``int`` and ``len``, autocast, attention, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.at = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.b, self.drop = nn.Linear(8, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = Doubled.apply(self.a(x).relu())
        h = h + self.at(h, h, h)[0] / int(len(x) / max(len(x), 1))
        with torch.autocast("cpu", enabled=False):
            y: Tensor = self.b(self.drop(h))
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError("nobody exports this")
        return y


def _replaced() -> dict[str, Any]:
    """What is everybody's, and what recording replaces of it."""
    return {
        "call": nn.Module.__call__,
        "apply": torch.autograd.Function.__dict__["apply"],
        "autocast": (torch.autocast.__enter__, torch.autocast.__exit__),
        "sdp": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "fast path": (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()),
        "exporting": (torch.compiler.is_exporting, torch.compiler.is_compiling, torch.jit.is_tracing),
        "builtins": {n for n in ("int", "float", "len", "range", "max", "min") if n in vars(sys.modules[__name__])},
        "gradients": torch.is_grad_enabled(),
        "dispatch": torch._C._len_torch_dispatch_stack(),
        "function": torch._C._len_torch_function_stack(),
    }


def _pruned(seed: int) -> Any:
    net = randomise(Net(), seed).eval()
    return fxprune.prune(net, torch.ones(2, 3, 4), channels=0.6, round_to=1, progress=False)


def _in_threads(*works: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_four_threads_prune_while_a_fifth_serves() -> None:
    before = _replaced()
    served, x = randomise(Net()).eval(), torch.randn(3, 3, 4)
    with torch.no_grad():
        expected = served(x)
    alone = [_pruned(seed) for seed in range(2)]
    results: dict[int, list[Any]] = {}
    done, answers = threading.Event(), []

    def prune(seed: int) -> None:
        results[seed] = [_pruned(seed % 2) for _ in range(2)]

    def serve() -> None:
        with torch.no_grad():
            while not done.is_set() or len(answers) < 20:
                answers.append(torch.allclose(served(x), expected, atol=1e-6))

    server = threading.Thread(target=serve)
    server.start()
    try:
        _in_threads(*(lambda seed=seed: prune(seed) for seed in range(4)))
    finally:
        done.set()
        server.join(60)
    assert len(answers) >= 20
    assert all(answers)
    assert _replaced() == before
    for seed, found in results.items():
        for small in found:
            own = alone[seed % 2]
            assert small.meta["fxprune"].plan == own.meta["fxprune"].plan
            assert small.code == own.code
            assert torch.allclose(small.eval()(x), own.eval()(x), atol=1e-6)


def test_two_threads_record_one_model() -> None:
    model, x = randomise(Net()).eval(), torch.randn(2, 3, 4)
    expected = fxprune.record(model, x)
    codes: list[str] = []
    _in_threads(*(lambda: codes.append(fxprune.record(model, x).code) for _ in range(4)))
    assert codes == [expected.code] * 4
    assert torch.equal(expected(x), model(x))


def test_a_served_model_in_train_mode_keeps_its_gradients_and_its_modes() -> None:
    """Its thread knows nothing of eval mode, of no_grad or of the private copies of the other."""
    model, x = randomise(Net()), torch.randn(2, 3, 4)
    model.drop.p = model.at.dropout = 0.0  # type: ignore[assignment]
    model(x).sum().backward()
    expected = model.a.weight.grad.clone()  # type: ignore[union-attr]
    done, same = threading.Event(), []

    def train() -> None:
        while not done.is_set() or len(same) < 10:
            model.zero_grad()
            model(x).sum().backward()
            same.append(torch.allclose(model.a.weight.grad, expected, atol=1e-4) and model.training)  # type: ignore[arg-type]

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for _ in range(3):
            fxprune.prune(model, x, channels=0.6, round_to=1, progress=False)
    finally:
        done.set()
        trainer.join(60)
    assert len(same) >= 10
    assert all(same)


class Trained(nn.Parameter):
    """Beside it, autograd writes its gradient in another thread, which nobody may read then."""

    @property
    def grad(self) -> Any:
        raise AssertionError("its gradient was read")


@pytest.mark.parametrize("rehearse", [True, False])
def test_gradients_are_not_read_where_forward_does_not(rehearse: bool) -> None:
    net = randomise(Net()).eval()
    net.a.weight = Trained(net.a.weight.detach())
    module = recorded(net, torch.ones(2, 3, 4), rehearse=rehearse)
    Twin.of(net, module)((torch.ones(2, 3, 4),), {})
    with pytest.raises(AssertionError, match="was read"):
        Twin(net)


def test_no_generator_moves() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.1 * torch.randn_like(x)) + torch.rand(2)

    net = randomise(Noisy()).eval()
    fxprune.prune(net, torch.ones(2, 3, 4), channels=0.6, round_to=1, progress=False)  # what is imported once is
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        small = fxprune.prune(net, torch.ones(2, 3, 4), channels=0.6, round_to=1, progress=False)
        after = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert not torch.equal(small(torch.ones(2, 3, 4)), small(torch.ones(2, 3, 4)))


def test_runs_that_overlap_give_compilation_back() -> None:
    from torch._dynamo import eval_frame

    before, first, second = eval_frame._stance, without_compilation(), without_compilation()
    first.__enter__()
    second.__enter__()  # as of another thread
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert eval_frame._stance == before
