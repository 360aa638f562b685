"""Every bad input to a training or a measurement is a clear error of ours; no good checkpoint is lost by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import Unchanged, image, make
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import Loop, Options
from fxprune.errors import FxpruneError, GuardError, InputError, ModelError
from fxprune.methods import DHP, GSM, Scratch, Slimming

pytestmark = pytest.mark.usefixtures("one_thread")

PAIR = "the loader must yield (inputs, target), where inputs is a tensor, a tuple of positional inputs, or a dict of"
EMPTY = "yields no batches. Is it a generator that was used up, or smaller than one batch?"
READERS = ["slimming", "scratch", "taylor", "fisher", "wanda"]  # one of every way to read data
X, Y = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3])


def message(kind: type[FxpruneError], method: Any = "slimming", data: Any = None, **options: Any) -> str:
    """What ``prune`` says, after a look whether it left the model as it was."""
    learns = method in ("slimming", "scratch") or isinstance(method, (Slimming, Scratch))
    options = {"flops": 0.5, "progress": False, **({"epochs": 1} if learns else {}), **options}
    if "resume" in options:
        options["loop"] = replace(options.get("loop", Loop()), resume=options.pop("resume"))
    rare = {name: options.pop(name) for name in ("loop", "steps") if name in options}
    options["options"] = fxprune.Options(**rare)
    model = options.pop("model", None) or make()
    with Unchanged(model), pytest.raises(kind) as caught:
        fxprune.prune(model, image(), method=method, data=data, **options)
    assert isinstance(caught.value, FxpruneError)
    return str(caught.value)


# -- data


@pytest.mark.parametrize("method", READERS)
def test_a_loader_without_batches(method: str) -> None:
    dropping = DataLoader(TensorDataset(X, Y), 8, drop_last=True)
    for data in ([], iter([]), (b for b in ()), dropping):
        assert message(InputError, method, data) == f"data= {EMPTY}"


@pytest.mark.parametrize("data", [3, object(), TensorDataset(X, Y)], ids=["number", "object", "data set"])
@pytest.mark.parametrize("method", READERS)
def test_what_is_no_loader(method: str, data: Any) -> None:
    assert message(InputError, method, data) == (
        f"data= is a {type(data).__name__}, which is no loader: pass an iterable of (inputs, target) batches."
    )


@pytest.mark.parametrize("method", READERS)
def test_batches_of_another_form(method: str) -> None:
    without_target = [(X, "a Tensor"), ({"x": X}, "a dict"), ((X,), "1 values")] if method != "wanda" else []
    for batch, what in [((X, Y, Y), "3 values"), ("x", "a str"), *without_target]:
        assert message(InputError, method, [batch]).startswith(f"Batch 0 of data is {what}; {PAIR}")
    assert message(InputError, method, [(3, Y)]) == "The inputs of batch 0 of data hold no tensor."


@pytest.mark.parametrize("method", READERS[:4])
@pytest.mark.parametrize("label", [-1, 10, 250])
def test_labels_out_of_range(method: str, label: int) -> None:
    data = [(X, Y), (X, torch.tensor([0, 1, label, 3]))]
    text = f"Batch 1 of data has the label {label}; the model has 10 classes, 0 to 9."
    assert message(InputError, method, data) == text
    assert message(InputError, method, data, loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1)) == text


def test_labels_that_the_loss_leaves_out_are_no_error() -> None:
    data = [(X, torch.tensor([0, 255, 2, 3]))]
    loss_fn = nn.CrossEntropyLoss(ignore_index=255)
    fxprune.prune(make(), image(), method="slimming", data=data, epochs=1, flops=0.5, loss_fn=loss_fn, progress=False)
    assert "has the label 255" in message(InputError, "slimming", data)


@pytest.mark.parametrize("method", READERS[:4])
def test_batches_that_the_model_does_not_take(method: str) -> None:
    text = message(InputError, method, [(X, Y), (X[:, :2], Y)])
    assert text.startswith("The model does not run on batch 1 of data: ")
    assert "channels" in text
    assert text.endswith(". Batches must be like the example inputs.")
    assert "\n" not in text


def test_activations_of_another_size() -> None:
    text = "has other channels than in the recorded run. Activations are measured on inputs of the example's size"
    assert text in message(InputError, "wanda", [(X[:, :2], Y)])


def test_validation_is_looked_at_as_data_is() -> None:
    data = [(X, Y)]
    with pytest.raises(InputError, match=r"^validation= is a int, which is no loader: pass an iterable of"):
        Loop(validation=3)
    with pytest.raises(InputError, match=r"^validation= yields no batches\."):
        Loop(validation=[])
    assert message(InputError, data=data, loop=Loop(validation=iter(()))) == f"validation= {EMPTY}"
    assert message(InputError, data=data, loop=Loop(validation=[X])).startswith("Batch 0 of validation is a Tensor")
    assert message(InputError, data=data, loop=Loop(validation=[(X, Y + 9)])) == (
        "Batch 0 of validation has the label 10; the model has 10 classes, 0 to 9."
    )
    assert message(InputError, data=data, loop=Loop(validation=[(X[:, :1], Y)])).startswith(
        "The model does not run on batch 0 of validation: "
    )


# -- loss


@pytest.mark.parametrize("method", READERS[:4])
def test_a_loss_that_is_no_single_number(method: str) -> None:
    def each(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.expand(len(output)), reduction="none").expand(4)

    data = [(X, Y)]
    single = method == "fisher"  # one sample at a time
    assert message(InputError, method, data, loss_fn=(lambda o, t: each(o, t[:1])) if single else each) == (
        "loss_fn returned a tensor of shape [4]; it must return one number as a tensor, such as a mean."
    )
    assert message(InputError, method, data, loss_fn=lambda output, target: 0.5) == (
        "loss_fn returned a float; it must return one number as a tensor, such as a mean."
    )


@pytest.mark.parametrize("method", READERS[:4])
def test_a_loss_that_cannot_be_differentiated(method: str) -> None:
    assert message(InputError, method, [(X, Y)], loss_fn=lambda o, t: F.cross_entropy(o, t).detach()) == (
        "What loss_fn returned cannot be differentiated: compute it from output, without detaching."
    )


@pytest.mark.parametrize("method", ["slimming", "scratch", "taylor"])
def test_targets_that_cross_entropy_does_not_take(method: str) -> None:
    text = message(InputError, method, [(X, Y), (X, Y[:3])])
    assert text.startswith("Cross entropy does not take batch 1 of data: Expected input batch_size (4) to match target")
    assert text.endswith(". Another loss is loss_fn=.")


@pytest.mark.parametrize("method", READERS[:4])
def test_labels_may_be_integers_of_any_size(method: str) -> None:
    wide, narrow = (
        fxprune.prune(make(), image(), method=method, data=[(X, labels)], flops=0.5, progress=False,
                      **({"epochs": 1} if method in ("slimming", "scratch") else {}))
        for labels in (Y, Y.to(torch.int16))
    )  # fmt: skip
    assert wide.meta["fxprune"].plan == narrow.meta["fxprune"].plan


@pytest.mark.parametrize("method", READERS[:4])
def test_no_loss_where_none_is_clear(method: str) -> None:
    assert message(InputError, method, [(X, torch.randn(4, 10))]) == (
        "The loss is not clear from output and target; pass loss_fn=, a function of (output, target)."
    )


def test_a_loss_that_takes_no_single_sample_is_told_that_it_was_given_one() -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output @ output.T, target)  # every sample against the others of its batch

    text = message(InputError, "fisher", [(X, Y)], loss_fn=loss_fn)
    told = "loss_fn fails on a single sample of batch 0 of data, which this method runs by itself: Target 1 is out of"
    assert text.startswith(told)
    assert text.endswith(". A loss that compares the samples of a batch needs another method.")


def test_a_loss_function_that_is_none() -> None:
    assert message(InputError, data=[(X, Y)], loss_fn="mse") == (
        "loss_fn= is a str; pass a function of (output, target)."
    )
    assert message(InputError, data=[(X, Y)], loss_fn=nn.MSELoss) == (
        "loss_fn= is the class MSELoss; pass an object of it, such as MSELoss()."
    )
    for method in ("scratch", "l2"):
        assert message(InputError, method, None, loss_fn=F.cross_entropy, epochs=None) == (
            "loss_fn= compares outputs with targets: pass data=, a loader of (inputs, target), as well."
        )


class Poisoned:
    """A loader with one batch of NaN in its third epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        yield X, Y
        yield (X * float("nan") if self.epoch == 3 else X), Y


