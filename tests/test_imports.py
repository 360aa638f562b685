"""The order of the pipeline, enforced: a module imports from the stages before its own, never from those after it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "fxprune"

# The one place where the order is written down. What is not listed fails the test: a new module gets a place here.
STAGES = [
    "version",
    "errors",
    "text",
    "files",
    "options",
    "forms",
    "rows",
    "page",
    "plots",
    "structure",
    "near",
    "inputs",
    "checks",
    "meta",
    "randomness",
    "op_table",
    "recording",
    "labels",
    "ops",
    "cost",
    "channels",
    "analysis",
    "optim",
    "methods",
    "plan",
    "study",
    "budget",
    "rewriting",
    "verify",
    "proof",
    "probes",
    "training",
    "report",
    "pipeline",
    "original",
    "specs",
    "deploy",
    "latency",
    "api",
    "artifact",
    "__init__",
    "cli",
]

# A method sees channel groups. What a layer is, and how a graph is rewritten, is not its business.
FORBIDDEN_TO_METHODS = ("fxprune.recording", "fxprune.labels", "fxprune.rewriting", "torch.fx")

# Heavy, and not needed before a file is written: only in deploy/, and only inside functions.
ONLY_IN_DEPLOY = ("onnx", "onnxruntime", "onnxscript", "onnx_ir")


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def stage_of(module: str) -> str:
    """The stage of a dotted name: ``fxprune.labels.rules`` -> ``labels``; the package itself is ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(source: str, package: str) -> Iterator[tuple[str, int, bool]]:
    """Every import as (dotted name, line, whether at the top level of the module); type-checking blocks count too."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    package.split(".")[: len(package.split(".")) - node.level + 1] + ([base] if base else [])
                )
            # `from fxprune import files` names a module, `from fxprune.files import replacing` does not.
            names = [f"{base}.{alias.name}" if base == "fxprune" else base for alias in node.names]
        for name in names:
            yield name, node.lineno, id(node) not in inside


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).parent.parts)


def name_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def is_or_inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_earlier_stages(path: Path) -> None:
    own = name_of(path)
    assert own in STAGES, f"{own} has no place in the pipeline yet: add it to STAGES"
    for module, line, _ in imports(path.read_text(), package_of(path)):
        if module == "fxprune" or module.startswith("fxprune."):
            stage = stage_of(module)
            # A public name taken from the package itself comes through __init__.
            stage = stage if stage in STAGES else "__init__"
            assert stage == own or STAGES.index(stage) < STAGES.index(own), (
                f"{path}:{line} imports {module}, a later stage"
            )


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_methods_know_groups_only_and_onnx_stays_in_deploy(path: Path) -> None:
    for module, line, top_level in imports(path.read_text(), package_of(path)):
        if name_of(path) == "methods":
            assert not is_or_inside(module, FORBIDDEN_TO_METHODS), f"{path}:{line} imports {module} into a method"
        if is_or_inside(module, ONLY_IN_DEPLOY):
            assert name_of(path) == "deploy", f"{path}:{line} imports {module} outside deploy/"
            assert not top_level, f"{path}:{line} imports {module} when it is loaded, not when it is used"


def test_the_reader_of_imports_reads_every_form() -> None:
    source = """
import onnx
from .. import files
from ..labels.rules import views
from . import sibling
from fxprune import cli, prune
import fxprune
def f():
    import onnxruntime as ort
"""
    assert list(imports(source, "fxprune.deploy")) == [
        ("onnx", 2, True),
        ("fxprune.files", 3, True),
        ("fxprune.labels.rules", 4, True),
        ("fxprune.deploy", 5, True),
        ("fxprune.cli", 6, True),
        ("fxprune.prune", 6, True),
        ("fxprune", 7, True),
        ("onnxruntime", 9, False),
    ]


def test_a_bare_import_is_light() -> None:
    """What a pruning may need later is imported when it is needed."""
    heavy = ("timm", "torchvision", "onnx", "onnxscript", "onnxruntime", "networkx", "matplotlib", "rich")
    code = (
        "import sys, torch; before = set(sys.modules); import fxprune, fxprune.api; print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    new = {name.partition(".")[0] for name in run.stdout.split()}
    assert "fxprune" in new
    assert not new & set(heavy)


def test_pruning_does_not_import_the_compiler() -> None:
    """Which takes a second that no stage needs."""
    code = """
import sys
import torch
from torch import nn
import fxprune
net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.GELU(), nn.Flatten(),
                    nn.Linear(16 * 16, 10))
fxprune.prune(net, torch.randn(1, 3, 8, 8), flops=0.5, round_to=1, progress=False)
assert "torch._dynamo" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert run.returncode == 0, run.stderr
