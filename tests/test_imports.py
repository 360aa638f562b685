"""The order of the pipeline, enforced: a module imports from the stages before its own, never from those after it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "fxprune"

# The one place where the order is written down. What is not listed fails the test: a new folder gets a place here.
# A file that belongs elsewhere in the order than its folder has a line of its own.
STAGES = [
    "_moved",
    "version",
    "errors",
    "io",
    "arguments",
    "options",
    "ops.refit",
    "ops.table",
    "ops.meta",
    "ops.call",
    "recording",
    "labels",
    "ops",
    "groups",
    "methods",
    "selection",
    "rewriting",
    "verification",
    "depth",
    "training",
    "reports",
    "pipeline",
    "rewriting.into",  # compares with what the oracle compares with
    "reconstruction",
    "depth.choice",  # measures what a refit leaves
    "deploy",
    "request",
    "running",
    "api",
    "io.artifact",
    "io.hub",
    "__init__",
    "cli",
    "__main__",
]

# A method sees channel groups. What a layer is, and how a graph is rewritten, is not its business.
FORBIDDEN = {
    "methods": ("fxprune.recording", "fxprune.labels", "fxprune.rewriting", "torch.fx"),
    # Training asks the rewriter for a graph to train; ``fxprune.rewriting`` itself is its door.
    "training": ("fxprune.labels", "fxprune.rewriting.*"),
}

# A channel graph shows itself (``print``, ``to_html``) by what can show it, called for when it is asked to.
SHOWN = {("groups.channels", "fxprune.reports")}

# Heavy, and not needed before a file is written: only in deploy/, and only inside functions.
ONLY_IN_DEPLOY = ("onnx", "onnxruntime", "onnxscript", "onnx_ir")


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def stage_of(module: str) -> str | None:
    """The stage of a dotted name: ``fxprune.labels.factors`` -> ``labels``; of what no stage has, ``None``."""
    parts = module.split(".")[1:]
    known = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in STAGES]
    return known[0] if known else None


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
            # `from fxprune.io import files` names a module, `from fxprune.io.files import replacing` does not.
            names = [f"{base}.{alias.name}" if is_package(base) else base for alias in node.names]
        for name in names:
            yield name, node.lineno, id(node) not in inside


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).parent.parts)


def is_package(name: str) -> bool:
    return name == "torch" or (ROOT.parent / name.replace(".", "/") / "__init__.py").is_file()


def name_of(path: Path) -> str:
    """The dotted name of a file: ``fxprune.labels.factors``."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def is_or_inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def is_internal(module: str, package: str) -> bool:
    """Whether this is a file of a package, and no name that its door gives out."""
    file = ROOT.parent / module.replace(".", "/")
    return module.startswith(package + ".") and (file.with_suffix(".py").is_file() or file.is_dir())


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_earlier_stages(path: Path) -> None:
    own = stage_of(name_of(path))
    assert own is not None, f"{path} has no place in the pipeline yet: add it to STAGES"
    for module, line, top_level in imports(path.read_text(), package_of(path)):
        if not is_or_inside(module, ("fxprune",)):
            continue
        if any(name_of(path) == f"fxprune.{who}" and is_or_inside(module, (what,)) for who, what in SHOWN):
            assert not top_level, f"{path}:{line} imports {module} when it is loaded, not when something is shown"
            continue
        # A public name taken from the package itself comes through __init__.
        stage = stage_of(module) or "__init__"
        assert stage == own or STAGES.index(stage) < STAGES.index(own), f"{path}:{line} imports {module}, a later stage"


def test_every_stage_is_there() -> None:
    found = {stage_of(name_of(path)) for path in modules()}
    assert found == set(STAGES)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_methods_and_training_know_groups_only_and_onnx_stays_in_deploy(path: Path) -> None:
    folder = name_of(path).split(".")[1]
    for module, line, top_level in imports(path.read_text(), package_of(path)):
        for barred in FORBIDDEN.get(folder, ()):
            inside = is_or_inside(module, (barred,)) if not barred.endswith(".*") else is_internal(module, barred[:-2])
            assert not inside, f"{path}:{line} imports {module} into {folder}"
        if is_or_inside(module, ONLY_IN_DEPLOY):
            assert folder == "deploy", f"{path}:{line} imports {module} outside deploy/"
            assert not top_level, f"{path}:{line} imports {module} when it is loaded, not when it is used"


def test_the_reader_of_imports_reads_every_form() -> None:
    source = """
import onnx
from .. import io
from ..io.files import replacing
from ..labels import views
from torch import fx
from . import sibling
from fxprune import cli, prune
import fxprune
def f():
    import onnxruntime as ort
"""
    assert list(imports(source, "fxprune.deploy")) == [
        ("onnx", 2, True),
        ("fxprune.io", 3, True),
        ("fxprune.io.files", 4, True),
        ("fxprune.labels.views", 5, True),
        ("torch.fx", 6, True),
        ("fxprune.deploy.sibling", 7, True),
        ("fxprune.cli", 8, True),
        ("fxprune.prune", 8, True),
        ("fxprune", 9, True),
        ("onnxruntime", 11, False),
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


def test_no_module_imports_itself_in_a_circle() -> None:
    """Not even for types alone, or inside a function; ``__init__`` files only hand on names."""
    found: dict[str, set[str]] = {}
    names = {name_of(path) for path in modules() if path.name != "__init__.py"}
    for path in modules():
        if path.name != "__init__.py":
            used = {name for name, _, _ in imports(path.read_text(), package_of(path))}
            shown = tuple(what for who, what in SHOWN if name_of(path) == f"fxprune.{who}")
            found[name_of(path)] = {name for name in used & names if not is_or_inside(name, shown)}
    while True:  # take away what imports nothing that is left
        done = {name for name, used in found.items() if not used}
        if not done:
            break
        found = {name: used - done for name, used in found.items() if name not in done}
    assert not found, f"imported in a circle: {sorted(found)}"