@pytest.mark.parametrize("method", ["slimming", "scratch"])
def test_a_loss_that_is_nan_stops_at_the_step_and_keeps_the_checkpoint(method: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    advice = "Lower the learning rate, clip the gradients (Loop(clip=1.0)), or look at the data of that step."
    text = message(ModelError, method, Poisoned(), epochs=4, loop=Loop(checkpoint=path))
    assert text == (
        "The loss is nan at step 2 of epoch 3: training stopped, and the checkpoint of the last good epoch is "
        f"{path}. {advice}"
    )
    state = torch.load(path, weights_only=True)
    assert state["epoch"] == 2
    assert all(bool(v.isfinite().all()) for v in state["model"].values())
    small = fxprune.prune(
        make(),
        image(),
        method=method,
        flops=0.5,
        data=[(X, Y)] * 2,
        epochs=4,
        progress=False,
        options=fxprune.Options(loop=Loop(resume=path)),
    )
    assert small.meta["fxprune"].oracle_error < 1e-5
    assert message(ModelError, method, Poisoned(), epochs=4) == (
        "The loss is nan at step 2 of epoch 3: training stopped, and no checkpoint was asked for "
        f"(Loop(checkpoint=...)). {advice}"
    )
    first = message(ModelError, method, [(X * float("nan"), Y)], loop=Loop(checkpoint=path))
    assert first == (  # the file there is of another run
        "The loss is nan at step 1 of epoch 1: training stopped, and no epoch was complete, so there is no checkpoint. "
        f"{advice}"
    )
    resumed = message(ModelError, method, [(X * float("inf"), Y)], epochs=4, resume=path)
    assert f"at step 1 of epoch 3: training stopped, and the checkpoint of the last good epoch is {path}." in resumed


def test_a_validation_that_is_nan_is_none() -> None:
    """It counted as a loss of 0, and no accuracy: the best epoch that there is."""
    text = message(ModelError, data=[(X, Y)], loop=Loop(validation=[(X, Y), (X * float("nan"), Y)]))
    assert text.startswith("The loss is nan at validation batch 2 of epoch 1: training stopped, and ")
    assert text.endswith("or look at the data of that batch.")


def test_a_model_that_is_frozen() -> None:
    assert message(ModelError, data=[(X, Y)], model=make().requires_grad_(False)) == (
        "Slimming trains, and all parameters are frozen (requires_grad=False)."
    )


def test_weights_that_become_nan_without_the_loss_do_not_replace_the_checkpoint(tmp_path: Path) -> None:
    path, calls = tmp_path / "run.pt", []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        zero = (output - output).sum()
        return F.cross_entropy(output, target) + (zero.sqrt() if len(calls) == 4 else 0)  # its gradient is not finite

    text = message(ModelError, data=[(X, Y)] * 2, epochs=2, loss_fn=loss_fn, loop=Loop(checkpoint=path))
    assert text.startswith(
        "stem.0.weight holds NaN or inf, though the loss is finite, at step 2 of epoch 2: training stopped, and the "
        f"checkpoint of the last good epoch is {path}."
    )
    assert torch.load(path, weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_a_criterion_cannot_score_with_nan(method: str) -> None:
    text = message(ModelError, method, [(X, Y), (X * float("nan"), Y)])
    assert text == "The loss of batch 1 of data is nan, so nothing can be scored."


def test_a_batch_that_cannot_be_taken_apart_into_samples() -> None:
    """The Fisher information is that of single samples: a batch that was taken for one would give other scores."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, shift: Tensor, x: Tensor) -> Tensor:
            return self.two(self.one(x + shift).relu())

    model, shift, x = randomise(Shifted()).eval(), torch.ones(1, 6), X.flatten(1)[:, :6]

    def loss_fn(output: Tensor, target: Any) -> Tensor:
        return F.cross_entropy(output, torch.as_tensor(target))

    def plan(data: Any) -> Any:
        example = {"shift": shift, "x": x}
        asked: Any = {"example_kwargs": example, "method": "fisher", "channels": 0.5, "round_to": 1, "progress": False}
        return fxprune.prune(model, (), data=data, loss_fn=loss_fn, **asked).meta["fxprune"].plan

    samples = plan([({"shift": shift, "x": x[i : i + 1]}, Y[i : i + 1]) for i in range(4)])
    for target in (Y, Y.numpy()):
        assert plan([({"x": x, "shift": shift}, target)]) == samples
        with pytest.raises(InputError) as caught:
            plan([({"shift": shift, "x": x}, target)])
        assert str(caught.value) == (
            "Batch 0 of data cannot be taken apart into samples: the first tensor of its inputs has 1 rows, and the "
            "target 4. The batch is dim 0 of both; put an input that has it first, or pass batches of one sample."
        )


def test_a_single_sample_that_goes_another_way_is_told_as_one() -> None:
    """The batches are like the example; that samples are run one by one, the error alone can tell."""

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x).relu()
            return self.two(h if len(x) == 1 else h - h.mean(0))

    x = X.flatten(1)[:, :6]
    asked: Any = {"method": "fisher", "channels": 0.5, "progress": False, "data": [(x, Y)]}
    told = r"^The method runs every sample of data by itself, and one of batch 0 is refused: .*test_bad_training\.py:"
    with pytest.raises(GuardError, match=told) as caught:
        fxprune.prune(randomise(Alone()).eval(), x, **asked)
    assert "test_bad_training.py:" in caught.value.source
    assert fxprune.prune(randomise(Alone()).eval(), x[:1], **asked).meta["fxprune"].oracle_error < 1e-5


def test_sparse_gradients_are_counted_and_an_optimizer_that_takes_none_is_named() -> None:
    class Words(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(11, 12, sparse=sparse), nn.LayerNorm(12)
            self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.two(self.one(self.norm(self.table(tokens)).mean(1)).relu())

    tokens = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"data": [(tokens, Y)], "channels": 0.6, "round_to": 1, "progress": False}
    for method in ("taylor", "fisher"):
        plans = [
            fxprune.prune(randomise(Words(sparse)).eval(), tokens, method=method, **asked).meta["fxprune"].plan.kept
            for sparse in (True, False)
        ]
        assert plans[0] == plans[1]
    with pytest.raises(InputError) as caught:
        fxprune.prune(randomise(Words(True)).eval(), tokens, method="slimming", epochs=1, **asked)
    text = r"^SGD cannot step at step 1 of epoch 1: .*sparse.*\. Another optimizer is Loop\(optimizer=\.\.\.\)\.$"
    assert re.match(text, str(caught.value))


# -- arguments


def test_arguments_that_are_missing_or_have_no_meaning() -> None:
    data = [(X, Y)]
    assert message(InputError, data=data, epochs=None) == "slimming trains: pass epochs=."
    assert message(InputError) == "slimming trains: pass data=, a loader of (inputs, target), and epochs=."
    assert message(InputError, data=data, epochs=0) == "epochs=0 must be a whole number of at least 1."
    assert message(InputError, data=data, steps=2) == "slimming trains once; steps= is for criteria."
    assert message(InputError, "taylor") == "taylor measures gradients: pass data=, a loader of (inputs, target)."
    assert message(InputError, "obs").startswith(
        "obs measures what weights read: pass data=, a tensor, a list of inputs"
    )
    for name, value in (("epochs", 2), ("loop", Loop()), ("loop", Loop(resume="run.pt"))):
        assert message(InputError, "l2", **{name: value}) == (
            f"l2 does not train, so {name}= has no meaning. Fine-tune what prune returns."
        )
    with pytest.raises(InputError, match=r"^loop= is a type; pass settings such as fxprune\.Loop\(amp=True\)\.$"):
        fxprune.Options(loop=torch.optim.SGD)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^resume= is a int; pass the path of a checkpoint\.$"):
        Loop(resume=3)  # type: ignore[arg-type]


def test_data_that_a_criterion_does_not_read_are_told() -> None:
    """They change nothing; and are needed where the weights are refitted on them."""
    note = "data= was not needed: l2 reads only weights"
    with_data, without, refitted = (
        fxprune.prune(make(), X, flops=0.5, data=data, reconstruct=refit, progress=False).meta["fxprune"]
        for data, refit in (([(X, Y)], False), (None, False), ([(X, Y)], True))
    )
    assert note in with_data.notes
    assert note not in without.notes
    assert not any("not needed" in text for text in refitted.notes)
    assert with_data.plan == without.plan


def test_a_method_that_decides_how_much_goes_takes_no_budget() -> None:
    method = Slimming(percent=0.5)
    assert message(InputError, method, [(X, Y)]) == (
        "Slimming(percent=0.5) says itself how much goes: leave out flops=0.5."
    )
    assert message(InputError, Slimming(), [(X, Y)], flops=None).startswith("No budget: pass one of flops=")


@pytest.mark.parametrize("scope", ["uniform", "isomorphic"])
@pytest.mark.parametrize("method", [Slimming(percent=0.5), GSM(compression=4)])
def test_one_threshold_for_all_takes_no_other_ranking(method: Any, scope: str) -> None:
    """Scores of these scopes are shares, and the threshold is one of the method's: 0.3 of the scales is no share."""
    told = message(InputError, method, [(X, Y)], flops=None, scope=scope)
    assert told.startswith(f"{fxprune.methods.name_of(method)} says itself which channels go, of all by one threshold")
    assert f"scope={scope!r}" in told


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(X)])},
            "optimizer= is a SGD; pass a function that makes it: "
            "lambda parameters: torch.optim.SGD(parameters, lr=0.1).",
        ),
        (
            {"schedule": 0.1},
            "schedule= is a float; pass a function that makes it: "
            "lambda optimizer, epochs: CosineAnnealingLR(optimizer, epochs).",
        ),
        ({"device": "gpu"}, "device='gpu' is no device: pass one such as 'cpu' or 'cuda'."),
        ({"clip": 0}, "clip=0 must be positive."),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        Loop(**settings)
    assert str(caught.value) == text


