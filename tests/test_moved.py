"""Modules under the names they had before."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fxprune
from fxprune import _moved


@pytest.fixture(autouse=True)
def _as_if_new(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*_moved.MOVED, *_moved.PUBLIC):
        monkeypatch.delitem(sys.modules, f"fxprune.{name}", raising=False)
        monkeypatch.delitem(vars(fxprune), name, raising=False)


@pytest.mark.parametrize("name", _moved.MOVED)
def test_an_old_name_is_the_same_module_and_says_where_it_is_now(name: str) -> None:
    home = f"fxprune.{_moved.MOVED[name]}"
    with pytest.warns(DeprecationWarning, match="is now") as told:
        module = import_module(f"fxprune.{name}")
    assert str(told[-1].message) == f"fxprune.{name} is now {home}."
    assert module is import_module(home)
    assert module.__name__ == home
    assert module.__spec__ is not None
    assert module.__spec__.name == home


def test_an_old_name_is_an_attribute_too() -> None:
    with pytest.warns(DeprecationWarning, match=r"^fxprune\.budget is now fxprune\.selection\.budget\.$"):
        module = fxprune.budget
    assert module is import_module("fxprune.selection.budget")
    with pytest.raises(AttributeError, match="no attribute 'budgets'"):
        _ = fxprune.budgets


def test_the_line_that_imports_it_is_shown() -> None:
    code = "import warnings; warnings.simplefilter('default')\nfrom fxprune.plan import PruningPlan\n"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert "<string>:2: DeprecationWarning: fxprune.plan is now fxprune.selection.plan." in run.stderr


def test_public_modules_keep_their_names() -> None:
    for name, home in _moved.PUBLIC.items():
        module = import_module(f"fxprune.{name}")
        assert module is getattr(fxprune, name) is import_module(f"fxprune.{home}")


def test_no_module_has_an_old_name() -> None:
    root = Path(fxprune.__file__).parent
    for name in (*_moved.MOVED, *_moved.PUBLIC):
        path = root / name.replace(".", "/")
        assert not path.with_suffix(".py").exists()
        assert not (path / "__init__.py").exists()


def test_what_was_pickled_by_an_old_name_loads() -> None:
    old = b"cfxprune.inputs\nTensorSpec\n."
    with pytest.warns(DeprecationWarning, match=r"now fxprune\.recording\.inputs"):
        found = pickle.loads(old)
    assert found is import_module("fxprune.recording.inputs").TensorSpec
