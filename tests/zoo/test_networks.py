"""The coverage runner on small networks of very different kinds: the same functions that measure the published 24."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import fxprune
from fxprune.recording.inputs import describe_inputs
from model_zoo import checks, runner
from model_zoo.checks import training, use
from model_zoo.networks import NETWORKS, example_inputs
from model_zoo.networks.random_weights import randomise
from model_zoo.pages.coverage import networks_table as table
from model_zoo.records import RESULTS, Record, read
from model_zoo.runner import main
from model_zoo.study import load

# network -> image size, None for the network's own
SMALL = {
    "timm:test_convnext": None,  # layer norm over channels, layer scale
    "torchvision:shufflenet_v2_x0_5": 64,  # channel shuffle
}


@pytest.mark.aligned
@pytest.mark.parametrize("spec", SMALL)
def test_half_the_macs(spec: str) -> None:
    size = SMALL[spec]
    record = checks.measure(spec, size=size and (3, size, size), onnx=False)
    assert record.failures == {}
    assert {*record.checks} == {"load", "prune", *checks.CHECKS} - {"onnx", "whole"}


@pytest.mark.parametrize("name", ["resnest14d", "rexnet_100", "visformer_tiny"])
def test_networks_whose_dependency_graph_takes_others_for_ever(name: str) -> None:
    record = checks.measure_on_meta(f"timm:{name}")
    assert record.failures == {}
    assert {*record.checks} == {"load", "prune", "shapes", "budget"}
    assert record.figures["prunable_share"] == 1


@pytest.mark.aligned
def test_half_the_macs_with_onnx() -> None:
    record = checks.measure("timm:test_vit")
    assert record.failures == {}
    assert record.figures["reacts"], "dropout was on, and train() changed nothing"
    assert record.figures["onnx"] <= use.ONNX_TOLERANCE


@pytest.mark.parametrize(("any_size", "side"), [(True, 224), (False, 512)])
def test_large_images_are_taken_smaller_where_the_network_takes_any_size(any_size: bool, side: int) -> None:
    model = timm.create_model("test_vit", img_size=512, dynamic_img_size=any_size)
    (image,), kwargs = example_inputs(model)
    assert image.shape == (1, 3, side, side)
    assert not kwargs
    assert model.training


def test_the_24_networks() -> None:
    assert len({*NETWORKS}) == 24


def test_a_network_that_fails_is_a_line_like_any_other() -> None:
    record = checks.measure("timm:test_vit", flops=1e-9)
    assert {*record.failures} == {"prune"}
    assert record.failures["prune"].startswith("BudgetError: flops=1e-09 cannot be reached")
    assert "**fails** prune: BudgetError" in table([record])
    record = checks.measure("timm:no_such_network")
    assert {*record.failures} == {"load"}


# -- the checks themselves: each must notice what it is there for ------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.body(x).flatten(1)))


@pytest.fixture
def case() -> checks.Case:
    model, x = Net().eval(), torch.randn(1, 3, 8, 8)
    inputs = describe_inputs((x,), {})
    randomise(model, inputs)
    pruned = fxprune.prune(model, x, flops=0.5, progress=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = fxprune.record(model, x)
    return checks.Case("net", 0.5, model, state, dense, pruned, inputs, {})


def check(case: checks.Case, *names: str) -> str:
    """The reason of the last of these checks."""
    return [checks.CHECKS[name](case) for name in names][-1]


SIMPLE = [name for name in checks.CHECKS if name not in ("modes", "onnx", "whole")]


def test_a_good_result_passes(case: checks.Case) -> None:
    assert {name: checks.CHECKS[name](case) for name in SIMPLE} == dict.fromkeys(SIMPLE, "")


def test_counts_and_budget_are_compared(case: checks.Case) -> None:
    case.pruned = case.dense
    case.pruned.meta["fxprune"] = fxprune.prune(case.model, torch.zeros(1, 3, 8, 8), flops=0.5).meta["fxprune"]
    assert "the report says" in check(case, "macs")
    assert check(case, "macs", "budget") == "1.0000 of the MACs stay; the budget is 0.5"
    case.figures["ratio"] = 0.49
    assert "0.4900" in check(case, "budget")


def test_a_changed_model_is_noticed(case: checks.Case) -> None:
    case.model.head.bias.data += 1
    assert check(case, "untouched") == "changed: head.bias"


def test_shapes_are_compared(case: checks.Case) -> None:
    case.model.head = nn.Linear(16, 5)
    assert check(case, "shapes") == "[[1, 4]] instead of [[1, 5]]"
    assert check(case, "batch") == "batch 3: [[3, 4]] instead of [[3, 5]]"


def test_rows_that_depend_on_each_other_are_noticed(case: checks.Case) -> None:
    case.pruned.get_submodule("body.1").train()
    assert "differs from its rows" in check(case, "batch")


def test_names_are_compared(case: checks.Case) -> None:
    case.state = {**case.state, "lost": torch.zeros(1)}
    assert check(case, "names") == "missing ['lost'], added []"


def test_a_lost_gradient_is_noticed(case: checks.Case) -> None:
    case.pruned.get_parameter("head.weight").requires_grad = False
    assert check(case, "training") == "no gradient for 1 parameters: head.weight"


@pytest.mark.parametrize("left", [0.0, 1e-12])  # the latter is rounded beside others, and may come to zero by chance
def test_a_gradient_of_zero_is_noticed_unless_what_stays_is_dead_in_the_dense_model_too(
    case: checks.Case, left: float
) -> None:
    case.pruned.get_parameter("head.weight").data.zero_()
    assert "zero gradients for" in check(case, "training")
    for module in (case.model, case.dense):
        module.get_parameter("head.weight").data[:, case.report.plan.kept["head.weight"][1]] = left
    assert check(case, "training") == ""


def test_an_oracle_that_compares_nothing_is_noticed(case: checks.Case) -> None:
    case.pruned.get_parameter("head.weight").data.zero_()
    assert "the check is empty" in check(case, "oracle")


@pytest.mark.parametrize("fixed", [True, False])
def test_a_dropout_that_stays_on_or_off_is_noticed(
    case: checks.Case, monkeypatch: pytest.MonkeyPatch, fixed: bool
) -> None:
    monkeypatch.setattr(training, "_stochastic", lambda spec: (Net(), {}))
    assert check(case, "modes") == ""
    assert case.figures["reacts"]
    apply = fxprune.apply

    def frozen(*args: object) -> nn.Module:
        pruned = apply(*args)
        pruned.drop = nn.Identity() if fixed else pruned.drop
        return pruned

    monkeypatch.setattr(fxprune, "apply", frozen)
    assert check(case, "modes") == (
        "train and eval differ, original (True, True), pruned (False, False)" if fixed else ""
    )


# -- the command -------------------------------------------------------------------------------------------------------


def test_lines_are_appended_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, ran = tmp_path / "new" / "coverage.jsonl", []

    def apart(study: object, ready: Callable[[], tuple[str, str] | None], *_: object) -> Iterator[Record]:
        while (following := ready()) is not None:
            spec = following[1]
            ran.append(spec)
            failed = spec == "timm:b" and len(ran) < 3
            yield Record(spec, checks={"load": "", "prune": "no budget" if failed else ""})

    monkeypatch.setattr(runner, "_apart", apart)
    assert main(["run", "coverage", "timm:a", "timm:b", "--out", str(out)]) == 1
    head, records = read(out)
    assert {"torch", "timm", "python", "cpu", "cores", "date", "command"} <= {*head}
    assert {name: record.passed for name, record in records.items()} == {"timm:a": True, "timm:b": False}
    assert main(["run", "coverage", "timm:a", "timm:b", "--out", str(out), "--resume"]) == 0
    assert ran == ["timm:a", "timm:b", "timm:b"]
    assert len(out.read_text().splitlines()) == 4, "a line is never taken back"
    assert main(["page", "coverage", "--out", str(out)]) == 0
    assert out.with_suffix(".md").read_text().count("| 2 pass |") == 2


HOSTILE = """
import os, sys, time
import torch

