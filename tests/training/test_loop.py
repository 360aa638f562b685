"""The built-in loop: a run that was interrupted ends as one that was not, and every setting does what it says."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Unchanged, image, make
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler, TensorDataset

import fxprune
from fxprune import Loop, Options
from fxprune.errors import InputError
from fxprune.methods import Scratch, Slimming
from fxprune.training import fit, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS: dict[str, Any] = {"scratch": Scratch(sparsity=0.9, lr=0.05), "slimming": Slimming(strength=1e-2, gamma=0.5)}
EPOCHS, BATCHES = 3, 3


def examples(seed: int = 1, count: int = 8 * BATCHES) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return TensorDataset(x, torch.randint(0, 10, (count,), generator=generator))


def loader(seed: int = 1) -> DataLoader[Any]:
    return DataLoader(examples(seed), 8)


def state_of(small: nn.Module) -> dict[str, Tensor]:
    return {**small.state_dict(), "notes": small.meta["fxprune"].notes}  # type: ignore[index]


def same(a: nn.Module, b: nn.Module) -> bool:
    """The same plan, weights and notes, bit for bit."""
    first, second = state_of(a), state_of(b)
    notes = first.pop("notes") == second.pop("notes")
    kept = a.meta["fxprune"].plan == b.meta["fxprune"].plan  # type: ignore[index]
    return kept and notes and all(torch.equal(first[n], second[n]) for n in (*first, *second))


# -- interruptions


class Augmented(Dataset[Any]):
    """Every access draws from all global random numbers: torch's, NumPy's and Python's."""

    def __init__(self) -> None:
        self._data = examples()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        x, y = self._data[index]
        return x * (random.random() + float(np.random.rand())) + 0.1 * torch.randn(1), y


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


class Noisy(Dataset[Any]):
    """Every access draws from a generator of its own."""

    def __init__(self) -> None:
        self._data, self.generator = examples(count=4 * BATCHES), generator()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        x, y = self._data[index]
        return x + torch.randn(x.shape, generator=self.generator), y


LOADERS: dict[str, Callable[[], Any]] = {
    "own generator": lambda: DataLoader(examples(), 8, shuffle=True, generator=generator()),
    "no generator": lambda: DataLoader(examples(), 8, shuffle=True),
    "sampler with a generator": lambda: DataLoader(
        examples(), 8, sampler=RandomSampler(examples(), replacement=True, generator=generator())
    ),
    "augmented": lambda: DataLoader(Augmented(), 8, shuffle=True),
    "data sets with generators, put together": lambda: DataLoader(ConcatDataset([Noisy(), Noisy()]), 8, shuffle=True),
}


class Stopping:
    """A loader that fails at one batch of one epoch, as Ctrl-C would; it keeps the loader's attributes."""

    def __init__(self, inner: Any, at: int):
        self._inner, self._left = inner, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._inner:
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
            yield batch


def trained(method: str, data: Any, path: Path | None, resume: Path | None = None, **options: Any) -> Any:
    validation = DataLoader(examples(2), 8, shuffle=True)  # it draws as well
    return fxprune.prune(
        make(), image(), method=METHODS[method], flops=0.6, data=data, epochs=EPOCHS, progress=False, verify=False,
        options=Options(loop=Loop(checkpoint=path, validation=validation, resume=resume)), **options,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LOADERS)
def test_a_resumed_run_ends_as_one_without_an_interruption(method: str, kind: str, tmp_path: Path) -> None:
    whole = trained(method, LOADERS[kind](), None)
    # At the boundary of two epochs (the first batch of the third), and in the middle of the third.
    for at in (2 * BATCHES, 2 * BATCHES + 1):
        path = tmp_path / f"{at}.pt"
        with pytest.raises(KeyboardInterrupt):
            trained(method, Stopping(LOADERS[kind](), at), path)
        assert torch.load(path, weights_only=True)["epoch"] == 2
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
        fresh = LOADERS[kind]()
        for _ in fresh:  # the loader is somewhere else than it was
            pass
        assert same(trained(method, fresh, path, resume=path), whole)
        assert torch.load(path, weights_only=True)["epoch"] == EPOCHS
    assert same(trained(method, LOADERS[kind](), None, resume=path), whole)  # nothing is left to train


