"""The documents are true: their code runs, their commands exist, their lists are those of the source.

A page's Python blocks run one after the other, in a folder of their own, with small networks in place of timm's; what a
``text`` block after one shows is what it prints. ``python tests/test_readme.py`` writes the generated parts anew.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import doctest
import re
import shlex
import statistics
import textwrap
from collections.abc import Callable, Mapping
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from nets import image, make
from pages import DOCS, ROOT, block_with, blocks, parsed, run, stand_in
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune import cli, methods
from fxprune.methods import registry
from fxprune.ops import __main__ as ops
from fxprune.ops.table import KINDS
from model_zoo.pages import benchmark, latency
from model_zoo.pages.coverage import networks_table, summary
from model_zoo.pages.field import counts
from model_zoo.pages.papers import papers_table
from model_zoo.records import RESULTS, Record, Results, days, read
from model_zoo.studies import deployed
from model_zoo.studies.coverage import LISTS

pytestmark = pytest.mark.usefixtures("ops_read_once")

README = ROOT / "README.md"
MAP = ROOT / "fxprune/README.md"
INTEGRATIONS = sorted(DOCS.glob("integrations/*.md"))  # run in test_integrations.py
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", MAP, *sorted(DOCS.glob("*.md"))]
INSTALL = "python -m venv .venv && . .venv/bin/activate && pip install"


def methods_table() -> str:
    """All methods, what they read, what they do, and their options with the defaults, as a markdown table."""

    def reads(method: methods.Method) -> str:
        if isinstance(method, methods.Learner):
            return "trains; data are optional" if getattr(method, "label_free", False) else "trains on data"
        needs = sorted(methods.needs_of(method))
        return f"{' and '.join(needs).replace('_', ' ')} on data" if needs else "weights"

    def cell(text: str) -> str:
        def code(match: re.Match[str]) -> str:  # a bar ends a cell, also within backticks
            return f"<code>{match[1].replace('|', '&#124;')}</code>" if "|" in match[1] else f"`{match[1]}`"

        return re.sub("``(.*?)``", code, text)

    known = methods.available()
    made = {name: methods.resolve(name) for name in known}
    order = sorted(known, key=lambda name: (isinstance(made[name], methods.Learner), "data" in reads(made[name]), name))
    rows = ["| `method=` | class | reads | what it does | options |", "|---|---|---|---|---|"]
    for name in order:
        taken = [f"`{field.name}={field.default!r}`" for field in dataclasses.fields(made[name])]  # type: ignore[arg-type]
        kind = type(made[name]).__name__
        rows.append(f"| `{name}` | `{kind}` | {reads(made[name])} | {cell(known[name])} | {', '.join(taken)} |")
    return "\n".join(rows)


def options() -> str:
    """What every command takes, as markdown tables."""
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    about = {action.dest: action.help for action in commands._choices_actions}
    parts = []
    for name, parser in commands.choices.items():
        rows = ["| option | |", "|---|---|"]
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                value = f"[{action.metavar}]" if action.nargs == "?" and action.option_strings else action.metavar
                taken = " ".join([*action.option_strings[:1], *([str(value)] if value else [])])
                rows.append(f"| `{taken}` | {(action.help or '').replace('|', chr(92) + '|')} |")
        parts.append("\n".join([f"### fxprune {name}", "", f"{about[name]}.", "", *rows]))
    return "\n\n".join(parts)


def figures() -> str:
    """MACs, milliseconds and accuracy: what is left at once, after a refit, and after fine-tuning."""
    rows = [
        "| network | MACs that stay | ms, dense → pruned | accuracy, dense → refitted, no labels | fine-tuned |",
        "|---|---:|---:|---:|---:|",
    ]
    timed, latencies = read(RESULTS / "latency.jsonl")
    for record in latencies.values():
        f = record.figures
        if f["batch"] == 1 and f["cut"] == "flops=0.5" and f["version"].startswith("onnxruntime"):
            rows.append(
                f"| {f['network']} | {f['macs_ratio']:.1%} | {f['dense_ms']:.1f} → {f['pruned_ms']:.1f} | – | – |"
            )
    fitted, refits = read(RESULTS / "reconstruction.jsonl")
    for case, name in {
        "efficientnet_lite0": "EfficientNet-Lite0, ImageNet (700 images)",
        "resnet56": "ResNet-56, CIFAR-10",
    }.items():
        of = [r.figures for r in refits.values() if r.figures.get("case") == case and r.figures["method"] == "obs"]
        for ratio in sorted({f["ratio"] for f in of}, reverse=True):
            some = [f for f in of if f["ratio"] == ratio]
            dense, pruned = (statistics.mean(f[key] for f in some) for key in ("dense", "refitted"))
            rows.append(f"| {name} | {ratio:.1%} | – | {dense:.1f} → {pruned:.1f} | – |")
    trained, runs = read(RESULTS / "accuracy.jsonl")

    def accuracy(network: str, method: str, ratio: float) -> float:
        wanted = (network, method, ratio)
        known = [r.figures for r in runs.values()]
        found = [f["accuracy"] for f in known if (f["network"], f["method"], f["ratio"]) == wanted]
        return 100 * statistics.mean(found)

    for network, name in {"resnet_20": "ResNet-20, digits", "vit": "ViT, digits"}.items():
        for ratio in (0.5, 0.25):
            dense, pruned = accuracy(network, "dense", 1.0), accuracy(network, "l2", ratio)
            rows.append(f"| {name} | {ratio:.1%} | – | – | {dense:.1f} → {pruned:.1f} |")
    first = next(iter(latencies.values())).figures
    threads = f"{first['threads']} thread of {first['version']}, batch size 1"
    note = f"milliseconds: {first['provider']}, {threads}, {timed['cpu']}, random weights, {days(timed)}"
    how = 'refitted: `method="obs", round_to=1`, trained weights, a few hundred unlabelled images'
    refit = f"{how}, means of up to three seeds, {days(fitted)}"
    seeds = f"fine-tuned: scikit-learn's digits with noise, means of several seeds, {days(trained)}"
    return "\n".join([*rows, "", f'(`method="l2"`, defaults; {note}; {refit}; {seeds}.)'])


FIELD = {
    "class back": "`into` gives the class back, of any plan",
    "class back, for_class": "the same, with `for_class=True`",
    "batch": "another batch: answered, or refused with the line",
    "size": "another size or length",
    "left-padded": "padded masks",
    "caches in": "a step that takes a cache",
    "generate": "`generate`: the same tokens with a cache and without",
    "fused attention": "attention stays fused",
    "train step": "gradients of class and graph, in train mode",
    "save": "`save_pretrained` and `from_pretrained`",
    "export": "an ONNX file that onnxruntime computes the same from",
}


def field() -> str:
    """What works in the place of the model: of how many networks of each library."""
    head, records = read(RESULTS / "field.jsonl")
    groups = sorted({record.name.partition(":")[0] for record in records.values()})
    files, written = read(RESULTS / "exported.jsonl")

    def of(group: str, found: Mapping[str, Record]) -> dict[str, tuple[int, int, int]]:
        return counts(record for name, record in found.items() if name.partition(":")[0] == group)

    own = {g: of(g, written) | of(g, records) for g in groups}
    rows = [f"| pruned to 0.6 of the MACs | {' | '.join(groups)} |", f"|---|{'---:|' * len(groups)}"]
    for name, text in FIELD.items():
        cells = [f"{own[g][name][0]} of {own[g][name][1]}" if name in own[g] else "–" for g in groups]
        rows.append(f"| {text} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {head[name]}" for name in ("torch", "transformers", "diffusers", "ultralytics"))
    when = f"{days(head)}; ONNX: {days(files)}"
    return "\n".join([*rows, "", f"({versions}; small configurations, random weights, {when}.)"])


def results() -> str:
    """The coverage table, and what it was measured with."""
    head, records = read(RESULTS / "coverage.jsonl")
    versions = ", ".join(f"{name} {head[name]}" for name in ("torch", "torchvision", "timm", "onnxruntime-gpu"))
    machine = f"{head['cpu']}, {head['cores']} cores, threads: {head['threads']}"
    note = f"({days(head)}; {versions}, Python {head['python']}; {machine}.)"
    return f"{networks_table(records.values())}\n\n{note}"


def latencies() -> str:
    """The tables of latencies, and what they were measured with."""
    head, records = read(RESULTS / "latency.jsonl")
    tables = [f"{engine}:\n\n{latency.latencies(found)}" for engine, found in latency.by_engine(records).items()]
    threads = next(iter(records.values())).figures["threads"]
    return "\n\n".join([*tables, f"({days(head)}; {head['cpu']}, {threads} thread.)"])


def as_deployed() -> str:
    """A detector and a decoder."""
    head, records = read(RESULTS / "deployed.jsonl")
    (rows,) = deployed.page(Results(head, records, RESULTS / "deployed.jsonl"))
    return f"{rows}\n\n({days(head)}; {head['cpu']}, torch {head['torch']}, {head['threads']} thread.)"


def speed() -> str:
    """Seconds of fxprune and Torch-Pruning, and what they were measured with."""
    head, records = read(RESULTS / "benchmark.jsonl")
    versions = f"torch {head['torch']}, timm {head['timm']}, Torch-Pruning {head['torch-pruning']}"
    return f"{benchmark.short_table([*records.values()])}\n\n({days(head)}; {versions}; {head['cpu']}, 1 thread.)"


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
            parts.append(f"- [{what}](../model_zoo/results/{name}.md) (`{head['command']}`, {days(head)}):\n{lines}")
    return "\n".join(parts)


GENERATED: dict[str, tuple[Path, Callable[[], str]]] = {
    "figures": (README, figures),
    "field": (README, field),
    "options": (DOCS / "command-line.md", options),
    "ops": (DOCS / "ops.md", ops.markdown),
    "methods": (DOCS / "methods.md", methods_table),
    "coverage": (DOCS / "results.md", results),
    "libraries": (DOCS / "results.md", libraries),
    "latency": (DOCS / "results.md", latencies),
    "deployed": (DOCS / "results.md", as_deployed),
    "papers": (DOCS / "results.md", papers_table),
    "speed": (DOCS / "comparison.md", speed),
}


def generated(text: str, name: str) -> re.Match[str]:
    found = re.search(rf"<!-- {name}\b[^>]*-->\n(.*?)<!-- end of {name} -->", text, re.DOTALL)
    assert found is not None, f"there is no place for {name}"
    return found


def tiny(name: str, num_classes: int) -> Any:
    model = make()
    assert num_classes == model.head.out_features
    model.pretrained_cfg = {"input_size": (3, 8, 8)}
    return model


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(12, 3, 8, 8, generator=generator), torch.randint(0, 10, (12,), generator=generator)
    return DataLoader(TensorDataset(images, labels), 4)


def within_half(small: Any) -> None:
    assert isinstance(small, torch.fx.GraphModule)
    report = small.meta["fxprune"]
    assert 0 < report.macs_after <= 0.5 * report.macs_before


ATTACHED = """
    learner = fxprune.attach(model, example_inputs, method="slimming", flops=0.5)   # .model is what to train
    for x, y in loader:
        loss = learner.loss(criterion(learner.model(x), y)); optimizer.zero_grad(); loss.backward()
        learner.after_backward(); optimizer.step(); learner.after_step()
    pruned = learner.finish()                                                        # same return as prune()