def hangs():
    time.sleep(60)

def dies():
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)

def swallows():
    return torch.nn.ParameterList(torch.ones(2**26) for _ in range(20))  # 5 GiB
"""


@pytest.mark.parametrize(
    ("factory", "limits", "reason"),
    [
        ("hangs", ["--timeout", "1"], {"process": "no end within 1 s"}),
        ("dies", [], {"process": "exit code 3: last words"}),
        ("swallows", ["--memory", "3"], {"load": "can't allocate memory"}),
    ],
)
def test_a_network_that_harms_its_process_is_a_line_with_the_reason(
    tmp_path: Path, factory: str, limits: list[str], reason: dict[str, str]
) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    spec = f"{tmp_path}/hostile.py:{factory}"
    options = runner._parser(load()).parse_args(["run", "coverage", *limits])
    options.until, options.threads, options.parser = None, 1, None
    (record,) = runner.run(load()["coverage"], {spec: spec}, set(), options)
    found = record.failures
    assert [*found] == [*reason]
    assert all(text in found[name] for name, text in reason.items())


def test_what_runs_apart_ends_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text(
        "import os, pathlib, time\n"
        "def hangs():\n"
        "    pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "    time.sleep(120)\n"
    )
    words = [
        sys.executable,
        "-m",
        "model_zoo",
        "run",
        "coverage",
        f"{tmp_path}/hostile.py:hangs",
        "--out",
        f"{tmp_path}/out.jsonl",
    ]
    command = subprocess.Popen(words, cwd=Path(__file__).parents[2])
    try:
        wait_for((tmp_path / "pid").exists)
        apart = int((tmp_path / "pid").read_text())
    finally:
        command.kill()
        command.wait()
    wait_for(lambda: not Path(f"/proc/{apart}").exists())


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_networks_run_apart_and_the_page_says_what_came_of_them(tmp_path: Path) -> None:
    names, out = ["timm:test_vit", "timm:no_such_network"], tmp_path / "some.jsonl"
    assert main(["run", "coverage", *names, "--meta", "--out", str(out), "--jobs", "2"]) == 1
    head, records = read(out)
    assert head["command"] == f"python -m model_zoo run coverage {' '.join(names)} --jobs 2 --meta"
    assert {name: record.passed for name, record in records.items()} == dict(zip(names, (True, False), strict=True))
    assert {*records["timm:test_vit"].checks} == {"load", "prune", "shapes", "budget"}
    page = out.with_suffix(".md").read_text()
    assert "1 of 2 networks pass every check." in page
    assert "**fails** load: InputError: timm has no model 'no_such_network'" in page


def test_a_part_of_a_network() -> None:
    record = checks.measure("torchvision:ssdlite320_mobilenet_v3_large@backbone", onnx=False)
    assert record.failures == {}
    assert {"whole", "oracle"} < {*record.checks}


def test_committed_results_are_of_all_networks_and_pass() -> None:
    _, records = read(RESULTS / "coverage.jsonl")
    assert [*records] == [*NETWORKS]
    assert {name: record.failures for name, record in records.items() if not record.passed} == {}
    for record in records.values():
        assert {*record.checks} == {"load", "prune", *checks.CHECKS} - {"whole"}, json.dumps(record.checks)
