"""The documents are true: their code runs, their commands are those of CI, their lists are those of the source.

``python tests/test_readme.py`` writes the generated parts of README.md anew.
"""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import image, make
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import cli, methods
from fxprune.methods import registry
from fxprune.ops import __main__ as ops
from model_zoo import benchmark, latency
from model_zoo.coverage import LISTS
from model_zoo.records import RESULTS, read, summary, table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MAP = ROOT / "fxprune/README.md"
INSTALL = "python -m venv .venv && . .venv/bin/activate && pip install"


def methods_table() -> str:
    """All methods, what they read, and what they do, as a markdown table."""

    def reads(method: methods.Method) -> str:
        if isinstance(method, methods.Learner):
            return "trains; data are optional" if getattr(method, "label_free", False) else "trains on data"
        needs = sorted(methods.needs_of(method))
        return f"{' and '.join(needs).replace('_', ' ')} on data" if needs else "weights"

    def cell(text: str) -> str:
        return text.replace("``", "`").replace("|", r"\|")

    known = methods.available()
    made = {name: methods.resolve(name) for name in known}
    order = sorted(known, key=lambda name: (isinstance(made[name], methods.Learner), "data" in reads(made[name]), name))
    rows = ["| `method=` | reads | what it does |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {reads(made[name])} | {cell(known[name])} |" for name in order)])


def results() -> str:
    """The coverage table, and what it was measured with."""
    head, records = read(RESULTS / "coverage.jsonl")
    versions = ", ".join(f"{name} {head[name]}" for name in ("torch", "torchvision", "timm", "onnxruntime-gpu"))
    machine = f"{head['cpu']}, {head['cores']} cores, threads: {head['threads']}"
    note = f"({head['date'][:10]}; {versions}, Python {head['python']}; {machine}.)"
    return f"{table(records.values())}\n\n{note}"


def latencies() -> str:
    """The table of latencies, and what it was measured with."""
    head, records = read(RESULTS / "latency.jsonl")
    first = next(iter(records.values())).figures
    threads = f"{first['threads']} thread of onnxruntime {first['onnxruntime_version']}"
    return f"{latency.table(records)}\n\n({head['date'][:10]}; {head['cpu']}, {first['provider']}, {threads}.)"


def speed() -> str:
    """Seconds of fxprune and Torch-Pruning, and what they were measured with."""
    head, records = read(RESULTS / "benchmark.jsonl")
    versions = f"torch {head['torch']}, timm {head['timm']}, Torch-Pruning {head['torch-pruning']}"
    return (
        f"{benchmark.short_table([*records.values()])}\n\n({head['date'][:10]}; {versions}; {head['cpu']}, 1 thread.)"
    )


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


GENERATED = {
    "ops": ops.markdown,
    "methods": methods_table,
    "coverage": results,
    "libraries": libraries,
    "latency": latencies,
    "speed": speed,
}


def generated(text: str, name: str) -> re.Match[str]:
    found = re.search(rf"<!-- {name}\b[^>]*-->\n(.*?)<!-- end of {name} -->", text, re.DOTALL)
    assert found is not None, f"README.md has no place for {name}"
    return found


def blocks(language: str, document: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)


