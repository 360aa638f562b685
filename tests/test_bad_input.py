"""Every bad input is a clear error of ours, worded for the user, and nothing is changed or half-written."""

from __future__ import annotations

import inspect
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Attentive, Shuffled, Small, Unchanged, chain, image, make
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxprune
from fxprune.errors import BudgetError, ExampleInputsError, FxpruneError, InputError, ModelError, PlanError

BUDGETS = "flops=, params=, channels=, latency="
KNOWN = ", ".join(fxprune.methods.available())


def message(kind: type[FxpruneError], model: nn.Module, inputs: Any = None, **options: Any) -> str:
    """What ``prune`` says, after a look whether it left the model as it was."""
    options = {"progress": False, **({} if "budget" in options else {"flops": 0.5}), **options}
    options |= options.pop("budget", {})
    with Unchanged(model), pytest.raises(kind) as caught:
        fxprune.prune(model, image() if inputs is None else inputs, **options)
    assert isinstance(caught.value, FxpruneError)
    return str(caught.value)


def line_of(function: Any, text: str) -> str:
    """Where ``text`` stands in a function of this file: ``file.py:line in name``."""
    lines, first = inspect.getsourcelines(function)
    number = next(i for i, line in enumerate(lines) if text in line)
    return f"{Path(__file__).name}:{first + number} in {function.__name__}"


# -- method


def test_an_unknown_method_lists_the_known_ones() -> None:
    assert message(InputError, make(), method="l3") == f"Unknown method 'l3'. Known methods: {KNOWN}."


@pytest.mark.parametrize("wrong", [fxprune.methods.L2, 3, object(), None, nn.ReLU()])
def test_what_is_no_method_says_what_is(wrong: Any) -> None:
    text = message(InputError, make(), method=wrong)
    assert text == (
        f"method must be a name or a method object such as fxprune.methods.L2(), not {wrong!r}. Known methods: {KNOWN}."
    )


class NaNScores:
    def score(self, group: fxprune.ChannelGroup, state: Any) -> Any:
        return np.full(group.channels.shape, np.nan)


class FlatScores:
    def score(self, group: fxprune.ChannelGroup, state: Any) -> Any:
        return np.zeros(group.size + 1)


class TextScores:
    def score(self, group: fxprune.ChannelGroup, state: Any) -> Any:
        return "high"


def test_scores_that_are_not_finite_name_the_group() -> None:
    assert message(ModelError, make(), method=NaNScores()) == (
        "The scores of stem.0 are not finite. Are there NaN or inf in the weights?"
    )


@pytest.mark.parametrize("method", [FlatScores(), TextScores()])
def test_scores_of_another_shape_are_refused(method: Any) -> None:
    text = message(InputError, make(), method=method)
    assert type(method).__name__ in text
    assert "stem.0" in text
    assert "[1, 16]" in text


# -- budget


def test_no_budget_and_two_budgets() -> None:
    assert message(InputError, make(), budget={}) == (
        f"No budget: pass one of {BUDGETS} a ratio of the dense model in (0, 1], such as flops=0.5."
    )
    assert message(InputError, make(), budget={"flops": 0.5, "params": 0.4}) == (
        f"More than one budget: flops=0.5 and params=0.4. Pass only one of {BUDGETS}."
    )


@pytest.mark.parametrize("kind", ["flops", "params", "channels", "latency"])
@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.0001, 50, math.nan, math.inf, True, "0.5", 1 + 0j])
def test_a_ratio_outside_0_and_1(kind: str, ratio: Any) -> None:
    assert message(InputError, make(), budget={kind: ratio}) == (
        f"{kind}={ratio} is no budget: pass a ratio of the dense model in (0, 1], such as {kind}=0.5."
    )


def check_unreachable(model: nn.Module, kind: str, ratio: float, **options: Any) -> str:
    """The message, after a look whether what it says is true."""
    text = message(BudgetError, model, budget={kind: ratio}, **options)
    found = re.fullmatch(
        rf"{kind}={ratio:g} cannot be reached: the smallest reachable ratio is (\d\.\d{{4}})\. "
        r"It is held up by: (.+)\.",
        text,
    )
    assert found, text
    least = float(found[1])
    report = fxprune.prune(model, image(), **{kind: least}, **options, progress=False).meta["fxprune"]
    assert report.oracle_error < 1e-5
    message(BudgetError, model, budget={kind: round(least - 0.0002, 4)}, **options)
    return found[2]


