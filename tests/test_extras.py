"""Packages that not every install has: what does not use them works without, and what does names the extra."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from nets import image, make

import fxprune
from fxprune.errors import InputError, check_installed
from fxprune.io.specs import load_model
from fxprune.reports.plots import new_figure

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    "timm", "torchvision", "networkx", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "rich", "matplotlib",
    "huggingface_hub",
)  # fmt: skip


USES: dict[str, tuple[str, Callable[[], Any]]] = {
    "timm": ("timm", lambda: load_model("timm:resnet18")),
    "torchvision": ("torchvision", lambda: load_model("torchvision:resnet18")),
    "networkx": ("graph", lambda: fxprune.analyze(make(), image()).to_networkx()),
    "onnx": ("onnx", lambda: fxprune.export(make(), "net.onnx", image())),
    "onnxscript": ("onnx", lambda: fxprune.bench(make(), make(), image())),
    "onnxruntime": ("onnx", lambda: fxprune.prune(make(), image(), latency=0.5, progress=False)),
    "onnxruntime, measured": (
        "onnx",
        lambda: fxprune.prune(make(), image(), flops=0.5, round_to="measured", progress=False),
    ),
    "huggingface_hub": ("hub", lambda: fxprune.load_pretrained("user/name")),
    "matplotlib": ("plots", lambda: new_figure((1, 1))),
}

EVERYTHING = f"""
import sys
hidden = {OPTIONAL!r}
sys.modules.update(dict.fromkeys(hidden))  # an import of these fails

import torch, fxprune
from fxprune import cli
from nets import image, make
cli.main(["methods"])
small = fxprune.prune(make(), image(), flops=0.5, data=None)
report = small.meta["fxprune"]
report.to_html("page.html")
fxprune.save(small, "small.safetensors")
fxprune.load("small.safetensors", make())
fxprune.save_pretrained(small, "folder")
fxprune.load_pretrained("folder", make())
fxprune.analyze(make(), image()).to_html("groups.html")
data = [(image(), torch.tensor([1, 2]))]
fxprune.prune(make(), image(), method="slimming", flops=0.5, data=data, epochs=1)
fxprune.prune(make(), image(), method="taylor", flops=0.5, data=data, attention="heads")
assert not [name for name in sys.modules if name.partition(".")[0] in hidden and sys.modules[name] is not None]
print("done")
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_all_of_them_networks_are_pruned_trained_saved_and_shown(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", EVERYTHING], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("done\n")
    assert "epoch 1/1: loss" in run.stderr


@pytest.mark.parametrize("package", OPTIONAL)
def test_without_one_of_them_networks_are_pruned(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    small = fxprune.prune(make(), image(), flops=0.5, progress=False)
    assert small.meta["fxprune"].oracle_error < 1e-5


@pytest.mark.parametrize("use", USES)
def test_what_uses_one_names_the_extra_that_brings_it(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra, call = USES[use]
    package = use.partition(",")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"\b{package}: pip install 'fxprune\[{extra}\]'\."):
        call()


WANTED = ["torch>=2.8", 'onnx>=1.17; extra == "onnx"', 'timm>=1.0; extra == "timm"', "matplotlib; extra == 'plots'"]
OLD = {"onnx": "1.9.0", "timm": "0.9.12", "matplotlib": "1.0"}
NEW = {"onnx": "1.17.0rc1", "timm": "1.0.0.dev3+cu12", "matplotlib": "1.0"}


def installed(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", {"fxprune": WANTED}.__getitem__)
    monkeypatch.setattr(metadata, "version", lambda name: versions[name])


@pytest.mark.parametrize("use", ["onnx", "timm"])
def test_an_older_version_than_the_extra_wants_is_refused_with_both(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(OLD, monkeypatch)
    extra, call = USES[use]
    least = {"onnx": "1.17", "timm": "1.0"}[extra]
    message = f"This needs {extra}>={least}, and {OLD[extra]} is installed: pip install 'fxprune[{extra}]'."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        call()


def test_versions_that_fit_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(NEW, monkeypatch)
    for extra, package in (("onnx", "onnx"), ("timm", "timm"), ("plots", "matplotlib")):
        check_installed(extra, package)


def test_a_checkout_that_is_not_installed_wants_no_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    check_installed("onnx", "onnx")


def test_the_extras_are_there_and_bring_what_the_plain_install_brings() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (plain,) = re.findall(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    (extras,) = re.findall(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    (combined,) = re.findall(r'^all = \["fxprune\[(.*?)\]"\]$', extras, re.MULTILINE)
    for extra in combined.split(","):
        assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), extra
    assert {extra for extra, _ in USES.values()} <= {*combined.split(",")}
    hard = {"torch>=2.8", "numpy", "safetensors"}
    assert {*re.findall(r'"([^"]+)"', plain)} - hard <= {*re.findall(r'"([^"]+)"', extras)}