def test_an_optimizer_that_is_none() -> None:
    text = message(InputError, data=[(X, Y)], loop=Loop(optimizer=list))  # type: ignore[arg-type]
    assert text == "optimizer= made a list; it must make a torch.optim.Optimizer."


def test_what_the_loop_cannot_step() -> None:
    data = [(X, Y)]
    ending = ". It calls it without arguments."
    assert message(InputError, data=data, loop=Loop(optimizer=torch.optim.LBFGS)) == (
        f"optimizer= made a LBFGS, whose step() the loop cannot call: missing a required argument: 'closure'{ending}"
    )
    assert message(InputError, data=data, loop=Loop(schedule=lambda o, e: ReduceLROnPlateau(o))) == (
        "schedule= made a ReduceLROnPlateau, whose step() the loop cannot call: missing a required argument: "
        f"'metrics'{ending}"
    )
    assert message(InputError, data=data, loop=Loop(schedule=lambda o, e: 3)) == (  # type: ignore[arg-type,return-value]
        "schedule= made a int, which has no step()."
    )
    short = message(InputError, data=data, epochs=2, loop=Loop(schedule=lambda o, e: OneCycleLR(o, 0.1, total_steps=1)))
    assert short.startswith("The schedule cannot be stepped at epoch 2 of 2: Tried to step 2 times.")
    assert short.endswith(". It is stepped after every epoch.")