@pytest.mark.parametrize("kind", ["flops", "params", "channels"])
@pytest.mark.parametrize(
    "options",
    [{}, {"options": fxprune.Options(min_channels=3)}, {"round_to": 8}, {"ignore": ("up",)}, {"scope": "uniform"}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_an_unreachable_budget_names_the_smallest_that_is_reachable(kind: str, options: dict[str, Any]) -> None:
    check_unreachable(make(), kind, 0.001, **options)


@pytest.mark.parametrize("net", [Shuffled, Attentive])
@pytest.mark.parametrize("attention", ["head_dim", "uneven", "heads"])
def test_the_smallest_reachable_ratio_with_blocks(net: type[nn.Module], attention: str) -> None:
    check_unreachable(make(net), "params", 0.01, attention=attention)


class _MixedInsideHeads(nn.Module):
    """One layer for the insides of all heads ties them together."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.inside = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(self.inside(q), self.inside(k), v)
        return self.o(y.transpose(1, 2).flatten(2))


def test_heads_that_cannot_be_separated() -> None:
    model, x = _MixedInsideHeads().eval(), torch.randn(2, 3, 8)
    with pytest.raises(ModelError, match=r"the heads at .*test_bad_input\.py:\d+ in forward cannot be separated"):
        fxprune.prune(model, x, flops=0.9, attention="heads", progress=False)


def test_an_unreachable_budget_names_what_holds_it_up_with_its_line() -> None:
    held = check_unreachable(make(), "flops", 0.02, ignore=("up",))
    assert held.startswith("up.0 (ignored by the caller (")
    for options, asked in (
        ({"round_to": 64}, "round_to=64"),
        ({"options": fxprune.Options(max_ratio=0.1), "round_to": 1}, "max_ratio="),
        ({"options": fxprune.Options(min_channels=6), "round_to": 1}, "min_channels=6"),
    ):
        for kind in ("flops", "channels"):
            assert check_unreachable(make(), kind, 0.05, **options).split("; ")[0] == asked
            assert asked not in check_unreachable(make(), kind, 0.001)
    held = check_unreachable(make(Locked), "params", 0.05)
    assert f"locked (cumsum across channels (tests/{line_of(Locked.forward, 'cumsum')}))" in held


# -- model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["up.0.weight", "head.bias"])
def test_weights_that_are_not_finite_name_the_parameter(name: str, value: float) -> None:
    model = make()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    assert message(ModelError, model) == f"{name} holds NaN or inf. Load a sound checkpoint before pruning."


def test_a_running_statistic_that_is_nan() -> None:
    model = make()
    model.up[1].running_var[2] = math.nan
    assert message(ModelError, model) == "up.1.running_var holds NaN. Load a sound checkpoint before pruning."


class Locked(nn.Module):
    """Its only channels are summed up one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.locked, self.free, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.locked(x)
        x = x.cumsum(1)
        return self.head(self.free(x))


def test_a_model_without_prunable_channels_says_what_holds_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten())
    text = message(ModelError, model)
    assert text.startswith("The model has no prunable channels. What holds them: ")
    assert "0: network output (" in text
    assert "0#2: network input (" in text
    everything = message(ModelError, make(Locked), ignore=("free",))
    assert f"locked: cumsum across channels (tests/{line_of(Locked.forward, 'cumsum')})" in everything
    assert "free: ignored by the caller (" in everything


def test_a_model_without_layers() -> None:
    assert message(ModelError, nn.Sequential(nn.ReLU(), nn.Flatten())) == (
        "The model has no prunable channels: it has no convolution or linear layer."
    )


def test_exact_and_methods_without_scores_leave_a_reason() -> None:
    normed = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    assert re.search(
        r"; 0: not exact: \w+ over channels \(", message(ModelError, normed, torch.randn(2, 4), exact=True)
    )
    text = message(ModelError, make(Locked), method="bn_scale")
    assert "free: the method gives these channels no score" in text


@pytest.mark.parametrize("wrong", [None, "resnet50", torch.relu, nn.Conv2d])
def test_what_is_no_model(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"model is .*; pass a torch\.nn\.Module"):
        fxprune.prune(wrong, image(), flops=0.5, progress=False)


class Strange(Tensor):
    """With rules of its own, one would think."""


def test_models_that_cannot_be_followed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the end of torch.jit
        scripted = torch.jit.trace(make(), image())
    lazy, strange = nn.Sequential(nn.LazyConv2d(8, 1), nn.ReLU()), make()
    with FakeTensorMode():
        fake = make()
    strange.head.weight = nn.Parameter(strange.head.weight.detach().as_subclass(Strange))
    for model, text in (
        (scripted, "Small was scripted or traced by torch.jit, and its Python code, which is what is followed, is no "
         "part of it. Pass the nn.Module that it was made from."),
        (lazy, "0.weight has no shape yet, as it belongs to a lazy layer. Run the model once on real inputs, model(x), "
         "then prune it."),
        (fake, "stem.0.weight is a fake tensor and has no values. Make the model outside of FakeTensorMode; one on the "
         "meta device can be pruned without values."),
        (strange, "head.weight is a Strange, a tensor with rules of its own. Prune the model with plain tensors, then "
         "make them Strange again."),
    ):  # fmt: skip
        for call in (lambda *a: fxprune.prune(*a, flops=0.5, progress=False), fxprune.analyze, fxprune.record):
            with pytest.raises(ModelError) as caught:
                call(model, image())
            assert str(caught.value) == text


def test_under_fake_tensors_nothing_can_be_done() -> None:
    model, x = make(), image()
    with FakeTensorMode(), pytest.raises(InputError) as caught:
        fxprune.prune(model, x, flops=0.5, progress=False)
    assert str(caught.value) == "This is called under FakeTensorMode, where tensors have no values: call it outside."


def test_tensors_without_entries_and_of_inference_mode_are_no_mistake() -> None:
    model = make()
    model.nothing, model.buffer = nn.Parameter(torch.empty(0)), nn.Buffer(torch.empty(3, 0, 2))
    small = fxprune.prune(model, image(), flops=0.5, progress=False)
    assert (small.nothing.shape, small.buffer.shape) == ((0,), (3, 0, 2))
    with torch.inference_mode():
        model, x = make(), image()
    assert fxprune.prune(model, x, flops=0.5, progress=False).meta["fxprune"].oracle_error < 1e-5


def test_weights_of_eight_bits_are_looked_through() -> None:
    model = make().to(torch.float8_e4m3fn)
    with torch.no_grad():
        model.head.bias.view(torch.uint8)[0] = 0x7F
    with pytest.raises(ModelError, match=r"^head\.bias holds NaN or inf\. Load a sound checkpoint before pruning\.$"):
        fxprune.prune(model, image(), flops=0.5, progress=False)


def test_what_is_no_module_to_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^module is None; pass a torch\.nn\.Module\.$"):
        fxprune.export(None, tmp_path / "net.onnx")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^half='no' must be True or False\.$"):
        fxprune.export(chain(4, 8, 2), tmp_path / "net.onnx", torch.randn(2, 4), half="no")  # type: ignore[arg-type]
    with pytest.raises(ExampleInputsError, match="the example inputs hold no numbers"):
        fxprune.export(chain(4, 8, 2), tmp_path / "net.onnx", torch.randn(0, 4))


# -- example inputs


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8), (0,)])
def test_example_inputs_without_entries(shape: tuple[int, ...]) -> None:
    for call in (lambda *a: fxprune.prune(*a, flops=0.5, progress=False), fxprune.analyze, fxprune.record):
        with pytest.raises(ExampleInputsError) as caught:
            call(make(), torch.zeros(shape))
        assert str(caught.value) == (
            f"the example inputs hold no numbers: a tensor of shape {list(shape)} has 0 entries; pass at least one "
            "example, for instance the first rows of a batch of your data"
        )