def block_with(text: str, language: str = "python", document: Path = README) -> str:
    (found,) = (block for block in blocks(language, document) if text in block)
    return found


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
    monkeypatch.setattr(timm, "create_model", stand_in)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(blocks("python")[number], "README.md", "exec"), names)
    small = names["small"]
    assert isinstance(small, torch.fx.GraphModule)
    report = small.meta["fxprune"]
    assert report.macs_after <= 0.5 * report.macs_before
    written = [["resnet50-half.onnx"], ["groups.html", "plan.json", "report.html", "small.onnx", "widths.png"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == written[number]


@pytest.mark.usefixtures("one_thread")
def test_save_load_and_fine_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", stand_in)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block_with("fxprune.save("), "README.md", "exec"), names)
    small, x = names["small"].eval(), names["x"]
    with torch.no_grad():
        expected = small(x)
        assert torch.equal(names["loaded"].eval()(x), expected)
        smaller = torch.randn(3, 3, 64, 64)  # of the size that the stand-in was recorded with
        assert torch.allclose(names["program"](smaller), small(smaller), atol=1e-5)
        assert torch.allclose(names["resnet"].eval()(x), expected, atol=1e-5)
    assert {id(p) for g in names["optimizer"].param_groups for p in g["params"]} == {id(p) for p in small.parameters()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.pt2", "small.safetensors"]


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(12, 3, 8, 8, generator=generator), torch.randint(0, 10, (12,), generator=generator)
    return DataLoader(TensorDataset(images, labels), 4)


ATTACHED = """
    learner = fxprune.attach(model, example_inputs, method="slimming", flops=0.5)   # .model is what to train
    for x, y in loader:
        loss = learner.loss(criterion(learner.model(x), y)); optimizer.zero_grad(); loss.backward()
        learner.after_backward(); optimizer.step(); learner.after_step()
    pruned = learner.finish()                                                        # same return as prune()
"""


@pytest.mark.usefixtures("one_thread")
def test_training_in_both_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = block_with("fxprune.attach(")
    made, promised = (ast.parse(textwrap.dedent(text)).body for text in (code, ATTACHED))
    shown = [ast.dump(part) for part in made if not ast.unparse(part).startswith(("small =", "optimizer ="))]
    assert shown == [ast.dump(part) for part in promised]
    names: dict[str, Any] = {"fxprune": fxprune, "torch": torch, "model": make(), "example_inputs": image()}
    names |= {"loader": loader(), "test_loader": loader(), "criterion": F.cross_entropy}
    exec(compile(code, "README.md", "exec"), names)
    for key in ("small", "pruned"):
        report = names[key].meta["fxprune"]
        assert 0 < report.macs_after <= 0.5 * report.macs_before
        assert not torch.equal(names[key].get_parameter("head.bias"), names["model"].head.bias), "trained"
    assert (tmp_path / "run.pt").exists()

    finished = code.partition("learner =")[0].replace("resume=None", 'resume="run.pt"')
    assert 'resume="run.pt"' in finished
    exec(compile(finished, "README.md", "exec"), again := dict(names))
    assert all(torch.equal(t, names["small"].state_dict()[n]) for n, t in again["small"].state_dict().items())


@pytest.mark.usefixtures("one_thread")
def test_scratch_without_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tiny(name: str, num_classes: int) -> Any:
        model = make()
        assert num_classes == model.head.out_features
        model.pretrained_cfg = {"input_size": (3, 8, 8)}
        return model

    monkeypatch.setattr(timm, "create_model", tiny)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"fxprune": fxprune, "timm": timm}
    code = block_with('method="scratch"')
    exec(compile(code, "README.md", "exec"), names)
    (told,) = re.findall(r"# (learned .*), \.\.\.", code)
    assert capsys.readouterr().out.count(told) == 2
    assert names["found"].names == ("seed 0", "seed 1")
    assert (tmp_path / "similarity.png").exists()


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.mark.usefixtures("_own_registry")
def test_the_criterion_of_a_third_party() -> None:
    code = block_with('@register("l2_per_mac")')
    assert len(code.splitlines()) < 40
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert methods.available()["l2_per_mac"] == "Norm of what a channel owns, per multiply-accumulate that it costs."
    model, x = make(), image()
    report = fxprune.prune(model, x, method="l2_per_mac", flops=0.5, progress=False).meta["fxprune"]
    assert 0.4 < report.macs_after / report.macs_before <= 0.5
    graph = fxprune.analyze(model, x)
    state = methods.ModelState(graph, dict(model.named_parameters()))
    up = next(group for group in graph.prunable if group.name == "up.0")
    macs = 2 * 64 * (16 * 9 + 16)  # 2 images, 8 x 8 positions, a filter of 3 x 3 x 16 and a column of 16
    by_norm = methods.L2().score(up, state)
    assert by_norm is not None
    assert methods.resolve("l2_per_mac").score(up, state) == pytest.approx(by_norm / macs)  # type: ignore[union-attr]


@pytest.mark.usefixtures("_own_registry")
def test_an_installed_package_adds_its_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = block_with("entry-points", "toml")
    assert re.fullmatch(r'\[project\.entry-points\."fxprune\.methods"\]\nl2_per_mac = "my_package:L2PerMac"\n', entry)
    (tmp_path / "my_package.py").write_text(block_with('@register("l2_per_mac")'))
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fxprune.methods]\nl2_per_mac = my_package:L2PerMac\n")
    assert "l2_per_mac" not in methods.available()
    monkeypatch.syspath_prepend(tmp_path)
    invalidate_caches()
    for _ in range(2):  # also when it is registered
        report = fxprune.prune(make(), image(), method="l2_per_mac", flops=0.5, progress=False).meta["fxprune"]
        assert report.method == "l2_per_mac"
    assert cli.main(["methods"]) == 0
    assert "l2_per_mac" in capsys.readouterr().out


@pytest.mark.usefixtures("_own_registry", "one_thread")
def test_the_learner_of_a_third_party() -> None:
    code = block_with('@register("polarization")', document=MAP)
    assert len(code.splitlines()) < 40
    names: dict[str, Any] = {}
    exec(compile(code, "fxprune/README.md", "exec"), names)
    model = make()
    learner = fxprune.attach(model, image(), method=names["Polarization"](strength=0.5), channels=0.5, progress=False)
    scales = torch.cat([model.stem[1].weight, model.up[1].weight, model.down[1].weight]).detach().abs()
    expected = 0.5 * (1.2 * scales.sum() - (scales - scales.mean()).abs().sum())
    torch.testing.assert_close(learner.loss(torch.zeros(())).detach(), expected)
    small = fxprune.prune(model, image(), method="polarization", channels=0.5, data=loader(), epochs=1, progress=False)
    assert small.meta["fxprune"].params_after < small.meta["fxprune"].params_before
    kept = learner.finish().meta["fxprune"].plan.kept
    groups = {"up.0.weight": model.up[1].weight, "stem.0.weight": (model.stem[1].weight + model.down[1].weight) / 2}
    weakest = torch.cat([scale.detach() / 1 for scale in groups.values()]).sort().values[20]
    for name, scale in groups.items():
        assert kept[name][0] == torch.where(scale.detach() >= weakest)[0].tolist()


def test_every_public_name_and_argument_is_shown() -> None:
    text = "\n".join(blocks("python"))
    for name in ("prune", "attach", "apply", "analyze", "record", "export", "PruningPlan", "methods", "study", "Loop"):
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
    assert len(lines) == 11
    for line in lines:
        cli.parser().parse_args(shlex.split(line)[1:])


def test_the_printed_report_has_the_form_of_a_real_one() -> None:
    (shown,) = blocks("text")
    real = str(fxprune.prune(stand_in("resnet50"), flops=0.5, round_to=2, progress=False).meta["fxprune"])

    def form(text: str) -> list[list[str]]:
        head = text.splitlines()[:8]
        return [re.sub(r"[\d.]+(e-\d+)?", "0", line).split() for line in head]

    def words(text: str) -> list[str]:
        return [" ".join(word for word in line if word.isalpha() and len(word) > 1) for line in form(text)]

    assert words(shown)[1:] == words(real)[1:]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_up_to_date(name: str) -> None:
    assert generated(README.read_text(), name).group(1).strip() == GENERATED[name](), "run python tests/test_readme.py"


MAP_ROW = re.compile(r"^\| `(\w+/|\w+\.py)` \|[^|]*\|([^|]*)\|$", re.MULTILINE)


def test_the_map_names_every_folder_and_loose_file_once_and_no_other() -> None:
    package = ROOT / "fxprune"
    files = {path.relative_to(package) for path in package.rglob("*.py")}
    places = {path.parts[0] + "/" * (len(path.parts) > 1) for path in files} - {"__init__.py"}
    assert sorted(place for place, _ in MAP_ROW.findall(MAP.read_text())) == sorted(places)


def test_a_folder_says_what_its_files_are_for() -> None:
    for folder in (path.parent for path in (ROOT / "fxprune").glob("*/__init__.py")):
        names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        doc = (folder / "__init__.py").read_text().partition('"""')[2].partition('"""')[0]
        if folder.name != "methods":  # one file per method, by its name
            assert [name for name in sorted(names) if f"``{name}``" not in doc] == [], folder


def test_the_map_enters_at_functions_that_are_there() -> None:
    package = ROOT / "fxprune"
    for place, entries in MAP_ROW.findall(MAP.read_text()):
        files = package.joinpath(place).rglob("*.py") if place.endswith("/") else [package / place]
        source = "\n".join(path.read_text() for path in files)
        for name in re.findall(r"`(\w+)`", entries):
            assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), f"{place} has no {name}"


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