def test_other_random_numbers_end_elsewhere() -> None:
    """What the test above relies on: order and augmentation of the data do change the result."""
    for kind in ("no generator", "augmented"):
        results = [trained("slimming", LOADERS[kind](), None, seed=seed) for seed in (0, 1)]
        assert not same(*results)
    data = [DataLoader(examples(), 8, shuffle=True, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    assert not same(*(trained("slimming", d, None) for d in data))


def test_the_best_epoch_survives_an_interruption(tmp_path: Path) -> None:
    """Scratch keeps the gates of the best sparse epoch (here any is sparse enough); they are in the checkpoint."""
    path, method = tmp_path / "run.pt", Scratch(sparsity=1.0, lr=0.2)
    options: Any = {"method": method, "flops": 0.5, "epochs": 5, "progress": False, "verify": False}
    whole = fxprune.prune(make(), image(), data=loader(), **options)
    assert "best epoch" in whole.meta["fxprune"].notes[0]
    with pytest.raises(KeyboardInterrupt):
        fxprune.prune(
            make(),
            image(),
            data=Stopping(loader(), 4 * BATCHES),
            options=Options(loop=Loop(checkpoint=path)),
            **options,
        )
    assert set(torch.load(path, weights_only=True)["method"]) == {"accuracy", "gates"}
    assert same(
        fxprune.prune(make(), image(), data=loader(), options=Options(loop=Loop(resume=path)), **options), whole
    )


READERS: dict[str, dict[str, Any]] = {
    "scratch": {"method": "scratch", "epochs": 1},
    "taylor": {"method": "taylor"},
    "obs": {"method": "obs"},
    "a refit": {"reconstruct": True},
    "a part": {"reconstruct": True, "submodule": "0"},
}


@pytest.mark.parametrize("name", READERS)
def test_the_callers_random_numbers_stay_as_they_are_and_decide_nothing(name: str) -> None:
    model, results = make(), []
    for outer in (1, 2):
        torch.manual_seed(outer)
        np.random.seed(outer)
        random.seed(outer)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        asked = {"data": LOADERS["augmented"](), "channels": 0.6, "round_to": 1, "progress": False}
        results.append(pruned(model, **asked, **READERS[name]))
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert torch.equal(states[0], after[0])
        assert states[1:] == after[1:]
    first, second = (small.state_dict() for small in results)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def pruned(model: nn.Module, submodule: str = "", **options: Any) -> nn.Module:
    if submodule:
        return fxprune.prune_submodule(nn.Sequential(model, nn.Softmax(1)).eval(), submodule, image(), **options)
    return fxprune.prune(model, image(), **options)


def test_a_seed_is_that_of_all_random_numbers() -> None:
    drawn = []
    for seed in (3, 3, 4):
        with seeded(seed):
            drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


def test_where_there_are_several_gpus_torch_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    with seeded(0):  # warnings are errors here
        assert asked == [0, 1]


def test_a_checkpoint_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    trained("slimming", loader(), path)
    before = path.read_bytes()
    saved = torch.save

    def fail(state: Any, draft: Path) -> None:
        saved(state, draft)
        draft.write_bytes(draft.read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left on device"):
        trained("slimming", loader(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [Path("x"), (i for i in "x")], ids=["no plain value", "no pickle"])
def test_a_checkpoint_that_could_not_be_read_again_is_not_written(value: Any, tmp_path: Path) -> None:
    class Odd(LambdaLR):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "value": value}

    loop = Loop(checkpoint=tmp_path / "run.pt", schedule=lambda optimizer, epochs: Odd(optimizer, lambda epoch: 1.0))
    options: Any = {"flops": 0.5, "data": loader(), "epochs": 1, "progress": False}
    with pytest.raises(InputError) as caught:
        fxprune.prune(make(), image(), method="slimming", options=Options(loop=loop), **options)
    assert str(caught.value) == (
        f"No checkpoint can be written to {tmp_path}/run.pt: the state_dict() of the optimizer, of the schedule or of "
        "the method holds more than plain values and tensors."
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = tmp_path / "run.pt", []
    trained("scratch", loader(), path)
    loaded = torch.load

    def load(*args: Any, **options: Any) -> Any:
        asked.append(options.get("weights_only"))
        return loaded(*args, **options)

    monkeypatch.setattr(torch, "load", load)
    trained("scratch", loader(), None, resume=path)
    assert asked == [True]  # this run writes none


def test_samplers_that_take_turns_by_epoch_are_told_which_one(tmp_path: Path) -> None:
    class Turns(RandomSampler):
        told: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.told.append(epoch)

    trained("scratch", DataLoader(examples(), 8, sampler=Turns(examples())), None)
    assert Turns.told == [0, 1, 2]


# -- settings


def run(data: Any = None, loss_fn: Any = None, epochs: int = 1, method: Any = None, **settings: Any) -> nn.Module:
    """The network after a training, before the cut."""
    training = fxprune.attach(
        make(), image(), method=method or Slimming(strength=1e-3), channels=0.5, progress=False, verify=False
    )
    with seeded(0):
        fit(training, data or loader(), loss_fn, epochs, Loop(**settings), progress=False)
    return training.model


def difference(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_an_optimizer_of_ones_own_gets_what_the_method_trains() -> None:
    seen: list[Any] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        seen.append(list(parameters))
        return torch.optim.AdamW(seen[-1], lr=0.0)

    before = make()
    assert difference(run(optimizer=optimizer), before) == 0  # a learning rate of zero
    assert len(seen[0]) == len([*before.parameters()])
    run(optimizer=optimizer, method=Scratch())
    assert [tuple(p.shape) for p in seen[1]] == [(40,)]  # the gates alone


def test_a_schedule_is_stepped_once_per_epoch() -> None:
    rates: list[float] = []

    def schedule(optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler:
        assert epochs == 3
        optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        return LambdaLR(optimizer, lambda epoch: 0.5**epoch)

    run(epochs=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), schedule=schedule)
    assert rates == [0.1] * BATCHES + [0.05] * BATCHES + [0.025] * BATCHES


def test_a_schedule_may_be_stepped_after_every_step() -> None:
    """As in a warm-up."""
    rates: list[float] = []

    def schedule(optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler:
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return LambdaLR(optimizer, lambda step: step / (epochs * BATCHES))

    by_step: Any = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "schedule": schedule, "per_step": True}
    run(epochs=3, **by_step)
    assert rates == pytest.approx([n / (3 * BATCHES) for n in range(3 * BATCHES)])
    with pytest.raises(
        InputError, match=r"^per_step=True steps your schedule after every step: pass schedule= as well"
    ):
        Loop(per_step=True)


def test_the_paper_s_schedule_goes_with_the_paper_s_optimizer_only() -> None:
    sgd: Any = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)}
    constant: Any = {"schedule": lambda optimizer, epochs: None}
    assert difference(run(epochs=2), run(epochs=2, **sgd)) > 0  # after half of the epochs the rate is a tenth
    assert difference(run(epochs=2, **constant), run(epochs=2, **sgd)) == 0


def test_gradients_are_clipped_to_a_norm() -> None:
    def moved(**settings: Any) -> float:
        model = run([next(iter(loader()))], optimizer=lambda p: torch.optim.SGD(p, lr=1.0), **settings)
        squares = [((p - q) ** 2).sum() for p, q in zip(model.parameters(), make().parameters(), strict=True)]
        return float(torch.stack(squares).sum().sqrt().detach())

    assert moved() > 0.1
    assert moved(clip=0.01) == pytest.approx(0.01, rel=1e-2)


def test_mixed_precision() -> None:
    """Activations are bfloat16, weights stay float32, and the result is about that of full precision."""
    seen = set()

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        seen.add(output.dtype)
        return F.cross_entropy(output, target)

    mild: Any = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.01)}
    exact, mixed = run(epochs=2, loss_fn=loss_fn, **mild), run(epochs=2, loss_fn=loss_fn, amp=True, **mild)
    assert seen == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert 0 < difference(exact, mixed) < 0.02
    for method in METHODS.values():
        small = fxprune.prune(
            make(), image(), method=method, flops=0.6, data=loader(), epochs=1, progress=False,
            options=Options(loop=Loop(amp=True)),
        )  # fmt: skip
        assert small.meta["fxprune"].oracle_error < 1e-5


def test_a_step_that_the_scaler_leaves_out_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that overflow in float16 are not stepped by: nor does the method do what follows a step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler)
    counts = dict.fromkeys(("batches", "steps", "rates", "after"), 0)

    def counted(what: str, result: Any = None) -> Any:
        counts[what] += 1
        return result

    class Counted(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return counted("steps", super().step(closure))

    class Rates(LambdaLR):
        def step(self, epoch: Any = None) -> None:
            counted("rates", super().step(epoch))

    training = fxprune.attach(make(), image(), method="dhp", flops=0.5, progress=False, verify=False)
    after = training.hooks.after_step
    monkeypatch.setattr(training.hooks, "after_step", lambda optimizer: counted("after", after(optimizer)))
    fit(
        training, loader(), lambda output, target: counted("batches", F.cross_entropy(output, target)), 2,
        Loop(
            optimizer=lambda p: Counted(p, lr=0.01), schedule=lambda optimizer, epochs: Rates(optimizer, lambda n: 1.0),
            per_step=True,
        ),
        progress=False,
    )  # fmt: skip
    assert 0 < counts["steps"] == counts["after"] == counts["rates"] - 1 < counts["batches"] == 2 * BATCHES


def test_validation_decides_the_best_epoch_and_runs_in_eval_mode() -> None:
    scores: list[float] = []
    modes: list[bool] = []
    training = fxprune.attach(make(), image(), method=Scratch(), flops=0.5, progress=False, verify=False)
    training.hooks.after_epoch = scores.append  # type: ignore[method-assign, assignment]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        modes.append(training.model.training)
        return F.cross_entropy(output, target)

    other = loader(2)
    fit(training, loader(), loss_fn, 2, Loop(validation=other), progress=False)
    assert modes == ([True] * BATCHES + [False] * BATCHES) * 2
    model = training.model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in other)
    assert len(scores) == 2
    assert scores[-1] == pytest.approx(right / (8 * BATCHES))