def test_example_inputs_of_other_kinds() -> None:
    with FakeTensorMode():
        fake = image()
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    for x, text in (
        (fake, "the example inputs are fake tensors; make them outside of FakeTensorMode"),
        (nested, "the example inputs hold a nested tensor; pass one that is padded to one size"),
        (image().as_subclass(Strange), "the example inputs hold a Strange, a tensor with rules of its own; pass a "
         "plain one: x.as_subclass(torch.Tensor)"),
    ):  # fmt: skip
        assert message(ExampleInputsError, make(), x) == text


def test_example_inputs_of_another_shape_are_ours_to_report() -> None:
    text = message(ExampleInputsError, make(), torch.randn(2, 4, 8, 8))
    assert "[2, 4, 8, 8]" in text
    assert "Small" in text


def test_missing_superfluous_and_mistyped_example_inputs() -> None:
    model = make()
    with Unchanged(model), pytest.raises(ExampleInputsError, match=r"cannot tell what Small\.forward\(x\) takes: .*"):
        fxprune.prune(model, flops=0.5, progress=False)
    message(ExampleInputsError, model, (image(), image()))
    message(ExampleInputsError, model, torch.randint(0, 5, (2, 3, 8, 8)))
    message(ExampleInputsError, model, image().double())
    message(ExampleInputsError, model, image(), example_kwargs={"mask": image()})
    assert message(ExampleInputsError, model, "x") == (
        "example_inputs is a str; pass a tensor, or a tuple of all positional arguments of forward"
    )
    assert message(ExampleInputsError, model, np.zeros((2, 3, 8, 8))).startswith("example_inputs is a ndarray; pass a")