# -- checkpoints


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fxprune.prune(
        make(), image(), method="slimming", flops=0.5, data=[(X, Y)], epochs=1, progress=False, verify=False,
        options=fxprune.Options(loop=Loop(checkpoint=tmp_path / "run.pt")),
    )  # fmt: skip
    return tmp_path / "run.pt"


def resumed(path: Path, method: Any = "slimming", **options: Any) -> str:
    return message(InputError, method, [(X, Y)], resume=path, **options)


def test_a_checkpoint_of_something_else(saved: Path) -> None:
    ending = ". Resume with the arguments of the interrupted run."
    start = f"The checkpoint {saved} was written with "
    assert resumed(saved, "scratch") == start + "method Slimming, and this run has Scratch" + ending
    other = start + "option strength 0.0001, and this run has 0.001" + ending
    assert resumed(saved, Slimming(strength=1e-3)) == other
    assert resumed(saved, Slimming(gamma=1)) == start + "option gamma None, and this run has 1" + ending
    assert resumed(saved, ignore="head") == start + "ignore nothing, and this run has head" + ending
    assert resumed(saved, epochs=2) == start + "epochs 1, and this run has 2" + ending
    adam = Loop(optimizer=torch.optim.Adam)
    assert resumed(saved, loop=adam) == start + "optimizer SGD, and this run has Adam" + ending
    plain = Loop(schedule=lambda optimizer, epochs: None)
    assert resumed(saved, loop=plain) == start + "schedule MultiStepLR, and this run has none" + ending
    other = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 10))
    assert resumed(saved, model=other) == (
        f"The checkpoint {saved} belongs to another model: 0.weight is not there in it, and [8, 3, 1, 1] in this one."
    )
    wider = make()
    wider.head = nn.Linear(16, 12)
    assert resumed(saved, model=wider) == (
        f"The checkpoint {saved} belongs to another model: head.weight is [10, 16] in it, and [12, 16] in this one."
    )
    generator = torch.Generator()
    shuffled = DataLoader(TensorDataset(X, Y), 4, shuffle=True, generator=generator)
    assert message(InputError, "slimming", shuffled, resume=saved) == (
        "The loaders (data=, validation=) have 1 + 0 random generators of their own, and had 0 + 0 when the checkpoint "
        "was written. Make them as in the interrupted run."
    )