"""


def check_readme(names: dict[str, Any], folder: Path) -> None:
    within_half(names["small"])
    assert names["logits"].shape == (8, 10)
    assert sorted(path.name for path in folder.iterdir()) == ["half.onnx", "half.safetensors"]


def check_guide(names: dict[str, Any], folder: Path) -> None:
    small, model, x = names["small"], names["model"], names["images"]
    within_half(small)
    within_half(names["pruned"])
    assert not torch.equal(names["pruned"].get_parameter("fc.bias"), model.fc.bias), "trained"
    made, promised = (
        ast.parse(textwrap.dedent(text)).body for text in (block_with("fxprune.attach(", DOCS / "guide.md"), ATTACHED)
    )
    mine = ("criterion =", "optimizer =", "example_inputs =")
    assert [ast.dump(p) for p in made if not ast.unparse(p).startswith(mine)] == [ast.dump(p) for p in promised]
    with torch.no_grad():
        expected = small(x)
        assert torch.equal(names["loaded"].eval()(x), expected)
        assert torch.allclose(names["program"](x), expected, atol=1e-5)
        assert torch.allclose(torch.from_numpy(names["logits"]), expected, atol=1e-5)
        assert torch.allclose(names["resnet"].eval()(x), expected, atol=1e-5)
        assert names["whole"](x).shape == (12, 10)
    assert names["whole"].layer1.meta["fxprune"].oracle_error < 1e-5
    assert {id(p) for g in names["optimizer"].param_groups for p in g["params"]} == {id(p) for p in small.parameters()}
    assert len(names["optimizer"].state) == len(list(small.parameters())), "its moments were carried over"
    written = "groups.html plan.json report.html small.onnx small.pt2 small.safetensors widths.png"
    assert sorted(path.name for path in folder.iterdir()) == written.split()


def check_methods(names: dict[str, Any], folder: Path) -> None:
    code = block_with('method="scratch"', DOCS / "methods.md")
    (told,) = re.findall(r"# (learned .*), \.\.\.", code)
    assert names["printed"].count(told) == 2
    assert names["found"].names == ("seed 0", "seed 1")
    assert (folder / "similarity.png").exists()
    check_criterion()
    check_learner(names["Polarization"])


def check_criterion() -> None:
    assert len(block_with('@register("l2_per_mac")', DOCS / "methods.md").splitlines()) < 40
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


def check_learner(polarization: Any) -> None:
    assert len(block_with('@register("polarization")', DOCS / "methods.md").splitlines()) < 40
    model = make()
    learner = fxprune.attach(model, image(), method=polarization(strength=0.5), channels=0.5, progress=False)
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


def check_hub(names: dict[str, Any], folder: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(
            names["loaded"].eval()(x), fxprune.load_pretrained("resnet50-half", names["model"]).eval()(x)
        )
    assert type(names["small"]).__name__ == "LlamaForCausalLM"
    assert sorted(path.name for path in folder.iterdir()) == ["llama-half", "resnet50-half"]


CHECKS = {"README.md": check_readme, "guide.md": check_guide, "methods.md": check_methods, "hub.md": check_hub}
NEEDS = {"hub.md": "transformers"}


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.mark.usefixtures("_own_registry", "one_thread")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page)], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", tiny if page.name == "methods.md" else stand_in)
    monkeypatch.setattr("fxprune.deploy.stopwatch._SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name], reason="networks of transformers are an extra: pip install '.[zoo]'")
    names = run(page)
    if page.name in CHECKS:
        CHECKS[page.name](names, tmp_path)
    else:
        assert list(tmp_path.iterdir()) == []


def test_no_block_is_left_out() -> None:
    for page in [*PAGES, *INTEGRATIONS]:
        found = parsed(page)
        assert {block.language for block in found} <= {"python", "sh", "text", "toml"}, page
        alone = [block for block in found if block.language == "text" and not block.follows]
        assert len(alone) == (page.name == "guide.md"), page  # the report of a command


PUBLIC = [name for name in fxprune.__all__ if callable(getattr(fxprune, name))]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """The names that examples in docstrings may use."""
    return run(DOCS / "reference.md")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PUBLIC)
def test_examples_in_docstrings_run(
    name: str, reference: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder(recurse=False).find(getattr(fxprune, name), name, globs=dict(reference))
    assert any(test.examples for test in found), f"fxprune.{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in found:
        told: list[str] = []
        assert runner.run(test, out=told.append).failed == 0, "".join(told)


@pytest.mark.usefixtures("_own_registry")
def test_an_installed_package_adds_its_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = block_with("entry-points", DOCS / "methods.md", "toml")
    assert re.fullmatch(r'\[project\.entry-points\."fxprune\.methods"\]\nl2_per_mac = "my_package:L2PerMac"\n', entry)
    (tmp_path / "my_package.py").write_text(block_with('@register("l2_per_mac")', DOCS / "methods.md"))
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


KEYWORDS = (
    "example_kwargs method flops params channels latency data loss_fn epochs ignore exact attention scope round_to "
    "verify seed progress"
)


def test_every_public_name_and_argument_is_shown() -> None:
    text = "\n".join(code for page in PAGES for code in blocks("python", page))
    for name in ("prune", "attach", "apply", "analyze", "record", "export", "PruningPlan", "methods", "study"):
        assert f"fxprune.{name}" in text
    assert [name for name in KEYWORDS.split() if not re.search(rf"\b{name}=", text)] == []
    shown = (DOCS / "reference.md").read_text()
    assert [name for name in fxprune.__all__ if not re.search(rf"\b{name}\b", shown) and name != "__version__"] == []


def test_the_readme_is_a_page() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_the_two_commands() -> None:
    assert blocks("sh", README)[:2] == [
        f"{INSTALL} . && fxprune prune timm:resnet50 --method l2 --flops 0.5 --onnx resnet50-half.onnx\n",
        f'{INSTALL} ".[test]" && pytest\n',
    ]
    ci = (ROOT / ".ci/run").read_text()
    assert 'pip install --quiet ".[test]"\n' in ci
    assert ci.endswith("\npytest\n")
    project = (ROOT / "pyproject.toml").read_text()
    assert 'fxprune = "fxprune.cli:main"' in project
    assert "\ntest = [" in project
    assert 'pip install --quiet ".[docs]"\nmkdocs build --strict' in ci


TOOLS = {"pytest", "ruff", "mypy", "mkdocs", "shtab", "."}


def test_command_lines_are_understood() -> None:
    lines = [line for page in [*PAGES, *INTEGRATIONS] for code in blocks("sh", page) for line in code.splitlines()]
    project = (ROOT / "pyproject.toml").read_text()
    ours = 0
    for line in (part for whole in lines for part in whole.split(" && ")):
        tool, *words = shlex.split(line)
        if tool == "fxprune":
            cli.parser().parse_args(words)
            ours += 1
        elif tool == "python" and words[0] == "-m":
            assert find_spec(words[1]) is not None, line
        elif tool == "python":
            assert (ROOT / words[0]).exists(), line
        elif tool == "pip":
            for extra in re.findall(r"\[(.*)\]", line):
                assert all(re.search(rf"^{name} = \[", project, re.MULTILINE) for name in extra.split(",")), line
        else:
            assert tool in TOOLS, line
    assert ours == 12


def test_the_printed_report_has_the_form_of_a_real_one() -> None:
    (shown,) = (block.code for block in parsed(DOCS / "guide.md") if block.language == "text" and not block.follows)
    real = str(fxprune.prune(stand_in("resnet50"), flops=0.5, round_to=2, progress=False).meta["fxprune"])

    def form(text: str) -> list[list[str]]:
        head = text.splitlines()[:8]
        return [re.sub(r"[\d.]+(e-\d+)?", "0", line).split() for line in head]

    def words(text: str) -> list[str]:
        return [" ".join(word for word in line if word.isalpha() and len(word) > 1) for line in form(text)]

    assert words(shown)[1:] == words(real)[1:]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_up_to_date(name: str) -> None:
    page, make = GENERATED[name]
    assert generated(page.read_text(), name).group(1).strip() == make(), "run python tests/test_readme.py"


MAP_ROW = re.compile(r"^\| `(\w+/|\w+\.py)` \|[^|]*\|([^|]*)\|$", re.MULTILINE)


def test_the_map_names_every_folder_and_loose_file_once_and_no_other() -> None:
    package = ROOT / "fxprune"
    files = {path.relative_to(package) for path in package.rglob("*.py")}
    places = {path.parts[0] + "/" * (len(path.parts) > 1) for path in files} - {"__init__.py"}
    assert sorted(place for place, _ in MAP_ROW.findall(MAP.read_text())) == sorted(places)


def test_a_folder_says_what_its_files_are_for() -> None:
    for folder in (path.parent for path in (ROOT / "fxprune").glob("*/__init__.py")):
        names = {path.stem for path in folder.glob("*.py")} - {
            "__init__",
            "__main__",
            *KINDS,
        }  # a kind of ops is a name
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
    for page in [*PAGES, *INTEGRATIONS, ROOT / "model_zoo/README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


if __name__ == "__main__":
    for name, (page, make) in GENERATED.items():
        text = page.read_text()
        begin, end = generated(text, name).span(1)
        page.write_text(f"{text[:begin]}\n{make()}\n\n{text[end:]}")