# -- options


def test_values_of_options_list_the_known_ones() -> None:
    model = make()
    assert (
        message(InputError, model, attention="head") == "attention='head' is unknown. Known: head_dim, uneven, heads."
    )
    assert message(InputError, model, scope="local") == "scope='local' is unknown. Known: global, uniform, isomorphic."
    assert message(InputError, model, scope=None) == "scope=None is unknown. Known: global, uniform, isomorphic."
    with pytest.raises(InputError, match=r"^attention='x' is unknown\. Known: head_dim, uneven, heads\.$"):
        fxprune.analyze(model, image(), attention="x")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_counts_are_whole_numbers_of_at_least_1(value: Any) -> None:
    said = "={!r} must be a whole number of at least 1."
    assert message(InputError, make(), round_to=value) == "round_to" + said.format(value)
    for name in ("min_channels", "steps"):
        with pytest.raises(InputError) as caught:
            fxprune.Options(**{name: value})
        assert str(caught.value) == name + said.format(value)


@pytest.mark.parametrize("seed", [-1, 0.5, "x", None])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    assert message(InputError, make(), method="random", seed=seed).startswith(f"seed={seed!r} must be a whole number")


def test_seeds_of_more_than_64_bits_and_numbers_of_numpy() -> None:
    assert message(InputError, make(), seed=2**70) == f"seed={2**70} must be below 2**63."
    numbers: Any = {"min_channels": np.int32(1), "steps": np.int64(1), "max_ratio": np.float64(0.9)}
    given: Any = {"round_to": np.int64(1), "seed": np.uint8(3), "options": fxprune.Options(**numbers)}
    small = fxprune.prune(make(), image(), flops=np.float32(0.5), progress=False, **given)
    assert json.loads(json.dumps(small.meta["fxprune"].data()["round_to"])) == 1


@pytest.mark.parametrize("name", ["exact", "verify", "progress"])
def test_flags_are_true_or_false(name: str) -> None:
    for wrong in ("no", 1, None, np.ones(3)):
        assert message(InputError, make(), **{name: wrong}) == f"{name}={wrong!r} must be True or False."
        with pytest.raises(InputError) as caught:
            fxprune.Options(consume=wrong)  # type: ignore[arg-type]
        assert str(caught.value) == f"consume={wrong!r} must be True or False."


def test_shares_that_may_go() -> None:
    for wrong in ("a", True, math.nan, -0.1, 1.5, ["a"], 1j):
        said = f"max_ratio of '*' is {wrong!r}: pass the share that may go, in [0, 1]."
        with pytest.raises(InputError) as caught:
            fxprune.Options(max_ratio=wrong)  # type: ignore[arg-type]
        assert str(caught.value) == said
    with pytest.raises(
        InputError, match=r"^max_ratio has the pattern 3: pass names of layers, such as 'layer4\.\*'\.$"
    ):
        fxprune.Options(max_ratio={3: 0.5})  # type: ignore[dict-item]