@pytest.mark.parametrize("method", [GSM(structured=True), DHP()], ids=["gsm", "dhp"])
def test_a_checkpoint_of_a_method_that_trains_for_a_budget(method: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"
    loop = Loop(checkpoint=checkpoint)
    given: dict[str, Any] = {"method": method, "data": [(X, Y)], "epochs": 1, "progress": False}
    fxprune.prune(make(), image(), flops=0.5, **given, options=fxprune.Options(loop=loop))
    start = f"The checkpoint {checkpoint} was written with "
    ending = ". Resume with the arguments of the interrupted run."
    for other, what in [
        ({"flops": 0.25}, "budget flops=0.5, and this run has flops=0.25"),
        ({"flops": None, "params": 0.5}, "budget flops=0.5, and this run has params=0.5"),
        ({"round_to": 4}, "round_to 1, and this run has 4"),
    ]:
        assert resumed(checkpoint, method, epochs=1, **other) == start + what + ending


def test_a_checkpoint_serves_other_budgets_where_none_is_asked_for_while_training(saved: Path) -> None:
    loop = Loop(resume=saved)
    pruned = fxprune.prune(
        make(), image(), method="slimming", flops=0.7, data=[(X, Y)], epochs=1, progress=False,
        options=fxprune.Options(loop=loop),
    )  # fmt: skip
    report = pruned.meta["fxprune"]
    assert 0.5 * report.macs_before < report.macs_after <= 0.7 * report.macs_before


@pytest.mark.parametrize("share", [0.0, 0.2, 0.99])
def test_a_truncated_checkpoint(saved: Path, share: float) -> None:
    saved.write_bytes(saved.read_bytes()[: int(saved.stat().st_size * share)])
    assert resumed(saved) == f"{saved} is damaged, or no checkpoint of fxprune's training loop."


def test_a_file_that_is_no_checkpoint(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    torch.save(make().state_dict(), other)
    assert resumed(other) == f"{other} is no checkpoint of fxprune's training loop."
    torch.save(make(), other)  # a pickled module: not even unpacked
    assert resumed(other) == f"{other} is damaged, or no checkpoint of fxprune's training loop."
    torch.save(torch.load(saved, weights_only=True) | {"fxprune_checkpoint": 99}, other)
    assert resumed(other) == f"{other} has checkpoint format 99; this version reads 2."
    assert resumed(tmp_path / "none.pt") == (
        f"The checkpoint {tmp_path}/none.pt cannot be read: No such file or directory."
    )
    assert resumed(tmp_path) == f"The checkpoint {tmp_path} cannot be read: Is a directory."


def test_paths_of_checkpoints_are_looked_at_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the recording began")

    monkeypatch.setattr("fxprune.running.record_and_analyse", never)
    assert message(InputError, data=[(X, Y)], loop=Loop(checkpoint=tmp_path / "no" / "run.pt")).endswith(
        "create it first"
    )
    assert message(InputError, data=[(X, Y)], resume=tmp_path / "none.pt") == (
        f"The checkpoint {tmp_path}/none.pt cannot be read: No such file or directory."
    )


def test_a_checkpoint_that_cannot_be_written_is_found_before_the_training(tmp_path: Path) -> None:
    def never(output: Tensor, target: Tensor) -> Tensor:
        raise AssertionError("the training began")

    loop = Loop(checkpoint=tmp_path / "no" / "run.pt")
    assert message(InputError, data=[(X, Y)], loss_fn=never, loop=loop) == (
        f"cannot write '{tmp_path}/no/run.pt': the folder '{tmp_path}/no' does not exist; create it first"
    )


# -- what the errors above are not about


@pytest.mark.parametrize("method", READERS)
def test_the_same_calls_work_with_sound_data(method: str) -> None:
    options: dict[str, Any] = {"epochs": 1} if method in ("slimming", "scratch") else {}
    forms: list[Callable[[], Any]] = [lambda: [(X, Y)], lambda: [[X, Y]], lambda: [((X,), Y)], lambda: iter([(X, Y)])]
    plans = [
        fxprune.prune(
            make(), image(), method=method, flops=0.5, data=form(), progress=False, verify=False, **options
        ).meta["fxprune"].plan
        for form in forms
    ]  # fmt: skip
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize("method", ["wanda", "activation"])
def test_methods_that_measure_activations_need_no_targets(method: str) -> None:
    """They read none. Two values are inputs and a target all the same."""
    rows = DataLoader(TensorDataset(X), 2)
    forms: list[Any] = [[(X, Y)], X, [X], [X[:2], X[2:]], [(X,)], [[X]], [{"x": X}], rows, [((X,), None)]]
    plans = [
        fxprune.prune(make(), image(), method=method, flops=0.5, data=form, progress=False, verify=False)
        .meta["fxprune"].plan
        for form in forms
    ]  # fmt: skip
    assert all(plan == plans[0] for plan in plans)
    assert message(InputError, method) == (
        f"{method} measures activations: pass data=, a tensor, a list of inputs or a loader. It reads no targets."
    )
    assert message(InputError, method, X.sum()) == "data= is a tensor of shape []: pass [N, ...], N samples."


# -- figures that are read late, as on a GPU


@pytest.fixture(params=[3, 32])
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.training.loop.steps_between_looks", lambda device: request.param)


def poisoned(step: int, bad: float) -> Callable[[Any, Any], Tensor]:
    count = iter(range(100))

    def loss(output: Any, target: Any) -> Tensor:
        found: Tensor = F.cross_entropy(output, target)
        return found * bad if next(count) == step else found

    return loss


@pytest.mark.usefixtures("looks")
def test_a_look_that_comes_late_names_the_step() -> None:
    for step in (0, 2, 3, 4):
        text = message(ModelError, data=[(X, Y)] * 5, loss_fn=poisoned(step, float("inf")))
        assert text.startswith(f"The loss is inf at step {step + 1} of epoch 1: training stopped")


@pytest.mark.usefixtures("looks")
def test_a_look_that_comes_late_names_the_label() -> None:
    for number in (0, 2, 3, 4):
        data = [(X, Y)] * number + [(X, torch.tensor([0, 1, 12, -1]))] + [(X, Y)] * (4 - number)
        text = f"Batch {number} of data has the label 12; the model has 10 classes, 0 to 9."
        assert message(InputError, data=data) == text
        text = f"Batch {number} of validation has the label 12; the model has 10 classes, 0 to 9."
        assert message(InputError, data=[(X, Y)], loop=Loop(validation=data)) == text


def test_looks_change_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def trained() -> tuple[dict[str, Tensor], str]:
        pruned = fxprune.prune(
            make(),
            image(),
            method="slimming",
            flops=0.5,
            data=[(X, Y)] * 5,
            epochs=2,
            options=Options(loop=Loop(validation=[(X, Y)] * 4)),
        )
        lines = [line for line in capsys.readouterr().err.splitlines() if "epoch" in line]
        return pruned.state_dict(), "\n".join(lines)

    one, told = trained()
    monkeypatch.setattr("fxprune.training.loop.steps_between_looks", lambda device: 3)
    other, told_late = trained()
    assert told == told_late
    assert "epoch 2/2: loss" in told
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
