"""The records of the front: every argument is spelled and checked once, flags are made of them, old names lead on."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Small, Unchanged, image, make
from torch import nn

import fxprune
from fxprune import arguments, cli
from fxprune.errors import InputError
from fxprune.options import Keywords, LatencyBudget, Loop, Options

RECORDS = (Keywords, LatencyBudget, Options, Loop)
IN_PYTHON = {"progress", "ratio", "loop"}  # --quiet, the number of --latency, and the flags of Loop itself


def prune(model: nn.Module | None = None, **given: Any) -> Any:
    return fxprune.prune(model or make(), image(), **{"flops": 0.5, "progress": False, **given})


def kept(small: Any) -> Any:
    return small.meta["fxprune"].plan.kept


# -- one spelling


def test_the_keywords_of_prune_are_those_of_the_record() -> None:
    parameters = inspect.signature(fxprune.prune).parameters
    rest = ["model", "example_inputs", "example_kwargs", "options", "old"]
    assert [name for name in parameters if name not in rest] == [each.name for each in fields(Keywords)]
    assert len(parameters) == 26
    for each in fields(Keywords):
        assert parameters[each.name].default == each.default
    of_attach = inspect.signature(fxprune.attach).parameters
    assert {*parameters} - {*of_attach} == {"data", "loss_fn", "epochs", "depth", "reconstruct"}
    assert all(of_attach[name].default == parameters[name].default for name in of_attach if name != "method")


@pytest.mark.parametrize("record", RECORDS)
def test_every_field_is_documented_and_every_one_that_needs_no_python_is_a_flag(record: type) -> None:
    told = arguments.documented(record)
    assert {*told} | {"progress"} >= {each.name for each in fields(record)}
    assert {each.name for each in fields(record) if each.metadata["flag"] is None} <= IN_PYTHON


def test_a_field_with_a_flag_is_an_option_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["prune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for record in RECORDS:
        for each in fields(record):
            if (flag := each.metadata["flag"]) is not None:
                name = (flag.name or each.name).replace("_", "-")
                assert f" --{name}" in text
                assert str(each.default) in text or each.default in (None, (), False, True)


def test_what_a_record_says_of_its_fields_is_read_to_the_full_stop() -> None:
    class Record:
        """A head.

        Args:
            one: the first, in
                two lines of 0.5. And more.
            two: the second: not more

        Raises:
            Error: never.
        """

    assert arguments.documented(Record) == {"one": "the first, in two lines of 0.5", "two": "the second: not more"}


# -- what the arguments mean


def test_macs_and_flops_are_one_budget() -> None:
    one, other = prune(), prune(flops=None, macs=0.5)
    assert kept(one) == kept(other)
    assert other.meta["fxprune"].budget == ("flops", 0.5)
    with pytest.raises(InputError, match=r"^macs=0\.5 and flops=0\.5 are budgets of the same: pass one of them\.$"):
        prune(macs=0.5)
    with pytest.raises(InputError, match=r"^macs=7 is no budget: .* such as macs=0\.5\.$"):
        prune(flops=None, macs=7)


def test_a_part_of_a_model_is_pruned_with_the_inputs_that_it_gets() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make(Small)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(2 * x).softmax(1)

    model = Whole().eval()
    with Unchanged(model):
        whole = fxprune.prune_submodule(model, "body", image(), flops=0.5, ignore=["body.up.0"], progress=False)
    assert type(whole) is Whole
    assert kept(whole.body) == kept(prune(model.body, ignore=["up.0"]))
    for there, here in (
        ({"ignore": ["*.up.0"]}, {"ignore": "up.0"}),
        ({"keep": "body.up.0.b*"}, {"keep": "up.0.bias"}),
    ):
        whole = fxprune.prune_submodule(model, "body", image(), flops=0.5, progress=False, **there)
        assert kept(whole.body) == kept(prune(model.body, **here))
    with pytest.raises(fxprune.FxpruneError, match="no prunable channels"):
        fxprune.prune_submodule(model, "body", image(), flops=0.5, keep=["body"], progress=False)
    with pytest.raises(InputError, match=r"submodule='bodi' is not part of the model\. Did you mean body"):
        fxprune.prune_submodule(model, "bodi", image(), flops=0.5)
    with pytest.raises(
        InputError, match=r"Taylor\(\) takes batches \(inputs, target\), and targets are the whole model's"
    ):
        fxprune.prune_submodule(model, "body", image(), flops=0.5, method="taylor", data=[(image(), torch.zeros(2))])


def test_what_a_loop_of_ones_own_has_no_use_for_is_refused() -> None:
    given: Any = {"method": "slimming", "flops": 0.5, "progress": False}
    for rare, text in (
        (Options(loop=Loop()), r"^loop= has no meaning here, where the loop is yours\.$"),
        (Options(steps=2), r"^slimming trains once; steps= is for criteria\.$"),
        (3, r"^options=3 must be made by fxprune\.Options\(\.\.\.\)\.$"),
    ):
        with pytest.raises(InputError, match=text):
            fxprune.attach(make(), image(), options=rare, **given)  # type: ignore[arg-type]


def test_records_check_what_they_are_given() -> None:
    with pytest.raises(InputError, match=r"^latency=0 is no budget: pass a ratio of the dense model in \(0, 1\]"):
        LatencyBudget(0)
    with pytest.raises(InputError, match=r"^batch=0 must be a whole number of at least 1\.$"):
        LatencyBudget(0.5, batch=0)
    with pytest.raises(InputError, match=r"^amp='no' must be True or False\.$"):
        Loop(amp="no")  # type: ignore[arg-type]


# -- old names


def moved(name: str) -> Any:
    return pytest.warns(DeprecationWarning, match=f"^{name}= of fxprune.prune has moved and will be gone in 0.3: use ")


@pytest.mark.parametrize(("name", "value"), [("steps", 2), ("min_channels", 4), ("max_ratio", 0.5), ("consume", True)])
def test_an_old_name_is_an_option(name: str, value: Any) -> None:
    expected = kept(prune(channels=0.6, flops=None, options=Options(**{name: value})))
    with moved(name) as seen:
        assert kept(prune(channels=0.6, flops=None, **{name: value})) == expected
    assert Path(seen[0].filename) == Path(__file__), "the warning shows the caller's line"
    assert f"use options=fxprune.Options({name}=...) instead" in str(seen[0].message)


def test_the_old_loop_and_resume(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    given: Any = {"method": "slimming", "data": [(image(), torch.tensor([0, 1]))], "epochs": 1, "verify": False}
    with moved("loop"):
        first = prune(loop=Loop(checkpoint=path), **given)
    assert path.exists()
    with moved("resume"):
        again = prune(resume=path, **given)
    expected = prune(options=Options(loop=Loop(resume=path)), **given)
    assert kept(first) == kept(again) == kept(expected)


def test_the_old_provider_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def clock(dense: Any, budget: LatencyBudget, align: int) -> Any:
        seen.append(budget)
        raise InputError("seen")

    monkeypatch.setattr("fxprune.running.Clock", clock)
    cpu = "CPUExecutionProvider"
    with moved("provider"), moved("threads"), pytest.raises(InputError, match="seen"):
        prune(flops=None, latency=0.5, provider=cpu, threads=2)
    assert seen == [LatencyBudget(0.5, provider=cpu, threads=2)]
    with moved("threads"), pytest.raises(InputError, match=r"^threads=0 must be a whole number"):
        prune(threads=0)


def test_the_old_submodule_and_optimizer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with moved("submodule"), moved("optimizer"):
        whole = prune(model, submodule="3", optimizer=optimizer)
    expected = fxprune.prune_submodule(model, "3", image(), flops=0.5, progress=False)
    assert kept(whole[3]) == kept(expected[3])  # type: ignore[index]
    carried = whole[3].meta["fxprune"].optimizer
    assert [p.shape for p in carried.param_groups[0]["params"]] == [p.shape for p in whole.parameters()]


def test_names_that_never_were_come_with_close_matches() -> None:
    with pytest.raises(TypeError, match=r"^prune\(\) got an unexpected keyword argument 'flop'\. Did you mean flops"):
        prune(flop=0.5)
    with pytest.raises(
        TypeError, match=r"^attach\(\) got an unexpected keyword argument 'min_chanels'\. Did you mean min_"
    ):
        fxprune.attach(make(), image(), method="slimming", min_chanels=3)