def test_names_that_are_none() -> None:
    assert message(InputError, make(), ignore=[["a"]]) == "ignore names ['a'], which the model does not have."
    assert message(InputError, make(), ignore=np.float32(1)).endswith(" must be a module, a name, or a list of them.")
    with pytest.raises(InputError, match=r"^submodule=\['up'\] is no name: pass one of model\.named_modules\(\)\.$"):
        fxprune.prune_submodule(make(), ["up"], image(), flops=0.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^provider=3 is no name: pass an execution provider of onnxruntime, eager"):
        fxprune.LatencyBudget(0.5, provider=3)  # type: ignore[arg-type]
    assert message(InputError, make(), scope=np.ones(2)).startswith("scope=array([1., 1.]) is unknown. Known: global,")


def test_unknown_names_to_ignore_come_with_close_matches() -> None:
    model = make()
    assert message(InputError, model, ignore=["upp.0"]) == (
        "ignore names 'upp.0', which the model does not have. Did you mean up.0, up.2, up.1?"
    )
    assert message(InputError, model, ignore="zzzzzz") == "ignore names 'zzzzzz', which the model does not have."
    assert message(InputError, model, ignore=[nn.ReLU()]) == "ignore holds a ReLU that is not part of the model."
    assert message(InputError, model, ignore=[3]).startswith("ignore names 3, which the model does not have.")
    assert message(InputError, model, ignore=3) == "ignore=3 must be a module, a name, or a list of them."


def test_unknown_names_to_keep_and_patterns_that_fit_nothing() -> None:
    model = make()
    assert message(InputError, model, keep=["upp.0"]) == (
        "keep names 'upp.0', which the model does not have. Did you mean up.0, up.2, up.1?"
    )
    for argument in ("keep", "ignore"):
        assert message(InputError, model, **{argument: "upp.*"}) == (
            f"{argument} has the pattern 'upp.*', which fits no name of the model. Did you mean up.*, up.2.*, up.1.*?"
        )
    assert message(InputError, model, keep="9*") == "keep has the pattern '9*', which fits no name of the model."
    assert message(InputError, model, keep=3) == "keep=3 must be a module, a name, or a list of them."
    assert message(InputError, model, keep=[nn.ReLU()]) == "keep holds a ReLU that is not part of the model."
    given = message(InputError, model, keep=[model.up[0].weight])
    assert given == "keep holds a Parameter: pass its name, such as 'stem.0.weight'."
    said = ", which has no parameters. Its channels stay by ignore=."
    assert message(InputError, model, keep="stem.2") == f"keep names 'stem.2'{said}"
    assert message(InputError, model, keep=[model.stem[2]]) == f"keep names a ReLU{said}"


# -- an op without a rule


class Unruled(nn.Module):
    """``histc`` has no rule, nor has any sensible one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = torch.linalg.matrix_exp(x.diag_embed() / 9).sum(-1)
        return self.head(self.two(x))


def test_an_op_without_a_rule_locks_and_is_reported() -> None:
    model, x = make(Unruled), torch.randn(2, 8)
    with Unchanged(model):
        report = fxprune.prune(model, x, channels=0.5, progress=False).meta["fxprune"]
    where = f"tests/{line_of(Unruled.forward, 'matrix_exp')}"
    notes = [note for note in report.notes if "no rule for aten." in note]
    assert notes
    assert all(where in note for note in notes)
    rows = {row.name: row for row in report.rows}
    assert rows["one"].after == (12, 8)
    assert "no rule for aten." in rows["one"].locked
    assert where in rows["one"].locked
    assert rows["two"].after == (6, 12)
    assert rows["two"].locked == ""
    assert notes[0] in str(report)


# -- plans


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fxprune.prune(make(), image(), flops=0.5, progress=False).meta["fxprune"].plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def plan_message(path: Path) -> str:
    with pytest.raises(PlanError) as caught:
        fxprune.PruningPlan.load(path)
    return str(caught.value)


def test_a_plan_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert plan_message(tmp_path / "none.json") == (
        f"The plan file {tmp_path / 'none.json'} cannot be read: No such file or directory."
    )
    assert plan_message(tmp_path) == f"The plan file {tmp_path} cannot be read: Is a directory."


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_plan_file(saved: Path, share: float) -> None:
    text = saved.read_text()
    saved.write_text(text[: int(len(text) * share)])
    found = plan_message(saved)
    assert found.startswith(f"The plan file {saved} is damaged or no JSON (")
    assert found.endswith("). Save the plan again.")


def test_a_plan_file_of_bytes(saved: Path) -> None:
    saved.write_bytes(b"\x80\x04\x95\xff\xfe")
    assert plan_message(saved).startswith(f"The plan file {saved} is damaged or no JSON (")


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"kept": {}}', '"kept digest"'])
def test_json_that_is_no_plan(saved: Path, content: str) -> None:
    saved.write_text(content)
    assert plan_message(saved) == (
        f"{saved} is no pruning plan: it lacks 'kept' or 'digest'. Pass a file that PruningPlan.save wrote."
    )


def test_a_plan_of_another_format(saved: Path) -> None:
    data = json.loads(saved.read_text())
    saved.write_text(json.dumps(data | {"format": 99}))
    assert plan_message(saved) == f"{saved} has plan format 99; this version reads formats 2, 3, 4, 5 and 6."


def test_a_plan_edited_by_hand(saved: Path) -> None:
    data = json.loads(saved.read_text())
    data["kept"]["stem.0.weight"]["0"].pop()
    saved.write_text(json.dumps(data))
    assert plan_message(saved) == (
        f"The plan file {saved} was changed after it was saved (its digest differs). Save the plan again."
    )


def apply_message(model: nn.Module, plan: fxprune.PruningPlan) -> str:
    with Unchanged(model), pytest.raises(PlanError) as caught:
        fxprune.apply(model, plan, image())
    return str(caught.value)


def test_a_plan_for_another_model(saved: Path) -> None:
    plan = fxprune.PruningPlan.load(saved)
    assert apply_message(make(Shuffled), plan) == (
        "The plan belongs to another model: parameter names or shapes differ. "
        "Apply it to the same architecture that it was made for."
    )


def edited(plan: fxprune.PruningPlan, name: str, dim: int, kept: Any) -> fxprune.PruningPlan:
    """The plan with other indices in one place."""
    dims = {**plan.kept.get(name, {}), dim: kept}
    return fxprune.PruningPlan({**plan.kept, name: dims}, plan.attention, plan.fingerprint)


def test_plans_that_contradict_themselves_or_the_model(saved: Path) -> None:
    plan, model = fxprune.PruningPlan.load(saved), make()
    damaged = "are not ascending numbers below 16. The plan is damaged."
    for indices in ([0, 99], [-1, 2], [3, 2], [2, 2], [0.5], ["0"], [True], []):
        assert apply_message(model, edited(plan, "stem.0.weight", 0, indices)) == (
            f"The plan's indices for dim 0 of 'stem.0.weight' {damaged}"
        )
    for rubbish in (3, None, "all"):
        assert "dim 0 of 'stem.0.weight'" in apply_message(model, edited(plan, "stem.0.weight", 0, rubbish))
    assert apply_message(model, edited(plan, "up.0.weight", 3, [0, 1])) == (
        "The plan cuts dim 3 of 'up.0.weight', which cannot be cut in this model."
    )
    assert apply_message(model, edited(plan, "nothing.weight", 0, [0])) == (
        "The plan names 'nothing.weight', which the model does not have."
    )
    assert apply_message(model, edited(plan, "stem.0.weight", 0, [[0, 1], [0, 1]])) == (
        "The plan gives 2 lists for dim 0 of 'stem.0.weight'; it needs 1."
    )
    other = [i for i in range(16) if i not in plan.kept["stem.0.weight"][0]]
    assert apply_message(model, edited(plan, "stem.0.weight", 0, other)).startswith(
        "The plan is inconsistent: it keeps a channel in one layer and cuts it in another that it is tied to."
    )
    classes = edited(edited(plan, "head.weight", 0, [0, 1]), "head.bias", 0, [0, 1])
    assert apply_message(model, classes).startswith(
        "The plan cuts channels of head, which cannot be cut here: network output ("
    )


@pytest.mark.parametrize("wrong", [None, "plan.json", {"kept": {}}])
def test_what_is_no_plan(wrong: Any) -> None:
    with pytest.raises(PlanError, match=r"PruningPlan"):
        fxprune.apply(make(), wrong, image())


# -- output paths


def test_a_plan_is_never_half_written(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, before = fxprune.PruningPlan.load(saved), saved.read_text()
    with pytest.raises(InputError) as caught:
        plan.save(tmp_path / "no" / "plan.json")
    assert str(caught.value) == (
        f"cannot write '{tmp_path}/no/plan.json': the folder '{tmp_path}/no' does not exist; create it first"
    )

    def fail(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left on device"):
        plan.save(saved)
    monkeypatch.undo()
    assert saved.read_text() == before
    assert list(tmp_path.iterdir()) == [saved]


def test_export_finds_an_unwritable_path_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the export began")

    monkeypatch.setattr(torch.onnx, "export", never)
    monkeypatch.setattr(torch.export, "export", never)
    with pytest.raises(InputError, match="does not exist; create it first"):
        fxprune.export(chain(4, 8, 2), tmp_path / "no" / "net.onnx", torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_small_is_prunable_at_all() -> None:
    """The messages above are about what was wrong, not about the network."""
    assert isinstance(fxprune.prune(make(Small), image(), flops=0.5, progress=False), torch.fx.GraphModule)