def test_without_accuracy_the_loss_decides() -> None:
    scores: list[float] = []
    training = fxprune.attach(make(), image(), method=Scratch(), flops=0.5, progress=False, verify=False)
    training.hooks.after_epoch = scores.append  # type: ignore[method-assign, assignment]
    data = [(x, F.one_hot(y, 10).float()) for x, y in loader()]
    fit(training, data, F.mse_loss, 1, Loop(validation=data), progress=False)
    model = training.model.eval()
    losses = [float(F.mse_loss(model(x), y).detach()) for x, y in data]
    assert scores == [pytest.approx(-sum(losses) / len(losses))]


def test_every_epoch_tells_loss_accuracy_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    data = loader()
    small = fxprune.prune(
        make(), image(), method=Scratch(sparsity=0.1, lr=0.5), flops=0.5, data=data, epochs=3,
        options=Options(loop=Loop(validation=data)), verify=False,
    )  # fmt: skip
    out, told = capsys.readouterr()
    assert out == ""
    lines = [line for line in told.splitlines() if "epoch" in line]
    pattern = r"fxprune: epoch (\d)/3: loss (\d+\.\d{4}), accuracy (\d+\.\d\d)%, (\d+)% of MACs left"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert [int(m[1]) for m in found if m] == [1, 2, 3]
    left = [int(m[4]) for m in found if m]
    assert 0 <= min(left) < max(left) <= 100  # gates went to zero, and their MACs with them
    assert small.meta["fxprune"].macs_after > 0
    run()
    assert capsys.readouterr().err == ""  # progress=False


def test_remaining_macs_are_those_of_the_gates_that_are_not_zero() -> None:
    training = fxprune.attach(make(), image(), method="scratch", flops=0.5, progress=False, verify=False)
    (gates,) = (p for p in training.model.parameters() if p.requires_grad)
    alive = training.hooks.alive()
    assert alive is not None
    assert training.graph.macs(alive) == training.graph.macs()
    with torch.no_grad():
        gates[::2] = 0
    half = training.hooks.alive()
    assert half is not None
    keep = training.graph.everything()
    index = training.hooks._gates.index  # type: ignore[attr-defined]
    for group in training.graph.prunable:
        keep[group.channels] = (index[group.name] % 2 == 1).numpy()
    assert (half == keep).all()


def test_dense_models_are_left_alone() -> None:
    model = make()
    with Unchanged(model):
        for method in METHODS.values():
            fxprune.prune(model, image(), method=method, flops=0.6, data=loader(), epochs=1, progress=False)
