"""The documents are true: their code runs, their commands are those of CI, their lists are those of the source.

``python tests/test_readme.py`` writes the generated parts of README.md anew.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import fxprune
from fxprune import cli
from fxprune.labels.rules import RULES
from fxprune.labels.rules.pointwise import POINTWISE
from model_zoo.coverage import LISTS
from model_zoo.records import RESULTS, read, summary, table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
INSTALL = "python -m venv .venv && . .venv/bin/activate && pip install"

KINDS = {
    "movement": "the same op on the labels",
    "pointwise": "operands are joined position by position",
    "contraction": "what is contracted is joined; counted as MACs",
    "normalisation": "statistics over channels make a group approximate",
    "reduction": "a reduction or a softmax over channels is approximate; sorting and cumulation across them lock",
    "spatial": "channel by channel",
    "creation": "no constraint, unless values depend on position",
}


def ops() -> str:
    """The supported ops by kind, as a markdown table."""
    rows = ["| kind | what happens to channels | aten ops |", "|---|---|---|"]
    for kind, meaning in KINDS.items():
        names = {name for name, rule in RULES.items() if rule.__module__.endswith(f".{kind}")}
        tagged = ""
        if kind == "pointwise":
            names |= POINTWISE
            tagged = "everything that PyTorch tags as pointwise (`torch.Tag.pointwise`), and "
        listed = ", ".join(f"`{name}`" for name in sorted(names, key=lambda name: (name.strip("_"), name)))
        rows.append(f"| {kind} | {meaning} | {tagged}{listed} |")
    return "\n".join(rows)


def results() -> str:
    """The coverage table, and what it was measured with."""
    head, records = read(RESULTS / "coverage.jsonl")
    versions = ", ".join(f"{name} {head[name]}" for name in ("torch", "torchvision", "timm", "onnxruntime-gpu"))
    machine = f"{head['cpu']}, {head['cores']} cores, threads: {head['threads']}"
    note = f"({head['date'][:10]}; {versions}, Python {head['python']}; {machine}.)"
    return f"{table(records.values())}\n\n{note}"


LIBRARIES = {
    "families": "The smallest architecture of each of timm's model modules, with weights, every check, and onnxruntime",
    "families-heads": "The same networks with whole heads pruned, on the meta device",
    "torchvision": "All of torchvision, with weights, every check but onnxruntime's; of detectors the backbone",
    "all": "Every architecture of timm on the meta device: recorded, labelled, planned, rewritten, shapes checked",
}


def libraries() -> str:
    """What came of the sweeps over whole libraries, as far as they were run."""
    parts = []
    for name, what in LIBRARIES.items():
        if (RESULTS / f"{name}.jsonl").exists():
            head, records = read(RESULTS / f"{name}.jsonl")
            missing = [spec for spec in LISTS[name.removesuffix("-heads")]() if spec not in records]
            found = [f"Not run yet: {len(missing)} of {len(missing) + len(records)}."] if missing else []
            lines = "\n".join(f"  - {line}" for line in [*found, *summary(records.values())])
            parts.append(
                f"- [{what}](model_zoo/results/{name}.md) (`{head['command']}`, {head['date'][:10]}):\n{lines}"
            )
    return "\n".join(parts)


GENERATED = {"ops": ops, "coverage": results, "libraries": libraries}


def generated(text: str, name: str) -> re.Match[str]:
    found = re.search(rf"<!-- {name}\b[^>]*-->\n(.*?)<!-- end of {name} -->", text, re.DOTALL)
    assert found is not None, f"README.md has no place for {name}"
    return found


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def stand_in(name: str, pretrained: bool = False) -> nn.Module:
    """A small network with the names of the one in the README."""
    torch.manual_seed(0)
    model = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=10, channels=(64, 64, 128, 128)
    )
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    return model.eval()


@pytest.mark.parametrize("number", range(2))
def test_python_blocks_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(blocks("python")) == 2
    monkeypatch.setattr(timm, "create_model", stand_in)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(blocks("python")[number], "README.md", "exec"), names)
    small = names["small"]
    assert isinstance(small, torch.fx.GraphModule)
    report = small.meta["fxprune"]
    assert report.macs_after <= 0.5 * report.macs_before
    written = [["resnet50-half.onnx"], ["plan.json", "small.onnx"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == written[number]


def test_every_public_name_and_argument_is_shown() -> None:
    text = "\n".join(blocks("python"))
    for name in ("prune", "apply", "analyze", "record", "export", "PruningPlan", "methods"):
        assert f"fxprune.{name}" in text
    arguments = fxprune.prune.__kwdefaults__
    assert [name for name in arguments if not re.search(rf"\b{name}=", text)] == []


def test_the_two_commands() -> None:
    assert blocks("sh")[:2] == [
        f"{INSTALL} . && fxprune prune timm:resnet50 --method l2 --flops 0.5 --onnx resnet50-half.onnx\n",
        f'{INSTALL} ".[test]" && pytest\n',
    ]
    ci = (ROOT / ".ci/run").read_text()
    assert 'pip install --quiet ".[test]"\n' in ci
    assert ci.endswith("\npytest\n")
    project = (ROOT / "pyproject.toml").read_text()
    assert 'fxprune = "fxprune.cli:main"' in project
    assert "\ntest = [" in project


def test_command_lines_are_understood() -> None:
    lines = [part for block in blocks("sh") for line in block.splitlines() for part in line.split(" && ")]
    lines = [line for line in lines if line.startswith("fxprune ")]
    assert len(lines) == 5
    for line in lines:
        cli._parser().parse_args(shlex.split(line)[1:])


def test_the_printed_report_has_the_form_of_a_real_one() -> None:
    (shown,) = blocks("text")
    real = str(fxprune.prune(stand_in("resnet50"), flops=0.5, progress=False).meta["fxprune"])

    def form(text: str) -> list[list[str]]:
        head = text.splitlines()[:7]
        return [re.sub(r"[\d.]+(e-\d+)?", "0", line).split() for line in head]

    def words(text: str) -> list[str]:
        return [" ".join(word for word in line if word.isalpha() and len(word) > 1) for line in form(text)]

    assert words(shown)[1:] == words(real)[1:]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_up_to_date(name: str) -> None:
    assert generated(README.read_text(), name).group(1).strip() == GENERATED[name](), "run python tests/test_readme.py"


def test_every_rule_has_a_kind() -> None:
    assert {rule.__module__.rpartition(".")[2] for rule in RULES.values()} == {*KINDS}


def test_the_map_names_every_file_once_and_no_other() -> None:
    package = ROOT / "fxprune"
    mapped = re.findall(r"^\| `([\w/]+\.py)` \|", (package / "README.md").read_text(), re.MULTILINE)
    files = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    files -= {path for path in files if path.endswith("/__init__.py")}
    assert sorted(mapped) == sorted(files)


def test_the_map_enters_at_functions_that_are_there() -> None:
    package = ROOT / "fxprune"
    rows = re.findall(r"^\| `([\w/]+\.py)` \|[^|]*\| ([^|]+) \|$", (package / "README.md").read_text(), re.MULTILINE)
    for path, entries in rows:
        source = (package / path).read_text()
        for name in re.findall(r"`(\w+)`", entries):
            assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), f"{path} has no {name}"


def test_links_lead_somewhere() -> None:
    for document in (README, ROOT / "fxprune/README.md", ROOT / "model_zoo/README.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document}: {target}"


if __name__ == "__main__":
    text = README.read_text()
    for name, make in GENERATED.items():
        span = generated(text, name).span(1)
        text = f"{text[: span[0]]}\n{make()}\n\n{text[span[1] :]}"
    README.write_text(text)
